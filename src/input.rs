//! A client's bytes become its messages.
//!
//! Nearly every frame is whole, unfragmented text: it is unmasked where it lies, in the shard's scratch buffer.
//! For everything else (control frames, fragments, a frame whose end is still on its way) the connection gets a
//! tungstenite context for as long as it needs one, and that is fed frame by frame: so it is known when it holds
//! nothing any more and can go.

use std::io::{self, Read, Write};
use std::time::Instant;

use tokio_tungstenite::tungstenite::Error;
use tokio_tungstenite::tungstenite::protocol::frame::FrameHeader;
use tokio_tungstenite::tungstenite::protocol::frame::coding::{Control, Data, OpCode};
use tokio_tungstenite::tungstenite::protocol::{Message, Role, WebSocketConfig, WebSocketContext};

use crate::close::Reason;

/// Most messages taken before the caller looks whether it wants more of them.
pub const MESSAGES_AT_ONCE: usize = 64;

/// Most frames of one message: a client that sends its message in more of them only wants to cost something.
const FRAGMENTS_MAX: u32 = 4096;

/// tungstenite would take 128 KiB a context; this one lives for a frame or two.
const CONTEXT_BUFFER: usize = 1024;

/// Something a client said.
#[derive(Debug, PartialEq, Eq)]
pub enum Incoming {
    /// A text message.
    Text(String),
    /// It closes; the answer is among the replies.
    Close,
}

/// What a connection keeps between two reads, when it has to keep something.
#[derive(Debug)]
pub struct Partial {
    /// Since when.
    pub since: Instant,
    /// Bytes that come before those of the next read: the begin of a frame's head, or frames that wait.
    pub unread: Vec<u8>,
    context: Option<Box<WebSocketContext>>,
    /// Bytes of the current frame that have yet to come.
    remaining: usize,
    /// Frames so far of a message whose last one has yet to come.
    fragments: u32,
}

impl Partial {
    /// Nothing yet.
    pub fn new() -> Partial {
        Partial { since: Instant::now(), unread: Vec::new(), context: None, remaining: 0, fragments: 0 }
    }

    fn is_idle(&self) -> bool {
        self.unread.is_empty() && self.remaining == 0 && self.fragments == 0
    }
}

impl Default for Partial {
    fn default() -> Partial {
        Partial::new()
    }
}

/// Reads a client's bytes; tells how many. The rest is the begin of a frame's head, or comes after the last of
/// [`MESSAGES_AT_ONCE`] messages. Messages go to `messages`, frames that answer them to `replies`. `max_message` is
/// in bytes. After an error, and after a close, the rest means nothing.
pub fn read(
    partial: &mut Option<Box<Partial>>,
    data: &mut [u8],
    max_message: usize,
    messages: &mut Vec<Incoming>,
    replies: &mut Vec<u8>,
) -> Result<usize, Reason> {
    let mut at = 0;
    while at < data.len() && messages.len() < MESSAGES_AT_ONCE {
        if let Some(begun) = partial.as_deref_mut().filter(|partial| partial.remaining > 0) {
            let length = begun.remaining.min(data.len() - at);
            begun.remaining -= length;
            let context = begun.context.get_or_insert_with(|| new_context(max_message));
            feed(context, &data[at..at + length], messages, replies)?;
            at += length;
            if messages.last() == Some(&Incoming::Close) {
                return Ok(at); // what follows a close frame means nothing (RFC 6455 section 5.5.1)
            }
            if begun.remaining == 0 && begun.fragments == 0 {
                *partial = None;
            }
            continue;
        }
        let mut cursor = io::Cursor::new(&data[at..]);
        let parsed = FrameHeader::parse(&mut cursor).map_err(|error| reason(&error))?;
        let Some((header, length)) = parsed else { break };
        let head = cursor.position() as usize;
        check(&header, length, max_message)?;
        let length = length as usize; // at most max_message
        let fragments = partial.as_ref().map_or(0, |partial| partial.fragments);
        let whole = data.len() - at - head >= length;
        if let (OpCode::Data(Data::Text), true, true, 0, Some(mask)) =
            (header.opcode, header.is_final, whole, fragments, header.mask)
        {
            let payload = &mut data[at + head..at + head + length];
            unmask(payload, mask);
            let text = std::str::from_utf8(payload).map_err(|_| Reason::InvalidText)?;
            messages.push(Incoming::Text(text.to_owned()));
            at += head + length;
            continue;
        }
        let begun = partial.get_or_insert_default();
        begun.remaining = head + length;
        if let OpCode::Data(_) = header.opcode {
            begun.fragments = if header.is_final { 0 } else { begun.fragments + 1 };
            if begun.fragments > FRAGMENTS_MAX {
                return Err(Reason::Unfinished);
            }
        }
    }
    if partial.as_ref().is_some_and(|partial| partial.is_idle()) {
        *partial = None;
    }
    Ok(at)
}

