//! Event ids, channel names, and entries: events framed once for all sockets of the node.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};

/// Longest user id and channel name, in bytes.
pub const NAME_MAX: usize = 128;

/// Longest idempotency key, in bytes: part of a Redis key. function.lua has the same limit.
const KEY_MAX: usize = 128;

/// The channel of a connection that names none.
pub const DEFAULT_CHANNEL: &str = "ws_broadcast";

/// Not a name that [`ChannelName::parse`] accepts.
const CONTROL_CHANNEL: &str = "@control";

/// Memory of an entry in a feed or a history beside its bytes: the entry itself (72), its place in
/// an index and in the eviction queue (24), and the heads of its allocations (32).
const ENTRY_OVERHEAD: usize = 128;

/// Memory of a private entry beside its user's name: the head of the name's allocation (16 bytes)
/// and 16 bytes in a B-tree whose leaves may be half empty.
const PRIVATE_OVERHEAD: usize = 64;

/// A position in a channel's sequence. Below 2^53, so that JavaScript holds it exactly.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EventId(pub u64);

impl EventId {
    /// Ids stay below this: JavaScript's `Number.MAX_SAFE_INTEGER` + 1.
    pub const LIMIT: u64 = 1 << 53;

    pub fn next(self) -> EventId {
        EventId(self.0 + 1)
    }

    pub fn previous(self) -> EventId {
        EventId(self.0.saturating_sub(1))
    }

    /// Parses a client's `lastEventId`: decimal digits, below [`EventId::LIMIT`].
    pub fn parse(text: &[u8]) -> Option<EventId> {
        if text.is_empty() || text.len() > 16 || !text.iter().all(u8::is_ascii_digit) {
            return None;
        }
        let id = text.iter().fold(0, |id, digit| id * 10 + u64::from(digit - b'0'));
        (id < Self::LIMIT).then_some(EventId(id))
    }
}

impl fmt::Display for EventId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The name of a channel: `[A-Za-z0-9_.:-]{1,128}`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChannelName(Arc<str>);

impl ChannelName {
    /// What a name is, for error texts.
    pub const RULE: &str = "1 to 128 of A-Z a-z 0-9 _ . : -";

    pub fn parse(name: &str) -> Option<ChannelName> {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b':' | b'-');
        let valid = (1..=NAME_MAX).contains(&name.len()) && name.bytes().all(allowed);
        valid.then(|| ChannelName(name.into()))
    }

    /// The channel of commands to the nodes. [`ChannelName::parse`] rejects its name, so no client
    /// and no request can name it.
    pub fn control() -> ChannelName {
        ChannelName(CONTROL_CHANNEL.into())
    }

    pub fn is_control(&self) -> bool {
        &*self.0 == CONTROL_CHANNEL
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::borrow::Borrow<str> for ChannelName {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ChannelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Whether `name` can be a user id: 1 to 128 bytes, no control characters.
pub fn is_user_id(name: &str) -> bool {
    (1..=NAME_MAX).contains(&name.len()) && !name.chars().any(char::is_control)
}

/// Whether `key` can be an idempotency key: 1 to 128 printable ASCII characters without blanks and
/// quotes.
pub fn is_idempotency_key(key: &str) -> bool {
    (1..=KEY_MAX).contains(&key.len()) && key.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'"')
}

/// What an entry holds, and for whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Consecutive events for all subscribers of the channel.
    Events,
    /// Consecutive events for the connections of one user.
    Private(Arc<str>),
    /// An event without id, from another program's `PUBLISH`: delivered live, never replayed.
    WithoutId,
    /// No event: positions before this mark are not continuous with what follows.
    Reset,
}

/// Some consecutive events of one channel, serialized and framed: the same bytes go to every
/// socket.
#[derive(Clone, Debug)]
pub struct Entry {
    pub kind: Kind,
    /// Position of a client that has the whole entry.
    pub last: EventId,
    /// Whole WebSocket text frames (RFC 6455 section 5.2), unmasked.
    pub bytes: Bytes,
    /// End of each frame in `bytes`; `None` for a single frame.
    ends: Option<Arc<[u32]>>,
}

