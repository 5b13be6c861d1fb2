//! CPU time and latency of a delivery: a fanfare process on one core, thousands of clients on the
//! other cores, compared with the baseline (`support/baseline.rs`) in the same run.
//!
//! `cargo bench --bench fanout -- --connections 5000 --rate 10`; `--help` lists the arguments.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a bench prints its report")]

mod support;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use support::args::Args;
use support::files::allow_files;
use support::load_clients::LoadClients;
use support::process::{Cores, Server};
use support::report::{self, count, median, micros, millis};

const ARGUMENTS: &[(&str, &str)] = &[
    ("connections", "how many clients [5000]"),
    ("rate", "events a second, live [10]"),
    ("latency-rate", "events a second while latency is measured [20]"),
    ("size", "bytes of text in an event [128]"),
    ("seconds", "seconds of live events in each round [3]"),
    ("saturated", "seconds of each saturated run [1]"),
    ("rounds", "rounds, alternating between baseline and fanfare; medians are reported [5]"),
    ("at-most", "seconds in all: no round starts that would exceed them [115]"),
    ("redis", "a Redis URL for fanfare's bus [the local bus]"),
    ("server", "another binary to measure instead of fanfare; `baseline` compares the baseline with itself"),
];

/// Events in flight when saturated.
const WINDOWS: [u64; 3] = [16, 64, 256];

/// The same for the baseline with one `send()` per event, whose rate does not depend on the events
/// in flight.
const BASELINE_WINDOWS: [u64; 1] = [16];

/// How often all clients connect in a round: once takes only a tenth of a second.
const JOINS: u32 = 3;

struct Plan {
    connections: usize,
    size: usize,
    rate: f64,
    latency_rate: f64,
    live: f64,
    saturated: Duration,
}

/// The results of one round of one server.
struct Round {
    /// CPU per accepted connection, from handshake to welcome, in µs.
    accept: f64,
    /// CPU per live delivery, in µs.
    live: f64,
    latencies: Vec<Duration>,
    /// One per window.
    saturated: Vec<Saturated>,
}

struct Saturated {
    /// Deliveries a second.
    rate: f64,
    /// Deliveries per second of the server's CPU: steadier on a machine with other load.
    per_cpu: f64,
    /// The part of its core that the server used: below 1, the clients were the bottleneck.
    share: f64,
}

fn main() -> Result<()> {
    support::baseline::run_if_asked()?;
    let args = Args::read(ARGUMENTS)?;
    let plan = Plan {
        connections: args.get("connections", 5000)?,
        size: args.get("size", 128)?,
        rate: args.get("rate", 10.0)?,
        latency_rate: args.get("latency-rate", 20.0)?,
        live: args.get("seconds", 3.0)?,
        saturated: Duration::from_secs_f64(args.get("saturated", 1.0)?),
    };
    let rounds: usize = args.get("rounds", 5)?;
    let at_most = Duration::from_secs(args.get("at-most", 115)?);
    ensure!(plan.connections > 0 && rounds > 0, "there must be connections and rounds");
    ensure!(plan.rate > 0.0 && plan.latency_rate > 0.0, "rates must be above zero");
    allow_files(plan.connections)?;
    let cores = Cores::split()?;

    let started = Instant::now();
    let redis = args.text("redis").map(|url| ["--redis", url]);
    let bus = redis.as_ref().map_or(&[][..], |words| &words[..]);
    let fanfare = match args.text("server") {
        Some("baseline") => Server::baseline(&cores, false, Duration::ZERO)?,
        other => Server::fanfare(other.unwrap_or(env!("CARGO_BIN_EXE_fanfare")), Some(&cores), bus, &[])?,
    };
    let baseline = Server::baseline(&cores, false, Duration::ZERO)?;
    let batching = Server::baseline(&cores, true, Duration::ZERO)?;
    let (mut ours, mut baselines, mut batched) = (Vec::new(), Vec::new(), Vec::new());
    for round in 1..=rounds {
        let so_far = started.elapsed();
        if round > 1 && so_far + so_far / (round as u32 - 1) > at_most {
            eprintln!("no time for another round (--at-most)");
            break;
        }
        eprintln!("round {round} of {rounds}, {:.0} s so far", so_far.as_secs_f64());
        baselines.push(
            measure(&baseline, &plan, &BASELINE_WINDOWS).with_context(|| baseline.process.name.clone())?,
        );
        ours.push(measure(&fanfare, &plan, &WINDOWS).with_context(|| fanfare.process.name.clone())?);
        batched.push(measure_saturated(&batching, &plan).with_context(|| batching.process.name.clone())?);
    }
    let name = args.text("server").unwrap_or("fanfare");
    print(name, &plan, &cores, &ours, &baselines, &batched);
    eprintln!("\n{:.0} s in all", started.elapsed().as_secs_f64());
    Ok(())
}

