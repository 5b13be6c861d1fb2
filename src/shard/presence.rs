//! Which users have members in the channels of `--presence`, for the bus.

use super::Shard;
use crate::bus::Request;

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
        if is_last && self.channels[key].tracks_presence {
            self.report_user(key, number, false);
        }
    }

    fn report_user(&self, key: u32, number: u32, present: bool) {
        let (channel, user) = (self.channels[key].name.name.clone(), self.connections.user(number).into());
        self.request_bus(Request::Presence { channel, user, present });
    }
}
