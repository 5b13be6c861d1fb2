//! A channel on one shard: its feed, its members, and the fan-outs under way.

use std::collections::BTreeSet;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::Instant;

use hashbrown::HashTable;

use super::connections::ConnectionTable;
use super::presence::PresenceMembers;
use super::private::PrivateFanouts;
use crate::bus::ConnectionId;
use crate::bus::coalesced::Coalesced;
use crate::feed::Feed;
use crate::protocol::event::Entry;
use crate::protocol::form::ChannelForm;
use crate::ws::connection::{Membership, NONE};
use crate::ws::outbox::SharedTails;
use crate::ws::writer::Tally;

/// A channel of a shard: its key, and the generation that distinguishes it from earlier channels
/// with the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ChannelId {
    pub key: u32,
    pub generation: u32,
}

/// A fan-out to all members: each is visited once and gets everything that has arrived.
#[derive(Debug)]
pub struct PublicFanout {
    /// Index of the member to visit next.
    next: usize,
    started: Instant,
    /// When the first of its events arrived on this node.
    arrived: Instant,
    /// The number of that event in the feed.
    first: u64,
    /// When the first event arrived after the first visit, and its number. Then all members are
    /// visited again.
    again: Option<(Instant, u64)>,
}

impl PublicFanout {
    fn new(started: Instant, arrived: Instant, first: u64) -> PublicFanout {
        PublicFanout { next: 0, started, arrived, first, again: None }
    }
}

/// A completed fan-out.
#[derive(Debug)]
pub struct CompletedFanout {
    /// `None` for a private one.
    pub started: Option<Instant>,
    /// When the first of its events arrived on this node.
    pub arrived: Instant,
}

/// A channel that the shard follows, or has asked the bus to follow.
#[derive(Debug)]
pub struct Channel {
    pub name: ChannelForm,
    pub id: ChannelId,
    /// Recent events. `None` until the bus has answered.
    pub feed: Option<Feed>,
    /// Entries that arrived before that answer.
    pub early: Vec<Entry>,
    /// Connections that wait for that answer.
    pub joining: Vec<ConnectionId>,
    /// Connections that claim an id ahead of the feed. They wait until the bus has looked for newer
    /// events.
    pub refresh: Coalesced<ConnectionId>,
    /// Numbers of the members, in no order: of connections and of subscriptions.
    pub members: Vec<u32>,
    /// A member of each user. Their other members are linked to it.
    users: HashTable<u32>,
    /// Whether the bus gets to know which users have members here.
    pub tracks_presence: bool,
    /// The members that asked who is in the channel.
    pub presence: Option<Box<PresenceMembers>>,
    public: Option<PublicFanout>,
    private: PrivateFanouts,
    /// Whether a private fan-out makes the next visit.
    private_next: bool,
    /// Members with part of a frame in their socket: number of the entry, and of the member.
    partly_written: BTreeSet<(u64, u32)>,
    /// Since when there is no member. A client that asks to join may never become one.
    pub empty_since: Option<Instant>,
}

impl Channel {
    pub fn new(name: ChannelForm, id: ChannelId, now: Instant) -> Channel {
        Channel {
            name,
            id,
            feed: None,
            early: Vec::new(),
            joining: Vec::new(),
            refresh: Coalesced::new(),
            members: Vec::new(),
            users: HashTable::new(),
            tracks_presence: false,
            presence: None,
            public: None,
            private: PrivateFanouts::default(),
            private_next: false,
            partly_written: BTreeSet::new(),
            empty_since: Some(now),
        }
    }

    /// The feed of a channel with members.
    pub fn feed(&self) -> &Feed {
        self.feed.as_ref().expect("clients join channels that are followed")
    }

    /// Whether it has no member and no connection waits to become one.
    pub fn is_empty(&self) -> bool {
        self.members.is_empty() && self.joining.is_empty() && self.refresh.is_empty()
    }

