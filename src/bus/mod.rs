//! A bus gives every event its id, keeps history, and sends each channel's events to the shards in
//! id order. One runs in the control thread: [`local`] for a single node, [`redis`] for several.

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};

use crate::config::Settings;
use crate::limits::bans::Bans;
use crate::metrics::{BusMetrics, Readiness};
use crate::protocol::close::CloseReason;
use crate::protocol::control::Order;
use crate::protocol::event::{ChannelName, Entry, EventId};
use crate::protocol::form::{self, ChannelForm, Form};
use crate::protocol::frame::Regarding;
use crate::protocol::inbox::PublishedId;

pub mod coalesced;
mod control;
pub mod local;
mod page;
pub mod presence;
pub mod reads;
pub mod redis;
pub mod sequence;

pub use self::control::OrderError;
pub use self::page::{BLOCK, Page, SHARED_BYTES, block_start, is_continuous, is_gone};
pub use self::presence::{PresencePage, PresenceUpdate};

/// Index of a shard of this node.
pub type ShardId = usize;

/// A connection of this node, or a subscription of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ConnectionId {
    pub shard: ShardId,
    /// Its slot in the shard's slab, or the number of the subscription.
    pub slot: u32,
    /// Distinguishes it from earlier ones with the number.
    pub generation: u32,
}

/// A request of a shard or of the admin listener. The bus handles requests in the order sent.
#[derive(Debug)]
pub enum Request {
    /// The shard has its first client in this form of a channel. Answered once with
    /// [`BusMessage::Followed`] or [`BusMessage::NotFollowed`]. After `Followed` the shard gets
    /// every entry of the channel, in order and in this form.
    Follow { channel: ChannelForm, shard: ShardId },
    /// The shard has no client left in a channel. Not answered; entries in flight may still arrive.
    Unfollow { channel: ChannelForm, shard: ShardId },
    /// Publish an event.
    Publish(Publish),
    /// Read the events after a position, at most up to the end of the block that holds the first of
    /// them. Answered once.
    Read {
        channel: ChannelName,
        position: EventId,
        /// About how many bytes of events; at least one event. Events of the block before the
        /// position may come, too, up to [`SHARED_BYTES`].
        bytes: usize,
        reader: PageReader,
    },
    /// A client's id is ahead of the node: send all entries that the bus has, then answer with
    /// [`BusMessage::Refreshed`]. The shard follows the channel. Requests made meanwhile share one
    /// read.
    Refresh { channel: ChannelForm, shard: ShardId },
    /// Have all nodes execute a command of a backend. Answered with its place in their order, once
    /// the shards of this node have the command.
    Order { order: Order, waiter: OrderWaiter },
    /// A user's first member on a shard in one form of a channel of `--presence` has joined, or the
    /// last has left.
    Presence { channel: ChannelName, user: Arc<str>, present: bool },
    /// The shard has its first client that wants to know who is in this channel of `--presence`, or
    /// lost the last one. While it has one, it gets [`BusMessage::Presence`].
    FollowPresence { channel: ChannelForm, shard: ShardId, follow: bool },
    /// Read some of the users in a channel of `--presence`. Answered once.
    ReadPresence {
        channel: ChannelName,
        /// Where the page starts: `next` of the last one.
        from: Option<String>,
        limit: usize,
        answer: oneshot::Sender<Result<PresencePage, BusError>>,
    },
}

/// Where the answer to an order goes.
pub type OrderWaiter = oneshot::Sender<Result<EventId, OrderError>>;

/// An event to publish.
#[derive(Debug)]
pub struct Publish {
    pub channel: ChannelName,
    /// The user whose message this is, if it goes to the inbox of the channel: it is not broadcast.
    pub sender: Option<Arc<str>>,
    /// The only recipient, which is also `to` in `event`.
    pub to: Option<Arc<str>>,
    /// Makes a retry safe: if the channel has seen an event with this key within ten minutes, this
    /// one is not published, and its answer is the id of that one. In an inbox each sender has keys
    /// of its own.
    pub key: Option<Arc<str>>,
    /// A JSON object without `id` on one line, from `{` to `}`.
    pub event: Bytes,
    pub answer: Answer,
}

/// Where the result of a publish goes.
#[derive(Debug)]
pub enum Answer {
    /// To a connection, by [`BusMessage::Published`].
    Connection(ConnectionId, Regarding),
    /// To a task that waits, as in the admin listener.
    Waiter(oneshot::Sender<Result<PublishedId, PublishError>>),
}

/// Where a page of history goes.
#[derive(Debug)]
pub enum PageReader {
    /// To a shard that follows the channel in this form, by [`BusMessage::Page`].
    Shard(ShardId, Form),
    /// To a task that waits, as in the admin listener.
    Waiter(oneshot::Sender<Result<Arc<Page>, BusError>>),
}

impl PageReader {
    /// Whether the reader is still there.
    pub fn is_waiting(&self) -> bool {
        !matches!(self, PageReader::Waiter(waiter) if waiter.is_closed())
    }
}

/// Why an event was not published.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PublishError {
    /// It was certainly not published, for this reason. A retry is safe.
    #[error("not published: {0}")]
    Rejected(Arc<str>),
    /// It was sent to the bus, which did not reply in time.
    #[error("may or may not have been published: the bus did not reply in time")]
    Unknown,
    /// It was certainly not stored: the inbox is full.
    #[error("not published: the inbox is full")]
    Full,
}

/// Why a channel can't be followed or read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    #[error("the bus is unavailable: {0}")]
    Unavailable(Arc<str>),
    #[error("the node already follows --max-channels channels")]
    TooManyChannels,
}

