//! Why a connection ended: one name that gives the close code, the log field and the metric label.

/// Why a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Reason {
    /// The client closed, with or without a code.
    ClosedByPeer,
    /// The client went away without a word.
    PeerGone,
    /// It broke the WebSocket protocol (RFC 6455).
    Protocol,
    /// It sent a binary message; events are JSON text.
    Binary,
    /// It sent text that is not UTF-8.
    InvalidText,
    /// It sent a message longer than `--max-message`.
    TooLong,
    /// It began a message and did not end it.
    Unfinished,
    /// It was silent for heartbeat and timeout together.
    HeartbeatTimeout,
    /// Events were missed and it has no way to be told but this one.
    MissedEvents,
    /// Its message could not be published and it has no way to be told but this one.
    PublishFailed,
    /// The node is stopping.
    Draining,
    /// Its request got an HTTP answer instead of an upgrade.
    Answered,
    /// Its request was not complete in time.
    RequestTimeout,
    /// It is a page of a site that may not connect.
    ForeignOrigin,
    /// It may not join that channel; or it sent what it may not publish, and has no way to be told but this one.
    Forbidden,
    /// Its token is missing, bad or over.
    Unauthorized,
    /// Its token has ended while it was connected.
    TokenExpired,
    /// It sent faster than `--message-rate` or `--max-byte-rate` and gets no error frames, or went on after them; or it
    /// named too many new channels.
    TooFast,
    /// The node has all the connections it may have.
    NodeFull,
    /// Its address has all the connections it may have.
    AddressFull,
    /// Its user has all the connections they may have.
    UserFull,
    /// It speaks as a proxy and is none that is trusted.
    UntrustedProxy,
    /// Its socket is full, and the node keeps too much for such clients. No close frame would get through.
    SlowReader,
}

/// How many reasons there are.
pub const REASONS: usize = 23;

/// Every reason's label, by number.
pub const LABELS: [&str; REASONS] = [
    "closed_by_peer",
    "peer_gone",
    "protocol",
    "binary",
    "invalid_text",
    "too_long",
    "unfinished",
    "heartbeat_timeout",
    "missed_events",
    "publish_failed",
    "draining",
    "answered",
    "request_timeout",
    "foreign_origin",
    "forbidden",
    "unauthorized",
    "token_expired",
    "too_fast",
    "node_full",
    "address_full",
    "user_full",
    "untrusted_proxy",
    "slow_reader",
];

const _: () = assert!(Reason::SlowReader as usize + 1 == REASONS);

impl Reason {
    /// The label in logs and metrics.
    pub fn label(self) -> &'static str {
        LABELS[self as usize]
    }

    /// The close code (RFC 6455 section 7.4; 4000 and above are ours) and the reason sent with it; `None` where
    /// no close frame of ours is sent.
    pub fn close(self) -> Option<(u16, &'static str)> {
        match self {
            Reason::ClosedByPeer
            | Reason::PeerGone
            | Reason::Answered
            | Reason::RequestTimeout
            | Reason::ForeignOrigin
            | Reason::Unauthorized
            | Reason::NodeFull
            | Reason::AddressFull
            | Reason::UserFull
            | Reason::UntrustedProxy
            | Reason::SlowReader => None,
            Reason::Protocol => Some((1002, "protocol error")),
            Reason::Binary => Some((1003, "only text messages are taken")),
            Reason::InvalidText => Some((1007, "text must be UTF-8")),
            Reason::TooLong => Some((1009, "message too long")),
            Reason::Unfinished => Some((1008, "a message was begun and not ended")),
            Reason::HeartbeatTimeout => Some((4009, "heartbeat timeout")),
            Reason::MissedEvents => Some((4008, "events were missed: reconnect")),
            Reason::Forbidden => Some((4003, "this client may not publish here")),
            Reason::TokenExpired => Some((4001, "token expired")),
            Reason::TooFast => Some((4029, "messages came too fast")),
            Reason::PublishFailed => Some((1013, "not published: try again later")),
            Reason::Draining => Some((1012, "the node is restarting: reconnect")),
        }
    }
}
