//! Ids of what clients publish: of events, and of messages in inboxes, which go to backends instead of to
//! subscribers.

use std::fmt;

use crate::protocol::event::EventId;

/// The id of a message in an inbox: that of its entry in the Redis stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MessageId {
    /// Milliseconds since 1970 by the clock of Redis.
    pub time: u64,
    /// Distinguishes messages of one millisecond.
    pub sequence: u64,
}

impl MessageId {
    pub fn parse(text: &[u8]) -> Option<MessageId> {
        let number = |digits: &str| {
            let is_number = digits.bytes().all(|byte| byte.is_ascii_digit());
            is_number.then(|| digits.parse().ok()).flatten()
        };
        let (time, sequence) = std::str::from_utf8(text).ok()?.split_once('-')?;
        Some(MessageId { time: number(time)?, sequence: number(sequence)? })
    }
}

impl fmt::Display for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.time, self.sequence)
    }
}

/// The id that something published got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PublishedId {
    Event(EventId),
    Message(MessageId),
}

impl From<EventId> for PublishedId {
    fn from(id: EventId) -> PublishedId {
        PublishedId::Event(id)
    }
}

/// As JSON.
impl fmt::Display for PublishedId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PublishedId::Event(id) => id.fmt(f),
            PublishedId::Message(id) => write!(f, "\"{id}\""),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn message_ids_are_those_of_redis() {
        let id = MessageId { time: 1_764_000_000_001, sequence: 7 };
        assert_eq!(MessageId::parse(b"1764000000001-7"), Some(id));
        assert_eq!(id.to_string(), "1764000000001-7");
        assert_eq!(PublishedId::Message(id).to_string(), "\"1764000000001-7\"");
        for none in ["", "-", "1", "1-", "-1", "+1-2", "1-2-3", "1-18446744073709551616"] {
            assert_eq!(MessageId::parse(none.as_bytes()), None, "{none}");
        }
    }
}
