//! A way to Redis that a test can bend: hold back messages, lose an answer, cut every connection, lead elsewhere.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
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
        });
        let accepting = tokio::spawn(accept(listener, shared.clone()));
        Proxy { port: own_port, shared, accepting }
    }

    /// Its own port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The way through, as Redis URL.
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// Whether what Redis says to subscribers waits here. Everything else passes.
    pub fn hold_messages(&self, hold: bool) {
        self.shared.hold.send_replace(hold);
    }

    /// The next command that contains `part` reaches Redis and is done, but its answer is lost: the connection
    /// ends when the answer comes.
    pub async fn lose_answer_to(&self, part: &str) {
        *self.shared.lose.lock().await = Some(part.into());
    }

    /// How many answers were lost.
    pub fn lost(&self) -> u32 {
        self.shared.lost.load(Ordering::SeqCst)
    }

    /// Ends every connection.
    pub fn cut(&self) {
        self.shared.cuts.send_modify(|cuts| *cuts += 1);
    }

    /// Ends every connection and leads new ones to another port.
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

/// Carries both ways until one ends; then the whole connection does.
async fn carry(client: TcpStream, shared: Arc<Shared>) {
    let Ok(redis) = TcpStream::connect(("127.0.0.1", shared.target.load(Ordering::SeqCst))).await else {
        return;
    };
    let _ = (client.set_nodelay(true), redis.set_nodelay(true));
    let (from_client, to_client) = client.into_split();
    let (from_redis, to_redis) = redis.into_split();
    let way = Way { subscribes: AtomicBool::new(false), loses: AtomicBool::new(false), shared };
    tokio::select! {
        _ = way.up(from_client, to_redis) => {}
        _ = way.down(from_redis, to_client) => {}
    }
}

struct Way {
    subscribes: AtomicBool,
    loses: AtomicBool,
    shared: Arc<Shared>,
}

impl Way {
    async fn up(&self, mut from: OwnedReadHalf, mut to: OwnedWriteHalf) -> Option<()> {
        let mut buffer = vec![0; 1 << 20]; // a command that a test looks for comes in one read
        loop {
            let bytes = read(&mut from, &mut buffer).await?;
            // As a command's own word: scripts and commands about subscriptions hold it too.
            if contains(&bytes.to_ascii_uppercase(), b"\r\nSUBSCRIBE\r\n") {
                self.subscribes.store(true, Ordering::SeqCst);
            }
            let mut lose = self.shared.lose.lock().await;
            if lose.as_ref().is_some_and(|part| contains(bytes, part)) {
                *lose = None;
                self.loses.store(true, Ordering::SeqCst);
            }
            drop(lose);
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
            if self.subscribes.load(Ordering::SeqCst) {
                hold.wait_for(|hold| !hold).await.ok()?;
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
