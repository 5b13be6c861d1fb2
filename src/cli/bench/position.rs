//! Which events of its channel a client has received: the judgement of its order, with O(1) state.

/// One of the channels among which clients and events are divided: event N is of channel N modulo
/// their count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Channel {
    pub number: u32,
    pub count: u32,
}

impl Channel {
    fn has(self, event: u32) -> bool {
        self.count == 1 || event % self.count == self.number
    }

    /// Events of this channel up to this event of the run.
    fn events_until(self, event: u32) -> u32 {
        if self.count == 1 {
            return event;
        }
        let first = if self.number == 0 { self.count } else { self.number };
        (event + self.count - first) / self.count
    }
}

/// The last event received. Events are counted within the channel, from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    /// Nothing is known: any event may be the first.
    Unknown,
    /// All events up to this one.
    UpTo(u32),
    /// A notice said that events after this one may be missing.
    Notified(u32),
}

/// How an event fits to those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Judgement {
    Next,
    /// So many events before it are lost.
    Gap(u32),
    /// It came twice, or after a later one.
    Repeated,
    /// It was counted as missing before.
    Late,
    OtherChannel,
}

/// The position of a client in its channel.
#[derive(Clone, Copy, Debug)]
pub struct Position {
    channel: Channel,
    seen: Seen,
    /// Events up to this one are late, not repeated: they were counted as missing.
    skipped_to: u32,
}

impl Position {
    pub fn unknown(channel: Channel) -> Position {
        Position { channel, seen: Seen::Unknown, skipped_to: 0 }
    }

    /// Takes an event that arrives, by its number in the run.
    pub fn take(&mut self, event: u32) -> Judgement {
        if !self.channel.has(event) {
            return Judgement::OtherChannel;
        }
        let event = self.channel.events_until(event);
        let judgement = match self.seen {
            Seen::UpTo(last) | Seen::Notified(last) if event <= last => {
                return if event > self.skipped_to { Judgement::Repeated } else { Judgement::Late };
            }
            Seen::UpTo(last) if event > last + 1 => Judgement::Gap(event - last - 1),
            Seen::UpTo(_) | Seen::Unknown | Seen::Notified(_) => Judgement::Next,
        };
        self.seen = Seen::UpTo(event);
        judgement
    }

    /// Events may be missing, as the server says.
    pub fn notify(&mut self) {
        if let Seen::UpTo(last) = self.seen {
            self.seen = Seen::Notified(last);
        }
    }

    /// How many events up to this one of the run are missing; at most one if none has arrived.
    pub fn missing(&self, event: u32) -> u32 {
        let due = self.channel.events_until(event);
        match self.seen {
            Seen::UpTo(last) => due.saturating_sub(last),
            Seen::Unknown => due.min(1),
            Seen::Notified(_) => 0,
        }
    }

    /// The last event, if there is one.
    pub fn last(&self) -> Option<u32> {
        match self.seen {
            Seen::UpTo(last) | Seen::Notified(last) => Some(last),
            Seen::Unknown => None,
        }
    }

    /// The next event is the one after this one of the run. Those that are missing were counted.
    pub fn expect_after(&mut self, event: u32) {
        let last = self.channel.events_until(event);
        if self.seen != Seen::UpTo(last) {
            self.skipped_to = last;
        }
        self.seen = Seen::UpTo(last);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: Channel = Channel { number: 0, count: 1 };

    #[test]
    fn judges_order() {
        let mut position = Position::unknown(ONE);
        assert_eq!((position.missing(3), position.last()), (1, None));
        let events = [3, 4, 7, 6, 7, 8];
        let expected = [
            Judgement::Next,
            Judgement::Next,
            Judgement::Gap(2),
            Judgement::Repeated,
            Judgement::Repeated,
            Judgement::Next,
        ];
        assert_eq!(events.map(|event| position.take(event)), expected);
        assert_eq!((position.missing(10), position.last()), (2, Some(8)));
        position.expect_after(10);
        assert_eq!([9, 11].map(|event| position.take(event)), [Judgement::Late, Judgement::Next]);
        position.notify();
        assert_eq!((position.missing(20), position.take(20), position.missing(20)), (0, Judgement::Next, 0));
    }

    #[test]
    fn counts_events_of_its_channel_alone() {
        for number in 0..3 {
            let mut position = Position::unknown(Channel { number, count: 3 });
            position.expect_after(4); // event 1 and 4 are of channel 1, 2 of channel 2, 3 of channel 0
            let next = [6, 7, 5][number as usize];
            assert_eq!(position.missing(next), 1, "{position:?}");
            assert_eq!(position.take(next + 1), Judgement::OtherChannel);
            assert_eq!(position.take(next), Judgement::Next);
            assert_eq!(position.take(next + 6), Judgement::Gap(1));
            assert_eq!(position.take(next), Judgement::Repeated);
        }
    }
}
