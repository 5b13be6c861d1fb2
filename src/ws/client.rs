//! What a client is and may do, and its request to join a channel.

use bytes::Bytes;

use crate::auth::token::NEVER;
use crate::protocol::event::{ChannelName, EventId};

/// What the handshake settled about a client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Client {
    /// Empty until the connection is counted for its user.
    pub user: Box<str>,
    /// When its token expires, in seconds since 1970.
    pub expires: u32,
    /// The client gets recovery frames.
    pub wants_recovery: bool,
    /// The client speaks `fanfare.v1`.
    pub json_mode: bool,
    pub may_publish: bool,
}

impl Default for Client {
    fn default() -> Client {
        Client {
            user: Box::default(),
            expires: NEVER,
            wants_recovery: false,
            json_mode: false,
            may_publish: false,
        }
    }
}

/// Most events before the head that a newcomer may ask for.
pub const HISTORY_MAX: u8 = 100;

/// The last event that a client says it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LastSeen {
    /// None. The newcomer gets this many of the channel's events before the head, at most
    /// [`HISTORY_MAX`], and all events from now on.
    Newcomer {
        history: u8,
    },
    /// None. The newcomer gets the events after this id, or as many as history holds.
    NewcomerAfter(EventId),
    Event(EventId),
    /// A value that is not an id.
    Unknown,
}

/// A request to join a channel that passed all checks of the handshake.
#[derive(Debug)]
pub struct Join {
    pub client: Client,
    pub channel: ChannelName,
    pub last_seen: LastSeen,
    /// The 101 response.
    pub response: Bytes,
}
