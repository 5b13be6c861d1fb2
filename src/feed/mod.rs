//! Recent events of one channel in memory, and cursors into them.
//!
//! Entries are numbered from 0 for as long as the channel is followed. A cursor is the number of an
//! entry and a byte offset in it. A connection also keeps its position, the last event that it got
//! whole. The position stays valid when the entry is evicted.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;

use crate::protocol::event::{Entry, EventId, Kind};

pub mod eviction;
#[cfg(test)]
mod tests;

/// A place in a feed: what a connection gets next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cursor {
    /// The number of the entry.
    pub entry: u64,
    /// How many of its bytes are written.
    pub offset: u32,
}

/// What decides which entries a connection gets.
#[derive(Clone, Copy, Debug)]
pub struct Reader<'a> {
    pub user: &'a str,
    /// Events without id count from this entry on: they are never replayed.
    pub live_from: u64,
}

/// Where the events after a position are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lookup {
    /// In the feed, from here on.
    Found(Cursor),
    /// No longer in the feed: they are read from history.
    Evicted,
    /// The position is before a reset, so that events after it may be lost.
    Discontinuous,
    /// The feed has not reached the position.
    Ahead,
}

/// Recent entries of one channel. Indexes by kind and user find the next entry for a reader in
/// O(log n), however many entries for others are before it.
#[derive(Debug)]
pub struct Feed {
    base: EventId,
    /// The position before the first entry.
    before: EventId,
    /// The position after the last entry.
    position: EventId,
    /// The number of the first entry.
    start: u64,
    /// The number after the last evicted entry for all subscribers; 0: none was evicted.
    evicted_public: u64,
    /// The number after the last evicted event without id.
    evicted_without_id: u64,
    entries: VecDeque<Entry>,
    /// Numbers of the entries for all subscribers that are replayed: events and reset marks.
    public: VecDeque<u64>,
    /// Numbers of the events without id.
    without_id: VecDeque<u64>,
    /// Private entries by the hash of their user, then by number.
    private: BTreeSet<(u64, u64)>,
    hasher: RandomState,
    /// Users with a private fan-out under way, and the number after their last private entry
    /// evicted during it (0: none).
    undelivered: HashMap<Arc<str>, u64>,
}

impl Feed {
    /// An empty feed that continues after `position`. No position before `base` is continuous with
    /// it.
    pub fn new(base: EventId, position: EventId) -> Feed {
        Feed {
            base,
            before: position,
            position,
            start: 0,
            evicted_public: 0,
            evicted_without_id: 0,
            entries: VecDeque::new(),
            public: VecDeque::new(),
            without_id: VecDeque::new(),
            private: BTreeSet::new(),
            hasher: RandomState::new(),
            undelivered: HashMap::new(),
        }
    }

    /// A feed of these consecutive entries, or an empty one at `position`.
    pub fn with_entries(base: EventId, position: EventId, entries: Vec<Entry>) -> Feed {
        let mut feed = Feed::new(base, entries.first().map_or(position, Entry::before));
        entries.into_iter().for_each(|entry| feed.append(entry));
        feed
    }

    /// Entries after the last reset, oldest first, without the events that have no id.
    pub fn recent(&self) -> impl Iterator<Item = &Entry> {
        let first = self.entries.partition_point(|entry| entry.last <= self.base);
        self.entries.range(first..).filter(|entry| entry.kind != Kind::WithoutId)
    }

    /// The first position of the epoch: none before it is continuous with what follows.
    pub fn base(&self) -> EventId {
        self.base
    }

    /// The position before the first entry.
    pub fn before(&self) -> EventId {
        self.before
    }

    /// The position after the last entry.
    pub fn position(&self) -> EventId {
        self.position
    }

    /// The number of the first entry.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// The number that the next entry will have.
    pub fn end(&self) -> u64 {
        self.start + self.entries.len() as u64
    }

    /// The position of a client that got everything before the entry with this number, which is in
    /// the feed or the next one to come.
    pub fn position_before(&self, number: u64) -> EventId {
        number.checked_sub(1).and_then(|previous| self.get(previous)).map_or(self.before, |entry| entry.last)
    }

    /// The entry with this number, unless it was evicted.
    pub fn get(&self, number: u64) -> Option<&Entry> {
        let index = number.checked_sub(self.start)?;
        self.entries.get(usize::try_from(index).ok()?)
    }

