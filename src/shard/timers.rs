//! What time brings: deadlines, heartbeats, and the end of the node.

use std::collections::HashSet;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::channels::Channel;
use super::join::Asked;
use super::{LINGER, Shard};
use crate::bus::{BusError, Request};
use crate::config::PingFormat;
use crate::protocol::close::CloseReason;
use crate::protocol::frame;
use crate::ws::connection::State;
use crate::ws::handshake;

/// Time between two ticks.
pub(super) const TICK: Duration = Duration::from_millis(100);

/// Ticks between looks at what can wait.
const SECOND: u32 = 10;

/// How long a channel without members is still followed: a page that reloads finds its recent events in memory.
const EMPTY_TIME: Duration = Duration::from_secs(10);

/// A quarter of `--max-channels` is kept free of channels without members. Without this reserve a client that names one
/// new channel after another would leave no room for others.
const CHANNEL_RESERVE_PART: usize = 4;

/// Most channels without members that are examined at once, before sockets get their turn.
const EMPTY_A_TURN: usize = 256;

/// How long a message may take from its first frame to its last.
const MESSAGE_TIME: Duration = Duration::from_secs(10);

/// Clients who must be told by a close that they missed events go at this part of them a tick, at least so many.
const MISSED_PART: usize = 20;
const MISSED_LEAST: usize = 16;

/// Room that lists of connections keep: some 8 KiB each.
const LISTED: usize = 256;

/// The end of the node, spread over some time.
#[derive(Debug)]
pub(super) struct Drain {
    /// When the last connection is told,
    last_told: Instant,
    /// and when whoever is still there is left.
    over: Instant,
    /// Where the walk through the slab stands,
    slot: usize,
    /// and about how many connections are still ahead of it.
    ahead: usize,
}

fn ticks(time: Duration) -> u32 {
    time.as_millis().div_ceil(TICK.as_millis()).try_into().unwrap_or(u32::MAX)
}

impl Shard {
    pub(super) fn on_tick(&mut self) {
        self.tick = self.tick.wrapping_add(1);
        self.numbers().turns.add(1);
        self.limit_partial_messages();
        let now = Instant::now();
        while let Some((due, id)) = self.handshakes.front().copied() {
            let request = |slot: &u32| matches!(self.connections[*slot as usize].state, State::Request(_));
            let late = self.find(id).filter(request);
            if late.is_some() && due > now {
                break;
            }
            // Nearly all have come in long before; five seconds of a storm would be remembered else.
            self.handshakes.pop_front();
            if let Some(slot) = late {
                match self.connections[slot as usize].connection_slot.limit_reached() {
                    Some(limit) => self.refuse(slot, limit.answer(), limit.reason()),
                    None => self.refuse(slot, handshake::too_slow(), CloseReason::RequestTimeout),
                }
            }
        }
        while let Some((due, id)) = self.joining.front().copied() {
            let joining = self.find(id).filter(|slot| self.is_joining(*slot));
            if joining.is_some() && due > now {
                break;
            }
            self.joining.pop_front();
            if joining.is_some() {
                self.refuse_join(id, &BusError::Away("it did not answer in time".into()));
            }
        }
        while let Some((_, id)) = self.lingering.front().copied().filter(|(due, _)| *due <= now) {
            self.lingering.pop_front();
            if let Some(slot) = self.find(id) {
                self.remove(slot);
            }
        }
        for _ in 0..(self.missed.len() / MISSED_PART).max(MISSED_LEAST) {
            let Some(id) = self.missed.pop_front() else { break };
            let missed = |slot: &u32| matches!(self.connections[*slot as usize].state, State::Missed);
            if let Some(slot) = self.find(id).filter(missed) {
                self.end(slot, CloseReason::MissedEvents);
            }
        }
        self.drop_empty_channels(now);
        self.trim();
        let paused = self.next_tick.drain(..).map(|id| (id, Asked::Nothing));
        self.answered.extend(paused);
        self.heartbeats(now);
        self.drain_on(now);
        if self.tick.is_multiple_of(SECOND) {
            self.every_second();
        }
    }

