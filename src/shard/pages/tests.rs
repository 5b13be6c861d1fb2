use std::collections::VecDeque;

use super::*;
use crate::bus::{BLOCK, SHARED_BYTES};
use crate::protocol::event::ChannelName;
use crate::ws::replay::Replay;
use crate::ws::writer::BURST;
use proptest::prelude::*;

const CHANNEL: ChannelId = ChannelId { key: 1, generation: 1 };
const FIRST: u64 = 1000;

fn form() -> ChannelForm {
    ChannelName::parse("room").expect("a name").into()
}

/// The history of a bus, and the reads that it was asked for.
struct Bus {
    /// Sizes of the events from [`FIRST`] + 1 on.
    sizes: Vec<usize>,
    oldest: u64,
    requests: VecDeque<Read<ChannelId>>,
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

    /// Answers like `read.lua`, whose steps may exceed the size asked for.
    fn answer(&mut self, position: u64, bytes: usize, step: u64) -> Page {
        let before = block_start(EventId(position)).0;
        let end = (before + BLOCK).min(self.head());
        let size = |from: u64, to: u64| (from..=to).map(|id| self.size(id)).sum::<usize>();
        let from = (before + 1).max(self.oldest);
        let shares = from <= position && size(from, position) < SHARED_BYTES;
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
            named: Default::default(),
            after: entries.first().map_or(EventId(position), |first| first.before().min(EventId(position))),
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
    replay: Replay,
    waits: bool,
    closed: bool,
    /// Bytes that its socket takes in one turn.
    takes: usize,
    /// Bytes of the last event that it has not taken.
    rest: usize,
    received: usize,
    resets: usize,
}

struct Shard {
    pages: PageCache,
    feed: Feed,
    bus: Bus,
    readers: Vec<Reader>,
    answered: VecDeque<(usize, PageId)>,
    tick: u32,
    most: usize,
}

fn id(slot: usize) -> ConnectionId {
    ConnectionId { shard: 0, slot: slot as u32, generation: 0 }
}

impl Shard {
    fn start_reads(&mut self) {
        let readers = &self.readers;
        while let Some(read) = self.pages.start(|id| !readers[id.slot as usize].closed) {
            self.bus.requests.push_back(read);
        }
    }

    /// Like `Shard::write_history`, for one reader.
    fn turn(&mut self, slot: usize, mut answered: bool) {
        let head = self.feed.position();
        let mut room = self.readers[slot].takes;
        loop {
            let reader = &mut self.readers[slot];
            let part = room.min(reader.rest);
            reader.rest -= part;
            room -= part;
            reader.replay.count(part as u64, self.tick);
            if reader.closed || reader.waits || reader.rest > 0 || reader.position == head.0 || room == 0 {
                return;
            }
            let position = EventId(reader.position);
            let Some(found) = self.pages.find(CHANNEL, position, self.tick) else {
                assert!(!answered, "a read serves the reader that it was started for");
                reader.waits = true;
                self.pages.wait(CHANNEL, position, reader.replay.next_page_bytes(), id(slot));
                return self.start_reads();
            };
            answered = false;
            if !found.proves(position) {
                reader.resets += 1;
                reader.position = self.bus.oldest.max(FIRST + 1) - 1;
                continue;
            }
            let feed = &found.feed;
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
                reader.received += entry.bytes.len();
                reader.position = entry.last.0;
                reader.replay.count(part as u64, self.tick);
            }
        }
    }

    fn answer_read(&mut self, step: u64) {
        let Some(Read { position, bytes, .. }) = self.bus.requests.pop_front() else { return };
        let page = self.bus.answer(position.0, bytes, step);
        let (page, served) = self.pages.add(CHANNEL, position, &page, &form(), &self.feed, self.tick);
        self.answered.extend(served.into_iter().map(|id| (id.slot as usize, page)));
        self.start_reads();
        self.most = self.most.max(self.pages.bytes());
    }

    fn serve(&mut self) {
        let Some((slot, page)) = self.answered.pop_front() else { return };
        self.readers[slot].waits = false;
        self.turn(slot, true);
        self.pages.served(page);
        self.start_reads();
    }

    fn is_complete(&self) -> bool {
        self.readers.iter().all(|reader| reader.closed || reader.position == self.bus.head())
    }
}

proptest! {
    /// For any sizes of events, numbers and speeds of readers, and orders of turns: each reader
    /// gets everything in order, the bus reads little more than that, and memory stays within its
    /// limit.
    #[test]
    fn every_reader_makes_progress(
        longest_bits in 0u32..25,
        shapes in prop::collection::vec(any::<u32>(), 20..700),
        starts in prop::collection::vec((any::<prop::sample::Index>(), 14u32..24, any::<bool>()), 1..40),
        oldest in 0usize..300,
        turns in prop::collection::vec((any::<u8>(), any::<prop::sample::Index>()), 1..200),
    ) {
        let longest = 1usize << longest_bits;
        // Few of the longest, or the test runs out of memory.
        let most = ((64 << 20) / longest).clamp(20, 700);
        let sizes: Vec<_> = shapes
            .iter()
            .take(most)
            .map(|shape| 1 + *shape as usize % if shape >> 30 == 0 { longest } else { longest.min(30_000) })
            .collect();
        let oldest = FIRST + 1 + (oldest % sizes.len()) as u64;
        let bus = Bus { sizes, oldest, requests: VecDeque::new(), reads: 0, bytes: 0 };
        let feed = Feed::new(EventId(FIRST), EventId(bus.head()));
        let readers: Vec<_> = starts
            .iter()
            .map(|(at, takes, closed)| Reader {
                position: FIRST + at.index(bus.sizes.len()) as u64,
                replay: Replay::default(),
                waits: false,
                closed: *closed && takes % 4 == 0,
                takes: 1 << takes,
                rest: 0,
                received: 0,
                resets: 0,
            })
            .collect();
        let step = ((1 << 20) / longest).clamp(1, 32) as u64;
        let mut shard = Shard {
            pages: PageCache::new(4 << 20, longest),
            feed,
            bus,
            readers,
            answered: VecDeque::new(),
            tick: 0,
            most: 0,
        };
        let total: usize = shard.bus.sizes.iter().sum();
        let mut rounds = 0;
        while !shard.is_complete() {
            for (step_kind, reader) in &turns {
                match step_kind % 8 {
                    0..=2 => shard.turn(reader.index(shard.readers.len()), false),
                    3 | 4 => shard.answer_read(step),
                    5 | 6 => shard.serve(),
                    _ => {
                        shard.tick += 1;
                        shard.pages.drop_idle(shard.tick);
                    }
                }
            }
            // Every reader has a turn now and then.
            (0..shard.readers.len()).for_each(|slot| shard.turn(slot, false));
            shard.answer_read(step);
            (0..shard.readers.len()).for_each(|_| shard.serve());
            rounds += 1;
            prop_assert!(rounds < 100_000, "no progress");
        }
        let readers = shard.readers.iter().filter(|reader| !reader.closed);
        let received: usize = readers.clone().map(|reader| reader.received).sum();
        let slack = readers.count() * (2 * BURST + 2 * longest);
        // The aim is twice as much. It is a little more if seconds pass between two turns of a slow
        // reader: a page that is not read for PAGE_TICKS is dropped, and read again for others.
        prop_assert!(shard.bus.bytes <= 3 * received + slack, "{} read for {received} of {total}", shard.bus.bytes);
        let limit = shard.pages.limit;
        prop_assert!(shard.most <= 2 * limit + longest, "{} of {limit}", shard.most);
    }
}
