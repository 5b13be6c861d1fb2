//! Writing to a connection: from the feed while it is live, from pages of history while it replays.

use super::Shard;
use super::members::is_subscription;
use crate::feed::{Cursor, Lookup};
use crate::protocol::event::Entry;
use crate::protocol::form::{self, Form};
use crate::ws::connection::State;
use crate::ws::replay::PageState;
use crate::ws::subscription::Phase;
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

/// Most bytes that one of several channels of a connection writes before the others get their turn.
const CHANNEL_BURST: usize = 32 * 1024;

impl Shard {
    /// Writes to a socket that was full. If it takes anything, the peer has read something, which
    /// shows that it is alive.
    pub(super) fn retry_write(&mut self, slot: u32) {
        let connection = &mut self.connections[slot];
        connection.socket.unblock();
        if connection.is_member() {
            self.channels[connection.membership.channel]
                .forget_partly_written(connection.progress.cursor().entry, slot);
        }
        if let Some(number) = self.connections.set(slot).map(|set| set.current)
            && is_subscription(number)
            && self.connections.is_live(number)
        {
            let entry = self.connections.progress(number).cursor().entry;
            let key = self.connections.membership(number).channel;
            self.channels[key].forget_partly_written(entry, number);
        }
        let before = self.tally.bytes;
        self.flush_all(slot);
        if self.tally.bytes > before {
            self.connections[slot].liveness.record_activity(self.tick);
        }
    }

    /// Writes what there is for a member, as much as one turn allows.
    pub(super) fn flush(&mut self, number: u32) {
        let owner = self.connections.owner(number);
        let socket = &self.connections[owner].socket;
        let carries_set = socket.carries_set;
        if carries_set && socket.is_blocked() {
            if let Some(replay) = self.connections.replay_mut(number) {
                replay.take_page(); // it may be gone when the socket takes bytes again
            }
            return self.connections.progress_mut(number).mark_behind();
        }
        let budget = if carries_set { CHANNEL_BURST } else { BURST };
        let before = self.tally.bytes;
        let Some(flushed) = self.write(number, budget) else { return };
        if carries_set && flushed == Flushed::Blocked {
            let set = self.connections.set_mut(owner);
            (set.current, set.spent) = (number, (self.tally.bytes - before) as usize);
        }
        self.after_flush(owner, flushed);
    }

    /// Writes what there is for all channels of a connection. They take turns, each for a limited
    /// number of bytes, so that a busy one does not delay the others for long. A partly written
    /// frame is finished first.
    pub(super) fn flush_all(&mut self, slot: u32) {
        let Some(set) = self.connections.set(slot) else { return self.flush(slot) };
        let mut members = vec![slot];
        members.extend(&set.subscriptions);
        let first = members.iter().position(|number| *number == set.current).unwrap_or(0);
        members.rotate_left(first);
        let mut spent = set.spent;
        let mut next = members[0];
        let start = self.tally.bytes;
        let mut has_more = false;
        for (turn, number) in members.iter().copied().enumerate() {
            let before = self.tally.bytes;
            let flushed = self.write(number, CHANNEL_BURST.saturating_sub(spent).max(1));
            match flushed {
                Some(Flushed::Blocked) => {
                    let written = (self.tally.bytes - before) as usize;
                    let set = self.connections.set_mut(slot);
                    (set.current, set.spent) = (number, spent + written);
                    return self.register_writable(slot);
                }
                Some(Flushed::Dead) => return self.abort(slot),
                Some(Flushed::Missed) => drop(self.mark_missed(slot)),
                Some(Flushed::More) => has_more = true,
                Some(Flushed::All | Flushed::Behind) | None => {}
            }
            spent = 0;
            next = members[(turn + 1) % members.len()];
            if self.tally.bytes - start >= BURST as u64 {
                has_more = true; // other connections get their turn
                break;
            }
        }
        let set = self.connections.set_mut(slot);
        (set.current, set.spent) = (next, 0);
        self.resume_reading(slot);
        if has_more {
            self.write_later(slot);
        }
    }

