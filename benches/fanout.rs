//! CPU time and latency of a delivery: a fanfare process on one core, thousands of clients on the
//! other cores, compared with the baseline (`support/baseline.rs`) in the same run.
//!
//! `cargo bench --bench fanout -- --connections 5000 --rate 10`; `--help` lists the arguments.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a bench prints its report")]

mod support;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use fanfare::cli::bench::result::{PhaseResult, rate, shown_latency};
use support::args::Args;
use support::duration;
use support::process::{Cores, Place, Server};
use support::report::{self, median, micros};

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

/// Events in flight when saturated. The rate of the baseline with one `send()` per event does not
/// depend on them.
const WINDOWS: [u32; 3] = [16, 64, 256];

/// How often all clients connect in a round: once takes only a tenth of a second.
const JOINS: u32 = 3;

struct Plan {
    connections: u32,
    size: String,
    rate: f64,
    latency_rate: f64,
    live: f64,
    saturated: f64,
}

/// The results of one round of one server.
struct Round {
    /// CPU per accepted connection, from handshake to welcome, in µs.
    accept: f64,
    /// CPU per live delivery, in µs.
    live: f64,
    /// p50 and p99 in µs.
    latencies: [u64; 2],
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
    support::start()?;
    let args = Args::read(ARGUMENTS)?;
    let plan = Plan {
        connections: args.get("connections", 5000)?,
        size: args.get("size", 128)?.to_string(),
        rate: args.get("rate", 10.0)?,
        latency_rate: args.get("latency-rate", 20.0)?,
        live: args.get("seconds", 3.0)?,
        saturated: args.get("saturated", 1.0)?,
    };
    let rounds: usize = args.get("rounds", 5)?;
    let at_most = Duration::from_secs(args.get("at-most", 115)?);
    ensure!(plan.connections > 0 && rounds > 0, "there must be connections and rounds");
    ensure!(plan.rate > 0.0 && plan.latency_rate > 0.0, "rates must be above zero");
    let cores = Cores::split()?;

    let started = Instant::now();
    let redis = args.text("redis").map(|url| ["--redis", url]);
    let bus = redis.as_ref().map_or(&[][..], |words| &words[..]);
    let fanfare = match args.text("server") {
        Some("baseline") => Server::baseline(&cores, false, Duration::ZERO)?,
        other => {
            let binary = other.unwrap_or(env!("CARGO_BIN_EXE_fanfare"));
            Server::fanfare(binary, &cores, Place::Server, bus)?
        }
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
        baselines
            .push(measure(&baseline, &plan, &WINDOWS[..1]).with_context(|| baseline.process.name.clone())?);
        ours.push(measure(&fanfare, &plan, &WINDOWS).with_context(|| fanfare.process.name.clone())?);
        batched.push(measure_saturated(&batching, &plan).with_context(|| batching.process.name.clone())?);
    }
    let name = args.text("server").unwrap_or("fanfare");
    print(name, &plan, &cores, &ours, &baselines, &batched);
    eprintln!("\n{:.0} s in all", started.elapsed().as_secs_f64());
    Ok(())
}

fn measure(server: &Server, plan: &Plan, windows: &[u32]) -> Result<Round> {
    let process = &server.process;
    let files = process.open_files()?;
    let mut accepting = Duration::ZERO;
    for _ in 1..JOINS {
        accepting += plan.load(server, "connect, leave")?[0].server_cpu;
        process.wait_for_files(files)?;
    }
    let live = format!("rate {}/s {}", plan.rate, duration(plan.live));
    let timed = format!("rate {}/s {}", plan.latency_rate, duration(plan.live));
    // Saturation and a second of events first: they also warm up the core for the live measurement.
    let phases =
        format!("connect, {}, rate {}/s 1s, {live}, {timed}, leave", plan.saturate(windows), plan.rate);
    let results = plan.load(server, &phases)?;
    process.wait_for_files(files)?;
    accepting += results[0].server_cpu;
    let [_, live, timed, _] = &results[1 + windows.len()..] else { bail!("not four more phases") };
    let round = Round {
        accept: accepting.as_secs_f64() * 1e6 / f64::from(plan.connections * JOINS),
        live: live.server_per_delivery().context("no CPU time")?,
        latencies: [0.5, 0.99].map(|share| timed.percentile(share).unwrap_or_default()),
        saturated: results[1..=windows.len()].iter().map(Saturated::of).collect(),
    };
    let (name, shown) = (&process.name, shown(&round.saturated));
    eprintln!("  {name}: accept {:.1} µs, delivery {:.2} µs, saturated {shown}", round.accept, round.live);
    Ok(round)
}

fn measure_saturated(server: &Server, plan: &Plan) -> Result<Vec<Saturated>> {
    let files = server.process.open_files()?;
    let results = plan.load(server, &format!("connect, {}, leave", plan.saturate(&WINDOWS)))?;
    server.process.wait_for_files(files)?;
    let saturated: Vec<_> = results[1..=WINDOWS.len()].iter().map(Saturated::of).collect();
    eprintln!("  {}: saturated {}", server.process.name, shown(&saturated));
    Ok(saturated)
}

impl Plan {
    fn load(&self, server: &Server, phases: &str) -> Result<Vec<PhaseResult>> {
        let connections = self.connections.to_string();
        support::load(&[server.url()], &["--connections", &connections, "--size", &self.size], phases)
    }

    fn saturate(&self, windows: &[u32]) -> String {
        let phases = windows.iter().map(|window| format!("saturate {window} {}", duration(self.saturated)));
        phases.collect::<Vec<_>>().join(", ")
    }
}

impl Saturated {
    fn of(phase: &PhaseResult) -> Saturated {
        let rate = phase.deliveries_per_second();
        let per_cpu = phase.tally.deliveries as f64 / phase.server_cpu.as_secs_f64();
        // The time of the phase ends before its last events have arrived: `rate` counts them.
        Saturated { rate, per_cpu, share: rate / per_cpu }
    }
}

fn shown(saturated: &[Saturated]) -> String {
    let all = saturated.iter().map(|s| format!("{}/s at {:.0} %", rate(s.rate), s.share * 100.0));
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
    let latency = |micros: f64| shown_latency(micros as u64);
    let rate_shown = plan.latency_rate;
    row(format!("latency p50, {rate_shown} events/s"), &pairs(|round| round.latencies[0] as f64), latency);
    row(format!("latency p99, {rate_shown} events/s"), &pairs(|round| round.latencies[1] as f64), latency);
    for (at, window) in WINDOWS.iter().enumerate() {
        let one: Vec<_> =
            ours.iter().zip(baselines).map(|(o, f)| (o.saturated[at].rate, f.saturated[0].rate)).collect();
        let all: Vec<_> = ours.iter().zip(batched).map(|(o, f)| (o.saturated[at].rate, f[at].rate)).collect();
        let per_second = |value| format!("{}/s", rate(value));
        row(format!("deliveries, {window} events in flight"), &one, per_second);
        row("the same, baseline with batching".into(), &all, per_second);
        let cpu: Vec<_> = ours
            .iter()
            .zip(baselines)
            .map(|(o, f)| (o.saturated[at].per_cpu, f.saturated[0].per_cpu))
            .collect();
        row(format!("deliveries per second of CPU, {window} in flight"), &cpu, rate);
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
