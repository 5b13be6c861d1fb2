//! A redis-server for one test, and a client that speaks RESP2.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU16, Ordering};

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

use super::process::{Directory, Process};
use super::{until, within};

/// Starts Redis, or the server that REDIS_SERVER names (see `tests/redis_servers.sh`).
pub fn redis_server() -> Command {
    Command::new(std::env::var_os("REDIS_SERVER").unwrap_or_else(|| "redis-server".into()))
}

/// A Redis on a free loopback port. It keeps port and directory over restarts. Dropping it kills
/// it.
pub struct Redis {
    port: u16,
    directory: Directory,
    first: Vec<String>,
    flags: Vec<String>,
    clock: Option<PathBuf>,
    process: Option<Process>,
}

impl Redis {
    /// Starts a server without persistence, unless the flags say otherwise (`--appendonly yes`).
    pub async fn start(flags: &[&str]) -> Redis {
        let mut redis = Redis::away(flags);
        redis.up().await;
        redis
    }

    /// Starts a server whose clock can be set back.
    pub async fn with_clock() -> Redis {
        let mut redis = Redis::away(&[]);
        let library = redis.directory.path().join("clock.so");
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/common/clock.c");
        // A C compiler is installed: Rust links with it.
        let built = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&library).arg(source).status();
        assert!(built.expect("cc is there").success(), "{source} can't be compiled");
        redis.clock = Some(library);
        redis.up().await;
        redis
    }

    /// Sets its clock back by a day.
    pub async fn set_clock_back(&self) {
        let clock = || async { self.client().await.call(&["TIME"]).await.list()[0].int() };
        let before = clock().await;
        std::fs::write(self.directory.path().join("set-back"), "").expect("the directory is ours");
        until("the clock to be set back", || async { (clock().await < before - 80_000).then_some(()) }).await;
    }

    /// Starts a replica, and waits until it is in sync.
    pub async fn replica_of(primary: &Redis) -> Redis {
        Redis::replica_at(primary.port).await
    }

    /// The same through a proxy.
    pub async fn replica_by(way: &super::Proxy) -> Redis {
        Redis::replica_at(way.port()).await
    }

    async fn replica_at(port: u16) -> Redis {
        let replica = Redis::start(&["--replicaof", &format!("127.0.0.1 {port}")]).await;
        until("the replica to be in sync", || async {
            let info = replica.client().await.call(&["INFO", "replication"]).await;
            info.text().contains("master_link_status:up").then_some(())
        })
        .await;
        replica
    }

    /// Makes a replica a primary, also for its next starts.
    pub async fn promote(&mut self) {
        self.client().await.call(&["REPLICAOF", "NO", "ONE"]).await;
        self.flags.clear(); // a replica has no other flags
    }

    /// Starts a Sentinel that monitors this primary as `main`, and waits until it knows one
    /// replica. It considers the primary down after a second.
    pub async fn sentinel_for(primary: &Redis) -> Redis {
        let mut sentinel = Redis::away(&[]);
        let port = primary.port;
        let settings = format!(
            "sentinel monitor main 127.0.0.1 {port} 1\nsentinel down-after-milliseconds main 1000\n\
             sentinel failover-timeout main 10000\n"
        );
        // A Sentinel writes its state into its configuration file.
        let path = sentinel.directory.path().join("sentinel.conf");
        std::fs::write(&path, settings).expect("the directory is ours");
        sentinel.first = vec![path.display().to_string(), "--sentinel".into()];
        sentinel.up().await;
        until("a Sentinel that knows the replica", || async {
            let replicas = sentinel.client().await.call(&["SENTINEL", "REPLICAS", "main"]).await;
            (!replicas.list().is_empty()).then_some(())
        })
        .await;
        sentinel
    }

    /// Reserves a port without starting the server.
    pub fn away(flags: &[&str]) -> Redis {
        let flags = flags.iter().map(|flag| flag.to_string()).collect();
        let directory = Directory::new();
        Redis { port: free_port(), directory, first: Vec::new(), flags, clock: None, process: None }
    }

    /// Adds flags for the next start.
    pub fn add_flags(&mut self, flags: &[&str]) {
        self.flags.extend(flags.iter().map(|flag| flag.to_string()));
    }

    /// Starts it, or starts it again, and waits until it answers.
    pub async fn up(&mut self) {
        assert!(self.process.is_none(), "it runs");
        let mut command = redis_server();
        if let Some(library) = &self.clock {
            command.env("LD_PRELOAD", library);
            command.env("CLOCK_SET_BACK", self.directory.path().join("set-back"));
        }
        command.args(&self.first).args(["--bind", "127.0.0.1"]).arg("--port").arg(self.port.to_string());
        command.arg("--dir").arg(self.directory.path());
        if self.first.is_empty() {
            command.args(["--save", ""]); // a Sentinel takes no such setting
        }
        command.args(&self.flags);
        let process = Process::start("redis-server", &mut command);
        let words = ["Ready to accept connections", "+monitor master"];
        let ready = |line: &str| words.iter().any(|word| line.contains(word)).then_some(());
        process.line("a Redis that is ready", ready).await.unwrap_or_else(|ended| panic!("{ended}"));
        self.process = Some(process);
    }

    /// Kills it, as in a crash.
    pub fn kill(&mut self) {
        self.process.take().expect("it runs").kill();
    }

    pub fn is_running(&self) -> bool {
        self.process.is_some()
    }

    /// Removes its files while it does not run.
    pub fn wipe(&mut self) {
        assert!(self.process.is_none(), "it runs");
        self.directory.empty();
    }

    /// Stops the process without ending it, as on a host that hangs: connections stay open, nothing
    /// is answered.
    pub fn freeze(&self) {
        self.process.as_ref().expect("it runs").signal("STOP");
    }

    /// Continues a frozen process.
    pub fn thaw(&self) {
        self.process.as_ref().expect("it runs").signal("CONT");
    }

    /// The log so far.
    pub fn log(&self) -> String {
        self.process.as_ref().expect("it runs").output().join("\n")
    }

    /// The directory of its files.
    pub fn directory(&self) -> &std::path::Path {
        self.directory.path()
    }

    /// A field of INFO.
    pub async fn info(&self, field: &str) -> String {
        let info = self.client().await.call(&["INFO", "everything"]).await;
        let text = info.text().to_owned();
        let value = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        value.unwrap_or_else(|| panic!("no {field} in {text}")).trim().to_owned()
    }

    /// The last id of a channel; 0 if there is none.
    pub async fn head(&self, channel: &str) -> u64 {
        let key = format!("fanfare:{{{channel}}}:meta");
        match self.client().await.call(&["HGET", &key, "head"]).await {
            Value::Nil => 0,
            head => head.int() as u64,
        }
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// A new connection to it.
    pub async fn client(&self) -> Resp {
        Resp::connect(SocketAddr::from(([127, 0, 0, 1], self.port))).await
    }

    /// Flushes all data except the settings of FCALL, so that FCALL works before a node writes them
    /// again.
    pub async fn flush_all_but_settings(&self) {
        let mut client = self.client().await;
        let settings = until("the settings of FCALL", || async {
            let settings = self.client().await.call(&["HGETALL", "fanfare:settings"]).await;
            (!settings.list().is_empty()).then_some(settings)
        })
        .await;
        let fields: Vec<_> = settings.list().iter().map(|field| field.text()).collect();
        client.call(&["MULTI"]).await;
        client.call(&["FLUSHALL"]).await;
        client.call(&[&["HSET", "fanfare:settings"][..], &fields].concat()).await;
        client.call(&["EXEC"]).await;
    }

    /// Waits until this many clients are subscribed to a Redis channel.
    pub async fn subscribed(&self, channel: &str, count: i64) {
        let client = &tokio::sync::Mutex::new(self.client().await);
        until(&format!("{count} subscribers of {channel}"), || async {
            let answer = client.lock().await.call(&["PUBSUB", "NUMSUB", channel]).await;
            (answer.list()[1].int() >= count).then_some(())
        })
        .await;
    }
}

