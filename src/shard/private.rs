//! Private fan-outs of a channel: one for each user with new private events, to all their
//! connections on this shard.
//!
//! Users take turns, one connection each, so that a user with thousands of connections does not
//! delay the others. Events that arrive before the turn of a connection are written to it together.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use super::connections::ConnectionTable;
use crate::ws::connection::NONE;

/// A fan-out to one user's connections.
#[derive(Debug)]
struct UserFanout {
    /// The slot to visit next; `NONE` at the end.
    next: u32,
    /// Whether any connection was visited.
    started: bool,
    /// When the first of its events arrived on this node.
    arrived: Instant,
    /// When the first event arrived after the first visit. Then all connections are visited again.
    again: Option<Instant>,
}

impl UserFanout {
    fn new(first: u32, arrived: Instant) -> UserFanout {
        UserFanout { next: first, started: false, arrived, again: None }
    }
}

/// The private fan-outs under way in one channel.
#[derive(Debug, Default)]
pub struct PrivateFanouts {
    users: HashMap<Arc<str>, UserFanout>,
    /// The same users, in the order of their turns.
    turns: VecDeque<Arc<str>>,
}

impl PrivateFanouts {
    pub fn is_empty(&self) -> bool {
        self.turns.is_empty()
    }

    /// Adds a private event for a user whose first connection is `first`. Returns true if a fan-out
    /// starts for it, false if the one under way delivers it.
    pub fn add(&mut self, user: &Arc<str>, first: u32, arrived: Instant) -> bool {
        if let Some(fanout) = self.users.get_mut(user) {
            if fanout.started {
                fanout.again.get_or_insert(arrived);
            } else {
                fanout.next = first; // connections that joined after its start are linked before its first one
            }
            return false;
        }
        self.users.insert(user.clone(), UserFanout::new(first, arrived));
        self.turns.push_back(user.clone());
        true
    }

    /// The slot to visit next. `None` if the fan-out whose turn it is has visited every connection,
    /// or there is none.
    pub fn next_visit(&mut self, connections: &ConnectionTable) -> Option<u32> {
        let fanout = self.users.get_mut(self.turns.front()?)?;
        let slot = fanout.next;
        if slot == NONE {
            return None;
        }
        fanout.next = connections.membership(slot).next;
        fanout.started = true;
        if fanout.next != NONE {
            self.turns.rotate_left(1); // else it stays in front, and is completed once this connection is flushed
        }
        Some(slot)
    }

    /// Completes the fan-out whose turn it is if it has visited every connection. Returns its user,
    /// when the first of its events arrived, and whether it is over: if more events have arrived,
    /// it starts again from the slot that `first` returns.
    pub fn complete_next(&mut self, first: impl FnOnce(&str) -> u32) -> Option<(Arc<str>, Instant, bool)> {
        let user = self.turns.front()?;
        let fanout = self.users.get_mut(user).filter(|fanout| fanout.next == NONE)?;
        let (user, arrived) = (user.clone(), fanout.arrived);
        let first = fanout.again.map_or(NONE, |_| first(&user));
        match fanout.again.filter(|_| first != NONE) {
            Some(again) => {
                *fanout = UserFanout::new(first, again);
                self.turns.rotate_left(1);
                Some((user, arrived, false))
            }
            None => {
                self.users.remove(&user);
                self.turns.pop_front();
                Some((user, arrived, true))
            }
        }
    }

    /// Removes a user's connection: a fan-out that would visit it next continues with `later`.
    pub fn skip(&mut self, user: &str, slot: u32, later: u32) {
        if let Some(fanout) = self.users.get_mut(user).filter(|fanout| fanout.next == slot) {
            fanout.next = later;
        }
    }
}
