//! Pages of history in one shard's memory, in the parts in which the bus gave them, and the connections that wait for more.

use std::collections::{BTreeMap, VecDeque};

use crate::bus::reads::{Read, Reads};
use crate::bus::{ConnectionId, Page, is_continuous, is_gone, page_begin};
use crate::feed::Feed;
use crate::protocol::event::{Entry, EventId};
use crate::ws::connection::SharedTails;

/// A shard may always keep parts of this many events of the greatest length. Parts under way may take as much again.
const LONGEST_EVENTS: usize = 4;

/// Ticks that a part is kept after it was last read: readers of the same part come together.
const PAGE_TICKS: u32 = 20;

/// A channel: its key in the shard, and the serial that tells it from the key's earlier owners.
pub type ChannelKey = (u32, u32);

/// A part in memory: its channel, and the position that it follows.
pub type Part = (ChannelKey, EventId);

/// A part of a page, to be read like a feed.
#[derive(Debug)]
pub struct ReadyPage {
    after: EventId,
    base: EventId,
    head: EventId,
    oldest: EventId,
    /// Its events.
    pub feed: Feed,
    /// Frames that were partly written when it was last read from.
    pub tails: SharedTails,
    /// Its size in memory, in bytes.
    cost: usize,
    /// When it was last read from, in ticks of the shard.
    used: u32,
    /// Connections that waited for it and have not had their turn. It stays until they have.
    unserved: usize,
}

impl ReadyPage {
    /// A part from the bus. Events that the channel's feed does not have yet are left out, so that no reader gets them
    /// twice.
    fn new(page: &Page, feed: &Feed, tick: u32) -> ReadyPage {
        let entries: Vec<_> =
            page.entries.iter().filter_map(|entry| entry.clone().until(feed.position())).collect();
        ReadyPage {
            after: page.after,
            base: page.base,
            head: page.head,
            oldest: page.oldest,
            cost: entries.iter().map(Entry::memory).sum(),
            feed: Feed::with_entries(page.base, page.after, entries),
            tails: SharedTails::default(),
            used: tick,
            unserved: 0,
        }
    }

    /// Whether it proves that a client at `position` misses nothing by reading on.
    pub fn proves(&self, position: EventId) -> bool {
        is_continuous(position, self.base, self.head, self.oldest)
    }

    /// Whether it says what follows `position`: the next event, or that it is gone for good.
    fn covers(&self, position: EventId) -> bool {
        let gone = is_gone(position, self.base, self.head, self.oldest);
        self.after <= position && (position < self.feed.position() || gone)
    }
}

/// All parts in one shard's memory, and the connections that wait for others.
#[derive(Debug)]
pub struct Pages {
    limit: usize,
    reads: Reads<ChannelKey, ConnectionId>,
    ready: BTreeMap<Part, ReadyPage>,
    /// The parts, oldest first.
    order: VecDeque<Part>,
    /// Bytes of all parts.
    bytes: usize,
    /// Bytes of the parts that have unserved readers.
    unserved: usize,
}

impl Pages {
    /// No parts. They may take `memory` bytes, and one event may have `longest_event`.
    pub fn new(memory: usize, longest_event: usize) -> Pages {
        Pages {
            limit: memory.max(LONGEST_EVENTS * longest_event),
            reads: Reads::new(longest_event),
            ready: BTreeMap::new(),
            order: VecDeque::new(),
            bytes: 0,
            unserved: 0,
        }
    }

    /// Bytes of all parts.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// A part that says what follows this position.
    pub fn find(&mut self, channel: ChannelKey, position: EventId, tick: u32) -> Option<&mut ReadyPage> {
        let parts = (channel, page_begin(position))..=(channel, position);
        let part =
            self.ready.range_mut(parts).rev().map(|(_, part)| part).find(|part| part.covers(position))?;
        part.used = tick;
        Some(part)
    }

    /// Has a connection wait for a part of about this many bytes, since there is none for its position.
    pub fn wait(&mut self, channel: ChannelKey, position: EventId, bytes: usize, id: ConnectionId) {
        self.reads.wait(channel, position, bytes, id);
    }

