//! Tokens: a client's user id and rights, signed by the operator's backend (JWT, RFC 7519, in the
//! compact form of RFC 7515). No error holds text of a token.

use std::borrow::Cow;

use data_encoding::BASE64URL_NOPAD;
use serde::{Deserialize, Deserializer};

use self::claims::Claims;
use crate::protocol::event::ChannelName;

mod claims;
#[cfg(test)]
mod fixtures;
mod invalid;
mod key;

pub use invalid::InvalidToken;
pub use key::{Key, secret};

/// What a valid token allows.
#[derive(Debug, PartialEq, Eq)]
pub struct Grant {
    /// Expiry in seconds since 1970. Later times than [`NEVER`] become [`NEVER`].
    pub expires: u32,
    channels: Option<Vec<String>>,
    publish: Option<Publish>,
}

#[derive(Debug, PartialEq, Eq)]
enum Publish {
    Everywhere(bool),
    To(Vec<String>),
}

/// Latest expiry (in 2106), also of connections without a token.
pub const NEVER: u32 = u32::MAX;

/// Algorithms of JWTs (RFC 7518 section 3.1, RFC 8037 section 3.1), of which a [`Key`] has four.
const ALGORITHMS: [&str; 14] = [
    "none", "HS256", "HS384", "HS512", "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256",
    "ES384", "ES512", "EdDSA",
];

#[derive(Deserialize)]
struct Header<'a> {
    #[serde(borrow, default)]
    alg: Cow<'a, str>,
    #[serde(default, deserialize_with = "present")]
    crit: Option<serde::de::IgnoredAny>,
}

/// Keeps `null`: a claim that narrows rights must not be ignored because its value is missing.
fn present<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<Option<T>, D::Error> {
    T::deserialize(deserializer).map(Some)
}

/// What `token` allows this user `now` (seconds since 1970), if one of these keys signed it.
///
/// Each key has one algorithm, and the header of a token only chooses among the keys (RFC 8725
/// section 3.1). So `none` is never accepted, and a public key is never used as a secret. Claims
/// are parsed only after the signature is verified.
///
/// # Errors
/// Why the token is not accepted.
pub fn verify(keys: &[Key], token: &str, user: &str, now: u64) -> Result<Grant, InvalidToken> {
    use InvalidToken::Malformed;
    let [header, claims, signature] = parts(token)
        .ok_or(Malformed("it has not three parts with dots between them: it may be cut off, or no JWT"))?;
    let header = decode(header).ok_or(Malformed("its header is not in base64url"))?;
    let header: Header<'_> = object(&header).ok_or(Malformed("its header is not a JSON object with alg"))?;
    if header.crit.is_some() {
        // RFC 7515 section 4.1.11
        return Err(Malformed("its header has crit, for extensions that must be understood: leave it out"));
    }
    let signature = decode(signature).ok_or(Malformed("its signature is not in base64url"))?;
    let candidates: Vec<&Key> = keys.iter().filter(|key| key.algorithm() == header.alg).collect();
    let Some(algorithm) = candidates.first().map(|key| key.algorithm()) else {
        let mut accepted: Vec<_> = keys.iter().map(Key::algorithm).collect();
        accepted.sort_unstable();
        accepted.dedup();
        let named = ALGORITHMS.into_iter().find(|name| *name == header.alg);
        return Err(InvalidToken::Algorithm { named, accepted });
    };
    let signed = &token.as_bytes()[..token.rfind('.').expect("it has three parts")];
    if !candidates.iter().any(|key| key.verifies(signed, &signature)) {
        return Err(InvalidToken::Signature(algorithm));
    }
    let claims = decode(claims).ok_or(Malformed("its claims are not in base64url"))?;
    let claims: Claims = object(&claims)
        .ok_or(Malformed("its claims are not a JSON object in which each claim is given once"))?;
    claims.grant(user, now)
}

/// The claims of a token as text, for its holder. Nothing is verified.
pub fn unverified_claims(token: &str) -> Option<String> {
    let [_, claims, _] = parts(token)?;
    String::from_utf8(decode(claims)?).ok()
}

/// Header, claims and signature, in base64url.
fn parts(token: &str) -> Option<[&str; 3]> {
    let parts: Vec<&str> = token.splitn(4, '.').collect();
    parts.try_into().ok()
}

fn decode(part: &str) -> Option<Vec<u8>> {
    BASE64URL_NOPAD.decode(part.as_bytes()).ok()
}

/// Parses an object. serde alone would also accept an array of the members.
fn object<'a, T: Deserialize<'a>>(json: &'a [u8]) -> Option<T> {
    let json = json.trim_ascii_start();
    if json.first() != Some(&b'{') {
        return None;
    }
    serde_json::from_slice(json).ok()
}

impl Grant {
    /// Whether the client may join this channel.
    pub fn may_join(&self, channel: &ChannelName) -> bool {
        self.channels.as_ref().is_none_or(|patterns| matches(patterns, channel))
    }

    /// Whether the client may publish in this channel, which it may follow, too.
    pub fn may_publish(&self, channel: &ChannelName) -> bool {
        let may = match &self.publish {
            None => true,
            Some(Publish::Everywhere(may)) => *may,
            Some(Publish::To(patterns)) => matches(patterns, channel),
        };
        may && self.may_join(channel)
    }

    /// Whether it allows everything in all channels.
    pub fn is_unrestricted(&self) -> bool {
        self.channels.is_none() && matches!(self.publish, None | Some(Publish::Everywhere(true)))
    }

    /// Whether it allows no other channel than this one.
    pub fn allows_only(&self, channel: Option<&ChannelName>) -> bool {
        let is_it = |pattern: &String| channel.is_some_and(|channel| channel.as_str() == pattern);
        self.channels.as_ref().is_some_and(|patterns| patterns.iter().all(is_it))
    }
}

/// Whether a pattern is this channel's name, or a prefix of it that ends in `*`.
fn matches(patterns: &[String], channel: &ChannelName) -> bool {
    patterns.iter().any(|pattern| match pattern.strip_suffix('*') {
        Some(prefix) => channel.as_str().starts_with(prefix),
        None => channel.as_str() == pattern,
    })
}

#[cfg(test)]
mod tests;
