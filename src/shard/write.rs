//! Writing to a connection: from the feed while it is live, from pages of history while it replays.

use super::Shard;
use crate::feed::{Cursor, Lookup};
use crate::protocol::event::Entry;
use crate::ws::connection::State;
use crate::ws::replay::PageState;
use crate::ws::writer::{BURST, Flushed};

/// What follows one step of writing.
enum Step {
    /// Another step, in the state that the connection has now.
    Next,
    /// The end of this turn's writing, with this result.
    Done(Flushed),
    /// Nothing until an answer, a tick or an event of the socket.
    Wait,
}

impl Shard {
    /// Writes to a socket that was full. If it takes anything, the peer has read something, which
    /// shows that it is alive.
    pub(super) fn retry_write(&mut self, slot: u32) {
        let connection = &mut self.connections[slot];
        connection.socket.unblock();
        if connection.is_open() {
            self.channels[connection.membership.channel]
                .forget_partly_written(connection.cursor().entry, slot);
        }
        let before = self.tally.bytes;
        self.flush(slot);
        if self.tally.bytes > before {
            self.connections[slot].liveness.record_activity(self.tick);
        }
    }

    /// Writes what there is for a connection, as much as one turn allows.
    pub(super) fn flush(&mut self, slot: u32) {
        let start = self.tally.bytes;
        loop {
            let step = match self.connections[slot].state {
                State::Live => self.write_events(slot),
                State::Replay(_) => self.write_history(slot, start),
                State::Missed => Step::Done(self.connections[slot].flush_queue(&mut self.tally)),
                State::Closing { .. } => {
                    if !self.connections[slot].finish(None, &mut self.tally) {
                        self.connections.discard(slot);
                    }
                    return;
                }
                State::Request(_) | State::Joining(_) | State::Discarded => return,
            };
            match step {
                Step::Next => {}
                Step::Done(flushed) => return self.after_flush(slot, flushed),
                Step::Wait => return,
            }
        }
    }

    fn after_flush(&mut self, slot: u32, flushed: Flushed) {
        match flushed {
            Flushed::Blocked => self.register_writable(slot),
            Flushed::All | Flushed::Behind => self.resume_reading(slot),
            Flushed::More => self.write_later(slot),
            Flushed::Missed => {
                self.mark_missed(slot);
            }
            Flushed::Dead => self.abort(slot),
        }
    }

    /// Writes what the feed has for a live connection.
    fn write_events(&mut self, slot: u32) -> Step {
        let connection = &mut self.connections[slot];
        let channel = &mut self.channels[connection.membership.channel];
        let feed = channel.feed();
        match connection.flush(feed, &mut self.tally) {
            Flushed::Behind => {
                connection.start_replay(feed, connection.position());
                Step::Next
            }
            Flushed::Blocked if connection.is_inside_frame(feed) => {
                channel.note_partly_written(connection.cursor().entry, slot);
                Step::Done(Flushed::Blocked)
            }
            flushed => Step::Done(flushed),
        }
    }

    /// Writes one page of history to a connection that the feed has left behind. `start` is the
    /// number of bytes that the shard had written when this turn's writing to the connection
    /// started.
    fn write_history(&mut self, slot: u32, start: u64) -> Step {
        let connection = &mut self.connections[slot];
        let State::Replay(replay) = &mut connection.state else { return Step::Wait };
        let page = replay.take_page();
        if connection.socket.is_blocked() {
            return Step::Wait;
        }
        // Nothing is read for a socket that has yet to take the rest of a frame, or frames of its
        // own.
        if page == PageState::Awaited || connection.queued() > 0 {
            let before = self.tally.bytes;
            let flushed = connection.flush_queue(&mut self.tally);
            connection.count_replayed(self.tally.bytes - before, self.tick);
            if page == PageState::Awaited || flushed != Flushed::All {
                return Step::Done(flushed);
            }
            self.resume_reading(slot);
        }
        if self.tally.bytes - start >= BURST as u64 {
            return Step::Done(Flushed::More);
        }
        let connection = &mut self.connections[slot];
        let channel = &self.channels[connection.membership.channel];
        match channel.feed().find(connection.position()) {
            Lookup::Found(cursor) => {
                connection.end_replay(channel.feed(), cursor, &mut self.tally);
                return Step::Next;
            }
            Lookup::Discontinuous => return self.send_reset(slot),
            // Never, since pages are cut at the feed's position. A reconnect would set the position
            // right.
            Lookup::Ahead => return self.mark_missed(slot),
            Lookup::Evicted => {}
        }
        if !connection.may_replay(self.tick) {
            self.throttle(slot);
            return Step::Wait;
        }
        let Some(found) = self.replay.pages.find(channel.id, connection.position(), self.tick) else {
            if page == PageState::Arrived {
                self.retry_page_later(slot);
            } else {
                let (position, bytes) = (connection.position(), connection.next_page_bytes());
                self.request_page(slot, position, bytes);
            }
            return Step::Wait;
        };
        if !found.proves(connection.position()) {
            return self.send_reset(slot);
        }
        let before = self.tally.bytes;
        let flushed = connection.flush_page(&found.feed, &mut found.tails, &mut self.tally);
        connection.count_replayed(self.tally.bytes - before, self.tick);
        if flushed == Flushed::All { Step::Next } else { Step::Done(flushed) }
    }

    /// Sends a reset, since events may be missing for the client, and continues from the oldest
    /// entry in memory.
    fn send_reset(&mut self, slot: u32) -> Step {
        let connection = &mut self.connections[slot];
        if !connection.client.wants_recovery {
            return self.mark_missed(slot);
        }
        let feed = self.channels[connection.membership.channel].feed();
        let position = feed.before().max(feed.base());
        let cursor = match feed.find(position) {
            Lookup::Found(cursor) => cursor,
            _ => Cursor { entry: feed.end(), offset: 0 },
        };
        connection.enqueue(Entry::reset(position).bytes);
        connection.start_live(feed, cursor, position);
        self.tally.resets += 1;
        Step::Next
    }

    /// Queues a connection to be closed, since it missed events and gets no recovery frames.
    fn mark_missed(&mut self, slot: u32) -> Step {
        self.tally.resets += 1;
        self.connections[slot].state = State::Missed;
        self.deferred.missed.push_back(self.connections.id(slot));
        Step::Wait
    }
}
