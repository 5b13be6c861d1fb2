//! A channel's recent events in memory, and cursors into them.
//!
//! Entries are numbered from 0 for as long as the channel is followed. A cursor is an entry's number and a byte
//! offset in it; a connection also keeps its position (the last event it has whole), which outlives the entry.

use std::collections::VecDeque;

use crate::event::{Entry, EventId, Kind};

/// What an entry costs beside its bytes: slot, allocation head, trim order.
const ENTRY_OVERHEAD: usize = 128;

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
    /// They have had all that was for them alone, so only entries for everybody can lie ahead.
    pub current: bool,
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

#[derive(Debug)]
struct Slot {
    entry: Entry,
    /// The first entry after this one that is not for one user alone; `u64::MAX` while there is none.
    next_public: u64,
}

/// Recent entries of one channel.
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
    slots: VecDeque<Slot>,
}

impl Feed {
    /// An empty feed that goes on after `position`; nothing before `base` is continuous with it.
    pub fn new(base: EventId, position: EventId) -> Feed {
        Feed { base, before: position, position, start: 0, lost: 0, slots: VecDeque::new() }
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
        let begin = self.slots.partition_point(|slot| slot.entry.last <= self.base);
        self.slots.range(begin..).map(|slot| &slot.entry).filter(|entry| entry.kind != Kind::Raw)
    }

    /// What `entry` counts against the memory for feeds, in bytes.
    pub fn cost(entry: &Entry) -> usize {
        entry.bytes.len() + 4 * entry.frames() + ENTRY_OVERHEAD
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
        self.start + self.slots.len() as u64
    }

    /// The position of a client that has everything before the entry with this number, which is held or the next to come.
    pub fn position_before(&self, number: u64) -> EventId {
        number.checked_sub(1).and_then(|previous| self.get(previous)).map_or(self.before, |entry| entry.last)
    }

    /// The entry with this number, while it is held.
    pub fn get(&self, number: u64) -> Option<&Entry> {
        let index = number.checked_sub(self.start)?;
        self.slots.get(usize::try_from(index).ok()?).map(|slot| &slot.entry)
    }

    /// Appends an entry that continues the feed, or a reset mark.
    pub fn append(&mut self, entry: Entry) {
        debug_assert!(
            entry.kind == Kind::Reset || entry.before() == self.position,
            "{entry:?} at {}",
            self.position
        );
        let number = self.end();
        if !matches!(entry.kind, Kind::Private(_)) {
            let private = |slot: &&mut Slot| matches!(slot.entry.kind, Kind::Private(_));
            self.slots.iter_mut().rev().take_while(private).for_each(|slot| slot.next_public = number);
        }
        if entry.kind == Kind::Reset {
            self.base = entry.last;
        }
        self.position = entry.last;
        self.slots.push_back(Slot { entry, next_public: u64::MAX });
    }

    /// Lets the oldest entry go.
    pub fn pop(&mut self) -> Option<Entry> {
        let slot = self.slots.pop_front()?;
        self.start += 1;
        self.before = slot.entry.last;
        if !matches!(slot.entry.kind, Kind::Private(_)) {
            self.lost = self.start;
        }
        Some(slot.entry)
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
        let index = self.slots.partition_point(|slot| slot.entry.last <= position);
        let offset = self.slots.get(index).map_or(0, |slot| slot.entry.offset_after(position));
        Start::At(Cursor { entry: self.start + index as u64, offset })
    }

    /// Whether a reader who stands before the first entry held has missed nothing that was for them.
    pub fn has_lost_nothing(&self, cursor: Cursor, current: bool) -> bool {
        cursor.entry >= self.start || (current && cursor.entry >= self.lost)
    }

    /// The first entry from `number` on that is for this reader.
    pub fn next_for(&self, number: u64, reader: Reader<'_>) -> Option<u64> {
        let number = number.max(self.start);
        if reader.current {
            let slot = self.slots.get((number - self.start) as usize)?;
            let public = if matches!(slot.entry.kind, Kind::Private(_)) { slot.next_public } else { number };
            return (public != u64::MAX).then_some(public);
        }
        (number..self.end()).find(|number| match &self.slots[(number - self.start) as usize].entry.kind {
            Kind::Events | Kind::Reset => true,
            Kind::Private(user) => &**user == reader.user,
            Kind::Raw => *number >= reader.live_from,
        })
    }
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

    fn walking(user: &str) -> Reader<'_> {
        Reader { user, live_from: 0, current: false }
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
    fn a_current_reader_hops_over_what_is_for_others() {
        let mut feed = Feed::new(EventId(1), EventId(1));
        feed.append(event(2));
        (3..1000).for_each(|id| feed.append(private(id, "bob")));
        let current = Reader { user: "alice", live_from: 0, current: true };
        assert_eq!(feed.next_for(0, current), Some(0));
        assert_eq!(feed.next_for(1, current), None);
        feed.append(event(1000));
        assert_eq!(feed.next_for(1, current), Some(998));
        assert_eq!(feed.next_for(500, current), Some(998));
        assert_eq!(feed.next_for(1, walking("bob")), Some(1));
        assert_eq!(feed.next_for(1, walking("alice")), Some(998));
    }

    #[test]
    fn standing_before_what_is_for_others_is_not_falling_behind() {
        let mut feed = Feed::new(EventId(1), EventId(1));
        feed.append(private(2, "bob"));
        feed.append(private(3, "bob"));
        feed.append(event(4));
        feed.pop();
        assert!(feed.has_lost_nothing(Cursor::default(), true));
        assert!(!feed.has_lost_nothing(Cursor::default(), false));
        feed.pop();
        feed.pop();
        assert!(!feed.has_lost_nothing(Cursor { entry: 2, offset: 0 }, true));
        assert!(feed.has_lost_nothing(Cursor { entry: 3, offset: 0 }, false));
    }

    #[test]
    fn what_has_no_id_is_never_replayed() {
        let mut feed = Feed::new(EventId(1), EventId(1));
        feed.append(Entry::raw(EventId(1), b"{}"));
        feed.append(event(2));
        assert_eq!(feed.next_for(0, Reader { live_from: 2, ..walking("alice") }), Some(1));
        assert_eq!(feed.next_for(0, walking("alice")), Some(0));
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
                    let reader = Reader { live_from: feed.end(), ..walking("alice") };
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
    }
}
