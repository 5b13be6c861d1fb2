//! Writing to a connection: its outbox, then entries of the feed or of a page of history.

use std::io::{self, IoSlice, Write};

use super::connection::{Connection, State};
use super::outbox::{Outbox, SharedTails};
use super::replay::Replay;
use crate::feed::{Cursor, Feed, Lookup, Reader};
use crate::protocol::event::{Entry, EventId, Kind};

/// Most entries in one vectored write. More would not make a write cheaper, only the stack larger.
const SLICES: usize = 64;

/// Most bytes that one connection writes before others get their turn.
pub const BURST: usize = 256 * 1024;

/// What came of writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flushed {
    /// All that there is was written.
    All,
    /// The socket is full.
    Blocked,
    /// There is more, and others come first.
    More,
    /// The feed no longer holds what comes next.
    Behind,
    /// A reset comes next, and this client has no frame for it.
    Missed,
    /// The socket is dead.
    Dead,
}

/// What reading and writing count.
#[derive(Debug, Default)]
pub struct Tally {
    /// Calls of write.
    pub writes: u64,
    /// Bytes taken from sockets.
    pub received: u64,
    /// Events handed to sockets.
    pub deliveries: u64,
    /// Bytes handed to sockets.
    pub bytes: u64,
    /// Reset frames written.
    pub resets: u64,
    /// Times a connection missed events without id.
    pub pubsub_misses: u64,
    /// Bytes of frames that are kept for full sockets after their entries were evicted.
    pub kept: u64,
}

impl Connection {
    /// Has it stand at `cursor`, with everything up to `position`.
    pub fn start_live(&mut self, feed: &Feed, cursor: Cursor, position: EventId) {
        self.state = State::Live;
        self.cursor = cursor;
        self.position = position;
        self.live_from = feed.end();
        self.current = false;
    }

    /// Has it read what follows `position` from history.
    pub fn start_replay(&mut self, feed: &Feed, position: EventId) {
        self.state = State::Replay(Replay::default());
        self.cursor = Cursor::default();
        self.position = position;
        self.live_from = feed.end();
        self.current = false;
    }

    /// The position to send in a frame that is enqueued now. Entries for other users do not hold it back.
    pub fn shown_position(&mut self, feed: &Feed) -> EventId {
        if !matches!(self.state, State::Live) {
            return self.position;
        }
        if self.is_inside_frame(feed) {
            // The rest of the frame that is partly written comes first.
            let entry = feed.get(self.cursor.entry).expect("a cursor inside a frame is inside an entry");
            return position_at(entry, entry.frame_end(self.cursor.offset));
        }
        self.skip_others(feed);
        self.position
    }

    /// Moves the cursor over entries for other users, so that a position that was sent never goes back.
    fn skip_others(&mut self, feed: &Feed) {
        if !self.current || !feed.holds_all_from(self.cursor.entry, &self.user) {
            return;
        }
        let next = feed.next_for(self.cursor.entry, self.reader()).unwrap_or(feed.end());
        if next > self.cursor.entry {
            self.cursor = Cursor { entry: next, offset: 0 };
            self.position = feed.position_before(next);
        }
    }

