//! A channel's recent events in memory, and cursors into them.
//!
//! Entries are numbered from 0 for as long as the channel is followed. A cursor is an entry's number and a byte
//! offset in it; a connection also keeps its position (the last event it has whole), which outlives the entry.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;

use crate::protocol::event::{Entry, EventId, Kind};

/// A place in a feed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cursor {
    /// The entry to be written next.
    pub entry: u64,
    /// How many of its bytes are written already.
    pub offset: u32,
}

/// Who reads, as far as it decides which entries are for them.
#[derive(Clone, Copy, Debug)]
pub struct Reader<'a> {
    /// Their user id.
    pub user: &'a str,
    /// Events without id before this entry are the past: they are never replayed.
    pub live_from: u64,
}

/// Where a client that has everything up to some position finds what follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// In the feed, from here.
    At(Cursor),
    /// Before the feed begins: history has to say.
    Before,
    /// The channel's sequence was broken since: it can't be proven that nothing is missing.
    Broken,
    /// The feed is not that far yet.
    Ahead,
}

/// Recent entries of one channel, indexed by reader: the next entry for a reader is found in O(log n), however many entries
/// for others lie before it.
#[derive(Debug)]
pub struct Feed {
    base: EventId,
    /// The position before the first entry held.
    before: EventId,
    /// The position after the last entry.
    position: EventId,
    /// The number of the first entry held.
    start: u64,
    /// Entries before this number that are no longer held include one for everybody.
    lost: u64,
    /// The number after the last event without id that is no longer held.
    plain_lost: u64,
    entries: VecDeque<Entry>,
    /// Numbers of the entries for everybody that are replayed: events and reset marks.
    shared: VecDeque<u64>,
    /// Numbers of the events without id.
    plain: VecDeque<u64>,
    /// Private entries by the hash of their user, then by number.
    private: BTreeSet<(u64, u64)>,
    hasher: RandomState,
    /// Users with a private fan-out under way, with the number after their last private entry that was evicted meanwhile
    /// (0: none).
    undelivered: HashMap<Arc<str>, u64>,
}

impl Feed {
    /// An empty feed that goes on after `position`; nothing before `base` is continuous with it.
    pub fn new(base: EventId, position: EventId) -> Feed {
        Feed {
            base,
            before: position,
            position,
            start: 0,
            lost: 0,
            plain_lost: 0,
            entries: VecDeque::new(),
            shared: VecDeque::new(),
            plain: VecDeque::new(),
            private: BTreeSet::new(),
            hasher: RandomState::new(),
            undelivered: HashMap::new(),
        }
    }

    /// A feed that holds these consecutive entries; `position` is what it stands at when there are none.
    pub fn of(base: EventId, position: EventId, entries: &[Entry]) -> Feed {
        let mut feed = Feed::new(base, entries.first().map_or(position, Entry::before));
        entries.iter().for_each(|entry| {
            feed.append(entry.clone());
        });
        feed
    }

    /// What is held of the last run without a break, oldest first; events without id are left out.
    pub fn recent(&self) -> impl Iterator<Item = &Entry> {
        let begin = self.entries.partition_point(|entry| entry.last <= self.base);
        self.entries.range(begin..).filter(|entry| entry.kind != Kind::Raw)
    }

    /// Positions before this are not continuous with what follows.
    pub fn base(&self) -> EventId {
        self.base
    }

    /// The position before the first entry held.
    pub fn before(&self) -> EventId {
        self.before
    }

    /// The position after the last entry.
    pub fn position(&self) -> EventId {
        self.position
    }

    /// The number of the first entry held.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// The number that the next entry will have.
    pub fn end(&self) -> u64 {
        self.start + self.entries.len() as u64
    }

    /// The position of a client that has everything before the entry with this number, which is held or the next one.
    pub fn position_before(&self, number: u64) -> EventId {
        number.checked_sub(1).and_then(|previous| self.get(previous)).map_or(self.before, |entry| entry.last)
    }

