//! A channel as one shard sees it: its feed, its members, and who waits for what.

use std::collections::BTreeSet;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::Instant;

use hashbrown::HashTable;
use slab::Slab;

use crate::bus::ConnectionId;
use crate::feed::Feed;
use crate::protocol::event::{ChannelName, Entry};
use crate::ws::connection::{Connection, NONE};

use super::private::PrivateFanouts;

/// A walk over a channel's members, who get what has come.
#[derive(Debug)]
pub struct Pass {
    /// The member that it comes to next.
    pub next: usize,
    /// When it began.
    pub begun: Instant,
    /// When the first of what it brings came to this node.
    pub arrived: Instant,
    /// The number of that entry in the feed.
    pub first: u64,
    /// Something came that members before `next` have not had; when the first of that came, and its number.
    pub again: Option<(Instant, u64)>,
}

impl Pass {
    /// One that begins now.
    pub fn new(now: Instant, arrived: Instant, first: u64) -> Pass {
        Pass { next: 0, begun: now, arrived, first, again: None }
    }
}

/// A channel that this shard follows, or is about to.
#[derive(Debug)]
pub struct Channel {
    /// Its name.
    pub name: ChannelName,
    /// Tells it from the earlier owners of its key.
    pub serial: u32,
    /// Its recent events; `None` until the bus follows it.
    pub feed: Option<Feed>,
    /// Entries that came before the word that it is followed.
    pub early: Vec<Entry>,
    /// The connections in it, in no order, by slot.
    pub members: Vec<u32>,
    /// The pass under way.
    pub pass: Option<Pass>,
    /// The private fan-outs under way.
    pub private: PrivateFanouts,
    /// Whether a private fan-out has the next turn.
    private_next: bool,
    /// One connection of each user; the others hang on it.
    users: HashTable<u32>,
    /// Who has part of a frame in the socket: entry and slot.
    pub begun: BTreeSet<(u64, u32)>,
    /// Who waits for the bus to follow.
    pub joining: Vec<ConnectionId>,
    /// Who waits for the look at the bus that is under way, since they claim an id ahead.
    pub looking: Vec<ConnectionId>,
    /// Who came while a look was under way, which may have been done before their ids were given: the next is theirs.
    pub look_next: Vec<ConnectionId>,
    /// Since when nobody is here; whoever asks to join may never come in.
    pub empty_since: Option<Instant>,
}

impl Channel {
    /// A channel that the bus is asked to follow.
    pub fn new(name: ChannelName, serial: u32, now: Instant) -> Channel {
        Channel {
            name,
            serial,
            feed: None,
            early: Vec::new(),
            members: Vec::new(),
            pass: None,
            private: PrivateFanouts::default(),
            private_next: false,
            users: HashTable::new(),
            begun: BTreeSet::new(),
            joining: Vec::new(),
            looking: Vec::new(),
            look_next: Vec::new(),
            empty_since: Some(now),
        }
    }

