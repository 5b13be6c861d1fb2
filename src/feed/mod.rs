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
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn event(id: u64) -> Entry {
        events(id, 1)
    }

    fn events(first: u64, count: u64) -> Entry {
        let texts: Vec<String> = (first..first + count).map(|id| format!(r#"{{"id":{id}}}"#)).collect();
        Entry::events(EventId(first), texts.iter().map(|text| text.as_bytes()))
    }

    fn private(id: u64, user: &str) -> Entry {
        let text = format!(r#"{{"to":"{user}","id":{id}}}"#);
        Entry::addressed(EventId(id), Some(user.into()), [text.as_bytes()].into_iter())
    }

    fn reader(user: &str) -> Reader<'_> {
        Reader { user, live_from: 0 }
    }

    #[test]
    fn finds_the_event_after_a_position_inside_an_entry() {
        let mut feed = Feed::new(EventId(100), EventId(100));
        feed.append(events(101, 3));
        feed.append(event(104));
        let frame = 2 + r#"{"id":101}"#.len() as u32;
        assert_eq!(feed.find(EventId(100)), Start::At(Cursor { entry: 0, offset: 0 }));
        assert_eq!(feed.find(EventId(101)), Start::At(Cursor { entry: 0, offset: frame }));
        assert_eq!(feed.find(EventId(102)), Start::At(Cursor { entry: 0, offset: 2 * frame }));
        assert_eq!(feed.find(EventId(103)), Start::At(Cursor { entry: 1, offset: 0 }));
        assert_eq!(feed.find(EventId(104)), Start::At(Cursor { entry: 2, offset: 0 }));
        assert_eq!(feed.find(EventId(105)), Start::Ahead);
        assert_eq!(feed.find(EventId(99)), Start::Broken);
        feed.pop();
        assert_eq!(feed.find(EventId(102)), Start::Before);
        assert_eq!(feed.find(EventId(103)), Start::At(Cursor { entry: 1, offset: 0 }));
    }

    #[test]
    fn positions_before_a_reset_are_broken() {
        let mut feed = Feed::new(EventId(1), EventId(1));
        feed.append(event(2));
        feed.append(Entry::reset(EventId(50)));
        feed.append(event(51));
        assert_eq!(feed.find(EventId(2)), Start::Broken);
        assert_eq!(feed.find(EventId(49)), Start::Broken);
        assert_eq!(feed.find(EventId(50)), Start::At(Cursor { entry: 2, offset: 0 }));
    }

    #[test]
    fn standing_before_what_is_for_others_is_not_falling_behind() {
        let mut feed = Feed::new(EventId(1), EventId(1));
        feed.append(private(2, "bob"));
        feed.append(private(3, "bob"));
        feed.append(event(4));
        feed.pop();
        assert!(feed.holds_all_from(0, "alice"));
        feed.pop();
        feed.pop();
        assert!(!feed.holds_all_from(2, "alice"));
        assert!(feed.holds_all_from(3, "alice"));
    }

    #[test]
    fn remembers_evictions_during_a_private_fan_out() {
        let mut feed = Feed::new(EventId(1), EventId(1));
        feed.append(private(2, "bob"));
        feed.start_delivery("bob".into());
        feed.append(private(3, "bob"));
        assert!(feed.holds_all_from(0, "bob"));
        feed.pop();
        assert!(!feed.holds_all_from(0, "bob"));
        assert!(feed.holds_all_from(1, "bob") && feed.holds_all_from(0, "alice"));
        feed.finish_delivery("bob");
        feed.pop();
        assert!(feed.holds_all_from(1, "bob"));
    }

    #[test]
    fn what_has_no_id_is_never_replayed() {
        let mut feed = Feed::new(EventId(1), EventId(1));
        feed.append(Entry::raw(EventId(1), b"{}"));
        feed.append(event(2));
        assert_eq!(feed.next_for(0, Reader { live_from: 2, ..reader("alice") }), Some(1));
        assert_eq!(feed.next_for(0, reader("alice")), Some(0));
    }

    proptest! {
        /// Whatever is appended and let go, a reader from any position the feed still covers sees exactly the
        /// events after it that are for them, in order.
        #[test]
        fn a_reader_sees_exactly_what_is_theirs(
            shapes in prop::collection::vec((0u8..5, 1u64..5), 1..60),
            pops in 0usize..30,
            skip in 0u64..120,
        ) {
            let mut feed = Feed::new(EventId(1000), EventId(1000));
            let mut mine = Vec::new();
            for (shape, count) in shapes {
                let next = feed.position().0 + 1;
                match shape {
                    0 => feed.append(private(next, "bob")),
                    1 => {
                        feed.append(private(next, "alice"));
                        mine.push(next);
                    }
                    2 => feed.append(Entry::raw(feed.position(), b"{}")),
                    _ => {
                        feed.append(events(next, count));
                        mine.extend(next..next + count);
                    }
                }
            }
            for _ in 0..pops {
                feed.pop();
            }
            let position = EventId(1000 + skip);
            match feed.find(position) {
                Start::Ahead => prop_assert!(position > feed.position()),
                Start::Before => prop_assert!(position < feed.before()),
                Start::Broken => prop_assert!(false, "nothing was broken"),
                Start::At(mut cursor) => {
                    let reader = Reader { user: "alice", live_from: feed.end() };
                    let mut seen = Vec::new();
                    while let Some(number) = feed.next_for(cursor.entry, reader) {
                        let offset = if number == cursor.entry { cursor.offset } else { 0 };
                        let entry = feed.get(number).unwrap();
                        let first = entry.before().0 + 1 + entry.frames_until(offset) as u64 * u64::from(offset > 0);
                        seen.extend(first..=entry.last.0);
                        cursor = Cursor { entry: number + 1, offset: 0 };
                    }
                    let expected: Vec<u64> = mine.iter().copied().filter(|id| *id > position.0).collect();
                    prop_assert_eq!(seen, expected);
                }
            }
        }

        /// The index finds the same entries as a linear search, for every reader and place, and shrinks with the feed.
        #[test]
        fn the_index_agrees_with_a_search(steps in prop::collection::vec(0u8..8, 1..200)) {
            let mut feed = Feed::new(EventId(1000), EventId(1000));
            for step in steps {
                let next = feed.position().0 + 1;
                match step {
                    0 | 1 => feed.append(private(next, "alice")),
                    2 | 3 => feed.append(private(next, "bob")),
                    4 => feed.append(event(next)),
                    5 => feed.append(Entry::raw(feed.position(), b"{}")),
                    6 => feed.append(Entry::reset(EventId(next))),
                    _ => drop(feed.pop()),
                }
            }
            for user in ["alice", "bob", "carol"] {
                for live_from in [0, feed.start() + 3, feed.end()] {
                    let reader = Reader { user, live_from };
                    for number in 0..=feed.end() {
                        let searched = (number.max(feed.start())..feed.end())
                            .find(|number| is_for(feed.get(*number).unwrap(), *number, reader));
                        prop_assert_eq!(feed.next_for(number, reader), searched, "{:?} at {}", reader, number);
                    }
                }
            }
            while feed.pop().is_some() {}
            prop_assert!(feed.shared.is_empty() && feed.plain.is_empty() && feed.private.is_empty());
        }
    }
}
