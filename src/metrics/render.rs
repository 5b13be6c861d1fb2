//! The numbers as Prometheus text and as JSON. One table for both: what is counted appears in both.

use std::fmt::{Display, Write};
use std::time::UNIX_EPOCH;

use serde_json::{Map, Value, json};

use super::process::Process;
use super::{BusNumbers, Metrics, Number, ShardNumbers};
use crate::close::LABELS;
use crate::guard::Full;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Counter,
    Gauge,
    /// A gauge kept in microseconds, shown in seconds, Prometheus' unit of time.
    Micros,
}

use Kind::{Counter, Gauge, Micros};

/// One number of `T`. Its Prometheus name is `fanfare_`, the name here, and `_total` for a counter.
struct Series<T> {
    name: &'static str,
    kind: Kind,
    help: &'static str,
    read: fn(&T) -> u64,
}

const fn series<T>(name: &'static str, kind: Kind, help: &'static str, read: fn(&T) -> u64) -> Series<T> {
    Series { name, kind, help, read }
}

static SHARD: [Series<ShardNumbers>; 10] = [
    series("connections", Gauge, "Open connections, those still in their handshake among them.", |shard| {
        shard.load()
    }),
    series("joins", Counter, "Connections upgraded.", |shard| shard.joins.get()),
    series("delivered", Counter, "Events written to sockets.", |shard| shard.delivered.get()),
    series("sent_bytes", Counter, "Bytes written to sockets.", |shard| shard.bytes_sent.get()),
    series("passes", Counter, "Fan-out passes.", |shard| shard.passes.get()),
    series("messages", Counter, "Messages taken from clients.", |shard| shard.messages.get()),
    series("resets", Counter, "Times a client was told that events may be missing.", |shard| {
        shard.resets.get()
    }),
    series("refused", Counter, "Upgrade requests that got another answer.", |shard| shard.refused.get()),
    series("slow_connections", Gauge, "Connections behind because their socket is full.", |shard| {
        shard.slow.get()
    }),
    series(
        "feed_bytes",
        Gauge,
        "Recent events in memory; shards share the bytes, so take the maximum.",
        |shard| shard.feed_bytes.get(),
    ),
];

static BUS: [Series<BusNumbers>; 10] = [
    series("bus_events", Counter, "Events handed to the shards.", |bus| bus.events.get()),
    series("bus_published", Counter, "Events this node published.", |bus| bus.published.get()),
    series("bus_refused", Counter, "Events refused: certainly not published.", |bus| bus.refused.get()),
    series("bus_unknown", Counter, "Events whose publication was never confirmed.", |bus| bus.unknown.get()),
    series("bus_holes", Counter, "Holes filled from history.", |bus| bus.holes.get()),
    series("bus_resets", Counter, "Times events of a channel may have been lost.", |bus| bus.resets.get()),
    series("bus_reads", Counter, "Pages of history read.", |bus| bus.reads.get()),
    series("bus_channels", Gauge, "Channels followed.", |bus| bus.channels.get()),
    series("bus_round_trip_seconds", Micros, "The last canary's way through the bus.", |bus| {
        bus.round_trip_micros.get()
    }),
    series("bus_canary_seconds", Gauge, "Time within which every channel is compared with the bus.", |bus| {
        bus.canary_seconds.get()
    }),
];

impl<T> Series<T> {
    fn begin(&self, out: &mut Text) {
        out.family(&self.full_name(), if self.kind == Counter { "counter" } else { "gauge" }, self.help);
    }

    fn full_name(&self) -> String {
        format!("fanfare_{}{}", self.name, if self.kind == Counter { "_total" } else { "" })
    }

    fn value(&self, of: &T) -> Value {
        match self.kind {
            Counter | Gauge => (self.read)(of).into(),
            Micros => ((self.read)(of) as f64 / 1e6).into(),
        }
    }

    fn sample(&self, out: &mut Text, labels: &str, of: &T) {
        out.sample(&self.full_name(), labels, self.value(of));
    }
}

/// Prometheus text format 0.0.4.
struct Text(String);