/// A message of the bus to a shard. Shards handle messages in the order sent.
#[derive(Debug)]
pub enum BusMessage {
    /// The shard follows the channel. The bus's entries start after `position`. The first of them
    /// may have come before this message if another shard sent it.
    Followed {
        channel: ChannelForm,
        base: EventId,
        position: EventId,
        /// Entries up to `position` that another shard has in memory.
        recent: Vec<Entry>,
    },
    /// Asks a shard that follows the channel to send [`BusMessage::Followed`] with its recent
    /// entries to the shard `with`.
    Share {
        channel: ChannelForm,
        base: EventId,
        /// The position after all entries sent so far.
        position: EventId,
        with: ShardId,
    },
    /// The channel can't be followed now. The shard may ask again.
    NotFollowed { channel: ChannelForm, why: BusError },
    /// The channel's next entry.
    Entry {
        channel: ChannelForm,
        /// Framed events in the form of the channel, or a reset mark.
        entry: Entry,
        /// When it arrived at this node.
        arrived: Instant,
    },
    /// Answers [`Request::Read`] of a shard.
    Page {
        channel: ChannelForm,
        /// The position in the request.
        position: EventId,
        result: Result<Arc<Page>, BusError>,
    },
    /// Answers [`Request::Refresh`], after all entries that it found.
    Refreshed { channel: ChannelForm, result: Result<(), BusError> },
    /// Who is in a channel: at first, and then changes, at most one a second.
    Presence { channel: ChannelForm, update: Arc<PresenceUpdate> },
    /// The result of a connection's publish.
    Published {
        connection: ConnectionId,
        /// What the answer to the client repeats.
        regarding: Regarding,
        result: Result<PublishedId, PublishError>,
    },
    /// A backend disconnects a user from this channel, or from all.
    Disconnect { user: Arc<str>, channel: Option<ChannelName>, reason: CloseReason },
    /// Bans were loaded: close the connections of these users.
    DisconnectBanned(Arc<HashSet<Arc<str>>>),
}

/// A shard that follows a channel in one of its forms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Follower {
    pub shard: ShardId,
    pub form: Form,
}

impl Follower {
    /// The channel of this name in the follower's form.
    pub fn channel(self, name: &ChannelName) -> ChannelForm {
        ChannelForm { name: name.clone(), form: self.form }
    }
}

/// Sends messages to the shards of this node. Sending never waits: a shard empties its mailbox at
/// every turn. A message to a shard that has ended is dropped.
pub trait ShardSender: fmt::Debug + Send + Sync {
    /// Number of shards.
    fn count(&self) -> usize;

    fn send(&self, shard: ShardId, message: BusMessage);

    /// Sends [`BusMessage::Followed`] to a new follower. If another shard follows the channel in the
    /// same form already, that one sends it and adds its recent entries, so that a client finds the
    /// same entries on every shard.
    fn share(
        &self,
        name: &ChannelName,
        base: EventId,
        position: EventId,
        others: &[Follower],
        new: Follower,
    ) {
        let (channel, with) = (new.channel(name), new.shard);
        match others.iter().find(|other| other.form == new.form && other.shard != new.shard) {
            Some(other) => self.send(other.shard, BusMessage::Share { channel, base, position, with }),
            None => self.send(with, BusMessage::Followed { channel, base, position, recent: Vec::new() }),
        }
    }

    /// Sends an entry to all followers, each in its form. The named form is made once, if any shard
    /// follows it.
    fn send_entry(&self, name: &ChannelName, entry: &Entry, followers: &[Follower], arrived: Instant) {
        let mut named = None;
        for follower in followers {
            let entry = match follower.form {
                Form::Unnamed => entry,
                Form::Named => named.get_or_insert_with(|| form::named(entry, name)),
            };
            let (channel, entry) = (follower.channel(name), entry.clone());
            self.send(follower.shard, BusMessage::Entry { channel, entry, arrived });
        }
    }

    /// Sends a page of history.
    fn send_page(
        &self,
        reader: PageReader,
        name: ChannelName,
        position: EventId,
        result: Result<Arc<Page>, BusError>,
    ) {
        match reader {
            PageReader::Shard(shard, form) => {
                let channel = ChannelForm { name, form };
                self.send(shard, BusMessage::Page { channel, position, result });
            }
            PageReader::Waiter(waiter) => {
                let _ = waiter.send(result); // fails if the task no longer waits
            }
        }
    }

    /// Sends the result of a publish.
    fn answer(&self, answer: Answer, result: Result<PublishedId, PublishError>) {
        match answer {
            Answer::Connection(connection, regarding) => {
                self.send(connection.shard, BusMessage::Published { connection, regarding, result });
            }
            Answer::Waiter(waiter) => {
                let _ = waiter.send(result); // fails if the task no longer waits
            }
        }
    }
}

/// Sends requests to the bus. Each shard and the admin listener has a clone.
pub type Requests = mpsc::UnboundedSender<Request>;

/// What a bus needs of its node.
#[derive(Debug)]
pub struct BusContext {
    pub requests: mpsc::UnboundedReceiver<Request>,
    pub shards: Arc<dyn ShardSender>,
    pub bans: Arc<Bans>,
    pub metrics: Arc<BusMetrics>,
    pub readiness: Arc<Readiness>,
}

/// The bus can't work with these settings: a retry can't succeed.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{0}")]
pub struct Unusable(pub String);

/// Why the bus is not ready before its first answer.
pub fn starting(settings: &Settings) -> String {
    match &settings.redis {
        None => "starting".into(),
        Some(url) => format!("connecting to {}", url.target()),
    }
}

/// Runs the bus of these settings until all senders of requests are dropped.
pub async fn run(settings: &Settings, context: BusContext) -> Result<(), Unusable> {
    match &settings.redis {
        None => {
            local::run(settings, context).await;
            Ok(())
        }
        Some(url) => redis::run(settings, url, context).await,
    }
}
