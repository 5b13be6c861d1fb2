//! What the node counts, and whether it is ready. Written by the bus and the shards, read by the admin listener.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Instant, SystemTime};

use crate::metrics::rejections::{Class, RejectionLog};
use crate::protocol::close::REASONS;
use crate::protocol::frame::ErrorCode;

mod histogram;
mod process;
pub mod rejections;
mod render;
mod table;

pub use histogram::Histogram;
pub use process::{max_fds, open_file_limit};

/// One number, shown as a Prometheus counter or gauge. Relaxed: numbers are read one by one.
#[derive(Debug, Default)]
pub struct Number(AtomicU64);

impl Number {
    /// Adds to it.
    pub fn add(&self, by: u64) {
        self.0.fetch_add(by, Ordering::Relaxed);
    }

    /// Sets it.
    pub fn set(&self, to: u64) {
        self.0.store(to, Ordering::Relaxed);
    }

    /// Reads it.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What the bus counts.
#[derive(Debug, Default)]
pub struct BusMetrics {
    /// Events handed to the shards.
    pub events: Number,
    /// Events this node published.
    pub published: Number,
    /// Publishes refused.
    pub refused: Number,
    /// Publishes whose fate is unknown.
    pub unknown: Number,
    /// Holes that were filled from history, clients noticing nothing.
    pub holes: Number,
    /// Resets announced.
    pub resets: Number,
    /// Pages of history read.
    pub reads: Number,
    /// Plain messages dropped: longer than `--max-message-size`.
    pub oversized: Number,
    /// Channels followed (gauge).
    pub channels: Number,
    /// Bytes that the bus holds (gauge): histories of the local one, events that wait for Redis.
    pub held_bytes: Number,
    /// Canaries' ways through the bus and back.
    pub round_trips: Histogram,
    /// Seconds within which every followed channel's position is compared with the bus (gauge).
    pub canary_seconds: Number,
}

/// What one shard counts. Only that shard writes it; aligned so that no two shards write to one cache line.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct ShardMetrics {
    /// Sockets given to it. Only the accept loop writes this one.
    pub accepted: Number,
    /// Sockets of those that are closed again.
    pub closed: Number,
    /// Looks at the clock, ten a second while it lives. Only the watchdog reads this.
    pub turns: Number,
    /// Connections upgraded.
    pub joins: Number,
    /// Connections ended, by [`crate::protocol::close::CloseReason`].
    pub ends: [Number; REASONS],
    /// Events written to sockets whole.
    pub delivered: Number,
    /// Bytes written to sockets.
    pub bytes_sent: Number,
    /// Bytes read from sockets.
    pub bytes_received: Number,
    /// How long fan-out passes took.
    pub pass_times: Histogram,
    /// From events' arrival on the node to the end of the passes that brought them out.
    pub latencies: Histogram,
    /// Messages taken from clients.
    pub messages: Number,
    /// Messages not published, by [`ErrorCode`].
    publishes_refused: [Number; ErrorCode::ALL.len()],
    /// Times a client was told that events may be missing, by a frame or by a close.
    pub resets: Number,
    /// Times a client missed events without id, which are in no history.
    pub bare_misses: Number,
    /// Requests answered with an error, by place in `STATUSES`.
    refused: [Number; STATUSES.len()],
    /// Connections that are behind: their socket is full, or they read history (gauge).
    pub slow: Number,
    /// Bytes of recent events that the shard's feeds hold (gauge). Shards share the bytes themselves.
    pub feed_bytes: Number,
    /// Bytes of pages of history (gauge).
    pub page_bytes: Number,
    /// Bytes kept for clients whose sockets are full (gauge).
    pub unsent_bytes: Number,
}

/// The statuses that requests are refused with; the last stands for all others.
const STATUSES: [(u16, &str); 16] = [
    (400, "400"),
    (401, "401"),
    (403, "403"),
    (404, "404"),
    (405, "405"),
    (408, "408"),
    (411, "411"),
    (413, "413"),
    (414, "414"),
    (426, "426"),
    (429, "429"),
    (431, "431"),
    (501, "501"),
    (503, "503"),
    (505, "505"),
    (0, "other"),
];

impl ShardMetrics {
    /// Counts a request that was answered with this status.
    pub fn count_refused(&self, status: u16) {
        let at = STATUSES.iter().position(|(known, _)| *known == status);
        self.refused[at.unwrap_or(STATUSES.len() - 1)].add(1);
    }

    /// Its connections, with those that are on their way to it.
    pub fn load(&self) -> u64 {
        // A socket may be closed between the two reads.
        let closed = self.closed.get();
        self.accepted.get().saturating_sub(closed)
    }
}

