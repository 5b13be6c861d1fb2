//! The systemd protocols: notifications, the watchdog, and inherited sockets. The test plays the
//! service manager.

use std::io::{PipeReader, PipeWriter, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as UnixAddr, UnixDatagram as StdDatagram, UnixListener};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use tokio::net::UnixDatagram;

use crate::common;
use crate::common::process::{Directory, Process};
use crate::common::{Client, Options, Redis, http, within};

/// The service manager: starts a node and receives its notifications.
struct Systemd {
    socket: UnixDatagram,
    address: String,
    _directory: Directory,
    heard: Vec<String>,
}

impl Systemd {
    fn new() -> Systemd {
        let directory = Directory::new();
        let path = directory.path().join("notify");
        let socket = StdDatagram::bind(&path).expect("the directory is ours");
        Systemd::with(socket, path.display().to_string(), directory)
    }

    /// With a socket in the abstract namespace, as in some containers.
    fn abstractly() -> Systemd {
        let name = format!("fanfare-test-{}", std::process::id());
        let address = UnixAddr::from_abstract_name(&name).expect("a short name");
        let socket = StdDatagram::bind_addr(&address).expect("a free name");
        Systemd::with(socket, format!("@{name}"), Directory::new())
    }

    fn with(socket: StdDatagram, address: String, directory: Directory) -> Systemd {
        socket.set_nonblocking(true).expect("a socket");
        let socket = UnixDatagram::from_std(socket).expect("a runtime");
        Systemd { socket, address, _directory: directory, heard: Vec::new() }
    }

    fn command(&self, flags: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fanfare"));
        command.env_clear().env("NOTIFY_SOCKET", &self.address).args(flags);
        command
    }

    /// The next notification.
    async fn line(&mut self) -> String {
        while self.heard.is_empty() {
            let mut message = [0; 4096];
            let length = within("a message", self.socket.recv(&mut message)).await.expect("a socket");
            let text = std::str::from_utf8(&message[..length]).expect("UTF-8");
            self.heard = text.lines().rev().map(str::to_owned).collect();
        }
        self.heard.pop().expect("it was not empty")
    }

    /// Receives notifications until `wanted` returns a value for one.
    async fn until<T>(&mut self, what: &str, wanted: impl Fn(&str) -> Option<T>) -> T {
        within(what, async {
            loop {
                if let Some(found) = wanted(&self.line().await) {
                    return found;
                }
            }
        })
        .await
    }

    async fn expect_notification(&mut self, line: &str) {
        self.until(line, |received| (received == line).then_some(())).await;
    }
}

/// The addresses of the ready line.
async fn addresses(process: &Process) -> (SocketAddr, String) {
    let pick = |line: &str| {
        let (public, admin) = line.split_once(" serving http://")?.1.split_once("/ (admin ")?;
        Some((public.parse().expect("an address"), admin.split_once("): open")?.0.to_owned()))
    };
    process.line("the ready line", pick).await.unwrap_or_else(|ended| panic!("{ended}"))
}

const LOCAL: [&str; 4] = ["--listen", "127.0.0.1:0", "--admin", "off"];

#[tokio::test]
async fn status_shows_bus_and_connections() {
    let mut redis = Redis::away(&[]);
    let mut systemd = Systemd::new();
    let mut command = systemd.command(&[&LOCAL[..], &["--redis", &redis.url()]].concat());
    let process = Process::start("fanfare", &mut command);
    assert_eq!(systemd.line().await, "READY=1", "before anything else");
    let (addr, _) = addresses(&process).await;
    assert_eq!(http::request(addr, "GET", "/healthz", &[], b"").await.status, 200);
    assert_eq!(http::request(addr, "GET", "/readyz", &[], b"").await.status, 503, "Redis is away");
    let not_ready = |line: &str| line.starts_with("STATUS=connections: 0; not ready: Redis").then_some(());
    systemd.until("a status without Redis", not_ready).await;
    redis.up().await;
    systemd.expect_notification("STATUS=connections: 0; ready").await;
    let options = Options { query: "lastEventId=".into(), ..Options::default() };
    let mut client = Client::try_open(addr, "alice", &options).await.expect("it is ready");
    client.welcome().await;
    systemd.expect_notification("STATUS=connections: 1; ready").await;
    client.leave().await;
    systemd.expect_notification("STATUS=connections: 0; ready").await;
    redis.kill();
    systemd.until("a status without Redis", not_ready).await;
}

