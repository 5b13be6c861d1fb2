//! Readers that wait for pages of history. Readers of one block share a read, reads start in the
//! order of their requests, and the bytes in flight are limited. Each shard has one of these, and
//! the Redis bus.

use std::collections::{BTreeMap, VecDeque};

use super::page::block_start;
use crate::protocol::event::EventId;

/// A read to start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Read<C> {
    pub channel: C,
    /// The page returned must cover this position.
    pub position: EventId,
    /// About how many bytes to read.
    pub bytes: usize,
}

#[derive(Debug)]
struct WaitingReader<R> {
    reader: R,
    position: EventId,
    bytes: usize,
}

/// The readers of one block.
#[derive(Debug)]
struct Readers<R> {
    /// In the order of their requests.
    waiting: VecDeque<WaitingReader<R>>,
    /// The position of the read in flight, and the bytes reserved for it.
    in_flight: Option<(EventId, usize)>,
}

/// Waiting readers, by channel and block.
///
/// A read is always for the reader that has waited longest in its block, and its answer serves that
/// reader. So a reader is served after at most as many reads as readers of its block came before it,
/// however small the pages are and however soon they are dropped.
#[derive(Debug)]
pub struct Reads<C, R> {
    blocks: BTreeMap<(C, EventId), Readers<R>>,
    /// Blocks without a read in flight, in the order of their turns.
    queue: VecDeque<(C, EventId)>,
    /// Number of reads in flight.
    started: usize,
    /// Bytes reserved for them: for each the bytes to read and one of the longest events, since
    /// events are not split.
    reserved: usize,
    longest_event: usize,
}

impl<C: Clone + Ord, R> Reads<C, R> {
    /// One event has at most `longest_event` bytes.
    pub fn new(longest_event: usize) -> Reads<C, R> {
        Reads { blocks: BTreeMap::new(), queue: VecDeque::new(), started: 0, reserved: 0, longest_event }
    }

    /// Adds a reader of about `bytes` bytes after its position.
    pub fn wait(&mut self, channel: C, position: EventId, bytes: usize, reader: R) {
        let key = (channel, block_start(position));
        let readers = self.blocks.entry(key.clone()).or_insert_with(|| {
            self.queue.push_back(key);
            Readers { waiting: VecDeque::new(), in_flight: None }
        });
        readers.waiting.push_back(WaitingReader { reader, position, bytes });
    }

    /// Starts the next read if fewer than `limit` bytes are in flight; a single read may be larger.
    /// Drops readers for which `stays` is false.
    pub fn start(&mut self, limit: usize, stays: impl Fn(&R) -> bool) -> Option<Read<C>> {
        while self.started == 0 || self.reserved < limit {
            let key = self.queue.pop_front()?;
            let readers = self.blocks.get_mut(&key).expect("each queued block has readers");
            readers.waiting.retain(|waiting| stays(&waiting.reader));
            let Some(WaitingReader { position, bytes, .. }) = readers.waiting.front() else {
                self.blocks.remove(&key);
                continue;
            };
            let (position, bytes) = (*position, *bytes);
            let reserved = bytes + self.longest_event;
            readers.in_flight = Some((position, reserved));
            self.started += 1;
            self.reserved += reserved;
            return Some(Read { channel: key.0, position, bytes });
        }
        None
    }

    /// Removes and returns the readers that an answer serves: those at its position, and those for
    /// whose position `covers` is true. The others wait for another read.
    pub fn answer(
        &mut self,
        channel: C,
        position: EventId,
        covers: impl Fn(EventId) -> bool,
    ) -> Vec<(R, EventId)> {
        let key = (channel, block_start(position));
        let Some(waiting) = self.finish(&key, position) else { return Vec::new() };
        let (served, left): (VecDeque<_>, VecDeque<_>) =
            waiting.into_iter().partition(|waiting| waiting.position == position || covers(waiting.position));
        if !left.is_empty() {
            self.queue.push_back(key.clone());
            self.blocks.insert(key, Readers { waiting: left, in_flight: None });
        }
        served.into_iter().map(|waiting| (waiting.reader, waiting.position)).collect()
    }

    /// Removes and returns all readers of a block whose read failed.
    pub fn fail(&mut self, channel: C, position: EventId) -> Vec<(R, EventId)> {
        let waiting = self.finish(&(channel, block_start(position)), position).unwrap_or_default();
        waiting.into_iter().map(|waiting| (waiting.reader, waiting.position)).collect()
    }

    /// Removes and returns all readers.
    pub fn drain(&mut self) -> impl Iterator<Item = (C, R, EventId)> {
        (self.started, self.reserved) = (0, 0);
        self.queue.clear();
        let blocks = std::mem::take(&mut self.blocks).into_iter();
        blocks.flat_map(|((channel, _), readers)| {
            readers
                .waiting
                .into_iter()
                .map(move |waiting| (channel.clone(), waiting.reader, waiting.position))
        })
    }

    /// Ends the read in flight for this position. `None` if its channel was removed meanwhile.
    fn finish(&mut self, key: &(C, EventId), position: EventId) -> Option<VecDeque<WaitingReader<R>>> {
        let (in_flight, reserved) = self.blocks.get(key)?.in_flight?;
        if in_flight != position {
            return None;
        }
        self.started -= 1;
        self.reserved -= reserved;
        self.blocks.remove(key).map(|readers| readers.waiting)
    }

    /// Whether a channel has waiting readers.
    pub fn has(&self, channel: &C) -> bool {
        self.keys(channel).next().is_some()
    }

    /// Removes a channel and its readers.
    pub fn forget(&mut self, channel: &C) {
        for key in self.keys(channel).cloned().collect::<Vec<_>>() {
            let readers = self.blocks.remove(&key);
            match readers.and_then(|readers| readers.in_flight) {
                Some((_, reserved)) => {
                    self.started -= 1;
                    self.reserved -= reserved;
                }
                None => self.queue.retain(|queued| *queued != key),
            }
        }
    }

    fn keys(&self, channel: &C) -> impl Iterator<Item = &(C, EventId)> {
        let first = (channel.clone(), EventId(0));
        self.blocks.range(first..).map(|(key, _)| key).take_while(move |key| key.0 == *channel)
    }
}