    /// Whether any connection waits for history of this channel.
    pub fn has_waiting(&self, channel: ChannelKey) -> bool {
        self.reads.has(&channel)
    }

    /// The next read, if there is memory for it. Only for connections that `stays` confirms.
    pub fn start(&mut self, stays: impl Fn(&ConnectionId) -> bool) -> Option<Read<ChannelKey>> {
        let room = self.limit.checked_sub(self.unserved).filter(|room| *room > 0)?;
        self.reads.start(room, stays)
    }

    /// Takes the answer to a read. Returns the connections that it serves: each has its turn next, and the caller then calls
    /// [`Pages::served`].
    pub fn take(
        &mut self,
        channel: ChannelKey,
        position: EventId,
        page: &Page,
        feed: &Feed,
        tick: u32,
    ) -> (Part, Vec<ConnectionId>) {
        let part = (channel, page.after);
        let mut ready = ReadyPage::new(page, feed, tick);
        let served = self.reads.answer(channel, position, |position| ready.covers(position));
        let served: Vec<_> = served.into_iter().map(|(id, _)| id).collect();
        if !served.is_empty() {
            ready.unserved = served.len() + self.remove(part);
            self.bytes += ready.cost;
            self.unserved += ready.cost;
            self.ready.insert(part, ready);
            self.order.push_back(part);
            self.shed();
        }
        (part, served)
    }

    /// Removes and returns the connections that waited for a read that failed.
    pub fn fail(&mut self, channel: ChannelKey, position: EventId) -> Vec<ConnectionId> {
        self.reads.fail(channel, position).into_iter().map(|(id, _)| id).collect()
    }

    /// Notes that one of the connections that waited for a part has had its turn, or is gone.
    pub fn served(&mut self, part: Part) {
        let Some(ready) = self.ready.get_mut(&part).filter(|ready| ready.unserved > 0) else { return };
        ready.unserved -= 1;
        if ready.unserved == 0 {
            self.unserved -= ready.cost;
            self.shed();
        }
    }

    /// Drops the oldest parts while all together take too much.
    fn shed(&mut self) {
        let mut at = 0;
        while self.bytes > self.limit
            && let Some(part) = self.order.get(at).copied()
        {
            if self.ready[&part].unserved > 0 {
                at += 1;
            } else {
                self.remove(part);
            }
        }
    }

    /// Drops parts that were not read from for a while.
    pub fn drop_idle(&mut self, tick: u32) {
        let idle = |part: &ReadyPage| part.unserved == 0 && tick.wrapping_sub(part.used) >= PAGE_TICKS;
        let idle = self.ready.iter().filter(|(_, part)| idle(part)).map(|(part, _)| *part);
        for part in idle.collect::<Vec<_>>() {
            self.remove(part);
        }
    }

    /// Drops the parts and reads of a channel.
    pub fn forget(&mut self, channel: ChannelKey) {
        self.reads.forget(&channel);
        let parts = (channel, EventId(0))..=(channel, EventId(u64::MAX));
        let parts = self.ready.range(parts).map(|(part, _)| *part);
        for part in parts.collect::<Vec<_>>() {
            self.remove(part);
        }
    }

