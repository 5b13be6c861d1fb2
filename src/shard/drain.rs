//! The drain: all connections are closed, spread over `--drain-timeout`.

use std::time::{Duration, Instant};

use super::Shard;
use super::deadlines::CLOSE_TIMEOUT;
use super::timers::TICK;
use crate::http::Response;
use crate::protocol::close::CloseReason;
use crate::ws::connection::State;
use crate::ws::handshake::rejections;

/// A drain under way.
#[derive(Debug)]
pub(super) struct Drain {
    /// When the last connection is closed.
    last_close: Instant,
    /// When the shard ends, even if sockets are still open.
    end: Instant,
    /// The slot to close next.
    slot: u32,
    /// About how many connections follow that slot.
    left: usize,
}

impl Shard {
    pub(super) fn on_drain(&mut self, time: Duration) {
        let now = Instant::now();
        let end = now + time;
        // The last clients, too, need time to read the close frame and to answer it.
        let last_close = end - CLOSE_TIMEOUT.min(time / 4);
        self.drain = Some(Drain { last_close, end, slot: 0, left: self.connections.len() });
        self.continue_drain(now);
    }

    /// Closes this tick's part of the connections.
    pub(super) fn continue_drain(&mut self, now: Instant) {
        let Some(drain) = &mut self.drain else { return };
        let time = drain.last_close.saturating_duration_since(now);
        let ticks = time.as_millis().div_ceil(TICK.as_millis());
        let is_last = ticks == 0;
        let mut due = if is_last { usize::MAX } else { drain.left.div_ceil(ticks as usize) };
        drain.left = drain.left.saturating_sub(due);
        let mut slot = drain.slot;
        while slot < self.connections.end() && due > 0 {
            due -= usize::from(self.drain_slot(slot, is_last));
            slot += 1;
        }
        if let Some(drain) = &mut self.drain {
            drain.slot = if is_last { 0 } else { slot };
        }
    }

    /// Closes the connection in a slot. Returns false if there is none to close. A connection
    /// without a complete request gets the response when the request is complete, or in the last
    /// tick.
    fn drain_slot(&mut self, slot: u32, is_last: bool) -> bool {
        match self.connections.get(slot).map(|connection| &connection.state) {
            None | Some(State::Closing { .. } | State::Discarded) => return false,
            Some(State::Request(_)) if !is_last => return false,
            Some(State::Request(_) | State::Joining(_)) => {
                let response = Response::from(rejections::stopping());
                self.respond(slot, &response, CloseReason::Draining);
            }
            Some(State::Live | State::Replay(_) | State::WithoutChannel | State::Missed) => {
                self.close(slot, CloseReason::Draining)
            }
        }
        true
    }

    /// Whether the node is stopping and this shard has nothing left to do.
    pub(super) fn has_ended(&self) -> bool {
        let Some(drain) = &self.drain else { return false };
        self.connections.len() == 0 || Instant::now() >= drain.end
    }
}
