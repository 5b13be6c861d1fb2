//! From a request's bytes to a client who may join, or to an HTTP answer.

use std::borrow::Cow;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::{BufMut, Bytes, BytesMut};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use crate::auth::keys::{self, KeyRing};
use crate::auth::token::{self, Grant, InvalidToken, NEVER};
use crate::config::{ClientPublish, Settings};
use crate::http::origin;
use crate::http::page;
use crate::http::proxy::{self, Preamble, Unreadable};
use crate::http::{self, BodyLength, Head, Refusal, Response};
use crate::limits::connections::{ConnectionLimits, ConnectionSlot, LimitReached};
use crate::metrics::Readiness;
use crate::protocol::close::CloseReason;
use crate::protocol::event::{ChannelName, DEFAULT_CHANNEL, EventId, is_user_id};
use crate::ws::connection::{Join, LastSeen};

/// The subprotocol of JSON mode.
pub const SUBPROTOCOL: &str = "fanfare.v1";

const UNTRUSTED_PREAMBLE: &str = "a PROXY header is taken from trusted proxies alone: if this peer is one of yours, name its address with --trusted-proxy";
const UNTRUSTED_FORWARD: &str = "X-Forwarded-For is taken from trusted proxies alone: if this peer is one of yours, name its address with --trusted-proxy";
const UNREADABLE_FORWARD: &str = "X-Forwarded-For has no readable address where the client's must be";
const FOREIGN_ORIGIN: &str =
    "pages of this origin may not connect here: name it with --allow-origin, or have the proxy pass on Host";
const FOREIGN_HOST: &str = "pages may use this address only as localhost or 127.0.0.1: name their site with --allow-origin, or the proxy with --trusted-proxy";
const TOO_EARLY: &str = "nothing may follow the request before the upgrade is answered";

/// What a request leads to.
#[derive(Debug)]
pub enum HandshakeOutcome {
    /// More bytes are needed. So many of these are read for good, and not to be shown again.
    Incomplete(usize),
    /// The client may join, once the bus agrees.
    Join(Box<Join>),
    /// What was asked for, after which the connection ends.
    Answer(Bytes),
    /// Why there is no upgrade, after which the connection ends for this reason.
    Reject(Bytes, CloseReason),
}

/// What decides over requests.
#[derive(Clone, Debug)]
pub struct HandshakeContext {
    /// Who may come in.
    pub settings: Arc<Settings>,
    /// Whether the node takes clients.
    pub readiness: Arc<Readiness>,
    /// The keys of tokens.
    pub keys: Arc<KeyRing>,
    /// The counts of connections, and the trusted proxies.
    pub limits: Arc<ConnectionLimits>,
    /// Public listeners on loopback addresses.
    pub loopback: Arc<[SocketAddr]>,
}

impl HandshakeContext {
    /// Whether this is a connection to a loopback listener, and not from a trusted proxy, which may pass on other hosts.
    pub fn is_loopback(&self, stream: &mio::net::TcpStream) -> bool {
        let came_to = || stream.local_addr().is_ok_and(|addr| self.loopback.contains(&addr));
        let from_proxy = || stream.peer_addr().is_ok_and(|peer| self.limits.trusts(peer.ip()));
        !self.loopback.is_empty() && came_to() && !from_proxy()
    }
}

/// A request that is not served: the answer, and the reason to count it under.
struct Refused(Refusal, CloseReason);

impl From<Refusal> for Refused {
    fn from(refusal: Refusal) -> Refused {
        Refused(refusal, CloseReason::HttpResponse)
    }
}

