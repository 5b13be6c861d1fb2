//! Work put off to a later turn, so that other connections get theirs.

use std::collections::VecDeque;

use super::Shard;
use super::deadlines::shrink;
use super::members::is_subscription;
use super::pages::PageId;
use crate::bus::ConnectionId;

/// Most writes of fan-outs in a row. Writes are counted, not connections, since a connection with
/// many small entries before it takes many writes.
pub(super) const FANOUT_WRITES: u64 = 256;

/// Connections read from or flushed before the fan-outs under way get their turn. In a storm each
/// of thousands of connections has a handshake, a token and a page of history, and live events
/// would wait behind all of them.
const CONNECTIONS_PER_FANOUT: usize = 32;

/// What a member waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pending {
    /// Time, or the channel to be followed.
    Nothing,
    /// Newer events, since it claims an id ahead of this node.
    Refresh,
    /// This page of history.
    Page(PageId),
}

/// Connections that have their turn later.
#[derive(Debug, Default)]
pub(super) struct Deferred {
    /// Connections that had more to read than one turn allows.
    reads: Vec<ConnectionId>,
    /// Connections that had more to write than one turn allows.
    writes: Vec<ConnectionId>,
    /// Members that the bus has answered. Thousands may have waited for one answer.
    pub answered: VecDeque<(ConnectionId, Pending)>,
    /// Connections that missed events and are to be closed, some at every tick.
    pub missed: VecDeque<ConnectionId>,
}

impl Deferred {
    /// Frees memory that the lists took while thousands were in them.
    pub fn shrink(&mut self) {
        shrink(&mut self.answered);
        shrink(&mut self.missed);
    }
}

impl Shard {
    /// Whether the next turn has work without any message or event.
    pub(super) fn has_deferred(&self) -> bool {
        let Deferred { reads, writes, answered, .. } = &self.deferred;
        !(reads.is_empty() && writes.is_empty() && answered.is_empty()) || self.channels.has_fanout()
    }

    /// Continues what earlier turns left.
    pub(super) fn run_deferred(&mut self) {
        for (done, id) in std::mem::take(&mut self.deferred.reads).into_iter().enumerate() {
            if let Some(slot) = self.connections.find(id) {
                self.connections[slot].inbound.leave_queue();
                self.on_readable(slot, true);
            }
            self.maybe_run_fanout(done);
        }
        for (done, id) in std::mem::take(&mut self.deferred.writes).into_iter().enumerate() {
            if let Some(slot) = self.connections.find(id) {
                self.connections[slot].socket.leave_queue();
                self.flush_all(slot);
            }
            self.maybe_run_fanout(done);
        }
        self.resume_waiting();
        self.run_fanout(FANOUT_WRITES);
        if self.channels.take_emptied() && self.excess_channels() > 0 {
            self.drop_empty_channels(self.now);
        }
    }

    /// Runs fan-outs after every [`CONNECTIONS_PER_FANOUT`]th connection. `done` is the number of
    /// those before this one.
    pub(super) fn maybe_run_fanout(&mut self, done: usize) {
        if (done + 1).is_multiple_of(CONNECTIONS_PER_FANOUT) {
            self.run_fanout(FANOUT_WRITES);
        }
    }

    /// Continues with some of the members that the bus has answered.
    fn resume_waiting(&mut self) {
        for _ in 0..CONNECTIONS_PER_FANOUT {
            let Some((id, pending)) = self.deferred.answered.pop_front() else { break };
            if let Some(number) = self.connections.find(id) {
                let owner = self.connections.owner(number);
                if let Some(replay) = self.connections.replay_mut(number) {
                    replay.resume(matches!(pending, Pending::Page(_)));
                    self.flush(number);
                } else {
                    self.join(number, pending);
                    // Of a connection with many channels each may be admitted in another turn.
                    if is_subscription(number) && self.connections.find(id).is_some() {
                        self.flush(number);
                    }
                }
                self.resume_next_reader(owner);
            }
            if let Pending::Page(page) = pending {
                self.replay.pages.served(page);
            }
        }
        self.start_reads();
    }

    /// Reads from a connection in the next turn.
    pub(super) fn read_later(&mut self, slot: u32) {
        if self.connections[slot].inbound.enter_queue() {
            self.deferred.reads.push(self.connections.id(slot));
        }
    }

    /// Writes to a connection in the next turn.
    pub(super) fn write_later(&mut self, slot: u32) {
        if self.connections[slot].socket.enter_queue() {
            self.deferred.writes.push(self.connections.id(slot));
        }
    }
}
