//! A reconnect storm: thousands of clients lose their connections at once and resume with their
//! last id. A thousand others stay, and the latency of their live events is measured before and
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
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use fanfare::auth::token::{Key, verify};
use support::args::Args;
use support::files::allow_files;
use support::load_clients::LoadClients;
use support::process::{Cores, Server};
use support::reconnect_clients::ReconnectClients;
use support::redis::Redis;
use support::report::{self, median, millis, percentile};

const ARGUMENTS: &[(&str, &str)] = &[
    ("cut", "clients that lose their connection and resume [10000]"),
    ("stay", "clients that stay, whose latency is measured [1000]"),
    ("rate", "live events a second [10]"),
    ("seconds", "seconds of live events before each storm [5]"),
    ("rounds", "rounds, alternating between the cases; medians are reported [3]"),
    ("size", "bytes of text in an event [128]"),
    ("case", "only this one: baseline, memory or redis [all]"),
    ("redis-server", "the Redis to start [redis-server]"),
    ("server", "another fanfare binary"),
];

/// Time between the events that disconnected clients miss.
const MISSED: Duration = Duration::from_millis(2);

/// Feeds of about a hundred events, so that the missed events are no longer in memory.
const SMALL: [&str; 4] = ["--buffer-memory", "64KiB", "--max-message-size", "1KiB"];

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
            Case::Memory => "fanfare, 100 events behind, from memory",
            Case::Redis => "fanfare, 500 events behind, from Redis",
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

    fn missed(self) -> u32 {
        match self {
            Case::Baseline | Case::Memory => 100,
            Case::Redis => 500,
        }
    }
}

/// The results of one storm.
struct Storm {
    /// Latencies of live events before the storm, with all clients connected.
    before: Vec<Duration>,
    /// Latencies during the storm.
    meanwhile: Vec<Duration>,
    /// Time until every client had resumed and received what it had missed.
    took: Duration,
    /// The server's CPU time during the storm.
    cpu: Duration,
}

struct Plan {
    cut: usize,
    stay: usize,
    period: Duration,
    before: u32,
    size: usize,
}

fn main() -> Result<()> {
    support::baseline::run_if_asked()?;
    let args = Args::read(ARGUMENTS)?;
    let rate: u32 = args.get("rate", 10)?;
    let seconds: u32 = args.get("seconds", 5)?;
    let rounds: usize = args.get("rounds", 3)?;
    let plan = Plan {
        cut: args.get("cut", 10_000)?,
        stay: args.get("stay", 1000)?,
        period: Duration::from_secs(1) / rate.max(1),
        before: rate * seconds,
        size: args.get("size", 128)?,
    };
    ensure!(
        rate > 0 && seconds > 0 && rounds > 0 && plan.stay > 0,
        "there must be events, rounds and clients"
    );
    allow_files(plan.cut + plan.stay)?;
    let cores = Cores::split()?;
    let started = Instant::now();
    let binary = args.text("server").unwrap_or(env!("CARGO_BIN_EXE_fanfare"));
    let redis = Redis::start(args.text("redis-server").unwrap_or("redis-server"), None)?;

    let chosen = |case: &Case| args.text("case").is_none_or(|only| only == case.word());
    let mut storms: Vec<(Case, Vec<Storm>)> =
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
                Case::Memory => Server::fanfare(binary, Some(&cores), &[], &[])?,
                Case::Redis => {
                    let bus = ["--redis", &redis.url(), "--redis-prefix", &prefix];
                    Server::fanfare(binary, Some(&cores), &[&bus[..], &SMALL].concat(), &[])?
                }
            };
            let storm = plan.storm(case, &server).with_context(|| case.name())?;
            eprintln!(
                "  {}: p99 {} before, {} during; all resumed in {}",
                case.name(),
                millis(percentile(&storm.before, 0.99)),
                millis(percentile(&storm.meanwhile, 0.99)),
                millis(storm.took)
            );
            storms.push(storm);
        }
    }

    println!(
        "\n{} clients resume, {} stay, {rate} live events/s to all, {}-byte texts; one core for the server, the \
         others for the clients and Redis; {}; medians of {rounds} rounds\n",
        plan.cut,
        plan.stay,
        plan.size,
        cores.machine(),
    );
    let rows: Vec<Vec<String>> = storms.iter().map(|(case, storms)| plan.row(*case, storms)).collect();
    let head = ["storm", "live p99 before", "live p99 during", "all resumed after", "server CPU per client"];
    report::table(&head, &rows);
    println!("\nEvery client got all events that it had missed, once and in order.\n");
    report::table(&["verification of a token", "on the shard's thread"], &checks()?);
    eprintln!("\n{:.0} s in all", started.elapsed().as_secs_f64());
    Ok(())
}