impl Entry {
    /// Consecutive events for all subscribers, the first with the id `first`. Each text is JSON
    /// that already has its id. There is at least one.
    pub fn events<'a>(first: EventId, texts: impl Iterator<Item = &'a [u8]> + Clone) -> Entry {
        Entry::addressed(first, None, texts)
    }

    /// As [`Entry::events`], for one user if `to` is given.
    pub fn addressed<'a>(
        first: EventId,
        to: Option<Arc<str>>,
        texts: impl Iterator<Item = &'a [u8]> + Clone,
    ) -> Entry {
        let size = texts.clone().map(|text| text.len() + FRAME_HEAD_MAX).sum();
        let mut bytes = BytesMut::with_capacity(size);
        let mut ends = Vec::new();
        for text in texts {
            put_text_frame(&mut bytes, &as_published(text));
            ends.push(u32::try_from(bytes.len()).expect("an entry is far below 4 GiB"));
        }
        let last = EventId(first.0 + ends.len() as u64 - 1);
        let ends = (ends.len() > 1).then(|| ends.into());
        let kind = to.map_or(Kind::Events, Kind::Private);
        Entry { kind, last, bytes: bytes.freeze(), ends }
    }

    /// An event without id that arrived when the channel's head was `position`.
    pub fn without_id(position: EventId, text: &[u8]) -> Entry {
        let bytes = text_frame(&as_published(text));
        Entry { kind: Kind::WithoutId, last: position, bytes, ends: None }
    }

    /// A `reset` frame: clients load their state again and continue from `position`.
    pub fn reset(position: EventId) -> Entry {
        Entry::reset_as(position, &format!(r#"{{"type":"reset","lastEventId":{position}}}"#))
    }

    /// A `reset` frame with this text.
    pub fn reset_as(position: EventId, text: &str) -> Entry {
        Entry { kind: Kind::Reset, last: position, bytes: text_frame(text.as_bytes()), ends: None }
    }

    /// The same events with other texts: `write` appends each to an empty buffer. They are about
    /// `longer` bytes longer.
    pub fn rewritten(&self, longer: usize, write: impl Fn(&[u8], &mut Vec<u8>)) -> Entry {
        let mut bytes = BytesMut::with_capacity(self.bytes.len() + (longer + 2) * self.frames());
        let (mut ends, mut text) = (Vec::new(), Vec::new());
        for original in self.texts() {
            text.clear();
            write(original, &mut text);
            put_text_frame(&mut bytes, &text);
            ends.push(u32::try_from(bytes.len()).expect("an entry is far below 4 GiB"));
        }
        let ends = (ends.len() > 1).then(|| ends.into());
        Entry { kind: self.kind.clone(), last: self.last, bytes: bytes.freeze(), ends }
    }

    /// Number of frames.
    pub fn frames(&self) -> usize {
        self.ends.as_ref().map_or(1, |ends| ends.len())
    }

    /// Bytes of memory that it counts for in a feed or a history.
    pub fn memory(&self) -> usize {
        let private = match &self.kind {
            Kind::Private(user) => user.len() + PRIVATE_OVERHEAD,
            _ => 0,
        };
        self.bytes.len() + size_of::<u32>() * self.frames() + ENTRY_OVERHEAD + private
    }

    /// Number of ids in the sequence.
    pub fn ids(&self) -> u64 {
        match self.kind {
            Kind::Events | Kind::Private(_) => self.frames() as u64,
            Kind::WithoutId | Kind::Reset => 0,
        }
    }

    /// Position of a client that has everything before this entry.
    pub fn before(&self) -> EventId {
        match self.kind {
            Kind::Reset => self.last.previous(),
            _ => EventId(self.last.0 - self.ids()),
        }
    }

    /// The texts of its frames, in order.
    pub fn texts(&self) -> impl Iterator<Item = &[u8]> {
        let mut start = 0;
        (0..self.frames()).map(move |number| {
            let end = self.ends.as_ref().map_or(self.bytes.len(), |ends| ends[number] as usize);
            let frame = &self.bytes[start..end];
            start = end;
            let head = match frame[1] {
                126 => 4,
                127 => FRAME_HEAD_MAX,
                _ => 2,
            };
            &frame[head..]
        })
    }

    /// Start of the frame that holds byte `offset`.
    pub fn frame_start(&self, offset: u32) -> u32 {
        let ends = self.ends.as_deref().unwrap_or_default();
        ends[..ends.partition_point(|end| *end <= offset)].last().copied().unwrap_or(0)
    }

    /// End of the frame that holds byte `offset`.
    pub fn frame_end(&self, offset: u32) -> u32 {
        match &self.ends {
            None => self.bytes.len() as u32,
            Some(ends) => ends[ends.partition_point(|end| *end <= offset)],
        }
    }

    /// Number of frames that end at or before byte `offset`.
    pub fn frames_until(&self, offset: u32) -> usize {
        match &self.ends {
            None => usize::from(offset as usize >= self.bytes.len()),
            Some(ends) => ends.partition_point(|end| *end <= offset),
        }
    }

    /// Whether a frame starts at byte `offset`, or the last one ends there.
    pub fn is_boundary(&self, offset: u32) -> bool {
        let inside = || self.ends.as_ref().is_some_and(|ends| ends.binary_search(&offset).is_ok());
        offset == 0 || offset as usize == self.bytes.len() || inside()
    }

    /// Start of the event after `position`, for a position inside this entry.
    pub fn offset_after(&self, position: EventId) -> u32 {
        let known = position.0.saturating_sub(self.before().0) as usize;
        match &self.ends {
            Some(ends) if known > 0 => ends[known - 1],
            _ => 0,
        }
    }

    /// The part of this entry that a client at `position` has.
    pub fn until(self, position: EventId) -> Option<Entry> {
        if self.last <= position {
            return Some(self);
        }
        let ends = self.ends.as_ref().filter(|_| self.before() < position)?;
        let known = (position.0 - self.before().0) as usize;
        let kept: Arc<[u32]> = ends[..known].into();
        let bytes = self.bytes.slice(..kept[known - 1] as usize);
        Some(Entry { kind: self.kind, last: position, bytes, ends: (known > 1).then_some(kept) })
    }

    /// The part of this entry after `position`.
    pub fn after(&self, position: EventId) -> Option<Entry> {
        if self.last <= position {
            return None;
        }
        let offset = self.offset_after(position);
        if offset == 0 {
            return Some(self.clone());
        }
        let ends = self.ends.as_ref().expect("only an entry of several frames has an offset inside");
        let rest: Arc<[u32]> = ends.iter().filter(|end| **end > offset).map(|end| end - offset).collect();
        let ends = (rest.len() > 1).then_some(rest);
        Some(Entry {
            kind: self.kind.clone(),
            last: self.last,
            bytes: self.bytes.slice(offset as usize..),
            ends,
        })
    }
}

/// An event in the form in which it was published. Only in the other form, which names the channel,
/// do events begin with `{"channel":`, so that clients can tell them apart: here a space follows the
/// brace.
fn as_published(text: &[u8]) -> Cow<'_, [u8]> {
    match text.starts_with(br#"{"channel":"#) {
        true => [b"{ ", &text[1..]].concat().into(),
        false => text.into(),
    }
}