    fn reader(&self) -> Reader<'_> {
        Reader { user: &self.user, live_from: self.live_from }
    }

    /// Whether its socket has part of a frame of the feed.
    pub fn is_inside_frame(&self, feed: &Feed) -> bool {
        self.cursor.offset > 0
            && feed.get(self.cursor.entry).is_some_and(|entry| !entry.is_boundary(self.cursor.offset))
    }

    /// The feed lets go of the entry it stands in: keeps the rest of the frame whose begin the socket has.
    pub fn keep_tail(&mut self, entry: &Entry, tails: &mut SharedTails, tally: &mut Tally) {
        tally.deliveries += 1;
        let end = entry.frame_end(self.cursor.offset);
        let (frame, left) = tails.tail(entry, self.cursor, tally);
        if self.queued() == 0 {
            self.outbox = Outbox::Tail { frame, left };
        } else {
            let queue = self.outbox_mut();
            queue.bytes += left as usize;
            queue.frames.push_front(frame.slice(frame.len() - left as usize..));
            queue.tail_of = Some(frame);
        }
        self.position = position_at(entry, end);
        let whole = end as usize == entry.bytes.len();
        self.cursor = if whole {
            Cursor { entry: self.cursor.entry + 1, offset: 0 }
        } else {
            Cursor { offset: end, ..self.cursor }
        };
    }

    /// Counts, once, that the feed has removed events without id which came while it was connected and which it has not
    /// got. They are in no history.
    pub fn count_bare_miss(&mut self, feed: &Feed, tally: &mut Tally) {
        if feed.has_evicted_plain(self.cursor.entry.max(self.live_from)) {
            tally.pubsub_misses += 1;
            self.live_from = feed.start();
        }
    }

    /// Writes what its channel has for it, from its cursor to the feed's end, and what waits for it alone.
    pub fn flush(&mut self, feed: &Feed, tally: &mut Tally) -> Flushed {
        if self.cursor.entry < feed.start() {
            self.count_bare_miss(feed, tally);
            // What it had begun to write was kept whole when the feed let go of it.
            let held = self.current && feed.holds_all_from(self.cursor.entry, &self.user);
            if self.position < feed.before() && !held {
                self.current = false;
                return match self.flush_queue(tally) {
                    Flushed::All => Flushed::Behind,
                    other => other,
                };
            }
            self.cursor = Cursor { entry: feed.start(), offset: 0 };
            self.position = self.position.max(feed.before());
        }
        let flushed = self.write_from(feed, tally);
        self.current = flushed == Flushed::All;
        if self.current {
            self.cursor = Cursor { entry: feed.end(), offset: 0 };
            self.position = feed.position();
        }
        flushed
    }

    /// Writes what a page of history has for it. The page may go afterwards: a frame whose begin the socket has
    /// is kept whole.
    pub fn flush_page(&mut self, page: &Feed, tails: &mut SharedTails, tally: &mut Tally) -> Flushed {
        let Lookup::Found(cursor) = page.find(self.position) else { return Flushed::Behind };
        self.cursor = cursor;
        self.current = false;
        let flushed = self.write_from(page, tally);
        match flushed {
            Flushed::All => self.position = page.position(),
            _ if self.is_inside_frame(page) => {
                let entry = page.get(self.cursor.entry).expect("a cursor inside a frame is inside an entry");
                self.keep_tail(entry, tails, tally);
            }
            _ => {}
        }
        self.cursor = Cursor::default(); // it was the page's
        flushed
    }

    /// Writes what waits for it alone.
    pub fn flush_queue(&mut self, tally: &mut Tally) -> Flushed {
        let nothing = Feed::new(EventId(0), EventId(0));
        let cursor = std::mem::take(&mut self.cursor);
        let flushed = self.write_from(&nothing, tally);
        self.cursor = cursor;
        flushed
    }

    fn write_from(&mut self, feed: &Feed, tally: &mut Tally) -> Flushed {
        if self.blocked {
            return Flushed::Blocked;
        }
        if let Some(flushed) = self.write_one(feed, tally) {
            return flushed;
        }
        let mut burst = 0;
        loop {
            // Frames for this client alone go between two frames of the feed, never into one.
            let inside = self.queued() > 0 && self.is_inside_frame(feed);
            let mut numbers = [0u64; SLICES];
            let mut slices = [IoSlice::new(&[]); SLICES];
            let mut count = 0;
            let mut queued = 0;
            let mut size = 0;
            let mut missed = false;
            match &self.outbox {
                Outbox::Tail { frame, left } if !inside => {
                    slices[0] = IoSlice::new(&frame[frame.len() - *left as usize..]);
                    size = *left as usize;
                    queued = 1;
                }
                Outbox::Frames(queue) if !inside => {
                    // All of them are written before any event: the positions in welcome, reset and ping hold only
                    // at their place in the stream.
                    for frame in queue.frames.iter().take(SLICES) {
                        slices[queued] = IoSlice::new(frame);
                        size += frame.len();
                        queued += 1;
                    }
                }
                _ => {}
            }
            let mut next = self.cursor.entry;
            while queued + count < SLICES && size < BURST {
                let Some(number) = feed.next_for(next, self.reader()) else { break };
                let entry = feed.get(number).expect("next_for names entries that are held");
                if entry.kind == Kind::Reset && !self.wants_recovery {
                    missed = true;
                    break;
                }
                let begin = if number == self.cursor.entry { self.cursor.offset as usize } else { 0 };
                let end =
                    if inside { entry.frame_end(self.cursor.offset) as usize } else { entry.bytes.len() };
                slices[queued + count] = IoSlice::new(&entry.bytes[begin..end]);
                numbers[count] = number;
                size += end - begin;
                count += 1;
                next = number + 1;
                if inside {
                    break;
                }
            }
            if size == 0 {
                return if missed { Flushed::Missed } else { Flushed::All };
            }
            tally.writes += 1;
            let written = match &slices[..queued + count] {
                [one] => self.stream.write(one),
                many => self.stream.write_vectored(many),
            };
            let written = match written {
                Ok(written) => written,
                Err(error) => match self.not_written(&error) {
                    Some(flushed) => return flushed,
                    None => continue,
                },
            };
            self.count_written(written, tally);
            let rest = self.take_queued(written, queued);
            self.advance(feed, &numbers[..count], rest, tally);
            if written < size {
                // A short write says that the socket is full; writable comes when it has room again.
                self.blocked = true;
                return Flushed::Blocked;
            }
            burst += written;
            if burst >= BURST {
                return Flushed::More;
            }
        }
    }

    /// The common case, live: one entry lies ahead and nothing waits for this client alone. `None`: it is another.
    fn write_one(&mut self, feed: &Feed, tally: &mut Tally) -> Option<Flushed> {
        if !matches!(self.outbox, Outbox::Nothing) || self.cursor.offset > 0 {
            return None;
        }
        let Some(number) = feed.next_for(self.cursor.entry, self.reader()) else { return Some(Flushed::All) };
        if number + 1 != feed.end() {
            return None;
        }
        let entry = feed.get(number).filter(|entry| entry.kind != Kind::Reset)?;
        tally.writes += 1;
        match self.stream.write(&entry.bytes) {
            Ok(written) => {
                self.count_written(written, tally);
                if written == entry.bytes.len() {
                    tally.deliveries += entry.frames() as u64;
                    return Some(Flushed::All); // the caller puts the cursor at the end
                }
                self.advance(feed, &[number], written, tally);
                self.blocked = true;
                Some(Flushed::Blocked)
            }
            Err(error) => self.not_written(&error),
        }
    }

    /// What an error of a write means; `None`: it is to be tried again.
    fn not_written(&mut self, error: &io::Error) -> Option<Flushed> {
        match error.kind() {
            io::ErrorKind::Interrupted => None,
            io::ErrorKind::WouldBlock => {
                self.blocked = true;
                Some(Flushed::Blocked)
            }
            _ => Some(Flushed::Dead),
        }
    }

    /// Takes what was written of the first `frames` that wait; the rest was written from the feed.
    fn take_queued(&mut self, mut written: usize, frames: usize) -> usize {
        if frames == 0 {
            return written;
        }
        let left = match &mut self.outbox {
            Outbox::Nothing => 0,
            Outbox::Tail { left, .. } => {
                let part = written.min(*left as usize);
                written -= part;
                *left -= part as u32;
                *left as usize
            }
            Outbox::Frames(queue) => {
                for _ in 0..frames {
                    let front = &mut queue.frames[0];
                    let part = written.min(front.len());
                    written -= part;
                    queue.bytes -= part;
                    if part < front.len() {
                        *front = front.slice(part..);
                        break;
                    }
                    queue.frames.pop_front();
                    queue.tail_of = None;
                }
                queue.frames.len()
            }
        };
        if left == 0 {
            self.outbox = Outbox::Nothing;
        }
        written
    }

    /// Moves the cursor over what was written of these entries.
    fn advance(&mut self, feed: &Feed, numbers: &[u64], mut written: usize, tally: &mut Tally) {
        for number in numbers {
            if written == 0 {
                break;
            }
            let entry = feed.get(*number).expect("it was held when it was written");
            let begin = if *number == self.cursor.entry { self.cursor.offset } else { 0 };
            let part = written.min(entry.bytes.len() - begin as usize);
            written -= part;
            let offset = begin + part as u32;
            let frames = entry.frames_until(offset);
            let before = if begin == 0 { 0 } else { entry.frames_until(begin) };
            match entry.kind {
                Kind::Reset => tally.resets += (frames - before) as u64,
                _ => tally.deliveries += (frames - before) as u64,
            }
            if offset as usize == entry.bytes.len() {
                self.cursor = Cursor { entry: number + 1, offset: 0 };
                self.position = entry.last;
            } else {
                self.cursor = Cursor { entry: *number, offset };
                if frames > 0 {
                    self.position = EventId(entry.before().0 + frames as u64);
                }
            }
        }
    }
}

/// The position of a client that has everything of this entry up to here, where a frame ends.
fn position_at(entry: &Entry, end: u32) -> EventId {
    EventId(entry.before().0 + entry.frames_until(end) as u64).min(entry.last)
}
