//! The accept loop: takes sockets off the public listeners and gives each to the shard with the fewest.
//!
//! It has a thread of its own, so that a storm of reconnects does not hold up the bus, and so that a socket passes
//! no runtime on its way to its shard.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use mio::net::{TcpListener, TcpStream};
use mio::{Events, Interest, Poll, Token, Waker};
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::sync::oneshot;

use crate::config::{PingFormat, Settings};
use crate::http::HEAD_MAX;
use crate::limits::connections::{ConnectionLimits, ConnectionSlot, LimitReached};
use crate::metrics::rejections::RejectionClass;
use crate::metrics::{AcceptLog, Metrics};
use crate::node::memory_watch::MemoryWatch;
use crate::shard::mailbox::{Mailboxes, ShardMessage};

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

/// Longest sleep: the watchdog wants to see that the loop lives.
const NAP: Duration = Duration::from_millis(500);

const STOP: Token = Token(usize::MAX);

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

/// Ends the accept loop when dropped.
#[derive(Debug)]
pub struct Stop(Arc<Waker>);

impl Drop for Stop {
    fn drop(&mut self) {
        // It fails only when the loop's poll is gone, and the loop with it.
        let _ = self.0.wake();
    }
}

/// Accepts until the returned [`Stop`] is dropped. Then it accepts whoever waits already, unless the listeners are
/// `shared` with the process that comes next; closes them, and the receiver is told.
pub fn start(
    settings: &Settings,
    mut listeners: Vec<TcpListener>,
    shared: bool,
    shards: Mailboxes,
    limits: Arc<ConnectionLimits>,
    metrics: Arc<Metrics>,
) -> io::Result<(Stop, oneshot::Receiver<()>)> {
    let mut poll = Poll::new()?;
    for (number, listener) in listeners.iter_mut().enumerate() {
        poll.registry().register(listener, Token(number), Interest::READABLE)?;
    }
    let waker = Arc::new(Waker::new(poll.registry(), STOP)?);
    let stop = Stop(waker.clone());
    let (end, ended) = oneshot::channel();
    let mut acceptor = Acceptor {
        shards,
        limits,
        memory: MemoryWatch::new(settings, metrics.clone()),
        metrics,
        spare: spare(),
        stuck: false,
        log: AcceptLog::default(),
    };
    let accept = move |listeners: &[TcpListener]| {
        let _waker = waker; // a call is lost when its waker is gone before the loop has heard it
        let mut events = Events::with_capacity(8);
        // Listeners that may have more to accept: epoll tells only once.
        let mut ready: Vec<usize> = Vec::new();
        loop {
            let wait = if acceptor.stuck {
                PAUSE
            } else if ready.is_empty() {
                NAP
            } else {
                Duration::ZERO
            };
            if let Err(error) = poll.poll(&mut events, Some(wait))
                && error.kind() != io::ErrorKind::Interrupted
            {
                tracing::error!(%error, "the accept loop can't wait for connections and ends");
                return;
            }
            acceptor.metrics.accept_turns.add(1);
            acceptor.memory.on_turn();
            for event in &events {
                match event.token() {
                    STOP if shared => return,
                    STOP => return acceptor.accept_the_rest(listeners),
                    Token(number) if !ready.contains(&number) => ready.push(number),
                    _ => {}
                }
            }
            if events.is_empty() && ready.is_empty() {
                continue;
            }
            acceptor.stuck = false;
            ready.retain(|number| acceptor.accept(&listeners[*number]));
            if ready.is_empty() {
                std::thread::sleep(GATHER);
            }
        }
    };
    let body = move || {
        accept(&listeners);
        drop(listeners);
        let _ = end.send(()); // fails only when nobody waits for it
    };
    std::thread::Builder::new().name("accept".into()).spawn(body)?;
    Ok((stop, ended))
}

#[derive(Debug)]
struct Acceptor {
    shards: Mailboxes,
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
                        Ok(connection_slot) => self.hand_over(stream, connection_slot),
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
    fn accept_the_rest(&mut self, listeners: &[TcpListener]) {
        for listener in listeners {
            while self.accept(listener) && !self.stuck {}
        }
    }

    fn hand_over(&self, stream: TcpStream, connection_slot: ConnectionSlot) {
        // A socket under way to its shard counts at once, else a burst would go to one shard whole.
        let load = |shard: &usize| self.metrics.shards[*shard].load();
        let shard = (0..self.shards.count()).min_by_key(load).expect("there is at least one shard");
        self.metrics.shards[shard].accepted.add(1);
        self.shards.send(shard, ShardMessage::Socket(stream, connection_slot));
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
