//! Servers as processes, started on their own core. Their CPU time and memory are read from /proc.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use super::baseline;

/// The cores that this process may use: the last one for servers, the others for clients.
pub struct Cores {
    all: CpuSet,
    server: usize,
    /// The machine's load average before the bench.
    load: f64,
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

    fn clients(&self) -> CpuSet {
        let mut clients = self.all;
        clients.unset(self.server);
        clients
    }

    /// Starts a process on the servers' core. A child inherits the cores of the thread that starts
    /// it.
    fn spawn_on_server_core(&self, command: &mut Command) -> Result<Child> {
        let mut core = CpuSet::new();
        core.set(self.server);
        sched_setaffinity(None, &core)?;
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
    /// Starts it on the servers' core.
    pub fn on_server_core(name: &str, cores: &Cores, command: &mut Command) -> Result<Process> {
        Ok(Process { child: cores.spawn_on_server_core(command)?, name: name.to_owned() })
    }

    /// Starts it beside the clients.
    pub fn beside_clients(name: &str, command: &mut Command) -> Result<Process> {
        let child = command.spawn().with_context(|| format!("can't start {:?}", command.get_program()))?;
        Ok(Process { child, name: name.to_owned() })
    }

    fn proc(&self, file: &str) -> String {
        format!("/proc/{}/{file}", self.child.id())
    }

    fn read(&self, file: &str) -> Result<String> {
        let path = self.proc(file);
        std::fs::read_to_string(&path).with_context(|| format!("{} has ended: no {path}", self.name))
    }

    /// CPU time of all its threads, user and system, in nanoseconds. Includes interrupts that the
    /// kernel handles while it runs.
    pub fn cpu(&self) -> Result<Duration> {
        let mut nanos = 0;
        for task in
            std::fs::read_dir(self.proc("task")).with_context(|| format!("{} has ended", self.name))?
        {
            // A thread that exits between two reads has used hardly any time.
            let Ok(text) = std::fs::read_to_string(task?.path().join("schedstat")) else { continue };
            let first = text.split(' ').next().unwrap_or_default();
            nanos += first.parse::<u64>().context("this kernel has no schedstat (CONFIG_SCHED_INFO)")?;
        }
        Ok(Duration::from_nanos(nanos))
    }

    /// Resident memory in bytes, and its anonymous part (without the binary's pages).
    pub fn memory(&self) -> Result<Memory> {
        let text = self.read("smaps_rollup")?;
        let field = |name: &str| -> Result<u64> {
            let line = text.lines().find(|line| line.starts_with(name)).context("no such field")?;
            Ok(line.split_whitespace().nth(1).context("no value")?.parse::<u64>()? * 1024)
        };
        Ok(Memory { resident: field("Rss:")?, anonymous: field("Anonymous:")? })
    }

    /// The number of open files and sockets.
    pub fn open_files(&self) -> Result<usize> {
        Ok(std::fs::read_dir(self.proc("fd")).with_context(|| format!("{} has ended", self.name))?.count())
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

/// Memory of a process in bytes.
#[derive(Clone, Copy)]
pub struct Memory {
    /// All resident pages.
    pub resident: u64,
    /// Pages that belong to no file.
    pub anonymous: u64,
}

/// A measured WebSocket server: fanfare or the baseline.
pub struct Server {
    pub process: Process,
    /// Where clients connect.
    pub addr: SocketAddr,
    /// Kept open for the server's output.
    _stdout: BufReader<ChildStdout>,
}

impl Server {
    /// Starts fanfare with one shard and these additional arguments and variables, on the servers'
    /// core or on the clients' cores, and waits until it is ready.
    pub fn fanfare(
        binary: &str,
        cores: Option<&Cores>,
        more: &[&str],
        environment: &[(&str, &str)],
    ) -> Result<Server> {
        let mut command = Command::new(binary);
        command.args(["--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--shards", "1"]);
        // The first client publishes all events of a bench.
        command.env("FANFARE_MAX_MESSAGE_RATE", "0").env("FANFARE_MAX_BYTE_RATE", "0");
        command.args(["--log", "warn"]).args(more).envs(environment.iter().copied());
        let server = Server::start("fanfare", cores, command)?;
        server.wait_until_ready()?;
        Ok(server)
    }

    /// Starts the baseline: one `send()` per event and connection, or one for all events that
    /// arrived together.
    pub fn baseline(cores: &Cores, batch: bool, ping_interval: Duration) -> Result<Server> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg(baseline::ARGUMENT).arg(if batch { "batch" } else { "one" });
        command.arg(ping_interval.as_secs().to_string());
        Server::start(if batch { "baseline with batching" } else { "baseline" }, Some(cores), command)
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

    fn start(name: &str, cores: Option<&Cores>, mut command: Command) -> Result<Server> {
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut process = match cores {
            Some(cores) => Process::on_server_core(name, cores, &mut command)?,
            None => Process::beside_clients(name, &mut command)?,
        };
        let mut stdout = BufReader::new(process.child.stdout.take().expect("it was asked for"));
        let mut line = String::new();
        while !line.contains("http://") {
            line.clear();
            if stdout.read_line(&mut line)? == 0 {
                bail!("{name} ended before it was ready");
            }
        }
        let (_, after) = line.split_once("http://").expect("the loop looked for it");
        let addr = after.split(['/', ' ', ')', ',']).next().unwrap_or_default();
        let addr =
            addr.trim().parse().with_context(|| format!("no address in {name}'s ready line: {line}"))?;
        Ok(Server { process, addr, _stdout: stdout })
    }
}