    fn every_second(&mut self) {
        let parked = self.parked.drain(..).map(|id| (id, Asked::Nothing));
        self.answered.extend(parked);
        self.pages.drop_idle(self.tick);
        self.give_back();
        if self.id == 0 {
            self.metrics.rejections.write_overdue();
        }
    }

    /// How many channels the node follows beyond those that leave the reserve free; all where memory is short.
    pub(super) fn excess_channels(&self) -> usize {
        let most = self.settings.max_channels.get();
        let followed = self.metrics.bus.channels.get() as usize;
        if self.context.readiness.is_memory_short() {
            return followed;
        }
        (followed + 1).saturating_sub(most - most / CHANNEL_RESERVE_PART)
    }

    /// Stops following channels without members: each after a while, and the oldest ones at once where the node
    /// follows nearly as many as it may, or memory is short.
    pub(super) fn drop_empty_channels(&mut self, now: Instant) {
        let mut excess = self.excess_channels();
        let joining: HashSet<u32> = self
            .answered
            .iter()
            .filter_map(|(id, _)| Some(self.connections[self.find(*id)? as usize].channel))
            .collect();
        for _ in 0..EMPTY_A_TURN {
            let Some((since, key, serial)) = self.empty_channels.front().copied() else { return };
            let current =
                |channel: &&mut Channel| channel.serial == serial && channel.empty_since == Some(since);
            let Some(channel) = self.channels.get_mut(key as usize).filter(current) else {
                self.empty_channels.pop_front();
                continue;
            };
            if excess == 0 && now.saturating_duration_since(since) < EMPTY_TIME {
                return;
            }
            self.empty_channels.pop_front();
            let waiting = self.pages.has_waiting((key, serial)) || joining.contains(&key);
            if channel.feed.is_none() || !channel.is_empty() || waiting {
                channel.empty_since = Some(now);
                self.empty_channels.push_back((now, key, serial));
                continue;
            }
            excess = excess.saturating_sub(1);
            let channel = channel.name.clone();
            self.drop_channel(key);
            self.ask(Request::Unfollow { channel, shard: self.id });
        }
    }

    /// Gives back what lists took while thousands were in them at once.
    fn give_back(&mut self) {
        self.handshakes.shrink_to(LISTED.max(self.handshakes.len() * 2));
        self.joining.shrink_to(LISTED.max(self.joining.len() * 2));
        self.lingering.shrink_to(LISTED.max(self.lingering.len() * 2));
        self.answered.shrink_to(LISTED.max(self.answered.len() * 2));
        self.missed.shrink_to(LISTED.max(self.missed.len() * 2));
        self.empty_channels.shrink_to(LISTED.max(self.empty_channels.len() * 2));
    }

