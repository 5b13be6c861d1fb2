//! Events per second of one Redis core, with history: a real redis-server on its own core, one
//! fanfare node and the publisher on the other cores. Events are published through the node, which
//! batches them, and by FCALL from a plain Redis client, one event per call.
//!
//! `cargo bench --bench redis`; `--help` lists the arguments. Needs `redis-server` 7 or newer.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a bench prints its report")]

mod support;

use std::collections::VecDeque;
use std::io::Write;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use support::args::Args;
use support::load_clients::LoadClients;
use support::process::{Cores, Server};
use support::redis::{Redis, command, reply};
use support::report::{self, count, median};

const ARGUMENTS: &[(&str, &str)] = &[
    ("size", "bytes of text in an event [128]"),
    ("seconds", "seconds of each run [4]"),
    ("rounds", "rounds, alternating between the ways to publish; medians are reported [3]"),
    ("redis-server", "the server to start [redis-server]"),
    ("server", "another fanfare binary"),
];

/// Events in flight through the node.
const WINDOWS: [u64; 3] = [64, 256, 1024];

/// FCALLs sent together on one connection; two connections alternate, so that Redis never waits.
const PIPELINE: usize = 64;

/// How far FCALL may run ahead of the subscriber: well within the history that fills gaps.
const AHEAD: u64 = 4096;

/// The results of one run.
struct Run {
    /// Events per second.
    rate: f64,
    /// Events per second of Redis's CPU time.
    per_core: f64,
}

fn main() -> Result<()> {
    support::baseline::run_if_asked()?;
    let args = Args::read(ARGUMENTS)?;
    let size: usize = args.get("size", 128)?;
    let time = Duration::from_secs_f64(args.get("seconds", 4.0)?);
    let rounds: usize = args.get("rounds", 3)?;
    ensure!(rounds > 0, "there must be rounds");
    let cores = Cores::split()?;
    let started = Instant::now();

    let redis = Redis::start(args.text("redis-server").unwrap_or("redis-server"), Some(&cores))?;
    let binary = args.text("server").unwrap_or(env!("CARGO_BIN_EXE_fanfare"));
    let node = Server::fanfare(binary, None, &["--redis", &redis.url()], &[])?;
    let mut clients = LoadClients::new(node.addr, size)?;
    clients.grow(1)?;

    let mut runs: Vec<(String, Vec<Run>)> =
        WINDOWS.iter().map(|window| (format!("through the node, {window} in flight"), Vec::new())).collect();
    runs.push(("FCALL, one event per call".into(), Vec::new()));
    for round in 1..=rounds {
        eprintln!("round {round} of {rounds}, {:.0} s so far", started.elapsed().as_secs_f64());
        for (at, (what, runs)) in runs.iter_mut().enumerate() {
            let (start, before, had) = (Instant::now(), redis.process.cpu()?, clients.published());
            match WINDOWS.get(at) {
                Some(window) => drop(clients.publish_windowed(*window, time)?),
                None => fcall(&redis, &mut clients, size, time)?,
            }
            let events = (clients.published() - had) as f64;
            let run = Run {
                rate: events / start.elapsed().as_secs_f64(),
                per_core: events / (redis.process.cpu()? - before).as_secs_f64(),
            };
            eprintln!("  {what}: {}/s, {} per core-second", count(run.rate), count(run.per_core));
            runs.push(run);
        }
    }

    println!(
        "\n{size}-byte texts, with history, {} on its own core; the node and its client share the others; {}; \
         medians of {rounds} rounds\n",
        redis.version()?,
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

/// Publishes by FCALL for this time, then waits until the node's client has every event.
fn fcall(redis: &Redis, clients: &mut LoadClients, size: usize, time: Duration) -> Result<()> {
    let event = format!(r#"{{"sender":"backend","text":"{}"}}"#, "x".repeat(size));
    let words = ["FCALL", "fanfare_publish", "1", "fanfare:{ws_broadcast}", &event];
    let batch = command(&words).repeat(PIPELINE);
    let mut asked = VecDeque::new();
    for _ in 0..2 {
        let mut connection = redis.connect()?;
        connection.get_mut().write_all(&batch)?;
        asked.push_back(connection);
    }
    let start = Instant::now();
    while let Some(mut connection) = asked.pop_front() {
        for _ in 0..PIPELINE {
            reply(&mut connection).context("FCALL fanfare_publish")?;
        }
        clients.expect(PIPELINE as u64);
        clients.drain()?;
        let waiting = Instant::now();
        while clients.in_flight() > AHEAD {
            clients.drain()?;
            ensure!(waiting.elapsed() < Duration::from_secs(10), "the node's client got nothing for 10 s");
        }
        if start.elapsed() < time {
            connection.get_mut().write_all(&batch)?;
            asked.push_back(connection);
        }
    }
    clients.wait_for_all()
}
