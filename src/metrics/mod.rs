//! Counters, gauges and readiness. Written by the bus, the shards and the accept loop; read by the
//! admin listener.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Instant, SystemTime};

use crate::http::Rejection;
use crate::metrics::rejections::{RejectionClass, RejectionLog};
use crate::protocol::close::{CloseReason, REASONS};
use crate::protocol::frame::ErrorCode;

mod accept_log;
mod histogram;
mod process;
mod readiness;
pub mod rejections;
mod render;
mod table;
mod warning_limit;

pub use accept_log::AcceptLog;
pub use histogram::Histogram;
pub use readiness::Readiness;
pub use warning_limit::{WARN_INTERVAL, WarningLimit};

/// A number that only rises. Relaxed: numbers are read one by one.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    pub fn add(&self, by: u64) {
        self.0.fetch_add(by, Ordering::Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A number that rises and falls.
#[derive(Debug, Default)]
pub struct Gauge(AtomicU64);

impl Gauge {
    pub fn set(&self, to: u64) {
        self.0.store(to, Ordering::Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What the bus counts.
#[derive(Debug, Default)]
pub struct BusMetrics {
    /// Events handed to the shards.
    pub events: Counter,
    /// Events that this node published.
    pub published: Counter,
    /// Events that were certainly not published.
    pub publish_rejected: Counter,
    /// Events that may or may not have been published.
    pub publish_unknown: Counter,
    /// Messages of clients stored in inboxes.
    pub inbox_stored: Counter,
    /// Inboxes that this node knows, and what it has found in them.
    pub inboxes: Gauge,
    pub inbox_messages: Gauge,
    pub inbox_oldest_seconds: Gauge,
    /// Gaps filled from history without a notice to clients.
    pub gaps_filled: Counter,
    /// Resets announced to the shards.
    pub resets: Counter,
    /// Pages of history read.
    pub reads: Counter,
    /// Pub/Sub messages longer than `--max-message-size`, which were dropped.
    pub oversized: Counter,
    /// Channels followed.
    pub channels: Gauge,
    /// Commands of backends about connections, executed on this node.
    pub commands: Counter,
    /// Users who are banned.
    pub bans: Gauge,
    /// Users that this node has in channels of `--presence`, counted once in each.
    pub presence_users: Gauge,
    /// Bytes of memory in use: the local bus's histories, or events that wait for Redis.
    pub held_bytes: Gauge,
    /// From sending a probe to its return over Pub/Sub.
    pub round_trips: Histogram,
    /// Seconds within which the position of every followed channel is compared with Redis.
    pub probe_interval_seconds: Gauge,
    server: Mutex<Option<String>>,
}

impl BusMetrics {
    /// Name and version of the server that the bus works with, for `/stats`.
    pub fn set_server(&self, server: Option<String>) {
        *self.server.lock().expect("nothing panics while holding it") = server;
    }

    fn server(&self) -> Option<String> {
        self.server.lock().expect("nothing panics while holding it").clone()
    }
}

/// A counter for each error code.
type ByCode = [Counter; ErrorCode::ALL.len()];

/// What one shard counts. Only that shard writes it; aligned so that no two shards write to one
/// cache line.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct ShardMetrics {
    /// Sockets handed to the shard. Written by the accept loop alone.
    pub accepted: Counter,
    /// Sockets closed.
    pub closed: Counter,
    /// Ticks, ten a second while the shard is alive. Read by the watchdog alone.
    pub ticks: Counter,
    pub upgraded: Counter,
    /// Indexed by [`CloseReason`].
    pub closed_by_reason: [Counter; REASONS],
    /// Events of which the last byte was written to a socket.
    pub events_delivered: Counter,
    /// Bytes written to sockets.
    pub bytes_sent: Counter,
    /// Bytes read from sockets.
    pub bytes_received: Counter,
    /// Durations of fan-outs.
    pub fanout_times: Histogram,
    /// From the arrival of an event on the node to the end of the fan-out that wrote it.
    pub latencies: Histogram,
    pub messages_received: Counter,
    /// Messages not published, indexed by [`ErrorCode`].
    publish_errors: ByCode,
    /// Frames about subscriptions and tokens that were rejected, indexed by [`ErrorCode`].
    subscription_errors: ByCode,
    /// Subscriptions of all connections, those that wait for the bus among them.
    pub subscriptions: Gauge,
    /// `reset` frames sent, and connections closed with 4008.
    pub resets: Counter,
    /// Times a client missed events without id, which are in no history.
    pub pubsub_misses: Counter,
    /// Requests answered with an error, indexed as `STATUSES`.
    http_rejections: [Counter; STATUSES.len()],
    /// Connections that are behind: their socket is full, or they read history.
    pub slow: Gauge,
    /// Bytes of the shard's feeds. Shards share the events themselves.
    pub feed_bytes: Gauge,
    /// Bytes of pages of history.
    pub page_bytes: Gauge,
    /// Bytes kept for clients whose sockets are full.
    pub unsent_bytes: Gauge,
}

/// The statuses of rejected requests; the last row stands for all others.
const STATUSES: [(u16, &str); 13] = [
    (400, "400"),
    (401, "401"),
    (403, "403"),
    (404, "404"),
    (405, "405"),
    (408, "408"),
    (414, "414"),
    (426, "426"),
    (429, "429"),
    (431, "431"),
    (503, "503"),
    (505, "505"),
    (0, "other"),
];

impl ShardMetrics {
    /// Counts a request that was answered with an error.
    pub fn count_rejection(&self, status: u16) {
        let at = STATUSES.iter().position(|(known, _)| *known == status);
        self.http_rejections[at.unwrap_or(STATUSES.len() - 1)].add(1);
    }

    /// Open connections, with those on their way to the shard.
    pub fn load(&self) -> u64 {
        // A socket may be closed between the two reads.
        let closed = self.closed.get();
        self.accepted.get().saturating_sub(closed)
    }
}

/// Reasons to reject a connection before its request is read.
const EARLY_REJECTIONS: [CloseReason; 2] = [CloseReason::NodeLimit, CloseReason::IpLimit];

/// All metrics of the node.
#[derive(Debug)]
pub struct Metrics {
    /// Indexed by `ShardId`.
    pub shards: Box<[ShardMetrics]>,
    /// Turns of the accept loop, at least two a second. Read by the watchdog alone.
    pub accept_turns: Counter,
    /// Turns of the admin thread, at least two a second; 0 with `--admin off`. Read by the watchdog
    /// alone.
    pub admin_turns: Counter,
    /// Failed accepts: out of file descriptors or memory.
    pub accept_failures: Counter,
    /// Connections answered right after accept(2), because too many wait for an answer already:
    /// indexed as [`EARLY_REJECTIONS`].
    connections_rejected: [Counter; EARLY_REJECTIONS.len()],
    /// Bytes of incomplete messages, all shards together.
    pub partial_bytes: AtomicUsize,
    pub max_connections: Gauge,
    /// Requests to the admin listener without the right key, or with a `Host` that is not this
    /// machine's.
    pub admin_rejections: Counter,
    pub rejections: RejectionLog,
    pub bus: Arc<BusMetrics>,
    pub readiness: Arc<Readiness>,
    /// When the process started.
    pub started: Instant,
    pub started_at: SystemTime,
}

impl Metrics {
    pub fn new(shards: usize, bus: Arc<BusMetrics>, readiness: Arc<Readiness>) -> Metrics {
        Metrics {
            shards: (0..shards).map(|_| ShardMetrics::default()).collect(),
            accept_turns: Counter::default(),
            admin_turns: Counter::default(),
            accept_failures: Counter::default(),
            connections_rejected: Default::default(),
            partial_bytes: AtomicUsize::default(),
            max_connections: Gauge::default(),
            admin_rejections: Counter::default(),
            rejections: RejectionLog::default(),
            bus,
            readiness,
            started: Instant::now(),
            started_at: SystemTime::now(),
        }
    }

    /// Counts a connection that is rejected before its request is read.
    pub fn count_early_rejection(&self, reason: CloseReason) {
        let at = EARLY_REJECTIONS.iter().position(|known| *known == reason);
        self.connections_rejected[at.expect("only two limits are checked before the request")].add(1);
    }

    /// Turns of the accept loop and the admin thread, and ticks of each shard. One that stays the
    /// same is stuck.
    pub fn turns(&self) -> Vec<u64> {
        let shards = self.shards.iter().map(|shard| shard.ticks.get());
        let admin = Some(self.admin_turns.get()).filter(|turns| *turns > 0);
        std::iter::once(self.accept_turns.get()).chain(shards).chain(admin).collect()
    }

    /// The name of a thread, by its index in [`Metrics::turns`].
    pub fn thread_name(&self, index: usize) -> String {
        match index.checked_sub(1) {
            None => "accept".into(),
            Some(shard) if shard < self.shards.len() => format!("shard-{shard}"),
            Some(_) => "admin".into(),
        }
    }

    /// Open connections of all shards.
    pub fn connections(&self) -> u64 {
        self.shards.iter().map(ShardMetrics::load).sum()
    }

    /// Bytes in the buffers that
    /// [`Settings::total_buffer_memory`](crate::config::Settings::total_buffer_memory) limits.
    pub fn buffered(&self) -> u64 {
        let of_shard =
            |shard: &ShardMetrics| shard.feed_bytes.get() + shard.page_bytes.get() + shard.unsent_bytes.get();
        let partial = self.partial_bytes.load(Ordering::Relaxed) as u64;
        self.bus.held_bytes.get() + partial + self.shards.iter().map(of_shard).sum::<u64>()
    }

    /// Connections closed since the start.
    pub fn closed(&self) -> u64 {
        self.shards.iter().map(|shard| shard.closed.get()).sum()
    }

    /// Counts and logs a client's frame about subscriptions or its token that was rejected.
    pub fn reject_subscription(&self, shard: usize, code: ErrorCode, text: &str) {
        self.shards[shard].subscription_errors[code as usize].add(1);
        self.rejections.record(RejectionClass::new("subscription", code.text(), 0), text);
    }

    /// Counts and logs a new token that was rejected.
    pub fn reject_token(&self, shard: usize, rejection: &Rejection) {
        self.shards[shard].subscription_errors[ErrorCode::Unauthorized as usize].add(1);
        self.rejections.record(RejectionClass::of("new token", rejection), rejection.log_text());
    }

    /// Counts and logs a client's message that was not published.
    pub fn reject_message(&self, shard: usize, code: ErrorCode, text: &str) {
        self.shards[shard].publish_errors[code as usize].add(1);
        self.rejections.record(RejectionClass::new("message", code.text(), 0), text);
    }
}
