//! The decoder: from the bytes of a client to its messages.
//!
//! Nearly every frame is complete, unfragmented text. It is unmasked in place, in the buffer of the
//! shard. So are control frames, which are so short that an incomplete one is kept until its end.
//! For fragments and incomplete text frames the connection gets a tungstenite context, which is fed
//! frame by frame, and dropped as soon as it holds nothing.

use std::io::{self, Read, Write};
use std::time::Instant;

use bytes::Bytes;
use tokio_tungstenite::tungstenite::Error;
use tokio_tungstenite::tungstenite::protocol::frame::FrameHeader;
use tokio_tungstenite::tungstenite::protocol::frame::coding::{Control, Data, OpCode};
use tokio_tungstenite::tungstenite::protocol::{Message, Role, WebSocketConfig, WebSocketContext};

use crate::limits::rate::{FRAGMENT_BYTES, FRAGMENTS_MAX};
use crate::protocol::close::CloseReason;

/// Most messages decoded before the caller decides whether to go on.
pub const MESSAGES_AT_ONCE: usize = 64;

/// Read buffer of a context, in bytes. The default of tungstenite is 128 KiB, but a context lives
/// for a frame or two.
const CONTEXT_BUFFER: usize = 1024;

/// Longest payload of a control frame in bytes (RFC 6455 section 5.5).
const CONTROL_MAX: u64 = 125;

/// A message or control frame of a client.
#[derive(Debug, PartialEq, Eq)]
pub enum Incoming {
    /// A text message, and its number of frames.
    Text(String, u32),
    /// A binary message if [`Limits::binary`] allows it, and its number of frames.
    Binary(Bytes, u32),
    /// A ping, and the payload for its pong.
    Ping(Box<[u8]>),
    Pong,
    /// A close frame, and its code. No message follows.
    Close(Option<u16>),
}

impl Incoming {
    /// Bytes of payload, as far as it is kept, and number of frames.
    pub fn size(&self) -> (usize, u32) {
        match self {
            Incoming::Text(text, frames) => (text.len(), *frames),
            Incoming::Binary(bytes, frames) => (bytes.len(), *frames),
            Incoming::Ping(payload) => (payload.len(), 1),
            Incoming::Pong | Incoming::Close(_) => (0, 1),
        }
    }
}

/// What clients may send.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of the longest message.
    pub max_message_size: usize,
    /// Accept binary messages. Only the echo server for the Autobahn suite does.
    pub binary: bool,
}

/// What a connection keeps between two reads, if anything.
#[derive(Debug)]
pub struct Partial {
    /// When it was created.
    pub since: Instant,
    /// Bytes to decode before those of the next read: the start of a frame, or frames not decoded
    /// yet.
    pub unread: Vec<u8>,
    context: Option<Box<WebSocketContext>>,
    /// Bytes of the current frame that have not arrived.
    remaining: usize,
    /// Frames so far of a message whose last frame has not arrived.
    fragments: usize,
    /// Frames of the current message.
    frames: u32,
    /// Bytes of the message in the context.
    held: usize,
    /// The shard has it in its list of partial messages.
    pub is_listed: bool,
}

impl Partial {
    pub fn new() -> Partial {
        Partial {
            since: Instant::now(),
            unread: Vec::new(),
            context: None,
            remaining: 0,
            fragments: 0,
            frames: 0,
            held: 0,
            is_listed: false,
        }
    }

