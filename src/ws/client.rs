//! What a client is and may do, and its request to join a channel.

use bytes::Bytes;

use crate::auth::token::{Grant, NEVER};
use crate::config::{ClientPublish, Settings};
pub use crate::protocol::client_frame::HISTORY_MAX;
use crate::protocol::event::{ChannelName, EventId};

/// Nobody knows who is in the channel.
pub const NOT_TRACKED: &str = "this server does not track the presence of users in this channel";

/// What the handshake settled about a client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Client {
    /// Empty until the connection is counted for its user.
    pub user: Box<str>,
    /// When its token expires, in seconds since 1970.
    pub expires: u32,
    pub mode: Mode,
    /// Whether it may publish in its default channel.
    pub may_publish: bool,
    pub other_channels: OtherChannels,
    /// Whether it has got a `token_expiring` frame for its token.
    pub knows_expiry: bool,
}

/// What a client sends and gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Text, and events alone.
    Plain,
    /// Text, and recovery frames with the events.
    Recovering,
    /// The frames of `fanfare.v1`, recovery frames among them.
    Json,
}

/// What a client may do in other channels than its default one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OtherChannels {
    /// Follow all of them, and publish in them.
    All,
    Nothing,
    /// What its token says, which is kept.
    ByGrant,
}

impl Client {
    /// Whether it gets recovery frames.
    pub fn wants_recovery(&self) -> bool {
        self.mode != Mode::Plain
    }

    pub fn is_json(&self) -> bool {
        self.mode == Mode::Json
    }

    /// Sets its rights to those of a token, or to all if there is none. Returns the grant if it
    /// must be kept for other channels than `channel`, the default one.
    pub fn set_rights(
        &mut self,
        grant: Option<Grant>,
        channel: Option<&ChannelName>,
        settings: &Settings,
    ) -> Option<Box<Grant>> {
        let publishes = |grant: &Grant| channel.is_some_and(|channel| grant.may_publish(channel));
        self.may_publish =
            settings.client_publish != ClientPublish::Off && grant.as_ref().is_none_or(publishes);
        self.expires = grant.as_ref().map_or(NEVER, |grant| grant.expires);
        self.knows_expiry = false;
        let (kept, rights) = match grant {
            None => (None, OtherChannels::All),
            Some(grant) if grant.is_unrestricted() => (None, OtherChannels::All),
            Some(grant) if grant.allows_only(channel) => (None, OtherChannels::Nothing),
            Some(grant) => (Some(Box::new(grant)), OtherChannels::ByGrant),
        };
        self.other_channels = rights;
        kept
    }
}

impl Default for Client {
    fn default() -> Client {
        Client {
            user: Box::default(),
            expires: NEVER,
            mode: Mode::Plain,
            may_publish: false,
            other_channels: OtherChannels::Nothing,
            knows_expiry: false,
        }
    }
}

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
    /// `None`: no default channel.
    pub channel: Option<ChannelName>,
    pub last_seen: LastSeen,
    /// Whether the client wants to know who is in the channel.
    pub presence: bool,
    /// The token's, for [`OtherChannels::ByGrant`].
    pub grant: Option<Box<Grant>>,
    /// The 101 response.
    pub response: Bytes,
}
