//! The accept loop: accepts connections on the public listeners and sends each to the shard with
//! the fewest. It runs in its own thread, so that a connection storm does not delay the bus.

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
use crate::shard::mailbox::{MailboxSenders, NewSocket, ShardMessage};
use crate::shard::runtime::{self, Ticker};

/// Connections that the kernel queues until they are accepted: the smaller of this and
/// `net.core.somaxconn`. Beyond it the kernel drops a client's SYN, and the client retries after a
/// second.
pub(crate) const BACKLOG: i32 = 65_535;

/// Send buffer of a connection, in bytes; the kernel counts twice as many (socket(7)). Its own
/// limit is 4 MiB, with which ten thousand stalled readers take 25 GB. Events that do not fit wait
/// in the feed, once for all readers. This is enough for 10 Mbit/s at a round trip of 100 ms.
pub(crate) const SEND_BUFFER: usize = 128 * 1024;

/// Sleep after a failed accept: without descriptors or memory the next one fails, too.
const RETRY_DELAY: Duration = Duration::from_millis(100);

/// Sleep after a batch, so that a connection storm is accepted in batches. Otherwise this thread
/// and a shard wake for each client, which costs as much CPU as the rest of accepting it. A single
/// client is accepted at once.
const BATCH_DELAY: Duration = Duration::from_millis(1);

/// Accepts on one listener before the others get their turn.
const BATCH_MAX: usize = 256;

/// Longest time between two turns. The watchdog checks that turns are taken.
const TURN_INTERVAL: Duration = Duration::from_millis(500);

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

/// Makes a bound socket a public listener. Accepted sockets inherit its options (tcp(7)), which
/// saves two system calls per connection.
pub fn adopt(listener: std::net::TcpListener, settings: &Settings) -> io::Result<TcpListener> {
    let socket = SockRef::from(&listener);
    socket.set_send_buffer_size(SEND_BUFFER)?;
    socket.set_tcp_nodelay(true)?; // events leave at once; the feed makes the batches
    // Clients do not answer JSON pings, so the kernel has to detect dead peers. Not with other
    // formats: the kernel also closes a connection whose peer keeps its window closed, as slow
    // readers do.
    if settings.ping_format == PingFormat::Json {
        socket.set_tcp_user_timeout(Some(settings.ping_interval + settings.ping_timeout))?;
    }
    socket.set_nonblocking(true)?;
    socket.listen(BACKLOG)?; // on a listening socket this sets the backlog
    Ok(TcpListener::from_std(listener))
}

/// A running accept loop.
#[derive(Debug)]
pub struct AcceptLoop {
    stop: oneshot::Sender<()>,
    ended: oneshot::Receiver<io::Result<()>>,
}

impl AcceptLoop {
    /// Waits until the loop fails. Never returns while it runs or after a regular end.
    pub async fn failed(&mut self) -> io::Error {
        match (&mut self.ended).await {
            Ok(Err(error)) => error,
            _ => future::pending().await,
        }
    }

    /// Accepts the connections in the listeners' queues, unless another process shares them, then
    /// closes the listeners.
    pub async fn stop(self) {
        drop(self.stop);
        let _ = self.ended.await; // an error changes nothing now
    }
}

/// Starts the loop. `shared`: another process has the listeners, too, and accepts what is queued
/// when this one stops.
pub fn start(
    settings: &Settings,
    listeners: Vec<TcpListener>,
    shared: bool,
    shards: MailboxSenders,
    limits: Arc<ConnectionLimits>,
    metrics: Arc<Metrics>,
) -> io::Result<AcceptLoop> {
    let mut acceptor = Acceptor {
        batches: iter::repeat_with(Vec::new).take(shards.count()).collect(),
        shards,
        limits,
        memory: MemoryWatch::new(settings, metrics.clone()),
        metrics,
        reserved_file: reserve_file(),
        is_failing: false,
        log: AcceptLog::new("public"),
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
                    acceptor.accept_queued(&listeners);
                }
                Ok(())
            })
        });
        let _ = end.send(result); // fails only when the node has ended
    };
    thread::Builder::new().name("accept".into()).spawn(body)?;
    Ok(AcceptLoop { stop, ended })
}

