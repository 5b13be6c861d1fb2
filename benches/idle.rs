//! What an idle connection costs: memory and CPU of a whole fanfare process, beside the floor
//! (`support/floor.rs`) in the same run.
//!
//! `cargo bench --bench idle -- --connections 10000`; `--help` lists the arguments.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a bench is there to print")]

mod support;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use support::args::Args;
use support::crowd::Crowd;
use support::files::allow_files;
use support::process::{Cores, Memory, Server};
use support::report::{self, mib};

const ARGUMENTS: &[(&str, &str)] = &[
    ("connections", "idle clients; the slope is taken from half to one and a half of it [10000]"),
    ("heartbeat", "seconds between heartbeats [30]"),
    ("seconds", "seconds over which CPU is taken [5 more than the heartbeat]"),
    ("server", "another binary to measure in fanfare's place; `floor` holds the floor against itself"),
];

/// How long a server may still be busy with what its clients did before.
const SETTLE: Duration = Duration::from_millis(500);

/// The tenths of all connections between which memory is taken.
const FROM: usize = 5;
const TO: usize = 15;

/// For the slope alone, so that it shows what connections use and not what the allocator keeps: memory given
/// back goes at once, and the kernel doesn't round up to huge pages. Everything else is taken as it comes.
const EXACT: [(&str, &str); 2] = [("MIMALLOC_PURGE_DELAY", "0"), ("MIMALLOC_ALLOW_THP", "0")];

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
    support::floor::run_if_asked()?;
    let args = Args::read(ARGUMENTS)?;
    let connections: usize = args.get("connections", 10_000)?;
    let heartbeat: u64 = args.get("heartbeat", 30)?;
    let time = Duration::from_secs(args.get("seconds", heartbeat + 5)?);
    ensure!(connections >= 2 && heartbeat > 0, "there must be connections and heartbeats");
    allow_files(connections * TO / 10)?;
    let cores = Cores::split()?;

    let started = Instant::now();
    let period = format!("{heartbeat}s");
    let binary = args.text("server").unwrap_or(env!("CARGO_BIN_EXE_fanfare"));
    let beat = Duration::from_secs(heartbeat);
    let start_floor = |_: &[(&str, &str)]| Server::floor(&cores, false, beat);
    let start_ours = |environment: &[(&str, &str)]| match binary {
        "floor" => start_floor(environment),
        binary => Server::fanfare(binary, Some(&cores), &["--heartbeat", &period], environment),
    };
    let ours = measure(start_ours, connections, time)?;
    let floor = measure(start_floor, connections, time)?;
    let binary = std::fs::metadata(if binary == "floor" { "/proc/self/exe" } else { binary })?.len();

    println!("\n{connections} idle connections, heartbeats every {heartbeat} s; {}\n", cores.machine());
    let row = |what: String, ours: String, floor: String| vec![what, ours, floor];
    let rows = [
        row(
            format!(
                "resident bytes per connection, from {} to {}",
                connections * FROM / 10,
                connections * TO / 10
            ),
            format!("{:.0}", ours.each),
            format!("{:.0}", floor.each),
        ),
        row("resident after start".into(), mib(ours.start.resident), mib(floor.start.resident)),
        row(
            "the same, without the binary's pages".into(),
            mib(ours.start.anonymous),
            mib(floor.start.anonymous),
        ),
        row(format!("resident at {connections}"), mib(ours.full.resident), mib(floor.full.resident)),
        row(
            "the same, without the binary's pages".into(),
            mib(ours.full.anonymous),
            mib(floor.full.anonymous),
        ),
        row(
            format!("CPU over {} s, of one core", time.as_secs()),
            format!("{:.3} %", ours.cpu * 100.0),
            format!("{:.3} %", floor.cpu * 100.0),
        ),
        row("heartbeats in that time".into(), ours.pings.to_string(), floor.pings.to_string()),
        row("CPU for each heartbeat, all told".into(), per_ping(&ours, time), per_ping(&floor, time)),
        row("binary".into(), mib(binary), "–".into()),
    ];
    report::table(&["what", args.text("server").unwrap_or("fanfare"), "floor"], &rows);
    let exact = EXACT.map(|(name, value)| format!("{name}={value}")).join(" ");
    println!(
        "\nBytes per connection: the slope over {} points, with {exact}. The rest is as started.",
        TO - FROM + 1
    );
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
    eprintln!("  {name}: {each:.0} bytes a connection, {:.3} % of a core", cpu * 100.0);
    Ok(Idle { start: before, full, cpu, pings, each })
}

/// Memory before and with all clients, the share of a core that they cost, and how many heartbeats they got.
fn idle(server: &Server, connections: usize, time: Duration) -> Result<(Memory, Memory, f64, u64)> {
    let mut crowd = Crowd::new(server.addr, 128)?;
    crowd.idle(SETTLE)?;
    let start = server.process.memory()?;
    crowd.grow(connections)?;
    crowd.idle(SETTLE)?;
    let (before, pings) = (server.process.cpu()?, crowd.pings());
    crowd.idle(time)?;
    let cpu = (server.process.cpu()? - before).as_secs_f64() / time.as_secs_f64();
    let full = server.process.memory()?;
    let pings = crowd.pings() - pings;
    ensure!(
        pings >= connections as u64 / 100 * 95, // a busy machine is late with some
        "only {pings} heartbeats for {connections} connections in {time:?}: CPU is not comparable"
    );
    Ok((start, full, cpu, pings))
}

/// What one more connection costs. Tables grow by doubling and leave holes behind, so two points alone could
/// say anything; this is the line through many, on the way up.
fn slope(server: &Server, connections: usize) -> Result<f64> {
    let mut crowd = Crowd::new(server.addr, 128)?;
    let mut points = Vec::new();
    for tenths in FROM..=TO {
        crowd.grow(connections * tenths / 10)?;
        crowd.idle(SETTLE)?;
        points.push((crowd.len() as f64, server.process.memory()?.resident as f64));
    }
    let resident: Vec<String> = points.iter().map(|(_, bytes)| mib(*bytes as u64)).collect();
    eprintln!("  {}: resident, tenths {FROM} to {TO}: {}", server.process.name, resident.join(", "));
    Ok(report::slope(&points))
}
