//! A client that sends arbitrary bytes, to test how the server handles them.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpSocket, TcpStream};

use super::http::{self, Response};
use super::within;

/// Opcodes of RFC 6455 section 5.2.
pub mod opcode {
    pub const CONTINUATION: u8 = 0;
    pub const TEXT: u8 = 1;
    pub const BINARY: u8 = 2;
    pub const CLOSE: u8 = 8;
    pub const PING: u8 = 9;
    pub const PONG: u8 = 10;
}

/// A TCP connection.
pub struct Raw {
    to: SocketAddr,
    socket: BufReader<TcpStream>,
}

impl Raw {
    pub async fn connect(to: SocketAddr) -> Raw {
        let socket = within("a connection", TcpStream::connect(to)).await.expect("the listener accepts");
        socket.set_nodelay(true).expect("a TCP socket");
        Raw { to, socket: BufReader::new(socket) }
    }

    /// Connects from another loopback address than 127.0.0.1.
    pub async fn connect_from(source: [u8; 4], to: SocketAddr) -> Raw {
        let socket = TcpSocket::new_v4().expect("a socket");
        socket.bind((source, 0).into()).expect("all of 127.0.0.0/8 is this machine's");
        let socket = within("a connection", socket.connect(to)).await.expect("the listener accepts");
        socket.set_nodelay(true).expect("a TCP socket");
        Raw { to, socket: BufReader::new(socket) }
    }

    /// Connects with small receive buffers, so that the server's sends block soon when nothing is
    /// read.
    pub async fn connect_with_small_buffers(to: SocketAddr) -> Raw {
        let socket = TcpSocket::new_v4().expect("a socket");
        socket.set_recv_buffer_size(4096).expect("a TCP socket");
        let socket = within("a connection", socket.connect(to)).await.expect("the listener accepts");
        Raw { to, socket: BufReader::new(socket) }
    }

    /// Connects and upgrades on `path`.
    pub async fn upgraded(to: SocketAddr, path: &str) -> Raw {
        let mut raw = Raw::connect(to).await;
        let response = raw.upgrade(path, &[]).await;
        assert_eq!(response.status, 101, "{response:?}");
        // RFC 6455 section 1.3 gives this pair of key and accept.
        assert_eq!(response.header("sec-websocket-accept"), Some("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="));
        raw
    }

    /// Requests an upgrade on `path`. A given header replaces the default one of the same name; an
    /// empty value omits it.
    pub async fn upgrade(&mut self, path: &str, headers: &[(&str, &str)]) -> Response {
        let usual = [
            ("Connection", "Upgrade"),
            ("Upgrade", "websocket"),
            ("Sec-WebSocket-Version", "13"),
            ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
        ];
        let kept = usual.iter().filter(|(name, _)| !headers.iter().any(|(n, _)| n == name));
        let all: Vec<_> =
            kept.chain(headers.iter().filter(|(_, value)| !value.is_empty())).copied().collect();
        self.write(&http::request_bytes(self.to, "GET", path, &all, b"")).await;
        self.response().await
    }

    pub async fn write(&mut self, bytes: &[u8]) {
        within("bytes to go out", self.socket.get_mut().write_all(bytes))
            .await
            .expect("the connection is open");
    }

    /// Closes the sending half.
    pub async fn end_sending(&mut self) {
        self.socket.get_mut().shutdown().await.expect("the connection is open");
    }

    /// Sends bytes. Returns false if the peer accepts none for half a second.
    pub async fn write_some(&mut self, bytes: &[u8]) -> bool {
        let write = self.socket.get_mut().write_all(bytes);
        matches!(tokio::time::timeout(Duration::from_millis(500), write).await, Ok(Ok(())))
    }

    /// Sends a masked frame, as clients must.
    pub async fn frame(&mut self, fin: bool, opcode: u8, payload: &[u8]) {
        self.write(&frame_bytes(fin, opcode, true, payload)).await;
    }

    /// Reads one HTTP response.
    pub async fn response(&mut self) -> Response {
        let read = within("an HTTP response", http::read_response(&mut self.socket, false)).await;
        read.unwrap_or_else(|error| panic!("{error}"))
    }

    /// Reads the head of an HTTP response and returns its status.
    pub async fn status(&mut self) -> u16 {
        let read = within("an HTTP response", http::read_response(&mut self.socket, true)).await;
        read.unwrap_or_else(|error| panic!("{error}")).status
    }

