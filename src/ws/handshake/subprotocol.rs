//! Subprotocols (RFC 6455 section 1.9). Browsers and some libraries fail a connection whose offers
//! the server does not answer. Scripts then see 1006 without a reason.

use crate::http::{Head, Rejection};

/// The subprotocol of JSON mode.
const JSON_MODE: &str = "fanfare.v1";

/// Before a token. Scripts in browsers can set subprotocols but no headers.
const BEARER: &str = "bearer.";

/// Longest subprotocol that is answered if a token is required, in bytes: the answer is kept while a
/// client waits for the bus. Tokens with dozens of channels fit.
const ANSWER_MAX: usize = 4096;

/// The same if none is required: then any client has one kept.
const ANSWER_MAX_WITHOUT_TOKENS: usize = 1024;

/// What a client offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Offer<'a> {
    Nothing,
    JsonMode,
    /// A token alone, for plain mode. The answer repeats it, to the client that has sent it.
    Token(&'a str),
    /// Subprotocols of other servers. The first of them, if it can be answered.
    Unsupported(Option<&'a str>),
}

impl<'a> Offer<'a> {
    pub fn of(head: &Head<'a>, requires_token: bool) -> Offer<'a> {
        let max = if requires_token { ANSWER_MAX } else { ANSWER_MAX_WITHOUT_TOKENS };
        let offered = || head.tokens("sec-websocket-protocol");
        let answerable = |start| offered().find(|name| name.starts_with(start) && is_answerable(name, max));
        if offered().any(|name| name == JSON_MODE) {
            Offer::JsonMode
        } else if let Some(token) = answerable(BEARER) {
            Offer::Token(token)
        } else if offered().next().is_some() {
            Offer::Unsupported(answerable(""))
        } else {
            Offer::Nothing
        }
    }

    /// The subprotocol to answer with.
    pub fn answer(self) -> Option<&'a str> {
        match self {
            Offer::Nothing => None,
            Offer::JsonMode => Some(JSON_MODE),
            Offer::Token(token) => Some(token),
            Offer::Unsupported(first) => first,
        }
    }

    pub fn check(self) -> Result<(), Rejection> {
        if !matches!(self, Offer::Unsupported(_)) {
            return Ok(());
        }
        let text = format!(
            "subprotocol not supported: offer {JSON_MODE} or none, and a token as {BEARER}TOKEN of at most \
             {ANSWER_MAX} bytes ({ANSWER_MAX_WITHOUT_TOKENS} if none is required)"
        );
        Err(Rejection::new(400, text))
    }
}

/// The token in the first subprotocol for one.
pub(super) fn token<'a>(head: &Head<'a>) -> Option<&'a str> {
    head.tokens("sec-websocket-protocol").find_map(|offered| offered.strip_prefix(BEARER))
}

/// Whether it is a valid name (RFC 6455 section 4.1: a token of RFC 2616) of at most `max` bytes.
fn is_answerable(name: &str, max: usize) -> bool {
    let is_token = |byte: u8| byte.is_ascii_graphic() && !b"()<>@,;:\\\"/[]?={}".contains(&byte);
    name.len() <= max && name.bytes().all(is_token)
}