    /// Appends an entry that continues the feed, or a reset mark.
    pub fn append(&mut self, entry: Entry) {
        debug_assert!(
            entry.kind == Kind::Reset || entry.before() == self.position,
            "{entry:?} at {}",
            self.position
        );
        let number = self.end();
        match &entry.kind {
            Kind::Events | Kind::Reset => self.public.push_back(number),
            Kind::WithoutId => self.without_id.push_back(number),
            Kind::Private(user) => {
                self.private.insert((self.hasher.hash_one(&**user), number));
            }
        }
        if entry.kind == Kind::Reset {
            self.base = entry.last;
        }
        self.position = entry.last;
        self.entries.push_back(entry);
    }

    /// Evicts the oldest entry.
    pub fn evict(&mut self) -> Option<Entry> {
        let entry = self.entries.pop_front()?;
        let number = self.start;
        self.start += 1;
        self.before = entry.last;
        match &entry.kind {
            Kind::Events | Kind::Reset => {
                self.public.pop_front();
                self.evicted_public = self.start;
            }
            Kind::WithoutId => {
                self.without_id.pop_front();
                self.evicted_public = self.start;
                self.evicted_without_id = self.start;
            }
            Kind::Private(user) => {
                self.private.remove(&(self.hasher.hash_one(&**user), number));
                if let Some(evicted) = self.undelivered.get_mut(user) {
                    *evicted = self.start;
                }
            }
        }
        Some(entry)
    }

    /// Notes the start of a private fan-out to this user. Until [`Feed::finish_delivery`] the feed
    /// remembers whether it evicted a private entry of this user, so that no connection skips it.
    pub fn start_delivery(&mut self, user: Arc<str>) {
        self.undelivered.entry(user).or_default();
    }

    /// Notes that the private fan-out has visited all connections of this user.
    pub fn finish_delivery(&mut self, user: &str) {
        self.undelivered.remove(user);
    }

    /// Where a client that got everything up to `position` continues.
    pub fn find(&self, position: EventId) -> Lookup {
        if position > self.position {
            return Lookup::Ahead;
        }
        if position < self.base {
            return Lookup::Discontinuous;
        }
        if position < self.before {
            return Lookup::Evicted;
        }
        let index = self.entries.partition_point(|entry| entry.last <= position);
        let offset = self.entries.get(index).map_or(0, |entry| entry.offset_after(position));
        Lookup::Found(Cursor { entry: self.start + index as u64, offset })
    }

    /// Whether no entry for this user from `number` on was evicted. Valid only for a connection
    /// that got everything before `number` and was visited by every later private fan-out.
    pub fn holds_all_from(&self, number: u64, user: &str) -> bool {
        let is_before = |evicted: &u64| *evicted <= number;
        number >= self.start
            || (is_before(&self.evicted_public) && self.undelivered.get(user).is_none_or(is_before))
    }

    /// Whether an event without id was evicted that came at `number` or later.
    pub fn has_evicted_without_id(&self, number: u64) -> bool {
        number < self.evicted_without_id
    }

    /// The number of the first entry from `number` on that is for this reader.
    pub fn next_for(&self, number: u64, reader: Reader<'_>) -> Option<u64> {
        let number = number.max(self.start);
        if is_for(self.get(number)?, number, reader) {
            return Some(number);
        }
        let public = first_from(&self.public, number);
        let without_id = first_from(&self.without_id, number.max(reader.live_from));
        let private = self.next_private(number, reader);
        [public, without_id, private].into_iter().flatten().min()
    }

    fn next_private(&self, number: u64, reader: Reader<'_>) -> Option<u64> {
        if self.private.is_empty() {
            return None; // saves hashing the name
        }
        let hash = self.hasher.hash_one(reader.user);
        let same_hash = self.private.range((hash, number)..=(hash, u64::MAX)).map(|(_, number)| *number);
        // Another user may have the same hash.
        same_hash
            .into_iter()
            .find(|number| self.get(*number).is_some_and(|entry| is_for(entry, *number, reader)))
    }
}

fn is_for(entry: &Entry, number: u64, reader: Reader<'_>) -> bool {
    match &entry.kind {
        Kind::Events | Kind::Reset => true,
        Kind::Private(user) => &**user == reader.user,
        Kind::WithoutId => number >= reader.live_from,
    }
}

/// The first of these ascending numbers that is not below `number`.
fn first_from(numbers: &VecDeque<u64>, number: u64) -> Option<u64> {
    if *numbers.back()? < number {
        return None; // the common case: a reader near the end
    }
    numbers.get(numbers.partition_point(|other| *other < number)).copied()
}
