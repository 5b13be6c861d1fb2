//! From the feed to the sockets: passes, slow readers, and those who read history.

use std::time::Instant;

use super::Shard;
use crate::feed::{Cursor, Feed, Lookup};
use crate::protocol::close::CloseReason;
use crate::protocol::event::{ChannelName, Entry, Kind};
use crate::ws::connection::{BURST, Flushed, SharedTails, State};

impl Shard {
    /// Takes a channel's next entry into its feed and sees that it goes out.
    pub(super) fn on_entry(&mut self, name: &ChannelName, entry: Entry, arrived: Instant) {
        let Some(key) = self.names.get(name).copied() else { return };
        let channel = &mut self.channels[key as usize];
        let Some(feed) = &mut channel.feed else { return channel.early.push(entry) };
        let cost = entry.memory();
        self.feed_bytes += cost;
        self.longest_entry = self.longest_entry.max(cost);
        self.ages.push_back((key, channel.serial));
        let to = match &entry.kind {
            Kind::Private(user) => Some(user.clone()),
            _ => None,
        };
        let number = feed.end();
        feed.append(entry);
        let had_fanout = channel.has_fanout();
        match to {
            Some(user) => {
                channel.start_private_fanout(user, arrived, &self.connections, &self.hasher);
            }
            None => channel.start_public_fanout(self.now, arrived, number),
        }
        if !had_fanout && channel.has_fanout() {
            self.passes.push_back(key);
        }
        self.trim();
    }

    /// Evicts the oldest entries of all feeds until the rest fits. An entry stays until the fan-out under way has brought it
    /// to all members, since events without id are in no history. For that feeds may hold twice as much, or two of the
    /// longest entries.
    pub(super) fn trim(&mut self) {
        let part = self.settings.buffer_memory() / self.settings.shards.get();
        let limit = part >> self.context.readiness.memory_pressure();
        let most = 2 * limit.max(self.longest_entry);
        while self.feed_bytes > limit {
            let Some((key, serial)) = self.ages.front().copied() else { return };
            let Some(channel) =
                self.channels.get_mut(key as usize).filter(|channel| channel.serial == serial)
            else {
                self.ages.pop_front();
                self.stale_ages = self.stale_ages.saturating_sub(1);
                continue;
            };
            let number = channel.feed.as_ref().map_or(0, Feed::start);
            if channel.still_brings(number) && self.feed_bytes <= most {
                return;
            }
            self.ages.pop_front();
            let Some(entry) = channel.feed.as_mut().and_then(Feed::evict) else { continue };
            self.feed_bytes -= entry.memory();
            let mut tails = SharedTails::default();
            while let Some((_, slot)) = channel.begun.first().copied().filter(|begun| begun.0 <= number) {
                channel.begun.pop_first();
                self.connections[slot as usize].keep_tail(&entry, &mut tails, &mut self.tally);
            }
        }
    }

    /// Goes on with the fan-outs under way, for at most `budget` writes. A connection that is visited without a write
    /// counts as one, too.
    pub(super) fn pass_on(&mut self, mut budget: u64) {
        while let Some(key) = self.passes.front().copied() {
            let channel = &mut self.channels[key as usize];
            channel.end_fanouts(self.now, &mut self.brought, &self.connections, &self.hasher);
            if !channel.has_fanout() {
                self.passes.pop_front();
                continue;
            }
            if budget == 0 {
                self.passes.rotate_left(1);
                return;
            }
            let before = self.tally.writes;
            if let Some(slot) = channel.next_visit(&self.connections) {
                let connection = &self.connections[slot as usize];
                if !connection.blocked && matches!(connection.state, State::Live) {
                    self.flush(slot);
                }
            }
            budget = budget.saturating_sub((self.tally.writes - before).max(1));
        }
    }

    /// Counts how long it took what this turn has brought to its end. One look at the clock does for all: a turn is
    /// short, and what came alone is not to be measured at the price of a delivery.
    pub(super) fn time_passes(&mut self, now: Instant) {
        let numbers = &self.metrics.shards[self.id];
        for (begun, arrived) in self.brought.drain(..) {
            if let Some(begun) = begun {
                numbers.fanout_times.observe(now.saturating_duration_since(begun));
            }
            numbers.latencies.observe(now.saturating_duration_since(arrived));
        }
    }

    /// Writes to a socket that was full. If it takes anything, its peer has read something, which shows that it lives.
    pub(super) fn retry_write(&mut self, slot: u32) {
        let id = self.id_of(slot);
        let connection = &mut self.connections[slot as usize];
        connection.blocked = false;
        if connection.is_open() {
            let begun = (connection.cursor.entry, slot);
            self.channels[connection.channel as usize].begun.remove(&begun);
        }
        let before = self.tally.bytes;
        self.flush(slot);
        if self.tally.bytes > before && self.find(id).is_some() {
            self.connections[slot as usize].last_activity = self.tick;
        }
    }

