//! The users of this node in a channel of `--presence`, for both buses. Time is passed in.
//!
//! A user is present from the first connection or subscription until [`LINGER`] after the last one
//! was closed, so that reconnects change nothing. Changes are queued until they are stored: a user
//! who comes back meanwhile needs none.

mod audience;
mod view;

pub use self::audience::Audience;
pub use self::view::{PresenceUpdate, Snapshot, Update, View};

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::config::Settings;
use crate::protocol::event::ChannelName;

/// How long a user stays present without a connection.
pub const LINGER: Duration = Duration::from_secs(10);

/// Users that may linger on a node, however few connections it may have.
const LINGERING_LEAST: usize = 1000;

/// Whether the change of a user is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stored {
    Present,
    Absent,
    /// A change is in flight, or its outcome is unknown.
    Unknown,
}

#[derive(Debug)]
struct NodeUser {
    /// Shards with members of the user, counted once for each form of the channel.
    members: u32,
    /// When the last member left, until the user lingers no more.
    left: Option<Instant>,
    stored: Stored,
    /// In the queue of changes.
    queued: bool,
}

impl NodeUser {
    fn is_present(&self) -> bool {
        self.members > 0 || self.left.is_some()
    }

    fn is_settled(&self) -> bool {
        self.stored == if self.is_present() { Stored::Present } else { Stored::Absent }
    }
}

/// A user who is now present, or is no more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    pub user: Arc<str>,
    pub present: bool,
}

/// The users of this node in one channel: those present, and those whose absence is not stored yet.
#[derive(Debug, Default)]
pub struct NodeUsers {
    users: BTreeMap<Arc<str>, NodeUser>,
    /// Users with a change to store.
    queue: VecDeque<Arc<str>>,
}

impl NodeUsers {
    pub fn len(&self) -> usize {
        self.users.len()
    }

    pub fn is_empty(&self) -> bool {
        self.users.is_empty()
    }

    pub fn has_changes(&self) -> bool {
        !self.queue.is_empty()
    }

    /// A shard has its first member of the user.
    pub fn enter(&mut self, user: Arc<str>) {
        let absent = NodeUser { members: 0, left: None, stored: Stored::Absent, queued: false };
        let entry = self.users.entry(user.clone()).or_insert(absent);
        entry.members += 1;
        entry.left = None;
        self.enqueue(&user);
    }

    /// A shard has lost its last member of the user. True if no shard has one: the user lingers from
    /// now on.
    pub fn leave(&mut self, user: &str, now: Instant) -> bool {
        let Some(entry) = self.users.get_mut(user) else { return false };
        entry.members = entry.members.saturating_sub(1);
        entry.left = (entry.members == 0).then_some(now);
        entry.members == 0
    }

    /// The user has lingered since `left`, unless there are members again.
    pub fn expire(&mut self, user: &Arc<str>, left: Instant) {
        if let Some(entry) = self.users.get_mut(user).filter(|entry| entry.left == Some(left)) {
            entry.left = None;
            self.enqueue(user);
        }
    }

    fn enqueue(&mut self, user: &Arc<str>) {
        let Some(entry) = self.users.get_mut(user) else { return };
        if !entry.queued && !entry.is_settled() {
            entry.queued = true;
            self.queue.push_back(user.clone());
        }
    }

    /// Takes the next changes, at most `limit` of them. Their outcome is passed to
    /// [`NodeUsers::on_stored`] or [`NodeUsers::on_unknown`] before the next ones are taken.
    pub fn next_changes(&mut self, limit: usize) -> Vec<Change> {
        let mut changes = Vec::new();
        while changes.len() < limit {
            let Some(user) = self.queue.pop_front() else { break };
            let Some(entry) = self.users.get_mut(&user) else { continue };
            entry.queued = false;
            if entry.is_settled() {
                self.drop_absent(&user);
                continue;
            }
            entry.stored = Stored::Unknown;
            let present = entry.is_present();
            changes.push(Change { user, present });
        }
        changes
    }

    /// The changes are stored.
    pub fn on_stored(&mut self, changes: &[Change]) {
        for Change { user, present } in changes {
            if let Some(entry) = self.users.get_mut(user) {
                entry.stored = if *present { Stored::Present } else { Stored::Absent };
                self.enqueue(user);
                self.drop_absent(user);
            }
        }
    }

    /// The changes may or may not be stored: they are queued again.
    pub fn on_unknown(&mut self, changes: &[Change]) {
        for Change { user, .. } in changes {
            self.enqueue(user);
        }
    }

    /// Nothing is known to be stored any more: all users are queued.
    pub fn on_lost(&mut self) {
        for (user, entry) in &mut self.users {
            entry.stored = Stored::Unknown;
            if !entry.queued {
                entry.queued = true;
                self.queue.push_back(user.clone());
            }
        }
    }

    fn drop_absent(&mut self, user: &Arc<str>) {
        let is_gone = |entry: &NodeUser| !entry.queued && !entry.is_present() && entry.is_settled();
        if self.users.get(user).is_some_and(is_gone) {
            self.users.remove(user);
        }
    }

