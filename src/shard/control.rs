//! Commands of backends about the connections of users.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use bytes::BytesMut;

use super::Shard;
use super::subscribe::DISCONNECTED;
use crate::protocol::close::CloseReason;
use crate::protocol::event::ChannelName;
use crate::protocol::frame::{self, ErrorCode};
use crate::ws::connection::State;
use crate::ws::handshake::rejections;

/// What is to happen to the connections of a user.
#[derive(Debug, Default)]
struct Disconnect {
    /// Close all of them, for this reason.
    all: Option<CloseReason>,
    /// Stop following these channels.
    channels: Vec<ChannelName>,
}

/// Commands of one turn. They are executed together, by one pass over the connections.
#[derive(Debug, Default)]
pub(super) struct Commands {
    users: HashMap<Arc<str>, Disconnect>,
    /// Close the connections of these users, who are banned.
    pub banned: Option<Arc<HashSet<Arc<str>>>>,
}

impl Commands {
    fn is_empty(&self) -> bool {
        self.users.is_empty() && self.banned.is_none()
    }
}

impl Shard {
    pub(super) fn on_disconnect(
        &mut self,
        user: Arc<str>,
        channel: Option<ChannelName>,
        reason: CloseReason,
    ) {
        let disconnect = self.commands.users.entry(user).or_default();
        match channel {
            Some(channel) => disconnect.channels.push(channel),
            None => disconnect.all = Some(reason),
        }
    }

    /// Executes the commands of this turn, before its sockets are handled and members admitted.
    pub(super) fn run_commands(&mut self) {
        if self.commands.is_empty() {
            return;
        }
        let Commands { users, banned } = std::mem::take(&mut self.commands);
        for slot in 0..self.connections.end() {
            let Some(connection) = self.connections.get(slot) else { continue };
            // A connection has its user from the moment when it starts to join. Before that its
            // handshake finds the ban.
            let user = &*connection.client.user;
            if user.is_empty() {
                continue;
            }
            let disconnect = users.get(user);
            let is_banned = banned.as_ref().is_some_and(|banned| banned.contains(user));
            let reason = disconnect.and_then(|disconnect| disconnect.all);
            if let Some(reason) = reason.or(is_banned.then_some(CloseReason::Banned)) {
                self.disconnect(slot, reason);
            } else if let Some(disconnect) = disconnect {
                for channel in &disconnect.channels {
                    self.disconnect_from(slot, channel);
                }
            }
        }
    }

    /// Closes a connection with a close frame, even while it waits to join. Events that came before
    /// the command are written first: one of them may tell the user why.
    fn disconnect(&mut self, slot: u32, reason: CloseReason) {
        let State::Joining(join) = &self.connections[slot].state else {
            self.flush_all(slot);
            return self.close(slot, reason);
        };
        let mut bytes = BytesMut::from(&join.response[..]);
        if let Some((code, text)) = reason.close() {
            bytes.extend_from_slice(&frame::close(code, text));
        }
        self.reject_with(slot, &rejections::disconnected(reason), bytes.freeze());
    }

    /// Stops following a channel for a connection. One with this default channel is closed.
    fn disconnect_from(&mut self, slot: u32, channel: &ChannelName) {
        let default = match &self.connections[slot].state {
            State::Joining(join) => join.channel.as_ref(),
            _ => self.default_channel(slot),
        };
        if default == Some(channel) {
            return self.disconnect(slot, CloseReason::Disconnected);
        }
        let Some(number) = self.find_subscription(slot, channel) else { return };
        if self.connections.is_joining(number) {
            return self.reject_subscription(number, ErrorCode::Forbidden, DISCONNECTED);
        }
        self.flush(number);
        if self.connections.find_subscription(number).is_none() {
            return; // the socket is dead
        }
        self.end_subscription(number);
        self.connections[slot].enqueue(frame::unsubscribed(channel, "disconnected", None));
        self.write_later(slot);
    }
}
