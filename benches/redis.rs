//! Events per second of one Redis core, with history: a real redis-server on its own core, one
//! fanfare node and the publisher on the other cores. Events are published through the node, which
//! batches them, and by FCALL from a plain Redis client, one event per call.
//!
//! `cargo bench --bench redis`; `--help` lists the arguments. Needs `redis-server` 7 or newer.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a bench prints its report")]

mod support;

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use fanfare::cli::bench::result::rate as count;
use support::args::Args;
use support::process::{Cores, Place, Server};
use support::redis::Redis;
use support::report::{self, median};

const ARGUMENTS: &[(&str, &str)] = &[
    ("size", "bytes of text in an event [128]"),
    ("seconds", "seconds of each run [4]"),
    ("rounds", "rounds, alternating between the ways to publish; medians are reported [3]"),
    ("redis-server", "the server to start [redis-server]"),
    ("server", "another fanfare binary"),
];

/// Events in flight through the node.
const WINDOWS: [u32; 3] = [64, 256, 1024];

/// Events in flight by FCALL: Redis never waits for the publisher.
const BY_FCALL: u32 = 128;

/// The results of one run.
struct Run {
    /// Events per second.
    rate: f64,
    /// Events per second of Redis's CPU time.
    per_core: f64,
}

fn main() -> Result<()> {
    support::start()?;
    let args = Args::read(ARGUMENTS)?;
    let size: u32 = args.get("size", 128)?;
    let seconds: f64 = args.get("seconds", 4.0)?;
    let rounds: usize = args.get("rounds", 3)?;
    ensure!(rounds > 0, "there must be rounds");
    let cores = Cores::split()?;
    let started = Instant::now();

    let redis = Redis::start(args.text("redis-server").unwrap_or("redis-server"), &cores, Place::Server)?;
    let binary = args.text("server").unwrap_or(env!("CARGO_BIN_EXE_fanfare"));
    let node = Server::fanfare(binary, &cores, Place::Clients, &["--redis", &redis.url()])?;
    let (url, redis_url) = ([node.url()], redis.url());
    let (size_text, pid) = (size.to_string(), redis.process.id().to_string());
    let flags = ["--connections", "1", "--size", &size_text, "--pid", &pid];
    let fcall = r#"FCALL fanfare_publish 1 fanfare:{ws_broadcast} {"text":"{event}"}"#;
    let by_fcall = [&flags[..], &["--publish", &redis_url, "--command", fcall]].concat();

    let mut runs: Vec<(String, Vec<Run>)> =
        WINDOWS.iter().map(|window| (format!("through the node, {window} in flight"), Vec::new())).collect();
    runs.push((format!("FCALL, one event per call, {BY_FCALL} in flight"), Vec::new()));
    for round in 1..=rounds {
        eprintln!("round {round} of {rounds}, {:.0} s so far", started.elapsed().as_secs_f64());
        for (at, (what, runs)) in runs.iter_mut().enumerate() {
            let (flags, window) = match WINDOWS.get(at) {
                Some(window) => (&flags[..], *window),
                None => (&by_fcall[..], BY_FCALL),
            };
            let phases = format!("connect, saturate {window} {}, leave", support::duration(seconds));
            let results = support::load(&url, flags, &phases).with_context(|| what.clone())?;
            let events = f64::from(results[1].published);
            let run = Run {
                rate: events / results[1].time.as_secs_f64(),
                per_core: events / results[1].server_cpu.as_secs_f64(),
            };
            eprintln!("  {what}: {}/s, {} per core-second", count(run.rate), count(run.per_core));
            runs.push(run);
        }
    }

    println!(
        "\n{size}-byte texts, with history, {} on its own core; the node and its client share the others; {}; \
         medians of {rounds} rounds\n",
        redis.version,
        cores.machine(),
    );
    let rows: Vec<Vec<String>> = runs
        .iter()
        .map(|(what, runs)| {
            let rate = median(&runs.iter().map(|run| run.rate).collect::<Vec<_>>());
            let per_core = median(&runs.iter().map(|run| run.per_core).collect::<Vec<_>>());
            vec![
                what.clone(),
                count(per_core),
                format!("{:.1} µs", 1e6 / per_core),
                format!("{}/s", count(rate)),
                format!("{:.0} %", rate / per_core * 100.0),
            ]
        })
        .collect();
    report::table(
        &[
            "events",
            "per second of Redis CPU",
            "Redis CPU per event",
            "wall clock",
            "Redis's share of its core",
        ],
        &rows,
    );
    println!("\nEvery event reached the subscriber.");
    eprintln!("\n{:.0} s in all", started.elapsed().as_secs_f64());
    Ok(())
}
