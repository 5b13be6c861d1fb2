//! Watches the memory that the cgroup and the machine have left, so that new connections get 503
//! and buffers shrink before the kernel kills the node. `--max-connections auto` assumes idle
//! connections; what busy and stalled ones take must be measured.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::config::cgroup::{self, Groups};
use crate::config::{Settings, memory_held, show_size};
use crate::metrics::{Metrics, WarningLimit};

/// Connections admitted between two measurements: idle, 64 of them take at most 256 KiB.
const ADMITTED_MAX: u32 = 64;
/// Time between two measurements.
const INTERVAL: Duration = Duration::from_millis(100);

/// How often buffers can be halved.
const PRESSURE_MAX: u32 = 4;

/// Measurements in a row with enough memory until buffers may grow again.
const CALM_MIN: u32 = 50;

/// The accept loop asks it before it admits a connection.
#[derive(Debug)]
pub struct MemoryWatch {
    groups: Groups,
    /// The limit of the cgroups.
    limit: Option<u64>,
    /// Bytes kept free for sockets and fragmentation.
    spare: u64,
    /// The same, but not less than feeds may take while fan-outs are under way.
    reserve: u64,
    /// Bytes that buffers may grow to.
    buffers: u64,
    metrics: Arc<Metrics>,
    measured: Option<Instant>,
    /// Connections admitted since then.
    admitted: u32,
    has_room: bool,
    /// Measurements with enough memory since the pressure changed.
    calm: u32,
    warnings: WarningLimit,
}

impl MemoryWatch {
    /// Makes its first measurement in the first turn.
    pub fn new(settings: &Settings, metrics: Arc<Metrics>) -> MemoryWatch {
        MemoryWatch {
            groups: Groups::read(Path::new("/")),
            limit: settings.memory.cgroup,
            spare: settings.memory.spare(),
            reserve: settings.reserve(),
            buffers: settings.total_buffer_memory(),
            metrics,
            measured: None,
            admitted: 0,
            has_room: true,
            calm: 0,
            warnings: WarningLimit::default(),
        }
    }

    /// Counts a connection. `false`: memory is too short for it.
    pub fn admit(&mut self) -> bool {
        self.admitted += 1;
        if self.admitted >= ADMITTED_MAX {
            self.measure(Instant::now());
        }
        self.has_room
    }

    /// Measures again once [`INTERVAL`] has passed.
    pub fn on_turn(&mut self) {
        let now = Instant::now();
        if self.measured.is_none_or(|last| now - last >= INTERVAL) {
            self.measure(now);
        }
    }

    fn measure(&mut self, now: Instant) {
        (self.measured, self.admitted) = (Some(now), 0);
        // Buffers that are not full yet will be.
        let growth = self.buffers.saturating_sub(self.metrics.buffered());
        let needed = growth.saturating_add(self.reserve);
        let in_groups = self.groups.available(needed).unwrap_or(u64::MAX);
        // Other processes use the machine's memory, too, so only a real shortage counts.
        let in_machine = cgroup::available_memory().unwrap_or(u64::MAX);
        // Memory that the node has freed can stay charged to the cgroup, and is reused. Then the
        // node's own count decides.
        let unused = self.limit.map_or(0, |limit| limit.saturating_sub(self.held()));
        let fits = in_groups >= needed || (in_groups >= self.spare && unused >= needed);
        self.has_room = fits && in_machine >= self.spare / 2;
        self.metrics.readiness.set_memory_short(!self.has_room);
        self.adjust_pressure(in_groups < self.spare / 2 || in_machine < self.spare / 4);
        let pressure = self.metrics.readiness.memory_pressure();
        if (!self.has_room || pressure > 0) && self.warnings.is_due(now) {
            tracing::warn!(
                available = show_size(in_groups.min(in_machine)),
                buffers_may_grow_by = show_size(growth),
                buffers_halved = pressure,
                advice = "add memory (MemoryMax= of the unit), or lower --max-connections",
                "memory is short, new connections get 503"
            );
        }
    }

    /// Bytes that the node holds by its own count.
    fn held(&self) -> u64 {
        let channels = self.metrics.bus.channels.get();
        memory_held(self.metrics.connections(), channels).saturating_add(self.metrics.buffered())
    }

    /// Halves buffers while memory is short, and doubles them again once it has been enough for a
    /// while.
    fn adjust_pressure(&mut self, is_short: bool) {
        let pressure = self.metrics.readiness.memory_pressure();
        self.calm = if is_short { 0 } else { self.calm.saturating_add(1) };
        if is_short && pressure < PRESSURE_MAX {
            self.metrics.readiness.set_memory_pressure(pressure + 1);
        } else if self.calm >= CALM_MIN && pressure > 0 {
            self.calm = 0;
            self.metrics.readiness.set_memory_pressure(pressure - 1);
        }
    }
}
