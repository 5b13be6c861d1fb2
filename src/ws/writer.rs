//! Writing to a connection: its outbox, then entries of the feed or of a page of history. Live,
//! slow and resuming connections take this path.

use std::io::IoSlice;

use super::client::Client;
use super::liveness::Liveness;
use super::outbox::{Outbox, SharedTails};
use super::progress::Progress;
use super::socket::Socket;
use crate::feed::{Feed, Lookup};
use crate::protocol::event::{Entry, Kind};

/// Most slices in one vectored write. More would not make a write cheaper, only the stack larger.
const SLICES: usize = 64;

/// Most bytes that one connection writes before others get their turn.
pub const BURST: usize = 256 * 1024;

/// The result of writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flushed {
    /// Everything was written.
    All,
    /// The socket is full.
    Blocked,
    /// There is more, after other connections had their turn.
    More,
    /// The feed no longer holds what is next.
    Behind,
    /// A reset is next, and the client gets no recovery frames.
    Missed,
    /// The socket is dead.
    Dead,
}

/// Counts of reading and writing.
#[derive(Debug, Default)]
pub struct Tally {
    /// Calls of write.
    pub writes: u64,
    /// Bytes read from sockets.
    pub received: u64,
    /// Events of which the last byte was written.
    pub deliveries: u64,
    /// Bytes written.
    pub bytes: u64,
    /// Reset frames written, and connections closed instead.
    pub resets: u64,
    /// Times a connection missed events without id.
    pub pubsub_misses: u64,
    /// Bytes of frames that are kept for full sockets after their entries were evicted.
    pub kept: u64,
}

/// One vectored write: frames of the outbox, then entries of the feed.
struct WriteBatch {
    frames: usize,
    entries: usize,
    /// The numbers of the entries.
    numbers: [u64; SLICES],
    bytes: usize,
    /// A reset is next, and the client gets no recovery frames.
    missed: bool,
}

impl WriteBatch {
    fn new() -> WriteBatch {
        WriteBatch { frames: 0, entries: 0, numbers: [0; SLICES], bytes: 0, missed: false }
    }

    /// Fills the slices. The frames of the outbox come before any entry, since the positions in
    /// welcomes, resets and pings hold only at their place in the stream; but a partly written
    /// frame of the feed is completed first.
    fn build<'a>(
        &mut self,
        slices: &mut [IoSlice<'a>; SLICES],
        outbox: &'a Outbox,
        feed: Option<&'a Feed>,
        progress: &Progress,
        client: &Client,
        budget: usize,
    ) {
        let is_inside = !outbox.is_empty() && feed.is_some_and(|feed| progress.is_inside_frame(feed));
        if !is_inside {
            (self.frames, self.bytes) = outbox.fill(slices);
        }
        let Some(feed) = feed else { return };
        let reader = progress.reader(&client.user);
        let mut next = progress.cursor().entry;
        while self.len() < SLICES && self.bytes < budget {
            let Some(number) = feed.next_for(next, reader) else { break };
            let entry = feed.get(number).expect("next_for returns entries that are held");
            if entry.kind == Kind::Reset && !client.wants_recovery() {
                self.missed = true;
                break;
            }
            let start = progress.offset_in(number);
            let end = if is_inside { entry.frame_end(start) as usize } else { entry.bytes.len() };
            let bytes = &entry.bytes[start as usize..end];
            slices[self.len()] = IoSlice::new(bytes);
            self.numbers[self.entries] = number;
            self.entries += 1;
            self.bytes += bytes.len();
            next = number + 1;
            if is_inside {
                break;
            }
        }
    }

    /// Slices in use.
    fn len(&self) -> usize {
        self.frames + self.entries
    }

    /// Removes what was written from the outbox, and moves the progress over the rest.
    fn commit(
        &self,
        written: usize,
        outbox: &mut Outbox,
        feed: Option<&Feed>,
        progress: &mut Progress,
        tally: &mut Tally,
    ) {
        let rest = outbox.consume(written, self.frames);
        if let Some(feed) = feed {
            progress.advance(feed, &self.numbers[..self.entries], rest, tally);
        }
    }
}

/// What writing needs of a connection, beside its progress in one of its channels.
#[derive(Debug)]
pub struct Sink<'c> {
    pub(super) socket: &'c mut Socket,
    pub(super) outbox: &'c mut Outbox,
    pub(super) liveness: &'c mut Liveness,
    pub(super) client: &'c Client,
}