/// Reads the bytes of a request on a public listener and decides. `place` is the connection's; it changes when a
/// trusted proxy names the client. `loopback` is the result of [`HandshakeContext::is_loopback`].
pub fn decide(
    bytes: &[u8],
    context: &HandshakeContext,
    connection_slot: &mut ConnectionSlot,
    loopback: bool,
) -> HandshakeOutcome {
    let (request, read) = match after_preambles(bytes, context, connection_slot) {
        Ok(found) => found,
        Err(outcome) => return outcome,
    };
    let (head, length) = match http::parse(request) {
        Ok(None) => return HandshakeOutcome::Incomplete(read),
        Ok(Some(parsed)) => parsed,
        Err(refusal) => {
            return HandshakeOutcome::Reject(
                Response::from(refusal).to_closing_bytes(),
                CloseReason::HttpResponse,
            );
        }
    };
    let decided = match head.path.strip_prefix("/ws/") {
        Some(user) => match name_client(&head, context, connection_slot) {
            Ok(()) => upgrade(&head, user, request.len() > length, context, loopback),
            Err(Unseated::LimitReached(limit)) => return reject_full(limit),
            Err(Unseated::Refused(refused)) => Err(refused),
        },
        None => {
            let response = plain(&head, &context.readiness);
            return HandshakeOutcome::Answer(response.to_bytes(&head, false));
        }
    };
    match decided {
        Ok(join) => HandshakeOutcome::Join(Box::new(join)),
        Err(Refused(refusal, reason)) => {
            HandshakeOutcome::Reject(Response::from(refusal).to_bytes(&head, false), reason)
        }
    }
}

/// The bytes after the PROXY headers of trusted proxies, one from each that the connection has passed, and how many bytes
/// the caller may drop.
fn after_preambles<'b>(
    bytes: &'b [u8],
    context: &HandshakeContext,
    connection_slot: &mut ConnectionSlot,
) -> Result<(&'b [u8], usize), HandshakeOutcome> {
    let refuse = |text, reason| {
        Err(HandshakeOutcome::Reject(Response::from(Refusal::new(400, text)).to_closing_bytes(), reason))
    };
    let mut read = 0;
    let mut rest = bytes;
    while connection_slot.is_proxy() {
        match proxy::preamble(rest) {
            Preamble::Absent => return Ok((rest, read)),
            Preamble::Partial => return Err(HandshakeOutcome::Incomplete(read)),
            Preamble::Broken => return refuse("the PROXY header can't be read", CloseReason::HttpResponse),
            Preamble::Header { client: Some(client), length } => {
                read += length;
                rest = &bytes[read..];
                context.limits.name_client(connection_slot, client).map_err(reject_full)?;
            }
            // It names no client, so no proxy has written what follows: another PROXY header is refused. The caller keeps
            // this one, since nothing else remembers it.
            Preamble::Header { client: None, length } => {
                rest = &rest[length..];
                break;
            }
        }
    }
    if proxy::is_preamble(rest) {
        return refuse(UNTRUSTED_PREAMBLE, CloseReason::ProxyNotTrusted);
    }
    Ok((rest, read))
}

/// Why a client gets no seat.
enum Unseated {
    LimitReached(LimitReached),
    Refused(Refused),
}

/// Takes the client's address from `X-Forwarded-For`, and sees to it that it has a seat.
fn name_client(
    head: &Head<'_>,
    context: &HandshakeContext,
    connection_slot: &mut ConnectionSlot,
) -> Result<(), Unseated> {
    let refused = |text, reason| Err(Unseated::Refused(Refused(Refusal::new(400, text), reason)));
    if connection_slot.limit_reached().is_none() && head.count("x-forwarded-for") > 0 {
        if !connection_slot.is_proxy() {
            return refused(UNTRUSTED_FORWARD, CloseReason::ProxyNotTrusted);
        }
        match proxy::forwarded_for(head, |ip| context.limits.trusts(ip)) {
            Err(Unreadable) => return refused(UNREADABLE_FORWARD, CloseReason::HttpResponse),
            Ok(None) => {}
            Ok(Some(client)) => {
                context.limits.name_client(connection_slot, client).map_err(Unseated::LimitReached)?
            }
        }
    }
    connection_slot.limit_reached().map_or(Ok(()), |limit| Err(Unseated::LimitReached(limit)))
}

/// The end of one for whom there is no room.
fn reject_full(limit: LimitReached) -> HandshakeOutcome {
    HandshakeOutcome::Reject(limit.answer(), limit.reason())
}

/// The answer to a client whose channel can't be joined now.
pub fn unavailable(why: &str) -> Bytes {
    let refusal = Refusal::new(503, why.to_owned()).with("Retry-After", "1");
    Response::from(refusal).to_closing_bytes()
}

