//! The channels of `--presence` that this node has users or an audience in.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Instant;

use super::{Audience, LINGER, NodeUsers};
use crate::config::Settings;
use crate::protocol::event::ChannelName;

/// Users that may linger on a node, however few connections it may have.
const LINGERING_MIN: usize = 1000;

/// A channel, and what the bus keeps for it.
#[derive(Debug, Default)]
pub struct TrackedChannel<S> {
    users: NodeUsers,
    pub audience: Audience,
    pub state: S,
}

impl<S> TrackedChannel<S> {
    pub fn users(&self) -> &NodeUsers {
        &self.users
    }

    pub fn is_unused(&self) -> bool {
        self.users.is_empty() && self.audience.is_empty()
    }
}

#[derive(Debug)]
pub struct TrackedChannels<S> {
    channels: HashMap<ChannelName, TrackedChannel<S>>,
    lingering: Lingering,
    user_count: usize,
}

impl<S: Default> TrackedChannels<S> {
    pub fn new(settings: &Settings) -> TrackedChannels<S> {
        TrackedChannels { channels: HashMap::new(), lingering: Lingering::new(settings), user_count: 0 }
    }

    /// Number of users, counted once in each channel.
    pub fn user_count(&self) -> usize {
        self.user_count
    }

    pub fn get(&self, name: &ChannelName) -> Option<&TrackedChannel<S>> {
        self.channels.get(name)
    }

    pub fn get_mut(&mut self, name: &ChannelName) -> Option<&mut TrackedChannel<S>> {
        self.channels.get_mut(name)
    }

    pub fn get_or_add(&mut self, name: &ChannelName) -> &mut TrackedChannel<S> {
        self.channels.entry(name.clone()).or_default()
    }

    /// Removes a channel if it is unused. Returns whether it was.
    pub fn remove_unused(&mut self, name: &ChannelName) -> bool {
        let is_unused = self.channels.get(name).is_some_and(TrackedChannel::is_unused);
        if is_unused {
            self.channels.remove(name);
        }
        is_unused
    }

    /// Changes the users of a channel, if there is one.
    pub fn change_users<T>(
        &mut self,
        name: &ChannelName,
        change: impl FnOnce(&mut NodeUsers) -> T,
    ) -> Option<T> {
        let users = &mut self.channels.get_mut(name)?.users;
        let before = users.len();
        let result = change(users);
        self.user_count = self.user_count - before + users.len();
        Some(result)
    }

    /// A user's first member on a shard has joined.
    pub fn enter(&mut self, name: &ChannelName, user: Arc<str>) {
        self.get_or_add(name);
        let left = self.change_users(name, |users| users.enter(user.clone())).flatten();
        if let Some(left) = left {
            self.lingering.remove(left, name.clone(), user);
        }
    }

    /// A user's last member on a shard has left.
    pub fn leave(&mut self, name: ChannelName, user: Arc<str>, now: Instant) {
        if self.change_users(&name, |users| users.leave(&user, now)) == Some(true) {
            self.lingering.push(now, name, user);
        }
    }

    /// Ends the linger time of the next user for whom it is over. Returns the channel.
    pub fn expire_next(&mut self, now: Instant) -> Option<ChannelName> {
        let (left, name, user) = self.lingering.pop_due(now)?;
        self.change_users(&name, |users| users.expire(&user, left));
        Some(name)
    }

    pub fn shrink(&mut self) {
        self.channels.shrink_to(2 * self.channels.len());
    }
}

/// The lingering users of all channels, by the time since when.
#[derive(Debug)]
struct Lingering {
    users: BTreeSet<(Instant, ChannelName, Arc<str>)>,
    /// Clients may come and go under any number of names: with more than this many the linger time
    /// of the oldest is over at once.
    max: usize,
}

impl Lingering {
    fn new(settings: &Settings) -> Lingering {
        // As many as can be present: each connection has a channel and its subscriptions.
        let each = settings.max_subscriptions.saturating_add(1);
        let max = (settings.connection_limit() as usize).saturating_mul(each).max(LINGERING_MIN);
        Lingering { users: BTreeSet::new(), max }
    }

    fn push(&mut self, left: Instant, channel: ChannelName, user: Arc<str>) {
        self.users.insert((left, channel, user));
    }

    /// The user has come back.
    fn remove(&mut self, left: Instant, channel: ChannelName, user: Arc<str>) {
        self.users.remove(&(left, channel, user));
    }

    /// The next user whose linger time is over, with the time since when.
    fn pop_due(&mut self, now: Instant) -> Option<(Instant, ChannelName, Arc<str>)> {
        let (left, ..) = self.users.first()?;
        let is_due = self.users.len() > self.max || now.saturating_duration_since(*left) >= LINGER;
        is_due.then(|| self.users.pop_first())?
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_users_linger() {
        let (mut lingering, start) = (Lingering { users: BTreeSet::new(), max: 2 }, Instant::now());
        let room = ChannelName::parse("room").expect("a name");
        for name in ["a", "b", "c"] {
            lingering.push(start, room.clone(), name.into());
        }
        assert_eq!(lingering.pop_due(start).map(|(.., user)| user).as_deref(), Some("a"));
        assert!(lingering.pop_due(start).is_none());
        assert!(lingering.pop_due(start + LINGER).is_some());
    }
}
