//! Work put off to a later turn, so that other connections get theirs.

use std::collections::VecDeque;

use super::Shard;
use super::deadlines::shrink;
use super::members::is_subscription;
use super::pages::PageId;
use crate::bus::ConnectionId;

/// Most connections of each list that have their turn before the shard looks for new messages and
/// events. In a storm each of thousands of connections has a handshake, a token and a page of
/// history, and live events would wait behind all of them.
pub(super) const CONNECTIONS_A_TURN: usize = 32;

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
    /// Connections whose request or end has arrived, or that had more to read than one turn allows.
    reads: VecDeque<ConnectionId>,
    /// Connections whose socket takes bytes again, or that had more to write than one turn allows.
    writes: VecDeque<ConnectionId>,
    /// Members that the bus has answered. Thousands may have waited for one answer.
    pub answered: VecDeque<(ConnectionId, Pending)>,
    /// Connections that missed events and are to be closed, some at every tick.
    pub missed: VecDeque<ConnectionId>,
}

impl Deferred {
    /// Frees memory that the lists took while thousands were in them.
    pub fn shrink(&mut self) {
        shrink(&mut self.reads);
        shrink(&mut self.writes);
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

    /// Continues what earlier turns left, and what this one has put off.
    pub(super) fn run_deferred(&mut self) {
        for _ in 0..self.deferred.reads.len().min(CONNECTIONS_A_TURN) {
            let Some(id) = self.deferred.reads.pop_front() else { break };
            if let Some(slot) = self.connections.find(id) {
                self.connections[slot].inbound.leave_queue();
                self.on_readable(slot, true);
            }
            self.maybe_run_fanout();
        }
        for _ in 0..self.deferred.writes.len().min(CONNECTIONS_A_TURN) {
            let Some(id) = self.deferred.writes.pop_front() else { break };
            if let Some(slot) = self.connections.find(id) {
                self.connections[slot].socket.leave_queue();
                match self.connections[slot].socket.is_blocked() {
                    true => self.retry_write(slot),
                    false => self.flush_all(slot),
                }
            }
            self.maybe_run_fanout();
        }
        self.resume_waiting();
        self.run_fanout();
        if self.channels.take_emptied() && self.excess_channels() > 0 {
            self.drop_empty_channels(self.now);
        }
    }

    /// Continues with some of the members that the bus has answered.
    fn resume_waiting(&mut self) {
        for _ in 0..CONNECTIONS_A_TURN {
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
            self.maybe_run_fanout();
        }
        self.start_reads();
    }

    /// Reads from a connection after those that are live.
    pub(super) fn read_later(&mut self, slot: u32) {
        if self.connections[slot].inbound.enter_queue() {
            self.deferred.reads.push_back(self.connections.id(slot));
        }
    }

    /// Writes to a connection in the next turn.
    pub(super) fn write_later(&mut self, slot: u32) {
        if self.connections[slot].socket.enter_queue() {
            self.deferred.writes.push_back(self.connections.id(slot));
        }
    }
}
