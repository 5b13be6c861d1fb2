//! The client's end of a connection.

use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use socket2::SockRef;

use super::super::*;
use super::testbed::take_frame;
use crate::limits::connections::ConnectionLimits;

/// One half of a Unix pair with small buffers, so that short writes need no waiting. The shard has
/// the other half.
pub struct Peer {
    pub socket: UnixStream,
    unsent: Vec<u8>,
    unparsed: Vec<u8>,
    pub upgraded: bool,
}

impl Peer {
    /// Connects, and asks for an upgrade with this path and these header lines.
    pub fn connect(shard: &mut Shard, limits: &ConnectionLimits, path: &str, headers: &str) -> Peer {
        let (ours, theirs) = UnixStream::pair().expect("two sockets");
        for socket in [&ours, &theirs] {
            socket.set_nonblocking(true).expect("a socket");
        }
        SockRef::from(&theirs).set_send_buffer_size(4 << 10).expect("a socket");
        let theirs = std::net::TcpStream::from(OwnedFd::from(theirs));
        let slot = limits.acquire(Ipv4Addr::LOCALHOST.into()).expect("there is room");
        shard.handle_message(ShardMessage::Sockets(vec![(TcpStream::from_std(theirs), slot)]));
        let request = format!(
            "GET {path} HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{headers}\r\n"
        );
        (&ours).write_all(request.as_bytes()).expect("there is room");
        Peer { socket: ours, unsent: Vec::new(), unparsed: Vec::new(), upgraded: false }
    }

    /// Sends as much as there is room for. Before the upgrade a client may not send anything.
    pub fn send(&mut self, bytes: &[u8]) {
        if !self.upgraded {
            return;
        }
        self.unsent.extend(bytes);
        if let Ok(written) = self.socket.write(&self.unsent) {
            self.unsent.drain(..written);
        }
    }

    /// Reads up to this many bytes. Returns whether there were any.
    pub fn read(&mut self, bytes: usize) -> bool {
        let mut buffer = vec![0; bytes];
        let read = self.socket.read(&mut buffer).unwrap_or(0);
        self.unparsed.extend(&buffer[..read]);
        read > 0
    }

    /// Reads all that there is, and forgets it. Returns whether there was anything.
    pub fn skip(&mut self) -> bool {
        let mut any = false;
        while self.read(64 * 1024) {
            any = true;
            self.unparsed.clear();
        }
        any
    }

    /// The next whole frame of those that were read, after the upgrade: its opcode and payload.
    pub fn next_frame(&mut self) -> Option<(u8, Vec<u8>)> {
        if !self.upgraded {
            let end = self.unparsed.windows(4).position(|four| four == b"\r\n\r\n")?;
            assert!(self.unparsed.starts_with(b"HTTP/1.1 101"), "{}", self.unparsed.escape_ascii());
            self.unparsed.drain(..end + 4);
            self.upgraded = true;
        }
        take_frame(&mut self.unparsed)
    }
}