    /// Whether nobody is in it and nobody is about to be.
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
            && self.joining.is_empty()
            && self.looking.is_empty()
            && self.look_next.is_empty()
    }

    /// Takes a connection in.
    pub fn add(&mut self, slot: u32, connections: &mut Slab<Connection>, hasher: &RandomState) {
        connections[slot as usize].member = self.members.len() as u32;
        self.members.push(slot);
        self.empty_since = None;
        let hash = hasher.hash_one(&connections[slot as usize].user);
        let same = |other: &u32| connections[*other as usize].user == connections[slot as usize].user;
        match self.users.find_mut(hash, same) {
            Some(first) => {
                let second = std::mem::replace(first, slot);
                connections[second as usize].same_user.0 = slot;
                connections[slot as usize].same_user = (NONE, second);
            }
            None => {
                connections[slot as usize].same_user = (NONE, NONE);
                let rehash = |slot: &u32| hasher.hash_one(&connections[*slot as usize].user);
                self.users.insert_unique(hash, slot, rehash);
            }
        }
    }

    /// Lets a connection go. A pass under way still comes to everyone it has not come to.
    pub fn remove(&mut self, slot: u32, connections: &mut Slab<Connection>, hasher: &RandomState) {
        let mut hole = connections[slot as usize].member as usize;
        if let Some(pass) = self.pass.as_mut().filter(|pass| hole < pass.next) {
            // The last one of those already visited fills the hole, so that the pass does not skip the last of all.
            pass.next -= 1;
            let visited = self.members[pass.next];
            self.members[hole] = visited;
            connections[visited as usize].member = hole as u32;
            hole = pass.next;
        }
        self.members.swap_remove(hole);
        if let Some(moved) = self.members.get(hole) {
            connections[*moved as usize].member = hole as u32;
        }
        self.remove_user(slot, connections, hasher);
        let cursor = connections[slot as usize].cursor;
        self.begun.remove(&(cursor.entry, slot));
        if self.members.is_empty() {
            self.empty_since = Some(Instant::now());
        }
    }

    fn remove_user(&mut self, slot: u32, connections: &mut Slab<Connection>, hasher: &RandomState) {
        let (earlier, later) = connections[slot as usize].same_user;
        self.private.skip(&connections[slot as usize].user, slot, later);
        if later != NONE {
            connections[later as usize].same_user.0 = earlier;
        }
        if earlier != NONE {
            connections[earlier as usize].same_user.1 = later;
            return;
        }
        let hash = hasher.hash_one(&connections[slot as usize].user);
        match self.users.find_entry(hash, |other| *other == slot) {
            Ok(mut entry) if later != NONE => *entry.get_mut() = later,
            Ok(entry) => {
                entry.remove();
            }
            Err(_) => debug_assert!(false, "a user's first connection is in the table"),
        }
    }

    /// Starts a fan-out to all members for the entry just appended to the feed, unless one under way brings it. `number`
    /// is the entry's.
    pub fn start_public_fanout(&mut self, now: Instant, arrived: Instant, number: u64) {
        match &mut self.pass {
            None if self.members.is_empty() => {}
            None => self.pass = Some(Pass::new(now, arrived, number)),
            Some(pass) if pass.next == 0 => {} // nobody was visited yet
            Some(pass) => {
                pass.again.get_or_insert((arrived, number));
            }
        }
    }

    /// Whether the public fan-out under way has yet to bring the entry with this number to some members.
    pub fn still_brings(&self, number: u64) -> bool {
        self.pass.as_ref().is_some_and(|pass| number >= pass.first)
    }

    /// Starts a fan-out to a user's connections for a private entry, unless one under way brings it.
    pub fn start_private_fanout(
        &mut self,
        user: Arc<str>,
        arrived: Instant,
        connections: &Slab<Connection>,
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

    /// Whether a fan-out is under way.
    pub fn has_fanout(&self) -> bool {
        self.pass.is_some() || !self.private.is_empty()
    }

    /// Ends the fan-outs that have visited all their connections, and adds them to `completed`. A fan-out starts again if
    /// more events have arrived.
    pub fn end_fanouts(
        &mut self,
        now: Instant,
        completed: &mut Vec<(Option<Instant>, Instant)>,
        connections: &Slab<Connection>,
        hasher: &RandomState,
    ) {
        while let Some(pass) = self.pass.take_if(|pass| pass.next >= self.members.len()) {
            completed.push((Some(pass.begun), pass.arrived));
            self.pass = pass.again.map(|(arrived, first)| Pass::new(now, arrived, first));
        }
        let first = |user: &str| first_of(&self.users, user, connections, hasher);
        while let Some((user, arrived, ended)) = self.private.end_next(first) {
            completed.push((None, arrived));
            if let Some(feed) = self.feed.as_mut().filter(|_| ended) {
                feed.finish_delivery(&user);
            }
        }
    }

    /// The slot to visit next in the fan-outs under way. The public one and the private ones take turns.
    pub fn next_visit(&mut self, connections: &Slab<Connection>) -> Option<u32> {
        self.private_next = !self.private_next;
        if (self.private_next || self.pass.is_none())
            && let Some(slot) = self.private.next_visit(connections)
        {
            return Some(slot);
        }
        let pass = self.pass.as_mut()?;
        let slot = self.members.get(pass.next).copied();
        pass.next += 1;
        slot
    }
}

