//! What a bus is: it gives every event its id, keeps history, and hands each channel's events to the shards
//! in id order. One runs in the control thread: [`local`] alone on this node, [`redis`] across nodes.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};

use crate::config::Settings;
use crate::metrics::{BusMetrics, Readiness};
use crate::protocol::event::{ChannelName, Entry, EventId};

pub mod coalesced;
pub mod local;
mod page;
pub mod reads;
pub mod redis;
pub mod sequence;

pub use self::page::{PAGE, PART_SHARED, Page, is_continuous, is_gone, page_begin};

/// Which shard of this node.
pub type ShardId = usize;

/// A connection of this node: its shard's slot, and the generation that tells it from the slot's earlier owners.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ConnectionId {
    /// Its shard.
    pub shard: ShardId,
    /// Its slot in the shard's slab.
    pub slot: u32,
    /// Counts the owners of the slot.
    pub generation: u32,
}

/// What shards and the admin listener ask of the bus. Requests are taken in the order sent.
#[derive(Debug)]
pub enum Request {
    /// The shard's first client of a channel has come. Answered once by [`BusMessage::Followed`] or
    /// [`BusMessage::NotFollowed`]; after `Followed` the shard gets every entry of the channel, in order.
    Follow {
        /// The channel.
        channel: ChannelName,
        /// Who follows.
        shard: ShardId,
    },
    /// The shard has nobody left there. Not answered. Entries already under way may still arrive.
    Unfollow {
        /// The channel.
        channel: ChannelName,
        /// Who lets go.
        shard: ShardId,
    },
    /// An event to be given an id.
    Publish(Publish),
    /// The events after a position, at most up to the end of the page that holds the first of them. Answered once
    /// by [`BusMessage::Page`].
    Read {
        /// The channel; the shard follows it.
        channel: ChannelName,
        /// The position.
        position: EventId,
        /// About how many bytes are wanted. One event comes in any case, and what the page has before the position
        /// may come too, up to [`PART_SHARED`].
        bytes: usize,
        /// Who asks.
        shard: ShardId,
    },
    /// A client claims an id ahead of the node: look at the bus once, hand out what is new, then answer with
    /// [`BusMessage::Refreshed`]. All who ask meanwhile share it.
    Refresh {
        /// The channel; the shard follows it.
        channel: ChannelName,
        /// Who asks.
        shard: ShardId,
    },
}

/// An event on its way in.
#[derive(Debug)]
pub struct Publish {
    /// Its channel; need not be followed by anyone here.
    pub channel: ChannelName,
    /// The only user it is for; `event` shows it as `to` already.
    pub to: Option<Arc<str>>,
    /// What makes a retry safe: an event under a key that its channel has seen within ten minutes is not published
    /// again, and its answer is the first one's id.
    pub key: Option<Arc<str>>,
    /// A JSON object without `id`, on one line, beginning with `{` and ending with `}`.
    pub event: Bytes,
    /// Who wants to know what became of it.
    pub answer: Answer,
}

/// Where the outcome of a publish goes.
#[derive(Debug)]
pub enum Answer {
    /// To a connection, by [`BusMessage::Published`]. The reference is the client's own, as JSON text.
    Connection(ConnectionId, Option<Box<str>>),
    /// To whoever waits, as the admin listener does.
    Waiter(oneshot::Sender<Result<EventId, PublishError>>),
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
}

/// Why a channel can't be followed, or a page not read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    #[error("the bus is unavailable: {0}")]
    Unavailable(Arc<str>),
    #[error("the node already follows --max-channels channels")]
    TooManyChannels,
}

