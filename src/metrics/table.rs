//! One row per metric, from which both `/metrics` and `/stats` are rendered.
//!
//! A user, channel or address is never a label: clients choose these, so their number has no limit.

use std::time::UNIX_EPOCH;

use serde_json::Value;

use super::histogram::Times;
use super::process::Process;
use super::{ByCode, EARLY_REJECTIONS, Metrics, STATUSES, ShardMetrics};
use crate::protocol::close::LABELS;
use crate::protocol::frame::ErrorCode;

/// The type in Prometheus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Counter,
    Gauge,
    Histogram,
}

/// How the numbers of all shards become one for the node.
#[derive(Clone, Copy, Debug)]
pub(super) enum Fold {
    Sum,
    /// For memory that shards share.
    Max,
}

/// What the rows read from.
pub(super) struct View<'a> {
    pub metrics: &'a Metrics,
    pub process: Process,
}

/// Where a family's samples come from.
pub(super) enum Read {
    /// One number; null where it is unavailable.
    One(fn(&View<'_>) -> Value),
    /// One number per shard.
    Shards(Fold, fn(&ShardMetrics) -> u64),
    /// One number per value of a label.
    Labels(&'static str, fn(&View<'_>) -> Vec<(&'static str, u64)>),
    Times(fn(&View<'_>) -> Times),
}

pub(super) struct Family {
    /// In base units, with `_total` for counters (Prometheus naming conventions).
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

/// In the order rendered.
pub(super) static TABLE: &[Family] = &[
    family(
        "fanfare_build_info",
        Gauge,
        "Version of this node.",
        Labels("version", |_| vec![(env!("CARGO_PKG_VERSION"), 1)]),
    ),
    family(
        "fanfare_ready",
        Gauge,
        "1 while this node accepts clients, as /readyz says.",
        One(|view| u8::from(view.metrics.readiness.not_ready_reason().is_none()).into()),
    ),
    // Clients.
    family(
        "fanfare_connections",
        Gauge,
        "Open connections, including those in their handshake.",
        Shards(Sum, ShardMetrics::load),
    ),
    family(
        "fanfare_max_connections",
        Gauge,
        "Limit on connections of this node.",
        One(|view| view.metrics.max_connections.get().into()),
    ),
    family(
        "fanfare_connections_upgraded_total",
        Counter,
        "Connections upgraded to WebSocket, excluding rejected ones.",
        Shards(Sum, |shard| shard.upgraded.get()),
    ),
    family(
        "fanfare_connections_closed_total",
        Counter,
        "Connections closed, by reason.",
        Labels("reason", |view| {
            let count = |reason: usize| view.sum(|shard| shard.closed_by_reason[reason].get());
            LABELS.iter().enumerate().map(|(reason, label)| (*label, count(reason))).collect()
        }),
    ),
    family(
        "fanfare_http_rejections_total",
        Counter,
        "Rejected requests to the public listener, by status. Close codes 44xx count as status 4xx.",
        Labels("status", |view| {
            let count = |at: usize| view.sum(|shard| shard.http_rejections[at].get());
            STATUSES.iter().enumerate().map(|(at, (_, label))| (*label, count(at))).collect()
        }),
    ),
    family(
        "fanfare_accept_failures_total",
        Counter,
        "Failed accepts: out of file descriptors or memory.",
        One(|view| view.metrics.accept_failures.get().into()),
    ),
    family(
        "fanfare_connections_rejected_total",
        Counter,
        "Connections answered with 503 or 429 without reading a request, because too many are being rejected, by reason.",
        Labels("reason", |view| {
            let counts = view.metrics.connections_rejected.iter().map(|counter| counter.get());
            EARLY_REJECTIONS.iter().map(|reason| reason.label()).zip(counts).collect()
        }),
    ),
    family(
        "fanfare_messages_received_total",
        Counter,
        "Messages received from clients.",
        Shards(Sum, |shard| shard.messages_received.get()),
    ),
    family(
        "fanfare_publish_errors_total",
        Counter,
        "Messages from clients that were not published, by error code.",
        Labels("code", |view| view.by_code(|shard| &shard.publish_errors)),
    ),
    family(
        "fanfare_subscriptions",
        Gauge,
        "Channels that connections follow beside their default channel.",
        Shards(Sum, |shard| shard.subscriptions.get()),
    ),
    family(
        "fanfare_subscription_errors_total",
        Counter,
        "Frames of clients about subscriptions or tokens that were rejected, by error code.",
        Labels("code", |view| view.by_code(|shard| &shard.subscription_errors)),
    ),
    family(
        "fanfare_commands_total",
        Counter,
        "Commands to disconnect, ban or unban a user that this node has executed.",
        One(|view| view.metrics.bus.commands.get().into()),
    ),
    family("fanfare_bans", Gauge, "Users who are banned.", One(|view| view.metrics.bus.bans.get().into())),
    family(
        "fanfare_received_bytes_total",
        Counter,
        "Bytes read from client sockets.",
        Shards(Sum, |shard| shard.bytes_received.get()),
    ),
    // Delivery.
    family(
        "fanfare_events_delivered_total",
        Counter,
        "Events written to sockets.",
        Shards(Sum, |shard| shard.events_delivered.get()),
    ),
    family(
        "fanfare_sent_bytes_total",
        Counter,
        "Bytes written to clients' sockets.",
        Shards(Sum, |shard| shard.bytes_sent.get()),
    ),
    times(
        "fanfare_fanout_duration_seconds",
        "Time in which a shard wrote the new events of a channel to all its subscribers.",
        |view| Times::of(view.metrics.shards.iter().map(|shard| &shard.fanout_times)),
    ),
    times(
        "fanfare_delivery_latency_seconds",
        "From the arrival of an event on this node until a shard has written it to every ready socket, for the first event of each fan-out.",
        |view| Times::of(view.metrics.shards.iter().map(|shard| &shard.latencies)),
    ),
    family(
        "fanfare_slow_connections",
        Gauge,
        "Connections that are behind: their socket is full, or they read history. Counted once per ping interval.",
        Shards(Sum, |shard| shard.slow.get()),
    ),
    family(
        "fanfare_resets_total",
        Counter,
        "Clients notified that events may be missing, by a reset frame or by close 4008.",
        Shards(Sum, |shard| shard.resets.get()),
    ),
    family(
        "fanfare_pubsub_misses_total",
        Counter,
        "Times a connected client missed events without id: they were evicted before its socket accepted them.",
        Shards(Sum, |shard| shard.pubsub_misses.get()),
    ),
    family(
        "fanfare_buffer_bytes",
        Gauge,
        "Recent events in memory (--buffer-memory). Shards share the bytes, so this is the largest shard, not the sum.",
        Shards(Max, |shard| shard.feed_bytes.get()),
    ),
    family(
        "fanfare_history_page_bytes",
        Gauge,
        "Pages of history in memory, for clients that catch up.",
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
        "Events received from the bus.",
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
        "Events that were certainly not published.",
        One(|view| view.metrics.bus.publish_rejected.get().into()),
    ),
    family(
        "fanfare_bus_publish_unknown_total",
        Counter,
        "Events that may or may not have been published.",
        One(|view| view.metrics.bus.publish_unknown.get().into()),
    ),
    family(
        "fanfare_inbox_stored_total",
        Counter,
        "Messages of clients that this node stored in inboxes.",
        One(|view| view.metrics.bus.inbox_stored.get().into()),
    ),
    family(
        "fanfare_inboxes",
        Gauge,
        "Inboxes that this node samples: those in --inbox by their name, and those of prefixes that it stored a message in.",
        One(|view| view.metrics.bus.inboxes.get().into()),
    ),
    family(
        "fanfare_inbox_messages",
        Gauge,
        "Messages in these inboxes. Nodes sample the same inboxes: do not add up nodes.",
        One(|view| view.metrics.bus.inbox_messages.get().into()),
    ),
    family(
        "fanfare_inbox_oldest_seconds",
        Gauge,
        "Age of the oldest message in them: how far workers are behind.",
        One(|view| view.metrics.bus.inbox_oldest_seconds.get().into()),
    ),
    family(
        "fanfare_bus_oversized_total",
        Counter,
        "Messages on --pubsub-channels dropped because they exceed --max-message-size.",
        One(|view| view.metrics.bus.oversized.get().into()),
    ),
    family(
        "fanfare_bus_gaps_filled_total",
        Counter,
        "Gaps filled from history without a notice to clients.",
        One(|view| view.metrics.bus.gaps_filled.get().into()),
    ),
    family(
        "fanfare_bus_resets_total",
        Counter,
        "Times that events of a channel may have been lost.",
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
    family(
        "fanfare_presence_users",
        Gauge,
        "Users that this node has in channels of --presence, including users who left less than ten seconds ago. A user in two channels counts twice.",
        One(|view| view.metrics.bus.presence_users.get().into()),
    ),
    times(
        "fanfare_bus_round_trip_seconds",
        "From sending a probe to its return over Redis Pub/Sub, once a second.",
        |view| Times::of([&view.metrics.bus.round_trips]),
    ),
    family(
        "fanfare_bus_probe_interval_seconds",
        Gauge,
        "Time in which every followed channel is compared with Redis once; more than 2 s with over 1000 channels.",
        One(|view| view.metrics.bus.probe_interval_seconds.get().into()),
    ),
    // The node itself.
    family(
        "fanfare_admin_rejections_total",
        Counter,
        "Requests to the admin listener without the right key, or with a Host that is not this machine.",
        One(|view| view.metrics.admin_rejections.get().into()),
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

    /// Counts of error codes, over all shards.
    fn by_code(&self, read: fn(&ShardMetrics) -> &ByCode) -> Vec<(&'static str, u64)> {
        let count = |code: ErrorCode| self.sum(|shard| read(shard)[code as usize].get());
        ErrorCode::ALL.into_iter().map(|code| (code.text(), count(code))).collect()
    }
}

impl Fold {
    pub fn of(self, numbers: impl Iterator<Item = u64>) -> u64 {
        match self {
            Sum => numbers.sum(),
            Max => numbers.max().unwrap_or(0),
        }
    }
}