    /// Bytes of the incomplete message that have arrived.
    pub fn held(&self) -> usize {
        self.held
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

/// Decodes bytes of a client into `messages`. Returns how many bytes. The rest is the start of a
/// frame of at most 130 bytes, or follows the last of [`MESSAGES_AT_ONCE`] messages. After an error
/// or a close frame the rest is ignored.
pub fn read(
    partial: &mut Option<Box<Partial>>,
    data: &mut [u8],
    limits: Limits,
    messages: &mut Vec<Incoming>,
) -> Result<usize, CloseReason> {
    let mut at = 0;
    while at < data.len() && messages.len() < MESSAGES_AT_ONCE {
        if let Some(current) = partial.as_deref_mut().filter(|partial| partial.remaining > 0) {
            let length = current.remaining.min(data.len() - at);
            current.remaining -= length;
            current.held += length;
            let context = current.context.get_or_insert_with(|| new_context(limits));
            feed_context(context, &data[at..at + length], current.frames, messages)?;
            at += length;
            if current.remaining == 0 && current.fragments == 0 {
                *partial = None;
            }
            continue;
        }
        let mut cursor = io::Cursor::new(&data[at..]);
        let parsed = FrameHeader::parse(&mut cursor).map_err(|error| reason(&error))?;
        let Some((header, length)) = parsed else { break };
        let head = cursor.position() as usize;
        let mask = check(&header, head, length, limits)?;
        let length = length as usize; // at most max_message_size
        let fragments = partial.as_ref().map_or(0, |partial| partial.fragments);
        let whole = data.len() - at - head >= length;
        match header.opcode {
            OpCode::Control(control) => {
                if !whole {
                    break;
                }
                let payload = unmasked(&mut data[at + head..at + head + length], mask);
                at += head + length;
                match control {
                    Control::Ping => messages.push(Incoming::Ping(payload.into())),
                    Control::Close => {
                        messages.push(Incoming::Close(close_code(payload)?));
                        return Ok(at); // the rest is ignored (RFC 6455 section 5.5.1)
                    }
                    _ => messages.push(Incoming::Pong),
                }
            }
            OpCode::Data(Data::Text) if header.is_final && whole && fragments == 0 => {
                let payload = unmasked(&mut data[at + head..at + head + length], mask);
                let text = std::str::from_utf8(payload).map_err(|_| CloseReason::InvalidText)?;
                messages.push(Incoming::Text(text.to_owned(), 1));
                at += head + length;
            }
            OpCode::Data(_) => {
                let current = partial.get_or_insert_default();
                current.remaining = head + length;
                current.frames = current.fragments as u32 + 1; // fits, by the check below
                current.fragments = if header.is_final { 0 } else { current.fragments + 1 };
                if current.fragments > FRAGMENTS_MAX + limits.max_message_size / FRAGMENT_BYTES {
                    return Err(CloseReason::MessageTimeout);
                }
            }
        }
    }
    if partial.as_ref().is_some_and(|partial| partial.is_idle()) {
        *partial = None;
    }
    Ok(at)
}

/// Checks the header of a frame, of `head` bytes, before anything of the frame is kept. Returns the
/// mask.
fn check(header: &FrameHeader, head: usize, length: u64, limits: Limits) -> Result<[u8; 4], CloseReason> {
    let reserved = header.rsv1 || header.rsv2 || header.rsv3;
    let shortest = match length {
        0..=125 => 6,
        126..=0xFFFF => 8,
        _ => 14,
    };
    let Some(mask) = header.mask.filter(|_| !reserved && head == shortest) else {
        return Err(CloseReason::Protocol); // RFC 6455 sections 5.1 and 5.2
    };
    match header.opcode {
        OpCode::Control(Control::Reserved(_)) => Err(CloseReason::Protocol),
        // RFC 6455 section 5.5.
        OpCode::Control(_) if length > CONTROL_MAX || !header.is_final => Err(CloseReason::Protocol),
        OpCode::Control(_) => Ok(mask),
        OpCode::Data(Data::Reserved(_)) => Err(CloseReason::Protocol),
        OpCode::Data(Data::Binary) if !limits.binary => Err(CloseReason::Binary),
        OpCode::Data(_) if length > limits.max_message_size as u64 => Err(CloseReason::MessageTooBig),
        OpCode::Data(_) => Ok(mask),
    }
}

/// Removes the mask (RFC 6455 section 5.3), eight bytes at a time.
fn unmasked(payload: &mut [u8], mask: [u8; 4]) -> &[u8] {
    let [a, b, c, d] = mask;
    let wide = u64::from_ne_bytes([a, b, c, d, a, b, c, d]);
    let mut chunks = payload.chunks_exact_mut(8);
    for chunk in &mut chunks {
        let word = u64::from_ne_bytes((&*chunk).try_into().expect("chunks are eight bytes")) ^ wide;
        chunk.copy_from_slice(&word.to_ne_bytes());
    }
    chunks.into_remainder().iter_mut().zip(mask.iter().cycle()).for_each(|(byte, mask)| *byte ^= mask);
    payload
}

/// The code in the payload of a close frame (RFC 6455 sections 5.5.1 and 7.4, and the IANA registry
/// of close codes).
fn close_code(payload: &[u8]) -> Result<Option<u16>, CloseReason> {
    let (code, text) = match payload {
        [] => return Ok(None),
        [high, low, text @ ..] => (u16::from_be_bytes([*high, *low]), text),
        [_] => return Err(CloseReason::Protocol),
    };
    if !matches!(code, 1000..=1003 | 1007..=1014 | 3000..=4999) {
        return Err(CloseReason::Protocol);
    }
    std::str::from_utf8(text).map_err(|_| CloseReason::InvalidText)?;
    Ok(Some(code))
}

fn new_context(limits: Limits) -> Box<WebSocketContext> {
    let config = WebSocketConfig::default()
        .read_buffer_size(CONTEXT_BUFFER)
        .max_message_size(Some(limits.max_message_size))
        .max_frame_size(Some(limits.max_message_size));
    Box::new(WebSocketContext::new(Role::Server, Some(config)))
}

/// Feeds bytes of data frames to the context, and adds the messages that it completes.
fn feed_context(
    context: &mut WebSocketContext,
    part: &[u8],
    frames: u32,
    messages: &mut Vec<Incoming>,
) -> Result<(), CloseReason> {
    let mut wire = Wire(part);
    loop {
        match context.read(&mut wire) {
            Ok(Message::Text(text)) => messages.push(Incoming::Text(text.as_str().to_owned(), frames)),
            Ok(Message::Binary(bytes)) => messages.push(Incoming::Binary(bytes, frames)),
            Ok(_) => unreachable!("control frames never reach a context"),
            Err(Error::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(reason(&error)),
        }
    }
}

fn reason(error: &Error) -> CloseReason {
    match error {
        Error::Capacity(_) => CloseReason::MessageTooBig,
        Error::Utf8(_) => CloseReason::InvalidText,
        _ => CloseReason::Protocol,
    }
}

/// The stream of a context: the bytes that have arrived. A context writes nothing in response to
/// data frames.
struct Wire<'a>(&'a [u8]);

impl Read for Wire<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.0.read(buffer)? {
            0 => Err(io::ErrorKind::WouldBlock.into()),
            length => Ok(length),
        }
    }
}

impl Write for Wire<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        Ok(buffer.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
