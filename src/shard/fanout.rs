//! Fan-out: entries from the bus go to the feed of their channel, and from there to its members.

use std::time::Instant;

use super::Shard;
use crate::protocol::event::Entry;
use crate::protocol::form::ChannelForm;

/// Most writes of fan-outs in a row. Writes are counted, not connections, since a connection with
/// many small entries before it takes many writes.
pub(super) const WRITES: u64 = 256;

impl Shard {
    /// Appends the next entry of a channel to its feed, and has it delivered.
    pub(super) fn on_entry(&mut self, name: &ChannelForm, entry: Entry, arrived: Instant) {
        let Some(key) = self.channels.key(name) else { return };
        self.channels.append(key, entry, arrived, self.now, &self.connections);
        self.evict();
    }

    /// Evicts the oldest entries of all feeds until the rest fits into this shard's part of
    /// `--buffer-memory`.
    pub(super) fn evict(&mut self) {
        let part = self.settings().buffer_memory() / self.settings().shards.get();
        let limit = part >> self.context.handshake.readiness.memory_pressure();
        self.channels.evict(limit, &mut self.connections, &mut self.tally);
    }

    /// Continues the fan-outs under way once other work has had its part of the time.
    pub(super) fn maybe_run_fanout(&mut self) {
        if self.channels.has_fanout() && Instant::now() >= self.next_fanout {
            self.run_fanout();
        }
    }

    /// Continues the fan-outs under way, for at most [`WRITES`]. After it other work gets as much
    /// time: a fan-out takes at most twice as long in a storm of reconnecting clients, and the storm
    /// goes on even if live events could use the whole core.
    pub(super) fn run_fanout(&mut self) {
        if self.channels.has_fanout() {
            let start = Instant::now();
            self.visit_members(WRITES);
            let end = Instant::now();
            self.next_fanout = end + (end - start);
        }
    }

    /// Makes the next visits, for at most `budget` writes. A visit without a write counts as one,
    /// too.
    pub(super) fn visit_members(&mut self, mut budget: u64) {
        while let Some(key) = self.channels.current_fanout(self.now, &self.connections) {
            if budget == 0 {
                return self.channels.rotate_fanouts();
            }
            let before = self.tally.writes;
            if let Some(number) = self.channels[key].next_visit(&self.connections) {
                self.visit(number);
            }
            budget = budget.saturating_sub((self.tally.writes - before).max(1));
        }
    }

    /// Writes to a member that a fan-out visits, unless its socket is full.
    fn visit(&mut self, number: u32) {
        let socket = &self.connections[self.connections.owner(number)].socket;
        if !socket.is_blocked() {
            if self.connections.is_live(number) {
                self.flush(number);
            }
        } else if socket.carries_set {
            // Another of its channels may have filled the socket.
            self.connections.progress_mut(number).mark_behind();
        }
    }

    /// Records how long the fan-outs took that were completed in this turn. One reading of the
    /// clock is enough for a turn, and a reading for each would slow single events down.
    pub(super) fn record_latencies(&mut self, now: Instant) {
        let metrics = &self.context.metrics.shards[self.context.id];
        for fanout in self.channels.completed_fanouts() {
            if let Some(started) = fanout.started {
                metrics.fanout_times.observe(now.saturating_duration_since(started));
            }
            metrics.latencies.observe(now.saturating_duration_since(fanout.arrived));
        }
    }
}
