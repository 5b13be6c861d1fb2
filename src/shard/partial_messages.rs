//! Messages that were begun and not ended: each may wait for ten seconds, but together they must not fill the node.

use std::collections::VecDeque;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use super::{SCRATCH, Shard};
use crate::bus::ConnectionId;
use crate::config::Settings;
use crate::protocol::close::CloseReason;

/// A shard counts again when this part of its share has arrived, since messages may be finished meanwhile.
const RECOUNT_PART: usize = 8;

/// Messages that are noted before it is looked which of them are still there.
const NOTED: usize = 1024;

/// The unfinished messages of one shard. All shards add their bytes to one count. While that is above the node's limit,
/// each shard with more than its share closes the connections with the oldest messages. A shard's part of the count is
/// never too small: it grows with every read, and is corrected when the shard counts again.
#[derive(Debug)]
pub(super) struct Unfinished {
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

impl Unfinished {
    pub(super) fn new(settings: &Settings) -> Unfinished {
        let limit = settings.partial_memory();
        let share = limit / settings.shards.get();
        Unfinished { limit, share, begun: VecDeque::new(), counted: 0, since_recount: 0, next_recount: NOTED }
    }
}

impl Shard {
    /// Notes what is left unfinished after `new` bytes have come, and sees to it that there is room for it.
    pub(super) fn note_unfinished(&mut self, slot: u32, new: usize) {
        let id = self.id_of(slot);
        let Some(partial) = &mut self.connections[slot as usize].partial else { return };
        if partial.held() == 0 {
            return; // only the head of a frame, or what waits for its turn
        }
        let first = !std::mem::replace(&mut partial.noted, true);
        // The first bytes of a message may have arrived in one read with the end of another.
        let new = if first { partial.held().max(new) } else { new };
        if first {
            self.unfinished.begun.push_back((partial.since, id));
        }
        self.unfinished.counted += new;
        self.unfinished.since_recount += new;
        let all = self.metrics.partial_bytes.fetch_add(new, Relaxed) + new;
        let is_due = self.unfinished.since_recount > (self.unfinished.share / RECOUNT_PART).max(SCRATCH);
        let is_over = all > self.unfinished.limit && self.unfinished.counted > self.unfinished.share;
        if is_due || is_over || self.unfinished.begun.len() >= self.unfinished.next_recount {
            self.recount_unfinished();
        }
    }

    /// Counts again once a tick where that may matter: messages are finished, and other shards may need the room.
    pub(super) fn bound_unfinished(&mut self) {
        let all = self.metrics.partial_bytes.load(Relaxed);
        let idle = self.unfinished.since_recount == 0 && self.unfinished.begun.is_empty();
        if !idle && (all > self.unfinished.limit / 2 || self.unfinished.begun.len() > NOTED) {
            self.recount_unfinished();
        }
    }

    fn recount_unfinished(&mut self) {
        let mut begun = std::mem::take(&mut self.unfinished.begun);
        let mut held = 0;
        begun.retain(|(since, id)| {
            let bytes = self.held_since(*since, *id);
            held += bytes.unwrap_or(0);
            bytes.is_some()
        });
        let all = self.count_unfinished(held);
        // The oldest first, since honest messages are soon finished. Down to three quarters, so that it does not happen
        // again at once.
        if all > self.unfinished.limit && held > self.unfinished.share {
            while held > self.unfinished.share / 4 * 3
                && let Some((since, id)) = begun.pop_front()
            {
                held -= self.held_since(since, id).unwrap_or(0);
                self.end(id.slot, CloseReason::MessageTimeout);
            }
            self.count_unfinished(held);
        }
        begun.shrink_to(NOTED.max(begun.len() * 2));
        self.unfinished.next_recount = NOTED + 2 * begun.len();
        self.unfinished.begun = begun;
        self.unfinished.since_recount = 0;
    }

    /// Sets this shard's part of the count, and returns the whole count.
    fn count_unfinished(&mut self, held: usize) -> usize {
        let before = std::mem::replace(&mut self.unfinished.counted, held);
        // No underflow: every shard subtracts only what it has added.
        self.metrics.partial_bytes.fetch_add(held, Relaxed);
        self.metrics.partial_bytes.fetch_sub(before, Relaxed) - before
    }

    /// What the message that this connection began then holds; `None` when it is over.
    fn held_since(&self, since: Instant, id: ConnectionId) -> Option<usize> {
        let partial = self.connections[self.find(id)? as usize].partial.as_ref()?;
        (partial.since == since).then(|| partial.held())
    }
}