    /// Looks after a slice of the slab, so that every connection has its turn once a second, and several times in a
    /// short heartbeat: what has no timer of its own (heartbeats, silence, a token's end) is seen here.
    fn heartbeats(&mut self, now: Instant) {
        let heartbeat = ticks(self.settings.ping_interval);
        let timeout = ticks(self.settings.ping_timeout);
        let turns = (heartbeat.min(timeout) / 4).clamp(1, SECOND);
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() as u32);
        let slots = self.connections.capacity();
        for _ in 0..slots.div_ceil(turns as usize) {
            let slot = self.heartbeat_slot;
            self.heartbeat_slot = (slot + 1) % slots;
            if self.heartbeat_slot == 0 {
                let slow = std::mem::take(&mut self.slow);
                self.numbers().slow.set(slow);
                let unsent = std::mem::take(&mut self.unsent);
                self.bound_unsent(unsent);
            }
            let Some(connection) = self.connections.get(slot).filter(|connection| connection.is_open())
            else {
                continue;
            };
            if connection.expires <= seconds {
                self.end(slot as u32, CloseReason::TokenExpired);
                continue;
            }
            self.slow += u64::from(connection.is_behind());
            if connection.blocked && connection.queued() > 0 {
                self.unsent.push(slot as u32);
            }
            self.check_liveness(slot as u32, heartbeat, timeout, now);
        }
    }

    fn check_liveness(&mut self, slot: u32, heartbeat: u32, timeout: u32, now: Instant) {
        let connection = &mut self.connections[slot as usize];
        let format = self.settings.ping_format;
        // Nobody answers a JSON ping: then only a full socket tells of silence, and TCP_USER_TIMEOUT of a dead peer.
        let answers = format != PingFormat::Json || connection.blocked;
        if connection.read_paused && !connection.blocked {
            connection.last_activity = self.tick; // it waits for the bus: nobody reads what it may have said
        }
        let was_blocked = std::mem::replace(&mut connection.was_blocked, connection.blocked);
        if connection.blocked && !was_blocked {
            connection.last_activity = self.tick; // it had room until now
        }
        // A pong comes after everything written before its ping was read. A full socket shows progress by itself.
        let reading_time = if connection.blocked { 0 } else { ticks(connection.reading_time()) };
        let silence = heartbeat.saturating_add(timeout).saturating_add(reading_time);
        if answers && self.tick.wrapping_sub(connection.last_activity) >= silence {
            return self.end(slot, CloseReason::PingTimeout);
        }
        if connection.blocked {
            // Writable comes only when a third of the send buffer is free; a slow reader lives all the same.
            return self.retry_write(slot);
        }
        // What a paused client has begun, it can't end.
        let late = !connection.read_paused
            && now.checked_sub(MESSAGE_TIME).is_some_and(|then| connection.began_before(then));
        if late {
            return self.end(slot, CloseReason::MessageTimeout);
        }
        if self.tick.wrapping_sub(connection.last_ping) < heartbeat {
            return;
        }
        connection.last_ping = self.tick;
        if connection.queued() > 0 {
            return; // it has not taken the last one
        }
        if format != PingFormat::Json {
            connection.ping();
        }
        if format != PingFormat::WebSocket {
            let feed = self.channels[connection.channel as usize].feed.as_ref();
            let position =
                feed.filter(|_| connection.wants_recovery).map(|feed| connection.shown_position(feed));
            connection.enqueue(frame::json_ping(position));
        }
        self.flush(slot);
    }

    pub(super) fn on_drain(&mut self, time: Duration) {
        let now = Instant::now();
        let over = now + time;
        let last_told = over - LINGER.min(time / 4); // the last ones, too, may read and answer
        self.drain = Some(Drain { last_told, over, slot: 0, ahead: self.connections.len() });
        self.drain_on(now);
    }

    /// Closes as many connections as it takes to have told all in time, so many each tick.
    fn drain_on(&mut self, now: Instant) {
        let Some(drain) = &mut self.drain else { return };
        let ticks = drain.last_told.saturating_duration_since(now).as_millis().div_ceil(TICK.as_millis());
        let last = ticks == 0;
        let mut due = if last { usize::MAX } else { drain.ahead.div_ceil(ticks as usize) };
        drain.ahead = drain.ahead.saturating_sub(due);
        let mut slot = drain.slot;
        while slot < self.connections.capacity() && due > 0 {
            due -= usize::from(self.drain_slot(slot, last));
            slot += 1;
        }
        if let Some(drain) = &mut self.drain {
            drain.slot = if last { 0 } else { slot };
        }
    }

    /// Ends what is in a slot because the node stops. `false`: there is nothing to end. Who has not asked yet gets
    /// the answer when it asks, and only at the `last` moment unasked.
    fn drain_slot(&mut self, slot: usize, last: bool) -> bool {
        match self.connections.get(slot).map(|connection| &connection.state) {
            None | Some(State::Closing { .. }) => return false,
            Some(State::Request(_)) if !last => return false,
            Some(State::Request(_) | State::Joining(_)) => {
                self.answer(slot as u32, handshake::stopping(), CloseReason::Draining);
            }
            Some(State::Live | State::Replay(_) | State::Missed) => {
                self.end(slot as u32, CloseReason::Draining)
            }
        }
        true
    }

    /// Whether the node is stopping and this shard has nothing left to do.
    pub(super) fn has_ended(&self) -> bool {
        let Some(drain) = &self.drain else { return false };
        self.connections.is_empty() || Instant::now() >= drain.over
    }
}
