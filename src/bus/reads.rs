//! Readers of history that wait for the bus. Readers of one page share a read, reads start in the order in which
//! they were asked for, and the bytes under way have a limit. Each shard keeps one, and so does the Redis bus.

use std::collections::{BTreeMap, VecDeque};

use super::page::page_begin;
use crate::protocol::event::EventId;

/// A read to be started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Read<C> {
    /// The channel.
    pub channel: C,
    /// The position of its reader: the answer holds the next event after it.
    pub position: EventId,
    /// About how many bytes it wants.
    pub bytes: usize,
}

/// A reader that waits.
#[derive(Debug)]
struct Waiting<R> {
    reader: R,
    position: EventId,
    bytes: usize,
}

/// The readers of one page.
#[derive(Debug)]
struct Readers<R> {
    /// Longest first.
    waiting: VecDeque<Waiting<R>>,
    /// The position of the read under way, and the bytes reserved for it.
    under_way: Option<(EventId, usize)>,
}

/// Readers that wait, by channel and page.
///
/// A read is always for the reader that has waited longest for its page, and its answer serves that reader. So a
/// reader is served after at most as many reads as readers of its page came before it, however small the parts of a page
/// are, and however soon they are dropped.
#[derive(Debug)]
pub struct Reads<C, R> {
    pages: BTreeMap<(C, EventId), Readers<R>>,
    /// Pages without a read under way, in the order of their turns.
    queue: VecDeque<(C, EventId)>,
    /// Number of reads under way.
    started: usize,
    /// Bytes reserved for them: what each asks for, and one of the longest events, since events come whole.
    reserved: usize,
    longest_event: usize,
}

impl<C: Clone + Ord, R> Reads<C, R> {
    /// No readers; one event may have `longest_event` bytes.
    pub fn new(longest_event: usize) -> Reads<C, R> {
        Reads { pages: BTreeMap::new(), queue: VecDeque::new(), started: 0, reserved: 0, longest_event }
    }

    /// Adds a reader that waits for about `bytes` bytes after its position.
    pub fn wait(&mut self, channel: C, position: EventId, bytes: usize, reader: R) {
        let key = (channel, page_begin(position));
        let readers = self.pages.entry(key.clone()).or_insert_with(|| {
            self.queue.push_back(key);
            Readers { waiting: VecDeque::new(), under_way: None }
        });
        readers.waiting.push_back(Waiting { reader, position, bytes });
    }

    /// The next read, if fewer than `limit` bytes are under way; a single read may be larger. Readers that `stays` does not
    /// confirm are dropped.
    pub fn start(&mut self, limit: usize, stays: impl Fn(&R) -> bool) -> Option<Read<C>> {
        while self.started == 0 || self.reserved < limit {
            let key = self.queue.pop_front()?;
            let readers = self.pages.get_mut(&key).expect("the queue names pages that are waited for");
            readers.waiting.retain(|waiting| stays(&waiting.reader));
            let Some(Waiting { position, bytes, .. }) = readers.waiting.front() else {
                self.pages.remove(&key);
                continue;
            };
            let (position, bytes) = (*position, *bytes);
            let reserved = bytes + self.longest_event;
            readers.under_way = Some((position, reserved));
            self.started += 1;
            self.reserved += reserved;
            return Some(Read { channel: key.0, position, bytes });
        }
        None
    }

    /// Removes and returns the readers that an answer serves: those with its position, and those whose position `covers`
    /// confirms. The others wait for another read.
    pub fn answer(
        &mut self,
        channel: C,
        position: EventId,
        covers: impl Fn(EventId) -> bool,
    ) -> Vec<(R, EventId)> {
        let key = (channel, page_begin(position));
        let Some(waiting) = self.finish(&key, position) else { return Vec::new() };
        let (served, left): (VecDeque<_>, VecDeque<_>) =
            waiting.into_iter().partition(|waiting| waiting.position == position || covers(waiting.position));
        if !left.is_empty() {
            self.queue.push_back(key.clone());
            self.pages.insert(key, Readers { waiting: left, under_way: None });
        }
        served.into_iter().map(|waiting| (waiting.reader, waiting.position)).collect()
    }

    /// Removes and returns all readers that waited for a page whose read failed.
    pub fn fail(&mut self, channel: C, position: EventId) -> Vec<(R, EventId)> {
        let waiting = self.finish(&(channel, page_begin(position)), position).unwrap_or_default();
        waiting.into_iter().map(|waiting| (waiting.reader, waiting.position)).collect()
    }

    /// Ends the read under way for this position. `None`: its channel was forgotten meanwhile.
    fn finish(&mut self, key: &(C, EventId), position: EventId) -> Option<VecDeque<Waiting<R>>> {
        let (under_way, reserved) = self.pages.get(key)?.under_way?;
        if under_way != position {
            return None;
        }
        self.started -= 1;
        self.reserved -= reserved;
        self.pages.remove(key).map(|readers| readers.waiting)
    }

    /// Whether anyone waits for history of a channel.
    pub fn has(&self, channel: &C) -> bool {
        self.keys(channel).next().is_some()
    }

    /// Forgets a channel and its readers.
    pub fn forget(&mut self, channel: &C) {
        for key in self.keys(channel).cloned().collect::<Vec<_>>() {
            let readers = self.pages.remove(&key);
            match readers.and_then(|readers| readers.under_way) {
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
        self.pages.range(first..).map(|(key, _)| key).take_while(move |key| key.0 == *channel)
    }
}