/// Longest header of an unmasked frame: opcode, 127, eight bytes of length (RFC 6455 section 5.2).
pub const FRAME_HEAD_MAX: usize = 10;

const TEXT: u8 = 0x81;

/// Appends `text` as one unfragmented, unmasked text frame (RFC 6455 section 5.2).
pub fn put_text_frame(out: &mut BytesMut, text: &[u8]) {
    out.put_u8(TEXT);
    match text.len() {
        len @ 0..=125 => out.put_u8(len as u8),
        len @ 126..=0xFFFF => {
            out.put_u8(126);
            out.put_u16(len as u16);
        }
        len => {
            out.put_u8(127);
            out.put_u64(len as u64);
        }
    }
    out.put_slice(text);
}

pub fn text_frame(text: &[u8]) -> Bytes {
    let mut bytes = BytesMut::with_capacity(text.len() + FRAME_HEAD_MAX);
    put_text_frame(&mut bytes, text);
    bytes.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_adjacent() {
        let (long, longest) = (vec![b' '; 126], vec![b' '; 1 << 16]);
        let texts: [&[u8]; 4] = [b"{\"n\":1,\"id\":7}", &long, &longest, b"{\"id\":10}"];
        let several = Entry::events(EventId(7), texts.into_iter());
        let one = Entry::events(EventId(7), texts.into_iter().take(1));
        for entry in [&several, &one] {
            assert!(entry.texts().eq(texts.into_iter().take(entry.frames())));
            for offset in 0..entry.bytes.len() as u32 {
                let (start, end) = (entry.frame_start(offset), entry.frame_end(offset));
                assert!(
                    start <= offset && offset < end && entry.is_boundary(start),
                    "{offset}: {start}..{end}"
                );
                assert_eq!(entry.frames_until(end), entry.frames_until(start) + 1);
            }
        }
    }
}
