//! The opening handshake: from the bytes of a request to a client that may join, or to an HTTP
//! response.

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;

use crate::auth::keys::KeyRing;
use crate::config::Settings;
use crate::http::proxy::{self, InvalidAddress, Preamble};
use crate::http::{self, Head, Rejection, Response, page};
use crate::limits::connections::{ConnectionLimits, ConnectionSlot, LimitReached};
use crate::metrics::Readiness;
use crate::ws::client::Join;

pub mod rejections;
mod subprotocol;
mod upgrade;

/// What a request leads to.
#[derive(Debug)]
pub enum HandshakeOutcome {
    /// More bytes are needed. The caller drops this many of the given ones: they were handled.
    Incomplete(usize),
    /// The client may join as soon as the bus has answered.
    Join(Box<Join>),
    /// A response to a plain request. The connection is closed after it.
    Respond(Response),
    /// The connection is rejected, and closed after the response.
    Reject(Rejection),
    /// The connection is rejected in the same way, but with these bytes in place of the response: an
    /// upgrade and a close frame.
    RejectUpgraded(Rejection, Bytes),
}

/// What a handshake needs of its node.
#[derive(Clone, Debug)]
pub struct HandshakeContext {
    pub settings: Arc<Settings>,
    pub readiness: Arc<Readiness>,
    pub keys: Arc<KeyRing>,
    /// Counts connections, and knows the trusted proxies.
    pub limits: Arc<ConnectionLimits>,
    /// Public listeners on loopback addresses.
    pub loopback: Arc<[SocketAddr]>,
}

impl HandshakeContext {
    /// Whether a connection came to a loopback listener, and not from a trusted proxy, which may
    /// forward requests for other hosts.
    pub fn is_loopback(&self, stream: &mio::net::TcpStream) -> bool {
        let to_loopback = || stream.local_addr().is_ok_and(|addr| self.loopback.contains(&addr));
        let from_proxy = || stream.peer_addr().is_ok_and(|peer| self.limits.trusts(peer.ip()));
        !self.loopback.is_empty() && to_loopback() && !from_proxy()
    }
}

/// Reads the bytes of a request on a public listener. Returns what it leads to, and the slot of the
/// connection: another one if a trusted proxy has reported the client address. `is_loopback` calls
/// [`HandshakeContext::is_loopback`], which takes system calls: only some requests need it.
pub fn decide(
    bytes: &[u8],
    context: &HandshakeContext,
    connection_slot: ConnectionSlot,
    is_loopback: &dyn Fn() -> bool,
) -> (HandshakeOutcome, ConnectionSlot) {
    let mut slot = connection_slot;
    let outcome = read(bytes, context, &mut slot, is_loopback).unwrap_or_else(HandshakeOutcome::Reject);
    (outcome, slot)
}

fn read(
    bytes: &[u8],
    context: &HandshakeContext,
    connection_slot: &mut ConnectionSlot,
    is_loopback: &dyn Fn() -> bool,
) -> Result<HandshakeOutcome, Rejection> {
    let (request, skipped) = skip_preambles(bytes, context, connection_slot)?;
    let Some(request) = request else { return Ok(HandshakeOutcome::Incomplete(skipped)) };
    let Some((head, length)) = http::parse(request)? else {
        return Ok(HandshakeOutcome::Incomplete(skipped));
    };
    let Some(user) = head.path.strip_prefix("/ws/") else {
        let response = respond(&head, &context.readiness);
        return Ok(HandshakeOutcome::Respond(response.answering(&head)));
    };
    let has_more = request.len() > length;
    set_client(&head, context, connection_slot).map_err(|rejection| rejection.answering(&head))?;
    Ok(upgrade::decide(&head, user, has_more, context, is_loopback))
}

/// Skips the PROXY headers of trusted proxies, one from each that the connection has passed.
/// Returns the bytes after them, or `None` if a header is incomplete; and how many bytes the caller
/// may drop.
fn skip_preambles<'b>(
    bytes: &'b [u8],
    context: &HandshakeContext,
    connection_slot: &mut ConnectionSlot,
) -> Result<(Option<&'b [u8]>, usize), Rejection> {
    let mut skipped = 0;
    let mut rest = bytes;
    while connection_slot.is_proxy() {
        match proxy::preamble(rest) {
            Preamble::Absent => return Ok((Some(rest), skipped)),
            Preamble::Partial => return Ok((None, skipped)),
            Preamble::Malformed => return Err(rejections::malformed_preamble()),
            Preamble::Header { client: Some(client), length } => {
                skipped += length;
                rest = &bytes[skipped..];
                context.limits.set_client(connection_slot, client).map_err(over_limit)?;
            }
            // The proxy has not reported a client, so no other proxy is before it: another PROXY
            // header is rejected. The caller keeps this header, since nothing else remembers it.
            Preamble::Header { client: None, length } => {
                rest = &rest[length..];
                break;
            }
        }
    }
    if proxy::is_preamble(rest) {
        return Err(rejections::untrusted("PROXY headers are"));
    }
    Ok((Some(rest), skipped))
}

/// Counts the connection for the client address in `X-Forwarded-For`. Fails if it is over a limit.
fn set_client(
    head: &Head<'_>,
    context: &HandshakeContext,
    connection_slot: &mut ConnectionSlot,
) -> Result<(), Rejection> {
    if connection_slot.limit_reached().is_none() && head.count("x-forwarded-for") > 0 {
        if !connection_slot.is_proxy() {
            return Err(rejections::untrusted("X-Forwarded-For is"));
        }
        match proxy::forwarded_for(head, |ip| context.limits.trusts(ip)) {
            Err(InvalidAddress) => return Err(rejections::invalid_forwarded_for()),
            Ok(None) => {}
            Ok(Some(client)) => context.limits.set_client(connection_slot, client).map_err(over_limit)?,
        }
    }
    connection_slot.limit_reached().map_or(Ok(()), |limit| Err(over_limit(limit)))
}

fn over_limit(limit: LimitReached) -> Rejection {
    limit.rejection().clone()
}

/// The response to a request that is not for a WebSocket.
fn respond(head: &Head<'_>, readiness: &Readiness) -> Response {
    let file = page::find(head.path);
    if file.is_none() && !matches!(head.path, "/healthz" | "/readyz" | "/ws") {
        return Response::line(404, "not found: the WebSocket is at /ws/{user_id}, the demo page at /");
    }
    let allowed = if head.path == "/ws" { "GET" } else { "GET, HEAD" };
    if !allowed.split(", ").any(|method| method == head.method) {
        return Response::line(405, &format!("{} accepts {allowed}", head.path)).with("Allow", allowed);
    }
    match file {
        Some(file) => file.response(),
        None if head.path == "/healthz" => Response::line(200, "ok"),
        None if head.path == "/ws" => Response::line(400, "the user id is missing: connect to /ws/{user_id}"),
        // The reason is for operators: on the admin listener and in the log.
        None => match readiness.not_ready_reason() {
            None => Response::line(200, "ready"),
            Some(_) => Response::line(503, "not ready").with("Retry-After", "1"),
        },
    }
}

#[cfg(test)]
mod tests;
