//! Connections that must do something in time.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::connections::ConnectionTable;
use crate::bus::ConnectionId;

/// Time from a connection to its complete request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// Longest wait for the bus before a client joins: longer than a call to Redis may take, and far
/// longer than thousands of clients that join at once need.
const JOIN_TIMEOUT: Duration = Duration::from_secs(10);

/// Time to write the last frames, and for the peer to close its side after them.
pub const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// Memory that an empty list of connections keeps: some 8 KiB.
pub const LISTED: usize = 256;

/// Connections with a deadline after the same time each, so that the queue is ordered by deadline.
#[derive(Debug)]
pub struct DeadlineQueue {
    timeout: Duration,
    queue: VecDeque<(Instant, ConnectionId)>,
}

impl DeadlineQueue {
    fn new(timeout: Duration) -> DeadlineQueue {
        DeadlineQueue { timeout, queue: VecDeque::new() }
    }

    pub fn push(&mut self, id: ConnectionId) {
        self.queue.push_back((Instant::now() + self.timeout, id));
    }

    /// Removes the next connection whose deadline is over, and returns its number. Connections that
    /// `waits` does not confirm are removed before their deadline: nearly all of them changed
    /// it long before, and a storm would be remembered for seconds.
    pub fn pop_due(
        &mut self,
        now: Instant,
        connections: &ConnectionTable,
        waits: impl Fn(&ConnectionTable, u32) -> bool,
    ) -> Option<u32> {
        while let Some((due, id)) = self.queue.front().copied() {
            let slot = connections.find(id).filter(|number| waits(connections, *number));
            if slot.is_some() && due > now {
                return None;
            }
            self.queue.pop_front();
            if slot.is_some() {
                return slot;
            }
        }
        None
    }
}

/// The deadlines of one shard.
#[derive(Debug)]
pub struct Deadlines {
    /// Connections without a complete request.
    pub requests: DeadlineQueue,
    /// Connections and subscriptions that wait for the bus before they join.
    pub joins: DeadlineQueue,
    /// Connections that are closing.
    pub closing: DeadlineQueue,
}

impl Deadlines {
    pub fn new() -> Deadlines {
        Deadlines {
            requests: DeadlineQueue::new(REQUEST_TIMEOUT),
            joins: DeadlineQueue::new(JOIN_TIMEOUT),
            closing: DeadlineQueue::new(CLOSE_TIMEOUT),
        }
    }

    /// Frees memory that the queues took while thousands were in them.
    pub fn shrink(&mut self) {
        for queue in [&mut self.requests, &mut self.joins, &mut self.closing] {
            shrink(&mut queue.queue);
        }
    }
}

/// Frees memory that a list took while thousands were in it.
pub fn shrink<T>(list: &mut VecDeque<T>) {
    list.shrink_to(LISTED.max(list.len() * 2));
}