/// What a frame's head alone forbids, before anything is kept for it.
fn check(header: &FrameHeader, length: u64, max_message: usize) -> Result<(), Reason> {
    let reserved = header.rsv1 || header.rsv2 || header.rsv3;
    if reserved || header.mask.is_none() {
        return Err(Reason::Protocol); // RFC 6455 sections 5.2 and 5.1
    }
    match header.opcode {
        OpCode::Control(_) if length > 125 || !header.is_final => Err(Reason::Protocol), // section 5.5
        OpCode::Data(Data::Binary) => Err(Reason::Binary),
        OpCode::Data(_) if length > max_message as u64 => Err(Reason::TooLong),
        OpCode::Control(Control::Close | Control::Ping | Control::Pong) | OpCode::Data(_) => Ok(()),
        OpCode::Control(Control::Reserved(_)) => Err(Reason::Protocol),
    }
}

/// XOR with the mask (RFC 6455 section 5.3), eight bytes at a time.
fn unmask(payload: &mut [u8], mask: [u8; 4]) {
    let [a, b, c, d] = mask;
    let wide = u64::from_ne_bytes([a, b, c, d, a, b, c, d]);
    let mut chunks = payload.chunks_exact_mut(8);
    for chunk in &mut chunks {
        let word = u64::from_ne_bytes((&*chunk).try_into().expect("chunks are eight bytes")) ^ wide;
        chunk.copy_from_slice(&word.to_ne_bytes());
    }
    chunks.into_remainder().iter_mut().zip(mask.iter().cycle()).for_each(|(byte, mask)| *byte ^= mask);
}

fn new_context(max_message: usize) -> Box<WebSocketContext> {
    let config = WebSocketConfig::default()
        .read_buffer_size(CONTEXT_BUFFER)
        .write_buffer_size(0) // a reply goes out at once
        .max_message_size(Some(max_message))
        .max_frame_size(Some(max_message.max(125)));
    Box::new(WebSocketContext::new(Role::Server, Some(config)))
}

/// Gives the context what has come, and takes what it makes of it.
fn feed(
    context: &mut WebSocketContext,
    part: &[u8],
    messages: &mut Vec<Incoming>,
    replies: &mut Vec<u8>,
) -> Result<(), Reason> {
    let mut wire = Wire { input: part, output: replies };
    loop {
        match context.read(&mut wire) {
            Ok(Message::Text(text)) => messages.push(Incoming::Text(text.as_str().to_owned())),
            Ok(Message::Binary(_)) => return Err(Reason::Binary),
            Ok(Message::Close(_)) => messages.push(Incoming::Close),
            Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_)) => {}
            Err(Error::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(Error::ConnectionClosed | Error::AlreadyClosed) => return Ok(()), // after its close
            Err(error) => return Err(reason(&error)),
        }
    }
}

fn reason(error: &Error) -> Reason {
    match error {
        Error::Capacity(_) => Reason::TooLong,
        Error::Utf8(_) => Reason::InvalidText,
        _ => Reason::Protocol,
    }
}

/// tungstenite's side of a connection: reads from what has come, writes to the replies.
struct Wire<'a> {
    input: &'a [u8],
    output: &'a mut Vec<u8>,
}

impl Read for Wire<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.input.read(buffer)? {
            0 => Err(io::ErrorKind::WouldBlock.into()),
            length => Ok(length),
        }
    }
}

