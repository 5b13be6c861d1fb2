//! Messages of which not all bytes have arrived. Each may wait for ten seconds, but all together
//! must not fill the memory.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Instant;

use super::Shard;
use super::read::READ_MAX;
use crate::bus::ConnectionId;
use crate::config::Settings;
use crate::protocol::close::CloseReason;

/// A shard counts again when this part of its share has arrived, since messages are completed
/// meanwhile.
const RECOUNT_PART: usize = 8;

/// Messages in the list before it is checked which of them are still incomplete.
const LISTED_MIN: usize = 1024;

/// The incomplete messages of one shard.
///
/// All shards add their bytes to one count. While that is above the node's limit, each shard with
/// more than its share closes the connections with the oldest messages. A shard's part of the count
/// is never too small: it grows with every read, and is corrected when the shard counts again.
#[derive(Debug)]
pub(super) struct PartialMessages {
    /// Most bytes of all incomplete messages of the node.
    limit: usize,
    /// This shard's part of the limit.
    share: usize,
    /// Messages by their start, oldest first. The start distinguishes a message from later
    /// ones of its connection.
    messages: VecDeque<(Instant, ConnectionId)>,
    /// This shard's part of the count.
    counted: usize,
    /// Bytes of it that arrived since the last recount.
    since_recount: usize,
    /// Number of messages at which they are counted again.
    next_recount: usize,
}

impl PartialMessages {
    pub fn new(settings: &Settings) -> PartialMessages {
        let limit = settings.partial_memory();
        PartialMessages {
            limit,
            share: limit / settings.shards.get(),
            messages: VecDeque::new(),
            counted: 0,
            since_recount: 0,
            next_recount: LISTED_MIN,
        }
    }

    /// Adds bytes that have arrived to the node's count. Returns whether it is time to count again.
    fn add(&mut self, bytes: usize, node: &AtomicUsize) -> bool {
        self.counted += bytes;
        self.since_recount += bytes;
        let all = node.fetch_add(bytes, Relaxed) + bytes;
        let is_due = self.since_recount > (self.share / RECOUNT_PART).max(READ_MAX);
        let is_over = all > self.limit && self.counted > self.share;
        is_due || is_over || self.messages.len() >= self.next_recount
    }

    /// Whether counting again may matter: messages are completed, and other shards may need the
    /// memory.
    fn may_be_over(&self, node: &AtomicUsize) -> bool {
        let is_idle = self.since_recount == 0 && self.messages.is_empty();
        let is_full = node.load(Relaxed) > self.limit / 2;
        !is_idle && (is_full || self.messages.len() > LISTED_MIN)
    }

    /// Corrects this shard's part of the node's count. Returns the node's count.
    fn correct(&mut self, counted: usize, node: &AtomicUsize) -> usize {
        let before = std::mem::replace(&mut self.counted, counted);
        // No underflow: every shard subtracts only what it has added.
        node.fetch_add(counted, Relaxed);
        node.fetch_sub(before, Relaxed) - before
    }

    /// Ends a recount, which left these messages.
    fn complete_recount(&mut self, mut messages: VecDeque<(Instant, ConnectionId)>) {
        messages.shrink_to(LISTED_MIN.max(messages.len() * 2));
        self.next_recount = LISTED_MIN + 2 * messages.len();
        self.messages = messages;
        self.since_recount = 0;
    }
}

impl Shard {
    /// Counts the incomplete message of a connection after `new` bytes have arrived, and limits all
    /// of them.
    pub(super) fn record_partial(&mut self, slot: u32, new: usize) {
        let id = self.connections.id(slot);
        let Some(partial) = &mut self.connections[slot].inbound.partial else { return };
        if partial.held() == 0 {
            return; // only the head of a frame, or whole frames that wait for the next turn
        }
        let is_first = !std::mem::replace(&mut partial.is_listed, true);
        // The first bytes of a message may have arrived in one read with the last of another.
        let new = if is_first { partial.held().max(new) } else { new };
        if is_first {
            self.partial_messages.messages.push_back((partial.since, id));
        }
        if self.partial_messages.add(new, &self.context.metrics.partial_bytes) {
            self.recount_partial_messages();
        }
    }

    /// Limits the incomplete messages. Called at every tick.
    pub(super) fn limit_partial_messages(&mut self) {
        if self.partial_messages.may_be_over(&self.context.metrics.partial_bytes) {
            self.recount_partial_messages();
        }
    }

    fn recount_partial_messages(&mut self) {
        let mut messages = std::mem::take(&mut self.partial_messages.messages);
        let mut held = 0;
        messages.retain(|(since, id)| {
            let bytes = self.held_since(*since, *id);
            held += bytes.unwrap_or(0);
            bytes.is_some()
        });
        let all = self.partial_messages.correct(held, &self.context.metrics.partial_bytes);
        let PartialMessages { limit, share, .. } = self.partial_messages;
        if all > limit && held > share {
            // The oldest first, since honest messages are completed soon. Down to three quarters,
            // so that the next bytes don't exceed the limit again.
            while held > share / 4 * 3
                && let Some((since, id)) = messages.pop_front()
            {
                held -= self.held_since(since, id).unwrap_or(0);
                self.close(id.slot, CloseReason::MessageTimeout);
            }
            self.partial_messages.correct(held, &self.context.metrics.partial_bytes);
        }
        self.partial_messages.complete_recount(messages);
    }

    /// Bytes of the message that this connection started then. `None` if it is complete.
    fn held_since(&self, since: Instant, id: ConnectionId) -> Option<usize> {
        let partial = self.connections[self.connections.find(id)?].inbound.partial.as_ref()?;
        (partial.since == since).then(|| partial.held())
    }
}
