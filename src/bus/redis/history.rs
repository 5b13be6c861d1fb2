//! Pages of history. Redis is asked for each page once, however many connections and shards need
//! it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::errors::CallError;
use super::primaries::SessionId;
use super::scripts::{KnownPosition, ReadRange};
use super::subscriptions::read_page;
use super::{Bus, Outcome, advice, decode, scripts};
use crate::bus::reads::Read;
use crate::bus::{BLOCK, BusError, Page, PageReader, SHARED_BYTES, block_start};
use crate::feed::eviction::EvictionQueue;
use crate::protocol::event::{ChannelName, Entry, EventId};

/// How long a page is kept for other shards, whose clients come back at the same time after a
/// network failure. Each shard keeps a page for as long as it is in use.
const KEEP: Duration = Duration::from_secs(5);

/// Most bytes of pages kept. Shards that hold a page share its bytes.
const KEEP_BYTES: usize = 4 << 20;

/// Most bytes of pages requested from Redis at a time.
const IN_FLIGHT_BYTES: usize = 16 << 20;

/// The channel and the position that a page follows.
type Key = (ChannelName, EventId);

/// Pages that are being read, and those that were just read.
#[derive(Debug)]
pub(super) struct History {
    kept: BTreeMap<Key, Arc<Page>>,
    /// What is in `kept`, and when it was read.
    eviction_queue: EvictionQueue<(Instant, Key)>,
}

impl History {
    pub(super) fn new() -> History {
        History { kept: BTreeMap::new(), eviction_queue: EvictionQueue::new() }
    }

    /// A page that covers this position, in the epoch that starts at `base`.
    fn find(&self, channel: &ChannelName, position: EventId, base: EventId) -> Option<&Arc<Page>> {
        let keys = (channel.clone(), block_start(position))..=(channel.clone(), position);
        let mut pages = self.kept.range(keys).rev().map(|(_, page)| page);
        pages.find(|page| page.base == base && page.covers(position))
    }

    fn keep(&mut self, channel: ChannelName, page: Arc<Page>) {
        let key = (channel, page.after);
        if self.kept.contains_key(&key) {
            return; // of an earlier epoch, until it expires
        }
        let bytes = page.entries.iter().map(Entry::memory).sum();
        self.eviction_queue.push((Instant::now(), key.clone()), bytes);
        self.kept.insert(key, page);
        while self.eviction_queue.oldest_over(KEEP_BYTES).is_some() {
            self.evict();
        }
    }

    fn evict(&mut self) {
        if let Some((_, key)) = self.eviction_queue.pop() {
            self.kept.remove(&key);
        }
    }

    /// Drops pages kept for longer than [`KEEP`].
    pub(super) fn expire(&mut self, now: Instant) {
        while self.eviction_queue.oldest().is_some_and(|(read, _)| now.duration_since(*read) > KEEP) {
            self.evict();
        }
    }
}

impl Bus {
    fn known(&self, channel: &ChannelName) -> KnownPosition {
        self.channels.get(channel).map_or_else(KnownPosition::default, |channel| channel.known)
    }

    pub(super) fn read_page(
        &mut self,
        channel: ChannelName,
        position: EventId,
        bytes: usize,
        reader: PageReader,
    ) {
        if let Some(page) = self.history.find(&channel, position, self.known(&channel).base) {
            let result = Ok(page.clone());
            return self.handles.shards.send_page(reader, channel, position, result);
        }
        let primary = self.primaries.of(&channel);
        self.primaries[primary].pages.wait(channel, position, bytes, reader);
        self.start_page_reads(primary);
    }

    fn start_page_reads(&mut self, primary: usize) {
        let limit = IN_FLIGHT_BYTES / self.primaries.shares();
        let id = self.primaries.session_id(primary);
        while let Some(Read { channel, position, bytes }) =
            self.primaries[primary].pages.start(limit, PageReader::is_waiting)
        {
            let at = &self.primaries[primary];
            let Some(session) = at.link.session() else {
                let why = self.why_no_session(primary);
                self.fail_page(primary, &channel, position, &why);
                continue;
            };
            self.handles.metrics.reads.add(1);
            let start = block_start(position);
            let range = ReadRange {
                from: position.next(),
                to: EventId(start.0 + BLOCK),
                events: BLOCK,
                bytes,
                shared_from: start.next(),
                shared_bytes: SHARED_BYTES,
            };
            let args = scripts::read_args(&self.handles.settings, self.known(&channel), range);
            let (commands, outcomes, reads) =
                (session.commands(), self.handles.outcomes.clone(), at.reads.clone());
            let key = self.handles.settings.channel_key(&channel);
            tokio::spawn(async move {
                let mut result = read_page(&commands, &reads, &key, args).await;
                if let Ok(page) = &mut result {
                    decode::make_consistent(page, position);
                }
                let _ = outcomes.send(Outcome::Page(id, channel, position, result));
            });
        }
    }

    pub(super) fn on_page(
        &mut self,
        session: SessionId,
        name: ChannelName,
        position: EventId,
        result: Result<Page, CallError>,
    ) {
        let primary = session.primary;
        if !self.primaries.contains(primary) {
            return; // its readers have got an error
        }
        match result {
            Ok(page) => self.share_page(primary, name, position, page),
            Err(error) => {
                let why = BusError::Unavailable(advice::for_call(&error).into());
                self.on_call_error(session, &error);
                self.fail_page(primary, &name, position, &why);
            }
        }
        self.start_page_reads(primary);
    }

    fn share_page(&mut self, primary: usize, name: ChannelName, position: EventId, page: Page) {
        if let Some(channel) = self.channels.get_mut(&name) {
            channel.known.update(page.base, page.head);
            let sequence = channel.followed.as_ref().and_then(|followed| followed.sequence.as_ref());
            // Events that Redis has and this node does not are nearly always in flight. A probe
            // comes after them and shows whether they are.
            if sequence
                .is_some_and(|sequence| (sequence.base(), sequence.position()) < (page.base, page.head))
            {
                self.primaries[primary].probes.send_soon();
            }
        }
        let page = Arc::new(page);
        let pages = &mut self.primaries[primary].pages;
        let served = pages.answer(name.clone(), position, |position| page.covers(position));
        let shards = served.iter().filter(|(reader, _)| matches!(reader, PageReader::Shard(..))).count();
        for (reader, position) in served {
            self.handles.shards.send_page(reader, name.clone(), position, Ok(page.clone()));
        }
        // A page that ends at the head of its moment is kept, too: readers that have all of it ask
        // for what follows.
        if (1..self.handles.shards.count()).contains(&shards) && !page.entries.is_empty() {
            self.history.keep(name, page);
        }
    }

    fn fail_page(&mut self, primary: usize, name: &ChannelName, position: EventId, why: &BusError) {
        for (reader, position) in self.primaries[primary].pages.fail(name.clone(), position) {
            self.handles.shards.send_page(reader, name.clone(), position, Err(why.clone()));
        }
    }
}
