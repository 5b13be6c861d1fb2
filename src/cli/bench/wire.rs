//! The parts of WebSocket (RFC 6455) and HTTP that a load generator needs, with little CPU.

/// First bytes of whole frames: FIN and opcode (RFC 6455 section 5.2).
pub const TEXT: u8 = 0x81;
pub const CLOSE: u8 = 0x88;
pub const PING: u8 = 0x89;
pub const PONG: u8 = 0x8A;

/// The example key of RFC 6455 section 1.3. Servers need not be able to tell clients apart by it.
pub const KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";
/// The `Sec-WebSocket-Accept` of [`KEY`].
pub const ACCEPT: &str = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=";

/// Longest frame that is read, in bytes.
pub const FRAME_MAX: usize = 16 << 20;

/// Longest response head that is read, in bytes.
pub const HEAD_MAX: usize = 16 << 10;

/// A constant mask: random masks protect proxies against scripts in browsers (RFC 6455 section
/// 10.3), and there are none here.
const MASK: [u8; 4] = [0x5A, 0xC3, 0x36, 0x99];

/// The bit of the second byte that says that a frame is masked.
const MASKED: u8 = 0x80;

/// Appends one frame of a client.
pub fn put_masked(out: &mut Vec<u8>, first: u8, payload: &[u8]) {
    put_head(out, first, MASKED, payload.len());
    out.extend_from_slice(&MASK);
    out.extend(payload.iter().zip(MASK.iter().cycle()).map(|(byte, mask)| byte ^ mask));
}

/// Appends one frame of a server.
pub fn put(out: &mut Vec<u8>, first: u8, payload: &[u8]) {
    put_head(out, first, 0, payload.len());
    out.extend_from_slice(payload);
}

fn put_head(out: &mut Vec<u8>, first: u8, masked: u8, len: usize) {
    out.push(first);
    match len {
        0..=125 => out.push(masked | len as u8),
        126..=0xFFFF => {
            out.push(masked | 126);
            out.extend_from_slice(&(len as u16).to_be_bytes());
        }
        _ => {
            out.push(masked | 127);
            out.extend_from_slice(&(len as u64).to_be_bytes());
        }
    }
}

/// A frame's head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// FIN, reserved bits and opcode.
    pub first: u8,
    /// Bytes before the payload.
    pub len: usize,
    /// Bytes of payload.
    pub payload: usize,
    /// The mask of a client's frame.
    pub mask: Option<[u8; 4]>,
}

/// Reads the head of a frame; `None` when more bytes are needed.
///
/// # Errors
/// Frames with reserved bits, and those that are too long.
pub fn head(bytes: &[u8]) -> Result<Option<Head>, String> {
    let [first, second, rest @ ..] = bytes else { return Ok(None) };
    if first & 0x70 != 0 {
        return Err("a frame with reserved bits".into());
    }
    let (extra, payload) = match (second & !MASKED, rest) {
        (126, [a, b, ..]) => (2, u64::from(u16::from_be_bytes([*a, *b]))),
        (127, [a, b, c, d, e, f, g, h, ..]) => (8, u64::from_be_bytes([*a, *b, *c, *d, *e, *f, *g, *h])),
        (126 | 127, _) => return Ok(None),
        (len, _) => (0, u64::from(len)),
    };
    let payload = match usize::try_from(payload) {
        Ok(payload) if payload <= FRAME_MAX => payload,
        _ => return Err(format!("a frame longer than {FRAME_MAX} bytes")),
    };
    let mut head = Head { first: *first, len: 2 + extra, payload, mask: None };
    if second & MASKED != 0 {
        let Some([a, b, c, d]) = rest.get(extra..extra + 4) else { return Ok(None) };
        (head.len, head.mask) = (head.len + 4, Some([*a, *b, *c, *d]));
    }
    Ok(Some(head))
}

/// A response, as far as a load generator needs it.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    pub status: u16,
    /// Bytes of the head.
    pub len: usize,
    /// `Sec-WebSocket-Accept` is the one of [`KEY`].
    pub accepted: bool,
    /// The `Server` header.
    pub server: Option<String>,
    pub body: Body,
}

