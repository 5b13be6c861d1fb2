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
use support::process::{Cores, Memory, Server, allow_files};
use support::report::{self, mib};

const ARGUMENTS: &[(&str, &str)] = &[
    ("connections", "idle clients; the slope is taken from half to one and a half of it [10000]"),
    ("heartbeat", "seconds between heartbeats [30]"),
    ("seconds", "seconds over which CPU is taken [5 more than the heartbeat]"),
    ("server", "another binary to measure in fanfare's place; `floor` holds the floor against itself"),
];

/// How long a server may still be busy with what its clients did before.
const SETTLE: Duration = Duration::from_secs(2);

struct Idle {
    start: Memory,
    full: Memory,
    /// Bytes a connection, by the slope of resident memory.
    each: f64,
    /// Share of a core.
    cpu: f64,
    pings: u64,
}

fn main() -> Result<()> {
    support::floor::run_if_asked()?;
    let args = Args::read(ARGUMENTS)?;
    let connections: usize = args.get("connections", 10_000)?;
    let heartbeat: u64 = args.get("heartbeat", 30)?;
    let time = Duration::from_secs(args.get("seconds", heartbeat + 5)?);
    ensure!(connections >= 2 && heartbeat > 0, "there must be connections and heartbeats");
    allow_files(connections / 2 * 3)?;
    let cores = Cores::split()?;

    let started = Instant::now();
    let period = format!("{heartbeat}s");
    let binary = args.text("server").unwrap_or(env!("CARGO_BIN_EXE_fanfare"));
    let beat = Duration::from_secs(heartbeat);
    let server = match binary {
        "floor" => Server::floor(&cores, false, beat)?,
        binary => Server::fanfare(
            binary,
            Some(&cores),
            &["--heartbeat", &period],
            &[("MIMALLOC_PURGE_DELAY", "0")], // memory given back shows at once
        )?,
    };
    let ours = measure(&server, connections, time).with_context(|| server.process.name.clone())?;
    drop(server);
    let floor = measure(&Server::floor(&cores, false, beat)?, connections, time).context("the floor")?;
    let binary = std::fs::metadata(if binary == "floor" { "/proc/self/exe" } else { binary })?.len();

    println!(
        "\n{connections} idle connections, heartbeats every {heartbeat} s; {}\n",
        report::machine(cores.count())
    );
    let row = |what: String, ours: String, floor: String| vec![what, ours, floor];
    let rows = [
        row(
            format!("userland bytes per connection, from {} to {}", connections / 2, connections / 2 * 3),
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
        row("binary".into(), mib(binary), "–".into()),
    ];
    report::table(&["what", args.text("server").unwrap_or("fanfare"), "floor"], &rows);
    println!("\nMIMALLOC_PURGE_DELAY=0, so that memory given back shows at once.");
    eprintln!("\n{:.0} s in all", started.elapsed().as_secs_f64());
    Ok(())
}

fn measure(server: &Server, connections: usize, time: Duration) -> Result<Idle> {
    let process = &server.process;
    let mut crowd = Crowd::new(server.addr, 128)?;
    crowd.idle(Duration::from_millis(500))?;
    let start = process.memory()?;

    let low = connections / 2;
    crowd.grow(low)?;
    crowd.idle(SETTLE)?;
    let half = process.memory()?;

    crowd.grow(connections)?;
    crowd.idle(SETTLE)?;
    let full = process.memory()?;
    let (before, pings) = (process.cpu()?, crowd.pings());
    crowd.idle(time)?;
    let cpu = (process.cpu()? - before).as_secs_f64() / time.as_secs_f64();
    let pings = crowd.pings() - pings;
    ensure!(
        pings >= connections as u64 / 100 * 99,
        "only {pings} heartbeats for {connections} connections in {time:?}: CPU is not comparable"
    );

    crowd.grow(low * 3)?;
    crowd.idle(SETTLE)?;
    let more = process.memory()?;
    let each = (more.resident as f64 - half.resident as f64) / (low * 2) as f64;
    eprintln!("  {}: {each:.0} bytes a connection, {:.3} % of a core", process.name, cpu * 100.0);
    Ok(Idle { start, full, each, cpu, pings })
}
