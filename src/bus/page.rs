//! Positions and pages of a channel's history.

use crate::protocol::event::{Entry, EventId};

/// How many ids one page of history spans; pages begin at multiples of it.
pub const PAGE: u64 = 256;

/// Bytes that an answer may hold before the position asked for: so much is read from the page's begin for others to
/// share.
pub const PART_SHARED: usize = 64 * 1024;

/// The position before the page that holds the event after `position`.
pub fn page_begin(position: EventId) -> EventId {
    let first = position.next().0;
    EventId(first - first % PAGE).previous()
}

/// A page of history or a part of it, all from one moment.
#[derive(Clone, Debug)]
pub struct Page {
    /// The position that its events follow: the one asked for, or an earlier one of the same page.
    pub after: EventId,
    /// The last anchor: no position before it is continuous with what follows.
    pub base: EventId,
    /// The last id given.
    pub head: EventId,
    /// The oldest id that history holds; `head + 1` when it holds none.
    pub oldest: EventId,
    /// The page's events that history holds, in order and consecutive, private ones among them. The front is
    /// missing where history was trimmed; the end where the head stands inside the page, or where the size asked
    /// for was reached: then it holds at least one event.
    pub entries: Vec<Entry>,
}

impl Page {
    /// Whether it says what follows `position`: the next event, or that it is gone for good.
    pub fn covers(&self, position: EventId) -> bool {
        let end = self.entries.last().map_or(self.after, |entry| entry.last);
        let gone = is_gone(position, self.base, self.head, self.oldest);
        self.after <= position && (position < end || gone)
    }
}

/// Whether position `at` is proven continuous with what follows: nothing after it is missing.
pub fn is_continuous(at: EventId, base: EventId, head: EventId, oldest: EventId) -> bool {
    base <= at && at <= head && (at == head || oldest <= at.next())
}

/// Whether what follows position `at` is gone for good, at least in part.
pub fn is_gone(at: EventId, base: EventId, head: EventId, oldest: EventId) -> bool {
    at < base || (at < head && oldest > at.next())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every small history: what is proven is just what can be shown to miss nothing.
    #[test]
    fn a_position_is_proven_if_and_only_if_history_holds_all_that_follows_it_in_its_run() {
        for (base, head) in (0..6_u64).flat_map(|base| (base..8).map(move |head| (base, head))) {
            for (oldest, at) in (base + 1..=head + 1).flat_map(|oldest| (0..10).map(move |at| (oldest, at))) {
                let of_this_run = base <= at && at <= head;
                let held = (at + 1..=head).all(|id| oldest <= id);
                let proven = is_continuous(EventId(at), EventId(base), EventId(head), EventId(oldest));
                assert_eq!(proven, of_this_run && held, "{at}: base {base}, head {head}, oldest {oldest}");
            }
        }
    }
}
