//! Connections that must do something in time.

use std::collections::VecDeque;
use std::time::Duration;

use mio::Token;

use super::connections::{ConnectionTable, token};
use super::timers::ticks;
use crate::bus::ConnectionId;
use crate::ws::connection::State;

/// Time from a connection to its complete request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// Longest wait for the bus before a client joins: longer than a call to Redis may take, and far
/// longer than thousands of clients that join at once need.
const JOIN_TIMEOUT: Duration = Duration::from_secs(10);

/// Time to write the last frames, and for the peer to close its side after them.
pub const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// Memory that an empty list of connections keeps: some 4 KiB.
pub const LISTED: usize = 256;

/// Connections or subscriptions in a state with a deadline after the same time each, so that the
/// queue is ordered by deadline.
#[derive(Debug)]
pub struct DeadlineQueue {
    /// In ticks.
    timeout: u32,
    waits: Waits,
    /// With the tick at which the time is over.
    queue: VecDeque<(Token, u32)>,
}

/// Whether this connection or subscription still has its deadline.
type Waits = fn(&ConnectionTable, u32) -> bool;

impl DeadlineQueue {
    fn new(timeout: Duration, waits: Waits) -> DeadlineQueue {
        // The next tick may come at once.
        DeadlineQueue { timeout: ticks(timeout) + 1, waits, queue: VecDeque::new() }
    }

    pub fn push(&mut self, id: ConnectionId, tick: u32, connections: &ConnectionTable) {
        self.queue.push_back((token(id), tick.wrapping_add(self.timeout)));
        self.skip_done(connections);
    }

    /// Removes the next connection whose deadline is over, and returns its number.
    pub fn pop_due(&mut self, tick: u32, connections: &ConnectionTable) -> Option<u32> {
        self.skip_done(connections);
        let (token, _) = self.queue.pop_front_if(|(_, due)| due.wrapping_sub(tick).cast_signed() <= 0)?;
        connections.find(connections.id_of(token))
    }

    /// Removes connections without a deadline from the front. Nearly all of them changed their state
    /// long before, and a storm would be remembered for seconds.
    fn skip_done(&mut self, connections: &ConnectionTable) {
        while let Some((token, _)) = self.queue.front() {
            let number = connections.find(connections.id_of(*token));
            if number.is_some_and(|number| (self.waits)(connections, number)) {
                return;
            }
            self.queue.pop_front();
        }
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
            requests: DeadlineQueue::new(REQUEST_TIMEOUT, |connections, slot| {
                matches!(connections[slot].state, State::Request(_))
            }),
            joins: DeadlineQueue::new(JOIN_TIMEOUT, ConnectionTable::is_joining),
            closing: DeadlineQueue::new(CLOSE_TIMEOUT, |connections, slot| {
                matches!(connections[slot].state, State::Closing { .. })
            }),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::connections::ConnectionSlot;
    use crate::ws::connection::Connection;

    #[test]
    fn only_connections_that_wait_are_remembered() {
        let poll = mio::Poll::new().expect("a poll");
        let mut connections = ConnectionTable::new(0, poll.registry().try_clone().expect("a registry"));
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        let mut requests = Deadlines::new().requests;
        let mut push = |connections: &mut ConnectionTable| {
            let stream = mio::net::TcpStream::connect(address).expect("it listens");
            let connect = |generation| Connection::new(stream, ConnectionSlot::Proxy, generation, 0);
            let slot = connections.insert(connect);
            requests.push(connections.id(slot), 0, connections);
            slot
        };
        for _ in 0..10 {
            let slot = push(&mut connections);
            connections[slot].state = State::Live;
        }
        let (waiting, _) = (push(&mut connections), push(&mut connections));
        assert_eq!(requests.queue.len(), 2);
        connections.discard(11);
        assert_eq!(requests.pop_due(requests.timeout - 1, &connections), None);
        assert_eq!(requests.pop_due(requests.timeout, &connections), Some(waiting));
        assert_eq!(requests.pop_due(requests.timeout, &connections), None);
        assert!(requests.queue.is_empty());
    }
}
