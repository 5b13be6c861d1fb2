//! Memory and CPU of idle connections: a fanfare process with default settings, compared with the
//! baseline (`support/baseline.rs`) in the same run. Also the memory of stalled connections: clients
//! that stop reading while events go on until the feed no longer holds what they need.
//!
//! `cargo bench --bench idle -- --connections 10000`; `--help` lists the arguments.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a bench prints its report")]

mod support;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fanfare::cli::bench::result::{PhaseResult, grouped, mebibytes};
use fanfare::cli::bench::server::Usage;
use support::args::Args;
use support::process::{Cores, Place, Server};
use support::report;

const ARGUMENTS: &[(&str, &str)] = &[
    ("connections", "idle clients whose CPU is measured [10000]"),
    ("ping-interval", "seconds between pings [30]"),
    ("seconds", "seconds over which CPU is measured [5 more than the ping interval]"),
    ("server", "another binary to measure instead of fanfare; `baseline` compares the baseline with itself"),
];

/// Connections whose memory is measured, each in a process of its own: tables that grow by doubling
/// make the memory of one uneven.
const COUNTS: [u32; 4] = [1000, 5000, 10_000, 19_000];

/// Clients that stall, and the feed and history that they do not read. These are filled before.
const STALLED: u32 = 1000;
const FILLED: [&str; 4] = ["--buffer-memory", "1MiB", "--history", "1000"];

/// Texts that stalled clients do not read: 300, twice what their sockets and the feed hold.
const TEXT: [&str; 4] = ["--size", "8192", "--rate", "50/s"];
const STALL: &str = "connect, rate 600/s 2s, idle 1s, stall 100% 6s, leave";

struct Idle {
    start: Usage,
    full: Usage,
    /// Share of a core.
    cpu: f64,
    pings: u64,
    /// Bytes of private anonymous memory per connection, for each of [`COUNTS`].
    each: Vec<f64>,
}

fn main() -> Result<()> {
    support::start()?;
    let args = Args::read(ARGUMENTS)?;
    let connections: u32 = args.get("connections", 10_000)?;
    let interval: u64 = args.get("ping-interval", 30)?;
    let time = Duration::from_secs(args.get("seconds", interval + 5)?);
    ensure!(connections >= 2 && interval > 0, "there must be connections and pings");
    let cores = Cores::split()?;

    let started = Instant::now();
    let period = format!("{interval}s");
    let binary = args.text("server").unwrap_or(env!("CARGO_BIN_EXE_fanfare"));
    let start_baseline = || Server::baseline(&cores, false, Duration::from_secs(interval));
    let start_with = |flags: &[&str]| match binary {
        "baseline" => start_baseline(),
        binary => {
            let flags = [&["--ping-interval", &period], flags].concat();
            Server::fanfare(binary, &cores, Place::Server, &flags)
        }
    };
    let ours = measure(|| start_with(&[]), connections, time)?;
    let baseline = measure(start_baseline, connections, time)?;
    let size = std::fs::metadata(if binary == "baseline" { "/proc/self/exe" } else { binary })?.len();

    println!("\n{connections} idle connections, pings every {interval} s; {}\n", cores.machine());
    let row = |what: String, ours: String, baseline: String| vec![what, ours, baseline];
    let memory = |what: &str, of: fn(&Idle) -> u64| {
        row(what.to_owned(), mebibytes(of(&ours)), mebibytes(of(&baseline)))
    };
    let mut rows: Vec<_> = COUNTS
        .iter()
        .zip(ours.each.iter().zip(&baseline.each))
        .map(|(count, (ours, baseline))| {
            let what = format!("memory per connection, {} connections", grouped((*count).into()));
            row(what, format!("{ours:.0} B"), format!("{baseline:.0} B"))
        })
        .collect();
    rows.extend([
        memory("resident after start", |idle| idle.start.resident),
        memory("the same, without the binary's pages", |idle| idle.start.anonymous),
        memory("resident with all connections", |idle| idle.full.resident),
        memory("the same, without the binary's pages", |idle| idle.full.anonymous),
        row(
            format!("CPU over {} s, of one core", time.as_secs()),
            format!("{:.3} %", ours.cpu * 100.0),
            format!("{:.3} %", baseline.cpu * 100.0),
        ),
        row("pings in that time".into(), ours.pings.to_string(), baseline.pings.to_string()),
        row("CPU per ping, everything included".into(), per_ping(&ours, time), per_ping(&baseline, time)),
        row("binary".into(), mebibytes(size), "–".into()),
    ]);
    report::table(&["what", args.text("server").unwrap_or("fanfare"), "baseline"], &rows);
    println!(
        "\nMemory per connection is private anonymous memory with idle clients, less that before, divided by \
         their number."
    );
    if binary != "baseline" {
        print_stalled(&start_with(&FILLED)?)?;
    }
    eprintln!("\n{:.0} s in all", started.elapsed().as_secs_f64());
    Ok(())
}

fn per_ping(idle: &Idle, time: Duration) -> String {
    report::micros(idle.cpu * time.as_secs_f64() * 1e6 / idle.pings as f64)
}

fn measure(start: impl Fn() -> Result<Server>, connections: u32, time: Duration) -> Result<Idle> {
    let mut each = Vec::new();
    for count in COUNTS {
        let server = start()?;
        let before = server.process.usage().anonymous;
        let idle = idle(&server, count, Duration::from_secs(1))?;
        each.push(idle.usage.anonymous.saturating_sub(before) as f64 / f64::from(idle.clients));
    }
    let server = start()?;
    let start = server.process.usage();
    let idle = idle(&server, connections, time)?;
    let (cpu, pings) = (idle.server_cpu.as_secs_f64() / idle.time.as_secs_f64(), idle.tally.pings);
    ensure!(
        pings >= u64::from(connections) / 100 * 95, // a busy machine delays some
        "only {pings} pings for {connections} connections in {time:?}: CPU is not comparable"
    );
    let shown: Vec<String> = each.iter().map(|bytes| format!("{bytes:.0}")).collect();
    let name = &server.process.name;
    eprintln!("  {name}: {} bytes per connection, {:.3} % of a core", shown.join(", "), cpu * 100.0);
    Ok(Idle { start, full: idle.usage, cpu, pings, each })
}

fn idle(server: &Server, connections: u32, time: Duration) -> Result<PhaseResult> {
    let (count, phases) = (connections.to_string(), format!("connect, idle 500ms, idle {}s", time.as_secs()));
    let results = support::load(&[server.url()], &["--connections", &count], &phases);
    results.with_context(|| server.process.name.clone())?.pop().context("no phase")
}

/// What connections that have stalled take, more than idle ones.
fn print_stalled(server: &Server) -> Result<()> {
    let count = STALLED.to_string();
    let results = support::load(&[server.url()], &[&["--connections", &count], &TEXT[..]].concat(), STALL)?;
    let (idle, stalled) = (&results[2].usage, &results[3].usage);
    let more = |of: fn(&Usage) -> u64| of(stalled).saturating_sub(of(idle)) / u64::from(STALLED);
    println!("\n{STALLED} clients that read nothing, while the feed no longer holds what they need:\n");
    let rows = [
        vec!["memory per connection, more than idle".into(), format!("{} B", more(|usage| usage.anonymous))],
        vec![
            "kernel memory of both its sockets".into(),
            format!("{} KiB", more(|usage| usage.sockets) >> 10),
        ],
    ];
    report::table(&["what", "stalled"], &rows);
    Ok(())
}
