//! How cost grows with connections, size, rate, events in flight, shards, nodes, channels and users:
//! one table for each, beside the baseline (`support/baseline.rs`) where it can do the same.
//!
//! `cargo bench --bench scale -- --axis rate`; `--help` lists the arguments.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a bench prints its report")]

mod support;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fanfare::cli::bench::result::{PhaseResult, grouped, mebibytes, rate, shown_latency};
use support::args::Args;
use support::duration;
use support::process::{Cores, Place, Server};
use support::redis::Redis;
use support::report::{micros, table};

const ARGUMENTS: &[(&str, &str)] = &[
    ("axis", "only this one: connections, size, rate, inflight, shards, nodes, channels or users [all]"),
    ("seconds", "seconds of load at each point [4]"),
    ("redis-server", "the Redis to start [redis-server]"),
    ("server", "another fanfare binary"),
    ("quick", "three points of each axis, with a second of load"),
];

/// Connections where they are not the axis.
const CONNECTIONS: u32 = 2000;

/// Deliveries per second at which the cost of a delivery is compared: half of a core.
const DELIVERIES: u32 = 80_000;

/// Bytes per second at most where size is the axis, so that the clients keep up.
const BYTES: u32 = 200 << 20;

/// Deliveries per second that the baseline can't reach. Above this it would only fall behind.
const BASELINE_MAX: u32 = 150_000;

/// Events per second at most that one HTTP connection is asked to publish.
const PUBLISHED_MAX: u32 = 1000;

/// Connections and processes of the server.
const COUNTS: [(u32, u32); 8] =
    [(1000, 1), (2000, 1), (4000, 1), (8000, 1), (12_000, 1), (18_000, 1), (36_000, 2), (54_000, 3)];
const SIZES: [u32; 7] = [18, 128, 512, 2048, 8192, 32_768, 65_536];
const RATES: [u32; 8] = [10, 25, 50, 100, 200, 400, 800, 1600];
const IN_FLIGHT: [u32; 6] = [1, 4, 16, 64, 256, 1024];
const NODES: [u32; 4] = [1, 2, 3, 4];
const GROUPS: [u32; 5] = [1, 10, 100, 1000, 10_000];

/// Connections that are divided among channels or users.
const GROUPED: u32 = 10_000;

struct Scale {
    cores: Cores,
    binary: String,
    redis: String,
    seconds: f64,
    quick: bool,
}

/// What a load showed.
struct Point {
    /// CPU per accepted connection, in µs.
    accept: f64,
    /// Private anonymous memory per connection, of idle ones, in bytes.
    each: f64,
    load: PhaseResult,
}

