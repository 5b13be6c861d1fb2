//! What this node's clients see of the users in a channel. It is read once a second while any of
//! them asked for it, so a change reaches them at most once a second, and none is ever lost.

use std::collections::BTreeSet;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;

use super::Change;
use crate::protocol::event::ChannelName;
use crate::protocol::form::{ChannelForm, Form};
use crate::protocol::frame;

/// What was read of a channel.
#[derive(Debug, PartialEq, Eq)]
pub enum Snapshot {
    /// All users.
    All(BTreeSet<Arc<str>>),
    /// Joins and leaves since the last one, in order.
    Changes(Vec<Change>),
    /// Only their number: there are more than `--presence-list`.
    Count(u64),
}

/// The users in a channel, as clients see them.
#[derive(Debug, Default)]
pub struct View {
    /// `None`: there are more than `--presence-list`.
    users: Option<BTreeSet<Arc<str>>>,
    count: u64,
    /// Number of the last update; 0 before the first.
    number: u64,
}

impl View {
    /// Whether it has the list of users, so that changes can be applied.
    pub fn has_list(&self) -> bool {
        self.users.is_some()
    }

    /// Takes what was read. `settled`: all nodes have added their users; before that nobody is said to
    /// have left. Returns the update for clients, if anything has changed for them.
    pub fn update(&mut self, read: Snapshot, settled: bool) -> Option<Update> {
        let is_first = self.number == 0;
        let (joined, left) = match read {
            Snapshot::Count(count) => {
                let count = if settled { count } else { count.max(self.count) };
                let is_new = self.users.take().is_some() || is_first || count != self.count;
                self.count = count;
                return is_new.then(|| self.next(frame::presence_count(count)));
            }
            Snapshot::All(mut users) => match &mut self.users {
                Some(known) => {
                    if !settled {
                        users.extend(known.iter().cloned());
                    }
                    let joined: Vec<_> = users.difference(known).cloned().collect();
                    let left: Vec<_> = known.difference(&users).cloned().collect();
                    *known = users;
                    (joined, left)
                }
                None => {
                    if !settled && !is_first && (users.len() as u64) < self.count {
                        return None; // the number stands until all nodes have added their users
                    }
                    self.count = users.len() as u64;
                    self.users = Some(users);
                    let list = frame::presence_list(self.users.iter().flatten(), self.count);
                    return Some(self.next(list));
                }
            },
            Snapshot::Changes(changes) => {
                let Some(users) = &mut self.users else { return None };
                apply(users, changes)
            }
        };
        if joined.is_empty() && left.is_empty() {
            return None;
        }
        self.count = self.users.as_ref().map_or(0, BTreeSet::len) as u64;
        Some(self.next(frame::presence_change(&joined, &left, self.count)))
    }

    fn next(&mut self, change: String) -> Update {
        self.number += 1;
        let users = self.users.as_ref().map(|users| users.iter().cloned().collect());
        Update { number: self.number, change: change.into(), users, count: self.count }
    }
}

/// Applies changes in order. Returns who is new and who is gone after all of them.
fn apply(users: &mut BTreeSet<Arc<str>>, changes: Vec<Change>) -> (Vec<Arc<str>>, Vec<Arc<str>>) {
    let (mut joined, mut left) = (BTreeSet::new(), BTreeSet::new());
    for Change { user, present } in changes {
        match present {
            true if users.insert(user.clone()) && !left.remove(&user) => drop(joined.insert(user)),
            false if users.remove(&user) && !joined.remove(&user) => drop(left.insert(user)),
            _ => {}
        }
    }
    (joined.into_iter().collect(), left.into_iter().collect())
}

/// A change of a view.
#[derive(Clone, Debug)]
pub struct Update {
    number: u64,
    /// Members of the frame after its channel.
    change: Arc<str>,
    users: Option<Arc<[Arc<str>]>>,
    count: u64,
}