fn measure(server: &Server, plan: &Plan, windows: &[u64]) -> Result<Round> {
    let process = &server.process;
    let files = process.open_files()?;
    let mut accepting = Duration::ZERO;
    let mut clients = LoadClients::new(server.addr, plan.size)?;
    for join in 1..=JOINS {
        let before = process.cpu()?;
        clients.grow(plan.connections)?;
        accepting += process.cpu()? - before;
        if join < JOINS {
            clients = LoadClients::new(server.addr, plan.size)?; // the previous clients disconnect
            process.wait_for_files(files)?;
        }
    }
    let accept = spent(accepting, plan.connections as f64 * f64::from(JOINS));

    // Saturation first: it also warms up the core for the live measurement.
    let saturated = saturate(server, &mut clients, plan, windows)?;

    let period = Duration::from_secs_f64(1.0 / plan.rate);
    clients.publish_steadily(plan.rate.ceil() as u32, period)?;
    let (before, got) = (process.cpu()?, clients.events());
    clients.publish_steadily((plan.rate * plan.live).ceil() as u32, period)?;
    let live = spent(process.cpu()? - before, (clients.events() - got) as f64);

    let period = Duration::from_secs_f64(1.0 / plan.latency_rate);
    let latencies = clients.publish_and_time((plan.latency_rate * plan.live).ceil() as u32, period)?;

    drop(clients);
    process.wait_for_files(files)?;
    let name = &process.name;
    eprintln!("  {name}: accept {accept:.1} µs, delivery {live:.2} µs, saturated {}", shown(&saturated));
    Ok(Round { accept, live, latencies, saturated })
}

fn measure_saturated(server: &Server, plan: &Plan) -> Result<Vec<Saturated>> {
    let files = server.process.open_files()?;
    let mut clients = LoadClients::new(server.addr, plan.size)?;
    clients.grow(plan.connections)?;
    let saturated = saturate(server, &mut clients, plan, &WINDOWS)?;
    drop(clients);
    server.process.wait_for_files(files)?;
    eprintln!("  {}: saturated {}", server.process.name, shown(&saturated));
    Ok(saturated)
}

fn saturate(
    server: &Server,
    clients: &mut LoadClients,
    plan: &Plan,
    windows: &[u64],
) -> Result<Vec<Saturated>> {
    let mut all = Vec::new();
    for &window in windows {
        let (start, before, had) = (Instant::now(), server.process.cpu()?, clients.events());
        let rate = clients.publish_windowed(window, plan.saturated)?;
        let cpu = (server.process.cpu()? - before).as_secs_f64();
        let per_cpu = (clients.events() - had) as f64 / cpu;
        all.push(Saturated { rate, per_cpu, share: cpu / start.elapsed().as_secs_f64() });
    }
    Ok(all)
}

/// Microseconds of CPU per item.
fn spent(cpu: Duration, count: f64) -> f64 {
    cpu.as_secs_f64() * 1e6 / count
}

fn shown(saturated: &[Saturated]) -> String {
    let all = saturated.iter().map(|s| format!("{}/s at {:.0} %", count(s.rate), s.share * 100.0));
    all.collect::<Vec<_>>().join(", ")
}

fn print(
    name: &str,
    plan: &Plan,
    cores: &Cores,
    ours: &[Round],
    baselines: &[Round],
    batched: &[Vec<Saturated>],
) {
    let mut rows = Vec::new();
    let pairs = |figure: fn(&Round) -> f64| -> Vec<(f64, f64)> {
        ours.iter().zip(baselines).map(|(ours, baseline)| (figure(ours), figure(baseline))).collect()
    };
    let mut row = |what: String, pairs: &[(f64, f64)], show: fn(f64) -> String| {
        let ours: Vec<f64> = pairs.iter().map(|pair| pair.0).collect();
        let baseline: Vec<f64> = pairs.iter().map(|pair| pair.1).collect();
        rows.push(vec![what, show(median(&ours)), show(median(&baseline)), report::ratio(pairs)]);
    };
    row(format!("CPU per delivery, live, {} events/s", plan.rate), &pairs(|round| round.live), micros);
    row("CPU per accepted connection, handshake to welcome".into(), &pairs(|round| round.accept), micros);
    for share in [0.5, 0.99] {
        let of = |round: &Round| report::percentile(&round.latencies, share).as_secs_f64() * 1e3;
        let pairs: Vec<_> =
            ours.iter().zip(baselines).map(|(ours, baseline)| (of(ours), of(baseline))).collect();
        let what = format!("latency p{:.0}, {} events/s", share * 100.0, plan.latency_rate);
        row(what, &pairs, |ms| millis(Duration::from_secs_f64(ms / 1e3)));
    }
    for (at, window) in WINDOWS.iter().enumerate() {
        let one: Vec<_> =
            ours.iter().zip(baselines).map(|(o, f)| (o.saturated[at].rate, f.saturated[0].rate)).collect();
        let all: Vec<_> = ours.iter().zip(batched).map(|(o, f)| (o.saturated[at].rate, f[at].rate)).collect();
        let per_second = |value| format!("{}/s", count(value));
        row(format!("deliveries, {window} events in flight"), &one, per_second);
        row("the same, baseline with batching".into(), &all, per_second);
        let cpu: Vec<_> = ours
            .iter()
            .zip(baselines)
            .map(|(o, f)| (o.saturated[at].per_cpu, f.saturated[0].per_cpu))
            .collect();
        row(format!("deliveries per second of CPU, {window} in flight"), &cpu, count);
    }
    let shares: Vec<String> = (0..WINDOWS.len())
        .map(|at| median(&ours.iter().map(|round| round.saturated[at].share).collect::<Vec<_>>()))
        .map(|share| format!("{:.0} %", share * 100.0))
        .collect();
    println!(
        "\n{} connections, {}-byte texts, one core for the server; {}; medians of {} rounds (lowest and \
         highest ratio)\n",
        plan.connections,
        plan.size,
        cores.machine(),
        ours.len()
    );
    report::table(&["what", name, "baseline", "ratio"], &rows);
    println!(
        "\nEvery delivery arrived. Saturated, with {WINDOWS:?} events in flight, {name} used {} of its core: \
         far below 100 % the clients are the bottleneck.",
        shares.join(", ")
    );
}
