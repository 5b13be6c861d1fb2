//! A TCP proxy between a node and Redis, with faults: it holds back messages, loses answers, cuts
//! connections, or leads to another server.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{Mutex, watch};
use tokio::task::JoinHandle;

/// A TCP proxy on a free port.
pub struct Proxy {
    port: u16,
    shared: Arc<Shared>,
    accepting: JoinHandle<()>,
}

struct Shared {
    target: AtomicU16,
    hold: watch::Sender<bool>,
    cuts: watch::Sender<u32>,
    lose: Mutex<Option<Vec<u8>>>,
    lost: AtomicU32,
    drop: Mutex<Option<Vec<u8>>>,
    dropped: AtomicU32,
    silent: watch::Sender<Silence>,
    /// Connections up to this number are stranded: they carry nothing any more. The second number
    /// is for connections with subscriptions only.
    stranded: watch::Sender<(u64, u64)>,
    count: AtomicU64,
    delay_ms: AtomicU64,
}

/// Directions in which nothing is carried, as if all packets were dropped. The data waits until
/// that ends.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Silence {
    /// To Redis.
    pub up: bool,
    /// From Redis.
    pub down: bool,
}

impl Proxy {
    /// A proxy to this port of the loopback address. It ends with the test's runtime.
    pub async fn to(port: u16) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let own_port = listener.local_addr().expect("it is bound").port();
        let shared = Arc::new(Shared {
            target: AtomicU16::new(port),
            hold: watch::Sender::new(false),
            cuts: watch::Sender::new(0),
            lose: Mutex::new(None),
            lost: AtomicU32::new(0),
            drop: Mutex::new(None),
            dropped: AtomicU32::new(0),
            silent: watch::Sender::new(Silence::default()),
            stranded: watch::Sender::new((0, 0)),
            count: AtomicU64::new(0),
            delay_ms: AtomicU64::new(0),
        });
        let accepting = tokio::spawn(accept(listener, shared.clone()));
        Proxy { port: own_port, shared, accepting }
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// The Redis URL through this proxy.
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// Holds back messages to subscribers, or releases them. Everything else passes.
    pub fn hold_messages(&self, hold: bool) {
        self.shared.hold.send_replace(hold);
    }

    /// The next command that contains `part` is executed, but its answer is lost: the connection is
    /// closed when the answer arrives.
    pub async fn lose_answer_to(&self, part: &str) {
        *self.shared.lose.lock().await = Some(part.into());
    }

    /// The number of lost answers.
    pub fn lost(&self) -> u32 {
        self.shared.lost.load(Ordering::SeqCst)
    }

    /// The next message to subscribers that contains `part` is lost. Its connection stays open.
    pub async fn drop_message_with(&self, part: &str) {
        *self.shared.drop.lock().await = Some(part.into());
    }

    /// The number of messages lost this way.
    pub fn dropped(&self) -> u32 {
        self.shared.dropped.load(Ordering::SeqCst)
    }

    /// Carries nothing in these directions until the next call. New connections are accepted.
    pub fn silence(&self, silence: Silence) {
        self.shared.silent.send_replace(silence);
    }

    /// All existing connections carry nothing any more, in both directions, and stay open.
    pub fn strand(&self) {
        self.shared.stranded.send_modify(|stranded| stranded.0 = self.connections());
    }

    /// The same for connections with subscriptions only.
    pub fn strand_subscribers(&self) {
        self.shared.stranded.send_modify(|stranded| stranded.1 = self.connections());
    }

    /// Delays everything in both directions.
    pub fn delay(&self, delay: Duration) {
        self.shared.delay_ms.store(delay.as_millis() as u64, Ordering::SeqCst);
    }

    /// The number of connections accepted so far.
    pub fn connections(&self) -> u64 {
        self.shared.count.load(Ordering::SeqCst)
    }

    /// Closes every connection.
    pub fn cut(&self) {
        self.shared.cuts.send_modify(|cuts| *cuts += 1);
    }

