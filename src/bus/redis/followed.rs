//! A channel that shards of this node follow.

use crate::bus::Follower;
use crate::bus::coalesced::Coalesced;
use crate::bus::page::Page;
use crate::bus::sequence::Sequence;
use crate::protocol::event::{Entry, EventId};

/// Most entries kept before the position is known. The others are read from the stream.
const EARLY_MAX: usize = 256;

#[derive(Debug)]
pub struct FollowedChannel {
    /// Shards that get every entry.
    pub followers: Vec<Follower>,
    /// Shards that wait for the position.
    pub joining: Vec<Follower>,
    /// The ticket of the channel's subscription.
    pub ticket: u64,
    /// `None` until the position has been read.
    pub sequence: Option<Sequence>,
    /// Entries received before that.
    early: Vec<Entry>,
    /// Shards that asked for a refresh.
    refreshes: Coalesced<Follower>,
}

impl FollowedChannel {
    pub fn new(joining: Vec<Follower>, ticket: u64) -> FollowedChannel {
        FollowedChannel {
            followers: Vec::new(),
            joining,
            ticket,
            sequence: None,
            early: Vec::new(),
            refreshes: Coalesced::new(),
        }
    }

    /// Removes a shard. True if none is left.
    pub fn remove(&mut self, follower: Follower) -> bool {
        self.followers.retain(|other| *other != follower);
        self.joining.retain(|other| *other != follower);
        self.refreshes.retain(|other| *other != follower);
        self.followers.is_empty() && self.joining.is_empty()
    }

    /// Starts the sequence at `head`. Returns the shards that were joining, which are followers
    /// now. Entries that came early are passed on to `out`.
    pub fn start(&mut self, base: EventId, head: EventId, out: &mut Vec<Entry>) -> Vec<Follower> {
        let mut sequence = Sequence::new(base, head);
        for entry in self.early.drain(..) {
            sequence.on_live(entry, out);
        }
        self.sequence = Some(sequence);
        self.followers.append(&mut self.joining.clone());
        std::mem::take(&mut self.joining)
    }

    pub fn on_live(&mut self, entry: Entry, out: &mut Vec<Entry>) {
        match &mut self.sequence {
            Some(sequence) => sequence.on_live(entry, out),
            None if self.early.len() < EARLY_MAX => self.early.push(entry),
            None => {} // a gap, which the next entry or probe shows
        }
    }

    /// A shard asks for the events that Redis has and this node does not.
    pub fn refresh(&mut self, follower: Follower) {
        if let Some(sequence) = &mut self.sequence {
            self.refreshes.wait(follower);
            sequence.refresh();
        }
    }

    /// The position to read after now, if a read is due.
    pub fn start_read(&mut self) -> Option<EventId> {
        let position = self.sequence.as_mut()?.start_read()?;
        self.refreshes.start();
        Some(position)
    }

    /// The page after `position` was read. Returns the shards whose refresh is complete.
    pub fn on_page(&mut self, position: EventId, page: &Page, out: &mut Vec<Entry>) -> Vec<Follower> {
        let Some(sequence) = &mut self.sequence else { return Vec::new() };
        sequence.on_page(position, page, out);
        let complete = sequence.position() >= page.head || page.base < sequence.base();
        if complete { self.refreshes.complete() } else { Vec::new() }
    }

    /// The read failed. Returns the shards whose refresh fails with it.
    pub fn on_read_failed(&mut self) -> Vec<Follower> {
        if let Some(sequence) = &mut self.sequence {
            sequence.on_read_failed();
        }
        self.refreshes.fail()
    }
}