    /// The users present, by name, after this one.
    pub fn present_after(&self, after: Option<&str>) -> impl Iterator<Item = &Arc<str>> {
        let start = after.map_or(Bound::Unbounded, Bound::Excluded);
        let users = self.users.range::<str, _>((start, Bound::Unbounded));
        users.filter(|(_, entry)| entry.is_present()).map(|(user, _)| user)
    }
}

/// The users without connections of all channels, in the order in which they stop to linger.
#[derive(Debug)]
pub struct Lingering {
    queue: VecDeque<(Instant, ChannelName, Arc<str>)>,
    /// Clients may come and go under any number of names: with more than this many the oldest stop
    /// to linger at once.
    max: usize,
}

impl Lingering {
    pub fn new(settings: &Settings) -> Lingering {
        let max = (settings.connection_limit() as usize).max(LINGERING_LEAST);
        Lingering { queue: VecDeque::new(), max }
    }

    pub fn push(&mut self, left: Instant, channel: ChannelName, user: Arc<str>) {
        self.queue.push_back((left, channel, user));
    }

    /// The next user who lingers no more, with the time since when. They may have come back.
    pub fn pop_due(&mut self, now: Instant) -> Option<(Instant, ChannelName, Arc<str>)> {
        let is_full = self.queue.len() > self.max;
        self.queue.pop_front_if(|(left, ..)| is_full || now.saturating_duration_since(*left) >= LINGER)
    }

    /// Frees memory that the queue took while thousands were in it.
    pub fn shrink(&mut self) {
        self.queue.shrink_to(2 * self.queue.len());
    }
}

/// Some of the users in a channel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PresencePage {
    pub users: Vec<Arc<str>>,
    /// Number of all users in the channel.
    pub count: u64,
    /// Where the next page starts; `None` at the end.
    pub next: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changes(users: &mut NodeUsers) -> Vec<(String, bool)> {
        let changes = users.next_changes(100);
        users.on_stored(&changes);
        changes.into_iter().map(|change| (change.user.to_string(), change.present)).collect()
    }

    #[test]
    fn first_and_last_member_are_changes() {
        let (mut users, bob, start): (_, Arc<str>, _) = (NodeUsers::default(), "bob".into(), Instant::now());
        users.enter(bob.clone());
        users.enter(bob.clone());
        assert_eq!(changes(&mut users), [("bob".into(), true)]);
        assert!(!users.leave(&bob, start) && users.leave(&bob, start));
        assert_eq!(changes(&mut users), []);
        assert_eq!(users.present_after(None).count(), 1);
        users.expire(&bob, start);
        assert_eq!(users.present_after(None).count(), 0);
        assert_eq!(changes(&mut users), [("bob".into(), false)]);
        assert!(users.is_empty());
    }

    #[test]
    fn return_within_the_linger_changes_nothing() {
        let (mut users, bob, start): (_, Arc<str>, _) = (NodeUsers::default(), "bob".into(), Instant::now());
        users.enter(bob.clone());
        assert_eq!(changes(&mut users).len(), 1);
        users.leave(&bob, start);
        users.enter(bob.clone());
        users.expire(&bob, start);
        assert!(!users.has_changes());
        // A second absence has a time of its own.
        let again = start + LINGER;
        users.leave(&bob, again);
        users.expire(&bob, start);
        assert!(!users.has_changes());
        users.expire(&bob, again);
        assert_eq!(changes(&mut users), [("bob".into(), false)]);
    }

    #[test]
    fn unknown_changes_are_stored_again() {
        let (mut users, bob, start): (_, Arc<str>, _) = (NodeUsers::default(), "bob".into(), Instant::now());
        users.enter(bob.clone());
        let sent = users.next_changes(100);
        users.leave(&bob, start);
        users.expire(&bob, start);
        users.on_unknown(&sent);
        // The first call may have been executed: the user must be removed.
        assert_eq!(changes(&mut users), [("bob".into(), false)]);
        assert!(users.is_empty());
    }

    #[test]
    fn change_during_a_call_follows_it() {
        let (mut users, bob, start): (_, Arc<str>, _) = (NodeUsers::default(), "bob".into(), Instant::now());
        users.enter(bob.clone());
        let sent = users.next_changes(100);
        users.leave(&bob, start);
        users.expire(&bob, start);
        users.on_stored(&sent);
        assert_eq!(changes(&mut users), [("bob".into(), false)]);
        assert!(users.is_empty());
    }

    #[test]
    fn all_users_are_stored_again_after_a_loss() {
        let mut users = NodeUsers::default();
        for name in ["eve", "bob"] {
            users.enter(name.into());
        }
        assert_eq!(changes(&mut users).len(), 2);
        users.on_lost();
        assert_eq!(changes(&mut users), [("bob".into(), true), ("eve".into(), true)]);
        assert!(!users.has_changes());
    }

    #[test]
    fn few_users_linger() {
        let (mut lingering, start) = (Lingering { queue: VecDeque::new(), max: 2 }, Instant::now());
        let room = ChannelName::parse("room").expect("a name");
        for name in ["a", "b", "c"] {
            lingering.push(start, room.clone(), name.into());
        }
        assert_eq!(lingering.pop_due(start).map(|(.., user)| user).as_deref(), Some("a"));
        assert!(lingering.pop_due(start).is_none());
        assert!(lingering.pop_due(start + LINGER).is_some());
    }
}