#[tokio::test]
async fn notifies_reloading_and_stopping() {
    let mut systemd = Systemd::abstractly();
    let flags = [&LOCAL[..], &["--drain-timeout", "3s", "--drain-delay", "2s"]].concat();
    let process = Process::start("fanfare", &mut systemd.command(&flags));
    systemd.expect_notification("READY=1").await;
    systemd.expect_notification("STATUS=connections: 0; ready").await;
    process.signal("HUP");
    systemd.expect_notification("RELOADING=1").await;
    let micros = systemd.line().await;
    let micros = micros.strip_prefix("MONOTONIC_USEC=").expect("Type=notify-reload asks for it");
    assert!(micros.parse::<u64>().expect("a number") > 0);
    assert_eq!(systemd.line().await, "READY=1");
    process.signal("TERM");
    systemd.expect_notification("STOPPING=1").await;
    let time = systemd.line().await;
    let time = time.strip_prefix("EXTEND_TIMEOUT_USEC=").expect("the drain may take longer than it expects");
    assert!(time.parse::<u64>().expect("a number") >= 5_000_000, "drain and notice take 5 s: {time}");
    systemd.expect_notification("STATUS=connections: 0; not ready: this node is stopping").await;
    assert!(process.ended().await.success());
}

#[tokio::test]
async fn start_error_is_the_last_status() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let addr = taken.local_addr().expect("bound").to_string();
    let mut systemd = Systemd::new();
    let process = Process::start("fanfare", &mut systemd.command(&["--listen", &addr, "--admin", "off"]));
    let line = systemd.line().await;
    assert!(line.starts_with("STATUS=") && line.contains(&addr), "{line}");
    assert_eq!(process.ended().await.code(), Some(1));
}

/// A process id that is not the node's.
const OTHER: &str = "1";

#[tokio::test]
async fn watchdog_is_fed_twice_per_interval() {
    let mut systemd = Systemd::new();
    let mut command = systemd.command(&LOCAL);
    let process = Process::start("fanfare", command.env("WATCHDOG_USEC", "2000000"));
    systemd.expect_notification("WATCHDOG=1").await;
    for _ in 0..6 {
        let started = Instant::now();
        systemd.expect_notification("WATCHDOG=1").await;
        // Half the interval, and as much again for a busy machine: that is all that systemd allows.
        assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    }
    // A stopped process sends nothing.
    process.signal("STOP");
    expires(&mut systemd, Duration::from_secs(2)).await;
    process.signal("CONT");
    systemd.expect_notification("WATCHDOG=1").await;

    let mut systemd = Systemd::new();
    let mut command = systemd.command(&LOCAL);
    command.env("WATCHDOG_USEC", "100000").env("WATCHDOG_PID", OTHER);
    let process = Process::start("fanfare", &mut command);
    systemd.expect_notification("READY=1").await;
    process.signal("HUP");
    process.signal("TERM");
    within("its end", async {
        loop {
            match systemd.line().await.as_str() {
                "WATCHDOG=1" => panic!("the watchdog is for another process"),
                "STOPPING=1" => return,
                _ => {}
            }
        }
    })
    .await;
}

/// Waits until the watchdog would have killed the node: until it has not been fed for this time.
async fn expires(systemd: &mut Systemd, time: Duration) {
    within("the watchdog to expire", async {
        let mut fed = Instant::now();
        while let Ok(line) = tokio::time::timeout(time.saturating_sub(fed.elapsed()), systemd.line()).await {
            if line == "WATCHDOG=1" {
                fed = Instant::now();
            }
        }
    })
    .await;
}