    /// Reads one unmasked, final frame: opcode and payload. `None` at the end of the connection.
    pub async fn next(&mut self) -> Option<(u8, Vec<u8>)> {
        within("a frame", async {
            let (opcode, length) = self.head().await?;
            let mut payload = vec![0; length];
            self.socket.read_exact(&mut payload).await.ok()?;
            Some((opcode, payload))
        })
        .await
    }

    /// Reads one frame that is not a ping, at most this many bytes at a time with a pause after
    /// each read.
    pub async fn next_slowly(&mut self, most: usize, pause: Duration) -> (u8, Vec<u8>) {
        loop {
            let (opcode, mut length) = self.head().await.expect("a frame");
            let mut payload = Vec::new();
            while length > 0 {
                let part = length.min(most);
                let start = payload.len();
                payload.resize(start + part, 0);
                let read = self.socket.read_exact(&mut payload[start..]);
                let read = within("a part of a frame", read).await;
                read.unwrap_or_else(|error| panic!("after {start} bytes of a frame: {error}"));
                length -= part;
                tokio::time::sleep(pause).await;
            }
            if opcode != opcode::PING {
                return (opcode, payload);
            }
        }
    }

    /// Opcode and length of the next frame, which must be unmasked and final.
    async fn head(&mut self) -> Option<(u8, usize)> {
        let mut head = [0; 2];
        self.socket.read_exact(&mut head).await.ok()?;
        assert_eq!(head[0] & 0xF0, 0x80, "fin without reserved bits: {head:?}");
        assert_eq!(head[1] & 0x80, 0, "a server's frame is not masked");
        let length = match head[1] {
            126 => u64::from(self.socket.read_u16().await.ok()?),
            127 => self.socket.read_u64().await.ok()?,
            short => u64::from(short),
        };
        Some((head[0] & 0x0F, usize::try_from(length).expect("64 bits")))
    }

    /// The next text frame.
    pub async fn next_text(&mut self) -> String {
        loop {
            match self.next().await {
                Some((opcode::TEXT, text)) => return String::from_utf8(text).expect("text is UTF-8"),
                Some((opcode::PING | opcode::PONG, _)) => {}
                other => panic!("{other:?} instead of text"),
            }
        }
    }

    /// Reads up to the close frame and the end of the connection. Returns the close code.
    pub async fn expect_close(&mut self) -> u16 {
        loop {
            match self.next().await {
                Some((opcode::CLOSE, payload)) => {
                    self.expect_end().await;
                    assert!(payload.len() >= 2, "a close with a code: {payload:?}");
                    return u16::from_be_bytes([payload[0], payload[1]]);
                }
                Some(_) => {}
                None => panic!("the connection ended without a close frame"),
            }
        }
    }

    /// All bytes up to the end of the connection.
    pub async fn rest(&mut self) -> Vec<u8> {
        let mut rest = Vec::new();
        // A reset counts as the end: the server may close with bytes of ours unread.
        let _ = within("the connection's end", self.socket.read_to_end(&mut rest)).await;
        rest
    }

    /// Fails unless the connection ends without further bytes.
    pub async fn expect_end(&mut self) {
        let rest = self.rest().await;
        assert!(rest.is_empty(), "more came: {rest:?}");
    }
}

/// A frame as bytes.
pub fn frame_bytes(fin: bool, opcode: u8, masked: bool, payload: &[u8]) -> Vec<u8> {
    let mask_bit = if masked { 0x80 } else { 0 };
    let mut bytes = vec![u8::from(fin) << 7 | opcode];
    match payload.len() {
        len @ 0..=125 => bytes.push(mask_bit | len as u8),
        len @ 126..=0xFFFF => {
            bytes.push(mask_bit | 126);
            bytes.extend((len as u16).to_be_bytes());
        }
        len => {
            bytes.push(mask_bit | 127);
            bytes.extend((len as u64).to_be_bytes());
        }
    }
    if masked {
        let mask = [0x37, 0xFA, 0x21, 0x3D];
        bytes.extend(mask);
        bytes.extend(payload.iter().enumerate().map(|(i, byte)| byte ^ mask[i % 4]));
    } else {
        bytes.extend(payload);
    }
    bytes
}
