//! What a client asks for in the handshake.

use bytes::Bytes;

use crate::protocol::event::{ChannelName, EventId};

/// What a client said about the last event it saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LastSeen {
    /// Nothing yet: it wants what comes from now on.
    Nothing,
    /// This one.
    Event(EventId),
    /// Something that is no id.
    Unknown,
}

/// A request to join a channel that passed every check of the handshake.
#[derive(Debug)]
pub struct Join {
    /// Who.
    pub user: Box<str>,
    /// Where.
    pub channel: ChannelName,
    /// From which event on.
    pub last_seen: LastSeen,
    /// Whether the client gets recovery frames.
    pub wants_recovery: bool,
    /// Whether it speaks `fanfare.v1`.
    pub json_mode: bool,
    /// Whether it may publish.
    pub may_publish: bool,
    /// When its token ends, in seconds since 1970.
    pub expires: u32,
    /// The 101 response.
    pub response: Bytes,
}