/// The slot of a user's first connection, to which the others are linked; `NONE` without one.
fn first_of(users: &HashTable<u32>, user: &str, connections: &Slab<Connection>, hasher: &RandomState) -> u32 {
    let same = |slot: &u32| &*connections[*slot as usize].user == user;
    users.find(hasher.hash_one(user), same).copied().unwrap_or(NONE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::connections::ConnectionSlot;

    /// Connections that nothing is written to.
    fn connections(count: u32) -> Slab<Connection> {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        let connect = |n| {
            let stream = mio::net::TcpStream::connect(address).expect("it listens");
            Connection::new(stream, ConnectionSlot::Proxy, n, 0)
        };
        (0..count).map(|n| (n as usize, connect(n))).collect()
    }

    #[test]
    fn a_pass_comes_once_to_everyone_who_stays_whoever_leaves_meanwhile() {
        let (hasher, now) = (RandomState::new(), Instant::now());
        for count in 1..7_u32 {
            let mut connections = connections(count);
            for (visited, leaver) in
                (0..=count as usize).flat_map(|at| (0..count).map(move |slot| (at, slot)))
            {
                let mut channel = Channel::new(ChannelName::parse("c").expect("a name"), 1, now);
                (0..count).for_each(|slot| channel.add(slot, &mut connections, &hasher));
                let mut seen = channel.members[..visited].to_vec();
                channel.pass = Some(Pass { next: visited, ..Pass::new(now, now, 0) });
                channel.remove(leaver, &mut connections, &hasher);
                let next = channel.pass.as_ref().expect("it goes on").next;
                seen.extend_from_slice(&channel.members[next..]);
                seen.retain(|slot| *slot != leaver);
                seen.sort_unstable();
                let stay: Vec<u32> = (0..count).filter(|slot| *slot != leaver).collect();
                assert_eq!(seen, stay, "{leaver} of {count} left after {visited} had their turn");
                let places = channel.members.iter().map(|slot| connections[*slot as usize].member);
                assert!(places.eq(0..count - 1), "everyone knows its place");
            }
        }
    }

    #[test]
    fn private_fan_out_reaches_all_that_stay() {
        let (hasher, now) = (RandomState::new(), Instant::now());
        for count in 1..6_u32 {
            let mut connections = connections(count);
            for (visited, leaver) in (0..count).flat_map(|at| (0..count).map(move |slot| (at, slot))) {
                let mut channel = Channel::new(ChannelName::parse("c").expect("a name"), 1, now);
                (0..count).for_each(|slot| channel.add(slot, &mut connections, &hasher));
                let mut completed = Vec::new();
                channel.start_private_fanout("".into(), now, &connections, &hasher);
                for _ in 0..visited {
                    channel.next_visit(&connections).expect("a connection that was not visited");
                }
                channel.start_private_fanout("".into(), now, &connections, &hasher);
                channel.remove(leaver, &mut connections, &hasher);
                let mut seen = Vec::new();
                loop {
                    channel.end_fanouts(now, &mut completed, &connections, &hasher);
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
            let mut channel = Channel::new(ChannelName::parse("c").expect("a name"), 1, now);
            channel.add(0, &mut connections, &hasher);
            channel.start_private_fanout("".into(), now, &connections, &hasher);
            if leaves {
                channel.remove(0, &mut connections, &hasher);
            }
            channel.add(1, &mut connections, &hasher);
            channel.start_private_fanout("".into(), now, &connections, &hasher);
            let mut seen = Vec::new();
            loop {
                channel.end_fanouts(now, &mut Vec::new(), &connections, &hasher);
                let Some(slot) = channel.next_visit(&connections) else { break };
                seen.push(slot);
            }
            assert!(seen.contains(&1) && !channel.has_fanout(), "{seen:?}");
        }
    }
}
