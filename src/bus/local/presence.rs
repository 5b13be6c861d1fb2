//! Which users are in the channels of `--presence`, on a single node.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use crate::bus::PresencePage;
use crate::bus::presence::{Lingering, NodeUsers};
use crate::protocol::event::ChannelName;

#[derive(Debug)]
pub(super) struct LocalPresence {
    channels: HashMap<ChannelName, NodeUsers>,
    lingering: Lingering,
}

impl LocalPresence {
    pub(super) fn new(lingering: Lingering) -> LocalPresence {
        LocalPresence { channels: HashMap::new(), lingering }
    }

    /// Number of users, counted once in each channel.
    pub(super) fn users(&self) -> usize {
        self.channels.values().map(NodeUsers::len).sum()
    }

    /// A user has become present on a shard, or is no more.
    pub(super) fn on_user(&mut self, name: ChannelName, user: Arc<str>, present: bool, now: Instant) {
        if present {
            let users = self.channels.entry(name).or_default();
            users.enter(user);
            return store(users);
        }
        let Some(users) = self.channels.get_mut(&name) else { return };
        if users.leave(&user, now) {
            self.lingering.push(now, name, user);
        }
    }

    /// Removes users who linger no more.
    pub(super) fn expire(&mut self, now: Instant) {
        while let Some((left, name, user)) = self.lingering.pop_due(now) {
            let Some(users) = self.channels.get_mut(&name) else { continue };
            users.expire(&user, left);
            store(users);
            if users.is_empty() {
                self.channels.remove(&name);
            }
        }
        self.channels.shrink_to(2 * self.channels.len());
        self.lingering.shrink();
    }

    pub(super) fn page(&self, name: &ChannelName, after: Option<&str>, limit: usize) -> PresencePage {
        let Some(channel) = self.channels.get(name) else { return PresencePage::default() };
        let mut rest = channel.present_after(after);
        let users: Vec<Arc<str>> = rest.by_ref().take(limit).cloned().collect();
        let next = rest.next().and(users.last()).map(|user| user.to_string());
        PresencePage { users, count: channel.len() as u64, next }
    }
}

/// All changes are stored at once: users are absent or in the list.
fn store(users: &mut NodeUsers) {
    let changes = users.next_changes(usize::MAX);
    users.on_stored(&changes);
}
