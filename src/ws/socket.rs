//! The socket of a connection, and whether it takes more bytes.

use std::io::{self, IoSlice, Read, Write};
use std::net::Shutdown;

use mio::net::TcpStream;

use super::writer::{Flushed, Tally};

#[derive(Debug)]
pub struct Socket {
    stream: TcpStream,
    /// The send buffer was full at the last write.
    is_blocked: bool,
    /// epoll reports when there is room again.
    is_write_registered: bool,
    /// The connection is on the shard's list of those with more to write.
    is_queued: bool,
    /// It carries more than a default channel: the shard keeps a [`ChannelSet`] for it.
    ///
    /// [`ChannelSet`]: super::subscription::ChannelSet
    pub carries_set: bool,
}

impl Socket {
    pub fn new(stream: TcpStream) -> Socket {
        Socket { stream, is_blocked: false, is_write_registered: false, is_queued: false, carries_set: false }
    }

    pub fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// For registering it.
    pub fn stream_mut(&mut self) -> &mut TcpStream {
        &mut self.stream
    }

    /// Whether the send buffer is full. Nothing is written until [`Socket::unblock`].
    pub fn is_blocked(&self) -> bool {
        self.is_blocked
    }

    pub fn unblock(&mut self) {
        self.is_blocked = false;
    }

    /// Records the registration for writability. Returns whether it is new.
    pub fn register_write(&mut self) -> bool {
        !std::mem::replace(&mut self.is_write_registered, true)
    }

    /// Notes that the connection is on the shard's list. Returns whether it was not before.
    pub fn enter_queue(&mut self) -> bool {
        !std::mem::replace(&mut self.is_queued, true)
    }

    pub fn leave_queue(&mut self) {
        self.is_queued = false;
    }

    /// Reads into `buffer`. `None` if there is nothing to read, 0 at the end of the stream.
    pub fn read(&mut self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            match self.stream.read(buffer) {
                Ok(length) => return Ok(Some(length)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Writes these slices, which have `bytes` bytes. Returns how many were written; fewer if the
    /// socket is full, which blocks it: epoll reports when there is room again.
    #[inline]
    pub(super) fn write(
        &mut self,
        slices: &[IoSlice<'_>],
        bytes: usize,
        tally: &mut Tally,
    ) -> Result<usize, Flushed> {
        loop {
            tally.writes += 1;
            let written = match slices {
                [one] => self.stream.write(one),
                many => self.stream.write_vectored(many),
            };
            match written {
                Ok(written) => {
                    tally.bytes += written as u64;
                    self.is_blocked = written < bytes;
                    return Ok(written);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.is_blocked = true;
                    return Err(Flushed::Blocked);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Err(Flushed::Dead),
            }
        }
    }

    /// Closes the write side. `false` if the socket is dead.
    pub(super) fn shutdown(&self) -> bool {
        self.stream.shutdown(Shutdown::Write).is_ok()
    }
}