fn main() -> Result<()> {
    support::start()?;
    let args = Args::read(ARGUMENTS)?;
    let quick = args.text("quick").is_some();
    let scale = Scale {
        cores: Cores::split()?,
        binary: args.text("server").unwrap_or(env!("CARGO_BIN_EXE_fanfare")).to_owned(),
        redis: args.text("redis-server").unwrap_or("redis-server").to_owned(),
        seconds: args.get("seconds", if quick { 1.0 } else { 4.0 })?,
        quick,
    };
    type Axis = (&'static str, fn(&Scale) -> Result<()>);
    let axes: [Axis; 8] = [
        ("connections", Scale::connections),
        ("size", Scale::size),
        ("rate", Scale::rate),
        ("inflight", Scale::in_flight),
        ("shards", Scale::shards),
        ("nodes", Scale::nodes),
        ("channels", Scale::channels),
        ("users", Scale::users),
    ];
    let chosen = |(name, _): &&Axis| args.text("axis").is_none_or(|only| only == *name);
    let chosen: Vec<&Axis> = axes.iter().filter(chosen).collect();
    ensure!(!chosen.is_empty(), "no axis is called that: see --help");
    println!("{}; {} s of load at each point", scale.cores.machine(), scale.seconds);
    for (name, run) in chosen {
        let started = Instant::now();
        run(&scale).with_context(|| format!("axis {name}"))?;
        eprintln!("{name}: {:.0} s", started.elapsed().as_secs_f64());
    }
    println!(
        "\nEvery delivery arrived, once and in order. `*`: the clients were the limit, the server may do better."
    );
    Ok(())
}

impl Scale {
    fn fanfare(&self, place: Place, flags: &[&str]) -> Result<Server> {
        Server::fanfare(&self.binary, &self.cores, place, flags)
    }

    fn baseline(&self, batch: bool) -> Result<Server> {
        Server::baseline(&self.cores, batch, Duration::ZERO)
    }

    /// First, middle and last values if it must be quick.
    fn chosen<T: Copy>(&self, values: &[T]) -> Vec<T> {
        match self.quick {
            true => vec![values[0], values[values.len() / 2], values[values.len() - 1]],
            false => values.to_vec(),
        }
    }

    fn rate_phase(&self, rate: f64) -> String {
        format!("rate {rate}/s {}", duration(self.seconds))
    }

    /// Puts this load on servers.
    fn measure(&self, servers: &[&Server], connections: u32, flags: &[&str], phase: &str) -> Result<Point> {
        let urls: Vec<String> = servers.iter().map(|server| server.url()).collect();
        self.measure_urls(servers, &urls, connections, flags, phase)
    }

    fn measure_urls(
        &self,
        servers: &[&Server],
        urls: &[String],
        connections: u32,
        flags: &[&str],
        phase: &str,
    ) -> Result<Point> {
        let before: u64 = servers.iter().map(|server| server.process.usage().anonymous).sum();
        let count = connections.to_string();
        let flags = [&["--connections", &count], flags].concat();
        let results = support::load(urls, &flags, &format!("connect, idle 1s, {phase}, leave"))?;
        let [connect, idle, load, _] = &results[..] else { unreachable!("these are the phases") };
        eprintln!("  {} clients, {phase}: {} deliveries/s", idle.clients, rate(load.deliveries_per_second()));
        Ok(Point {
            accept: connect.server_cpu.as_secs_f64() * 1e6 / f64::from(connect.clients),
            each: idle.usage.anonymous.saturating_sub(before) as f64 / f64::from(idle.clients),
            load: load.clone(),
        })
    }

    fn connections(&self) -> Result<()> {
        let mut rows = Vec::new();
        for (connections, processes) in self.chosen(&COUNTS) {
            let phase = self.rate_phase(f64::from(DELIVERIES) / f64::from(connections));
            let redis = (processes > 1).then(|| Redis::start(&self.redis, &self.cores, Place::Clients));
            let url = redis.transpose()?.map(|redis| (redis.url(), redis));
            let flags = url.as_ref().map_or(vec![], |(url, _)| vec!["--redis", url]);
            let servers: Vec<Server> =
                (0..processes).map(|_| self.fanfare(Place::Server, &flags)).collect::<Result<_>>()?;
            let ours = self.measure(&servers.iter().collect::<Vec<_>>(), connections, &[], &phase)?;
            drop(servers);
            let mut row = vec![grouped(connections.into()), processes.to_string()];
            row.extend([micros(ours.accept), format!("{:.0} B", ours.each), ours.p99()]);
            row.extend(match processes {
                1 => ours.beside(&self.measure(&[&self.baseline(false)?], connections, &[], &phase)?),
                _ => ours.alone(),
            });
            rows.push(row);
        }
        println!(
            "\n## Connections\n\n{} deliveries/s, 128-byte texts. Several processes share the core, and a Redis \
             beside the clients.\n",
            grouped(DELIVERIES.into())
        );
        let head = ["connections", "processes", "CPU per accept", "memory each", "p99"];
        table(&[&head[..], &BESIDE].concat(), &rows);
        Ok(())
    }

    fn size(&self) -> Result<()> {
        let mut rows = Vec::new();
        for size in self.chosen(&SIZES) {
            let deliveries = DELIVERIES.min(BYTES / size);
            let phase = self.rate_phase(f64::from(deliveries) / f64::from(CONNECTIONS));
            let text = size.to_string();
            let flags = ["--size", &text];
            let fanfare = self.fanfare(Place::Server, &["--max-message-size", "128KiB"])?;
            let ours = self.measure(&[&fanfare], CONNECTIONS, &flags, &phase)?;
            drop(fanfare);
            let baseline = self.measure(&[&self.baseline(false)?], CONNECTIONS, &flags, &phase)?;
            let mut row = vec![grouped(size.into()), rate(ours.load.deliveries_per_second()), ours.p99()];
            row.push(mebibytes(ours.load.usage.anonymous));
            row.extend(ours.beside(&baseline));
            rows.push(row);
        }
        println!("\n## Size of events\n\n{} connections.\n", grouped(CONNECTIONS.into()));
        let head = ["bytes of text", "deliveries/s", "p99", "memory"];
        table(&[&head[..], &BESIDE].concat(), &rows);
        Ok(())
    }

    fn rate(&self) -> Result<()> {
        let (fanfare, baseline) = (self.fanfare(Place::Server, &[])?, self.baseline(false)?);
        let mut rows = Vec::new();
        for events in self.chosen(&RATES) {
            let phase = self.rate_phase(events.into());
            let ours = self.measure(&[&fanfare], CONNECTIONS, &[], &phase)?;
            let mut row = vec![grouped(events.into()), rate(ours.load.deliveries_per_second())];
            row.extend([ours.percentile(0.5), ours.p99(), ours.share()]);
            row.extend(match events * CONNECTIONS <= BASELINE_MAX {
                true => ours.beside(&self.measure(&[&baseline], CONNECTIONS, &[], &phase)?),
                false => ours.alone(),
            });
            rows.push(row);
        }
        println!(
            "\n## Rate\n\n{} connections, 128-byte texts. The baseline is left out where it can't follow.\n",
            grouped(CONNECTIONS.into())
        );
        let head = ["events/s", "deliveries/s", "p50", "p99", "share of the core"];
        table(&[&head[..], &BESIDE].concat(), &rows);
        Ok(())
    }

    fn in_flight(&self) -> Result<()> {
        let servers = [self.fanfare(Place::Server, &[])?, self.baseline(false)?, self.baseline(true)?];
        let mut rows = Vec::new();
        for events in self.chosen(&IN_FLIGHT) {
            let phase = format!("saturate {events} {}", duration(self.seconds));
            let point = |server: &Server| self.measure(&[server], CONNECTIONS, &[], &phase);
            let [ours, one, all] = [point(&servers[0])?, point(&servers[1])?, point(&servers[2])?];
            let mut row = vec![grouped(events.into())];
            row.extend([&ours, &one, &all].map(Point::rate));
            row.push(format!("{:.1}", ours.load.deliveries_per_second() / one.load.deliveries_per_second()));
            row.extend([ours.cpu(), ours.p99(), mebibytes(ours.load.usage.anonymous)]);
            rows.push(row);
        }
        println!("\n## Events in flight\n\n{} connections, 128-byte texts.\n", grouped(CONNECTIONS.into()));
        let head = ["in flight", "deliveries/s", "baseline", "baseline, batching", "ratio to the baseline"];
        table(&[&head[..], &["CPU per delivery", "p99", "memory"]].concat(), &rows);
        Ok(())
    }

    fn shards(&self) -> Result<()> {
        let mut rows = Vec::new();
        for shards in 1..=self.cores.count() {
            let text = shards.to_string();
            let fanfare = self.fanfare(Place::All, &["--shards", &text])?;
            let phase = self.rate_phase(f64::from(DELIVERIES) / f64::from(CONNECTIONS));
            let live = self.measure(&[&fanfare], CONNECTIONS, &[], &phase)?;
            let phase = format!("saturate 64 {}", duration(self.seconds));
            let saturated = self.measure(&[&fanfare], CONNECTIONS, &[], &phase)?;
            let mut row = vec![text, live.cpu(), live.p99(), format!("{:.0} B", live.each)];
            row.extend([saturated.rate(), saturated.cpu(), saturated.share()]);
            rows.push(row);
        }
        println!(
            "\n## Shards\n\n{} connections, 128-byte texts; the server and the clients share all cores.\n",
            grouped(CONNECTIONS.into())
        );
        let head = ["shards", "CPU per delivery", "p99", "memory each", "deliveries/s, 64 in flight"];
        table(&[&head[..], &["CPU per delivery", "share of a core"]].concat(), &rows);
        Ok(())
    }

    fn nodes(&self) -> Result<()> {
        let mut rows = Vec::new();
        for nodes in self.chosen(&NODES) {
            let redis = Redis::start(&self.redis, &self.cores, Place::Clients)?;
            let servers: Vec<Server> = (0..nodes)
                .map(|_| self.fanfare(Place::Server, &["--redis", &redis.url()]))
                .collect::<Result<_>>()?;
            let servers: Vec<&Server> = servers.iter().collect();
            let phase = self.rate_phase(f64::from(DELIVERIES) / f64::from(CONNECTIONS));
            let live = self.measure(&servers, CONNECTIONS, &[], &phase)?;
            let before = redis.process.usage().cpu;
            let phase = format!("saturate 64 {}", duration(self.seconds));
            let saturated = self.measure(&servers, CONNECTIONS, &[], &phase)?;
            let spent = (redis.process.usage().cpu - before) as f64 / 1e3;
            let memory = mebibytes(live.load.usage.anonymous);
            let mut row = vec![nodes.to_string(), live.cpu(), live.p99(), memory, saturated.rate()];
            row.extend([saturated.cpu(), micros(spent / f64::from(saturated.load.published))]);
            rows.push(row);
        }
        println!(
            "\n## Nodes on one Redis\n\n{} connections in all, 128-byte texts; the nodes share a core, the clients \
             and Redis the others.\n",
            grouped(CONNECTIONS.into())
        );
        let head = ["nodes", "CPU per delivery", "p99", "memory of all", "deliveries/s, 64 in flight"];
        table(&[&head[..], &["CPU per delivery", "Redis CPU per event"]].concat(), &rows);
        Ok(())
    }

    fn channels(&self) -> Result<()> {
        println!("\n## Channels\n\n{} connections, divided among them.\n", grouped(GROUPED.into()));
        self.groups("channels", "{i}?channel=c{channel}", "channel=c{channel}")
    }

    fn users(&self) -> Result<()> {
        println!(
            "\n## Users\n\n{} connections in one channel, divided among users. Each event is for one user (`to`).\n",
            grouped(GROUPED.into())
        );
        self.groups("users", "{channel}", "to={channel}")
    }

    /// Events go to one group of clients after another.
    fn groups(&self, what: &str, path: &str, query: &str) -> Result<()> {
        let mut rows = Vec::new();
        for groups in self.chosen(&GROUPS) {
            let fanfare = self.fanfare(Place::Server, &[])?;
            let admin = fanfare.admin.context("no admin listener")?;
            let events = (DELIVERIES / 2 / (GROUPED / groups)).clamp(1, PUBLISHED_MAX);
            let (urls, count) = ([format!("ws://{}/ws/{path}", fanfare.addr)], groups.to_string());
            let publish = format!("http://{admin}/publish?{query}");
            let flags = ["--channels", &count, "--publish", &publish];
            let phase = self.rate_phase(events.into());
            let point = self.measure_urls(&[&fanfare], &urls, GROUPED, &flags, &phase)?;
            let mut row = vec![grouped(groups.into()), grouped((GROUPED / groups).into())];
            let per_event = point.load.server_cpu.as_secs_f64() * 1e6 / f64::from(point.load.published);
            row.extend([rate(f64::from(events)), rate(point.load.deliveries_per_second()), point.cpu()]);
            row.extend([micros(per_event), point.p99(), format!("{:.0} B", point.each)]);
            rows.push(row);
        }
        let head =
            [what, "connections each", "events/s", "deliveries/s", "CPU per delivery", "CPU per event"];
        table(&[&head[..], &["p99", "memory per connection"]].concat(), &rows);
        Ok(())
    }
}

/// Columns of [`Point::beside`].
const BESIDE: [&str; 3] = ["CPU per delivery", "baseline", "ratio"];

impl Point {
    fn cost(&self) -> f64 {
        self.load.server_per_delivery().unwrap_or(f64::NAN)
    }

    fn cpu(&self) -> String {
        micros(self.cost())
    }

    /// The cost beside that of the baseline, and their ratio.
    fn beside(&self, baseline: &Point) -> [String; 3] {
        [self.cpu(), baseline.cpu(), format!("{:.2}", self.cost() / baseline.cost())]
    }

    fn alone(&self) -> [String; 3] {
        [self.cpu(), "–".into(), "–".into()]
    }

    fn percentile(&self, share: f64) -> String {
        self.load.percentile(share).map_or("–".into(), shown_latency)
    }

    fn p99(&self) -> String {
        self.percentile(0.99)
    }

    fn rate(&self) -> String {
        let mark = if self.load.is_void() { "*" } else { "" };
        format!("{}{mark}", rate(self.load.deliveries_per_second()))
    }

    /// The server's share of a core.
    fn share(&self) -> String {
        format!("{:.0} %", self.load.server_cpu.as_secs_f64() / self.load.time.as_secs_f64() * 100.0)
    }
}