    /// Drops a part. Returns how many unserved readers it had.
    fn remove(&mut self, part: Part) -> usize {
        let Some(ready) = self.ready.remove(&part) else { return 0 };
        self.order.retain(|other| *other != part);
        self.bytes -= ready.cost;
        if ready.unserved > 0 {
            self.unserved -= ready.cost;
        }
        ready.unserved
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::{PAGE, PART_SHARED};
    use crate::ws::connection::{BURST, ReplayPace};
    use proptest::prelude::*;

    const CHANNEL: ChannelKey = (1, 1);
    const FIRST: u64 = 1000;

    /// History as a bus holds it, and what it was asked for.
    struct Bus {
        /// Sizes of the events from [`FIRST`] + 1 on.
        sizes: Vec<usize>,
        oldest: u64,
        asked: VecDeque<Read<ChannelKey>>,
        reads: usize,
        bytes: usize,
    }

    impl Bus {
        fn head(&self) -> u64 {
            FIRST + self.sizes.len() as u64
        }

        fn size(&self, id: u64) -> usize {
            self.sizes[(id - FIRST - 1) as usize]
        }

        /// As `read.lua` answers, whose steps may go beyond the size wanted.
        fn answer(&mut self, position: u64, bytes: usize, step: u64) -> Page {
            let begin = page_begin(EventId(position)).0;
            let end = (begin + PAGE).min(self.head());
            let size = |from: u64, to: u64| (from..=to).map(|id| self.size(id)).sum::<usize>();
            let from = (begin + 1).max(self.oldest);
            let shares = from <= position && size(from, position) < PART_SHARED;
            let from = if shares { from } else { (position + 1).max(self.oldest) };
            let mut last = position.max(self.oldest - 1);
            while last < end && size(position.max(self.oldest - 1) + 1, last) < bytes {
                last = (last + step).min(end);
            }
            let read = size(from, last);
            self.reads += 1;
            self.bytes += read;
            let entries: Vec<_> = (from..=last).map(|id| event(id, self.size(id))).collect();
            Page {
                after: entries
                    .first()
                    .map_or(EventId(position), |first| first.before().min(EventId(position))),
                base: EventId(FIRST),
                head: EventId(self.head()),
                oldest: EventId(self.oldest),
                entries,
            }
        }
    }

    fn event(id: u64, size: usize) -> Entry {
        Entry::events(EventId(id), std::iter::once(&vec![b'x'; size][..]))
    }

    /// A connection that reads history, without its socket.
    struct Reader {
        position: u64,
        pace: ReplayPace,
        waits: bool,
        gone: bool,
        /// What its socket takes in one turn, in bytes.
        takes: usize,
        /// What of the last event it has yet to take.
        rest: usize,
        got: usize,
        resets: usize,
    }

    struct Shard {
        pages: Pages,
        feed: Feed,
        bus: Bus,
        readers: Vec<Reader>,
        answered: VecDeque<(usize, Part)>,
        tick: u32,
        most: usize,
    }

    fn id(slot: usize) -> ConnectionId {
        ConnectionId { shard: 0, slot: slot as u32, generation: 0 }
    }

    impl Shard {
        fn start_reads(&mut self) {
            let readers = &self.readers;
            while let Some(read) = self.pages.start(|id| !readers[id.slot as usize].gone) {
                self.bus.asked.push_back(read);
            }
        }

        /// As `Shard::catch_up` goes on with one reader.
        fn turn(&mut self, slot: usize, mut answered: bool) {
            let head = self.feed.position();
            let mut room = self.readers[slot].takes;
            loop {
                let reader = &mut self.readers[slot];
                let part = room.min(reader.rest);
                reader.rest -= part;
                room -= part;
                reader.pace.took(part as u64, self.tick);
                if reader.gone || reader.waits || reader.rest > 0 || reader.position == head.0 || room == 0 {
                    return;
                }
                let position = EventId(reader.position);
                let Some(page) = self.pages.find(CHANNEL, position, self.tick) else {
                    assert!(!answered, "an answer serves the reader that it is for");
                    reader.waits = true;
                    self.pages.wait(CHANNEL, position, reader.pace.ask(), id(slot));
                    return self.start_reads();
                };
                answered = false;
                if !page.proves(position) {
                    reader.resets += 1;
                    reader.position = self.bus.oldest.max(FIRST + 1) - 1;
                    continue;
                }
                let feed = &page.feed;
                let mut number = feed.start();
                while room > 0
                    && let Some(entry) = feed.get(number)
                {
                    number += 1;
                    if entry.last.0 <= reader.position {
                        continue;
                    }
                    assert_eq!(entry.before().0, reader.position, "in order, none missing");
                    let part = room.min(entry.bytes.len());
                    room -= part;
                    reader.rest = entry.bytes.len() - part;
                    reader.got += entry.bytes.len();
                    reader.position = entry.last.0;
                    reader.pace.took(part as u64, self.tick);
                }
            }
        }

        fn read_comes(&mut self, step: u64) {
            let Some(Read { position, bytes, .. }) = self.bus.asked.pop_front() else { return };
            let page = self.bus.answer(position.0, bytes, step);
            let (part, served) = self.pages.take(CHANNEL, position, &page, &self.feed, self.tick);
            self.answered.extend(served.into_iter().map(|id| (id.slot as usize, part)));
            self.start_reads();
            self.most = self.most.max(self.pages.bytes());
        }

        fn serve(&mut self) {
            let Some((slot, part)) = self.answered.pop_front() else { return };
            self.readers[slot].waits = false;
            self.turn(slot, true);
            self.pages.served(part);
            self.start_reads();
        }

        fn is_over(&self) -> bool {
            self.readers.iter().all(|reader| reader.gone || reader.position == self.bus.head())
        }
    }

    proptest! {
        /// Whatever the sizes of events, the number and the pace of readers, and however the bus and they take turns:
        /// each reader gets everything in order, for little more reading than it takes, within the memory allowed.
        #[test]
        fn every_reader_makes_progress(
            longest_bits in 0u32..25,
            shapes in prop::collection::vec(any::<u32>(), 20..700),
            starts in prop::collection::vec((any::<prop::sample::Index>(), 14u32..24, any::<bool>()), 1..40),
            oldest in 0usize..300,
            turns in prop::collection::vec((any::<u8>(), any::<prop::sample::Index>()), 1..200),
        ) {
            let longest = 1usize << longest_bits;
            // Few of the longest, or the test itself runs out of memory.
            let most = ((64 << 20) / longest).clamp(20, 700);
            let sizes: Vec<_> = shapes
                .iter()
                .take(most)
                .map(|shape| 1 + *shape as usize % if shape >> 30 == 0 { longest } else { longest.min(30_000) })
                .collect();
            let oldest = FIRST + 1 + (oldest % sizes.len()) as u64;
            let bus = Bus { sizes, oldest, asked: VecDeque::new(), reads: 0, bytes: 0 };
            let feed = Feed::new(EventId(FIRST), EventId(bus.head()));
            let readers: Vec<_> = starts
                .iter()
                .map(|(at, takes, gone)| Reader {
                    position: FIRST + at.index(bus.sizes.len()) as u64,
                    pace: ReplayPace::default(),
                    waits: false,
                    gone: *gone && takes % 4 == 0,
                    takes: 1 << takes,
                    rest: 0,
                    got: 0,
                    resets: 0,
                })
                .collect();
            let step = ((1 << 20) / longest).clamp(1, 32) as u64;
            let mut shard = Shard {
                pages: Pages::new(4 << 20, longest),
                feed,
                bus,
                readers,
                answered: VecDeque::new(),
                tick: 0,
                most: 0,
            };
            let total: usize = shard.bus.sizes.iter().sum();
            let mut rounds = 0;
            while !shard.is_over() {
                for (what, whom) in &turns {
                    match what % 8 {
                        0..=2 => shard.turn(whom.index(shard.readers.len()), false),
                        3 | 4 => shard.read_comes(step),
                        5 | 6 => shard.serve(),
                        _ => {
                            shard.tick += 1;
                            shard.pages.drop_idle(shard.tick);
                        }
                    }
                }
                // Everybody has a turn now and then.
                (0..shard.readers.len()).for_each(|slot| shard.turn(slot, false));
                shard.read_comes(step);
                (0..shard.readers.len()).for_each(|_| shard.serve());
                rounds += 1;
                prop_assert!(rounds < 100_000, "no progress");
            }
            let readers = shard.readers.iter().filter(|reader| !reader.gone);
            let got: usize = readers.clone().map(|reader| reader.got).sum();
            let slack = readers.count() * (2 * BURST + 2 * longest);
            // Twice as much is the aim. It is a little more where seconds pass between two turns of a slow reader: parts that
            // are not read for PAGE_TICKS are dropped, and what they share with others is read again.
            prop_assert!(shard.bus.bytes <= 3 * got + slack, "{} read for {got} of {total}", shard.bus.bytes);
            let limit = shard.pages.limit;
            prop_assert!(shard.most <= 2 * limit + longest, "{} of {limit}", shard.most);
        }
    }
}
