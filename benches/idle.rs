//! Memory and CPU of idle connections: a fanfare process, compared with the baseline
//! (`support/baseline.rs`) in the same run. Also the memory of stalled connections: as many clients
//! that stop reading while events go on until the feed no longer holds what they need.
//!
//! `cargo bench --bench idle -- --connections 10000`; `--help` lists the arguments.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a bench prints its report")]

mod support;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use socket2::{Domain, Socket, Type};
use support::args::Args;
use support::files::allow_files;
use support::load_clients::LoadClients;
use support::process::{Cores, Memory, Server};
use support::report::{self, mib};
use support::wire;

const ARGUMENTS: &[(&str, &str)] = &[
    ("connections", "idle clients; the slope is measured from 0.5 to 1.5 times as many [10000]"),
    ("ping-interval", "seconds between pings [30]"),
    ("seconds", "seconds over which CPU is measured [5 more than the ping interval]"),
    ("server", "another binary to measure instead of fanfare; `baseline` compares the baseline with itself"),
];

/// How long a server may still process earlier client activity.
const SETTLE: Duration = Duration::from_millis(500);

/// The tenths of all connections between which memory is measured.
const FROM: usize = 5;
const TO: usize = 15;

/// For the slope only, so that it shows what connections use and not what the allocator keeps:
/// freed memory is returned at once, and the kernel does not round up to huge pages. All other
/// figures use the defaults.
const EXACT: [(&str, &str); 2] = [("MIMALLOC_PURGE_DELAY", "0"), ("MIMALLOC_ALLOW_THP", "0")];

/// Feed and history sizes for the stalled clients: filled before they connect, so that all growth
/// is theirs.
const FILLED: [&str; 4] = ["--buffer-memory", "1MiB", "--history", "1000"];

/// Size and number of the texts that stalled clients do not read: twice what their sockets and the
/// feed hold.
const TEXT: usize = 8192;
const UNREAD: u32 = 300;

/// How long an upgrade may take.
const TIMEOUT: Duration = Duration::from_secs(10);

struct Idle {
    start: Memory,
    full: Memory,
    /// Share of a core.
    cpu: f64,
    pings: u64,
    /// Bytes a connection, by the slope of resident memory.
    each: f64,
}

fn main() -> Result<()> {
    support::baseline::run_if_asked()?;
    let args = Args::read(ARGUMENTS)?;
    let connections: usize = args.get("connections", 10_000)?;
    let interval: u64 = args.get("ping-interval", 30)?;
    let time = Duration::from_secs(args.get("seconds", interval + 5)?);
    ensure!(connections >= 2 && interval > 0, "there must be connections and pings");
    allow_files(connections * TO / 10)?;
    let cores = Cores::split()?;

    let started = Instant::now();
    let period = format!("{interval}s");
    let binary = args.text("server").unwrap_or(env!("CARGO_BIN_EXE_fanfare"));
    let ping_interval = Duration::from_secs(interval);
    let start_baseline = |_: &[(&str, &str)]| Server::baseline(&cores, false, ping_interval);
    let start_with = |environment: &[(&str, &str)], flags: &[&str]| match binary {
        "baseline" => start_baseline(environment),
        binary => {
            let flags = [&["--ping-interval", &period], flags].concat();
            Server::fanfare(binary, Some(&cores), &flags, environment)
        }
    };
    let ours = measure(|environment| start_with(environment, &[]), connections, time)?;
    let baseline = measure(start_baseline, connections, time)?;
    let [idle, stalled] = stalled(start_with, connections)?;
    let binary = std::fs::metadata(if binary == "baseline" { "/proc/self/exe" } else { binary })?.len();

    println!("\n{connections} idle connections, pings every {interval} s; {}\n", cores.machine());
    let row = |what: String, ours: String, baseline: String| vec![what, ours, baseline];
    let rows = [
        row(
            format!(
                "resident bytes per connection, from {} to {}",
                connections * FROM / 10,
                connections * TO / 10
            ),
            format!("{:.0}", ours.each),
            format!("{:.0}", baseline.each),
        ),
        row("resident after start".into(), mib(ours.start.resident), mib(baseline.start.resident)),
        row(
            "the same, without the binary's pages".into(),
            mib(ours.start.anonymous),
            mib(baseline.start.anonymous),
        ),
        row(format!("resident at {connections}"), mib(ours.full.resident), mib(baseline.full.resident)),
        row(
            "the same, without the binary's pages".into(),
            mib(ours.full.anonymous),
            mib(baseline.full.anonymous),
        ),
        row(
            format!("CPU over {} s, of one core", time.as_secs()),
            format!("{:.3} %", ours.cpu * 100.0),
            format!("{:.3} %", baseline.cpu * 100.0),
        ),
        row("pings in that time".into(), ours.pings.to_string(), baseline.pings.to_string()),
        row("CPU per ping, everything included".into(), per_ping(&ours, time), per_ping(&baseline, time)),
        row("binary".into(), mib(binary), "–".into()),
    ];
    report::table(&["what", args.text("server").unwrap_or("fanfare"), "baseline"], &rows);
    let exact = EXACT.map(|(name, value)| format!("{name}={value}")).join(" ");
    println!(
        "\nBytes per connection: the slope over {} points, with {exact}. All other figures: defaults.",
        TO - FROM + 1
    );
    println!(
        "\nThe same clients idle, then stalled: they read nothing, and the feed no longer holds what they need.\n"
    );
    let row = |what: &str, value: fn(&Held) -> f64| {
        let each = |held: &Held| format!("{:.0} B", value(held) / connections as f64);
        vec![what.to_owned(), each(&idle), each(&stalled)]
    };
    let rows = [
        row("resident per connection", |held| held.resident),
        row("kernel buffers of both sides per connection", |held| held.kernel),
    ];
    report::table(&["what", "idle", "stalled"], &rows);
    eprintln!("\n{:.0} s in all", started.elapsed().as_secs_f64());
    Ok(())
}