impl Text {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &str, value: impl Display) {
        let _ = writeln!(self.0, "{name}{labels} {value}");
    }

    fn single(&mut self, name: &str, kind: &str, help: &str, value: Option<impl Display>) {
        if let Some(value) = value {
            self.family(name, kind, help);
            self.sample(name, "", value);
        }
    }
}

impl Metrics {
    /// All numbers in Prometheus' text format. Reads `/proc`: see `Process::read` for where to call it.
    pub fn prometheus(&self) -> String {
        let mut out = Text(String::with_capacity(8 * 1024));
        out.family("fanfare_build_info", "gauge", "Which fanfare this is.");
        out.sample("fanfare_build_info", concat!(r#"{version=""#, env!("CARGO_PKG_VERSION"), r#""}"#), 1);
        let ready = u8::from(self.readiness.trouble().is_none());
        out.single("fanfare_ready", "gauge", "1 while this node takes clients.", Some(ready));
        for series in &SHARD {
            series.begin(&mut out);
            for (id, shard) in self.shards.iter().enumerate() {
                series.sample(&mut out, &format!(r#"{{shard="{id}"}}"#), shard);
            }
        }
        out.family("fanfare_ends_total", "counter", "Connections ended, by reason.");
        for (reason, count) in self.ends() {
            out.sample("fanfare_ends_total", &format!(r#"{{reason="{reason}"}}"#), count);
        }
        let failures = self.accept_failures.get();
        let most = self.max_connections.get();
        out.single("fanfare_max_connections", "gauge", "Most connections that this node takes.", Some(most));
        let help = "Connections not taken, for want of descriptors or memory.";
        out.single("fanfare_accept_failures_total", "counter", help, Some(failures));
        let help = "Connections answered at once, there being too many that wait for an answer, by reason.";
        out.family("fanfare_turned_away_total", "counter", help);
        for full in [Full::Node, Full::Address] {
            let (reason, count) = (full.reason().label(), self.turned_away[full as usize].get());
            out.sample("fanfare_turned_away_total", &format!(r#"{{reason="{reason}"}}"#), count);
        }
        let help = "Requests to the admin listener without the right key.";
        out.single("fanfare_admin_refused_total", "counter", help, Some(self.admin_refused.get()));
        for series in &BUS {
            series.begin(&mut out);
            series.sample(&mut out, "", &self.bus);
        }
        let process = Process::read();
        let start = self.started_at.duration_since(UNIX_EPOCH).ok().map(|since| since.as_secs_f64());
        out.single("process_start_time_seconds", "gauge", "Start time, Unix epoch.", start);
        let resident = process.resident_bytes;
        out.single("process_resident_memory_bytes", "gauge", "Resident memory.", resident);
        let cpu = process.cpu_seconds;
        out.single("process_cpu_seconds_total", "counter", "User and system time of all threads.", cpu);
        out.single("process_open_fds", "gauge", "Open file descriptors.", process.open_fds);
        out.single("process_max_fds", "gauge", "Most file descriptors allowed.", process.max_fds);
        out.0
    }

    /// The same as one JSON object: totals, then each shard. Reads `/proc` as [`Metrics::prometheus`] does.
    pub fn stats_json(&self) -> String {
        let process = Process::read();
        let trouble = self.readiness.trouble();
        let object = |members: Vec<(&str, Value)>| -> Value {
            members.into_iter().map(|(name, value)| (name.to_owned(), value)).collect::<Map<_, _>>().into()
        };
        let shard = |shard: &ShardNumbers| object(SHARD.iter().map(|s| (s.name, s.value(shard))).collect());
        let bus = |s: &Series<BusNumbers>| (s.name.trim_start_matches("bus_"), s.value(&self.bus));
        let total = |read: fn(&ShardNumbers) -> u64| self.shards.iter().map(read).sum::<u64>();
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "uptime_seconds": self.started.elapsed().as_secs(),
            "ready": trouble.is_none(),
            "trouble": trouble,
            "connections": total(|shard| shard.load()),
            "delivered": total(|shard| shard.delivered.get()),
            "max_connections": self.max_connections.get(),
            "accept_failures": self.accept_failures.get(),
            "turned_away": self.turned_away.iter().map(Number::get).sum::<u64>(),
            "admin_refused": self.admin_refused.get(),
            "bus": object(BUS.iter().map(bus).collect()),
            "ends": object(self.ends().map(|(reason, count)| (reason, count.into())).collect()),
            "shards": self.shards.iter().map(shard).collect::<Vec<_>>(),
            "process": {
                "resident_memory_bytes": process.resident_bytes,
                "cpu_seconds": process.cpu_seconds,
                "open_fds": process.open_fds,
                "max_fds": process.max_fds,
            },
        })
        .to_string()
    }

    /// Ends by reason, all shards together.
    fn ends(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        let count = |reason: usize| self.shards.iter().map(|shard| shard.ends[reason].get()).sum();
        LABELS.iter().enumerate().map(move |(reason, label)| (*label, count(reason)))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};
    use std::sync::Arc;

    use super::*;
    use crate::metrics::Readiness;

    fn metrics() -> Metrics {
        let metrics = Metrics::new(2, Arc::default(), Arc::new(Readiness::waiting_for_bus()));
        metrics.shards[0].accepted.set(3);
        metrics.shards[1].accepted.set(4);
        metrics.shards[0].ends[1].add(5);
        metrics.shards[1].ends[1].add(6);
        metrics.bus.round_trip_micros.set(1500);
        metrics
    }

    fn is_name(name: &str) -> bool {
        let allowed = |c: char| c.is_ascii_alphanumeric() || c == '_';
        name.starts_with(|c: char| c.is_ascii_lowercase()) && name.chars().all(allowed)
    }

    #[test]
    fn the_text_is_prometheus_exposition_format() {
        let text = metrics().prometheus();
        assert!(text.ends_with('\n'));
        let mut kinds = HashMap::new();
        let mut samples = HashSet::new();
        let mut family = String::new();
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, help) = rest.split_once(' ').unwrap();
                family = name.into();
                assert!(is_name(name) && !help.is_empty() && !help.contains('\\'), "{line}");
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').unwrap();
                assert!(name == family && matches!(kind, "counter" | "gauge"), "{line}");
                assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
                assert_eq!(kinds.insert(name.to_owned(), kind), None, "a family twice: {line}");
            } else {
                let (series, value) = line.rsplit_once(' ').unwrap();
                let (name, labels) = series.split_once('{').unwrap_or((series, ""));
                assert!(name == family && kinds.contains_key(name), "a sample outside its family: {line}");
                if !labels.is_empty() {
                    let (label, quoted) = labels.strip_suffix('}').unwrap().split_once('=').unwrap();
                    let value = quoted.strip_prefix('"').unwrap().strip_suffix('"').unwrap();
                    assert!(is_name(label) && !value.contains(['"', '\\']), "{line}");
                }
                assert!(value.parse::<f64>().unwrap() >= 0.0, "{line}");
                assert!(samples.insert(series.to_owned()), "a sample twice: {line}");
            }
        }
        assert_eq!(kinds.len(), 1 + 1 + SHARD.len() + 5 + BUS.len() + 5);
        for line in [
            "fanfare_connections{shard=\"1\"} 4",
            "fanfare_ends_total{reason=\"peer_gone\"} 11",
            "fanfare_bus_round_trip_seconds 0.0015",
            "fanfare_ready 0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is missing");
        }
    }

    #[test]
    fn the_stats_are_json_with_the_same_numbers() {
        let metrics = metrics();
        let stats: Value = serde_json::from_str(&metrics.stats_json()).unwrap();
        assert_eq!(stats["connections"], 7);
        assert_eq!(stats["shards"][0]["connections"], 3);
        assert_eq!(stats["ends"]["peer_gone"], 11);
        assert_eq!(stats["bus"]["round_trip_seconds"], 0.0015);
        assert_eq!(
            (&stats["ready"], &stats["trouble"]),
            (&json!(false), &json!("the bus has not answered yet"))
        );
        metrics.readiness.set_bus(None);
        let stats: Value = serde_json::from_str(&metrics.stats_json()).unwrap();
        assert_eq!((&stats["ready"], &stats["trouble"]), (&json!(true), &Value::Null));
    }
}
