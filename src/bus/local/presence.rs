//! Which users are in the channels of `--presence`, on a single node.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Instant;

use crate::bus::presence::{Snapshot, TrackedChannels};
use crate::bus::{Follower, PresencePage, ShardSender};
use crate::config::Settings;
use crate::protocol::event::ChannelName;

#[derive(Debug)]
pub(super) struct LocalPresence {
    channels: TrackedChannels<()>,
    /// Channels that have changed since their followers were sent an update.
    changed: HashSet<ChannelName>,
    /// `--presence-list`
    list_max: usize,
}

impl LocalPresence {
    pub(super) fn new(settings: &Settings) -> LocalPresence {
        LocalPresence {
            channels: TrackedChannels::new(settings),
            changed: HashSet::new(),
            list_max: settings.presence_list,
        }
    }

    /// Number of users, counted once in each channel.
    pub(super) fn users(&self) -> usize {
        self.channels.user_count()
    }

    /// A user's first member on a shard has joined, or the last has left.
    pub(super) fn on_user(&mut self, name: ChannelName, user: Arc<str>, present: bool, now: Instant) {
        if present {
            self.channels.enter(&name, user);
            self.store(&name);
        } else {
            self.channels.leave(name, user, now);
        }
    }

    /// All changes are stored at once: users are absent or in the list.
    fn store(&mut self, name: &ChannelName) {
        let has_changed = self.channels.change_users(name, |users| {
            let changes = users.next_changes(usize::MAX);
            users.on_stored(&changes);
            !changes.is_empty()
        });
        if has_changed == Some(true)
            && self.channels.get(name).is_some_and(|channel| !channel.audience.is_empty())
        {
            self.changed.insert(name.clone());
        }
        self.channels.remove_unused(name);
    }

    pub(super) fn follow(
        &mut self,
        name: &ChannelName,
        follower: Follower,
        follow: bool,
        shards: &dyn ShardSender,
    ) {
        if follow {
            let channel = self.channels.get_or_add(name);
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
        while let Some(name) = self.channels.expire_next(now) {
            self.store(&name);
        }
        for name in std::mem::take(&mut self.changed) {
            let Some(channel) = self.channels.get_mut(&name) else { continue };
            if !channel.audience.is_empty() {
                let users = channel.users();
                let read = match users.len() <= channel.audience.list_max(self.list_max) {
                    true => Snapshot::All(users.present_after(None).cloned().collect()),
                    false => Snapshot::Count(users.len() as u64),
                };
                channel.audience.update(&name, read, true, shards);
            }
        }
        self.channels.shrink();
    }

    pub(super) fn page(&self, name: &ChannelName, after: Option<&str>, limit: usize) -> PresencePage {
        let Some(channel) = self.channels.get(name) else { return PresencePage::default() };
        let mut rest = channel.users().present_after(after);
        let users: Vec<Arc<str>> = rest.by_ref().take(limit).cloned().collect();
        let next = rest.next().and(users.last()).map(|user| user.to_string());
        PresencePage { users, count: channel.users().len() as u64, next }
    }
}