/// Waits until a listener may have a connection.
async fn any_readable(listeners: &[AsyncFd<TcpListener>]) {
    future::poll_fn(|context| {
        let is_ready = |listener: &AsyncFd<TcpListener>| listener.poll_read_ready(context).is_ready();
        if listeners.iter().any(is_ready) { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
}

#[derive(Debug)]
struct Acceptor {
    shards: MailboxSenders,
    /// Sockets accepted in this turn, by shard.
    batches: Vec<Vec<NewSocket>>,
    limits: Arc<ConnectionLimits>,
    memory: MemoryWatch,
    metrics: Arc<Metrics>,
    /// An open file. Closing it frees a descriptor to reject a client with when none is left.
    reserved_file: Option<File>,
    /// The last accept failed, and so did rejecting a client.
    is_failing: bool,
    log: AcceptLog,
}

/// `None`: no descriptor is left.
fn reserve_file() -> Option<File> {
    File::open("/dev/null").ok()
}

impl Acceptor {
    async fn run(
        &mut self,
        listeners: &[AsyncFd<TcpListener>],
        mut stopped: oneshot::Receiver<()>,
    ) -> io::Result<()> {
        let ticker = runtime::watch(Ticker::new(TURN_INTERVAL)?)?;
        loop {
            tokio::select! {
                biased;
                _ = &mut stopped => return Ok(()),
                ready = ticker.readable() => {
                    ready?.clear_ready();
                    ticker.get_ref().has_ticked()?;
                }
                () = any_readable(listeners) => {}
            }
            self.metrics.accept_turns.add(1);
            self.memory.on_turn();
            self.is_failing = false;
            let mut has_more = false;
            for listener in listeners {
                // WouldBlock clears the readiness until the next connection arrives.
                let accept = |listener: &TcpListener| match self.accept_batch(listener) {
                    true => Ok(()),
                    false => Err(io::ErrorKind::WouldBlock.into()),
                };
                has_more |= listener.try_io(Interest::READABLE, accept).is_ok();
            }
            let has_sent = self.send_batches();
            // Blocks the thread: a timer of the runtime would not keep it from waking for each
            // connection.
            if self.is_failing {
                thread::sleep(RETRY_DELAY);
            } else if has_sent && !has_more {
                thread::sleep(BATCH_DELAY);
            }
        }
    }

    /// Accepts queued connections. `true`: there may be more.
    fn accept_batch(&mut self, listener: &TcpListener) -> bool {
        for _ in 0..BATCH_MAX {
            match listener.accept() {
                Ok((stream, peer)) => {
                    self.log.succeeded();
                    let admitted = if self.memory.admit() {
                        self.limits.acquire(peer.ip())
                    } else {
                        Err(LimitReached::Node)
                    };
                    match admitted {
                        Ok(connection_slot) => self.assign(stream, connection_slot),
                        Err(limit) => {
                            self.metrics.count_early_rejection(limit.reason());
                            let rejection = limit.rejection();
                            let class = RejectionClass::of("connection", rejection);
                            self.metrics.rejections.record(class, &rejection.text);
                            reject(stream, &limit.response());
                        }
                    }
                }
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => return false,
                    // The peer closed the connection while it was queued (accept(2)).
                    io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted => {}
                    _ => match self.reject_one(listener) {
                        Ok(()) => self.record_failure(&error),
                        // Without descriptors accept(2) fails before it checks for queued
                        // connections.
                        Err(other) if other.kind() == io::ErrorKind::WouldBlock => return false,
                        Err(_) => {
                            self.record_failure(&error);
                            self.is_failing = true;
                            return true;
                        }
                    },
                },
            }
        }
        true
    }

    fn record_failure(&mut self, error: &io::Error) {
        self.metrics.accept_failures.add(1);
        self.log.failed(error, "clients get 503");
    }

    /// Rejects one client with the reserved descriptor. Otherwise clients would hang until a
    /// connection closes, and a proxy would consider the node dead.
    fn reject_one(&mut self, listener: &TcpListener) -> io::Result<()> {
        self.reserved_file = None;
        let result = listener.accept().map(|(stream, _)| reject(stream, &LimitReached::Node.response()));
        self.reserved_file = reserve_file();
        result
    }

    /// Accepts what is queued. The kernel resets queued connections when the listener closes.
    fn accept_queued(&mut self, listeners: &[AsyncFd<TcpListener>]) {
        self.is_failing = false;
        for listener in listeners {
            while self.accept_batch(listener.get_ref()) && !self.is_failing {}
        }
        self.send_batches();
    }

    /// Adds a socket to the batch of the shard with the fewest connections.
    fn assign(&mut self, stream: TcpStream, connection_slot: ConnectionSlot) {
        // Counted before the shard has it, or a whole burst would go to one shard.
        let load = |shard: &usize| self.metrics.shards[*shard].load();
        let shard = (0..self.shards.count()).min_by_key(load).expect("there is at least one shard");
        self.metrics.shards[shard].accepted.add(1);
        self.batches[shard].push((stream, connection_slot));
    }

    /// Sends the batches; each shard wakes once. `false`: nothing was accepted.
    fn send_batches(&mut self) -> bool {
        let mut has_sent = false;
        for (shard, batch) in self.batches.iter_mut().enumerate().filter(|(_, batch)| !batch.is_empty()) {
            self.shards.send(shard, ShardMessage::Sockets(mem::take(batch)));
            has_sent = true;
        }
        has_sent
    }
}

/// Sends a response and closes the socket. Reads the request first if it has arrived: closing with
/// unread bytes sends a reset, which may discard the response at the client.
fn reject(mut stream: TcpStream, response: &[u8]) {
    let _ = stream.read(&mut [0; HEAD_MAX]);
    // The send buffer of a new socket is empty. An error means that the client has closed.
    let _ = stream.write(response);
    let _ = stream.shutdown(Shutdown::Write);
}
