//! Why a connection was closed: one name for close code, log field and metric label.

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum CloseReason {
    /// The client closed, with or without a code.
    ClosedByPeer,
    /// The TCP connection broke without a close frame.
    ConnectionLost,
    /// The client violated RFC 6455.
    Protocol,
    /// A binary message: events are JSON text.
    Binary,
    /// A text message that is not UTF-8.
    InvalidText,
    /// A message longer than `--max-message-size`.
    MessageTooBig,
    /// A message that was not complete in time.
    MessageTimeout,
    /// No frame within `--ping-interval` and `--ping-timeout`.
    PingTimeout,
    /// Events were missed, and the client did not ask for recovery frames.
    MissedEvents,
    /// A message was not published, and the client did not ask for recovery frames.
    PublishFailed,
    /// The node is stopping.
    Draining,
    /// The request got an HTTP response instead of an upgrade.
    HttpResponse,
    /// The request was not complete in time.
    RequestTimeout,
    /// The `Origin` is not in `--allow-origin`.
    OriginNotAllowed,
    /// The client may not join the channel, or may not publish and did not ask for recovery frames.
    Forbidden,
    /// The token is missing, invalid or expired.
    Unauthorized,
    /// The token expired while the client was connected.
    TokenExpired,
    /// Over `--max-message-rate` or `--max-byte-rate` without error frames, or again after them; or
    /// too many new channels.
    RateLimited,
    /// A new token of the client does not allow its default channel.
    ChannelForbidden,
    /// A backend has disconnected the user, from all channels or from the connection's default one.
    Disconnected,
    /// The user is banned.
    Banned,
    /// `--max-connections` is reached.
    NodeLimit,
    /// `--max-connections-per-ip` is reached.
    IpLimit,
    /// `--max-connections-per-user` is reached.
    UserLimit,
    /// A PROXY header or `X-Forwarded-For` from an address that is not in `--trusted-proxy`.
    ProxyNotTrusted,
    /// The socket is full, and the node keeps too many bytes for such clients. No close frame would
    /// get through.
    SlowReader,
}

/// Close code of connections that a backend has closed. Final: clients do not retry.
const DISCONNECTED: u16 = 4010;

pub const REASONS: usize = 26;

/// Indexed by [`CloseReason`].
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
    "channel_forbidden",
    "disconnected",
    "banned",
    "node_limit",
    "ip_limit",
    "user_limit",
    "proxy_not_trusted",
    "slow_reader",
];

const _: () = assert!(CloseReason::SlowReader as usize + 1 == REASONS);

impl CloseReason {
    pub fn label(self) -> &'static str {
        LABELS[self as usize]
    }

    /// Close code (RFC 6455 section 7.4; 4000 and above are fanfare's) and reason text; `None` if
    /// no close frame is sent.
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
            CloseReason::ChannelForbidden => Some((4403, "the token does not allow this channel")),
            CloseReason::Disconnected => Some((DISCONNECTED, "disconnected by the application")),
            CloseReason::Banned => Some((DISCONNECTED, "banned by the application")),
            CloseReason::RateLimited => Some((4029, "rate limit exceeded")),
            CloseReason::PublishFailed => Some((1013, "not published: try again later")),
            CloseReason::Draining => Some((1012, "the node is restarting: reconnect")),
        }
    }
}

/// Close code of a connection that is rejected with this HTTP status and for this reason, if its
/// client gets a close frame in place of the response. These codes are final: clients do not retry.
/// `None` for other statuses, which stay HTTP responses.
pub fn rejection_code(status: u16, reason: CloseReason) -> Option<u16> {
    match status {
        403 if matches!(reason, CloseReason::Disconnected | CloseReason::Banned) => Some(DISCONNECTED),
        400 => Some(4400),
        401 => Some(4401),
        403 => Some(4403),
        _ => None,
    }
}