impl Plan {
    fn storm(&self, case: Case, server: &Server) -> Result<Storm> {
        let mut stay = LoadClients::new(server.addr, self.size)?;
        stay.grow(self.stay)?;
        let mut cut = ReconnectClients::new("cut", "ws_broadcast")?;
        cut.add(self.cut);
        cut.connect(server.addr, 0..self.cut, "", &mut |_, _, _| Ok(()))?;

        let over = AtomicBool::new(false);
        let before = std::thread::scope(|threads| {
            let reading = threads.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    cut.turn(Duration::from_millis(20), &mut |_, _, _| Ok(()))?;
                }
                Ok::<_, anyhow::Error>(())
            });
            let before = stay.publish_and_time(self.before, self.period);
            over.store(true, Ordering::Relaxed);
            reading.join().expect("it does not panic")?;
            before
        })?;

        // Clients that have not read their last events yet miss them as well.
        let last = cut.lowest().context("no client is connected")? + u64::from(case.missed());
        cut.cut(0..self.cut);
        if case == Case::Baseline {
            cut.forget_positions();
        }
        stay.publish_steadily(case.missed(), MISSED)?;

        over.store(false, Ordering::Relaxed);
        let (start, cpu) = (Instant::now(), server.process.cpu()?);
        let (took, spent, meanwhile) = std::thread::scope(|threads| {
            let coming = threads.spawn(|| {
                let came = cut
                    .connect(server.addr, 0..self.cut, "", &mut |_, _, _| Ok(()))
                    .and_then(|()| cut.wait_beyond(last, &mut |_, _, _| Ok(())));
                over.store(true, Ordering::Relaxed);
                came?;
                let measured = (start.elapsed(), server.process.cpu()? - cpu);
                // Reads the last live events, and notices connections that the server has closed.
                cut.turn(Duration::ZERO, &mut |_, _, _| Ok(()))?;
                Ok::<_, anyhow::Error>(measured)
            });
            let meanwhile = stay.time_while(|_| !over.load(Ordering::Relaxed), self.period);
            let (took, spent) = coming.join().expect("it does not panic")?;
            Ok::<_, anyhow::Error>((took, spent, meanwhile?))
        })?;
        ensure!(cut.away() == 0, "{} connections were closed again", cut.away());
        Ok(Storm { before, meanwhile, took, cpu: spent })
    }

    fn row(&self, case: Case, storms: &[Storm]) -> Vec<String> {
        let middle = |value: &dyn Fn(&Storm) -> Duration| {
            Duration::from_secs_f64(median(
                &storms.iter().map(|storm| value(storm).as_secs_f64()).collect::<Vec<_>>(),
            ))
        };
        vec![
            case.name().to_owned(),
            millis(middle(&|storm| percentile(&storm.before, 0.99))),
            millis(middle(&|storm| percentile(&storm.meanwhile, 0.99))),
            millis(middle(&|storm| storm.took)),
            report::micros(middle(&|storm| storm.cpu).as_secs_f64() * 1e6 / self.cut as f64),
        ]
    }
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
