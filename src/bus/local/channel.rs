//! A channel of the local bus: its position, history and followers.

use std::collections::VecDeque;
use std::time::Instant;

use crate::bus::Follower;
use crate::bus::page::{BLOCK, Page, SHARED_BYTES, block_start};
use crate::protocol::event::{Entry, EventId};

#[derive(Debug)]
pub(super) struct Channel {
    base: EventId,
    head: EventId,
    /// Oldest entry first; the last one ends at `head`.
    history: VecDeque<Entry>,
    /// Number of events in `history`.
    events: u64,
    /// Memory of `history`.
    bytes: usize,
    followers: Vec<Follower>,
    /// When it was last published to or unfollowed.
    last_used: Instant,
}

impl Channel {
    pub(super) fn new(base: EventId) -> Channel {
        Channel {
            base,
            head: base,
            history: VecDeque::new(),
            events: 0,
            bytes: 0,
            followers: Vec::new(),
            last_used: Instant::now(),
        }
    }

    pub(super) fn base(&self) -> EventId {
        self.base
    }

    pub(super) fn head(&self) -> EventId {
        self.head
    }

    pub(super) fn has_history(&self) -> bool {
        self.events > 0
    }

    /// Memory of the history.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn last_used(&self) -> Instant {
        self.last_used
    }

    pub(super) fn is_followed(&self) -> bool {
        !self.followers.is_empty()
    }

    pub(super) fn followers(&self) -> &[Follower] {
        &self.followers
    }

    pub(super) fn follow(&mut self, follower: Follower) {
        if !self.followers.contains(&follower) {
            self.followers.push(follower);
        }
    }

    pub(super) fn unfollow(&mut self, follower: Follower) {
        self.followers.retain(|other| *other != follower);
        self.last_used = Instant::now();
    }

    /// The id of the next event, which must be added to the history by [`Channel::push`].
    pub(super) fn next_id(&mut self, now: Instant) -> EventId {
        self.head = self.head.next();
        self.last_used = now;
        self.head
    }

    fn oldest(&self) -> EventId {
        EventId(self.head.0 - self.events).next()
    }

    /// The events of a block after `position`, about this many bytes, and those before it if they
    /// have at most [`SHARED_BYTES`].
    pub(super) fn page(&self, position: EventId, mut bytes: usize) -> Page {
        let (start, end) = (block_start(position), EventId(block_start(position).0 + BLOCK));
        let at = self.history.partition_point(|entry| entry.last <= position);
        let first = self.history.partition_point(|entry| entry.last <= start);
        let shared: usize = self.history.range(first..at).map(Entry::memory).sum();
        let (after, first) = if shared <= SHARED_BYTES { (start, first) } else { (position, at) };
        let mut entries = Vec::new();
        for entry in self.history.range(first..) {
            let Some(entry) = entry.after(after).and_then(|entry| entry.until(end)) else { break };
            let is_shared = entry.last <= position;
            if !is_shared && bytes == 0 {
                break;
            }
            bytes = if is_shared { bytes } else { bytes.saturating_sub(entry.memory()) };
            entries.push(entry);
        }
        let after = entries.first().map_or(position, |entry| entry.before().min(position));
        Page { after, base: self.base, head: self.head, oldest: self.oldest(), entries, ..Page::default() }
    }

    pub(super) fn push(&mut self, entry: Entry) {
        self.events += entry.ids();
        self.bytes += entry.memory();
        self.history.push_back(entry);
    }

    fn evict_oldest(&mut self) {
        if let Some(entry) = self.history.pop_front() {
            self.events -= entry.ids();
            self.bytes -= entry.memory();
        }
    }

    pub(super) fn empty(&mut self) {
        self.history.clear();
        (self.events, self.bytes) = (0, 0);
    }

    /// Evicts the oldest entries until the history fits into this many bytes.
    pub(super) fn shrink(&mut self, bytes: usize) {
        while self.bytes > bytes {
            self.evict_oldest();
        }
    }

    /// Evicts the oldest entries beyond this many events or bytes. The last entry stays, however
    /// large it is.
    pub(super) fn trim(&mut self, events: u64, bytes: usize) {
        while self.history.len() > 1 && (self.bytes > bytes || self.events - self.history[0].ids() >= events)
        {
            self.evict_oldest();
        }
    }
}