/// The answer to a client that has named too many new channels.
pub fn too_many_channels() -> Bytes {
    let text = "too many new channels in a minute: join a channel that has clients, or try later";
    Response::from(Refusal::new(429, text).with("Retry-After", "5")).to_closing_bytes()
}

/// The answer to a client that comes when the node stops. A proxy asks another node at once.
pub fn stopping() -> Bytes {
    unavailable("this node is stopping")
}

/// The answer to a client that speaks before it was answered.
pub fn too_early() -> Bytes {
    Response::from(Refusal::new(400, TOO_EARLY)).to_closing_bytes()
}

/// The answer to a request that was broken off.
pub fn incomplete() -> Bytes {
    Response::from(Refusal::new(400, "the request ended before it was complete")).to_closing_bytes()
}

/// The answer to a request that does not end.
pub fn too_slow() -> Bytes {
    Response::from(Refusal::new(408, "the request was not complete in time")).to_closing_bytes()
}

fn plain(head: &Head<'_>, readiness: &Readiness) -> Response {
    let known = matches!(head.path, "/healthz" | "/readyz" | "/ws") || page::find(head.path).is_some();
    if !known {
        return Response::line(404, "not found: the WebSocket is at /ws/{user_id}, a page to try it at /");
    }
    let allowed = if head.path == "/ws" { "GET" } else { "GET, HEAD" };
    if !allowed.split(", ").any(|method| method == head.method) {
        return Response::line(405, &format!("{} takes {allowed}", head.path)).with("Allow", allowed);
    }
    match head.path {
        "/healthz" => Response::line(200, "ok"),
        // The reason is for operators, on the admin listener and in the log.
        "/readyz" => match readiness.trouble() {
            None => Response::line(200, "ready"),
            Some(_) => Response::line(503, "not ready").with("Retry-After", "1"),
        },
        "/ws" => Response::line(400, "the user id is missing: connect to /ws/{user_id}"),
        path => page::find(path).map_or_else(|| Response::line(404, "not found"), page::File::response),
    }
}

/// The checks of RFC 6455 section 4.2.1, and ours.
fn upgrade(
    head: &Head<'_>,
    user: &str,
    more: bool,
    context: &HandshakeContext,
    loopback: bool,
) -> Result<Join, Refused> {
    let refuse = |status, text: &'static str| Err(Refusal::new(status, text).into());
    if head.method != "GET" {
        return Err(Refusal::new(405, "a WebSocket begins with GET").with("Allow", "GET").into());
    }
    let version = head.header("sec-websocket-version");
    let upgrades = head.has_token("upgrade", "websocket") && head.has_token("connection", "upgrade");
    if !head.is_http_1_1 || !upgrades || version != Some("13") {
        let refusal = Refusal::new(426, "this is a WebSocket: upgrade with version 13");
        return Err(refusal.with("Upgrade", "websocket").with("Sec-WebSocket-Version", "13").into());
    }
    let has_body = head.count("transfer-encoding") > 0 || head.body_length()? != BodyLength::Empty;
    if has_body || more {
        return refuse(400, TOO_EARLY);
    }
    let key = head.header("sec-websocket-key").filter(|key| is_key(key));
    let Some(key) = key.filter(|_| head.count("sec-websocket-key") == 1) else {
        return refuse(400, "Sec-WebSocket-Key must be given once, 16 bytes in base64");
    };
    check_origin(head, &context.settings, loopback)?;
    let user = Some(user).filter(|user| !user.contains('/')).and_then(http::percent_decode);
    let user = user.filter(|user| is_user_id(user));
    let Some(user) = user else {
        return refuse(
            400,
            "the user id in /ws/{user_id} must be 1 to 128 bytes of UTF-8 without control characters",
        );
    };
    let grant = check_token(head, &user, context)?;
    let channel = match http::query_value(head.query, "channel")? {
        Some(name) => ChannelName::parse(&name),
        None => ChannelName::parse(DEFAULT_CHANNEL),
    };
    let Some(channel) = channel else {
        return refuse(400, "channel must be 1 to 128 of A-Z a-z 0-9 _ . : -");
    };
    if grant.as_ref().is_some_and(|grant| !grant.may_join(&channel)) {
        return Err(Refused(
            Refusal::new(403, "the token is not good for this channel"),
            CloseReason::Forbidden,
        ));
    }
    let given = http::query_value(head.query, "lastEventId");
    let json_mode = head.tokens("sec-websocket-protocol").any(|offered| offered == SUBPROTOCOL);
    let wants_recovery = json_mode || !matches!(given, Ok(None));
    let last_seen = match given {
        Ok(None) => LastSeen::Nothing,
        Ok(Some(text)) if text.is_empty() => LastSeen::Nothing,
        Ok(Some(text)) => EventId::parse(text.as_bytes()).map_or(LastSeen::Unknown, LastSeen::Event),
        Err(_) => LastSeen::Unknown,
    };
    let may_publish = context.settings.client_publish != ClientPublish::Off
        && grant.as_ref().is_none_or(|grant| grant.may_publish(&channel));
    let expires = grant.map_or(NEVER, |grant| grant.expires);
    let response = switching(key, json_mode);
    Ok(Join {
        user: user.into(),
        channel,
        last_seen,
        wants_recovery,
        json_mode,
        may_publish,
        expires,
        response,
    })
}

