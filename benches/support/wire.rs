//! The parts of HTTP and WebSocket (RFC 6455) that load clients and the baseline use.

use std::ops::Range;

use anyhow::{Result, ensure};

/// A text frame's first byte.
pub const TEXT: u8 = 0x81;
/// A close frame's first byte.
pub const CLOSE: u8 = 0x88;
/// A ping frame's first byte.
pub const PING: u8 = 0x89;
/// A pong frame's first byte.
pub const PONG: u8 = 0x8A;

/// The example key of RFC 6455 section 1.3.
pub const KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";
/// The `Sec-WebSocket-Accept` of [`KEY`].
pub const ACCEPT: &str = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=";

/// A constant mask: random masks protect proxies (RFC 6455 section 5.3), and there are none here.
const MASK: [u8; 4] = [0x5A, 0xC3, 0x36, 0x99];

/// Appends one masked frame.
pub fn put_masked(out: &mut Vec<u8>, first: u8, payload: &[u8]) {
    out.push(first);
    match payload.len() {
        len @ 0..=125 => out.push(0x80 | len as u8),
        len => {
            let len = u16::try_from(len).expect("the benches send short frames");
            out.push(0x80 | 126);
            out.extend_from_slice(&len.to_be_bytes());
        }
    }
    out.extend_from_slice(&MASK);
    out.extend(payload.iter().zip(MASK.iter().cycle()).map(|(byte, mask)| byte ^ mask));
}

/// A frame's head.
pub struct Head {
    /// FIN and opcode.
    pub first: u8,
    /// Bytes before the payload.
    pub len: usize,
    /// Bytes of payload.
    pub payload: usize,
    /// The client's mask.
    pub mask: Option<[u8; 4]>,
}

/// Reads the head of a frame; `None` when more bytes are needed.
pub fn head(bytes: &[u8]) -> Result<Option<Head>> {
    let [first, second, rest @ ..] = bytes else { return Ok(None) };
    ensure!(first & 0x70 == 0, "a frame with reserved bits: {first:#x}");
    let (extra, payload) = match (second & 0x7F, rest) {
        (126, [a, b, ..]) => (2, u16::from_be_bytes([*a, *b]) as usize),
        (127, [a, b, c, d, e, f, g, h, ..]) => {
            (8, u64::from_be_bytes([*a, *b, *c, *d, *e, *f, *g, *h]) as usize)
        }
        (126 | 127, _) => return Ok(None),
        (len, _) => (0, len as usize),
    };
    let mut len = 2 + extra;
    let mut mask = None;
    if second & 0x80 != 0 {
        let Some(key) = bytes.get(len..len + 4) else { return Ok(None) };
        mask = Some([key[0], key[1], key[2], key[3]]);
        len += 4;
    }
    Ok(Some(Head { first: *first, len, payload, mask }))
}

/// The range of the head of an HTTP message in `bytes`; `None` while it is incomplete.
pub fn http_head(bytes: &[u8]) -> Option<Range<usize>> {
    let end = bytes.windows(4).position(|four| four == b"\r\n\r\n")?;
    Some(0..end + 4)
}
