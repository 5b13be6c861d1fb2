//! The results of a run, as a table and as JSON.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde_json::{Value, json};

use super::server::Usage;
use super::shared::Tally;

/// From this share of its time on that a generator process was busy or waited for a core, its
/// figures are void: the generator may have been what limited them.
pub const SATURATED: f64 = 0.9;

/// One second of a run.
#[derive(Clone, Copy, Debug)]
pub struct Second {
    /// Seconds since the run started.
    pub at: f64,
    pub clients: u32,
    /// Deliveries in this second.
    pub deliveries: u64,
    /// Latencies in microseconds; 0 without deliveries.
    pub p50: u64,
    pub p99: u64,
}

/// What a phase showed.
#[derive(Clone, Debug)]
pub struct PhaseResult {
    pub name: String,
    /// The part with load, without waiting for the last events.
    pub time: Duration,
    /// The part in which clients reconnect.
    pub storm: Option<Storm>,
    /// Clients at its end.
    pub clients: u32,
    pub published: u32,
    /// Counts of this phase.
    pub tally: Tally,
    /// Deliveries in `time`.
    pub deliveries: u64,
    /// Events that had not arrived when nothing had for ten seconds.
    pub missing: u64,
    /// Clients that were still to connect when nothing had changed for ten seconds.
    pub pending: u32,
    /// Whether events were to be published.
    pub publishes: bool,
    /// In microseconds.
    pub latencies: Histogram<u64>,
    /// CPU time of the server in this phase.
    pub server_cpu: Duration,
    /// Memory of the server at its end, or with clients that stall.
    pub usage: Usage,
    /// CPU time of all generator processes in this phase.
    pub generator_cpu: Duration,
    /// The busiest generator process: share of the time that it ran or waited for a core.
    pub generator: f64,
}

/// Clients reconnect, all at once.
#[derive(Clone, Debug)]
pub struct Storm {
    /// Until all were ready and had what they missed.
    pub time: Duration,
    /// Whether they are; if not, nothing had changed for ten seconds.
    pub is_over: bool,
    /// Of the clients that stayed, in microseconds.
    pub latencies: Histogram<u64>,
    /// CPU time of the server.
    pub server_cpu: Duration,
    /// The busiest generator process, as in [`PhaseResult`].
    pub generator: f64,
}

impl PhaseResult {
    /// The busiest generator process in the part that the phase is about.
    fn busiest(&self) -> f64 {
        self.storm.as_ref().map_or(self.generator, |storm| storm.generator)
    }

    pub fn is_void(&self) -> bool {
        self.publishes && self.busiest() >= SATURATED
    }

    /// Microseconds of the server's CPU time per delivery.
    pub fn server_per_delivery(&self) -> Option<f64> {
        self.per_delivery(self.server_cpu)
    }

    /// Deliveries per second.
    pub fn deliveries_per_second(&self) -> f64 {
        self.deliveries as f64 / self.time.as_secs_f64().max(1e-3)
    }

    /// Microseconds of this CPU time per delivery.
    fn per_delivery(&self, cpu: Duration) -> Option<f64> {
        let is_known = cpu > Duration::ZERO && self.tally.deliveries > 0;
        is_known.then(|| cpu.as_secs_f64() * 1e6 / self.tally.deliveries as f64)
    }

    /// A percentile of the latencies in microseconds.
    pub fn percentile(&self, share: f64) -> Option<u64> {
        (!self.latencies.is_empty()).then(|| self.latencies.value_at_quantile(share))
    }
}

/// Problems found, one line each.
pub fn problems(phases: &[PhaseResult]) -> Vec<String> {
    let mut found = Vec::new();
    for phase in phases {
        let mut add = |count: u64, what: &str| {
            if count > 0 {
                found.push(format!("{}: {} {what}", phase.name, grouped(count)));
            }
        };
        for (reason, count) in &phase.tally.rejected {
            add(*count, &format!("events not published, and counted as lost or missing: {reason}"));
        }
        add(phase.pending.into(), "clients not ready");
        add(
            u64::from(phase.publishes && phase.published == 0),
            "time nothing was published: the client that publishes is not connected",
        );
        add(phase.tally.lost, "events lost without a notice");
        add(phase.missing, "deliveries missing 10 s after the last one");
        add(phase.tally.repeated, "events doubled or out of order");
        add(phase.tally.misrouted, "events of another channel");
        for (reason, count) in &phase.tally.refused {
            add(*count, &format!("clients refused: {reason}"));
        }
        for (reason, count) in &phase.tally.closed {
            add(*count, &format!("connections closed by the server: {reason}"));
        }
    }
    found
}

