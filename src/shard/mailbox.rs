//! Mailboxes of the shards: the bus, the accept loop and other shards send messages, each shard
//! reads its own.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use mio::net::TcpStream;
use mio::{Registry, Token, Waker};
use tokio::sync::mpsc;

use crate::bus::{BusMessage, ShardId, ShardSender};
use crate::limits::connections::ConnectionSlot;

/// What is sent to a shard, which handles it in the order sent.
#[derive(Debug)]
pub enum ShardMessage {
    /// From the bus, or from another shard in its place.
    Bus(BusMessage),
    /// A new socket, with its slot in the connection limits.
    Socket(TcpStream, ConnectionSlot),
    /// The node is stopping: close every connection, spread over this time.
    Drain(Duration),
}

impl From<BusMessage> for ShardMessage {
    fn from(message: BusMessage) -> ShardMessage {
        ShardMessage::Bus(message)
    }
}

/// What a shard reads its messages from.
pub type Inbox = mpsc::UnboundedReceiver<ShardMessage>;

/// Wakes a shard that sleeps in its poll, and costs nothing while it does not sleep.
#[derive(Debug)]
pub struct ShardWaker {
    waker: Waker,
    asleep: AtomicBool,
}

impl ShardWaker {
    /// Wakes the poll of this registry, which then returns an event with this token.
    pub(super) fn new(registry: &Registry, token: Token) -> io::Result<ShardWaker> {
        Ok(ShardWaker { waker: Waker::new(registry, token)?, asleep: AtomicBool::new(false) })
    }

    /// Calls `poll`, which may sleep if it is called with `true`. That is so unless `has_work`; a
    /// message that is sent meanwhile ends the sleep.
    pub(super) fn sleep<T>(&self, has_work: impl FnOnce() -> bool, poll: impl FnOnce(bool) -> T) -> T {
        // Both sides write, then read what the other wrote, in one order for all (SeqCst): either
        // the sender sees that the shard sleeps, or the shard sees what was sent.
        self.asleep.store(true, Ordering::SeqCst);
        let may_sleep = !has_work();
        if !may_sleep {
            self.asleep.store(false, Ordering::SeqCst);
        }
        let result = poll(may_sleep);
        self.asleep.store(false, Ordering::SeqCst);
        result
    }

    fn wake(&self) {
        if self.asleep.swap(false, Ordering::SeqCst) {
            // It fails only when the poll is gone, and then there is no shard to wake.
            let _ = self.waker.wake();
        }
    }
}

/// The mailboxes of all shards. Cloned freely; sending never waits, since a shard empties its
/// mailbox at every turn.
#[derive(Clone, Debug)]
pub struct Mailboxes {
    senders: Arc<[mpsc::UnboundedSender<ShardMessage>]>,
    wakers: Arc<[Arc<ShardWaker>]>,
}

impl Mailboxes {
    /// One for each shard, by [`ShardId`].
    pub fn new(senders: Vec<mpsc::UnboundedSender<ShardMessage>>) -> Mailboxes {
        Mailboxes { senders: senders.into(), wakers: Arc::default() }
    }

    /// The same for shards that sleep in a poll.
    pub fn with_wakers(self, wakers: Vec<Arc<ShardWaker>>) -> Mailboxes {
        Mailboxes { wakers: wakers.into(), ..self }
    }

    /// How many shards there are.
    pub fn count(&self) -> usize {
        self.senders.len()
    }

    /// Sends a message and wakes the shard. A message to a shard that has ended is dropped.
    pub fn send(&self, shard: ShardId, message: impl Into<ShardMessage>) {
        self.queue(shard, message);
        self.wake(shard);
    }

    /// Sends a message without waking the shard: for many messages with one [`Mailboxes::wake`].
    pub fn queue(&self, shard: ShardId, message: impl Into<ShardMessage>) {
        let _ = self.senders[shard].send(message.into());
    }

    /// Wakes a shard that sleeps.
    pub fn wake(&self, shard: ShardId) {
        if let Some(waker) = self.wakers.get(shard) {
            waker.wake();
        }
    }
}

impl ShardSender for Mailboxes {
    fn count(&self) -> usize {
        self.senders.len()
    }

    fn send(&self, shard: ShardId, message: BusMessage) {
        Mailboxes::send(self, shard, message);
    }
}
