//! A redis-server for one test, a client for it, and a proxy that can drop its answers.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::Notify;

pub use crate::common::redis::{free_port, redis_server};

/// The longest wait for anything that must happen.
pub const TIMEOUT: Duration = Duration::from_secs(30);

/// A redis-server on loopback. Dropping it kills it.
pub struct RedisServer {
    pub port: u16,
    args: Vec<String>,
    pub dir: PathBuf,
    child: Option<Child>,
}

fn own_dir() -> PathBuf {
    static SERVERS: AtomicUsize = AtomicUsize::new(0);
    let count = SERVERS.fetch_add(1, Ordering::Relaxed);
    let dir = std::env::temp_dir().join(format!("fanfare-bus-{}-{count}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

impl RedisServer {
    /// Starts a server without persistence.
    pub fn start() -> RedisServer {
        RedisServer::start_with(&["--save", "", "--appendonly", "no"])
    }

    pub fn start_with(args: &[&str]) -> RedisServer {
        let dir = own_dir();
        for _ in 0..10 {
            let args = args.iter().map(|arg| arg.to_string()).collect();
            let mut server = RedisServer { port: free_port(), args, dir: dir.clone(), child: None };
            if server.spawn() {
                return server;
            }
        }
        panic!("redis-server does not start");
    }

    /// A Sentinel that monitors one Redis and fails over alone, within a second or two.
    pub fn sentinel(name: &str, target: u16) -> RedisServer {
        let dir = own_dir();
        let path = dir.join("sentinel.conf");
        let watch = format!(
            "sentinel monitor {name} 127.0.0.1 {target} 1\nsentinel down-after-milliseconds {name} 500\n\
             sentinel failover-timeout {name} 2000\n"
        );
        std::fs::write(&path, watch).unwrap();
        let mut sentinel = RedisServer { port: free_port(), args: Vec::new(), dir, child: None };
        let child = redis_server()
            .arg(&path)
            .args(["--sentinel", "--port", &sentinel.port.to_string(), "--bind", "127.0.0.1"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("redis-server is installed");
        sentinel.child = Some(child);
        let deadline = Instant::now() + TIMEOUT;
        while Raw::connect(sentinel.port).is_err() {
            assert!(Instant::now() < deadline, "the sentinel does not start");
            std::thread::sleep(Duration::from_millis(10));
        }
        sentinel
    }

    /// A port without a server. [`RedisServer::restart`] starts it.
    pub fn not_started() -> RedisServer {
        let mut server = RedisServer::start();
        server.kill();
        server
    }

    fn spawn(&mut self) -> bool {
        let mut child = redis_server()
            .args(["--port", &self.port.to_string(), "--bind", "127.0.0.1", "--dir"])
            .arg(&self.dir)
            .args(["--enable-debug-command", "yes"])
            .args(&self.args)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("redis-server is installed");
        let deadline = Instant::now() + TIMEOUT;
        while Instant::now() < deadline {
            if child.try_wait().unwrap().is_some() {
                return false; // another process took the port
            }
            if let Ok(mut raw) = Raw::connect(self.port)
                && raw.command(&["PING"]) == Reply::Text("PONG".into())
                && raw.command(&["CONFIG", "GET", "dir"]).list()[1] == self.dir.to_string_lossy()
            {
                self.child = Some(child);
                return true;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = child.kill();
        let _ = child.wait();
        false
    }

    /// Kills it, as in a crash.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// Starts it again on its port.
    pub fn restart(&mut self) {
        self.kill();
        assert!(self.spawn(), "redis-server does not start again");
    }

    /// Sends a signal by name.
    pub fn signal(&self, name: &str) {
        let pid = self.child.as_ref().expect("it runs").id().to_string();
        assert!(Command::new("kill").args([format!("-{name}"), pid]).status().unwrap().success());
    }

    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// The last id of a channel; 0 if there is none.
    pub fn head(&self, name: &str) -> u64 {
        match self.raw().command(&["HGET", &format!("fanfare:{{{name}}}:meta"), "head"]) {
            Reply::Text(text) => text.parse().unwrap(),
            _ => 0,
        }
    }

    pub fn raw(&self) -> Raw {
        Raw::connect(self.port).unwrap()
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        if self.child.is_some() {
            self.signal("CONT");
        }
        self.kill();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// A reply of Redis.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    Text(String),
    Error(String),
    Number(i64),
    Nil,
    List(Vec<Reply>),
}

impl Reply {
    pub fn text(&self) -> &str {
        match self {
            Reply::Text(text) => text,
            other => panic!("not a text: {other:?}"),
        }
    }

    pub fn number(&self) -> i64 {
        match self {
            Reply::Number(number) => *number,
            other => panic!("not a number: {other:?}"),
        }
    }

    pub fn error(&self) -> &str {
        match self {
            Reply::Error(text) => text,
            other => panic!("not an error: {other:?}"),
        }
    }

    pub fn list(&self) -> Vec<String> {
        match self {
            Reply::List(items) => items.iter().map(|item| item.text().to_owned()).collect(),
            other => panic!("not a list: {other:?}"),
        }
    }
}

/// A simple client.
pub struct Raw {
    stream: BufReader<TcpStream>,
}

impl Raw {
    pub fn connect(port: u16) -> std::io::Result<Raw> {
        let stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        Ok(Raw { stream: BufReader::new(stream) })
    }

    pub fn command<A: AsRef<[u8]>>(&mut self, args: &[A]) -> Reply {
        let mut bytes = format!("*{}\r\n", args.len()).into_bytes();
        for arg in args {
            bytes.extend(format!("${}\r\n", arg.as_ref().len()).bytes());
            bytes.extend(arg.as_ref());
            bytes.extend(b"\r\n");
        }
        if self.stream.get_mut().write_all(&bytes).is_err() {
            return Reply::Error("closed".into());
        }
        self.reply()
    }

    /// Sends a command many times, pipelined.
    pub fn repeat(&mut self, args: &[&str], times: usize) -> Vec<Reply> {
        let mut one = format!("*{}\r\n", args.len());
        for arg in args {
            one += &format!("${}\r\n{arg}\r\n", arg.len());
        }
        self.stream.get_mut().write_all(one.repeat(times).as_bytes()).unwrap();
        (0..times).map(|_| self.reply()).collect()
    }

    pub fn reply(&mut self) -> Reply {
        let mut line = String::new();
        if self.stream.read_line(&mut line).unwrap_or(0) == 0 {
            return Reply::Error("closed".into());
        }
        let (kind, rest) = line.trim_end().split_at(1);
        match kind {
            "+" => Reply::Text(rest.into()),
            "-" => Reply::Error(rest.into()),
            ":" => Reply::Number(rest.parse().unwrap()),
            "$" if rest == "-1" => Reply::Nil,
            "$" => {
                let mut bytes = vec![0; rest.parse::<usize>().unwrap() + 2];
                self.stream.read_exact(&mut bytes).unwrap();
                bytes.truncate(bytes.len() - 2);
                Reply::Text(String::from_utf8_lossy(&bytes).into_owned())
            }
            "*" if rest == "-1" => Reply::Nil,
            "*" => Reply::List((0..rest.parse::<usize>().unwrap()).map(|_| self.reply()).collect()),
            other => panic!("unknown reply {other}"),
        }
    }

    /// The next message of a subscribed client: its channel and text.
    pub fn next_message(&mut self) -> (String, String) {
        loop {
            let parts = match self.reply() {
                Reply::List(parts) => parts,
                other => panic!("not a message: {other:?}"),
            };
            if parts[0].text().ends_with("message") {
                let [.., channel, text] = &parts[..] else { panic!("not a message: {parts:?}") };
                return (channel.text().to_owned(), text.text().to_owned());
            }
        }
    }
}

/// A proxy between a node and Redis. It can drop the answers of Redis, cut every connection, and
/// lead to another server.
#[derive(Clone)]
pub struct Proxy {
    pub port: u16,
    target: Arc<AtomicU16>,
    swallow: Arc<AtomicBool>,
    closed: Arc<AtomicBool>,
    cut: Arc<Notify>,
}

impl Proxy {
    pub async fn start(target: u16) -> Proxy {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = Proxy {
            port: listener.local_addr().unwrap().port(),
            target: Arc::new(AtomicU16::new(target)),
            swallow: Arc::default(),
            closed: Arc::default(),
            cut: Arc::default(),
        };
        let shared = proxy.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                if shared.closed.load(Ordering::SeqCst) {
                    continue;
                }
                let shared = shared.clone();
                tokio::spawn(async move {
                    let target = shared.target.load(Ordering::SeqCst);
                    let Ok(server) = tokio::net::TcpStream::connect(("127.0.0.1", target)).await else {
                        return;
                    };
                    let (mut client_in, mut client_out) = client.into_split();
                    let (mut server_in, mut server_out) = server.into_split();
                    let up = tokio::io::copy(&mut client_in, &mut server_out);
                    let down = async {
                        let mut buffer = vec![0; 64 << 10];
                        while let Ok(read @ 1..) = server_in.read(&mut buffer).await {
                            if !shared.swallow.load(Ordering::SeqCst)
                                && client_out.write_all(&buffer[..read]).await.is_err()
                            {
                                break;
                            }
                        }
                    };
                    tokio::select! {
                        _ = up => {}
                        _ = down => {}
                        _ = shared.cut.notified() => {}
                    }
                });
            }
        });
        proxy
    }

    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// Drops the answers of Redis from now on, or stops that.
    pub fn swallow(&self, on: bool) {
        self.swallow.store(on, Ordering::SeqCst);
    }

    /// Closes every connection.
    pub fn cut(&self) {
        self.cut.notify_waiters();
    }

    /// Accepts no connections and closes the existing ones, or stops that.
    pub fn close(&self, on: bool) {
        self.closed.store(on, Ordering::SeqCst);
        if on {
            self.cut();
        }
    }

    /// Leads new connections to another server.
    pub fn point_to(&self, target: u16) {
        self.target.store(target, Ordering::SeqCst);
        self.cut();
    }
}