/// The phases as a table.
pub fn table(phases: &[PhaseResult]) -> String {
    const HEAD: [&str; 14] = [
        "phase",
        "s",
        "clients",
        "events",
        "deliveries/s",
        "p50",
        "p99",
        "p99.9",
        "server CPU",
        "µs/delivery",
        "memory",
        "sockets",
        "generator",
        "µs/delivery",
    ];
    let mut rows = vec![HEAD.map(str::to_owned)];
    for phase in phases {
        let seconds = phase.time.as_secs_f64().max(1e-3);
        let latency = |share| phase.percentile(share).map_or("".into(), shown_latency);
        let cpu = phase.server_cpu.as_secs_f64();
        rows.push([
            phase.name.clone(),
            format!("{seconds:.1}"),
            grouped(phase.clients.into()),
            if phase.published > 0 { grouped(phase.published.into()) } else { String::new() },
            if phase.deliveries > 0 { rate(phase.deliveries_per_second()) } else { String::new() },
            latency(0.5),
            latency(0.99),
            latency(0.999),
            if cpu > 0.0 { format!("{cpu:.2} s") } else { String::new() },
            phase.server_per_delivery().map_or(String::new(), |micros| format!("{micros:.2}")),
            if phase.usage.anonymous > 0 { mebibytes(phase.usage.anonymous) } else { String::new() },
            mebibytes(phase.usage.sockets),
            format!("{:.0} %{}", phase.busiest() * 100.0, if phase.is_void() { " VOID" } else { "" }),
            phase.per_delivery(phase.generator_cpu).map_or(String::new(), |micros| format!("{micros:.2}")),
        ]);
    }
    let widths: Vec<usize> = (0..HEAD.len())
        .map(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0))
        .collect();
    let mut text = String::new();
    for row in rows {
        for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
            let _ = match column {
                0 => write!(text, "{cell:width$}"),
                _ => write!(text, "  {cell:>width$}"),
            };
        }
        text.truncate(text.trim_end().len());
        text.push('\n');
    }
    text
}

/// Sentences for what the table can't hold.
pub fn remarks(phases: &[PhaseResult]) -> Vec<String> {
    let mut remarks = Vec::new();
    for phase in phases {
        if let Some(storm) = phase.storm.as_ref().filter(|storm| storm.is_over) {
            let Tally { resumed, notices, .. } = phase.tally;
            let p99 = match storm.latencies.is_empty() {
                true => "–".into(),
                false => shown_latency(storm.latencies.value_at_quantile(0.99)),
            };
            remarks.push(format!(
                "{}: all clients back after {:.2} s, {} resumed, {} were notified of missing events; p99 of \
                 the others meanwhile {p99}",
                phase.name,
                storm.time.as_secs_f64(),
                grouped(resumed),
                grouped(notices)
            ));
        }
        if phase.is_void() {
            remarks.push(format!(
                "{}: VOID, since a generator process was busy or waiting for a core {:.0} % of the time{}: \
                 the server may do better. Use more --processes, more cores, or fewer connections",
                phase.name,
                phase.busiest() * 100.0,
                if phase.storm.is_some() { " in which clients reconnected" } else { "" }
            ));
        }
    }
    remarks
}

/// The results as one JSON object; times in seconds, memory in bytes, latencies in microseconds.
pub fn to_json(server: &str, clients: u32, phases: &[PhaseResult]) -> Value {
    let phase = |phase: &PhaseResult| {
        let micros = |share| phase.percentile(share);
        json!({
            "phase": phase.name,
            "seconds": phase.time.as_secs_f64(),
            "reconnected_seconds":
                phase.storm.as_ref().filter(|storm| storm.is_over).map(|storm| storm.time.as_secs_f64()),
            "clients": phase.clients,
            "published": phase.published,
            "deliveries": phase.tally.deliveries,
            "deliveries_per_second": phase.deliveries_per_second(),
            "latency_us": {"p50": micros(0.5), "p90": micros(0.9), "p99": micros(0.99), "p999": micros(0.999),
                "max": micros(1.0)},
            "lost": phase.tally.lost + phase.missing,
            "repeated": phase.tally.repeated,
            "misrouted": phase.tally.misrouted,
            "notices": phase.tally.notices,
            "resumed": phase.tally.resumed,
            "not_published": phase.tally.rejected,
            "refused": phase.tally.refused,
            "closed": phase.tally.closed,
            "server_cpu_seconds": phase.server_cpu.as_secs_f64(),
            "server_cpu_us_per_delivery": phase.server_per_delivery(),
            "generator_cpu_us_per_delivery": phase.per_delivery(phase.generator_cpu),
            "server_resident_bytes": phase.usage.resident,
            "server_anonymous_bytes": phase.usage.anonymous,
            "kernel_socket_bytes": phase.usage.sockets,
            "generator_busy": phase.busiest(),
            "void": phase.is_void(),
        })
    };
    let problems = problems(phases);
    json!({
        "server": server,
        "connections": clients,
        "phases": phases.iter().map(phase).collect::<Vec<_>>(),
        "problems": problems,
    })
}

