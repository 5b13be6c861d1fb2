//! Servers as processes, started on their own core.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use fanfare::cli::bench;
use fanfare::cli::bench::server::Usage;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use super::baseline;

/// The cores that this process may use: the last one for servers, the others for clients.
pub struct Cores {
    all: CpuSet,
    server: usize,
    /// The machine's load average before the bench.
    load: f64,
}

/// Where a process runs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Place {
    /// On the servers' core.
    Server,
    /// Beside the clients.
    Clients,
    /// On all cores.
    All,
}

impl Cores {
    /// Reads the cores, and moves this process to those for clients.
    pub fn split() -> Result<Cores> {
        let all = sched_getaffinity(None)?;
        let server = (0..CpuSet::MAX_CPU).rev().find(|core| all.is_set(*core)).context("no core at all")?;
        ensure!(all.count() > 1, "the benches need two cores: one for the server, one for the clients");
        let load = std::fs::read_to_string("/proc/loadavg")?.split(' ').next().unwrap_or_default().parse()?;
        let cores = Cores { all, server, load };
        sched_setaffinity(None, &cores.clients())?;
        Ok(cores)
    }

    /// A description of the machine. Above a load of 1 only CPU times are meaningful.
    pub fn machine(&self) -> String {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let cpu = read("/proc/cpuinfo");
        let model = cpu.lines().find(|line| line.starts_with("model name"));
        let model = model.and_then(|line| line.split(": ").nth(1)).unwrap_or("unknown CPU");
        let kernel = read("/proc/sys/kernel/osrelease");
        let (count, load) = (self.all.count(), self.load);
        format!("{count} cores ({model}), Linux {}, load average {load} before", kernel.trim())
    }

    /// How many there are.
    pub fn count(&self) -> u32 {
        self.all.count()
    }

    fn clients(&self) -> CpuSet {
        let mut clients = self.all;
        clients.unset(self.server);
        clients
    }

    /// Starts a process. A child inherits the cores of the thread that starts it.
    fn spawn(&self, place: Place, command: &mut Command) -> Result<Child> {
        let mut core = CpuSet::new();
        core.set(self.server);
        let cores = match place {
            Place::Server => core,
            Place::Clients => self.clients(),
            Place::All => self.all,
        };
        sched_setaffinity(None, &cores)?;
        let child = command.spawn();
        sched_setaffinity(None, &self.clients())?;
        child.with_context(|| format!("can't start {:?}", command.get_program()))
    }
}

/// A process that is measured. Ended when dropped.
pub struct Process {
    child: Child,
    /// What it is called in messages.
    pub name: String,
}

impl Process {
    /// Starts it.
    pub fn start(name: &str, cores: &Cores, place: Place, command: &mut Command) -> Result<Process> {
        Ok(Process { child: cores.spawn(place, command)?, name: name.to_owned() })
    }

    /// Its id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// CPU time and memory so far.
    pub fn usage(&self) -> Usage {
        bench::server::Server { pids: vec![self.id()] }.usage()
    }

    /// The number of open files and sockets.
    pub fn open_files(&self) -> Result<usize> {
        let files = std::fs::read_dir(format!("/proc/{}/fd", self.id()));
        Ok(files.with_context(|| format!("{} has ended", self.name))?.count())
    }

    /// Waits until it has at most `files` open: until it has closed the connections of clients that
    /// left.
    pub fn wait_for_files(&self, files: usize) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(20);
        while self.open_files()? > files {
            ensure!(
                Instant::now() < deadline,
                "{} still has {} files open 20 s after its clients left",
                self.name,
                self.open_files()?
            );
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill(); // it may have exited
        let _ = self.child.wait();
    }
}

/// A measured WebSocket server: fanfare or the baseline.
pub struct Server {
    pub process: Process,
    /// Where clients connect.
    pub addr: SocketAddr,
    /// The admin listener; the baseline has none.
    pub admin: Option<SocketAddr>,
    /// Kept open for the server's output.
    _stdout: BufReader<ChildStdout>,
}

impl Server {
    /// Starts fanfare, with one shard unless these arguments say otherwise, and waits until it is
    /// ready.
    pub fn fanfare(binary: &str, cores: &Cores, place: Place, more: &[&str]) -> Result<Server> {
        let mut command = Command::new(binary);
        command.args(["--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--log", "warn"]).args(more);
        // One client publishes all events of a bench.
        command.env("FANFARE_MAX_MESSAGE_RATE", "0").env("FANFARE_MAX_BYTE_RATE", "0");
        command.env("FANFARE_SHARDS", "1");
        let server = Server::start("fanfare", cores, place, command)?;
        server.wait_until_ready()?;
        Ok(server)
    }

    /// The URL for the clients of `fanfare bench`.
    pub fn url(&self) -> String {
        format!("ws://{}/ws/{{i}}", self.addr)
    }

    /// Starts the baseline: one `send()` per event and connection, or one for all events that
    /// arrived together.
    pub fn baseline(cores: &Cores, batch: bool, ping_interval: Duration) -> Result<Server> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg(baseline::ARGUMENT).arg(if batch { "batch" } else { "one" });
        command.arg(ping_interval.as_secs().to_string());
        let name = if batch { "baseline with batching" } else { "baseline" };
        Server::start(name, cores, Place::Server, command)
    }

    fn wait_until_ready(&self) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let mut stream = TcpStream::connect(self.addr)?;
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
            stream.write_all(b"GET /readyz HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer).context("no answer to GET /readyz")?;
            if answer.starts_with("HTTP/1.1 200") {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "{} is not ready: {answer}", self.process.name);
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn start(name: &str, cores: &Cores, place: Place, mut command: Command) -> Result<Server> {
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut process = Process::start(name, cores, place, &mut command)?;
        let mut stdout = BufReader::new(process.child.stdout.take().expect("it was asked for"));
        let mut line = String::new();
        while !line.contains("http://") {
            line.clear();
            if stdout.read_line(&mut line)? == 0 {
                bail!("{name} ended before it was ready");
            }
        }
        let addr_after = |prefix: &str| -> Option<SocketAddr> {
            let (_, after) = line.split_once(prefix)?;
            after.split('/').next()?.parse().ok()
        };
        let addr =
            addr_after("http://").with_context(|| format!("no address in {name}'s ready line: {line}"))?;
        Ok(Server { process, addr, admin: addr_after("admin http://"), _stdout: stdout })
    }
}
