//! The table as Prometheus text (`/metrics`) and as JSON (`/stats`).

use std::fmt::{Display, Write};

use serde_json::{Map, Value, json};

use super::Metrics;
use super::process::Process;
use super::table::{Family, Kind, Read, TABLE, View};

impl Kind {
    fn text(self) -> &'static str {
        match self {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        }
    }
}

/// A sample: name, labels with their braces, value.
fn sample(out: &mut String, name: impl Display, labels: impl Display, value: impl Display) {
    let _ = writeln!(out, "{name}{labels} {value}");
}

impl Family {
    /// Prometheus text format 0.0.4. A family whose number is unavailable is left out.
    fn write_text(&self, view: &View<'_>, out: &mut String) {
        let Family { name, kind, help, read } = self;
        let head = out.len();
        let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {}", kind.text());
        match read {
            Read::One(read) => match read(view) {
                Value::Null => out.truncate(head),
                value => sample(out, name, "", value),
            },
            Read::Shards(_, read) => {
                for (shard, shard_metrics) in view.metrics.shards.iter().enumerate() {
                    sample(out, name, format_args!(r#"{{shard="{shard}"}}"#), read(shard_metrics));
                }
            }
            Read::Labels(label, read) => {
                for (value, count) in read(view) {
                    sample(out, name, format_args!(r#"{{{label}="{value}"}}"#), count);
                }
            }
            Read::Times(read) => {
                let times = read(view);
                for (bound, count) in times.buckets() {
                    sample(out, format_args!("{name}_bucket"), format_args!(r#"{{le="{bound}"}}"#), count);
                }
                sample(out, format_args!("{name}_sum"), "", times.seconds());
                sample(out, format_args!("{name}_count"), "", times.count());
            }
        }
    }

    /// The name in JSON: without `fanfare_` and `_total`.
    fn key(&self) -> &'static str {
        let name = self.name.strip_prefix("fanfare_").unwrap_or(self.name);
        name.strip_suffix("_total").unwrap_or(name)
    }

    fn json(&self, view: &View<'_>) -> Value {
        match &self.read {
            Read::One(read) => read(view),
            Read::Shards(fold, read) => fold.of(view.metrics.shards.iter().map(read)).into(),
            Read::Labels(_, read) => {
                object(read(view).into_iter().map(|(value, count)| (value, count.into())))
            }
            Read::Times(read) => {
                let times = read(view);
                let buckets: Map<_, _> =
                    times.buckets().map(|(bound, count)| (bound, count.into())).collect();
                json!({"count": times.count(), "sum": times.seconds(), "buckets": buckets})
            }
        }
    }
}

fn object<'a>(members: impl Iterator<Item = (&'a str, Value)>) -> Value {
    members.map(|(name, value)| (name.to_owned(), value)).collect::<Map<_, _>>().into()
}

impl Metrics {
    fn view(&self) -> View<'_> {
        View { metrics: self, process: Process::read() }
    }

    /// All metrics in Prometheus' text format. Reads `/proc`: see `Process::read` for where to call
    /// it.
    pub fn prometheus(&self) -> String {
        let view = self.view();
        let mut out = String::with_capacity(16 * 1024);
        for family in TABLE {
            family.write_text(&view, &mut out);
        }
        out
    }

    /// All metrics as one JSON object: those of the node, then of each shard. Reads `/proc` as
    /// [`Metrics::prometheus`] does.
    pub fn stats_json(&self) -> String {
        let view = self.view();
        let reason = self.readiness.not_ready_reason();
        let mut stats = json!({
            "version": env!("CARGO_PKG_VERSION"),
            // In milliseconds, so that rates between two answers are exact.
            "uptime_seconds": self.started.elapsed().as_millis() as f64 / 1e3,
            "ready": reason.is_none(),
            "not_ready_reason": reason,
            "bus_server": self.bus.server(),
        });
        // These two are above, in another form.
        for family in TABLE.iter().filter(|family| !matches!(family.key(), "build_info" | "ready")) {
            stats[family.key()] = family.json(&view);
        }
        let of_shard = |shard| {
            object(TABLE.iter().filter_map(|family| match family.read {
                Read::Shards(_, read) => Some((family.key(), read(shard).into())),
                _ => None,
            }))
        };
        stats["shards"] = self.shards.iter().map(of_shard).collect();
        stats.to_string()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;
    use crate::metrics::Readiness;

    fn metrics() -> Metrics {
        let metrics =
            Metrics::new(2, Arc::default(), Arc::new(Readiness::waiting_for_bus("starting".into())));
        metrics.shards[0].accepted.add(3);
        metrics.shards[1].accepted.add(4);
        metrics.shards[0].feed_bytes.set(30);
        metrics.shards[1].feed_bytes.set(40);
        metrics.shards[0].closed_by_reason[1].add(5);
        metrics.shards[1].closed_by_reason[1].add(6);
        metrics.shards[0].count_rejection(431);
        metrics.shards[1].count_rejection(599);
        metrics.shards[1].fanout_times.observe(Duration::from_millis(3));
        metrics.bus.round_trips.observe(Duration::from_micros(1500));
        metrics
    }

    fn is_name(name: &str) -> bool {
        let allowed = |c: char| c.is_ascii_alphanumeric() || c == '_';
        name.starts_with(|c: char| c.is_ascii_lowercase()) && name.chars().all(allowed)
    }

    #[test]
    fn renders_prometheus_exposition_format() {
        let text = metrics().prometheus();
        assert!(text.ends_with('\n'));
        let mut kinds = HashMap::new();
        let mut samples = HashSet::new();
        let mut family = String::new();
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, help) = rest.split_once(' ').unwrap();
                family = name.into();
                assert!(is_name(name) && help.ends_with('.') && !help.contains('\\'), "{line}");
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').unwrap();
                assert!(name == family && matches!(kind, "counter" | "gauge" | "histogram"), "{line}");
                assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
                assert_eq!(kinds.insert(name.to_owned(), kind), None, "a family twice: {line}");
            } else {
                let (series, value) = line.rsplit_once(' ').unwrap();
                let (name, labels) = series.split_once('{').unwrap_or((series, ""));
                let rest = name.strip_prefix(family.as_str()).unwrap_or_else(|| panic!("outside: {line}"));
                let parts: &[&str] =
                    if kinds[&family] == "histogram" { &["_bucket", "_sum", "_count"] } else { &[""] };
                assert!(parts.contains(&rest), "{line}");
                if !labels.is_empty() {
                    let (label, quoted) = labels.strip_suffix('}').unwrap().split_once('=').unwrap();
                    let value = quoted.strip_prefix('"').unwrap().strip_suffix('"').unwrap();
                    assert!(is_name(label) && !value.contains(['"', '\\']), "{line}");
                }
                assert!(value.parse::<f64>().unwrap() >= 0.0, "{line}");
                assert!(samples.insert(series.to_owned()), "a sample twice: {line}");
            }
        }
        assert_eq!(kinds.len(), TABLE.len());
        for line in [
            "fanfare_connections{shard=\"1\"} 4",
            "fanfare_connections_closed_total{reason=\"connection_lost\"} 11",
            "fanfare_http_rejections_total{status=\"431\"} 1",
            "fanfare_http_rejections_total{status=\"other\"} 1",
            "fanfare_http_rejections_total{status=\"503\"} 0",
            "fanfare_publish_errors_total{code=\"forbidden\"} 0",
            "fanfare_fanout_duration_seconds_bucket{le=\"0.0025\"} 0",
            "fanfare_fanout_duration_seconds_bucket{le=\"0.005\"} 1",
            "fanfare_fanout_duration_seconds_bucket{le=\"+Inf\"} 1",
            "fanfare_bus_round_trip_seconds_sum 0.0015",
            "fanfare_ready 0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is missing");
        }
    }

    #[test]
    fn stats_have_the_same_numbers() {
        let metrics = metrics();
        let stats: Value = serde_json::from_str(&metrics.stats_json()).unwrap();
        assert_eq!(stats["connections"], 7);
        assert_eq!((&stats["buffer_bytes"], &stats["shards"][0]["buffer_bytes"]), (&json!(40), &json!(30)));
        assert_eq!(stats["shards"][0]["connections"], 3);
        assert_eq!(stats["connections_closed"]["connection_lost"], 11);
        assert_eq!(stats["http_rejections"]["431"], 1);
        assert_eq!(stats["bus_round_trip_seconds"]["sum"], 0.0015);
        assert_eq!(stats["bus_round_trip_seconds"]["buckets"]["0.0025"], 1);
        assert_eq!((&stats["ready"], &stats["not_ready_reason"]), (&json!(false), &json!("starting")));
        for family in TABLE {
            assert!(stats.get(family.key()).is_some() || family.key() == "build_info", "{}", family.name);
        }
        assert_eq!(stats["bus_server"], Value::Null);
        metrics.readiness.set_bus(None);
        metrics.bus.set_server(Some("Valkey 9.1.2".into()));
        let stats: Value = serde_json::from_str(&metrics.stats_json()).unwrap();
        assert_eq!((&stats["ready"], &stats["not_ready_reason"]), (&json!(true), &Value::Null));
        assert_eq!(stats["bus_server"], "Valkey 9.1.2");
    }
}