/// What the bus sends to a shard, which handles it in the order sent.
#[derive(Debug)]
pub enum BusMessage {
    /// The channel is followed from here on. Where another shard gave it, the bus's next entries may have come
    /// before it.
    Followed {
        /// The channel.
        channel: ChannelName,
        /// Its last anchor.
        base: EventId,
        /// The id after which the bus's entries begin.
        position: EventId,
        /// What another shard has of the time before, up to the position.
        recent: Vec<Entry>,
    },
    /// Another shard follows the channel from here on: tell it so, and give it what is in memory.
    Share {
        /// The channel.
        channel: ChannelName,
        /// Its last anchor.
        base: EventId,
        /// The position of every shard that has all that was told so far.
        position: EventId,
        /// Whom to tell.
        with: ShardId,
    },
    /// The channel can't be followed now; the shard may ask again.
    NotFollowed {
        /// The channel.
        channel: ChannelName,
        /// Why.
        why: BusError,
    },
    /// The channel's next entry.
    Entry {
        /// The channel.
        channel: ChannelName,
        /// Framed events, or a reset mark.
        entry: Entry,
        /// When it came to this node.
        arrived: Instant,
    },
    /// The answer to [`Request::Read`].
    Page {
        /// The channel.
        channel: ChannelName,
        /// The position that was asked for.
        position: EventId,
        /// What history holds of it.
        result: Result<Arc<Page>, BusError>,
    },
    /// The answer to [`Request::Refresh`]; entries found by it came before.
    Refreshed {
        /// The channel.
        channel: ChannelName,
        /// An error when the bus could not be asked.
        result: Result<(), BusError>,
    },
    /// The outcome of a connection's publish.
    Published {
        /// Whose publish.
        connection: ConnectionId,
        /// The client's own reference, as JSON text.
        reference: Option<Box<str>>,
        /// The event's id, or why there is none.
        result: Result<EventId, PublishError>,
    },
}

/// Sends messages to the shards of this node. Sending never waits: a shard empties its mailbox at every turn. A message
/// to a shard that has ended is dropped.
pub trait ShardSender: fmt::Debug + Send + Sync {
    /// How many shards there are.
    fn count(&self) -> usize;

    /// Sends a message to one shard.
    fn send(&self, shard: ShardId, message: BusMessage);

    /// Sends [`BusMessage::Followed`] to the shard `with`. Where another shard follows the channel already it goes through
    /// that one, which adds its recent entries, so that a client finds the same on every shard.
    fn share(
        &self,
        channel: ChannelName,
        base: EventId,
        position: EventId,
        from: Option<&ShardId>,
        with: ShardId,
    ) {
        match from {
            Some(from) => self.send(*from, BusMessage::Share { channel, base, position, with }),
            None => self.send(with, BusMessage::Followed { channel, base, position, recent: Vec::new() }),
        }
    }

    /// Sends the outcome of a publish to whoever asked for it.
    fn answer(&self, answer: Answer, result: Result<EventId, PublishError>) {
        match answer {
            Answer::Connection(connection, reference) => {
                self.send(connection.shard, BusMessage::Published { connection, reference, result });
            }
            Answer::Waiter(waiter) => {
                let _ = waiter.send(result); // nobody waits any more
            }
        }
    }
}

/// The way to the bus: cloned by every shard and the admin listener.
pub type Requests = mpsc::UnboundedSender<Request>;

/// What a bus works with.
#[derive(Debug)]
pub struct BusContext {
    /// What it is asked.
    pub requests: mpsc::UnboundedReceiver<Request>,
    /// Whom it tells.
    pub shards: Arc<dyn ShardSender>,
    /// What it counts.
    pub metrics: Arc<BusMetrics>,
    /// Where it says whether it works.
    pub readiness: Arc<Readiness>,
}

/// A bus that can't go on at all, however long one waits.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{0}")]
pub struct Unusable(pub String);

/// Runs the bus that the settings name until every sender of requests is gone.
pub async fn run(settings: &Settings, wiring: BusContext) -> Result<(), Unusable> {
    match &settings.redis {
        None => {
            local::run(settings, wiring).await;
            Ok(())
        }
        Some(url) => redis::run(settings, url, wiring).await,
    }
}
