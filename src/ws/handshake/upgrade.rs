//! The checks of an upgrade request (RFC 6455 section 4.2.1, and ours), and the 101 response.
//!
//! A script in a browser can't read the HTTP response that rejects its WebSocket: it gets 1006, as
//! after a broken network, and tries again. Clients that may be such scripts are therefore upgraded
//! and closed at once, with a close code and a reason.

use std::borrow::Cow;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::{BufMut, BytesMut};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use super::subprotocol::{self, Offer};
use super::{HandshakeContext, HandshakeOutcome, rejections};
use crate::auth::keys;
use crate::auth::token::{self, Grant};
use crate::config::Settings;
use crate::http::{self, BodyLength, Head, Mistyped, Rejection, origin};
use crate::protocol::close;
use crate::protocol::event::{ChannelName, EventId, is_user_id};
use crate::protocol::frame;
use crate::ws::client::{Client, HISTORY_MAX, Join, LastSeen, Mode, NOT_TRACKED};

const LAST_EVENT_ID: &str = "lastEventId";
const HISTORY: &str = "history";
const CHANNEL: &str = "channel";
const PRESENCE: &str = "presence";
const PARAMETERS: [&str; 5] = [CHANNEL, LAST_EVENT_ID, HISTORY, PRESENCE, "token"];
/// Other words for a parameter. Without the advice a client would silently not recover.
const ALIASES: [(&str, &str); 2] = [("eventId", LAST_EVENT_ID), ("lastId", LAST_EVENT_ID)];

/// An upgrade request without a fault in its HTTP.
struct Upgrade<'h, 'a> {
    head: &'h Head<'a>,
    key: &'a str,
    offer: Offer<'a>,
    mistyped: Option<Mistyped<'a>>,
}

/// Checks a request for `/ws/{user}`. `has_more`: bytes follow it.
pub(super) fn decide(
    head: &Head<'_>,
    user: &str,
    has_more: bool,
    context: &HandshakeContext,
    is_loopback: &dyn Fn() -> bool,
) -> HandshakeOutcome {
    let upgrade = match Upgrade::check(head, has_more, context) {
        Ok(upgrade) => upgrade,
        Err(rejection) => return HandshakeOutcome::Reject(rejection.answering(head)),
    };
    match upgrade.join(user, context, is_loopback) {
        Ok(join) => HandshakeOutcome::Join(Box::new(join)),
        Err(rejection) => upgrade.reject(rejection),
    }
}

impl<'h, 'a> Upgrade<'h, 'a> {
    fn check(
        head: &'h Head<'a>,
        has_more: bool,
        context: &HandshakeContext,
    ) -> Result<Upgrade<'h, 'a>, Rejection> {
        if head.method != "GET" {
            return Err(Rejection::new(405, "a WebSocket starts with GET").with("Allow", "GET"));
        }
        let version = head.header("sec-websocket-version");
        let upgrades = head.has_token("upgrade", "websocket") && head.has_token("connection", "upgrade");
        if !head.is_http_1_1 || !upgrades || version != Some("13") {
            let rejection = Rejection::new(426, "this is a WebSocket: upgrade with version 13");
            return Err(rejection.with("Upgrade", "websocket").with("Sec-WebSocket-Version", "13"));
        }
        let has_body = head.count("transfer-encoding") > 0 || head.body_length()? != BodyLength::Empty;
        if has_body || has_more {
            return Err(rejections::early_data());
        }
        let key = head.header("sec-websocket-key").filter(|key| is_key(key));
        let Some(key) = key.filter(|_| head.count("sec-websocket-key") == 1) else {
            return Err(Rejection::new(400, "Sec-WebSocket-Key must be given once, 16 bytes in base64"));
        };
        let mistyped = http::mistyped(head.query, &PARAMETERS, &ALIASES);
        Ok(Upgrade { head, key, offer: Offer::of(head, context.keys.requires_token()), mistyped })
    }

    fn join(
        &self,
        user: &str,
        context: &HandshakeContext,
        is_loopback: &dyn Fn() -> bool,
    ) -> Result<Join, Rejection> {
        let head = self.head;
        check_origin(head, &context.settings, is_loopback)?;
        let user = Some(user).filter(|user| !user.contains('/')).and_then(http::percent_decode);
        let Some(user) = user.filter(|user| is_user_id(user)) else {
            let text =
                "the user id in /ws/{user_id} must be 1 to 128 bytes of UTF-8 without control characters";
            return Err(Rejection::new(400, text));
        };
        self.offer.check()?;
        if let Some(mistyped) = &self.mistyped {
            return Err(mistyped.rejection());
        }
        let grant = check_token(head, &user, context)?;
        if let Some(left) = context.limits.bans.time_left(&user) {
            return Err(rejections::banned(left));
        }
        let json_mode = self.offer == Offer::JsonMode;
        let channel = self.default_channel(json_mode)?;
        let is_forbidden = |grant: &Grant| channel.as_ref().is_some_and(|channel| !grant.may_join(channel));
        if grant.as_ref().is_some_and(is_forbidden) {
            return Err(rejections::forbidden_channel());
        }
        // A page that reconnects keeps the parameter in its URL, so `lastEventId` takes precedence.
        let history = http::query_number(head.query, HISTORY, 1..=HISTORY_MAX)?.unwrap_or(0);
        let given = http::query_value(head.query, LAST_EVENT_ID);
        let mode = match &given {
            _ if json_mode => Mode::Json,
            Ok(None) => Mode::Plain,
            _ => Mode::Recovering,
        };
        let last_seen = match given {
            Ok(None) => LastSeen::Newcomer { history },
            Ok(Some(text)) if text.is_empty() => LastSeen::Newcomer { history },
            Ok(Some(text)) => EventId::parse(text.as_bytes()).map_or(LastSeen::Unknown, LastSeen::Event),
            Err(_) => LastSeen::Unknown,
        };
        let presence = self.wants_presence(channel.as_ref(), json_mode, &context.settings)?;
        let mut client = Client { user: user.into(), mode, ..Client::default() };
        let grant = client.set_rights(grant, channel.as_ref(), &context.settings);
        let response = self.switching_protocols().freeze();
        Ok(Join { client, channel, last_seen, presence, grant: grant.filter(|_| json_mode), response })
    }

