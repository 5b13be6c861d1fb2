//! The connections of a user, for the admin API.

use super::Shard;
use super::mailbox::{ConnectionList, ListConnections, ListedConnection};
use crate::protocol::event::{ChannelName, EventId};
use crate::ws::connection::State;

/// Slots that one answer covers: some 20 µs of the shard's time.
const SLOTS_LISTED: u32 = 256;

impl Shard {
    pub(super) fn list_connections(&mut self, request: &ListConnections) -> ConnectionList {
        let end = self.connections.end().min(request.from.saturating_add(SLOTS_LISTED));
        let mut connections = Vec::new();
        for slot in request.from..end {
            let of_user =
                self.connections.get(slot).filter(|connection| *connection.client.user == *request.user);
            let Some(connection) = of_user.filter(|it| !matches!(it.state, State::Closing { .. })) else {
                continue;
            };
            let listed = ListedConnection {
                slot,
                channels: Vec::new(),
                client: connection.client_address(),
                minutes_connected: connection.liveness.minutes_connected(self.tick),
                queued: connection.queued(),
            };
            connections.push(ListedConnection { channels: self.followed_channels(slot), ..listed });
        }
        ConnectionList { connections, next: (end < self.connections.end()).then_some(end) }
    }

    /// The default channel of a connection and its subscriptions, with their positions.
    fn followed_channels(&mut self, slot: u32) -> Vec<(ChannelName, Option<EventId>)> {
        let mut channels = Vec::new();
        if let State::Joining(join) = &self.connections[slot].state {
            channels.extend(join.channel.clone().map(|channel| (channel, None)));
        } else if self.connections[slot].is_member() {
            channels.push(self.member_position(slot));
        }
        for number in self.connections.set(slot).map_or_else(Vec::new, |set| set.subscriptions.clone()) {
            match self.connections.awaited_channel(number).cloned() {
                Some(channel) => channels.push((channel, None)),
                None => channels.push(self.member_position(number)),
            }
        }
        channels
    }

    fn member_position(&mut self, number: u32) -> (ChannelName, Option<EventId>) {
        let channel = &self.channels[self.connections.membership(number).channel];
        let position = self.connections.shown_position(number, channel.feed());
        (channel.name.name.clone(), Some(position))
    }
}
