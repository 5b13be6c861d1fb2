//! Which users have members in the channels of `--presence`, for the bus; and what the bus says about
//! who is in a channel, for the members that asked for it.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::Shard;
use super::channels::ChannelId;
use crate::bus::{PresenceUpdate, Request};
use crate::protocol::form::ChannelForm;

/// The members of a channel that asked who is in it.
#[derive(Debug, Default)]
pub struct PresenceMembers {
    /// Each with the number of the last update that it was sent; 0: none.
    members: BTreeMap<u32, u64>,
    latest: Option<Arc<PresenceUpdate>>,
    /// Some have a full socket, and are sent the list once it takes bytes again.
    are_behind: bool,
}

impl Shard {
    /// Adds a member to its channel.
    pub(super) fn add_member(&mut self, key: u32, number: u32) {
        let is_first = self.channels.add_member(key, number, &mut self.connections);
        if is_first && self.channels[key].tracks_presence {
            self.report_user(key, number, true);
        }
    }

    /// Removes a member from its channel.
    pub(super) fn remove_member(&mut self, key: u32, number: u32) {
        let is_last = self.channels.remove_member(key, number, &mut self.connections);
        let channel = &mut self.channels[key];
        if !channel.tracks_presence {
            return;
        }
        let left_last = |presence: &mut Box<PresenceMembers>| {
            presence.members.remove(&number);
            presence.members.is_empty()
        };
        if channel.presence.take_if(left_last).is_some() {
            self.request_presence(key, false);
        }
        if is_last {
            self.report_user(key, number, false);
        }
    }

    fn report_user(&self, key: u32, number: u32, present: bool) {
        let (channel, user) = (self.channels[key].name.name.clone(), self.connections.user(number).into());
        self.request_bus(Request::Presence { channel, user, present });
    }

    fn request_presence(&self, key: u32, follow: bool) {
        let channel = self.channels[key].name.clone();
        self.request_bus(Request::FollowPresence { channel, shard: self.context.id, follow });
    }

    /// Sends a member who is in its channel: now if that is known, and every change.
    pub(super) fn follow_presence(&mut self, key: u32, number: u32) {
        let channel = &mut self.channels[key];
        let is_first = channel.presence.is_none();
        let presence = channel.presence.get_or_insert_default();
        presence.members.insert(number, 0);
        let known = presence.latest.is_some();
        if is_first {
            self.request_presence(key, true);
        } else if known {
            self.send_presence(key, Some(number));
        }
    }

    pub(super) fn on_presence(&mut self, name: &ChannelForm, update: Arc<PresenceUpdate>) {
        let Some(key) = self.channels.key(name) else { return };
        let Some(presence) = &mut self.channels[key].presence else { return };
        presence.latest = Some(update);
        self.send_presence(key, None);
    }

    /// Sends the latest update to one member, or to all that have not got it. A member with a full
    /// socket is skipped: of all the updates meanwhile it gets one, the list.
    fn send_presence(&mut self, key: u32, only: Option<u32>) {
        let channel = &mut self.channels[key];
        let id = channel.id;
        let Some(mut presence) = channel.presence.take_if(|presence| presence.latest.is_some()) else {
            return;
        };
        let latest = presence.latest.clone().expect("it was just seen");
        let (start, end) = only.map_or((0, u32::MAX), |number| (number, number));
        let mut is_behind = false;
        for (number, sent) in presence.members.range_mut(start..=end) {
            let owner = self.connections.owner(*number);
            if *sent == latest.number {
                continue;
            } else if self.connections[owner].socket.is_blocked() {
                is_behind = true;
                continue;
            }
            let frame = if *sent + 1 == latest.number { &latest.change } else { latest.whole() };
            self.connections[owner].enqueue(frame.clone());
            *sent = latest.number;
            self.write_later(owner);
        }
        if is_behind && !presence.are_behind {
            presence.are_behind = true;
            self.presence_behind.push(id);
        }
        self.channels[key].presence = Some(presence);
    }

    /// Sends the list to members whose sockets were full.
    pub(super) fn send_missed_presence(&mut self) {
        for ChannelId { key, generation } in std::mem::take(&mut self.presence_behind) {
            let is_held = self.channels.get(ChannelId { key, generation }).is_some();
            if is_held && let Some(presence) = &mut self.channels[key].presence {
                presence.are_behind = false;
                self.send_presence(key, None);
            }
        }
    }
}
