//! A channel as the bus has it, played by a test.

use std::collections::{BTreeMap, VecDeque};

use crate::bus::{BLOCK, Page, block_start};
use crate::protocol::event::{Entry, EventId};

/// Events that history holds.
const HISTORY: usize = 60;

pub struct Source {
    pub base: u64,
    pub head: u64,
    /// Id, receiver and text of the events that history holds.
    pub history: VecDeque<(u64, Option<String>, String)>,
    /// The receiver of every event; `None` for all subscribers.
    receivers: BTreeMap<u64, Option<String>>,
}

impl Source {
    /// A channel without events.
    pub fn new(head: u64) -> Source {
        Source { base: head, head, history: VecDeque::new(), receivers: BTreeMap::new() }
    }

    /// Gives the next id to an event.
    pub fn publish(&mut self, to: Option<String>, size: usize) {
        self.head += 1;
        let text = format!(r#"{{"text":"{}","id":{}}}"#, "x".repeat(size), self.head);
        self.receivers.insert(self.head, to.clone());
        self.history.push_back((self.head, to, text));
        if self.history.len() > HISTORY {
            self.history.pop_front();
        }
    }

    /// Starts a new epoch, further on. Returns its mark.
    pub fn start_epoch(&mut self) -> Entry {
        self.head += 1000;
        self.base = self.head;
        self.history.clear();
        Entry::reset(EventId(self.base))
    }

    /// The oldest id in history, or the next one.
    pub fn oldest(&self) -> u64 {
        self.history.front().map_or(self.head + 1, |(id, ..)| *id)
    }

    /// The first event for this user after a position.
    pub fn due(&self, user: &str, at: u64) -> Option<u64> {
        let mine = |to: &Option<String>| to.as_deref().is_none_or(|to| to == user);
        self.receivers.range(at + 1..).find(|(_, to)| mine(to)).map(|(id, _)| *id)
    }

    pub fn entries(&self, first: u64, last: u64) -> Vec<Entry> {
        let held: Vec<_> = self.history.iter().filter(|(id, ..)| (first..=last).contains(id)).collect();
        let entry = |some: &[&(u64, Option<String>, String)]| {
            let to = some[0].1.as_deref().map(Into::into);
            Entry::addressed(EventId(some[0].0), to, some.iter().map(|(_, _, text)| text.as_bytes()))
        };
        held.chunk_by(|a, b| a.1 == b.1).map(entry).collect()
    }

    /// The page after a position. Some start before it, and some end before their block.
    pub fn page(&self, position: EventId) -> Page {
        let before = block_start(position);
        let after = if position.0.is_multiple_of(5) { position } else { before };
        let end = before.0 + BLOCK;
        let oldest = self.oldest();
        let end = if position.0.is_multiple_of(3) { end.min(oldest.max(position.0) + 7) } else { end };
        let entries = self.entries(after.0 + 1, end);
        Page {
            after: entries.first().map_or(position, |first| first.before().min(position)),
            base: EventId(self.base),
            head: EventId(self.head),
            oldest: EventId(oldest),
            entries,
            ..Page::default()
        }
    }
}