/// An update in the form of a channel, framed once for all connections of the node.
#[derive(Debug)]
pub struct PresenceUpdate {
    /// Rises by one with each update of a channel.
    pub number: u64,
    /// What has changed since the update before.
    pub change: Bytes,
    update: Update,
    whole: OnceLock<Bytes>,
    channel: ChannelForm,
}

impl PresenceUpdate {
    pub fn new(update: Update, channel: ChannelForm) -> PresenceUpdate {
        let change = frame::presence(named(&channel), &update.change);
        PresenceUpdate { number: update.number, change, update, whole: OnceLock::new(), channel }
    }

    pub fn channel(&self) -> &ChannelForm {
        &self.channel
    }

    /// The frame for clients without the update before.
    pub fn whole(&self) -> &Bytes {
        self.whole.get_or_init(|| {
            let text = match &self.update.users {
                Some(users) => frame::presence_list(users.iter(), self.update.count),
                None => frame::presence_count(self.update.count),
            };
            frame::presence(named(&self.channel), &text)
        })
    }
}

fn named(channel: &ChannelForm) -> Option<&ChannelName> {
    (channel.form == Form::Named).then_some(&channel.name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(names: &[&str]) -> BTreeSet<Arc<str>> {
        names.iter().map(|name| Arc::from(*name)).collect()
    }

    fn change(user: &str, present: bool) -> Change {
        Change { user: user.into(), present }
    }

    fn shown(update: Option<Update>) -> Option<String> {
        update.map(|update| update.change.to_string())
    }

    #[test]
    fn lists_come_once_then_changes() {
        let mut view = View::default();
        let list = || Snapshot::All(set(&["a", "b"]));
        assert_eq!(shown(view.update(list(), true)).as_deref(), Some(r#""users":["a","b"],"count":2}"#));
        assert_eq!(shown(view.update(list(), true)), None);
        let changes = vec![change("c", true), change("a", false), change("d", true), change("d", false)];
        let update = view.update(Snapshot::Changes(changes), true);
        assert_eq!(shown(update).as_deref(), Some(r#""join":["c"],"leave":["a"],"count":2}"#));
        let back = vec![change("b", false), change("b", true)];
        assert_eq!(shown(view.update(Snapshot::Changes(back), true)), None);
    }

    #[test]
    fn nobody_leaves_before_all_nodes_have_settled() {
        let mut view = View::default();
        view.update(Snapshot::All(set(&["a", "b"])), true);
        let update = view.update(Snapshot::All(set(&["c"])), false);
        assert_eq!(shown(update).as_deref(), Some(r#""join":["c"],"leave":[],"count":3}"#));
        let update = view.update(Snapshot::All(set(&["a", "c"])), true);
        assert_eq!(shown(update).as_deref(), Some(r#""join":[],"leave":["b"],"count":2}"#));
        view.update(Snapshot::Count(5000), true);
        assert_eq!(shown(view.update(Snapshot::Count(10), false)), None);
        assert_eq!(shown(view.update(Snapshot::All(set(&["a"])), false)), None);
        let update = view.update(Snapshot::All(set(&["a"])), true);
        assert_eq!(shown(update).as_deref(), Some(r#""users":["a"],"count":1}"#));
    }

    #[test]
    fn large_channels_have_only_a_count() {
        let mut view = View::default();
        view.update(Snapshot::All(set(&["a"])), true);
        assert_eq!(shown(view.update(Snapshot::Count(2000), true)).as_deref(), Some(r#""count":2000}"#));
        assert!(!view.has_list());
        assert_eq!(shown(view.update(Snapshot::Count(2000), true)), None);
        assert_eq!(shown(view.update(Snapshot::Changes(vec![change("b", true)]), true)), None);
        let update = view.update(Snapshot::Count(2001), true).expect("a new number");
        let frame =
            PresenceUpdate::new(update, ChannelForm::named(ChannelName::parse("room").expect("a name")));
        assert_eq!(&frame.change[2..], br#"{"type":"presence","channel":"room","count":2001}"#);
        assert_eq!(&frame.whole()[2..], br#"{"type":"presence","channel":"room","count":2001}"#);
    }
}
