//! A client's bytes become its messages.
//!
//! Nearly every frame is whole, unfragmented text: it is unmasked where it lies, in the shard's scratch buffer. So are
//! control frames, which are so short that a half one can wait for its end. For the rest (fragments, a text whose end
//! is still on its way) the connection gets a tungstenite context for as long as it needs one, and that is fed frame
//! by frame: so it is known when it holds nothing any more and can go.

use std::io::{self, Read, Write};
use std::time::Instant;

use bytes::Bytes;
use tokio_tungstenite::tungstenite::Error;
use tokio_tungstenite::tungstenite::protocol::frame::FrameHeader;
use tokio_tungstenite::tungstenite::protocol::frame::coding::{Control, Data, OpCode};
use tokio_tungstenite::tungstenite::protocol::{Message, Role, WebSocketConfig, WebSocketContext};

use crate::limits::rate::{FRAGMENT_BYTES, FRAGMENTS_MAX};
use crate::protocol::close::CloseReason;

/// Most messages taken before the caller looks whether it wants more of them.
pub const MESSAGES_AT_ONCE: usize = 64;

/// tungstenite would take 128 KiB a context; this one lives for a frame or two.
const CONTEXT_BUFFER: usize = 1024;

/// Longest payload of a control frame (RFC 6455 section 5.5).
const CONTROL_MAX: u64 = 125;

/// Something a client said.
#[derive(Debug, PartialEq, Eq)]
pub enum Incoming {
    /// A text message, and how many frames it came in.
    Text(String, u32),
    /// A binary message, where [`Limits::binary`] lets it pass, and how many frames it came in.
    Binary(Bytes, u32),
    /// A ping with this payload, which the pong is to have.
    Ping(Box<[u8]>),
    /// A pong.
    Pong,
    /// It closes, with this code; nothing comes after.
    Close(Option<u16>),
}

impl Incoming {
    /// Its payload in bytes, as far as that is kept, and how many frames it came in.
    pub fn size(&self) -> (usize, u32) {
        match self {
            Incoming::Text(text, frames) => (text.len(), *frames),
            Incoming::Binary(bytes, frames) => (bytes.len(), *frames),
            Incoming::Ping(payload) => (payload.len(), 1),
            Incoming::Pong | Incoming::Close(_) => (0, 1),
        }
    }
}

/// What a client may send.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Longest message, in bytes.
    pub max_message_size: usize,
    /// Binary messages are taken. fanfare takes none; the echo that Autobahn judges does.
    pub binary: bool,
}

/// What a connection keeps between two reads, when it has to keep something.
#[derive(Debug)]
pub struct Partial {
    /// Since when.
    pub since: Instant,
    /// Bytes that come before those of the next read: the begin of a frame, or frames that wait.
    pub unread: Vec<u8>,
    context: Option<Box<WebSocketContext>>,
    /// Bytes of the current frame that have yet to come.
    remaining: usize,
    /// Frames so far of a message whose last one has yet to come.
    fragments: usize,
    /// Frames of the current message.
    frames: u32,
    /// Bytes of the message that the context has.
    held: usize,
    /// The shard has it among the unfinished messages.
    pub noted: bool,
}

impl Partial {
    /// Nothing yet.
    pub fn new() -> Partial {
        Partial {
            since: Instant::now(),
            unread: Vec::new(),
            context: None,
            remaining: 0,
            fragments: 0,
            frames: 0,
            held: 0,
            noted: false,
        }
    }

    /// Bytes of the unfinished message that have come.
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

/// Reads a client's bytes into `messages`; tells how many. The rest is the begin of a frame, at most 130 bytes of it,
/// or comes after the last of [`MESSAGES_AT_ONCE`] messages. After an error, and after a close, it means nothing.
pub fn read(
    partial: &mut Option<Box<Partial>>,
    data: &mut [u8],
    limits: Limits,
    messages: &mut Vec<Incoming>,
) -> Result<usize, CloseReason> {
    let mut at = 0;
    while at < data.len() && messages.len() < MESSAGES_AT_ONCE {
        if let Some(begun) = partial.as_deref_mut().filter(|partial| partial.remaining > 0) {
            let length = begun.remaining.min(data.len() - at);
            begun.remaining -= length;
            begun.held += length;
            let context = begun.context.get_or_insert_with(|| new_context(limits));
            feed(context, &data[at..at + length], begun.frames, messages)?;
            at += length;
            if begun.remaining == 0 && begun.fragments == 0 {
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
                        return Ok(at); // what follows a close frame means nothing (RFC 6455 section 5.5.1)
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
                let begun = partial.get_or_insert_default();
                begun.remaining = head + length;
                begun.frames = begun.fragments as u32 + 1; // at most FRAGMENTS_MAX and what max_message_size adds
                begun.fragments = if header.is_final { 0 } else { begun.fragments + 1 };
                if begun.fragments > FRAGMENTS_MAX + limits.max_message_size / FRAGMENT_BYTES {
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

/// What a frame's head (of `head` bytes) alone forbids, before anything is kept for it. Gives the mask.
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
        OpCode::Control(_) if length > CONTROL_MAX || !header.is_final => Err(CloseReason::Protocol), // section 5.5
        OpCode::Control(_) => Ok(mask),
        OpCode::Data(Data::Reserved(_)) => Err(CloseReason::Protocol),
        OpCode::Data(Data::Binary) if !limits.binary => Err(CloseReason::Binary),
        OpCode::Data(_) if length > limits.max_message_size as u64 => Err(CloseReason::MessageTooBig),
        OpCode::Data(_) => Ok(mask),
    }
}

/// Undoes the mask (RFC 6455 section 5.3), eight bytes at a time.
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

/// The code of a close frame's payload (RFC 6455 sections 5.5.1 and 7.4, and the IANA registry of close codes).
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

/// Gives the context what has come of data frames, and takes what it makes of it.
fn feed(
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

/// tungstenite's side of a connection: reads from what has come. It has nothing to say about data frames.
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
