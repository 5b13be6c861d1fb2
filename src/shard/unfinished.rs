//! Messages that were begun and not ended: each may wait for ten seconds, but together they must not fill the node.

use std::collections::VecDeque;
use std::time::Instant;

use super::Shard;
use crate::bus::ConnectionId;
use crate::close::Reason;
use crate::config::Settings;

/// Most bytes of all unfinished messages of a node. A message that is under way is here for the time that its sender
/// needs for it, so this is what a thousand clients send at once; a stranger with as many sockets as it likes gets
/// no more either.
const MOST: usize = 64 * 1024 * 1024;

/// Messages of the longest kind for which a shard has room, however long that is.
const LONGEST: usize = 4;

/// Messages that are noted before it is looked which of them are still there.
const NOTED: usize = 1024;

/// The unfinished messages of one shard. What they hold is not counted all the time, which would have to be right in
/// every place where a connection ends: it is looked at again when as much may have come as there was room for.
#[derive(Debug)]
pub(super) struct Unfinished {
    most: usize,
    /// Oldest first, by the begin of the message, which tells it from the connection's later ones.
    begun: VecDeque<(Instant, ConnectionId)>,
    /// Bytes that may come before the next look,
    room: usize,
    /// and messages.
    next_look: usize,
}

impl Unfinished {
    pub(super) fn new(settings: &Settings) -> Unfinished {
        let most = (MOST / settings.shards.get()).max(LONGEST * settings.max_message);
        Unfinished { most, begun: VecDeque::new(), room: most, next_look: NOTED }
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
        if !std::mem::replace(&mut partial.noted, true) {
            self.unfinished.begun.push_back((partial.since, id));
        }
        self.unfinished.room = self.unfinished.room.saturating_sub(new);
        if self.unfinished.room == 0 || self.unfinished.begun.len() >= self.unfinished.next_look {
            self.bound_unfinished();
        }
    }

    /// Where unfinished messages hold too much, ends the oldest: an honest one is soon over.
    fn bound_unfinished(&mut self) {
        let mut begun = std::mem::take(&mut self.unfinished.begun);
        let mut held = 0;
        begun.retain(|(since, id)| {
            let bytes = self.held_since(*since, *id);
            held += bytes.unwrap_or(0);
            bytes.is_some()
        });
        if held > self.unfinished.most {
            // Some more than needed, so that it is not looked again at once.
            while held > self.unfinished.most / 4 * 3
                && let Some((since, id)) = begun.pop_front()
            {
                held -= self.held_since(since, id).unwrap_or(0);
                self.end(id.slot, Reason::Unfinished);
            }
        }
        begun.shrink_to(NOTED.max(begun.len() * 2));
        self.unfinished.room = self.unfinished.most - held;
        self.unfinished.next_look = NOTED + 2 * begun.len();
        self.unfinished.begun = begun;
    }

    /// What the message that this connection began then holds; `None` when it is over.
    fn held_since(&self, since: Instant, id: ConnectionId) -> Option<usize> {
        let partial = self.connections[self.find(id)? as usize].partial.as_ref()?;
        (partial.since == since).then(|| partial.held())
    }
}