/// What the client's token allows it; `None` where no token is asked for.
fn check_token(head: &Head<'_>, user: &str, context: &HandshakeContext) -> Result<Option<Grant>, Refused> {
    if !context.keys.requires_token() {
        return Ok(None);
    }
    let refused = |text: &'static str| {
        Err(Refused(Refusal::new(401, text).with("WWW-Authenticate", "Bearer"), CloseReason::Unauthorized))
    };
    let Some(token) = given_token(head)? else {
        return refused(
            "a token is needed: as ?token=, Authorization: Bearer or the subprotocol bearer.TOKEN",
        );
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(u64::MAX, |since| since.as_secs());
    match token::verify(&context.keys.current().tokens, &token, user, now) {
        Ok(grant) => Ok(Some(grant)),
        Err(InvalidToken) => refused("token invalid or expired for this user"),
    }
}

/// Browsers can set no header, but name subprotocols; a query ends up in proxies' logs.
fn given_token<'a>(head: &Head<'a>) -> Result<Option<Cow<'a, str>>, Refusal> {
    if let Some(token) = keys::bearer(head) {
        return Ok(Some(token.into()));
    }
    let offered = head.tokens("sec-websocket-protocol").find_map(|offered| offered.strip_prefix("bearer."));
    match offered {
        Some(token) => Ok(Some(token.into())),
        None => http::query_value(head.query, "token"),
    }
}

/// A request without Origin is no browser's. With DNS rebinding a page's own name points to this machine and is in both
/// Host and Origin, so without rules a loopback listener accepts loopback hosts only.
fn check_origin(head: &Head<'_>, settings: &Settings, loopback: bool) -> Result<(), Refused> {
    let refuse = |text| Err(Refused(Refusal::new(403, text), CloseReason::OriginNotAllowed));
    let host = head.header("host").unwrap_or_default();
    match head.count("origin") {
        0 => Ok(()),
        1 if loopback && settings.allow_origin.is_empty() && !origin::is_loopback_host(host) => {
            refuse(FOREIGN_HOST)
        }
        1 if origin::is_allowed(&settings.allow_origin, head.header("origin").unwrap_or_default(), host) => {
            Ok(())
        }
        _ => refuse(FOREIGN_ORIGIN),
    }
}

/// 16 bytes in base64 (RFC 6455 section 4.1): 22 digits and two signs of padding.
fn is_key(key: &str) -> bool {
    let digit = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/');
    key.len() == 24 && key.ends_with("==") && key.bytes().take(22).all(digit)
}

fn switching(key: &str, json_mode: bool) -> Bytes {
    let mut out = BytesMut::with_capacity(192);
    out.put_slice(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n");
    out.put_slice(b"Sec-WebSocket-Accept: ");
    out.put_slice(derive_accept_key(key.as_bytes()).as_bytes());
    if json_mode {
        out.put_slice(b"\r\nSec-WebSocket-Protocol: ");
        out.put_slice(SUBPROTOCOL.as_bytes());
    }
    out.put_slice(b"\r\n\r\n");
    out.freeze()
}

#[cfg(test)]
mod tests;
