//! One channel's order on this node: lets an event through only if it is the next one, and says when history
//! must be read. Live events are hints that may be lost, doubled, late or out of order; pages of history are
//! the truth. It knows neither clocks nor sockets.

use crate::bus::page::{Page, is_continuous};
use crate::protocol::event::{Entry, EventId};

/// Entries that wait here for a hole to be filled. More would only spare a second read.
const AHEAD_MAX: usize = 1024;

/// Bytes that wait for a hole to be filled.
const AHEAD_BYTES: usize = 4 << 20;

/// Where a channel stands, and what it still wants to know.
#[derive(Debug)]
pub struct Sequence {
    position: EventId,
    base: EventId,
    /// History is to be read: something may lie after the position.
    wanted: bool,
    /// A read is under way.
    reading: bool,
    /// Live entries beyond a hole. They are offered again after the read, as if they had come only then.
    ahead: Vec<Entry>,
    ahead_bytes: usize,
    /// How many of `ahead` came before the read under way was asked: that read holds them, or nothing does.
    before_read: usize,
}

impl Sequence {
    /// Stands at `position`, in the run that was anchored at `base`.
    pub fn new(base: EventId, position: EventId) -> Sequence {
        Sequence {
            position,
            base,
            wanted: false,
            reading: false,
            ahead: Vec::new(),
            ahead_bytes: 0,
            before_read: 0,
        }
    }

    /// The last id handed on.
    pub fn position(&self) -> EventId {
        self.position
    }

    /// The last anchor known.
    pub fn base(&self) -> EventId {
        self.base
    }

    /// Takes what Pub/Sub brought; what may go on is pushed to `out`.
    pub fn live(&mut self, entry: Entry, out: &mut Vec<Entry>) {
        if entry.before() > self.position {
            self.wanted = true;
            self.keep_ahead(entry);
        } else if self.hand_on(&entry, out) && !self.ahead.is_empty() && !self.reading {
            self.offer_ahead(out);
        }
    }

    /// Takes the channel's head and base as the bus has just told them.
    pub fn canary(&mut self, base: EventId, head: EventId) {
        if base > self.base || (base == self.base && head > self.position) {
            self.wanted = true;
        }
    }

    /// History is to be read whatever is known.
    pub fn look(&mut self) {
        self.wanted = true;
    }

    /// The position after which history is to be read now, if it is: the read is under way from here on and
    /// ends with [`Sequence::answer`] or [`Sequence::failed`].
    pub fn ask(&mut self) -> Option<EventId> {
        if !self.wanted || self.reading {
            return None;
        }
        self.wanted = false;
        self.reading = true;
        self.before_read = self.ahead.len();
        Some(self.position)
    }

    /// The read brought nothing, since the bus could not be asked.
    pub fn failed(&mut self) {
        self.reading = false;
        self.wanted = true;
    }

    /// Takes what history holds after `asked`: events from `asked + 1` on, as many as one read brings.
    pub fn answer(&mut self, asked: EventId, page: &Page, out: &mut Vec<Entry>) {
        self.reading = false;
        // Live events may have moved the position on meanwhile: in the same run what reaches beyond it follows it all the
        // same, and is not read again.
        let reaches_beyond = page.base == self.base
            && asked < self.position
            && page.entries.last().is_some_and(|entry| entry.last > self.position);
        if (page.base >= self.base && asked == self.position) || reaches_beyond {
            self.take_page(page, out);
        }
        // Else the answer is older than what is known.
        let behind = page.base >= self.base && (page.head > self.position || page.base > self.base);
        if behind {
            self.wanted = true;
        } else {
            // The read went up to the head. What came before it and is still ahead is in no history.
            let known = self.before_read.min(self.ahead.len());
            self.ahead.drain(..known);
        }
        self.before_read = 0;
        self.offer_ahead(out);
    }

    fn take_page(&mut self, page: &Page, out: &mut Vec<Entry>) {
        let asked = self.position;
        if !is_continuous(asked, page.base, page.head, page.oldest) {
            // Both are proven, and the later one is the nearest that is.
            self.reset(page.base.max(page.oldest.previous()), out);
        }
        self.base = page.base;
        for entry in &page.entries {
            if entry.before() > self.position {
                // History has lost events from its middle: only someone who deletes there does that.
                self.reset(entry.before(), out);
            }
            self.hand_on(entry, out);
        }
        if self.position == asked && page.head > asked && out.is_empty() {
            // Proven, yet not there: someone deleted the newest. The head itself is always proven.
            self.reset(page.head, out);
        }
    }

    fn reset(&mut self, position: EventId, out: &mut Vec<Entry>) {
        self.position = position;
        out.push(Entry::reset(position));
    }

    /// Hands on what of the entry is new, given that none before it is missing. False for a duplicate.
    fn hand_on(&mut self, entry: &Entry, out: &mut Vec<Entry>) -> bool {
        let Some(fresh) = entry.after(self.position) else { return false };
        self.position = fresh.last;
        out.push(fresh);
        true
    }

    fn keep_ahead(&mut self, entry: Entry) {
        if self.ahead.len() < AHEAD_MAX && self.ahead_bytes + entry.bytes.len() <= AHEAD_BYTES {
            self.ahead_bytes += entry.bytes.len();
            self.ahead.push(entry);
        }
    }

    fn offer_ahead(&mut self, out: &mut Vec<Entry>) {
        self.ahead_bytes = 0;
        let mut ahead = std::mem::take(&mut self.ahead);
        ahead.sort_by_key(|entry| entry.last);
        for entry in ahead {
            if entry.before() > self.position {
                self.wanted = true;
                self.keep_ahead(entry);
            } else {
                self.hand_on(&entry, out);
            }
        }
    }
}

#[cfg(test)]
mod tests;
