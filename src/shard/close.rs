//! Closing connections.

use bytes::Bytes;

use super::Shard;
use crate::http::{Rejection, Response};
use crate::metrics::rejections::RejectionClass;
use crate::protocol::close::CloseReason;
use crate::ws::connection::State;

impl Shard {
    /// Closes a connection: it leaves its channel, and its last frames are written. The socket
    /// stays until the peer has closed its side, too.
    pub(super) fn close(&mut self, slot: u32, reason: CloseReason) {
        if matches!(self.connections[slot].state, State::Closing { .. } | State::Discarded) {
            return;
        }
        let key = self.leave(slot);
        self.metrics().closed_by_reason[reason as usize].add(1);
        let connection = &mut self.connections[slot];
        tracing::debug!(
            reason = reason.label(),
            user = &*connection.client.user,
            client = connection.client_address().map(tracing::field::display),
            channel = key.map(|key| self.channels[key].name.name.as_str()),
            "closed connection"
        );
        connection.close(reason);
        if connection.inbound.resume() {
            self.read_later(slot);
        }
        let connection = &mut self.connections[slot];
        let feed = key.and_then(|key| self.channels[key].feed.as_ref());
        let is_writable = reason != CloseReason::ConnectionLost && connection.finish(feed, &mut self.tally);
        // The response to a connection over a limit can't be cut short by a reset: its request has
        // been read.
        let limit = connection.connection_slot.limit_reached();
        let is_answered =
            !connection.socket.is_blocked() && limit.is_some_and(|limit| limit.reason() == reason);
        // A peer that was silent for so long gets no more time. The kernel still sends what it has.
        let is_silent = matches!(reason, CloseReason::PingTimeout | CloseReason::SlowReader);
        if !is_writable || is_answered || is_silent {
            return self.connections.discard(slot);
        }
        if connection.socket.is_blocked() {
            self.register_writable(slot);
        }
        self.deadlines.closing.push(self.connections.id(slot), self.tick, &self.connections);
    }

    /// Sends the response to a rejected client, logs the rejection, and closes the connection.
    pub(super) fn reject(&mut self, slot: u32, rejection: &Rejection) {
        self.reject_with(slot, rejection, Response::from(rejection).to_bytes(false));
    }

    /// As [`Shard::reject`], with these bytes in place of the response. They count as one, so that
    /// rejections are counted alike for all clients.
    pub(super) fn reject_with(&mut self, slot: u32, rejection: &Rejection, bytes: Bytes) {
        let class = RejectionClass::of("request", rejection);
        match self.connections[slot].client_address() {
            // The operator needs the address for --trusted-proxy.
            Some(peer) if rejection.reason == CloseReason::ProxyNotTrusted => {
                let text = format!("{} (the peer is {peer})", rejection.text);
                self.context.metrics.rejections.record(class, &text);
            }
            _ => self.context.metrics.rejections.record(class, rejection.log_text()),
        }
        self.answer(slot, rejection.status, bytes, rejection.reason);
    }

    /// Sends an HTTP response and closes the connection.
    pub(super) fn respond(&mut self, slot: u32, response: &Response, reason: CloseReason) {
        self.answer(slot, response.status(), response.to_bytes(false), reason);
    }

    fn answer(&mut self, slot: u32, status: u16, bytes: Bytes, reason: CloseReason) {
        if status >= 400 {
            self.metrics().count_rejection(status);
        }
        self.connections[slot].enqueue(bytes);
        self.close(slot, reason);
    }

    /// Removes a connection from its channels. Returns the key of its default channel if it was a
    /// member there.
    fn leave(&mut self, slot: u32) -> Option<u32> {
        if let Some(set) = self.connections.take_set(slot) {
            for number in set.subscriptions {
                self.end_subscription(number);
            }
        }
        let connection = &self.connections[slot];
        if !connection.is_member() {
            return None;
        }
        let key = connection.membership.channel;
        self.remove_member(key, slot);
        Some(key)
    }

    /// Registers interest in the socket being writable again.
    pub(super) fn register_writable(&mut self, slot: u32) {
        let is_new = self.connections[slot].socket.register_write();
        if is_new && self.connections.register_writable(slot).is_err() {
            self.abort(slot); // without an event it would wait forever
        }
    }

    /// Closes a connection whose socket is dead.
    pub(super) fn abort(&mut self, slot: u32) {
        match self.connections[slot].state {
            State::Closing { .. } => self.connections.discard(slot),
            _ => self.close(slot, CloseReason::ConnectionLost),
        }
    }

    /// Frees the slots of discarded connections, with everything that they held. Every connection
    /// ends here, once.
    pub(super) fn free_discarded(&mut self) {
        while let Some(connection) = self.connections.free_discarded() {
            self.context.handshake.limits.release(connection.connection_slot, &connection.client.user);
            self.metrics().closed.add(1);
        }
    }
}
