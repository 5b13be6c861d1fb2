//! Pages of history in the memory of one shard, as the bus sent them, and the connections that wait
//! for others.

use std::collections::BTreeMap;

use super::channels::ChannelId;
use crate::bus::reads::{Read, Reads};
use crate::bus::{ConnectionId, Page, block_start, is_continuous, is_gone};
use crate::feed::Feed;
use crate::feed::eviction::EvictionQueue;
use crate::protocol::event::{Entry, EventId};
use crate::protocol::form::ChannelForm;
use crate::ws::outbox::SharedTails;

#[cfg(test)]
mod tests;

/// A shard may always keep pages of this many events of the greatest length. Pages being read may
/// take as much again.
const LONGEST_EVENTS: usize = 4;

/// Ticks that a page is kept after it was last read: readers of the same page are close together in
/// time.
const PAGE_TICKS: u32 = 20;

/// A page in memory: its channel, and the position that it follows.
pub type PageId = (ChannelId, EventId);

/// A page, which connections read like a feed.
#[derive(Debug)]
pub struct CachedPage {
    after: EventId,
    base: EventId,
    head: EventId,
    oldest: EventId,
    pub feed: Feed,
    /// Frames that were partly written when it was last read from.
    pub tails: SharedTails,
    /// Its memory, in bytes.
    memory: usize,
    /// When it was last read from, in ticks of the shard.
    used: u32,
    /// Connections that waited for it and have not had their turn. It stays until they have.
    unserved: usize,
}

impl CachedPage {
    /// A page from the bus. Events that the channel's feed does not have yet are left out, or
    /// readers would get them twice.
    fn new(page: &Page, channel: &ChannelForm, feed: &Feed, tick: u32) -> CachedPage {
        let entries: Vec<_> = page
            .entries_of(channel)
            .iter()
            .filter_map(|entry| entry.clone().until(feed.position()))
            .collect();
        CachedPage {
            after: page.after,
            base: page.base,
            head: page.head,
            oldest: page.oldest,
            memory: entries.iter().map(Entry::memory).sum(),
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

    /// The position before the oldest event that history had when the page was read.
    pub fn start(&self) -> EventId {
        self.oldest.previous().max(self.base)
    }

    /// Whether it shows what follows `position`: the next event, or that it is gone for good.
    fn covers(&self, position: EventId) -> bool {
        let gone = is_gone(position, self.base, self.head, self.oldest);
        self.after <= position && (position < self.feed.position() || gone)
    }
}

/// All pages in the memory of one shard, and the connections that wait for others.
#[derive(Debug)]
pub struct PageCache {
    /// Most bytes of all pages.
    limit: usize,
    reads: Reads<ChannelId, ConnectionId>,
    pages: BTreeMap<PageId, CachedPage>,
    eviction_queue: EvictionQueue<PageId>,
    /// Bytes of the pages that have unserved readers.
    unserved: usize,
}

impl PageCache {
    /// `memory` is the memory for pages, and one event may have `longest_event` bytes.
    pub fn new(memory: usize, longest_event: usize) -> PageCache {
        PageCache {
            limit: memory.max(LONGEST_EVENTS * longest_event),
            reads: Reads::new(longest_event),
            pages: BTreeMap::new(),
            eviction_queue: EvictionQueue::new(),
            unserved: 0,
        }
    }

    /// Bytes of all pages.
    pub fn bytes(&self) -> usize {
        self.eviction_queue.bytes()
    }

    /// A page that covers this position.
    pub fn find(&mut self, channel: ChannelId, position: EventId, tick: u32) -> Option<&mut CachedPage> {
        let ids = (channel, block_start(position))..=(channel, position);
        let page =
            self.pages.range_mut(ids).rev().map(|(_, page)| page).find(|page| page.covers(position))?;
        page.used = tick;
        Some(page)
    }

    /// Queues a connection for a page of about this many bytes, since none in memory covers its
    /// position.
    pub fn wait(&mut self, channel: ChannelId, position: EventId, bytes: usize, id: ConnectionId) {
        self.reads.wait(channel, position, bytes, id);
    }

    /// Whether any connection waits for history of this channel.
    pub fn has_waiting(&self, channel: ChannelId) -> bool {
        self.reads.has(&channel)
    }

    /// The next read, if there is memory for it. Connections that `waits` does not confirm are
    /// dropped.
    pub fn start(&mut self, waits: impl Fn(&ConnectionId) -> bool) -> Option<Read<ChannelId>> {
        let free = self.limit.checked_sub(self.unserved).filter(|free| *free > 0)?;
        self.reads.start(free, waits)
    }

    /// Adds the answer to a read. Returns the connections that it serves: each has its turn next,
    /// and the caller then calls [`PageCache::served`].
    pub fn add(
        &mut self,
        channel: ChannelId,
        position: EventId,
        page: &Page,
        form: &ChannelForm,
        feed: &Feed,
        tick: u32,
    ) -> (PageId, Vec<ConnectionId>) {
        let id = (channel, page.after);
        let mut cached = CachedPage::new(page, form, feed, tick);
        let served = self.reads.answer(channel, position, |position| cached.covers(position));
        let served: Vec<_> = served.into_iter().map(|(id, _)| id).collect();
        if !served.is_empty() {
            cached.unserved = served.len() + self.remove(id);
            self.unserved += cached.memory;
            self.eviction_queue.push(id, cached.memory);
            self.pages.insert(id, cached);
            self.evict();
        }
        (id, served)
    }

    /// Removes and returns the connections that waited for a read that failed.
    pub fn fail(&mut self, channel: ChannelId, position: EventId) -> Vec<ConnectionId> {
        self.reads.fail(channel, position).into_iter().map(|(id, _)| id).collect()
    }

    /// Notes that one of the connections that waited for a page has had its turn, or is closed.
    pub fn served(&mut self, id: PageId) {
        let Some(page) = self.pages.get_mut(&id).filter(|page| page.unserved > 0) else { return };
        page.unserved -= 1;
        if page.unserved == 0 {
            self.unserved -= page.memory;
            self.evict();
        }
    }

    /// Drops the oldest pages while all together take too much.
    fn evict(&mut self) {
        let pages = &self.pages;
        let mut evicted = Vec::new();
        while let Some(id) = self.eviction_queue.evict(self.limit, |id| pages[id].unserved == 0) {
            evicted.push(id);
        }
        for id in evicted {
            self.pages.remove(&id);
        }
    }

    /// Drops pages that were not read from for a while.
    pub fn drop_idle(&mut self, tick: u32) {
        let is_idle = |page: &CachedPage| page.unserved == 0 && tick.wrapping_sub(page.used) >= PAGE_TICKS;
        let idle = self.pages.iter().filter(|(_, page)| is_idle(page)).map(|(id, _)| *id);
        for id in idle.collect::<Vec<_>>() {
            self.remove(id);
        }
    }

    /// Drops the pages and reads of a channel.
    pub fn forget(&mut self, channel: ChannelId) {
        self.reads.forget(&channel);
        let ids = (channel, EventId(0))..=(channel, EventId(u64::MAX));
        let ids = self.pages.range(ids).map(|(id, _)| *id);
        for id in ids.collect::<Vec<_>>() {
            self.remove(id);
        }
    }

    /// Drops a page. Returns how many unserved readers it had.
    fn remove(&mut self, id: PageId) -> usize {
        let Some(page) = self.pages.remove(&id) else { return 0 };
        self.eviction_queue.remove(&id);
        if page.unserved > 0 {
            self.unserved -= page.memory;
        }
        page.unserved
    }
}
