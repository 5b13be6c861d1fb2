//! The accept loop: takes sockets off the public listeners and gives each to the shard with the fewest.
//!
//! It has a thread of its own, so that a storm of reconnects does not hold up the bus, and so that a socket passes
//! no runtime on its way to its shard.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;
use std::{future, iter, mem, thread};

use mio::net::{TcpListener, TcpStream};
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::oneshot;

use crate::config::{PingFormat, Settings};
use crate::http::HEAD_MAX;
use crate::limits::connections::{ConnectionLimits, ConnectionSlot, LimitReached};
use crate::metrics::rejections::RejectionClass;
use crate::metrics::{AcceptLog, Metrics};
use crate::node::memory_watch::MemoryWatch;
use crate::shard::mailbox::{Mailboxes, NewSocket, ShardMessage};
use crate::shard::runtime::{self, Ticker};

/// Connections that the kernel holds until they are accepted; it takes the smaller of this and
/// net.core.somaxconn. A storm of reconnects waits here instead of retrying after a second.
pub(crate) const BACKLOG: i32 = 65_535;

/// Most that the kernel holds for one connection, in bytes (it counts twice as many, socket(7)). Left alone it would
/// grow to 4 MiB, so that ten thousand readers who stall would take 25 GB of the kernel; what does not fit waits in
/// the feed, once for all. Enough for 10 Mbit/s to a reader 100 ms away.
pub(crate) const SEND_BUFFER: usize = 128 * 1024;

/// Pause after an accept that failed for want of something: without descriptors the next one fails too.
const PAUSE: Duration = Duration::from_millis(100);

/// Pause after a batch: who comes meanwhile is accepted together. A lone client is accepted at once; in a storm two
/// threads would wake for each, which costs as much as all the rest of accepting it.
const GATHER: Duration = Duration::from_millis(1);

/// Accepts in a row before the other listeners get their turn.
const ACCEPTS: usize = 256;

/// Time between two turns at least: the watchdog wants to see that the loop lives.
const TURN: Duration = Duration::from_millis(500);

/// Binds a public listener.
pub fn bind(addr: SocketAddr, settings: &Settings) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?; // a restart must not wait for TIME_WAIT
    if addr.is_ipv6() {
        socket.set_only_v6(true)?; // `--listen 0.0.0.0:80 --listen [::]:80` means two
    }
    socket.bind(&addr.into())?;
    adopt(socket.into(), settings)
}

/// Makes a bound socket a public listener. What is set here holds for every socket that it accepts (tcp(7): options
/// are inherited), which saves two system calls a connection.
pub fn adopt(listener: std::net::TcpListener, settings: &Settings) -> io::Result<TcpListener> {
    let socket = SockRef::from(&listener);
    socket.set_send_buffer_size(SEND_BUFFER)?;
    socket.set_tcp_nodelay(true)?; // events leave at once; batches are made by the feed
    // Nobody answers a JSON ping, so the kernel has to tell when a peer no longer acknowledges. Where pings are
    // answered they tell, and the kernel, which counts a small window as silence too, would end slow readers.
    if settings.ping_format == PingFormat::Json {
        socket.set_tcp_user_timeout(Some(settings.ping_interval + settings.ping_timeout))?;
    }
    socket.set_nonblocking(true)?;
    socket.listen(BACKLOG)?; // one that listens already takes the new backlog
    Ok(TcpListener::from_std(listener))
}

/// A running accept loop.
#[derive(Debug)]
pub struct AcceptLoop {
    stop: oneshot::Sender<()>,
    ended: oneshot::Receiver<io::Result<()>>,
}

impl AcceptLoop {
    /// Why it ended, if it does so by itself.
    pub async fn failed(&mut self) -> io::Error {
        match (&mut self.ended).await {
            Ok(Err(error)) => error,
            _ => future::pending().await,
        }
    }

    /// Accepts whoever waits already, unless the listeners are shared with the process that comes next, and closes them.
    pub async fn stop(self) {
        drop(self.stop);
        let _ = self.ended.await; // it has ended, however
    }
}

/// Accepts in a thread of its own, until [`AcceptLoop::stop`]. Whether the listeners are `shared` with other processes
/// decides who accepts those who wait then.
pub fn start(
    settings: &Settings,
    listeners: Vec<TcpListener>,
    shared: bool,
    shards: Mailboxes,
    limits: Arc<ConnectionLimits>,
    metrics: Arc<Metrics>,
) -> io::Result<AcceptLoop> {
    let mut acceptor = Acceptor {
        batches: iter::repeat_with(Vec::new).take(shards.count()).collect(),
        shards,
        limits,
        memory: MemoryWatch::new(settings, metrics.clone()),
        metrics,
        spare: spare(),
        stuck: false,
        log: AcceptLog::default(),
    };
    let (stop, stopped) = oneshot::channel();
    let (end, ended) = oneshot::channel();
    let body = move || {
        let result = runtime::build().and_then(|runtime| {
            runtime.block_on(async {
                let listeners: Vec<_> =
                    listeners.into_iter().map(runtime::watch).collect::<io::Result<_>>()?;
                acceptor.run(&listeners, stopped).await?;
                if !shared {
                    acceptor.accept_the_rest(&listeners);
                }
                Ok(())
            })
        });
        let _ = end.send(result); // fails only when nobody waits for it
    };
    thread::Builder::new().name("accept".into()).spawn(body)?;
    Ok(AcceptLoop { stop, ended })
}