    /// Adds a member. Returns whether it is the first of its user.
    pub fn add(&mut self, slot: u32, connections: &mut ConnectionTable, hasher: &RandomState) -> bool {
        let index = self.members.len() as u32;
        self.members.push(slot);
        self.empty_since = None;
        let hash = hasher.hash_one(connections.user(slot));
        let same = |other: &u32| connections.user(*other) == connections.user(slot);
        let next = match self.users.find_mut(hash, same) {
            Some(first) => std::mem::replace(first, slot),
            None => {
                let rehash = |slot: &u32| hasher.hash_one(connections.user(*slot));
                self.users.insert_unique(hash, slot, rehash);
                NONE
            }
        };
        if next != NONE {
            connections.membership_mut(next).previous = slot;
        }
        let membership = connections.membership_mut(slot);
        *membership = Membership { index, previous: NONE, next, ..*membership };
        next == NONE
    }

    /// Removes a member. A fan-out under way still visits all others that it has not visited. Returns
    /// whether it was the last of its user.
    pub fn remove(&mut self, slot: u32, connections: &mut ConnectionTable, hasher: &RandomState) -> bool {
        let mut free = connections.membership(slot).index as usize;
        if let Some(fanout) = self.public.as_mut().filter(|fanout| free < fanout.next) {
            // The last of the visited members takes the free place, and the last of all its place.
            // Otherwise the last of all would move among the visited ones.
            fanout.next -= 1;
            let visited = self.members[fanout.next];
            self.members[free] = visited;
            connections.membership_mut(visited).index = free as u32;
            free = fanout.next;
        }
        self.members.swap_remove(free);
        if let Some(moved) = self.members.get(free) {
            connections.membership_mut(*moved).index = free as u32;
        }
        let is_last = self.remove_user(slot, connections, hasher);
        self.partly_written.remove(&(connections.progress(slot).cursor().entry, slot));
        if self.members.is_empty() {
            self.empty_since = Some(Instant::now());
        }
        is_last
    }

    fn remove_user(&mut self, slot: u32, connections: &mut ConnectionTable, hasher: &RandomState) -> bool {
        let Membership { previous, next, .. } = *connections.membership(slot);
        self.private.skip(connections.user(slot), slot, next);
        if next != NONE {
            connections.membership_mut(next).previous = previous;
        }
        if previous != NONE {
            connections.membership_mut(previous).next = next;
            return false;
        }
        let hash = hasher.hash_one(connections.user(slot));
        match self.users.find_entry(hash, |other| *other == slot) {
            Ok(mut entry) if next != NONE => *entry.get_mut() = next,
            Ok(entry) => {
                entry.remove();
            }
            Err(_) => debug_assert!(false, "a user's first connection is in the table"),
        }
        next == NONE
    }

    /// Notes that the socket of this member has part of a frame of the feed.
    pub fn note_partly_written(&mut self, entry: u64, slot: u32) {
        self.partly_written.insert((entry, slot));
    }

    /// Forgets it, since the member is about to write the rest.
    pub fn forget_partly_written(&mut self, entry: u64, slot: u32) {
        self.partly_written.remove(&(entry, slot));
    }

    /// Evicts the oldest entry of the feed. Members with part of a frame of it in their socket keep
    /// its rest.
    pub fn evict_entry(&mut self, connections: &mut ConnectionTable, tally: &mut Tally) {
        let Some(feed) = &mut self.feed else { return };
        let number = feed.start();
        let Some(entry) = feed.evict() else { return };
        let mut tails = SharedTails::default();
        while let Some((_, slot)) = self.partly_written.first().copied().filter(|(entry, _)| *entry <= number)
        {
            self.partly_written.pop_first();
            let (mut sink, progress) = connections.writer(slot);
            sink.keep_tail(progress, &entry, &mut tails, tally);
        }
    }

    /// Starts a public fan-out for the entry just appended to the feed, unless the one under way
    /// delivers it. `number` is the entry's.
    pub fn start_public_fanout(&mut self, now: Instant, arrived: Instant, number: u64) {
        match &mut self.public {
            None if self.members.is_empty() => {}
            None => self.public = Some(PublicFanout::new(now, arrived, number)),
            Some(fanout) if fanout.next == 0 => {} // no member was visited yet
            Some(fanout) => {
                fanout.again.get_or_insert((arrived, number));
            }
        }
    }

