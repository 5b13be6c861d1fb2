//! Tokens: a client's user id and rights, signed by the operator's backend (JWT, RFC 7519, in the
//! compact form of RFC 7515). No error shows a token or what is wrong with it.

use data_encoding::BASE64URL_NOPAD;
use serde::{Deserialize, Deserializer};

use crate::protocol::event::ChannelName;

#[cfg(test)]
mod fixtures;
mod key;

pub use key::{Key, secret};

/// How far the clock of a token's issuer may be ahead, in seconds. Expiry has no leeway.
const CLOCK_LEEWAY: f64 = 60.0;

/// What a valid token allows.
#[derive(Debug, PartialEq, Eq)]
pub struct Grant {
    /// Expiry in seconds since 1970. Later times than [`NEVER`] become [`NEVER`].
    pub expires: u32,
    channels: Option<Vec<String>>,
    publish: Option<Publish>,
}

/// Latest expiry (in 2106), also of connections without a token.
pub const NEVER: u32 = u32::MAX;

/// The token is invalid, expired or for another user. Clients don't learn which.
#[derive(Debug, PartialEq, Eq)]
pub struct InvalidToken;

#[derive(Deserialize)]
struct Header<'a> {
    #[serde(borrow)]
    alg: std::borrow::Cow<'a, str>,
    #[serde(default, deserialize_with = "present")]
    crit: Option<serde::de::IgnoredAny>,
}

#[derive(Deserialize)]
struct Claims {
    sub: String,
    exp: f64,
    #[serde(default, deserialize_with = "present")]
    nbf: Option<f64>,
    #[serde(default, deserialize_with = "present")]
    channels: Option<Vec<String>>,
    #[serde(default, deserialize_with = "present")]
    publish: Option<Publish>,
}

#[derive(Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
enum Publish {
    Everywhere(bool),
    To(Vec<String>),
}

/// Rejects `null`: a claim that narrows rights must not be ignored because its value is missing.
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
/// The token is invalid, expired or for another user.
pub fn verify(keys: &[Key], token: &str, user: &str, now: u64) -> Result<Grant, InvalidToken> {
    let (signed, signature) = token.rsplit_once('.').ok_or(InvalidToken)?;
    let (header, claims) = signed.split_once('.').ok_or(InvalidToken)?;
    let header = decode(header)?;
    let header: Header<'_> = object(&header)?;
    if header.crit.is_some() {
        return Err(InvalidToken); // an extension that must be understood (RFC 7515 section 4.1.11)
    }
    let signature = decode(signature)?;
    let mut candidates = keys.iter().filter(|key| key.algorithm() == header.alg);
    if !candidates.any(|key| key.verifies(signed.as_bytes(), &signature)) {
        return Err(InvalidToken);
    }
    let claims = decode(claims)?;
    let claims: Claims = object(&claims)?;
    let now = now as f64;
    if claims.sub != user || claims.exp <= now || claims.nbf.is_some_and(|start| start > now + CLOCK_LEEWAY) {
        return Err(InvalidToken);
    }
    // `as` stops at the ends of u32.
    Ok(Grant { expires: claims.exp as u32, channels: claims.channels, publish: claims.publish })
}

fn decode(part: &str) -> Result<Vec<u8>, InvalidToken> {
    BASE64URL_NOPAD.decode(part.as_bytes()).map_err(|_| InvalidToken)
}

/// Parses an object. serde alone would also accept an array of the members.
fn object<'a, T: Deserialize<'a>>(json: &'a [u8]) -> Result<T, InvalidToken> {
    let json = json.trim_ascii_start();
    if json.first() != Some(&b'{') {
        return Err(InvalidToken);
    }
    serde_json::from_slice(json).map_err(|_| InvalidToken)
}

impl Grant {
    /// Whether the client may join this channel.
    pub fn may_join(&self, channel: &ChannelName) -> bool {
        self.channels.as_ref().is_none_or(|patterns| matches(patterns, channel))
    }

    /// Whether the token allows it to publish there.
    pub fn may_publish(&self, channel: &ChannelName) -> bool {
        match &self.publish {
            None => true,
            Some(Publish::Everywhere(may)) => *may,
            Some(Publish::To(patterns)) => matches(patterns, channel),
        }
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