/// Returns when there may be somebody to accept.
async fn any_ready(listeners: &[AsyncFd<TcpListener>]) {
    future::poll_fn(|context| {
        let ready = |listener: &AsyncFd<TcpListener>| listener.poll_read_ready(context).is_ready();
        if listeners.iter().any(ready) { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
}

#[derive(Debug)]
struct Acceptor {
    shards: Mailboxes,
    /// Sockets accepted in this turn, for each shard.
    batches: Vec<Vec<NewSocket>>,
    limits: Arc<ConnectionLimits>,
    memory: MemoryWatch,
    metrics: Arc<Metrics>,
    /// A descriptor to give up for the moment in which a client is told that there are no more.
    spare: Option<File>,
    /// The last accept failed, and nobody could be told: the next one comes after a pause.
    stuck: bool,
    log: AcceptLog,
}

/// `None` when there is none to be had.
fn spare() -> Option<File> {
    File::open("/dev/null").ok()
}

impl Acceptor {
    async fn run(
        &mut self,
        listeners: &[AsyncFd<TcpListener>],
        mut stopped: oneshot::Receiver<()>,
    ) -> io::Result<()> {
        let ticker = runtime::watch(Ticker::new(TURN)?)?;
        loop {
            tokio::select! {
                biased;
                _ = &mut stopped => return Ok(()),
                ready = ticker.readable() => {
                    ready?.clear_ready();
                    ticker.get_ref().has_ticked()?;
                }
                () = any_ready(listeners) => {}
            }
            self.metrics.accept_turns.add(1);
            self.memory.on_turn();
            self.stuck = false;
            let mut more = false;
            for listener in listeners {
                // WouldBlock: until the runtime hears of it again, there is nobody.
                let accept = |listener: &TcpListener| match self.accept(listener) {
                    true => Ok(()),
                    false => Err(io::ErrorKind::WouldBlock.into()),
                };
                more |= listener.try_io(Interest::READABLE, accept).is_ok();
            }
            let any = self.hand_over();
            // The thread sleeps, not the task: the runtime would wake for each connection that comes meanwhile.
            if self.stuck {
                thread::sleep(PAUSE);
            } else if any && !more {
                thread::sleep(GATHER);
            }
        }
    }

    /// Accepts what waits; `true` when there may be more.
    fn accept(&mut self, listener: &TcpListener) -> bool {
        for _ in 0..ACCEPTS {
            match listener.accept() {
                Ok((stream, peer)) => {
                    self.log.succeeded("connections");
                    let admitted = if self.memory.admit() {
                        self.limits.acquire(peer.ip())
                    } else {
                        Err(LimitReached::Node)
                    };
                    match admitted {
                        Ok(connection_slot) => self.add_to_batch(stream, connection_slot),
                        Err(limit) => {
                            self.metrics.count_early_rejection(limit.reason());
                            let rejection = limit.rejection();
                            let class = RejectionClass::of("connection", rejection);
                            self.metrics.rejections.record(class, &rejection.text);
                            turn_away(stream, &limit.response());
                        }
                    }
                }
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => return false,
                    // The peer gave up while it waited (accept(2)).
                    io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted => {}
                    _ => match self.tell_one(listener) {
                        Ok(()) => self.starve(&error),
                        // Without descriptors accept(2) fails before it looks whether anybody waits.
                        Err(other) if other.kind() == io::ErrorKind::WouldBlock => return false,
                        Err(_) => {
                            self.starve(&error);
                            self.stuck = true;
                            return true;
                        }
                    },
                },
            }
        }
        true
    }

    fn starve(&mut self, error: &io::Error) {
        self.metrics.accept_failures.add(1);
        self.log.failed("connections can't be accepted and get 503", error);
    }

    /// Tells one client that there is no room, with the descriptor that is kept for that. Without it clients would
    /// hang until someone leaves, and a proxy would take the node for dead.
    fn tell_one(&mut self, listener: &TcpListener) -> io::Result<()> {
        self.spare = None;
        let told = listener.accept().map(|(stream, _)| turn_away(stream, &LimitReached::Node.response()));
        self.spare = spare();
        told
    }

    /// Whoever waits when a listener closes would get a reset instead of an answer.
    fn accept_the_rest(&mut self, listeners: &[AsyncFd<TcpListener>]) {
        self.stuck = false;
        for listener in listeners {
            while self.accept(listener.get_ref()) && !self.stuck {}
        }
        self.hand_over();
    }

    fn add_to_batch(&mut self, stream: TcpStream, connection_slot: ConnectionSlot) {
        // A socket under way to its shard counts at once, else a burst would go to one shard whole.
        let load = |shard: &usize| self.metrics.shards[*shard].load();
        let shard = (0..self.shards.count()).min_by_key(load).expect("there is at least one shard");
        self.metrics.shards[shard].accepted.add(1);
        self.batches[shard].push((stream, connection_slot));
    }

    /// Sends what was accepted to the shards, so that each wakes once for all of it. `true`: there was something.
    fn hand_over(&mut self) -> bool {
        let mut any = false;
        for (shard, batch) in self.batches.iter_mut().enumerate().filter(|(_, batch)| !batch.is_empty()) {
            self.shards.send(shard, ShardMessage::Sockets(mem::take(batch)));
            any = true;
        }
        any
    }
}

/// Answers a client that nobody can wait for. If its request is here it is read first: closing over unread bytes is a
/// reset, which might overtake the answer.
fn turn_away(mut stream: TcpStream, answer: &[u8]) {
    let _ = stream.read(&mut [0; HEAD_MAX]);
    // A new socket has room for it, and a client that has gone needs none.
    let _ = stream.write(answer);
    let _ = stream.shutdown(Shutdown::Write);
}