/// A free port below the ephemeral range, so that no outgoing connection takes the port while a
/// test's Redis is down, and no client that connects to it can connect to itself.
pub fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let start = std::process::id() as u16; // test binaries that run at the same time start at different ports
    for _ in 0..20_000 {
        let step = NEXT.fetch_add(1, Ordering::Relaxed);
        let port = 12_000 + start.wrapping_mul(97).wrapping_add(step) % 20_000;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
    panic!("no free port");
}

/// A reply of Redis.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Nil,
    Int(i64),
    Text(Vec<u8>),
    Error(String),
    List(Vec<Value>),
}

impl Value {
    pub fn int(&self) -> i64 {
        match self {
            Value::Int(int) => *int,
            Value::Text(text) => {
                std::str::from_utf8(text).ok().and_then(|text| text.parse().ok()).expect("a number")
            }
            other => panic!("not a number: {other:?}"),
        }
    }

    /// The text, as UTF-8.
    pub fn text(&self) -> &str {
        match self {
            Value::Text(text) => std::str::from_utf8(text).expect("UTF-8"),
            other => panic!("not a text: {other:?}"),
        }
    }

    pub fn list(&self) -> &[Value] {
        match self {
            Value::List(list) => list,
            other => panic!("not a list: {other:?}"),
        }
    }

