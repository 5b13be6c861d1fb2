//! A reconnect storm: thousands of clients lose their connections at once, and later resume with
//! their last id. A thousand others stay, and the latency of their live events is measured before and
//! during the storm. What the clients missed is in memory, or has to be read from Redis. The
//! baseline keeps no history: there they join anew.
//!
//! `cargo bench --bench storm`; `--help` lists the arguments. `tests/load/storm.rs` checks that no
//! event is missed and how often Redis is read.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a bench prints its report")]

mod support;
#[path = "../src/auth/token/fixtures.rs"]
#[allow(dead_code, reason = "the tests of tokens use more of them")]
mod tokens;

use std::hint::black_box;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use fanfare::auth::token::{Key, verify};
use fanfare::cli::bench::result::{Storm, shown_latency};
use hdrhistogram::Histogram;
use support::args::Args;
use support::duration;
use support::process::{Cores, Place, Server};
use support::redis::Redis;
use support::report::{self, median};

const ARGUMENTS: &[(&str, &str)] = &[
    ("cut", "clients that lose their connection and resume [10000]"),
    ("stay", "clients that stay, whose latency is measured [1000]"),
    ("rate", "live events a second [10]"),
    ("seconds", "seconds of live events before each storm [5]"),
    ("away", "seconds until they come back; they miss so many times the rate [10]"),
    ("rounds", "rounds, alternating between the cases; medians are reported [3]"),
    ("size", "bytes of text in an event, except from Redis [128]"),
    ("case", "only this one: baseline, memory or redis [all]"),
    ("redis-server", "the Redis to start [redis-server]"),
    ("server", "another fanfare binary"),
];

/// A feed of fewer than a hundred of these events, so that the missed ones are no longer in memory.
const SMALL: [&str; 4] = ["--buffer-memory", "64KiB", "--max-message-size", "1KiB"];
const SMALL_TEXT: &str = "900";

/// The HS256 key.
const SECRET: &str = "0123456789abcdef0123456789abcdef";

/// Verifications of one token that are timed.
const CHECKS: u32 = 2000;

/// What clients resume on.
#[derive(Clone, Copy, PartialEq)]
enum Case {
    Baseline,
    Memory,
    Redis,
}

impl Case {
    const ALL: [Case; 3] = [Case::Baseline, Case::Memory, Case::Redis];

    fn name(self) -> &'static str {
        match self {
            Case::Baseline => "baseline, nothing to recover",
            Case::Memory => "fanfare, from memory",
            Case::Redis => "fanfare, from Redis, 900-byte texts",
        }
    }

    /// The name on the command line.
    fn word(self) -> &'static str {
        match self {
            Case::Baseline => "baseline",
            Case::Memory => "memory",
            Case::Redis => "redis",
        }
    }
}

/// The results of one storm.
struct Measured {
    /// p99 of live events before the storm, with all clients connected, in µs.
    before: u64,
    storm: Storm,
}

struct Plan {
    cut: u32,
    stay: u32,
    rate: f64,
    seconds: f64,
    away: f64,
    size: String,
}

fn main() -> Result<()> {
    support::start()?;
    let args = Args::read(ARGUMENTS)?;
    let rounds: usize = args.get("rounds", 3)?;
    let plan = Plan {
        cut: args.get("cut", 10_000)?,
        stay: args.get("stay", 1000)?,
        rate: args.get("rate", 10.0)?,
        seconds: args.get("seconds", 5.0)?,
        away: args.get("away", 10.0)?,
        size: args.get("size", 128)?.to_string(),
    };
    ensure!(rounds > 0 && plan.cut > 0 && plan.stay > 0, "there must be rounds and clients");
    let cores = Cores::split()?;
    let started = Instant::now();
    let binary = args.text("server").unwrap_or(env!("CARGO_BIN_EXE_fanfare"));
    let redis = Redis::start(args.text("redis-server").unwrap_or("redis-server"), &cores, Place::Clients)?;

    let chosen = |case: &Case| args.text("case").is_none_or(|only| only == case.word());
    let mut storms: Vec<(Case, Vec<Measured>)> =
        Case::ALL.into_iter().filter(chosen).map(|case| (case, Vec::new())).collect();
    ensure!(!storms.is_empty(), "--case is baseline, memory or redis");
    for round in 1..=rounds {
        eprintln!("round {round} of {rounds}, {:.0} s so far", started.elapsed().as_secs_f64());
        for (case, storms) in &mut storms {
            let case = *case;
            // Each round has its own history.
            let prefix = format!("storm{round}");
            let server = match case {
                Case::Baseline => Server::baseline(&cores, false, Duration::ZERO)?,
                Case::Memory => Server::fanfare(binary, &cores, Place::Server, &[])?,
                Case::Redis => {
                    let bus = ["--redis", &redis.url(), "--redis-prefix", &prefix];
                    Server::fanfare(binary, &cores, Place::Server, &[&bus[..], &SMALL].concat())?
                }
            };
            let measured = plan.storm(case, &server).with_context(|| case.name())?;
            eprintln!(
                "  {}: p99 {} before, {} during; all resumed in {:.2} s",
                case.name(),
                shown_latency(measured.before),
                shown_latency(p99(&measured.storm.latencies)),
                measured.storm.time.as_secs_f64()
            );
            storms.push(measured);
        }
    }

    println!(
        "\n{} clients are away for {} s and resume, {} stay, {} live events/s to all, {}-byte texts; one core for \
         the server, the others for the clients and Redis; {}; medians of {rounds} rounds\n",
        plan.cut,
        plan.away,
        plan.stay,
        plan.rate,
        plan.size,
        cores.machine(),
    );
    let rows: Vec<Vec<String>> = storms.iter().map(|(case, storms)| plan.row(*case, storms)).collect();
    let head = ["storm", "live p99 before", "live p99 during", "all resumed after", "server CPU per client"];
    report::table(&[&head[..], &["clients' share of their core"]].concat(), &rows);
    println!("\nEvery client of fanfare got all events that it had missed, once and in order.\n");
    report::table(&["verification of a token", "on the shard's thread"], &checks()?);
    eprintln!("\n{:.0} s in all", started.elapsed().as_secs_f64());
    Ok(())
}