    /// Closes every connection and leads new ones to another port.
    pub fn lead_to(&self, port: u16) {
        self.shared.target.store(port, Ordering::SeqCst);
        self.cut();
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
        self.cut();
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    while let Ok((client, _)) = listener.accept().await {
        let mut cuts = shared.cuts.subscribe();
        cuts.mark_unchanged();
        let shared = shared.clone();
        tokio::spawn(async move {
            tokio::select! {
                _ = cuts.changed() => {}
                _ = carry(client, shared) => {}
            }
        });
    }
}

/// Carries both directions until one ends, then closes the connection.
async fn carry(client: TcpStream, shared: Arc<Shared>) {
    let number = shared.count.fetch_add(1, Ordering::SeqCst) + 1;
    let target = SocketAddr::from(([127, 0, 0, 1], shared.target.load(Ordering::SeqCst)));
    let socket = TcpSocket::new_v4().expect("a socket");
    // Small, so that Redis's sends block soon when a subscriber's messages are held back.
    socket.set_recv_buffer_size(64 << 10).expect("a TCP socket");
    let Ok(redis) = socket.connect(target).await else {
        return;
    };
    let _ = (client.set_nodelay(true), redis.set_nodelay(true));
    let (from_client, to_client) = client.into_split();
    let (from_redis, to_redis) = redis.into_split();
    let way = Way { number, subscribes: AtomicBool::new(false), loses: AtomicBool::new(false), shared };
    tokio::select! {
        _ = way.up(from_client, to_redis) => {}
        _ = way.down(from_redis, to_client) => {}
    }
}

struct Way {
    number: u64,
    subscribes: AtomicBool,
    loses: AtomicBool,
    shared: Arc<Shared>,
}

impl Way {
    /// Waits while this direction is silent.
    async fn open(&self, is_silent: impl Fn(&Silence) -> bool) -> Option<()> {
        let delay = self.shared.delay_ms.load(Ordering::SeqCst);
        if delay > 0 {
            tokio::time::sleep(Duration::from_millis(delay)).await;
        }
        self.shared.silent.subscribe().wait_for(|silent| !is_silent(silent)).await.ok()?;
        let (all, subscribers) = *self.shared.stranded.borrow();
        let subscribes = self.subscribes.load(Ordering::SeqCst);
        if all >= self.number || (subscribes && subscribers >= self.number) {
            std::future::pending::<()>().await;
        }
        Some(())
    }

    async fn up(&self, mut from: OwnedReadHalf, mut to: OwnedWriteHalf) -> Option<()> {
        let mut buffer = vec![0; 1 << 20]; // large enough to read in one piece the commands that tests search for
        loop {
            let bytes = read(&mut from, &mut buffer).await?;
            // As a command: scripts and the commands about subscriptions contain the word as well.
            if contains(&bytes.to_ascii_uppercase(), b"\r\nSUBSCRIBE\r\n") {
                self.subscribes.store(true, Ordering::SeqCst);
            }
            let mut lose = self.shared.lose.lock().await;
            if lose.as_ref().is_some_and(|part| contains(bytes, part)) {
                *lose = None;
                self.loses.store(true, Ordering::SeqCst);
            }
            drop(lose);
            self.open(|silent| silent.up).await?;
            to.write_all(bytes).await.ok()?;
        }
    }

    async fn down(&self, mut from: OwnedReadHalf, mut to: OwnedWriteHalf) -> Option<()> {
        let mut buffer = vec![0; 1 << 20];
        let mut hold = self.shared.hold.subscribe();
        loop {
            let bytes = read(&mut from, &mut buffer).await?;
            if self.loses.load(Ordering::SeqCst) {
                self.shared.lost.fetch_add(1, Ordering::SeqCst);
                return None;
            }
            self.open(|silent| silent.down).await?;
            if self.subscribes.load(Ordering::SeqCst) {
                hold.wait_for(|hold| !hold).await.ok()?;
                let mut drop = self.shared.drop.lock().await;
                if drop.as_ref().is_some_and(|part| contains(bytes, part)) {
                    *drop = None;
                    self.shared.dropped.fetch_add(1, Ordering::SeqCst);
                    continue;
                }
            }
            to.write_all(bytes).await.ok()?;
        }
    }
}

async fn read<'a>(from: &mut OwnedReadHalf, buffer: &'a mut [u8]) -> Option<&'a [u8]> {
    match from.read(buffer).await {
        Ok(length) if length > 0 => Some(&buffer[..length]),
        _ => None,
    }
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}