/// Everything the admin listener shows.
#[derive(Debug)]
pub struct Metrics {
    /// By [`crate::bus::ShardId`].
    pub shards: Box<[ShardMetrics]>,
    /// Turns of the accept loop, two a second at least. Only the watchdog reads this.
    pub accept_turns: Number,
    /// Turns of the admin listener's thread, two a second at least; 0 when there is none. Only the watchdog reads this.
    pub admin_turns: Number,
    /// Connections that could not be accepted, for want of descriptors or memory.
    pub accept_failures: Number,
    /// Connections answered at once, there being too many that wait for an answer: by [`crate::limits::connections::LimitReached`], `Node`
    /// and `Address`.
    pub turned_away: [Number; 2],
    /// Bytes of incomplete messages of all shards, to which each adds its own.
    pub partial_bytes: AtomicUsize,
    /// Most connections that this node takes.
    pub max_connections: Number,
    /// Requests to the admin listener without the right key, or under a name that is not this machine's.
    pub admin_refused: Number,
    /// What was refused, for the log.
    pub refusals: RejectionLog,
    /// What the bus counts.
    pub bus: Arc<BusMetrics>,
    /// Whether the node takes clients.
    pub readiness: Arc<Readiness>,
    /// When the process started, for durations.
    pub started: Instant,
    /// The same on the wall clock.
    pub started_at: SystemTime,
}

impl Metrics {
    /// Numbers that begin now.
    pub fn new(shards: usize, bus: Arc<BusMetrics>, readiness: Arc<Readiness>) -> Metrics {
        Metrics {
            shards: (0..shards).map(|_| ShardMetrics::default()).collect(),
            accept_turns: Number::default(),
            admin_turns: Number::default(),
            accept_failures: Number::default(),
            turned_away: Default::default(),
            partial_bytes: AtomicUsize::default(),
            max_connections: Number::default(),
            admin_refused: Number::default(),
            refusals: RejectionLog::default(),
            bus,
            readiness,
            started: Instant::now(),
            started_at: SystemTime::now(),
        }
    }

    /// What each thread but this one has counted of its turns: a sign of life.
    pub fn turns(&self) -> Vec<u64> {
        let shards = self.shards.iter().map(|shard| shard.turns.get());
        let admin = Some(self.admin_turns.get()).filter(|turns| *turns > 0);
        std::iter::once(self.accept_turns.get()).chain(shards).chain(admin).collect()
    }

    /// The name of a thread, by its place in [`Metrics::turns`].
    pub fn thread_name(&self, place: usize) -> String {
        match place.checked_sub(1) {
            None => "accept".into(),
            Some(shard) if shard < self.shards.len() => format!("shard-{shard}"),
            Some(_) => "admin".into(),
        }
    }

    /// Open connections of all shards.
    pub fn connections(&self) -> u64 {
        self.shards.iter().map(ShardMetrics::load).sum()
    }

    /// Bytes in the buffers that [`crate::config::Settings::total_buffer_memory`] limits.
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

    /// Counts a client's message that was not published, and sees that the log hears of it.
    pub fn refuse_message(&self, shard: usize, code: ErrorCode, text: &str) {
        self.shards[shard].publishes_refused[code as usize].add(1);
        self.refusals.note(Class { what: "message", why: code.text(), status: 0 }, text);
    }
}

/// Whether this node can take clients.
#[derive(Debug, Default)]
pub struct Readiness {
    draining: AtomicBool,
    memory_pressure: AtomicU32,
    memory_short: AtomicBool,
    bus: Mutex<Option<String>>,
}

impl Readiness {
    /// Ready only once the bus says so.
    pub fn waiting_for_bus() -> Readiness {
        let readiness = Readiness::default();
        readiness.set_bus(Some("the bus has not answered yet".into()));
        readiness
    }

    /// The bus works (`None`), or why it does not.
    pub fn set_bus(&self, trouble: Option<String>) {
        *self.bus.lock().expect("nothing panics while holding it") = trouble;
    }

    /// The node is stopping: balancers are to send nobody any more. Whoever comes all the same is taken for a while yet.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    /// Whether it is stopping.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// How many times buffers are halved, since memory is short.
    pub fn memory_pressure(&self) -> u32 {
        self.memory_pressure.load(Ordering::Relaxed)
    }

    /// Sets how many times buffers are halved. Only the accept loop calls this.
    pub fn set_memory_pressure(&self, halvings: u32) {
        self.memory_pressure.store(halvings, Ordering::Relaxed);
    }

    /// Whether new connections are refused, since memory is short.
    pub fn is_memory_short(&self) -> bool {
        self.memory_short.load(Ordering::Relaxed)
    }

    /// Sets whether memory is short. Only the accept loop calls this.
    pub fn set_memory_short(&self, is_short: bool) {
        self.memory_short.store(is_short, Ordering::Relaxed);
    }

    /// `None` when ready, else the reason in a few words.
    pub fn trouble(&self) -> Option<String> {
        if self.is_draining() {
            return Some("this node is stopping".into());
        }
        self.bus.lock().expect("nothing panics while holding it").clone()
    }
}
