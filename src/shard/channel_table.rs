//! The channels of one shard, by key, and the memory of their feeds.

use std::collections::{HashMap, VecDeque};
use std::hash::RandomState;
use std::ops::{Index, IndexMut};
use std::time::Instant;

use super::channels::{Channel, ChannelId, CompletedFanout};
use super::connections::ConnectionTable;
use super::deadlines::{LISTED, shrink};
use super::mailbox::{ChannelList, ListChannels};
use super::slots::Slots;
use crate::feed::eviction::EvictionQueue;
use crate::protocol::event::{ChannelName, Entry, Kind};
use crate::protocol::form::ChannelForm;
use crate::ws::writer::Tally;

/// Keys that one answer to [`ListChannels`] covers: some 10 µs of the shard's time.
const KEYS_LISTED: u32 = 512;

/// Channels by key.
#[derive(Debug)]
pub struct ChannelTable {
    /// Boxed, since channels are large and most nodes have few.
    channels: Slots<Box<Channel>>,
    keys: HashMap<ChannelForm, u32>,
    /// The generation of the latest channel.
    generation: u32,
    /// Hashes user names, for all channels.
    hasher: RandomState,
    /// The channel of every entry in a feed.
    eviction_queue: EvictionQueue<ChannelId>,
    /// Memory of the longest entry so far, in bytes.
    longest_entry: usize,
    /// Keys of the channels with a fan-out under way, in the order of their turns.
    fanouts: VecDeque<u32>,
    completed_fanouts: Vec<CompletedFanout>,
    /// Channels that had no member at some time. Some have members again, or were removed.
    empty: VecDeque<(Instant, ChannelId)>,
    /// Whether a channel has lost its last member since [`ChannelTable::take_emptied`].
    emptied: bool,
}

impl ChannelTable {
    pub fn new() -> ChannelTable {
        ChannelTable {
            channels: Slots::new(),
            keys: HashMap::new(),
            generation: 0,
            hasher: RandomState::new(),
            eviction_queue: EvictionQueue::new(),
            longest_entry: 0,
            fanouts: VecDeque::new(),
            completed_fanouts: Vec::new(),
            empty: VecDeque::new(),
            emptied: false,
        }
    }

    pub fn key(&self, name: &ChannelForm) -> Option<u32> {
        self.keys.get(name).copied()
    }

    pub fn get(&self, id: ChannelId) -> Option<&Channel> {
        self.channels.get(id.key).map(Box::as_ref).filter(|channel| channel.id == id)
    }

    /// Adds a channel without members.
    pub fn insert(&mut self, name: ChannelForm, now: Instant) -> u32 {
        self.generation = self.generation.wrapping_add(1);
        let id = |key| ChannelId { key, generation: self.generation };
        let key = self.channels.insert(|key| Box::new(Channel::new(name.clone(), id(key), now)));
        self.keys.insert(name, key);
        self.empty.push_back((now, id(key)));
        key
    }

    /// Removes a channel without members.
    pub fn remove(&mut self, key: u32) -> Channel {
        let mut channel = *self.channels.remove(key);
        self.keys.remove(&channel.name);
        self.fanouts.retain(|other| *other != key);
        if let Some(mut feed) = channel.feed.take() {
            let (mut entries, mut bytes) = (0, 0);
            while let Some(entry) = feed.evict() {
                entries += 1;
                bytes += entry.memory();
            }
            self.eviction_queue.mark_stale(entries, bytes);
            let channels = &self.channels;
            let is_held = |id: &ChannelId| channels.get(id.key).is_some_and(|channel| channel.id == *id);
            self.eviction_queue.compact(is_held);
        }
        channel
    }

    /// Adds a member. Returns whether it is the first of its user.
    pub fn add_member(&mut self, key: u32, slot: u32, connections: &mut ConnectionTable) -> bool {
        self.channels[key].add(slot, connections, &self.hasher)
    }

    /// Removes a member. Returns whether it was the last of its user.
    pub fn remove_member(&mut self, key: u32, slot: u32, connections: &mut ConnectionTable) -> bool {
        let channel = &mut self.channels[key];
        let is_last = channel.remove(slot, connections, &self.hasher);
        if let Some(since) = channel.empty_since {
            self.empty.push_back((since, channel.id));
            self.emptied = true;
        }
        is_last
    }

    /// Whether a channel has lost its last member since the last call.
    pub fn take_emptied(&mut self) -> bool {
        std::mem::take(&mut self.emptied)
    }

    /// The channel that has been without members for longest, and since when.
    pub fn oldest_empty(&mut self) -> Option<(Instant, ChannelId)> {
        while let Some((since, id)) = self.empty.front().copied() {
            if self.get(id).is_some_and(|channel| channel.empty_since == Some(since)) {
                return Some((since, id));
            }
            self.empty.pop_front();
        }
        None
    }

    /// Notes that a connection may join a channel without members, which is therefore kept for a
    /// while longer.
    pub fn keep_empty(&mut self, key: u32, now: Instant) {
        let channel = &mut self.channels[key];
        channel.empty_since = Some(now);
        self.empty.push_back((now, channel.id));
    }

    /// Frees memory that lists of channels took while thousands were in them.
    pub fn shrink(&mut self) {
        shrink(&mut self.empty);
        self.keys.shrink_to(LISTED.max(self.keys.len() * 2));
    }