    /// Writes what there is for a connection.
    pub(super) fn flush(&mut self, slot: u32) {
        let connection = &mut self.connections[slot as usize];
        let flushed = match connection.state {
            State::Live => {
                let channel = &mut self.channels[connection.channel as usize];
                let feed = channel.feed.as_ref().expect("members are in channels that are followed");
                let flushed = connection.flush(feed, &mut self.tally);
                if flushed == Flushed::Blocked && connection.is_inside_frame(feed) {
                    channel.begun.insert((connection.cursor.entry, slot));
                }
                if flushed == Flushed::Behind {
                    connection.start_replay(feed, connection.position);
                    return self.catch_up(slot, false);
                }
                flushed
            }
            State::Replay(_) => return self.catch_up(slot, false),
            State::Missed => connection.flush_queue(&mut self.tally),
            State::Closing { .. } => {
                if !connection.finish(None, &mut self.tally) {
                    self.remove(slot);
                }
                return;
            }
            State::Request(_) | State::Joining(_) => return,
        };
        self.after_flush(slot, flushed);
    }

    fn after_flush(&mut self, slot: u32, flushed: Flushed) {
        match flushed {
            Flushed::Blocked => self.register_writable(slot),
            Flushed::All | Flushed::Behind => self.resume_reading(slot),
            Flushed::More => self.write_later(slot),
            Flushed::Missed => self.mark_missed(slot),
            Flushed::Dead => self.end(slot, CloseReason::ConnectionLost),
        }
    }

    /// Brings a connection that the feed has left behind nearer to it, by parts of history. `http_response`: the part that it
    /// waited for has just come.
    pub(super) fn catch_up(&mut self, slot: u32, mut answered: bool) {
        let id = self.id_of(slot);
        let begun = self.tally.bytes;
        loop {
            if self.tally.bytes - begun >= BURST as u64 {
                return self.after_flush(slot, Flushed::More);
            }
            let connection = &mut self.connections[slot as usize];
            let State::Replay(pace) = connection.state else { return };
            if connection.blocked {
                return;
            }
            // Nothing is read for a socket that has yet to take the rest of a frame, or frames of its own.
            if connection.waits_for_page || connection.queued() > 0 {
                let before = self.tally.bytes;
                let flushed = connection.flush_queue(&mut self.tally);
                connection.count_replayed(self.tally.bytes - before, self.tick);
                let goes_on = flushed == Flushed::All && !connection.waits_for_page;
                self.after_flush(slot, flushed);
                if goes_on {
                    continue;
                }
                return;
            }
            let position = connection.position;
            let key = connection.channel;
            let channel = &self.channels[key as usize];
            let feed = channel.feed.as_ref().expect("members are in channels that are followed");
            match feed.find(position) {
                Lookup::Found(cursor) => {
                    connection.count_bare_miss(feed, &mut self.tally);
                    connection.state = State::Live;
                    connection.cursor = cursor;
                    return self.flush(slot);
                }
                Lookup::Discontinuous => return self.send_reset(slot),
                // Never, since parts are cut at the feed's position. A client that comes back gets its position.
                Lookup::Ahead => return self.mark_missed(slot),
                Lookup::Evicted => {}
            }
            if !pace.may_take(self.tick) {
                connection.waits_for_page = true;
                return self.next_tick.push(id);
            }
            let Some(page) = self.pages.find((key, channel.serial), position, self.tick) else {
                if answered {
                    connection.waits_for_page = true;
                    return self.parked.push(id); // the answer brought it nowhere: not to be asked for again at once
                }
                let bytes = connection.next_part_bytes();
                return self.wait_for_page(slot, position, bytes);
            };
            if !page.proves(position) {
                return self.send_reset(slot);
            }
            answered = false;
            let before = self.tally.bytes;
            let flushed = connection.flush_page(&page.feed, &mut page.tails, &mut self.tally);
            connection.count_replayed(self.tally.bytes - before, self.tick);
            if flushed != Flushed::All {
                return self.after_flush(slot, flushed);
            }
        }
    }

    /// Tells a client that events may be missing for it, and goes on from the oldest in memory.
    fn send_reset(&mut self, slot: u32) {
        let connection = &mut self.connections[slot as usize];
        if !connection.wants_recovery {
            return self.mark_missed(slot);
        }
        let channel = &self.channels[connection.channel as usize];
        let feed = channel.feed.as_ref().expect("members are in channels that are followed");
        let position = feed.before().max(feed.base());
        let cursor = match feed.find(position) {
            Lookup::Found(cursor) => cursor,
            _ => Cursor { entry: feed.end(), offset: 0 },
        };
        connection.enqueue(Entry::reset(position).bytes);
        connection.start_live(feed, cursor, position);
        self.tally.resets += 1;
        self.flush(slot);
    }

    /// A client without recovery frames has missed events: closing is how it is told.
    fn mark_missed(&mut self, slot: u32) {
        self.tally.resets += 1;
        self.connections[slot as usize].state = State::Missed;
        self.missed.push_back(self.id_of(slot));
    }
}
