//! Which users are in the channels of `--presence`, on a single node.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Instant;

use crate::bus::presence::{Audience, Lingering, NodeUsers, Snapshot};
use crate::bus::{Follower, PresencePage, ShardSender};
use crate::config::Settings;
use crate::protocol::event::ChannelName;

/// A channel with users.
#[derive(Debug, Default)]
struct TrackedChannel {
    users: NodeUsers,
    audience: Audience,
}

#[derive(Debug)]
pub(super) struct LocalPresence {
    channels: HashMap<ChannelName, TrackedChannel>,
    lingering: Lingering,
    /// Channels that have changed since their followers were sent an update.
    changed: HashSet<ChannelName>,
    user_count: usize,
    /// `--presence-list`
    list_max: usize,
}

impl LocalPresence {
    pub(super) fn new(settings: &Settings) -> LocalPresence {
        LocalPresence {
            channels: HashMap::new(),
            lingering: Lingering::new(settings),
            changed: HashSet::new(),
            user_count: 0,
            list_max: settings.presence_list,
        }
    }

    /// Number of users, counted once in each channel.
    pub(super) fn users(&self) -> usize {
        self.user_count
    }

    /// A user's first member on a shard has joined, or the last has left.
    pub(super) fn on_user(&mut self, name: ChannelName, user: Arc<str>, present: bool, now: Instant) {
        if present {
            let users = &mut self.channels.entry(name.clone()).or_default().users;
            self.user_count -= users.len();
            let left = users.enter(user.clone());
            self.user_count += users.len();
            self.store(&name);
            if let Some(left) = left {
                self.lingering.remove(left, name, user);
            }
            return;
        }
        let Some(channel) = self.channels.get_mut(&name) else { return };
        if channel.users.leave(&user, now) {
            self.lingering.push(now, name, user);
        }
    }

    /// All changes are stored at once: users are absent or in the list.
    fn store(&mut self, name: &ChannelName) {
        let Some(channel) = self.channels.get_mut(name) else { return };
        self.user_count -= channel.users.len();
        let changes = channel.users.next_changes(usize::MAX);
        channel.users.on_stored(&changes);
        self.user_count += channel.users.len();
        if !changes.is_empty() && !channel.audience.is_empty() {
            self.changed.insert(name.clone());
        }
        if channel.users.is_empty() && channel.audience.is_empty() {
            self.channels.remove(name);
        }
    }

    pub(super) fn follow(
        &mut self,
        name: &ChannelName,
        follower: Follower,
        follow: bool,
        shards: &dyn ShardSender,
    ) {
        if follow {
            let channel = self.channels.entry(name.clone()).or_default();
            if channel.audience.is_empty() {
                self.changed.insert(name.clone());
            }
            channel.audience.add(name, follower, shards);
        } else if let Some(channel) = self.channels.get_mut(name) {
            channel.audience.remove(follower);
        }
    }

    /// Removes users whose linger time is over, and sends what has changed.
    pub(super) fn on_tick(&mut self, now: Instant, shards: &dyn ShardSender) {
        while let Some((left, name, user)) = self.lingering.pop_due(now) {
            if let Some(channel) = self.channels.get_mut(&name) {
                channel.users.expire(&user, left);
                self.store(&name);
            }
        }
        for name in std::mem::take(&mut self.changed) {
            let Some(TrackedChannel { users, audience }) = self.channels.get_mut(&name) else { continue };
            if !audience.is_empty() {
                let read = match users.len() <= audience.list_max(self.list_max) {
                    true => Snapshot::All(users.present_after(None).cloned().collect()),
                    false => Snapshot::Count(users.len() as u64),
                };
                audience.update(&name, read, true, shards);
            }
        }
        self.channels.shrink_to(2 * self.channels.len());
    }

    pub(super) fn page(&self, name: &ChannelName, after: Option<&str>, limit: usize) -> PresencePage {
        let Some(channel) = self.channels.get(name) else { return PresencePage::default() };
        let mut rest = channel.users.present_after(after);
        let users: Vec<Arc<str>> = rest.by_ref().take(limit).cloned().collect();
        let next = rest.next().and(users.last()).map(|user| user.to_string());
        PresencePage { users, count: channel.users.len() as u64, next }
    }
}