impl Write for Wire<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.output.write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
        let mask = [7u8, 99, 0, 201];
        let mut frame = vec![first];
        match payload.len() {
            len @ 0..=125 => frame.push(0x80 | len as u8),
            len @ 126..=0xFFFF => {
                frame.push(0x80 | 126);
                frame.extend((len as u16).to_be_bytes());
            }
            len => {
                frame.push(0x80 | 127);
                frame.extend((len as u64).to_be_bytes());
            }
        }
        frame.extend(mask);
        frame.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
        frame
    }

    /// Reads `bytes` in pieces that end at these places, as the shard does with its scratch.
    fn read_in_pieces(bytes: &[u8], cuts: &[usize]) -> (Result<(), Reason>, Vec<Incoming>, Vec<u8>, bool) {
        let (mut partial, mut messages, mut replies) = (None, Vec::new(), Vec::new());
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut % (bytes.len() + 1)).collect();
        cuts.push(bytes.len());
        cuts.sort_unstable();
        let mut rest = Vec::new();
        let mut start = 0;
        for cut in cuts {
            let mut piece = [&rest[..], &bytes[start..cut]].concat();
            start = cut;
            loop {
                let mut some = Vec::new();
                let read = read(&mut partial, &mut piece, 1000, &mut some, &mut replies);
                let full = some.len() == MESSAGES_AT_ONCE;
                messages.append(&mut some);
                match read {
                    Ok(read) => piece.drain(..read),
                    Err(reason) => return (Err(reason), messages, replies, partial.is_some()),
                };
                if messages.last() == Some(&Incoming::Close) {
                    return (Ok(()), messages, replies, partial.is_some());
                }
                if !full {
                    break;
                }
            }
            rest = piece;
        }
        assert!(rest.is_empty(), "whole frames are read whole");
        (Ok(()), messages, replies, partial.is_some())
    }

    fn text(text: &str) -> Incoming {
        Incoming::Text(text.to_owned())
    }

    #[test]
    fn a_ping_between_fragments_is_answered_and_the_message_is_whole() {
        let bytes =
            [frame(0x01, b"one "), frame(0x89, b"p"), frame(0x00, b"two "), frame(0x80, b"three")].concat();
        let (result, messages, replies, kept) = read_in_pieces(&bytes, &[]);
        assert_eq!((result, messages), (Ok(()), vec![text("one two three")]));
        assert_eq!(replies, [0x8A, 1, b'p']);
        assert!(!kept, "nothing is kept between messages");
    }

    #[test]
    fn a_close_is_answered_with_its_code() {
        let (result, messages, replies, _) = read_in_pieces(&frame(0x88, &[0x03, 0xE8]), &[]);
        assert_eq!((result, messages, replies), (Ok(()), vec![Incoming::Close], vec![0x88, 2, 0x03, 0xE8]));
    }

    #[test]
    fn what_follows_a_close_is_ignored() {
        let bytes = [frame(0x88, &[]), frame(0x81, b"hi"), frame(0x89, b"")].concat();
        let (result, messages, replies, _) = read_in_pieces(&bytes, &[]);
        assert_eq!((result, messages, replies), (Ok(()), vec![Incoming::Close], vec![0x88, 0]));
    }

    #[test]
    fn what_the_protocol_forbids_ends_with_its_reason() {
        let mut unmasked = frame(0x81, b"");
        unmasked[1] &= 0x7F;
        let huge = [0x81, 0xFF, 0x7F, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0, 0, 0, 0];
        for (bytes, expected) in [
            (unmasked, Reason::Protocol),
            (frame(0xC1, b"rsv"), Reason::Protocol),
            (frame(0x83, b"opcode"), Reason::Protocol),
            (frame(0x8B, b"opcode"), Reason::Protocol),
            (frame(0x89, &[0; 126]), Reason::Protocol),
            (frame(0x09, b"fragmented ping"), Reason::Protocol),
            (frame(0x80, b"nothing to continue"), Reason::Protocol),
            ([frame(0x01, b"a"), frame(0x81, b"b")].concat(), Reason::Protocol),
            (frame(0x88, &[0x03]), Reason::Protocol),
            (frame(0x82, b"binary"), Reason::Binary),
            (frame(0x81, &[0xFF]), Reason::InvalidText),
            ([frame(0x01, &[0xC3]), frame(0x80, b"a")].concat(), Reason::InvalidText),
            (frame(0x81, &[b'a'; 1001]), Reason::TooLong),
            (huge.to_vec(), Reason::TooLong),
            ([frame(0x01, &[b'a'; 600]), frame(0x80, &[b'a'; 600])].concat(), Reason::TooLong),
        ] {
            assert_eq!(read_in_pieces(&bytes, &[]).0, Err(expected), "{bytes:x?}");
        }
    }

    proptest! {
        /// However the network cuts the bytes, the messages are the same.
        #[test]
        fn messages_do_not_depend_on_how_bytes_arrive(
            sent in prop::collection::vec(("\\PC{0,300}", 0usize..4), 1..80),
            cuts in prop::collection::vec(any::<usize>(), 0..20),
        ) {
            let mut bytes = Vec::new();
            for (words, shape) in &sent {
                let words = words.as_bytes();
                let words = &words[..words.len().min(1000)];
                let middle = words.len() / 2;
                match shape {
                    0 | 1 => bytes.extend(frame(0x81, words)),
                    2 => bytes.extend([frame(0x01, &words[..middle]), frame(0x80, &words[middle..])].concat()),
                    _ => bytes.extend([frame(0x89, b"ping"), frame(0x81, words), frame(0x8A, b"")].concat()),
                }
            }
            let straight = read_in_pieces(&bytes, &[]);
            let cut = read_in_pieces(&bytes, &cuts);
            prop_assert_eq!(&straight.0, &cut.0);
            if straight.0.is_ok() {
                prop_assert_eq!(straight.1.len(), sent.len());
                prop_assert_eq!(straight.1, cut.1);
                prop_assert_eq!(straight.2, cut.2);
                prop_assert!(!cut.3, "nothing is kept between messages");
            }
        }
    }
}
