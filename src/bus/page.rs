//! Positions and pages of a channel's history.

use std::sync::OnceLock;

use crate::protocol::event::{Entry, EventId};
use crate::protocol::form::{self, ChannelForm, Form};

/// Ids in one block of history. Blocks start at multiples of it. Readers in one block share reads.
pub const BLOCK: u64 = 256;

/// Most bytes of events before the position asked for. They are read from the start of the block, so
/// that other readers of the block can use the same page.
pub const SHARED_BYTES: usize = 64 * 1024;

/// The position before the block that holds the event after `position`.
pub fn block_start(position: EventId) -> EventId {
    let first = position.next().0;
    EventId(first - first % BLOCK).previous()
}

/// Events of one block of history, all read at one moment.
///
/// `entries` holds the events after `after` that history has, in order and consecutive, private
/// ones among them. The first of the block are missing if history was trimmed. The last are missing
/// if the head is inside the block, or if the size asked for was reached, after at least one event.
#[derive(Clone, Debug, Default)]
pub struct Page {
    /// The position asked for, or an earlier one of the same block.
    pub after: EventId,
    /// The first position of the epoch: no position before it is continuous with what follows.
    pub base: EventId,
    /// The last id used.
    pub head: EventId,
    /// The oldest id in history; `head + 1` if history is empty.
    pub oldest: EventId,
    pub entries: Vec<Entry>,
    /// The entries in the named form, once a shard has needed it.
    pub named: OnceLock<Vec<Entry>>,
}

impl Page {
    /// The entries in the form of this channel, whose page it is. Shards share both forms.
    pub fn entries_of(&self, channel: &ChannelForm) -> &[Entry] {
        match channel.form {
            Form::Unnamed => &self.entries,
            Form::Named => self
                .named
                .get_or_init(|| self.entries.iter().map(|entry| form::named(entry, &channel.name)).collect()),
        }
    }

    /// Whether it shows what follows `position`: the next event, or that events are gone.
    pub fn covers(&self, position: EventId) -> bool {
        let end = self.entries.last().map_or(self.after, |entry| entry.last);
        let gone = is_gone(position, self.base, self.head, self.oldest);
        self.after <= position && (position < end || gone)
    }
}

/// Whether no event after `position` is missing: history has all of them, in the position's epoch.
pub fn is_continuous(position: EventId, base: EventId, head: EventId, oldest: EventId) -> bool {
    base <= position && position <= head && (position == head || oldest <= position.next())
}

/// Whether events after `position` are missing from history for good.
pub fn is_gone(position: EventId, base: EventId, head: EventId, oldest: EventId) -> bool {
    position < base || (position < head && oldest > position.next())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All small histories: a position is continuous if and only if it belongs to the epoch and
    /// history holds all that follows it.
    #[test]
    fn continuous_positions_miss_nothing() {
        for (base, head) in (0..6_u64).flat_map(|base| (base..8).map(move |head| (base, head))) {
            for (oldest, at) in (base + 1..=head + 1).flat_map(|oldest| (0..10).map(move |at| (oldest, at))) {
                let in_epoch = base <= at && at <= head;
                let held = (at + 1..=head).all(|id| oldest <= id);
                let continuous = is_continuous(EventId(at), EventId(base), EventId(head), EventId(oldest));
                assert_eq!(continuous, in_epoch && held, "{at}: base {base}, head {head}, oldest {oldest}");
            }
        }
    }
}