    /// The error; the test fails if it is something else.
    pub fn error(&self) -> &str {
        match self {
            Value::Error(error) => error,
            other => panic!("not an error: {other:?}"),
        }
    }
}

/// A connection to Redis.
pub struct Resp(BufReader<TcpStream>);

impl Resp {
    pub async fn connect(to: SocketAddr) -> Resp {
        Resp(BufReader::new(within("Redis", TcpStream::connect(to)).await.expect("Redis runs")))
    }

    /// Sends a command and reads its reply.
    pub async fn call(&mut self, command: &[impl AsRef<[u8]>]) -> Value {
        self.try_call(command).await.unwrap_or_else(|error| panic!("Redis does not run: {error}"))
    }

    /// Sends a command and reads its reply, unless the connection ends.
    pub async fn try_call(&mut self, command: &[impl AsRef<[u8]>]) -> io::Result<Value> {
        let mut bytes = format!("*{}\r\n", command.len()).into_bytes();
        for part in command.iter().map(AsRef::as_ref) {
            bytes.extend(format!("${}\r\n", part.len()).into_bytes());
            bytes.extend(part);
            bytes.extend(b"\r\n");
        }
        within("Redis to take a command", self.0.get_mut().write_all(&bytes)).await?;
        self.read().await
    }

    /// Publishes by `FCALL fanfare_publish`, as any program may.
    pub async fn fcall(&mut self, channel: &str, event: &[u8], to: Option<&str>) -> Value {
        let answer = self.try_fcall(channel, event, to).await;
        answer.unwrap_or_else(|error| panic!("Redis does not run: {error}"))
    }

    /// The same, unless the connection ends.
    pub async fn try_fcall(&mut self, channel: &str, event: &[u8], to: Option<&str>) -> io::Result<Value> {
        let key = format!("fanfare:{{{channel}}}");
        let mut command: Vec<&[u8]> = vec![b"FCALL", b"fanfare_publish", b"1", key.as_bytes(), event];
        command.extend(to.map(str::as_bytes));
        self.try_call(&command).await
    }

    /// Subscribes, and waits for the confirmation.
    pub async fn subscribe(&mut self, channel: &str) {
        let answer = self.call(&["SUBSCRIBE", channel]).await;
        assert_eq!(answer.list()[0].text(), "subscribe");
    }

    /// The next message of a subscribed channel.
    pub async fn message(&mut self) -> Vec<u8> {
        match self.read().await.expect("Redis runs").list() {
            [kind, _, Value::Text(message)] if kind.text() == "message" => message.clone(),
            other => panic!("not a message: {other:?}"),
        }
    }

    async fn read(&mut self) -> io::Result<Value> {
        within("an answer from Redis", self.read_value()).await
    }

    async fn read_value(&mut self) -> io::Result<Value> {
        let mut line = String::new();
        if self.0.read_line(&mut line).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let line = line.trim_end();
        let (kind, rest) = line.split_at_checked(1).expect("an answer");
        let number = || rest.parse::<i64>().expect("a number");
        Ok(match kind {
            "+" => Value::Text(rest.into()),
            "-" => Value::Error(rest.into()),
            ":" => Value::Int(number()),
            "$" | "*" if number() < 0 => Value::Nil,
            "$" => {
                let mut text = vec![0; number() as usize + 2];
                self.0.read_exact(&mut text).await?;
                text.truncate(text.len() - 2);
                Value::Text(text)
            }
            "*" => {
                let mut list = Vec::new();
                for _ in 0..number() {
                    list.push(Box::pin(self.read_value()).await?);
                }
                Value::List(list)
            }
            _ => panic!("not RESP2: {line:?}"),
        })
    }
}