/// A pipe that is full until it is read.
fn full_pipe() -> (PipeReader, PipeWriter) {
    let (reader, mut writer) = std::io::pipe().expect("a pipe");
    rustix::io::ioctl_fionbio(&writer, true).expect("a pipe");
    for size in [4096, 1] {
        while writer.write(&vec![b'\n'; size]).is_ok() {}
    }
    rustix::io::ioctl_fionbio(&writer, false).expect("a pipe");
    (reader, writer)
}

#[tokio::test]
async fn watchdog_is_not_fed_when_a_shard_hangs() {
    let mut systemd = Systemd::new();
    // A shard that logs blocks until the log is read. No other thread logs.
    let log = ["--log", "off,fanfare::shard=debug", "--shards", "2"];
    let (mut reader, writer) = full_pipe();
    let mut command = systemd.command(&[&LOCAL[..], &log].concat());
    command.env("WATCHDOG_USEC", "2000000").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(writer);
    let process = Process::spawn("fanfare", &mut command);
    drop(command); // and with it the other end of the pipe
    let (addr, _) = addresses(&process).await;
    let client = Client::try_open(addr, "alice", &Options::default()).await.expect("it serves");
    systemd.expect_notification("WATCHDOG=1").await;
    systemd.expect_notification("WATCHDOG=1").await;
    drop(client); // its close is logged
    expires(&mut systemd, Duration::from_secs(2)).await;
    // The shard is not the thread that feeds the watchdog:
    process.signal("HUP");
    systemd.expect_notification("RELOADING=1").await;
    // The log is read again, and everything continues.
    let reading = std::thread::spawn(move || {
        let mut log = String::new();
        reader.read_to_string(&mut log).map(|_| log)
    });
    systemd.expect_notification("WATCHDOG=1").await;
    systemd.expect_notification("WATCHDOG=1").await;
    process.signal("TERM");
    assert!(process.ended().await.success());
    let log = reading.join().expect("it reads").expect("UTF-8");
    assert!(log.contains("closed connection"), "{}", log.trim());
}

/// Starts a node with inherited sockets, as systemd does: from descriptor 3 on, and with its
/// process id.
fn start_with(systemd: &Systemd, sockets: [OwnedFd; 2], names: &str, flags: &[&str]) -> Process {
    let [first, second] = sockets;
    // They are passed as standard streams, whose numbers can be set; the ready line goes to stderr.
    let script = "exec 3<&0 4<&1 0</dev/null 1>&2; LISTEN_PID=$$ exec \"$0\" \"$@\"";
    let mut command = Command::new("/bin/sh");
    command.args(["-c", script, env!("CARGO_BIN_EXE_fanfare")]).args(flags).env_clear();
    command.env("NOTIFY_SOCKET", &systemd.address).env("LISTEN_FDS", "2").env("LISTEN_FDNAMES", names);
    command.stdin(first).stdout(second).stderr(Stdio::piped());
    Process::spawn("fanfare", &mut command)
}

fn listener() -> (OwnedFd, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let addr = listener.local_addr().expect("bound");
    (listener.into(), addr)
}

#[tokio::test]
async fn inherited_sockets_replace_own_listeners() {
    let directory = Directory::new();
    let path = directory.path().join("admin.sock");
    let admin = UnixListener::bind(&path).expect("the directory is ours");
    // Binding these addresses would fail.
    let (_public, public) = listener();
    let (_other, other) = listener();
    let (public, other) = (public.to_string(), other.to_string());
    let flags = ["--listen", &public, "--admin", &other];

    let (first, one) = listener();
    let mut systemd = Systemd::new();
    let process = start_with(&systemd, [first, admin.into()], "fanfare.socket:admin", &flags);
    systemd.expect_notification("READY=1").await;
    assert_eq!(addresses(&process).await, (one, format!("unix:{}", path.display())));
    assert_eq!(http::request(one, "GET", "/healthz", &[], b"").await.status, 200);
    let mut admin = tokio::net::UnixStream::connect(&path).await.expect("it listens");
    let request = http::request_bytes(one, "GET", "/stats", &[("Connection", "close")], b"");
    tokio::io::AsyncWriteExt::write_all(&mut admin, &request).await.expect("it listens");
    let response = http::read_response(&mut tokio::io::BufReader::new(admin), false).await.expect("whole");
    assert_eq!(response.status, 200);
    process.signal("TERM");
    assert!(process.ended().await.success());
    assert!(path.exists(), "the socket is systemd's");

    // Both are public listeners; the node opens the admin listener.
    let ((first, one), (second, two)) = (listener(), listener());
    let flags = ["--admin", "127.0.0.1:0"];
    let process = start_with(&systemd, [first, second], "public:public", &flags);
    systemd.expect_notification("READY=1").await;
    for addr in [one, two] {
        assert_eq!(http::request(addr, "GET", "/healthz", &[], b"").await.status, 200);
    }
    drop(process);
}