    /// The channel of the parameter, the default one without it, or none if it is empty.
    fn default_channel(&self, json_mode: bool) -> Result<Option<ChannelName>, Rejection> {
        match http::query_value(self.head.query, CHANNEL)? {
            Some(name) if name.is_empty() && json_mode => Ok(None),
            Some(name) if name.is_empty() => Err(rejections::no_channel()),
            _ => http::query_channel(self.head.query).map(Some),
        }
    }

    /// Whether the client wants to know who is in its default channel.
    fn wants_presence(
        &self,
        channel: Option<&ChannelName>,
        json_mode: bool,
        settings: &Settings,
    ) -> Result<bool, Rejection> {
        if http::query_number(self.head.query, PRESENCE, 0..=1)? != Some(1) {
            return Ok(false);
        }
        match channel {
            _ if !json_mode => Err(Rejection::new(400, "presence needs the subprotocol fanfare.v1")),
            None => Err(Rejection::new(400, "presence needs a channel: without one ask for it in subscribe")),
            Some(channel) if settings.tracks_presence(channel) => Ok(true),
            Some(_) => Err(Rejection::new(400, NOT_TRACKED)),
        }
    }

    fn reject(&self, rejection: Rejection) -> HandshakeOutcome {
        match close::rejection_code(rejection.status, rejection.reason).filter(|_| self.reads_close_codes()) {
            None => HandshakeOutcome::Reject(rejection),
            Some(code) => {
                let text = &rejection.text[..rejection.text.floor_char_boundary(frame::CLOSE_TEXT_MAX)];
                let mut bytes = self.switching_protocols();
                bytes.put_slice(&frame::close(code, text));
                HandshakeOutcome::RejectUpgraded(rejection, bytes.freeze())
            }
        }
    }

    /// Whether the client reads close codes: it uses a parameter that only fanfare has, or offers a
    /// subprotocol, which mostly scripts in browsers do.
    fn reads_close_codes(&self) -> bool {
        let meant = self.mistyped.as_ref().map(|mistyped| mistyped.meant);
        let is_used =
            |name| meant == Some(name) || !matches!(http::query_value(self.head.query, name), Ok(None));
        match self.offer {
            Offer::Nothing => [LAST_EVENT_ID, HISTORY, PRESENCE].into_iter().any(is_used),
            offer => offer.answer().is_some(),
        }
    }

    fn switching_protocols(&self) -> BytesMut {
        let answer = self.offer.answer();
        let mut out = BytesMut::with_capacity(192 + answer.map_or(0, str::len));
        out.put_slice(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n");
        out.put_slice(b"Sec-WebSocket-Accept: ");
        out.put_slice(derive_accept_key(self.key.as_bytes()).as_bytes());
        if let Some(answer) = answer {
            out.put_slice(b"\r\nSec-WebSocket-Protocol: ");
            out.put_slice(answer.as_bytes());
        }
        out.put_slice(b"\r\n\r\n");
        out
    }
}

/// What the token allows its user. `None` if no tokens are required.
fn check_token(head: &Head<'_>, user: &str, context: &HandshakeContext) -> Result<Option<Grant>, Rejection> {
    if !context.keys.requires_token() {
        return Ok(None);
    }
    let Some(token) = find_token(head)? else {
        return Err(rejections::unauthorized(
            "token required: as ?token=, Authorization: Bearer or the subprotocol bearer.TOKEN",
        ));
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(u64::MAX, |since| since.as_secs());
    let grant = token::verify(&context.keys.current().tokens, &token, user, now);
    grant.map(Some).map_err(|reason| rejections::invalid_token(user, &reason))
}

/// The token from the `Authorization` header, a subprotocol or the query. Scripts in browsers can
/// set subprotocols but no headers; queries end up in the logs of proxies.
fn find_token<'a>(head: &Head<'a>) -> Result<Option<Cow<'a, str>>, Rejection> {
    if let Some(token) = keys::bearer(head) {
        return Ok(Some(token.into()));
    }
    match subprotocol::token(head) {
        Some(token) => Ok(Some(token.into())),
        None => http::query_value(head.query, "token"),
    }
}

/// A request without `Origin` is not from a browser. With DNS rebinding a page's own name points to
/// this machine and is in both `Host` and `Origin`, so without rules a loopback listener accepts
/// loopback hosts only.
fn check_origin(
    head: &Head<'_>,
    settings: &Settings,
    is_loopback: &dyn Fn() -> bool,
) -> Result<(), Rejection> {
    let rules = &settings.allow_origin;
    let host = head.header("host").unwrap_or_default();
    match head.count("origin") {
        0 => Ok(()),
        1 if rules.is_empty() && !origin::is_loopback_host(host) && is_loopback() => {
            Err(rejections::host_not_allowed())
        }
        1 if origin::is_allowed(rules, head.header("origin").unwrap_or_default(), host) => Ok(()),
        _ => Err(rejections::origin_not_allowed()),
    }
}

/// 16 bytes in base64 (RFC 6455 section 4.1): 22 digits and two signs of padding.
fn is_key(key: &str) -> bool {
    let is_digit = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/');
    key.len() == 24 && key.ends_with("==") && key.bytes().take(22).all(is_digit)
}