impl Sink<'_> {
    /// The user of the connection.
    pub fn user(&self) -> &str {
        &self.client.user
    }

    /// Writes the outbox, and the feed of a channel from its cursor to the end, at most about
    /// `budget` bytes.
    pub fn flush(
        &mut self,
        progress: &mut Progress,
        feed: &Feed,
        budget: usize,
        tally: &mut Tally,
    ) -> Flushed {
        if !progress.enter_feed(feed, &self.client.user, tally) {
            return match self.flush_queue(progress, tally) {
                Flushed::All => Flushed::Behind,
                other => other,
            };
        }
        let flushed = self.write_from(progress, feed, budget, tally);
        progress.leave_feed(feed, flushed == Flushed::All);
        flushed
    }

    /// Writes the outbox, and a page of history from the position to the end. The page may be
    /// dropped afterwards: the tail of a partly written frame is kept in the outbox.
    pub fn flush_page(
        &mut self,
        progress: &mut Progress,
        page: &Feed,
        tails: &mut SharedTails,
        budget: usize,
        tally: &mut Tally,
    ) -> Flushed {
        let Lookup::Found(cursor) = page.find(progress.position()) else { return Flushed::Behind };
        progress.enter_page(cursor);
        let flushed = self.write_from(progress, page, budget, tally);
        self.keep_frame(progress, page, tails, tally);
        progress.leave_page(page, flushed == Flushed::All);
        flushed
    }

    /// Writes the outbox alone.
    pub fn flush_queue(&mut self, progress: &mut Progress, tally: &mut Tally) -> Flushed {
        self.write_batches(progress, None, BURST, tally)
    }

    fn write_from(
        &mut self,
        progress: &mut Progress,
        feed: &Feed,
        budget: usize,
        tally: &mut Tally,
    ) -> Flushed {
        if self.socket.is_blocked() {
            return Flushed::Blocked;
        }
        self.write_single(progress, feed, tally)
            .unwrap_or_else(|| self.write_batches(progress, Some(feed), budget, tally))
    }

    /// The common case, live: one entry is next, and the outbox is empty. `None` in all other
    /// cases.
    #[inline]
    fn write_single(&mut self, progress: &mut Progress, feed: &Feed, tally: &mut Tally) -> Option<Flushed> {
        let cursor = progress.cursor();
        if !self.outbox.is_empty() || cursor.offset > 0 {
            return None;
        }
        let reader = progress.reader(&self.client.user);
        let Some(number) = feed.next_for(cursor.entry, reader) else { return Some(Flushed::All) };
        if number + 1 != feed.end() {
            return None;
        }
        let entry = feed.get(number).filter(|entry| entry.kind != Kind::Reset)?;
        let written = match self.socket.write(&[IoSlice::new(&entry.bytes)], entry.bytes.len(), tally) {
            Ok(written) => written,
            Err(flushed) => return Some(flushed),
        };
        self.liveness.count_written(written);
        if written == entry.bytes.len() {
            tally.deliveries += entry.frames() as u64;
            return Some(Flushed::All); // the caller moves the cursor to the end
        }
        progress.advance(feed, &[number], written, tally);
        Some(Flushed::Blocked)
    }

    fn write_batches(
        &mut self,
        progress: &mut Progress,
        feed: Option<&Feed>,
        budget: usize,
        tally: &mut Tally,
    ) -> Flushed {
        if self.socket.is_blocked() {
            return Flushed::Blocked;
        }
        let mut left = budget;
        loop {
            let mut slices = [IoSlice::new(&[]); SLICES];
            let mut batch = WriteBatch::new();
            batch.build(&mut slices, self.outbox, feed, progress, self.client, left);
            if batch.bytes == 0 {
                return if batch.missed { Flushed::Missed } else { Flushed::All };
            }
            let written = match self.socket.write(&slices[..batch.len()], batch.bytes, tally) {
                Ok(written) => written,
                Err(flushed) => return flushed,
            };
            self.liveness.count_written(written);
            batch.commit(written, self.outbox, feed, progress, tally);
            if self.socket.is_blocked() {
                return Flushed::Blocked;
            }
            left = left.saturating_sub(written);
            if left == 0 {
                return Flushed::More;
            }
        }
    }

    /// Keeps the tail of the frame of which the socket has a part, if there is one, before its
    /// entry is dropped.
    pub fn keep_frame(
        &mut self,
        progress: &mut Progress,
        feed: &Feed,
        tails: &mut SharedTails,
        tally: &mut Tally,
    ) {
        if let Some(entry) = progress.entry_inside(feed) {
            self.keep_tail(progress, entry, tails, tally);
        }
    }

    /// Keeps the tail of the frame of this entry of which the socket has a part. The entry was
    /// evicted.
    pub fn keep_tail(
        &mut self,
        progress: &mut Progress,
        entry: &Entry,
        tails: &mut SharedTails,
        tally: &mut Tally,
    ) {
        let (frame, left) = tails.tail(entry, progress.cursor(), tally);
        self.outbox.push_tail(frame, left);
        progress.finish_frame(entry, tally);
    }
}
