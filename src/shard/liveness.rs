//! Pings, and connections that are silent: the slots are walked through once a second.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;

use super::Shard;
use super::timers::{SECOND, ticks};
use crate::config::PingFormat;
use crate::protocol::close::CloseReason;
use crate::protocol::frame;

/// Time from the first frame of a message to its last.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long before its token expires a client gets `token_expiring`, in seconds.
const EXPIRY_NOTICE: u32 = 60;

/// A walk through the slots, a part of them at every tick.
#[derive(Debug, Default)]
pub(super) struct Sweep {
    /// The slot to check next.
    slot: u32,
    /// Connections that are behind, counted so far.
    behind: u64,
}

impl Shard {
    /// Checks a part of the slots, so that every connection has its turn once a second, and several
    /// times in a short ping interval. It stands for timers of connections: pings, silence and the
    /// expiry of tokens.
    pub(super) fn sweep(&mut self, now: Instant) {
        let interval = ticks(self.settings().ping_interval);
        let timeout = ticks(self.settings().ping_timeout);
        let turns = (interval.min(timeout) / 4).clamp(1, SECOND);
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH);
        let seconds = since_epoch.map_or(0, |since| since.as_secs() as u32);
        let slots = self.connections.end();
        for _ in 0..slots.div_ceil(turns) {
            let slot = self.sweep.slot;
            self.sweep.slot = (slot + 1) % slots;
            if self.sweep.slot == 0 {
                self.complete_sweep();
            }
            let Some(connection) = self.connections.get(slot).filter(|connection| connection.is_open())
            else {
                continue;
            };
            let expires = connection.client.expires;
            if expires <= seconds {
                self.close(slot, CloseReason::TokenExpired);
                continue;
            }
            self.sweep.behind += u64::from(connection.is_behind());
            let carries_set = connection.socket.carries_set;
            if connection.socket.is_blocked() && connection.queued() > 0 {
                self.unsent.listed.push(slot);
            }
            if carries_set {
                self.resume_next_reader(slot); // none is ever forgotten
            }
            self.check_liveness(slot, interval, timeout, now);
            if expires <= seconds.saturating_add(EXPIRY_NOTICE) {
                self.announce_expiry(slot, seconds);
            }
        }
    }

    /// Sends `token_expiring` to an open connection, once for each token.
    fn announce_expiry(&mut self, slot: u32, now: u32) {
        let connection = &mut self.connections[slot];
        let is_told = std::mem::replace(&mut connection.client.knows_expiry, true);
        if !is_told && connection.client.is_json() && connection.is_open() {
            connection.enqueue(frame::token_expiring(connection.client.expires - now));
            self.flush(slot);
        }
    }

    /// A ping with the positions of a client that wants them.
    pub(super) fn positions_ping(&mut self, slot: u32) -> Bytes {
        let connection = &self.connections[slot];
        let feed = match connection.is_member() && connection.client.wants_recovery() {
            true => self.channels[connection.membership.channel].feed.as_ref(),
            false => None,
        };
        let position = feed.map(|feed| self.connections.shown_position(slot, feed));
        let mut positions = Vec::new();
        for number in self.connections.set(slot).map_or_else(Vec::new, |set| set.subscriptions.clone()) {
            if !self.connections.is_joining(number) {
                let key = self.connections.membership(number).channel;
                let position = self.connections.shown_position(number, self.channels[key].feed());
                positions.push((key, position));
            }
        }
        let channels = positions.into_iter().map(|(key, at)| (&self.channels[key].name.name, at));
        frame::json_ping(position, channels)
    }

    fn complete_sweep(&mut self) {
        let behind = std::mem::take(&mut self.sweep.behind);
        self.metrics().slow.set(behind);
        let listed = std::mem::take(&mut self.unsent.listed);
        self.limit_unsent(listed.into_iter());
    }

    /// Closes a connection that is silent for too long, and pings one whose ping is due. `interval`
    /// and `timeout` are those of pings, in ticks.
    fn check_liveness(&mut self, slot: u32, interval: u32, timeout: u32, now: Instant) {
        let format = self.settings().ping_format;
        let connection = &mut self.connections[slot];
        let is_blocked = connection.socket.is_blocked();
        let is_paused = connection.inbound.is_paused();
        connection.liveness.observe(is_blocked, is_paused, self.tick);
        // Clients don't answer JSON pings. Then only a full socket shows silence, and
        // TCP_USER_TIMEOUT a dead peer.
        let answers = format != PingFormat::Json || is_blocked;
        // A pong follows everything that was written before its ping. A full socket shows progress
        // by itself.
        let reading_time = if is_blocked { 0 } else { ticks(connection.liveness.reading_time()) };
        let allowed = interval.saturating_add(timeout).saturating_add(reading_time);
        if answers && connection.liveness.silence(self.tick) >= allowed {
            return self.close(slot, CloseReason::PingTimeout);
        }
        if is_blocked {
            // epoll reports it only when a third of the send buffer is free. A slow reader takes
            // bytes before that.
            return self.retry_write(slot);
        }
        // A client that is not read from can't complete its message.
        let is_late = !is_paused
            && now.checked_sub(MESSAGE_TIMEOUT).is_some_and(|then| connection.has_partial_since(then));
        if is_late {
            return self.close(slot, CloseReason::MessageTimeout);
        }
        if !connection.liveness.take_due_ping(interval, self.tick) {
            return;
        }
        if connection.queued() > 0 {
            return; // the last ping is still queued
        }
        if format != PingFormat::Json {
            connection.ping();
        }
        if format != PingFormat::WebSocket {
            let ping = self.positions_ping(slot);
            self.connections[slot].enqueue(ping);
        }
        self.flush(slot);
    }
}
