//! A channel as this node follows it: who gets its entries, who waits to, and where it stands.

use crate::bus::sequence::Sequence;
use crate::bus::{Page, ShardId};
use crate::protocol::event::{Entry, EventId};

/// Entries kept that came before the position was known. More would only spare a read.
const EARLY_MAX: usize = 256;

/// One followed channel.
#[derive(Debug)]
pub struct Follow {
    /// Shards that get every entry.
    pub followers: Vec<ShardId>,
    /// Shards that wait for the channel to be followed.
    pub joining: Vec<ShardId>,
    /// The subscription it waits for.
    pub ticket: u64,
    /// Known once the position has been read.
    pub sequence: Option<Sequence>,
    early: Vec<Entry>,
    /// Shards whose look the read under way answers.
    looking: Vec<ShardId>,
    /// Shards that came while a read was under way: that one may be too old for them.
    look_next: Vec<ShardId>,
}

impl Follow {
    /// Waits for the subscription with this ticket.
    pub fn new(shard: ShardId, ticket: u64) -> Follow {
        Follow {
            followers: Vec::new(),
            joining: vec![shard],
            ticket,
            sequence: None,
            early: Vec::new(),
            looking: Vec::new(),
            look_next: Vec::new(),
        }
    }

    /// Lets a shard go. True when nobody is left.
    pub fn leave(&mut self, shard: ShardId) -> bool {
        for list in [&mut self.followers, &mut self.joining, &mut self.looking, &mut self.look_next] {
            list.retain(|other| *other != shard);
        }
        self.followers.is_empty() && self.joining.is_empty()
    }

    /// The position is known: everyone who joins follows from there. Entries that came early go on to `out`.
    pub fn start(&mut self, base: EventId, head: EventId, out: &mut Vec<Entry>) -> Vec<ShardId> {
        let mut sequence = Sequence::new(base, head);
        for entry in self.early.drain(..) {
            sequence.live(entry, out);
        }
        self.sequence = Some(sequence);
        self.followers.append(&mut self.joining.clone());
        std::mem::take(&mut self.joining)
    }

    /// Takes what Pub/Sub brought.
    pub fn live(&mut self, entry: Entry, out: &mut Vec<Entry>) {
        match &mut self.sequence {
            Some(sequence) => sequence.live(entry, out),
            None if self.early.len() < EARLY_MAX => self.early.push(entry),
            None => {} // a hole, seen by the next entry or canary
        }
    }

    /// A shard wants the bus to be asked.
    pub fn look(&mut self, shard: ShardId) {
        if let Some(sequence) = &mut self.sequence {
            self.look_next.push(shard);
            sequence.look();
        }
    }

    /// The position after which to read now, if there is reason to.
    pub fn ask(&mut self) -> Option<EventId> {
        let asked = self.sequence.as_mut()?.ask()?;
        self.looking.append(&mut self.look_next);
        Some(asked)
    }

    /// Takes a read's answer. Returns the shards whose look is answered.
    pub fn answer(&mut self, asked: EventId, page: &Page, out: &mut Vec<Entry>) -> Vec<ShardId> {
        let Some(sequence) = &mut self.sequence else { return Vec::new() };
        sequence.answer(asked, page, out);
        let done = sequence.position() >= page.head || page.base < sequence.base();
        if done { std::mem::take(&mut self.looking) } else { Vec::new() }
    }

    /// The read brought nothing. Returns the shards that wait for it.
    pub fn failed(&mut self) -> Vec<ShardId> {
        if let Some(sequence) = &mut self.sequence {
            sequence.failed();
        }
        let mut waiting = std::mem::take(&mut self.looking);
        waiting.append(&mut self.look_next);
        waiting
    }
}