/// The counts of `now` that were not in `before`.
pub fn since(now: &Tally, before: &Tally) -> Tally {
    let new = |now: &BTreeMap<String, u64>, before: &BTreeMap<String, u64>| {
        let counts =
            now.iter().map(|(key, count)| (key.clone(), count - before.get(key).copied().unwrap_or(0)));
        counts.filter(|(_, count)| *count > 0).collect()
    };
    Tally {
        deliveries: now.deliveries - before.deliveries,
        bytes: now.bytes - before.bytes,
        lost: now.lost - before.lost,
        repeated: now.repeated - before.repeated,
        misrouted: now.misrouted - before.misrouted,
        notices: now.notices - before.notices,
        resumed: now.resumed - before.resumed,
        pings: now.pings - before.pings,
        rejected: new(&now.rejected, &before.rejected),
        refused: new(&now.refused, &before.refused),
        closed: new(&now.closed, &before.closed),
        server: now.server.clone(),
    }
}

/// The counts of several processes together.
pub fn total<'t>(tallies: impl Iterator<Item = &'t Tally>) -> Tally {
    let mut sum = Tally::default();
    for tally in tallies {
        sum.deliveries += tally.deliveries;
        sum.bytes += tally.bytes;
        sum.lost += tally.lost;
        sum.repeated += tally.repeated;
        sum.misrouted += tally.misrouted;
        sum.notices += tally.notices;
        sum.resumed += tally.resumed;
        sum.pings += tally.pings;
        add_all(&mut sum.rejected, &tally.rejected);
        add_all(&mut sum.refused, &tally.refused);
        add_all(&mut sum.closed, &tally.closed);
        sum.server = sum.server.or(tally.server.clone());
    }
    sum
}

fn add_all(sum: &mut BTreeMap<String, u64>, counts: &BTreeMap<String, u64>) {
    for (reason, count) in counts {
        *sum.entry(reason.clone()).or_default() += count;
    }
}

/// A latency with its unit.
pub fn shown_latency(micros: u64) -> String {
    match micros {
        0..1000 => format!("{micros} µs"),
        1000..10_000 => format!("{:.1} ms", micros as f64 / 1e3),
        10_000..1_000_000 => format!("{} ms", micros / 1000),
        _ => format!("{:.1} s", micros as f64 / 1e6),
    }
}

/// A rate with at most four digits before its unit.
pub fn rate(per_second: f64) -> String {
    match per_second {
        rate if rate >= 1e6 => format!("{:.2} M", rate / 1e6),
        rate if rate >= 1e4 => format!("{:.1} k", rate / 1e3),
        rate => format!("{rate:.0}"),
    }
}

pub fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

/// A count with a comma after every three digits.
pub fn grouped(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_processes_are_added() {
        let one = Tally { deliveries: 2, closed: [("4008".into(), 1)].into(), ..Tally::default() };
        let two = Tally { deliveries: 3, closed: [("4008".into(), 2)].into(), ..Tally::default() };
        let sum = total([&one, &two].into_iter());
        assert_eq!((sum.deliveries, sum.closed["4008"]), (5, 3));
        let new = since(&sum, &one);
        assert_eq!((new.deliveries, new.closed["4008"]), (3, 2));
        assert!(since(&sum, &sum).closed.is_empty());
    }

    #[test]
    fn shows_figures_with_units() {
        assert_eq!([7, 1234, 12_345, 2_000_000].map(shown_latency), ["7 µs", "1.2 ms", "12 ms", "2.0 s"]);
        assert_eq!([3.0, 12_345.0, 2.5e6].map(rate), ["3", "12.3 k", "2.50 M"]);
        assert_eq!([0, 999, 1000, 1_234_567].map(grouped), ["0", "999", "1,000", "1,234,567"]);
    }
}
