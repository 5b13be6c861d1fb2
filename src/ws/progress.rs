//! How far a connection has got in a channel.

use crate::feed::{Cursor, Feed, Reader};
use crate::protocol::event::{Entry, EventId, Kind};
use crate::ws::writer::Tally;

/// The position of a connection in a channel and in its feed.
#[derive(Debug, Default)]
pub struct Progress {
    /// The last event that the client has, or that is not for it.
    position: EventId,
    /// The entry of the feed to write next, and how many of its bytes are written: a [`Cursor`], in
    /// two fields, which leave room for `caught_up`.
    entry: u64,
    offset: u32,
    /// The last flush wrote everything, and the socket has not been full since.
    caught_up: bool,
    /// Events without id before this entry were published before the client joined. They are never
    /// replayed.
    live_from: u64,
}

impl Progress {
    /// The progress of a client with everything up to `position`, for which `cursor` is next.
    pub fn new(feed: &Feed, cursor: Cursor, position: EventId) -> Progress {
        let Cursor { entry, offset } = cursor;
        Progress { position, entry, offset, caught_up: false, live_from: feed.end() }
    }

    pub fn position(&self) -> EventId {
        self.position
    }

    pub fn cursor(&self) -> Cursor {
        Cursor { entry: self.entry, offset: self.offset }
    }

    fn set_cursor(&mut self, cursor: Cursor) {
        Cursor { entry: self.entry, offset: self.offset } = cursor;
    }

    pub(super) fn reader<'a>(&self, user: &'a str) -> Reader<'a> {
        Reader { user, live_from: self.live_from }
    }

    /// Whether the socket has a part of a frame of the feed.
    pub fn is_inside_frame(&self, feed: &Feed) -> bool {
        self.offset > 0 && feed.get(self.entry).is_some_and(|entry| !entry.is_boundary(self.offset))
    }

    /// The entry in which the socket has a part of a frame.
    pub(super) fn entry_inside<'f>(&self, feed: &'f Feed) -> Option<&'f Entry> {
        feed.get(self.entry).filter(|entry| self.offset > 0 && !entry.is_boundary(self.offset))
    }

    /// The position to send in a frame that is enqueued now. Entries for other users don't hold it
    /// back.
    pub fn shown_position(&mut self, feed: &Feed, user: &str) -> EventId {
        match self.entry_inside(feed) {
            // The rest of the partly written frame is written first.
            Some(entry) => position_at(entry, entry.frame_end(self.offset)),
            None => {
                self.skip_others(feed, user);
                self.position
            }
        }
    }

    /// Moves the cursor over entries for other users, so that a position that was sent never goes
    /// back.
    fn skip_others(&mut self, feed: &Feed, user: &str) {
        if !self.has_all(feed, user) {
            return;
        }
        let next = feed.next_for(self.entry, self.reader(user)).unwrap_or(feed.end());
        if next > self.entry {
            self.set_cursor(Cursor { entry: next, offset: 0 });
            self.position = feed.position_before(next);
        }
    }

    /// Whether the feed has evicted no entry for the client that it has not got.
    fn has_all(&self, feed: &Feed, user: &str) -> bool {
        self.caught_up && feed.holds_all_from(self.entry, user)
    }

    /// Prepares for writing from the feed. `false` if the feed no longer holds what is next: it
    /// must be read from history.
    pub(super) fn enter_feed(&mut self, feed: &Feed, user: &str, tally: &mut Tally) -> bool {
        if self.entry >= feed.start() {
            return true;
        }
        self.count_pubsub_miss(feed, tally);
        // The tail of a partly written frame is in the outbox since its entry was evicted.
        if self.position < feed.before() && !self.has_all(feed, user) {
            self.caught_up = false;
            return false;
        }
        self.set_cursor(Cursor { entry: feed.start(), offset: 0 });
        self.position = self.position.max(feed.before());
        true
    }

    /// Notes whether everything of the feed was written.
    pub(super) fn leave_feed(&mut self, feed: &Feed, wrote_all: bool) {
        self.caught_up = wrote_all;
        if wrote_all {
            self.set_cursor(Cursor { entry: feed.end(), offset: 0 });
            self.position = feed.position();
        }
    }

    /// Starts to write from a page of history, at `cursor`.
    pub(super) fn enter_page(&mut self, cursor: Cursor) {
        self.set_cursor(cursor);
        self.caught_up = false;
    }

    /// Forgets the cursor, which was one of the page.
    pub(super) fn leave_page(&mut self, page: &Feed, wrote_all: bool) {
        if wrote_all {
            self.position = page.position();
        }
        self.set_cursor(Cursor::default());
    }

    /// Ends the reading of history: `cursor` is next in the feed, where the position is.
    pub fn leave_history(&mut self, feed: &Feed, cursor: Cursor, tally: &mut Tally) {
        self.count_pubsub_miss(feed, tally);
        self.set_cursor(cursor);
    }

    /// Notes that a fan-out was not written, since another channel has filled the socket.
    pub fn mark_behind(&mut self) {
        self.caught_up = false;
    }

    /// Counts, once, that events without id were evicted which the client has not got. They are in
    /// no history.
    fn count_pubsub_miss(&mut self, feed: &Feed, tally: &mut Tally) {
        if feed.has_evicted_without_id(self.entry.max(self.live_from)) {
            tally.pubsub_misses += 1;
            self.live_from = feed.start();
        }
    }

    /// Moves the cursor to the end of the frame in which it is.
    pub(super) fn finish_frame(&mut self, entry: &Entry, tally: &mut Tally) {
        tally.deliveries += 1;
        let end = entry.frame_end(self.offset);
        self.position = position_at(entry, end);
        self.move_to(self.entry, end, entry);
    }

    /// Moves the cursor over `written` bytes of these entries.
    pub(super) fn advance(&mut self, feed: &Feed, numbers: &[u64], mut written: usize, tally: &mut Tally) {
        for number in numbers {
            if written == 0 {
                break;
            }
            let entry = feed.get(*number).expect("it was held when it was written");
            let start = self.offset_in(*number);
            let part = written.min(entry.bytes.len() - start as usize);
            written -= part;
            let offset = start + part as u32;
            let frames = entry.frames_until(offset);
            let before = if start == 0 { 0 } else { entry.frames_until(start) };
            match entry.kind {
                Kind::Reset => tally.resets += (frames - before) as u64,
                _ => tally.deliveries += (frames - before) as u64,
            }
            if offset as usize == entry.bytes.len() {
                self.position = entry.last;
            } else if frames > 0 {
                self.position = EventId(entry.before().0 + frames as u64);
            }
            self.move_to(*number, offset, entry);
        }
    }

    /// How many bytes of the entry with this number are written.
    pub(super) fn offset_in(&self, number: u64) -> u32 {
        if number == self.entry { self.offset } else { 0 }
    }

    fn move_to(&mut self, number: u64, offset: u32, entry: &Entry) {
        let is_end = offset as usize == entry.bytes.len();
        (self.entry, self.offset) = if is_end { (number + 1, 0) } else { (number, offset) };
    }
}

/// The position of a client that has everything of this entry before `end`, where a frame ends.
fn position_at(entry: &Entry, end: u32) -> EventId {
    EventId(entry.before().0 + entry.frames_until(end) as u64).min(entry.last)
}
