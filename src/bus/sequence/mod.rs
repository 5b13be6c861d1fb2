//! The order of one channel on this node. It emits only the next id, and says when history must be
//! read. Live events may be lost, duplicated, late or out of order; pages of history are
//! authoritative.

use crate::bus::page::{Page, is_continuous};
use crate::protocol::event::{Entry, EventId};

/// Most entries kept after a gap until it is filled. The others are read again.
const AHEAD_MAX: usize = 1024;

/// Most bytes kept after a gap.
const AHEAD_BYTES: usize = 4 << 20;

/// A channel's position on this node, and whether events after it must be read.
#[derive(Debug)]
pub struct Sequence {
    position: EventId,
    base: EventId,
    /// Events may exist after the position: history must be read.
    read_due: bool,
    reading: bool,
    /// Live entries after a gap. They are tried again after the read.
    ahead: Vec<Entry>,
    ahead_bytes: usize,
    /// How many of `ahead` came before the read in flight started: its page holds them, or no
    /// history does.
    ahead_before_read: usize,
}

impl Sequence {
    /// Starts at `position`, in the epoch that starts at `base`.
    pub fn new(base: EventId, position: EventId) -> Sequence {
        Sequence {
            position,
            base,
            read_due: false,
            reading: false,
            ahead: Vec::new(),
            ahead_bytes: 0,
            ahead_before_read: 0,
        }
    }

    /// The last id emitted.
    pub fn position(&self) -> EventId {
        self.position
    }

    /// The latest base known.
    pub fn base(&self) -> EventId {
        self.base
    }

    /// An entry came over Pub/Sub. What follows the position is pushed to `out`.
    pub fn on_live(&mut self, entry: Entry, out: &mut Vec<Entry>) {
        if entry.before() > self.position {
            self.read_due = true;
            self.keep_ahead(entry);
        } else if self.emit(&entry, out) && !self.ahead.is_empty() && !self.reading {
            self.emit_ahead(out);
        }
    }

    /// A probe returned the channel's base and head.
    pub fn on_probe(&mut self, base: EventId, head: EventId) {
        if base > self.base || (base == self.base && head > self.position) {
            self.read_due = true;
        }
    }

    /// History must be read, whatever is known.
    pub fn refresh(&mut self) {
        self.read_due = true;
    }

    /// If history must be read, starts a read and returns the position to read after. The read ends
    /// with [`Sequence::on_page`] or [`Sequence::on_read_failed`].
    pub fn start_read(&mut self) -> Option<EventId> {
        if !self.read_due || self.reading {
            return None;
        }
        self.read_due = false;
        self.reading = true;
        self.ahead_before_read = self.ahead.len();
        Some(self.position)
    }

    pub fn on_read_failed(&mut self) {
        self.reading = false;
        self.read_due = true;
    }

    /// The read that started at `position` returned this page: events from `position + 1` on.
    pub fn on_page(&mut self, position: EventId, page: &Page, out: &mut Vec<Entry>) {
        self.reading = false;
        // Live events may have moved the position meanwhile. In the same epoch, events of the page
        // after the position follow it all the same, and are not read again.
        let reaches_beyond = page.base == self.base
            && position < self.position
            && page.entries.last().is_some_and(|entry| entry.last > self.position);
        if (page.base >= self.base && position == self.position) || reaches_beyond {
            self.emit_page(page, out);
        }
        // Any other page is older than what is known.
        let behind = page.base >= self.base && (page.head > self.position || page.base > self.base);
        if behind {
            self.read_due = true;
        } else {
            // The page reached the head. Entries that came before the read and are still ahead are
            // in no history.
            let obsolete = self.ahead_before_read.min(self.ahead.len());
            self.ahead.drain(..obsolete);
        }
        self.ahead_before_read = 0;
        self.emit_ahead(out);
    }

    fn emit_page(&mut self, page: &Page, out: &mut Vec<Entry>) {
        let start = self.position;
        if !is_continuous(start, page.base, page.head, page.oldest) {
            // Both positions are continuous with what follows. The later one is the first that is.
            self.reset(page.base.max(page.oldest.previous()), out);
        }
        self.base = page.base;
        for entry in &page.entries {
            if entry.before() > self.position {
                // Another program has deleted events from the middle of the stream.
                self.reset(entry.before(), out);
            }
            self.emit(entry, out);
        }
        if self.position == start && page.head > start && out.is_empty() {
            // Another program has deleted the newest events. The head itself is always continuous.
            self.reset(page.head, out);
        }
    }

    fn reset(&mut self, position: EventId, out: &mut Vec<Entry>) {
        self.position = position;
        out.push(Entry::reset(position));
    }

    /// Emits the new part of an entry that leaves no gap. False for a duplicate.
    fn emit(&mut self, entry: &Entry, out: &mut Vec<Entry>) -> bool {
        let Some(new) = entry.after(self.position) else { return false };
        self.position = new.last;
        out.push(new);
        true
    }

    fn keep_ahead(&mut self, entry: Entry) {
        if self.ahead.len() < AHEAD_MAX && self.ahead_bytes + entry.bytes.len() <= AHEAD_BYTES {
            self.ahead_bytes += entry.bytes.len();
            self.ahead.push(entry);
        }
    }

    fn emit_ahead(&mut self, out: &mut Vec<Entry>) {
        self.ahead_bytes = 0;
        let mut ahead = std::mem::take(&mut self.ahead);
        ahead.sort_by_key(|entry| entry.last);
        for entry in ahead {
            if entry.before() > self.position {
                self.read_due = true;
                self.keep_ahead(entry);
            } else {
                self.emit(&entry, out);
            }
        }
    }
}

#[cfg(test)]
mod tests;