    /// The entry with this number, while it is held.
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
            Kind::Events | Kind::Reset => self.shared.push_back(number),
            Kind::Raw => self.plain.push_back(number),
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
    pub fn pop(&mut self) -> Option<Entry> {
        let entry = self.entries.pop_front()?;
        let number = self.start;
        self.start += 1;
        self.before = entry.last;
        match &entry.kind {
            Kind::Events | Kind::Reset => {
                self.shared.pop_front();
                self.lost = self.start;
            }
            Kind::Raw => {
                self.plain.pop_front();
                self.lost = self.start;
                self.plain_lost = self.start;
            }
            Kind::Private(user) => {
                self.private.remove(&(self.hasher.hash_one(&**user), number));
                if let Some(lost) = self.undelivered.get_mut(user) {
                    *lost = self.start;
                }
            }
        }
        Some(entry)
    }

    /// Starts a private fan-out to this user. Until [`Feed::finish_delivery`] the feed remembers whether it evicted a
    /// private entry of this user, so that no connection skips it.
    pub fn start_delivery(&mut self, user: Arc<str>) {
        self.undelivered.entry(user).or_default();
    }

    /// Finishes the private fan-out to this user: all their connections were visited.
    pub fn finish_delivery(&mut self, user: &str) {
        self.undelivered.remove(user);
    }

    /// Where a client that has everything up to `position` goes on.
    pub fn find(&self, position: EventId) -> Start {
        if position > self.position {
            return Start::Ahead;
        }
        if position < self.base {
            return Start::Broken;
        }
        if position < self.before {
            return Start::Before;
        }
        let index = self.entries.partition_point(|entry| entry.last <= position);
        let offset = self.entries.get(index).map_or(0, |entry| entry.offset_after(position));
        Start::At(Cursor { entry: self.start + index as u64, offset })
    }

    /// Whether no entry for this user from `number` on was evicted. Holds only for a connection that has everything before
    /// `number` and was visited by every later private fan-out.
    pub fn holds_all_from(&self, number: u64, user: &str) -> bool {
        let held = |lost: &u64| number >= *lost;
        number >= self.start || (held(&self.lost) && self.undelivered.get(user).is_none_or(held))
    }

    /// Whether an event without id that is no longer held came at `number` or later.
    pub fn has_lost_plain(&self, number: u64) -> bool {
        number < self.plain_lost
    }

    /// The first entry from `number` on that is for this reader.
    pub fn next_for(&self, number: u64, reader: Reader<'_>) -> Option<u64> {
        let number = number.max(self.start);
        if is_for(self.get(number)?, number, reader) {
            return Some(number);
        }
        let shared = first_from(&self.shared, number);
        let plain = first_from(&self.plain, number.max(reader.live_from));
        let own = self.next_private(number, reader);
        [shared, plain, own].into_iter().flatten().min()
    }

    fn next_private(&self, number: u64, reader: Reader<'_>) -> Option<u64> {
        if self.private.is_empty() {
            return None; // without hashing the name
        }
        let hash = self.hasher.hash_one(reader.user);
        let same_hash = self.private.range((hash, number)..=(hash, u64::MAX)).map(|(_, number)| *number);
        // Other users' names may have the same hash.
        same_hash
            .into_iter()
            .find(|number| self.get(*number).is_some_and(|entry| is_for(entry, *number, reader)))
    }
}

fn is_for(entry: &Entry, number: u64, reader: Reader<'_>) -> bool {
    match &entry.kind {
        Kind::Events | Kind::Reset => true,
        Kind::Private(user) => &**user == reader.user,
        Kind::Raw => number >= reader.live_from,
    }
}

/// The first of these ascending numbers that is not below `number`.
fn first_from(numbers: &VecDeque<u64>, number: u64) -> Option<u64> {
    if *numbers.back()? < number {
        return None; // the common case: a reader near the end
    }
    numbers.get(numbers.partition_point(|other| *other < number)).copied()
}

#[cfg(test)]
mod tests;
