//! Private fan-outs of a channel: one for each user with new private events, to all their connections of this shard.
//!
//! Users take turns, a connection each, so that one with thousands of connections delays nobody with one. Events that
//! arrive before a connection's turn go out to it in one write.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use slab::Slab;

use crate::ws::connection::{Connection, NONE};

/// A walk over one user's connections.
#[derive(Debug)]
struct UserFanout {
    /// The slot to visit next; `NONE` at the end.
    next: u32,
    /// Whether a connection was visited already.
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
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.turns.is_empty()
    }

    /// Adds a private event for a user whose first connection is `first`. True if a fan-out starts for it; false if the one
    /// under way brings it.
    pub fn add(&mut self, user: &Arc<str>, first: u32, arrived: Instant) -> bool {
        if let Some(fanout) = self.users.get_mut(user) {
            if fanout.started {
                fanout.again.get_or_insert(arrived);
            } else {
                fanout.next = first; // connections that came after its start lie before its first one
            }
            return false;
        }
        self.users.insert(user.clone(), UserFanout::new(first, arrived));
        self.turns.push_back(user.clone());
        true
    }

    /// The slot to visit next. `None`: the fan-out whose turn it is has ended, or there is none.
    pub fn next_visit(&mut self, connections: &Slab<Connection>) -> Option<u32> {
        let fanout = self.users.get_mut(self.turns.front()?)?;
        let slot = fanout.next;
        let connection = connections.get(slot as usize)?;
        fanout.next = connection.same_user.1;
        fanout.started = true;
        if fanout.next != NONE {
            self.turns.rotate_left(1); // else it stays in front, and ends once this connection is flushed
        }
        Some(slot)
    }

    /// Ends the fan-out whose turn it is if it has visited every connection. Returns its user, when the first of its events
    /// arrived, and whether that was the last fan-out: if more events have arrived, it starts again from `first`.
    pub fn end_next(&mut self, first: impl FnOnce(&str) -> u32) -> Option<(Arc<str>, Instant, bool)> {
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

    /// A user's connection leaves the channel: a fan-out that would visit it next goes on with `later`.
    pub fn skip(&mut self, user: &str, slot: u32, later: u32) {
        if let Some(fanout) = self.users.get_mut(user).filter(|fanout| fanout.next == slot) {
            fanout.next = later;
        }
    }
}