#[tokio::test]
async fn unusable_sockets_are_rejected_by_name() {
    let systemd = Systemd::new();
    let datagram = || OwnedFd::from(StdDatagram::unbound().expect("a socket"));
    let reachable = || OwnedFd::from(TcpListener::bind("0.0.0.0:0").expect("a free port"));
    let unix = || {
        let name = format!("fanfare-test-public-{}", std::process::id());
        let address = UnixAddr::from_abstract_name(name).expect("a short name");
        OwnedFd::from(UnixListener::bind_addr(&address).expect("a free name"))
    };
    let silent = || {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None);
        OwnedFd::from(socket.expect("a socket"))
    };
    for (sockets, names, code, part) in [
        ([datagram(), listener().0], "a:b", 1, "socket 1 (\"a\") from systemd is not a TCP socket"),
        ([listener().0, unix()], "a:b", 1, "socket 2 (\"b\") from systemd is not a TCP socket"),
        ([listener().0, silent()], "a:b", 1, "socket 2 (\"b\") from systemd does not listen"),
        (
            [listener().0, listener().0],
            "admin:admin",
            1,
            "socket 2 (\"admin\") from systemd is the second socket of this name",
        ),
        ([reachable(), listener().0], "a:b", 2, "is reachable from other hosts without authentication"),
        ([listener().0, reachable()], "a:admin", 2, "is reachable from other hosts without a key"),
    ] {
        let process = start_with(&systemd, sockets, names, &LOCAL);
        let status: ExitStatus = process.ended().await;
        assert_eq!(status.code(), Some(code), "{part}");
        // The output may arrive after the exit.
        let has_line = || async { process.output().iter().any(|line| line.contains(part)).then_some(()) };
        common::until(part, has_line).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn restart_loses_no_connection_attempt() {
    let mut systemd = Systemd::new();
    let ((public, addr), (other, _)) = (listener(), listener());
    let start = |systemd: &Systemd| {
        let sockets = [&public, &other].map(|socket| socket.try_clone().expect("a descriptor"));
        start_with(systemd, sockets, "public:public", &["--admin", "off", "--drain-timeout", "1s"])
    };
    let mut process = start(&systemd);
    systemd.expect_notification("READY=1").await;
    let (over, count) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
    let mut knocking = tokio::task::JoinSet::new();
    for _ in 0..4 {
        let (over, count) = (over.clone(), count.clone());
        knocking.spawn(async move {
            while !over.load(Ordering::Relaxed) {
                let response = http::request(addr, "GET", "/healthz", &[], b"").await;
                assert_eq!(response.status, 200, "{response:?}");
                count.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    for _ in 0..5 {
        process.signal("TERM");
        assert!(process.ended().await.success());
        // Connections wait in the queue while no node runs.
        let waiting = tokio::spawn(async move { http::request(addr, "GET", "/healthz", &[], b"").await });
        let before = count.load(Ordering::Relaxed);
        process = start(&systemd);
        systemd.expect_notification("READY=1").await;
        assert_eq!(waiting.await.expect("an answer").status, 200);
        common::until("more answers", || async {
            (count.load(Ordering::Relaxed) > before + 20).then_some(())
        })
        .await;
    }
    over.store(true, Ordering::Relaxed);
    knocking.join_all().await;
}
