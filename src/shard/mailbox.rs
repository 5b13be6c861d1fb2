//! Mailboxes of the shards: the bus, the accept loop and other shards send messages, each shard
//! reads its own.

use std::sync::Arc;
use std::time::Duration;

use mio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};

use crate::bus::{BusMessage, ShardId, ShardSender};
use crate::limits::connections::{Address, ConnectionSlot};
use crate::protocol::event::{ChannelName, EventId};

/// A message to a shard. A shard handles its messages in the order sent.
#[derive(Debug)]
pub enum ShardMessage {
    /// From the bus, or from another shard on its behalf.
    Bus(BusMessage),
    /// New sockets.
    Sockets(Vec<NewSocket>),
    /// List some of the channels.
    ListChannels(ListChannels),
    /// List some of the connections of a user.
    ListConnections(ListConnections),
    /// The node is stopping: close every connection, spread over this time.
    Drain(Duration),
}

/// A request for the channels of a shard. Each answer covers a part of them, so that it takes little
/// time of the shard.
#[derive(Debug)]
pub struct ListChannels {
    /// The key to start from: 0, or the last answer's `next`.
    pub from: u32,
    /// Only names after this one are listed.
    pub after: Option<ChannelName>,
    /// Only this name and those before it are listed.
    pub up_to: Option<ChannelName>,
    pub answer: oneshot::Sender<ChannelList>,
}

/// Some channels of a shard.
#[derive(Debug, Default)]
pub struct ChannelList {
    /// Name, number of members, and position. A channel is in the list once for each of its forms.
    pub channels: Vec<(ChannelName, usize, EventId)>,
    /// The key to continue from; `None` at the end.
    pub next: Option<u32>,
}

/// A request for the connections of a user on a shard. As with channels, each answer covers a part.
#[derive(Debug)]
pub struct ListConnections {
    pub user: Arc<str>,
    /// The slot to start from: 0, or the last answer's `next`.
    pub from: u32,
    pub answer: oneshot::Sender<ConnectionList>,
}

/// Some connections of a user.
#[derive(Debug, Default)]
pub struct ConnectionList {
    pub connections: Vec<ListedConnection>,
    /// The slot to continue from; `None` at the end.
    pub next: Option<u32>,
}

#[derive(Debug)]
pub struct ListedConnection {
    pub slot: u32,
    /// Its default channel and its subscriptions, each with its position once it has joined.
    pub channels: Vec<(ChannelName, Option<EventId>)>,
    /// `None` if a proxy reported an address that is over a limit.
    pub client: Option<Address>,
    pub minutes_connected: u16,
    /// Bytes of frames that its socket has not accepted.
    pub queued: usize,
}

/// An accepted socket, and its slot in the connection limits.
pub type NewSocket = (TcpStream, ConnectionSlot);

impl From<BusMessage> for ShardMessage {
    fn from(message: BusMessage) -> ShardMessage {
        ShardMessage::Bus(message)
    }
}

/// The receiving end of a mailbox.
pub type Inbox = mpsc::UnboundedReceiver<ShardMessage>;

/// The sending ends of all mailboxes. Sending never waits: a shard empties its mailbox every turn.
#[derive(Clone, Debug)]
pub struct MailboxSenders(Arc<[mpsc::UnboundedSender<ShardMessage>]>);

impl MailboxSenders {
    /// The sending ends and, by [`ShardId`], the inboxes.
    pub fn new(shards: usize) -> (MailboxSenders, Vec<Inbox>) {
        let (senders, inboxes): (Vec<_>, Vec<_>) = (0..shards).map(|_| mpsc::unbounded_channel()).unzip();
        (MailboxSenders(senders.into()), inboxes)
    }

    /// How many shards there are.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// Sends a message. A message to a shard that has ended is dropped.
    pub fn send(&self, shard: ShardId, message: impl Into<ShardMessage>) {
        let _ = self.0[shard].send(message.into());
    }
}

impl ShardSender for MailboxSenders {
    fn count(&self) -> usize {
        MailboxSenders::count(self)
    }

    fn send(&self, shard: ShardId, message: BusMessage) {
        MailboxSenders::send(self, shard, message);
    }
}
