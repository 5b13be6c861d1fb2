//! What a shard does at every tick, and once a second.

use std::collections::HashSet;
use std::hint;
use std::time::{Duration, Instant};

use super::Shard;
use crate::bus::{BusError, Request};
use crate::protocol::close::CloseReason;
use crate::ws::connection::State;
use crate::ws::handshake::rejections;
use crate::ws::liveness::TICKS_A_MINUTE;

/// Time between two ticks.
pub(super) const TICK: Duration = Duration::from_millis(100);

const _: () = assert!(TICK.as_millis() as u32 * TICKS_A_MINUTE == 60_000);

/// Ticks in a second.
pub(super) const SECOND: u32 = 10;

/// How long a channel without members is still followed: a page that reloads finds its recent
/// events in memory.
const EMPTY_TIME: Duration = Duration::from_secs(10);

/// A quarter of `--max-channels` is kept free of channels without members. Without this reserve a
/// client that names one new channel after another would use up the limit.
const CHANNEL_RESERVE_PART: usize = 4;

/// Most channels without members that are examined in one turn.
const EMPTY_A_TURN: usize = 256;

/// Connections that missed events are closed at this part of them a tick.
const MISSED_PART: usize = 20;

/// Least number of them a tick.
const MISSED_LEAST: usize = 16;

/// More than the allocator takes from a page that blocks share.
const OWN_PAGE: usize = 1 << 20;

/// Has the allocator return memory to the kernel that any thread freed at least a second ago. It does
/// so only when a page is freed, which nothing in an idle node would cause.
fn return_freed_memory() {
    drop(hint::black_box(Vec::<u8>::with_capacity(OWN_PAGE)));
}

/// A time in ticks, rounded up.
pub(super) fn ticks(time: Duration) -> u32 {
    time.as_millis().div_ceil(TICK.as_millis()).try_into().unwrap_or(u32::MAX)
}

impl Shard {
    pub(super) fn on_tick(&mut self) {
        self.tick = self.tick.wrapping_add(1);
        self.metrics().ticks.add(1);
        self.limit_partial_messages();
        let now = Instant::now();
        self.check_deadlines();
        self.close_missed();
        self.drop_empty_channels(now);
        self.evict();
        self.resume_throttled();
        self.sweep(now);
        self.continue_drain(now);
        if self.tick.is_multiple_of(SECOND) {
            self.on_second();
        }
    }

    fn on_second(&mut self) {
        self.resume_failed();
        self.send_missed_presence();
        self.replay.pages.drop_idle(self.tick);
        self.deadlines.shrink();
        self.deferred.shrink();
        self.channels.shrink();
        self.connections.shrink();
        if self.context.id == 0 {
            return_freed_memory();
            self.context.metrics.rejections.write_overdue();
        }
    }

    fn check_deadlines(&mut self) {
        while let Some(slot) = self.deadlines.requests.pop_due(self.tick, &self.connections) {
            match self.connections[slot].connection_slot.limit_reached() {
                Some(limit) => self.reject(slot, limit.rejection()),
                None => self.reject(slot, &rejections::timeout()),
            }
        }
        while let Some(number) = self.deadlines.joins.pop_due(self.tick, &self.connections) {
            self.reject_join(number, &BusError::Unavailable("it did not answer in time".into()));
        }
        while let Some(slot) = self.deadlines.closing.pop_due(self.tick, &self.connections) {
            self.connections.discard(slot);
        }
    }

    /// Closes some of the connections that missed events: clients without recovery frames
    /// notice only that. If all were closed at once, all would reconnect at once.
    fn close_missed(&mut self) {
        for _ in 0..(self.deferred.missed.len() / MISSED_PART).max(MISSED_LEAST) {
            let Some(id) = self.deferred.missed.pop_front() else { break };
            if let Some(slot) = self.connections.find(id)
                && matches!(self.connections[slot].state, State::Missed)
            {
                self.close(slot, CloseReason::MissedEvents);
            }
        }
    }

    /// How many channels the node follows beyond those that leave the reserve free; all if memory
    /// is short.
    pub(super) fn excess_channels(&self) -> usize {
        let most = self.settings().max_channels.get();
        let followed = self.context.metrics.bus.channels.get() as usize;
        if self.context.handshake.readiness.is_memory_short() {
            return followed;
        }
        (followed + 1).saturating_sub(most - most / CHANNEL_RESERVE_PART)
    }

    /// Stops following channels without members: each after a while, and the oldest ones at once if
    /// the node follows nearly as many as it may, or memory is short.
    pub(super) fn drop_empty_channels(&mut self, now: Instant) {
        let mut excess = self.excess_channels();
        // Looked for only when a channel may be dropped: thousands may have been answered.
        let mut joining: Option<HashSet<u32>> = None;
        for _ in 0..EMPTY_A_TURN {
            let Some((since, id)) = self.channels.oldest_empty() else { return };
            if excess == 0 && now.saturating_duration_since(since) < EMPTY_TIME {
                return;
            }
            let channel = &self.channels[id.key];
            let joining = joining.get_or_insert_with(|| {
                let answered = self.deferred.answered.iter();
                let numbers = answered.filter_map(|(id, _)| self.connections.find(*id));
                numbers.map(|number| self.connections.membership(number).channel).collect()
            });
            let is_waited_for = self.replay.pages.has_waiting(id) || joining.contains(&id.key);
            if channel.feed.is_none() || !channel.is_empty() || is_waited_for {
                self.channels.keep_empty(id.key, now);
                continue;
            }
            excess = excess.saturating_sub(1);
            let channel = channel.name.clone();
            self.drop_channel(id.key);
            self.request_bus(Request::Unfollow { channel, shard: self.context.id });
        }
    }
}