fn per_ping(idle: &Idle, time: Duration) -> String {
    report::micros(idle.cpu * time.as_secs_f64() * 1e6 / idle.pings as f64)
}

fn measure(
    start: impl Fn(&[(&str, &str)]) -> Result<Server>,
    connections: usize,
    time: Duration,
) -> Result<Idle> {
    let server = start(&[])?;
    let name = server.process.name.clone();
    let (before, full, cpu, pings) = idle(&server, connections, time).with_context(|| name.clone())?;
    drop(server);
    let each = slope(&start(&EXACT)?, connections).with_context(|| name.clone())?;
    eprintln!("  {name}: {each:.0} bytes per connection, {:.3} % of a core", cpu * 100.0);
    Ok(Idle { start: before, full, cpu, pings, each })
}

/// Memory before and with all clients, the share of a core they use, and the pings they get.
fn idle(server: &Server, connections: usize, time: Duration) -> Result<(Memory, Memory, f64, u64)> {
    let mut clients = LoadClients::new(server.addr, 128)?;
    clients.idle(SETTLE)?;
    let start = server.process.memory()?;
    clients.grow(connections)?;
    clients.idle(SETTLE)?;
    let (before, pings) = (server.process.cpu()?, clients.pings());
    clients.idle(time)?;
    let cpu = (server.process.cpu()? - before).as_secs_f64() / time.as_secs_f64();
    let full = server.process.memory()?;
    let pings = clients.pings() - pings;
    ensure!(
        pings >= connections as u64 / 100 * 95, // a busy machine delays some
        "only {pings} pings for {connections} connections in {time:?}: CPU is not comparable"
    );
    Ok((start, full, cpu, pings))
}

/// Memory per connection: the slope of a line through many points, since tables grow by doubling
/// and two points could give any result.
fn slope(server: &Server, connections: usize) -> Result<f64> {
    let mut clients = LoadClients::new(server.addr, 128)?;
    let mut points = Vec::new();
    for tenths in FROM..=TO {
        clients.grow(connections * tenths / 10)?;
        clients.idle(SETTLE)?;
        points.push((clients.len() as f64, server.process.memory()?.resident as f64));
    }
    let resident: Vec<String> = points.iter().map(|(_, bytes)| mib(*bytes as u64)).collect();
    eprintln!("  {}: resident, tenths {FROM} to {TO}: {}", server.process.name, resident.join(", "));
    Ok(report::slope(&points))
}

/// Bytes held by all connections together.
struct Held {
    resident: f64,
    kernel: f64,
}

/// The memory of the same connections idle, then stalled.
fn stalled(
    start: impl Fn(&[(&str, &str)], &[&str]) -> Result<Server>,
    connections: usize,
) -> Result<[Held; 2]> {
    let server = start(&EXACT, &FILLED)?;
    let mut live = LoadClients::new(server.addr, TEXT)?;
    live.grow(1)?;
    live.publish_steadily(1200, Duration::from_millis(1))?;
    live.idle(SETTLE)?;
    let (resident, kernel) = (server.process.memory()?.resident as f64, kernel_buffers()?);
    let held = || -> Result<Held> {
        let now = server.process.memory()?.resident as f64;
        Ok(Held { resident: now - resident, kernel: kernel_buffers()? - kernel })
    };
    let clients: Vec<TcpStream> =
        (0..connections).map(|number| sleeper(server.addr, number)).collect::<Result<_>>()?;
    live.idle(SETTLE)?;
    let idle = held()?;
    live.publish_steadily(UNREAD, Duration::from_millis(20))?;
    live.idle(SETTLE)?;
    let stalled = held()?;
    // The kernel holds no more than 128 KiB of payload for each; all that was sent would be 2.4 MB.
    ensure!(stalled.kernel > (connections * TEXT) as f64, "the clients have not stalled");
    drop(clients);
    Ok([idle, stalled])
}

/// A client that reads nothing but the response to its handshake.
fn sleeper(addr: std::net::SocketAddr, number: usize) -> Result<TcpStream> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.set_recv_buffer_size(4096)?; // so that it is the server's buffers that fill
    socket.connect(&addr.into())?;
    let mut stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(TIMEOUT))?;
    let request = format!(
        "GET /ws/stalled{number} HTTP/1.1\r\nHost: {addr}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {}\r\n\r\n",
        wire::KEY
    );
    stream.write_all(request.as_bytes())?;
    let mut answer = vec![0; 1024];
    let length = stream.read(&mut answer)?;
    let head = wire::http_head(&answer[..length]).context("incomplete response")?;
    ensure!(answer[head].starts_with(b"HTTP/1.1 101"), "{}", String::from_utf8_lossy(&answer[..length]));
    Ok(stream)
}

/// Bytes that the kernel holds for all TCP sockets (proc(5)).
fn kernel_buffers() -> Result<f64> {
    let text = std::fs::read_to_string("/proc/net/sockstat")?;
    let pages =
        text.lines().find(|line| line.starts_with("TCP:")).and_then(|line| line.split(' ').next_back());
    Ok(pages.context("no memory in /proc/net/sockstat")?.parse::<f64>()? * rustix::param::page_size() as f64)
}
