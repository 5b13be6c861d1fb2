//! Pages of history: however many connections and shards need one, Redis is asked for it once.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::inward::{READ_BYTES, read};
use super::link::CallError;
use super::scripts::Known;
use super::{Bus, Outcome, reason, scripts, wire};
use crate::bus::{BusError, PAGE, Page, ShardId, ToShard, page_begin};
use crate::event::{ChannelName, EventId};
use crate::feed::Feed;

/// How long a page is kept for other shards. Their clients come together after a cut, and each shard keeps what it
/// got for as long as it is in use.
const KEEP: Duration = Duration::from_secs(5);

/// Most bytes of pages kept. The shards share them while they have them too.
const KEEP_BYTES: usize = 4 << 20;

/// The channel and the position asked for.
type Key = (ChannelName, EventId);

/// Pages being read, and those that were just read.
#[derive(Debug, Default)]
pub(super) struct Pages {
    /// Who waits for each.
    reading: HashMap<Key, Vec<ShardId>>,
    kept: HashMap<Key, Arc<Page>>,
    /// When each was read, and its size, oldest first.
    ages: VecDeque<(Instant, usize, Key)>,
    bytes: usize,
}

impl Pages {
    fn keep(&mut self, key: Key, page: Arc<Page>) {
        if self.kept.contains_key(&key) {
            return; // one of an earlier run, whose time will come
        }
        let size = page.entries.iter().map(Feed::cost).sum();
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

    /// Lets go of pages whose time is over.
    pub(super) fn expire(&mut self, now: Instant) {
        while self.ages.front().is_some_and(|(read, ..)| now.duration_since(*read) > KEEP) {
            self.shed(self.bytes - 1);
        }
    }
}

impl Bus {
    pub(super) fn read_page(&mut self, name: ChannelName, after: EventId, shard: ShardId) {
        let key = (name, after);
        let known = self.channels.get(&key.0).map_or_else(Known::default, |channel| channel.known);
        if let Some(page) = self.pages.kept.get(&key).filter(|page| page.base == known.base) {
            let (result, (channel, after)) = (Ok(page.clone()), key);
            return self.shards.tell(shard, ToShard::Page { channel, after, result });
        }
        let Some(session) = self.link.session() else {
            let result = Err(self.away().unwrap_or_else(|| BusError::Away("reconnecting".into())));
            return self.shards.tell(shard, ToShard::Page { channel: key.0, after, result });
        };
        let waiting = self.pages.reading.entry(key.clone()).or_default();
        waiting.push(shard);
        if waiting.len() > 1 {
            return; // it shares the read under way
        }
        self.numbers.reads.add(1);
        let end = EventId(page_begin(after).0 + PAGE);
        let args = scripts::read_args(&self.terms, known, after.next(), end, PAGE, READ_BYTES);
        let (caller, outcomes, reads) = (session.caller(), self.outcomes.clone(), self.reads.clone());
        let (redis_key, generation) = (self.terms.key(&key.0), self.link.generation());
        tokio::spawn(async move {
            let _permit = reads.acquire_owned().await;
            let mut result = read(&caller, &redis_key, args).await;
            if let Ok(page) = &mut result {
                wire::whole(page, after);
            }
            let _ = outcomes.send(Outcome::Page(generation, key.0, after, result));
        });
    }

    pub(super) fn page_was_read(
        &mut self,
        generation: u64,
        name: ChannelName,
        after: EventId,
        result: Result<Page, CallError>,
    ) {
        let key = (name, after);
        let waiting = self.pages.reading.remove(&key).unwrap_or_default();
        let name = &key.0;
        if let (Ok(page), Some(channel)) = (&result, self.channels.get_mut(name)) {
            channel.known.learn(page.base, page.head);
            let sequence = channel.follow.as_ref().and_then(|follow| follow.sequence.as_ref());
            // What Redis has and this node has not is nearly always on its way. A canary comes behind it, and tells.
            if sequence
                .is_some_and(|sequence| (sequence.base(), sequence.position()) < (page.base, page.head))
            {
                self.canary_soon();
            }
        }
        let answer = match result {
            Ok(page) => Ok(Arc::new(page)),
            Err(error) => {
                let away = BusError::Away(reason::of(&error).into());
                self.judge(generation, &error);
                Err(away)
            }
        };
        for shard in &waiting {
            let (channel, result) = (name.clone(), answer.clone());
            self.shards.tell(*shard, ToShard::Page { channel, after, result });
        }
        // One that ends where the head stood is as good: whoever has all of it asks for what follows.
        if let Ok(page) = answer
            && waiting.len() < self.shards.count()
            && !page.entries.is_empty()
        {
            self.pages.keep(key, page);
        }
    }
}
