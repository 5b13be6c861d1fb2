//! Pages of history: however many connections and shards need a part of one, Redis is asked for it once.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::errors::CallError;
use super::scripts::{Known, Wanted};
use super::subscriptions::read;
use super::{Bus, Outcome, advice, decode, scripts};
use crate::bus::reads::{Read, Reads};
use crate::bus::{BusError, BusMessage, PAGE, PART_SHARED, Page, ShardId, page_begin};
use crate::protocol::event::{ChannelName, Entry, EventId};

/// How long a part is kept for other shards. Their clients come together after a cut, and each shard keeps what it
/// got for as long as it is in use.
const KEEP: Duration = Duration::from_secs(5);

/// Most bytes of parts kept. The shards share them while they have them too.
const KEEP_BYTES: usize = 4 << 20;

/// Most bytes of parts that Redis is asked for at once.
const UNDER_WAY_BYTES: usize = 16 << 20;

/// The channel and the position that a part follows.
type Key = (ChannelName, EventId);

/// Parts of pages being read, and those that were just read.
#[derive(Debug)]
pub(super) struct Pages {
    /// The shards that wait.
    reads: Reads<ChannelName, ShardId>,
    kept: BTreeMap<Key, Arc<Page>>,
    /// When each was read, and its size, oldest first.
    ages: VecDeque<(Instant, usize, Key)>,
    bytes: usize,
}

impl Pages {
    pub(super) fn new(longest_event: usize) -> Pages {
        let reads = Reads::new(longest_event);
        Pages { reads, kept: BTreeMap::new(), ages: VecDeque::new(), bytes: 0 }
    }

    /// A part that says what follows this position, of the epoch that begins at `base`.
    fn find(&self, channel: &ChannelName, position: EventId, base: EventId) -> Option<&Arc<Page>> {
        let page = (channel.clone(), page_begin(position))..=(channel.clone(), position);
        let parts = self.kept.range(page).rev().map(|(_, part)| part);
        parts.into_iter().find(|part| part.base == base && part.covers(position))
    }

    fn keep(&mut self, channel: ChannelName, page: Arc<Page>) {
        let key = (channel, page.after);
        if self.kept.contains_key(&key) {
            return; // one of an earlier epoch, whose time will come
        }
        let size = page.entries.iter().map(Entry::memory).sum();
        self.bytes += size;
        self.ages.push_back((Instant::now(), size, key.clone()));
        self.kept.insert(key, page);
        self.shed(KEEP_BYTES);
    }

    fn shed(&mut self, most: usize) {
        while self.bytes > most {
            let Some((_, size, key)) = self.ages.pop_front() else { return };
            self.bytes -= size;
            self.kept.remove(&key);
        }
    }

    /// Drops parts whose time is over.
    pub(super) fn expire(&mut self, now: Instant) {
        while self.ages.front().is_some_and(|(read, ..)| now.duration_since(*read) > KEEP) {
            self.shed(self.bytes - 1);
        }
    }
}

impl Bus {
    fn known(&self, channel: &ChannelName) -> Known {
        self.channels.get(channel).map_or_else(Known::default, |channel| channel.known)
    }

    pub(super) fn read_page(
        &mut self,
        channel: ChannelName,
        position: EventId,
        bytes: usize,
        shard: ShardId,
    ) {
        if let Some(page) = self.pages.find(&channel, position, self.known(&channel).base) {
            let result = Ok(page.clone());
            return self.shards.send(shard, BusMessage::Page { channel, position, result });
        }
        self.pages.reads.wait(channel, position, bytes, shard);
        self.start_page_reads();
    }

    fn start_page_reads(&mut self) {
        while let Some(Read { channel, position, bytes }) = self.pages.reads.start(UNDER_WAY_BYTES, |_| true)
        {
            let Some(session) = self.link.session() else {
                let why = self.away().unwrap_or_else(|| BusError::Away("reconnecting".into()));
                self.fail_page(&channel, position, &why);
                continue;
            };
            self.numbers.reads.add(1);
            let begin = page_begin(position);
            let wanted = Wanted {
                from: position.next(),
                to: EventId(begin.0 + PAGE),
                events: PAGE,
                bytes,
                shared_from: begin.next(),
                shared_bytes: PART_SHARED,
            };
            let args = scripts::read_args(&self.terms, self.known(&channel), wanted);
            let (caller, outcomes, reads) = (session.caller(), self.outcomes.clone(), self.reads.clone());
            let (redis_key, generation) = (self.terms.key(&channel), self.link.generation());
            tokio::spawn(async move {
                let _permit = reads.acquire_owned().await;
                let mut result = read(&caller, &redis_key, args).await;
                if let Ok(page) = &mut result {
                    decode::whole(page, position);
                }
                let _ = outcomes.send(Outcome::Page(generation, channel, position, result));
            });
        }
    }

    pub(super) fn page_was_read(
        &mut self,
        generation: u64,
        name: ChannelName,
        position: EventId,
        result: Result<Page, CallError>,
    ) {
        match result {
            Ok(page) => self.take_page(name, position, page),
            Err(error) => {
                let why = BusError::Away(advice::of(&error).into());
                self.judge(generation, &error);
                self.fail_page(&name, position, &why);
            }
        }
        self.start_page_reads();
    }

    fn take_page(&mut self, name: ChannelName, position: EventId, page: Page) {
        if let Some(channel) = self.channels.get_mut(&name) {
            channel.known.learn(page.base, page.head);
            let sequence = channel.follow.as_ref().and_then(|follow| follow.sequence.as_ref());
            // What Redis has and this node has not is nearly always on its way. A canary comes behind it, and tells.
            if sequence
                .is_some_and(|sequence| (sequence.base(), sequence.position()) < (page.base, page.head))
            {
                self.canary_soon();
            }
        }
        let page = Arc::new(page);
        let served = self.pages.reads.answer(name.clone(), position, |position| page.covers(position));
        let all = served.len() >= self.shards.count();
        for (shard, position) in served {
            let (channel, result) = (name.clone(), Ok(page.clone()));
            self.shards.send(shard, BusMessage::Page { channel, position, result });
        }
        // One that ends where the head stood is as good: whoever has all of it asks for what follows.
        if !all && !page.entries.is_empty() {
            self.pages.keep(name, page);
        }
    }

    fn fail_page(&mut self, name: &ChannelName, position: EventId, why: &BusError) {
        for (shard, position) in self.pages.reads.fail(name.clone(), position) {
            let (channel, result) = (name.clone(), Err(why.clone()));
            self.shards.send(shard, BusMessage::Page { channel, position, result });
        }
    }
}