/// Where the body of a response ends.
#[derive(Debug, PartialEq, Eq)]
pub enum Body {
    Length(usize),
    Chunked,
    /// With the connection.
    Close,
}

/// Reads the head of a response; `None` when more bytes are needed.
///
/// # Errors
/// Bytes that are not an HTTP response.
pub fn answer(bytes: &[u8]) -> Result<Option<Answer>, String> {
    let mut headers = [httparse::EMPTY_HEADER; 64];
    let mut response = httparse::Response::new(&mut headers);
    let len = match response.parse(bytes) {
        Ok(httparse::Status::Complete(len)) => len,
        Ok(httparse::Status::Partial) if bytes.len() <= HEAD_MAX => return Ok(None),
        Ok(httparse::Status::Partial) => return Err("a response head that is too long".into()),
        Err(_) => return Err("an answer that is not HTTP".into()),
    };
    let header = |name: &str| {
        let found = response.headers.iter().find(|header| header.name.eq_ignore_ascii_case(name))?;
        std::str::from_utf8(found.value).ok()
    };
    let status = response.code.unwrap_or_default();
    let body = match (header("content-length").map(str::parse), header("transfer-encoding")) {
        (Some(Ok(length)), _) => Body::Length(length),
        (None, Some(coding)) if coding.eq_ignore_ascii_case("chunked") => Body::Chunked,
        (None, None) if matches!(status, 101 | 204 | 304) => Body::Length(0),
        _ => Body::Close,
    };
    let accepted = header("sec-websocket-accept") == Some(ACCEPT);
    let server = header("server").map(str::to_owned);
    Ok(Some(Answer { status, len, accepted, server, body }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_heads_of_all_lengths() {
        for (bytes, expected) in [
            (&[0x81, 5][..], Some((2, 5))),
            (&[0x81, 126, 1], None),
            (&[0x81, 126, 1, 2], Some((4, 258))),
            (&[0x81, 127, 0, 0, 0, 0, 0, 1, 0, 0], Some((10, 65536))),
            (&[0x81], None),
        ] {
            let found = head(bytes).unwrap().map(|head| (head.len, head.payload));
            assert_eq!(found, expected, "{bytes:?}");
        }
        assert!(head(&[0xC1, 0]).is_err());
        for len in [0, 125, 126, 0xFFFF, 0x1_0000] {
            let (mut of_client, mut of_server) = (Vec::new(), Vec::new());
            put_masked(&mut of_client, TEXT, &vec![0; len]);
            put(&mut of_server, TEXT, &vec![0; len]);
            let (client, server) = (head(&of_client).unwrap().unwrap(), head(&of_server).unwrap().unwrap());
            assert_eq!((client.payload, client.mask, client.len), (len, Some(MASK), server.len + 4));
            assert_eq!((server.payload, server.mask), (len, None));
            assert_eq!(head(&of_client[..client.len - 1]).unwrap(), None);
        }
        assert!(head(&[0x81, 127, 0, 0, 0, 1, 0, 0, 0, 0]).is_err());
    }

    #[test]
    fn reads_responses() {
        let upgraded = format!("HTTP/1.1 101 S\r\nSec-WebSocket-Accept: {ACCEPT}\r\nServer: x\r\n\r\n\u{1}");
        let found = answer(upgraded.as_bytes()).unwrap().unwrap();
        assert!(found.accepted && found.status == 101 && found.len == upgraded.len() - 1);
        assert_eq!((found.server.as_deref(), found.body), (Some("x"), Body::Length(0)));
        let plain = answer(b"HTTP/1.1 503 No\r\nContent-Length: 12\r\n\r\n").unwrap().unwrap();
        assert_eq!((plain.status, plain.body, plain.accepted), (503, Body::Length(12), false));
        assert_eq!(answer(b"HTTP/1.1 200 OK\r\n").unwrap(), None);
        assert!(answer(b"SSH-2.0-x\r\n\r\n").is_err());
    }
}
