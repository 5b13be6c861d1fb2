//! Why a connection ended: one name that gives the close code, the log field and the metric label.

/// Why a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum CloseReason {
    /// The client closed, with or without a code.
    ClosedByPeer,
    /// The client went away without a word.
    ConnectionLost,
    /// It broke the WebSocket protocol (RFC 6455).
    Protocol,
    /// It sent a binary message; events are JSON text.
    Binary,
    /// It sent text that is not UTF-8.
    InvalidText,
    /// It sent a message longer than `--max-message-size`.
    MessageTooBig,
    /// It began a message and did not end it.
    MessageTimeout,
    /// It was silent for heartbeat and timeout together.
    PingTimeout,
    /// Events were missed and it has no way to be told but this one.
    MissedEvents,
    /// Its message could not be published and it has no way to be told but this one.
    PublishFailed,
    /// The node is stopping.
    Draining,
    /// Its request got an HTTP answer instead of an upgrade.
    HttpResponse,
    /// Its request was not complete in time.
    RequestTimeout,
    /// It is a page of a site that may not connect.
    OriginNotAllowed,
    /// It may not join that channel; or it sent what it may not publish, and has no way to be told but this one.
    Forbidden,
    /// Its token is missing, bad or over.
    Unauthorized,
    /// Its token has ended while it was connected.
    TokenExpired,
    /// It sent faster than `--max-message-rate` or `--max-byte-rate` and gets no error frames, or went on after them; or it
    /// named too many new channels.
    RateLimited,
    /// The node has all the connections it may have.
    NodeLimit,
    /// Its address has all the connections it may have.
    IpLimit,
    /// Its user has all the connections they may have.
    UserLimit,
    /// It speaks as a proxy and is none that is trusted.
    ProxyNotTrusted,
    /// Its socket is full, and the node keeps too much for such clients. No close frame would get through.
    SlowReader,
}

/// How many reasons there are.
pub const REASONS: usize = 23;

/// Every reason's label, by number.
pub const LABELS: [&str; REASONS] = [
    "closed_by_peer",
    "connection_lost",
    "protocol",
    "binary",
    "invalid_text",
    "message_too_big",
    "message_timeout",
    "ping_timeout",
    "missed_events",
    "publish_failed",
    "draining",
    "http_response",
    "request_timeout",
    "origin_not_allowed",
    "forbidden",
    "unauthorized",
    "token_expired",
    "rate_limited",
    "node_limit",
    "ip_limit",
    "user_limit",
    "proxy_not_trusted",
    "slow_reader",
];

const _: () = assert!(CloseReason::SlowReader as usize + 1 == REASONS);

impl CloseReason {
    /// The label in logs and metrics.
    pub fn label(self) -> &'static str {
        LABELS[self as usize]
    }

    /// The close code (RFC 6455 section 7.4; 4000 and above are ours) and the reason sent with it; `None` where
    /// no close frame of ours is sent.
    pub fn close(self) -> Option<(u16, &'static str)> {
        match self {
            CloseReason::ClosedByPeer
            | CloseReason::ConnectionLost
            | CloseReason::HttpResponse
            | CloseReason::RequestTimeout
            | CloseReason::OriginNotAllowed
            | CloseReason::Unauthorized
            | CloseReason::NodeLimit
            | CloseReason::IpLimit
            | CloseReason::UserLimit
            | CloseReason::ProxyNotTrusted
            | CloseReason::SlowReader => None,
            CloseReason::Protocol => Some((1002, "protocol error")),
            CloseReason::Binary => Some((1003, "binary messages not supported")),
            CloseReason::InvalidText => Some((1007, "text must be UTF-8")),
            CloseReason::MessageTooBig => Some((1009, "message too big")),
            CloseReason::MessageTimeout => Some((1008, "message not completed in time")),
            CloseReason::PingTimeout => Some((4009, "ping timeout")),
            CloseReason::MissedEvents => Some((4008, "events were missed: reconnect")),
            CloseReason::Forbidden => Some((4003, "this client may not publish here")),
            CloseReason::TokenExpired => Some((4001, "token expired")),
            CloseReason::RateLimited => Some((4029, "rate limit exceeded")),
            CloseReason::PublishFailed => Some((1013, "not published: try again later")),
            CloseReason::Draining => Some((1012, "the node is restarting: reconnect")),
        }
    }
}
