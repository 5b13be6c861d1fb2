//! Messages that were begun and not ended: each may wait for ten seconds, but together they must
//! not fill the node.

use std::collections::VecDeque;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use super::Shard;
use super::read::READ_MAX;
use crate::bus::ConnectionId;
use crate::config::Settings;
use crate::protocol::close::CloseReason;

/// A shard counts again when this part of its share has arrived, since messages may be finished
/// meanwhile.
const RECOUNT_PART: usize = 8;

/// Messages that are noted before it is looked which of them are still there.
const NOTED: usize = 1024;

/// The unfinished messages of one shard. All shards add their bytes to one count. While that is
/// above the node's limit, each shard with more than its share closes the connections with the
/// oldest messages. A shard's part of the count is never too small: it grows with every read, and
/// is corrected when the shard counts again.
#[derive(Debug)]
pub(super) struct PartialMessages {
    /// Most bytes of all unfinished messages of the node.
    limit: usize,
    /// This shard's share.
    share: usize,
    /// Oldest first, by the begin of the message, which tells it from the connection's later ones.
    begun: VecDeque<(Instant, ConnectionId)>,
    /// This shard's part of the count.
    counted: usize,
    /// Bytes of it that arrived since the last recount.
    since_recount: usize,
    /// Number of messages at which it is counted again.
    next_recount: usize,
}

impl PartialMessages {
    pub(super) fn new(settings: &Settings) -> PartialMessages {
        let limit = settings.partial_memory();
        let share = limit / settings.shards.get();
        PartialMessages {
            limit,
            share,
            begun: VecDeque::new(),
            counted: 0,
            since_recount: 0,
            next_recount: NOTED,
        }
    }
}

impl Shard {
    /// Notes what is left unfinished after `new` bytes have come, and sees to it that there is room
    /// for it.
    pub(super) fn record_partial(&mut self, slot: u32, new: usize) {
        let id = self.connections.id(slot);
        let Some(partial) = &mut self.connections[slot].partial else { return };
        if partial.held() == 0 {
            return; // only the head of a frame, or what waits for its turn
        }
        let first = !std::mem::replace(&mut partial.noted, true);
        // The first bytes of a message may have arrived in one read with the end of another.
        let new = if first { partial.held().max(new) } else { new };
        if first {
            self.partial_messages.begun.push_back((partial.since, id));
        }
        self.partial_messages.counted += new;
        self.partial_messages.since_recount += new;
        let all = self.metrics.partial_bytes.fetch_add(new, Relaxed) + new;
        let is_due =
            self.partial_messages.since_recount > (self.partial_messages.share / RECOUNT_PART).max(READ_MAX);
        let is_over =
            all > self.partial_messages.limit && self.partial_messages.counted > self.partial_messages.share;
        if is_due || is_over || self.partial_messages.begun.len() >= self.partial_messages.next_recount {
            self.recount_partial_messages();
        }
    }

    /// Counts again once a tick where that may matter: messages are finished, and other shards may
    /// need the room.
    pub(super) fn limit_partial_messages(&mut self) {
        let all = self.metrics.partial_bytes.load(Relaxed);
        let idle = self.partial_messages.since_recount == 0 && self.partial_messages.begun.is_empty();
        if !idle && (all > self.partial_messages.limit / 2 || self.partial_messages.begun.len() > NOTED) {
            self.recount_partial_messages();
        }
    }

    fn recount_partial_messages(&mut self) {
        let mut begun = std::mem::take(&mut self.partial_messages.begun);
        let mut held = 0;
        begun.retain(|(since, id)| {
            let bytes = self.held_since(*since, *id);
            held += bytes.unwrap_or(0);
            bytes.is_some()
        });
        let all = self.set_partial_bytes(held);
        // The oldest first, since honest messages are soon finished. Down to three quarters, so
        // that it does not happen again at once.
        if all > self.partial_messages.limit && held > self.partial_messages.share {
            while held > self.partial_messages.share / 4 * 3
                && let Some((since, id)) = begun.pop_front()
            {
                held -= self.held_since(since, id).unwrap_or(0);
                self.close(id.slot, CloseReason::MessageTimeout);
            }
            self.set_partial_bytes(held);
        }
        begun.shrink_to(NOTED.max(begun.len() * 2));
        self.partial_messages.next_recount = NOTED + 2 * begun.len();
        self.partial_messages.begun = begun;
        self.partial_messages.since_recount = 0;
    }

    /// Sets this shard's part of the count, and returns the whole count.
    fn set_partial_bytes(&mut self, held: usize) -> usize {
        let before = std::mem::replace(&mut self.partial_messages.counted, held);
        // No underflow: every shard subtracts only what it has added.
        self.metrics.partial_bytes.fetch_add(held, Relaxed);
        self.metrics.partial_bytes.fetch_sub(before, Relaxed) - before
    }

    /// What the message that this connection began then holds; `None` when it is over.
    fn held_since(&self, since: Instant, id: ConnectionId) -> Option<usize> {
        let partial = self.connections[self.connections.find(id)?].partial.as_ref()?;
        (partial.since == since).then(|| partial.held())
    }
}
