//! Rejections of connections before they have joined.

use std::time::Duration;

use crate::auth::token::InvalidToken;
use crate::http::Rejection;
use crate::protocol::close::CloseReason;

/// The client has named too many new channels.
pub fn too_many_channels() -> Rejection {
    let text = "too many new channels in a minute: join a channel that has clients, or try later";
    Rejection::new(429, text).with("Retry-After", "5").because(CloseReason::RateLimited)
}

/// The node is stopping. A proxy asks another node at once.
pub fn stopping() -> Rejection {
    Rejection::unavailable("this node is stopping").because(CloseReason::Draining)
}

/// The client has sent bytes after its request, before it was answered.
pub fn early_data() -> Rejection {
    Rejection::new(400, "data after the request, before the upgrade was answered")
}

/// The client has closed its side in the middle of the request.
pub fn incomplete() -> Rejection {
    Rejection::new(400, "the request ended before it was complete")
}

pub fn timeout() -> Rejection {
    let text = "the request was not complete in time";
    Rejection::new(408, text).because(CloseReason::RequestTimeout)
}

pub(super) fn malformed_preamble() -> Rejection {
    Rejection::new(400, "the PROXY header is malformed")
}

/// The peer sends headers of a proxy and is not a trusted one.
pub(super) fn untrusted(headers_are: &str) -> Rejection {
    let advice = "if this peer is one, add its address to --trusted-proxy";
    Rejection::new(400, format!("{headers_are} accepted from trusted proxies only: {advice}"))
        .because(CloseReason::ProxyNotTrusted)
}

pub(super) fn invalid_forwarded_for() -> Rejection {
    Rejection::new(400, "X-Forwarded-For has no valid client address")
}

pub(super) fn origin_not_allowed() -> Rejection {
    let text = "origin not allowed: add it to --allow-origin, or have the proxy forward the Host header";
    Rejection::new(403, text).because(CloseReason::OriginNotAllowed)
}

/// A page uses a name for this machine that is not `localhost`.
pub(super) fn host_not_allowed() -> Rejection {
    let text = "host not allowed on loopback: use localhost, or add the site to --allow-origin or the proxy to \
        --trusted-proxy";
    Rejection::new(403, text).because(CloseReason::OriginNotAllowed)
}

pub(super) fn unauthorized(text: &'static str) -> Rejection {
    Rejection::new(401, text).with("WWW-Authenticate", "Bearer").because(CloseReason::Unauthorized)
}

/// The client gets the same text for each reason, since a reason would help to guess.
pub fn invalid_token(user: &str, reason: &InvalidToken) -> Rejection {
    unauthorized("token invalid or expired for this user")
        .logged(reason.label(), format!("the token for user \"{user}\" is not valid: {reason}"))
}

/// The user is banned for this much longer.
pub(super) fn banned(left: Duration) -> Rejection {
    let seconds = left.as_secs() + 1; // not before the end
    Rejection::new(403, "banned by the application")
        .with("Retry-After", seconds.to_string())
        .because(CloseReason::Banned)
}

/// A backend has disconnected the user while the connection was joining its channel.
pub fn disconnected(reason: CloseReason) -> Rejection {
    let text = reason.close().map_or("", |(_, text)| text);
    Rejection::new(403, text).because(reason)
}

/// Clients in plain mode can't subscribe to channels.
pub(super) fn no_channel() -> Rejection {
    Rejection::new(400, "name a channel, or use fanfare.v1")
}

pub(super) fn forbidden_channel() -> Rejection {
    Rejection::new(403, "the token does not allow this channel").because(CloseReason::Forbidden)
}
