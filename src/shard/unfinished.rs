//! Messages that were begun and not ended: each may wait for ten seconds, but together they must not fill the node.

use std::collections::VecDeque;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use super::{SCRATCH, Shard};
use crate::bus::ConnectionId;
use crate::close::Reason;
use crate::config::Settings;

/// The part of its share that a shard may count too much before it looks again.
const UNCERTAIN: usize = 8;

/// Messages that are noted before it is looked which of them are still there.
const NOTED: usize = 1024;

/// The unfinished messages of one shard. All shards add what they hold to one count. While that is above the node's
/// limit, each shard that holds more than its share ends its oldest. Each shard's part of the count is never too small: it
/// grows with every read, and is set right when it is looked at again.
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
    /// How much of that has come since the last look.
    unlooked: usize,
    /// Messages at which it is looked again.
    next_look: usize,
}

impl Unfinished {
    pub(super) fn new(settings: &Settings) -> Unfinished {
        let limit = settings.partial_memory();
        let share = limit / settings.shards.get();
        Unfinished { limit, share, begun: VecDeque::new(), counted: 0, unlooked: 0, next_look: NOTED }
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
        // The first bytes of a message may have come with the end of another.
        let new = if first { partial.held().max(new) } else { new };
        if first {
            self.unfinished.begun.push_back((partial.since, id));
        }
        self.unfinished.counted += new;
        self.unfinished.unlooked += new;
        let all = self.metrics.partial_bytes.fetch_add(new, Relaxed) + new;
        let uncertain = self.unfinished.unlooked > (self.unfinished.share / UNCERTAIN).max(SCRATCH);
        let must_end = all > self.unfinished.limit && self.unfinished.counted > self.unfinished.share;
        if uncertain || must_end || self.unfinished.begun.len() >= self.unfinished.next_look {
            self.look_at_unfinished();
        }
    }

    /// Gives back what finished messages were counted with, and ends messages where other shards need the room.
    pub(super) fn bound_unfinished(&mut self) {
        let all = self.metrics.partial_bytes.load(Relaxed);
        let idle = self.unfinished.unlooked == 0 && self.unfinished.begun.is_empty();
        if !idle && (all > self.unfinished.limit / 2 || self.unfinished.begun.len() > NOTED) {
            self.look_at_unfinished();
        }
    }

    fn look_at_unfinished(&mut self) {
        let mut begun = std::mem::take(&mut self.unfinished.begun);
        let mut held = 0;
        begun.retain(|(since, id)| {
            let bytes = self.held_since(*since, *id);
            held += bytes.unwrap_or(0);
            bytes.is_some()
        });
        let all = self.count_unfinished(held);
        // The oldest first: an honest one is soon over. Some more than needed, so that it is not looked again at once.
        if all > self.unfinished.limit && held > self.unfinished.share {
            while held > self.unfinished.share / 4 * 3
                && let Some((since, id)) = begun.pop_front()
            {
                held -= self.held_since(since, id).unwrap_or(0);
                self.end(id.slot, Reason::Unfinished);
            }
            self.count_unfinished(held);
        }
        begun.shrink_to(NOTED.max(begun.len() * 2));
        self.unfinished.next_look = NOTED + 2 * begun.len();
        self.unfinished.begun = begun;
        self.unfinished.unlooked = 0;
    }

    /// Sets this shard's part of the count; gives the whole count.
    fn count_unfinished(&mut self, held: usize) -> usize {
        let before = std::mem::replace(&mut self.unfinished.counted, held);
        // Every shard takes away only what it has added.
        self.metrics.partial_bytes.fetch_add(held, Relaxed);
        self.metrics.partial_bytes.fetch_sub(before, Relaxed) - before
    }

    /// What the message that this connection began then holds; `None` when it is over.
    fn held_since(&self, since: Instant, id: ConnectionId) -> Option<usize> {
        let partial = self.connections[self.find(id)? as usize].partial.as_ref()?;
        (partial.since == since).then(|| partial.held())
    }
}
