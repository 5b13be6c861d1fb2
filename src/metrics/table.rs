//! Everything that is counted, once: `/metrics` and `/stats` are both made from this table.
//!
//! No user, channel or address is ever a label: strangers choose these, so there is no end to them.

use std::time::UNIX_EPOCH;

use serde_json::Value;

use super::histogram::Times;
use super::process::Process;
use super::{Metrics, STATUSES, ShardMetrics};
use crate::limits::connections::LimitReached;
use crate::protocol::close::LABELS;
use crate::protocol::frame::ErrorCode;

/// What Prometheus calls it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// It only rises.
    Counter,
    /// It rises and falls.
    Gauge,
    /// Times by bucket.
    Histogram,
}

/// What one number for the whole node is made of, where there is one for each shard.
#[derive(Clone, Copy, Debug)]
pub(super) enum Fold {
    /// All of them together.
    Sum,
    /// The largest: shards share what is counted.
    Max,
}

/// The numbers at one moment.
pub(super) struct View<'a> {
    pub metrics: &'a Metrics,
    pub process: Process,
}

/// Where a family's samples come from.
pub(super) enum Read {
    /// One number; null where it can't be had.
    One(fn(&View<'_>) -> Value),
    /// One for each shard.
    Shards(Fold, fn(&ShardMetrics) -> u64),
    /// One for each value of a label.
    Labels(&'static str, fn(&View<'_>) -> Vec<(&'static str, u64)>),
    /// Buckets.
    Times(fn(&View<'_>) -> Times),
}

/// What is counted under one name.
pub(super) struct Family {
    /// By Prometheus' rules: base units, `_total` for counters.
    pub name: &'static str,
    pub kind: Kind,
    pub help: &'static str,
    pub read: Read,
}

use Fold::{Max, Sum};
use Kind::{Counter, Gauge};
use Read::{Labels, One, Shards};

const fn family(name: &'static str, kind: Kind, help: &'static str, read: Read) -> Family {
    Family { name, kind, help, read }
}

const fn times(name: &'static str, help: &'static str, read: fn(&View<'_>) -> Times) -> Family {
    Family { name, kind: Kind::Histogram, help, read: Read::Times(read) }
}

/// In the order shown.
pub(super) static TABLE: &[Family] = &[
    family(
        "fanfare_build_info",
        Gauge,
        "Which fanfare this is.",
        Labels("version", |_| vec![(env!("CARGO_PKG_VERSION"), 1)]),
    ),
    family(
        "fanfare_ready",
        Gauge,
        "1 while this node takes clients, as /readyz says.",
        One(|view| u8::from(view.metrics.readiness.trouble().is_none()).into()),
    ),
    // Clients.
    family(
        "fanfare_connections",
        Gauge,
        "Open connections, those still in their handshake among them.",
        Shards(Sum, ShardMetrics::load),
    ),
    family(
        "fanfare_max_connections",
        Gauge,
        "Most connections that this node takes.",
        One(|view| view.metrics.max_connections.get().into()),
    ),
    family(
        "fanfare_connections_upgraded_total",
        Counter,
        "Connections upgraded.",
        Shards(Sum, |shard| shard.joins.get()),
    ),
    family(
        "fanfare_connections_closed_total",
        Counter,
        "Connections ended, by reason.",
        Labels("reason", |view| {
            let count = |reason: usize| view.sum(|shard| shard.ends[reason].get());
            LABELS.iter().enumerate().map(|(reason, label)| (*label, count(reason))).collect()
        }),
    ),
    family(
        "fanfare_http_rejections_total",
        Counter,
        "Requests on the public listener that were answered with an error, by status.",
        Labels("status", |view| {
            let count = |at: usize| view.sum(|shard| shard.refused[at].get());
            STATUSES.iter().enumerate().map(|(at, (_, label))| (*label, count(at))).collect()
        }),
    ),
    family(
        "fanfare_accept_failures_total",
        Counter,
        "Connections not taken, for want of descriptors or memory.",
        One(|view| view.metrics.accept_failures.get().into()),
    ),
    family(
        "fanfare_connections_rejected_total",
        Counter,
        "Connections answered with 503 or 429 before they asked, so many being refused at once, by reason.",
        Labels("reason", |view| {
            let count = |full: LimitReached| view.metrics.turned_away[full as usize].get();
            [LimitReached::Node, LimitReached::Address]
                .map(|full| (full.reason().label(), count(full)))
                .into()
        }),
    ),
    family(
        "fanfare_messages_received_total",
        Counter,
        "Messages that clients sent.",
        Shards(Sum, |shard| shard.messages.get()),
    ),
    family(
        "fanfare_publish_errors_total",
        Counter,
        "Messages of clients that were not published, by the code of the error frame.",
        Labels("code", |view| {
            let count = |code: ErrorCode| view.sum(|shard| shard.publishes_refused[code as usize].get());
            ErrorCode::ALL.into_iter().map(|code| (code.text(), count(code))).collect()
        }),
    ),
    family(
        "fanfare_received_bytes_total",
        Counter,
        "Bytes read from clients' sockets.",
        Shards(Sum, |shard| shard.bytes_received.get()),
    ),
    // Delivery.
    family(
        "fanfare_events_delivered_total",
        Counter,
        "Events written to sockets.",
        Shards(Sum, |shard| shard.delivered.get()),
    ),
    family(
        "fanfare_sent_bytes_total",
        Counter,
        "Bytes written to clients' sockets.",
        Shards(Sum, |shard| shard.bytes_sent.get()),
    ),
    times(
        "fanfare_fanout_duration_seconds",
        "How long a shard took to write what had come for a channel to everybody in it.",
        |view| Times::of(view.metrics.shards.iter().map(|shard| &shard.pass_times)),
    ),
    times(
        "fanfare_delivery_latency_seconds",
        "From an event's arrival on this node until every ready socket of a shard had it, for the first of each pass.",
        |view| Times::of(view.metrics.shards.iter().map(|shard| &shard.latencies)),
    ),
    family(
        "fanfare_slow_connections",
        Gauge,
        "Connections that are behind: their socket is full, or they read history. Counted in the heartbeats' rounds.",
        Shards(Sum, |shard| shard.slow.get()),
    ),
    family(
        "fanfare_resets_total",
        Counter,
        "Times a client was told that events may be missing, by a frame or by close 4008.",
        Shards(Sum, |shard| shard.resets.get()),
    ),
    family(
        "fanfare_pubsub_misses_total",
        Counter,
        "Times a connected client missed events without id: they left memory before its socket took them.",
        Shards(Sum, |shard| shard.bare_misses.get()),
    ),
    family(
        "fanfare_buffer_bytes",
        Gauge,
        "Recent events in memory. Shards share the bytes, so the largest counts, not the sum.",
        Shards(Max, |shard| shard.feed_bytes.get()),
    ),
    family(
        "fanfare_history_page_bytes",
        Gauge,
        "Pages of history in memory, for those who catch up.",
        Shards(Sum, |shard| shard.page_bytes.get()),
    ),
    family(
        "fanfare_unsent_bytes",
        Gauge,
        "Bytes kept for clients whose sockets are full: frames that have left the feed, and frames for one client alone.",
        Shards(Sum, |shard| shard.unsent_bytes.get()),
    ),
    // The bus.
    family(
        "fanfare_bus_events_total",
        Counter,
        "Events that came from the bus.",
        One(|view| view.metrics.bus.events.get().into()),
    ),
    family(
        "fanfare_bus_published_total",
        Counter,
        "Events that this node published.",
        One(|view| view.metrics.bus.published.get().into()),
    ),
    family(
        "fanfare_bus_publish_rejected_total",
        Counter,
        "Events that the bus refused: certainly not published.",
        One(|view| view.metrics.bus.refused.get().into()),
    ),
    family(
        "fanfare_bus_publish_unknown_total",
        Counter,
        "Events whose publication was never confirmed.",
        One(|view| view.metrics.bus.unknown.get().into()),
    ),
    family(
        "fanfare_bus_oversized_total",
        Counter,
        "Messages from bare channels dropped for being longer than --max-message-size.",
        One(|view| view.metrics.bus.oversized.get().into()),
    ),
    family(
        "fanfare_bus_gaps_filled_total",
        Counter,
        "Holes filled from history, clients noticing nothing.",
        One(|view| view.metrics.bus.holes.get().into()),
    ),
    family(
        "fanfare_bus_resets_total",
        Counter,
        "Times events of a channel may have been lost.",
        One(|view| view.metrics.bus.resets.get().into()),
    ),
    family(
        "fanfare_bus_reads_total",
        Counter,
        "Pages of history read.",
        One(|view| view.metrics.bus.reads.get().into()),
    ),
    family(
        "fanfare_bus_channels",
        Gauge,
        "Channels followed.",
        One(|view| view.metrics.bus.channels.get().into()),
    ),
    times(
        "fanfare_bus_round_trip_seconds",
        "A canary's way through Redis and back, one each second.",
        |view| Times::of([&view.metrics.bus.round_trips]),
    ),
    family(
        "fanfare_bus_probe_interval_seconds",
        Gauge,
        "Time within which every followed channel is compared with Redis; more than 2 with over 1000 channels.",
        One(|view| view.metrics.bus.canary_seconds.get().into()),
    ),
    // The node itself.
    family(
        "fanfare_admin_rejections_total",
        Counter,
        "Requests to the admin listener without the right key, or with a Host that is not this machine's.",
        One(|view| view.metrics.admin_refused.get().into()),
    ),
    family(
        "process_start_time_seconds",
        Gauge,
        "Start time, Unix epoch.",
        One(|view| {
            let since = view.metrics.started_at.duration_since(UNIX_EPOCH).ok();
            since.map(|since| since.as_secs_f64()).into()
        }),
    ),
    family(
        "process_resident_memory_bytes",
        Gauge,
        "Resident memory.",
        One(|view| view.process.resident_bytes.into()),
    ),
    family(
        "process_cpu_seconds_total",
        Counter,
        "User and system time of all threads.",
        One(|view| view.process.cpu_seconds.into()),
    ),
    family("process_open_fds", Gauge, "Open file descriptors.", One(|view| view.process.open_fds.into())),
    family(
        "process_max_fds",
        Gauge,
        "Most file descriptors allowed.",
        One(|view| view.process.max_fds.into()),
    ),
];

impl View<'_> {
    fn sum(&self, read: impl Fn(&ShardMetrics) -> u64) -> u64 {
        self.metrics.shards.iter().map(read).sum()
    }
}

impl Fold {
    /// The node's number.
    pub fn of(self, numbers: impl Iterator<Item = u64>) -> u64 {
        match self {
            Sum => numbers.sum(),
            Max => numbers.max().unwrap_or(0),
        }
    }
}
