//! What the node counts, and whether it is ready. Written by the bus and the shards, read by the admin listener.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

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
pub struct BusNumbers {
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
    /// Plain messages dropped: longer than `--max-message`.
    pub oversized: Number,
    /// Channels followed (gauge).
    pub channels: Number,
    /// The last canary's way through the bus, in microseconds (gauge).
    pub round_trip_micros: Number,
    /// Seconds within which every followed channel's position is compared with the bus (gauge).
    pub canary_seconds: Number,
}

/// Whether this node can take clients.
#[derive(Debug, Default)]
pub struct Readiness {
    draining: AtomicBool,
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

    /// The node takes no more clients.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    /// `None` when ready, else the reason in a few words.
    pub fn trouble(&self) -> Option<String> {
        if self.draining.load(Ordering::Relaxed) {
            return Some("this node is stopping".into());
        }
        self.bus.lock().expect("nothing panics while holding it").clone()
    }
}