impl Plan {
    fn storm(&self, case: Case, server: &Server) -> Result<Measured> {
        let connections = (self.cut + self.stay).to_string();
        let (rate, size) = (self.rate.to_string(), if case == Case::Redis { SMALL_TEXT } else { &self.size });
        let flags = ["--connections", &connections, "--rate", &rate, "--size", size];
        let share = f64::from(self.cut) / f64::from(self.cut + self.stay) * 100.0;
        let live = format!("rate {rate}/s {}", duration(self.seconds));
        let phases = format!("connect, {live}, storm {share}% {}, leave", duration(self.away));
        let results = support::load(&[server.url()], &flags, &phases)?;
        let storm = results[2].storm.clone().context("no storm")?;
        ensure!(storm.is_over, "clients have not caught up");
        let tally = &results[2].tally;
        ensure!(case == Case::Baseline || tally.notices == 0, "{} clients missed events", tally.notices);
        Ok(Measured { before: p99(&results[1].latencies), storm })
    }

    fn row(&self, case: Case, storms: &[Measured]) -> Vec<String> {
        let middle = |value: fn(&Measured) -> f64| median(&storms.iter().map(value).collect::<Vec<_>>());
        vec![
            case.name().to_owned(),
            shown_latency(middle(|one| one.before as f64) as u64),
            shown_latency(middle(|one| p99(&one.storm.latencies) as f64) as u64),
            format!("{:.2} s", middle(|one| one.storm.time.as_secs_f64())),
            report::micros(middle(|one| one.storm.server_cpu.as_secs_f64()) * 1e6 / f64::from(self.cut)),
            format!("{:.0} %", middle(|one| one.storm.generator) * 100.0),
        ]
    }
}

fn p99(latencies: &Histogram<u64>) -> u64 {
    latencies.value_at_quantile(0.99)
}

/// CPU time of verifying one token, by algorithm.
fn checks() -> Result<Vec<Vec<String>>> {
    use tokens::{ED25519_PEM, EDDSA, ES256, P256_PEM, RS256, RSA_PEM};
    let file = std::env::temp_dir().join(format!("fanfare-bench-{}.key", std::process::id()));
    std::fs::write(&file, SECRET)?;
    let words = ["--user", "alice", "--jwt-key"].map(Into::into);
    let minted =
        fanfare::cli::token::run(words.into_iter().chain([file.clone().into()]), None, std::io::empty());
    std::fs::remove_file(&file)?;
    let minted = minted.map_err(|errors| anyhow::anyhow!("{errors:?}"))?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let kinds = [
        ("HS256", SECRET, minted.text.trim()),
        ("RS256, 2048 bits", RSA_PEM, RS256),
        ("ES256", P256_PEM, ES256),
        ("EdDSA", ED25519_PEM, EDDSA),
    ];
    kinds
        .into_iter()
        .map(|(name, key, token)| {
            let keys = [Key::parse(key.as_bytes()).map_err(anyhow::Error::msg)?];
            let start = Instant::now();
            for _ in 0..CHECKS {
                let grant = verify(black_box(&keys), black_box(token), "alice", now);
                ensure!(black_box(grant).is_ok(), "a valid token was rejected");
            }
            let each = start.elapsed().as_secs_f64() * 1e6 / f64::from(CHECKS);
            Ok(vec![name.to_owned(), report::micros(each)])
        })
        .collect()
}