    /// Writes what there is for a member, about `budget` bytes of events. `None`: nothing until an
    /// answer, a tick or an event of the socket.
    fn write(&mut self, number: u32, budget: usize) -> Option<Flushed> {
        let start = self.tally.bytes;
        loop {
            let left = budget.saturating_sub((self.tally.bytes - start) as usize).max(1);
            let step = if is_subscription(number) {
                match self.connections.subscription(number).phase.as_deref() {
                    None => self.write_events(number, left),
                    Some(Phase::Replay(_)) => self.write_history(number, start, budget),
                    Some(Phase::Joining(_)) => return None,
                }
            } else {
                match self.connections[number].state {
                    State::Live => self.write_events(number, left),
                    State::Replay(_) => self.write_history(number, start, budget),
                    State::WithoutChannel | State::Missed => {
                        Step::Done(self.connections[number].flush_queue(&mut self.tally))
                    }
                    State::Closing { .. } => {
                        if !self.connections[number].finish(None, &mut self.tally) {
                            self.connections.discard(number);
                        }
                        return None;
                    }
                    State::Request(_) | State::Joining(_) | State::Discarded => return None,
                }
            };
            match step {
                Step::Next => {}
                Step::Done(flushed) => return Some(flushed),
                Step::Wait => return None,
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

    /// Writes what the feed has for a live member.
    fn write_events(&mut self, number: u32, budget: usize) -> Step {
        let channel = &mut self.channels[self.connections.membership(number).channel];
        let (mut sink, progress) = self.connections.writer(number);
        let feed = channel.feed();
        match sink.flush(progress, feed, budget, &mut self.tally) {
            Flushed::Behind => {
                let position = progress.position();
                self.connections.start_replay(number, feed, position);
                Step::Next
            }
            Flushed::Blocked if progress.is_inside_frame(feed) => {
                let entry = progress.cursor().entry;
                channel.note_partly_written(entry, number);
                Step::Done(Flushed::Blocked)
            }
            flushed => Step::Done(flushed),
        }
    }

    /// Writes one page of history to a member that the feed has left behind. `start` is the number
    /// of bytes that the shard had written when this turn's writing to the member started.
    fn write_history(&mut self, number: u32, start: u64, budget: usize) -> Step {
        let owner = self.connections.owner(number);
        let Some(replay) = self.connections.replay_mut(number) else { return Step::Wait };
        let page = replay.take_page();
        let connection = &mut self.connections[owner];
        if connection.socket.is_blocked() {
            return Step::Wait;
        }
        // Nothing is read for a socket that has yet to take the rest of a frame, or frames of its
        // own.
        if page == PageState::Awaited || connection.queued() > 0 {
            let before = self.tally.bytes;
            let flushed = connection.flush_queue(&mut self.tally);
            self.connections.count_replayed(number, self.tally.bytes - before, self.tick);
            if page == PageState::Awaited || flushed != Flushed::All {
                return Step::Done(flushed);
            }
            self.resume_reading(owner);
        }
        if self.tally.bytes - start >= budget as u64 {
            return Step::Done(Flushed::More);
        }
        let channel = &self.channels[self.connections.membership(number).channel];
        let position = self.connections.progress(number).position();
        match channel.feed().find(position) {
            Lookup::Found(cursor) => {
                self.connections.end_replay(number, channel.feed(), cursor, &mut self.tally);
                return Step::Next;
            }
            Lookup::Discontinuous => return self.send_reset(number),
            // Never, since pages are cut at the feed's position. A reconnect would set the position
            // right, and so does a reset.
            Lookup::Ahead if is_subscription(number) => return self.send_reset(number),
            Lookup::Ahead => return self.mark_missed(number),
            Lookup::Evicted => {}
        }
        if !self.connections.may_replay(number, self.tick) {
            match self.connections.may_read(number) {
                true => self.throttle(number),
                false => self.connections.wait_for_page(number),
            }
            return Step::Wait;
        }
        let Some(found) = self.replay.pages.find(channel.id, position, self.tick) else {
            if page == PageState::Arrived {
                self.retry_page_later(number);
            } else {
                let bytes = self.connections.next_page_bytes(number);
                self.request_page(number, position, bytes);
            }
            return Step::Wait;
        };
        if !found.proves(position) {
            return self.send_reset(number);
        }
        let before = self.tally.bytes;
        let (mut sink, progress) = self.connections.writer(number);
        let flushed = sink.flush_page(progress, &found.feed, &mut found.tails, budget, &mut self.tally);
        self.connections.count_replayed(number, self.tally.bytes - before, self.tick);
        if flushed == Flushed::All { Step::Next } else { Step::Done(flushed) }
    }

    /// Sends a reset, since events may be missing for the client, and continues from the oldest
    /// entry in memory.
    fn send_reset(&mut self, number: u32) -> Step {
        let owner = self.connections.owner(number);
        if !self.connections[owner].client.wants_recovery() {
            return self.mark_missed(owner);
        }
        let channel = &self.channels[self.connections.membership(number).channel];
        let feed = channel.feed();
        let position = feed.before().max(feed.base());
        let cursor = match feed.find(position) {
            Lookup::Found(cursor) => cursor,
            _ => Cursor { entry: feed.end(), offset: 0 },
        };
        let reset = match channel.name.form {
            Form::Unnamed => Entry::reset(position),
            Form::Named => form::reset(&channel.name.name, position),
        };
        self.connections[owner].enqueue(reset.bytes);
        self.connections.start_live(number, feed, cursor, position);
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