    /// Whether the public fan-out under way has yet to deliver the entry with this number to some
    /// members.
    pub fn still_delivers(&self, number: u64) -> bool {
        self.public.as_ref().is_some_and(|fanout| number >= fanout.first)
    }

    /// Starts a fan-out to a user's connections for a private entry, unless the one under way
    /// delivers it.
    pub fn start_private_fanout(
        &mut self,
        user: Arc<str>,
        arrived: Instant,
        connections: &ConnectionTable,
        hasher: &RandomState,
    ) {
        let first = first_of(&self.users, &user, connections, hasher);
        if first != NONE
            && self.private.add(&user, first, arrived)
            && let Some(feed) = &mut self.feed
        {
            feed.start_delivery(user);
        }
    }

    /// Panics unless members know their place, and the partly written ones are exactly those that
    /// are listed: eviction finds no others.
    #[cfg(test)]
    pub fn assert_consistent(&self, connections: &ConnectionTable) {
        for (index, slot) in self.members.iter().enumerate() {
            let owner = &connections[connections.owner(*slot)];
            let (membership, progress) = (connections.membership(*slot), connections.progress(*slot));
            assert!(owner.is_open() && membership.index == index as u32, "{slot}: {owner:?}");
            let number = progress.cursor().entry;
            let is_partly_written = connections.is_live(*slot) && progress.is_inside_frame(self.feed());
            assert_eq!(self.partly_written.contains(&(number, *slot)), is_partly_written, "{slot}");
        }
        let of_member = |(_, slot): &&(u64, u32)| self.members.contains(slot);
        assert!(self.partly_written.iter().all(|listed| of_member(&listed)), "{:?}", self.partly_written);
    }

    pub fn has_fanout(&self) -> bool {
        self.public.is_some() || !self.private.is_empty()
    }

    /// Completes the fan-outs that have visited all their connections, and adds them to
    /// `completed`. A fan-out starts again if more events have arrived.
    pub fn complete_fanouts(
        &mut self,
        now: Instant,
        completed: &mut Vec<CompletedFanout>,
        connections: &ConnectionTable,
        hasher: &RandomState,
    ) {
        while let Some(fanout) = self.public.take_if(|fanout| fanout.next >= self.members.len()) {
            completed.push(CompletedFanout { started: Some(fanout.started), arrived: fanout.arrived });
            self.public = fanout.again.map(|(arrived, first)| PublicFanout::new(now, arrived, first));
        }
        let first = |user: &str| first_of(&self.users, user, connections, hasher);
        while let Some((user, arrived, ended)) = self.private.complete_next(first) {
            completed.push(CompletedFanout { started: None, arrived });
            if let Some(feed) = self.feed.as_mut().filter(|_| ended) {
                feed.finish_delivery(&user);
            }
        }
    }

    /// The slot to visit next in the fan-outs under way. The public one and the private ones take
    /// turns.
    pub fn next_visit(&mut self, connections: &ConnectionTable) -> Option<u32> {
        self.private_next = !self.private_next;
        if (self.private_next || self.public.is_none())
            && let Some(slot) = self.private.next_visit(connections)
        {
            return Some(slot);
        }
        let fanout = self.public.as_mut()?;
        let slot = self.members.get(fanout.next).copied();
        fanout.next += 1;
        slot
    }
}

