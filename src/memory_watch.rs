//! Watches what the cgroup and the machine leave, so that new connections get 503 and buffers shrink before the kernel
//! kills the node. `--max-connections auto` reckons with idle connections; what busy and stalled ones take is only known
//! when they take it.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::cgroup::{self, Groups};
use crate::config::{Settings, show_size};
use crate::metrics::Metrics;

/// Connections admitted, and time passed, between two looks. So many take 256 KiB at most while they are idle.
const ADMITTED: u32 = 64;
const INTERVAL: Duration = Duration::from_millis(100);

/// How often buffers can be halved.
const PRESSURE_MAX: u32 = 4;

/// Looks with enough memory until buffers may grow again.
const CALM: u32 = 50;

/// Least time between two log lines.
const WARN_EVERY: Duration = Duration::from_secs(60);

/// What the accept loop asks before it takes a connection.
#[derive(Debug)]
pub struct MemoryWatch {
    groups: Groups,
    /// Kept free.
    spare: u64,
    /// What buffers may grow to.
    buffers: u64,
    metrics: Arc<Metrics>,
    looked: Option<Instant>,
    admitted: u32,
    room: bool,
    calm: u32,
    warned: Option<Instant>,
}

impl MemoryWatch {
    /// Has not looked yet.
    pub fn new(settings: &Settings, metrics: Arc<Metrics>) -> MemoryWatch {
        MemoryWatch {
            groups: Groups::read(Path::new("/")),
            spare: settings.memory.spare(),
            buffers: settings.buffer_memory(),
            metrics,
            looked: None,
            admitted: 0,
            room: true,
            calm: 0,
            warned: None,
        }
    }

    /// Whether there is memory for one more connection.
    pub fn admit(&mut self) -> bool {
        self.admitted += 1;
        if self.admitted >= ADMITTED {
            self.look(Instant::now());
        }
        self.room
    }

    /// Looks again when it is time.
    pub fn on_turn(&mut self) {
        let now = Instant::now();
        if self.looked.is_none_or(|last| now - last >= INTERVAL) {
            self.look(now);
        }
    }

    fn look(&mut self, now: Instant) {
        (self.looked, self.admitted) = (Some(now), 0);
        // Buffers that are not full yet will be.
        let growth = self.buffers.saturating_sub(self.metrics.buffered());
        let needed = growth + self.spare;
        let left = self.groups.left(needed).unwrap_or(u64::MAX);
        // Of the machine others take their part too, so it counts only when there is hardly any left.
        let free = cgroup::available_memory().unwrap_or(u64::MAX);
        self.room = left >= needed && free >= self.spare / 2;
        self.press(left < self.spare / 2 || free < self.spare / 4);
        let pressure = self.metrics.readiness.memory_pressure();
        if (!self.room || pressure > 0) && self.warned.is_none_or(|last| now - last >= WARN_EVERY) {
            self.warned = Some(now);
            tracing::warn!(
                left = show_size(left.min(free)),
                buffers_may_grow_by = show_size(growth),
                buffers_halved = pressure,
                "memory is short: new connections get 503 (MemoryMax= of the unit, --max-connections)"
            );
        }
    }

    /// Halves buffers while memory is short, and doubles them when it has not been for a while.
    fn press(&mut self, short: bool) {
        let pressure = self.metrics.readiness.memory_pressure();
        self.calm = if short { 0 } else { self.calm + 1 };
        if short && pressure < PRESSURE_MAX {
            self.metrics.readiness.set_memory_pressure(pressure + 1);
        } else if self.calm >= CALM && pressure > 0 {
            self.calm = 0;
            self.metrics.readiness.set_memory_pressure(pressure - 1);
        }
    }
}