    /// Lists the channels with these keys and names.
    pub fn list(&self, request: &ListChannels) -> ChannelList {
        let end = self.channels.end().min(request.from + KEYS_LISTED);
        let is_listed = |name: &ChannelName| {
            request.after.as_ref().is_none_or(|after| name > after)
                && request.up_to.as_ref().is_none_or(|up_to| name <= up_to)
        };
        let channels = (request.from..end).filter_map(|key| {
            let channel = self.channels.get(key).filter(|channel| is_listed(&channel.name.name))?;
            let position = channel.feed.as_ref()?.position();
            Some((channel.name.name.clone(), channel.members.len(), position))
        });
        let next = (end < self.channels.end()).then_some(end);
        ChannelList { channels: channels.collect(), next }
    }

    /// Bytes of all feeds.
    pub fn feed_bytes(&self) -> usize {
        self.eviction_queue.bytes()
    }

    /// Appends the next entry of a channel to its feed, and starts a fan-out unless the one under
    /// way delivers it.
    pub fn append(
        &mut self,
        key: u32,
        entry: Entry,
        arrived: Instant,
        now: Instant,
        connections: &ConnectionTable,
    ) {
        let channel = &mut self.channels[key];
        let Some(feed) = &mut channel.feed else { return channel.early.push(entry) };
        let memory = entry.memory();
        self.longest_entry = self.longest_entry.max(memory);
        self.eviction_queue.push(channel.id, memory);
        let receiver = match &entry.kind {
            Kind::Private(user) => Some(user.clone()),
            _ => None,
        };
        let number = feed.end();
        feed.append(entry);
        let had_fanout = channel.has_fanout();
        match receiver {
            Some(user) => channel.start_private_fanout(user, arrived, connections, &self.hasher),
            None => channel.start_public_fanout(now, arrived, number),
        }
        if !had_fanout && channel.has_fanout() {
            self.fanouts.push_back(key);
        }
    }

    /// Evicts the oldest entries of all feeds until the rest takes at most `limit` bytes.
    ///
    /// Events without id are in no history, so an entry stays until the fan-out under way has
    /// delivered it to all members. For that feeds may hold twice the limit, or two of the longest
    /// entries.
    pub fn evict(&mut self, limit: usize, connections: &mut ConnectionTable, tally: &mut Tally) {
        let most = 2 * limit.max(self.longest_entry);
        while let Some(id) = self.eviction_queue.oldest_over(limit).copied() {
            if self.get(id).is_none() {
                self.eviction_queue.skip_stale();
                continue;
            }
            let channel = &mut self.channels[id.key];
            let is_due = channel.feed.as_ref().is_some_and(|feed| channel.still_delivers(feed.start()));
            if is_due && self.eviction_queue.bytes() <= most {
                return;
            }
            self.eviction_queue.pop();
            channel.evict_entry(connections, tally);
        }
    }

    pub fn has_fanout(&self) -> bool {
        !self.fanouts.is_empty()
    }

    /// The key of the channel whose fan-outs have their turn. Fan-outs that have visited all
    /// connections are completed.
    pub fn current_fanout(&mut self, now: Instant, connections: &ConnectionTable) -> Option<u32> {
        while let Some(key) = self.fanouts.front().copied() {
            let channel = &mut self.channels[key];
            channel.complete_fanouts(now, &mut self.completed_fanouts, connections, &self.hasher);
            if channel.has_fanout() {
                return Some(key);
            }
            self.fanouts.pop_front();
        }
        None
    }

    /// Gives the next channel with a fan-out its turn.
    pub fn rotate_fanouts(&mut self) {
        self.fanouts.rotate_left(1);
    }

    /// The fan-outs that were completed since the last call.
    pub fn completed_fanouts(&mut self) -> impl Iterator<Item = CompletedFanout> {
        self.completed_fanouts.drain(..)
    }
}

impl Index<u32> for ChannelTable {
    type Output = Channel;

    fn index(&self, key: u32) -> &Channel {
        &self.channels[key]
    }
}

impl IndexMut<u32> for ChannelTable {
    fn index_mut(&mut self, key: u32) -> &mut Channel {
        &mut self.channels[key]
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use tokio::sync::oneshot;

    use super::*;
    use crate::feed::Feed;
    use crate::protocol::event::EventId;

    #[test]
    fn every_channel_is_listed_once() {
        let name = |number: usize| ChannelName::parse(&format!("room.{number:04}")).expect("a name");
        let mut table = ChannelTable::new();
        for number in 0..3 * KEYS_LISTED as usize {
            let key = table.insert(name(number).into(), Instant::now());
            // The bus has not answered for some of them.
            table[key].feed = (number % 7 > 0).then(|| Feed::new(EventId(1), EventId(number as u64 + 1)));
        }
        (0..3 * KEYS_LISTED).step_by(5).for_each(|key| drop(table.remove(key)));
        let (after, up_to) = (name(100), name(1400));
        let (mut from, mut listed) = (Some(0), BTreeSet::new());
        while let Some(key) = from {
            let (answer, _) = oneshot::channel();
            let (after, up_to) = (Some(after.clone()), Some(up_to.clone()));
            let list = table.list(&ListChannels { from: key, after, up_to, answer });
            assert!(list.channels.len() <= KEYS_LISTED as usize);
            for (name, connections, position) in list.channels {
                assert_eq!(connections, 0);
                assert!(listed.insert((name, position)), "twice");
            }
            from = list.next;
        }
        let numbers = (101..=1400).filter(|number| number % 7 > 0 && number % 5 > 0);
        assert!(listed.into_iter().eq(numbers.map(|number| (name(number), EventId(number as u64 + 1)))));
    }
}