/// The slot of a user's first connection, to which the others are linked; `NONE` without one.
fn first_of(users: &HashTable<u32>, user: &str, connections: &ConnectionTable, hasher: &RandomState) -> u32 {
    let same = |slot: &u32| connections.user(*slot) == user;
    users.find(hasher.hash_one(user), same).copied().unwrap_or(NONE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::connections::ConnectionSlot;
    use crate::protocol::event::ChannelName;
    use crate::ws::connection::Connection;

    fn room() -> ChannelForm {
        ChannelName::parse("c").expect("a name").into()
    }

    const ID: ChannelId = ChannelId { key: 0, generation: 1 };

    /// Connections that nothing is written to.
    fn connections(count: u32) -> ConnectionTable {
        let poll = mio::Poll::new().expect("a poll");
        let mut table = ConnectionTable::new(0, poll.registry().try_clone().expect("a registry"));
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        for _ in 0..count {
            let stream = mio::net::TcpStream::connect(address).expect("it listens");
            table.insert(|generation| Connection::new(stream, ConnectionSlot::Proxy, generation, 0));
        }
        table
    }

    #[test]
    fn public_fan_out_visits_all_that_stay_once() {
        let (hasher, now) = (RandomState::new(), Instant::now());
        for count in 1..7_u32 {
            let mut connections = connections(count);
            for (visited, leaver) in
                (0..=count as usize).flat_map(|at| (0..count).map(move |slot| (at, slot)))
            {
                let mut channel = Channel::new(room(), ID, now);
                for slot in 0..count {
                    channel.add(slot, &mut connections, &hasher);
                }
                let mut seen = channel.members[..visited].to_vec();
                channel.public = Some(PublicFanout { next: visited, ..PublicFanout::new(now, now, 0) });
                channel.remove(leaver, &mut connections, &hasher);
                let next = channel.public.as_ref().expect("it is under way").next;
                seen.extend_from_slice(&channel.members[next..]);
                seen.retain(|slot| *slot != leaver);
                seen.sort_unstable();
                let stay: Vec<u32> = (0..count).filter(|slot| *slot != leaver).collect();
                assert_eq!(seen, stay, "{leaver} of {count} left after {visited} visits");
                let indexes = channel.members.iter().map(|slot| connections.membership(*slot).index);
                assert!(indexes.eq(0..count - 1), "every connection knows its index");
            }
        }
    }

    #[test]
    fn private_fan_out_reaches_all_that_stay() {
        let (hasher, now) = (RandomState::new(), Instant::now());
        for count in 1..6_u32 {
            let mut connections = connections(count);
            for (visited, leaver) in (0..count).flat_map(|at| (0..count).map(move |slot| (at, slot))) {
                let mut channel = Channel::new(room(), ID, now);
                for slot in 0..count {
                    channel.add(slot, &mut connections, &hasher);
                }
                let mut completed = Vec::new();
                channel.start_private_fanout("".into(), now, &connections, &hasher);
                for _ in 0..visited {
                    channel.next_visit(&connections).expect("a connection that was not visited");
                }
                channel.start_private_fanout("".into(), now, &connections, &hasher);
                channel.remove(leaver, &mut connections, &hasher);
                let mut seen = Vec::new();
                loop {
                    channel.complete_fanouts(now, &mut completed, &connections, &hasher);
                    let Some(slot) = channel.next_visit(&connections) else { break };
                    seen.push(slot);
                }
                assert!(!channel.has_fanout() && seen.len() + visited as usize <= 2 * count as usize);
                seen.sort_unstable();
                seen.dedup();
                let stay: Vec<u32> = (0..count).filter(|slot| *slot != leaver).collect();
                assert_eq!(seen, stay, "{leaver} of {count} left after {visited} visits");
                assert_eq!(completed.len(), if visited == 0 || stay.is_empty() { 1 } else { 2 });
            }
        }
    }

    #[test]
    fn waiting_private_fan_out_reaches_joiners() {
        let (hasher, now) = (RandomState::new(), Instant::now());
        for leaves in [false, true] {
            let mut connections = connections(2);
            let mut channel = Channel::new(room(), ID, now);
            channel.add(0, &mut connections, &hasher);
            channel.start_private_fanout("".into(), now, &connections, &hasher);
            if leaves {
                channel.remove(0, &mut connections, &hasher);
            }
            channel.add(1, &mut connections, &hasher);
            channel.start_private_fanout("".into(), now, &connections, &hasher);
            let mut seen = Vec::new();
            loop {
                channel.complete_fanouts(now, &mut Vec::new(), &connections, &hasher);
                let Some(slot) = channel.next_visit(&connections) else { break };
                seen.push(slot);
            }
            assert!(seen.contains(&1) && !channel.has_fanout(), "{seen:?}");
        }
    }
}
