//! The users of this node in a channel of `--presence`, for both buses. Time is passed in.
//!
//! A user is present from the first connection or subscription until [`LINGER`] after the last one
//! was closed, so that reconnects change nothing. Changes are queued until they are stored: a user
//! who comes back meanwhile needs none.

mod audience;
mod tracked;
mod view;

pub use self::audience::Audience;
pub use self::tracked::{TrackedChannel, TrackedChannels};
pub use self::view::{PresenceUpdate, Snapshot, Update, View};

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a user stays present without a connection.
pub const LINGER: Duration = Duration::from_secs(10);

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
    /// When the last member left, while the user lingers.
    left: Option<Instant>,
    stored: Stored,
    /// The place in the queue of changes.
    queued: Option<u64>,
}

impl NodeUser {
    fn is_present(&self) -> bool {
        self.members > 0 || self.left.is_some()
    }

    fn is_settled(&self) -> bool {
        self.stored == if self.is_present() { Stored::Present } else { Stored::Absent }
    }
}

/// A user who became present or absent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    pub user: Arc<str>,
    pub present: bool,
}

/// The users of this node in one channel: those present, and those whose absence is not stored yet.
#[derive(Debug, Default)]
pub struct NodeUsers {
    users: BTreeMap<Arc<str>, NodeUser>,
    /// Users with a change to store, in this order.
    queue: BTreeMap<u64, Arc<str>>,
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

    /// A shard has its first member of the user. Returns since when the user has lingered.
    pub fn enter(&mut self, user: Arc<str>) -> Option<Instant> {
        let absent = NodeUser { members: 0, left: None, stored: Stored::Absent, queued: None };
        let entry = self.users.entry(user.clone()).or_insert(absent);
        entry.members += 1;
        let left = entry.left.take();
        self.enqueue(&user);
        left
    }

    /// A shard has lost its last member of the user. True if no shard has one: the user lingers from
    /// now on.
    pub fn leave(&mut self, user: &str, now: Instant) -> bool {
        let Some(entry) = self.users.get_mut(user).filter(|entry| entry.members > 0) else { return false };
        entry.members -= 1;
        entry.left = (entry.members == 0).then_some(now);
        entry.members == 0
    }

    /// The user has lingered since `left`, unless there are members again. Users whose presence was
    /// never stored are forgotten.
    pub fn expire(&mut self, user: &Arc<str>, left: Instant) {
        if let Some(entry) = self.users.get_mut(user).filter(|entry| entry.left == Some(left)) {
            entry.left = None;
            self.enqueue(user);
            self.drop_absent(user);
        }
    }

    fn enqueue(&mut self, user: &Arc<str>) {
        let Some(entry) = self.users.get_mut(user) else { return };
        if entry.queued.is_none() && !entry.is_settled() {
            let place = self.queue.last_key_value().map_or(0, |(last, _)| last + 1);
            entry.queued = Some(place);
            self.queue.insert(place, user.clone());
        }
    }

    /// Takes the next changes, at most `limit` of them. Their outcome is passed to
    /// [`NodeUsers::on_stored`] or [`NodeUsers::on_unknown`] before the next ones are taken.
    pub fn next_changes(&mut self, limit: usize) -> Vec<Change> {
        let mut changes = Vec::new();
        while changes.len() < limit {
            let Some((_, user)) = self.queue.pop_first() else { break };
            let Some(entry) = self.users.get_mut(&user) else { continue };
            entry.queued = None;
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
        self.queue.clear();
        for (place, (user, entry)) in (0..).zip(&mut self.users) {
            entry.stored = Stored::Unknown;
            entry.queued = Some(place);
            self.queue.insert(place, user.clone());
        }
    }

    fn drop_absent(&mut self, user: &Arc<str>) {
        if let Some(entry) = self.users.get(user).filter(|entry| !entry.is_present() && entry.is_settled()) {
            if let Some(place) = entry.queued {
                self.queue.remove(&place);
            }
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
    fn users_who_were_never_stored_are_forgotten() {
        let (mut users, start) = (NodeUsers::default(), Instant::now());
        for name in ["bob", "eve", "bob"] {
            let user: Arc<str> = name.into();
            users.enter(user.clone());
            users.leave(&user, start);
            users.expire(&user, start);
        }
        assert!(users.is_empty() && !users.has_changes());
    }
}
