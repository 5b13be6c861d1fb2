//! Percent-encoding, and the parameters of a query.

use std::borrow::Cow;
use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

use percent_encoding::percent_decode_str;

use super::Rejection;
use crate::protocol::closest::{is_variant, typing_error};
use crate::protocol::event::{ChannelName, DEFAULT_CHANNEL};

/// Most parameters that are compared with the known names. Pages and proxies add a few.
const COMPARED_MAX: usize = 32;

/// Decodes a path segment (RFC 3986 section 2.1); `+` stays `+`. `None` for a `%` without two hex
/// digits, and if the result is not UTF-8.
pub fn percent_decode(text: &str) -> Option<Cow<'_, str>> {
    let is_hex = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_hexdigit);
    let mut escapes = text.split('%').skip(1).map(str::as_bytes);
    // The crate would leave a malformed escape as it is.
    if !escapes.all(|escape| is_hex(escape.first()) && is_hex(escape.get(1))) {
        return None;
    }
    percent_decode_str(text).decode_utf8().ok()
}

/// The first value of a query parameter, decoded. `None` if it is absent; empty for `?name` and
/// `?name=`.
///
/// `+` is a space, as `URLSearchParams` and forms write it. `encodeURIComponent` escapes both `+`
/// and space, so both kinds of client are read correctly.
pub fn query_value<'a>(query: &'a str, name: &str) -> Result<Option<Cow<'a, str>>, Rejection> {
    for pair in query.split('&') {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        if decode_form(key).is_some_and(|key| key == name) {
            let value = decode_form(value);
            let invalid =
                || Rejection::new(400, format!("query parameter {name} is not percent-encoded UTF-8"));
            return value.map(Some).ok_or_else(invalid);
        }
    }
    Ok(None)
}

/// The number in a query parameter, which must be in this range. `None` if it is absent.
pub fn query_number<T: FromStr + PartialOrd + fmt::Display>(
    query: &str,
    name: &str,
    range: RangeInclusive<T>,
) -> Result<Option<T>, Rejection> {
    let Some(given) = query_value(query, name)? else { return Ok(None) };
    let is_number = !given.is_empty() && given.bytes().all(|byte| byte.is_ascii_digit());
    let number = is_number.then(|| given.parse().ok()).flatten().filter(|number| range.contains(number));
    let (least, most) = range.into_inner();
    let invalid = || Rejection::new(400, format!("{name} must be a number from {least} to {most}"));
    number.map(Some).ok_or_else(invalid)
}

/// The channel in the parameter `channel`, or the default one.
pub fn query_channel(query: &str) -> Result<ChannelName, Rejection> {
    let channel = query_value(query, "channel")?;
    parse_channel("channel", channel.as_deref().unwrap_or(DEFAULT_CHANNEL))
}

/// The channel in a parameter of this name.
pub fn parse_channel(name: &str, value: &str) -> Result<ChannelName, Rejection> {
    let invalid = || Rejection::new(400, format!("{name} must be {}", ChannelName::RULE));
    ChannelName::parse(value).ok_or_else(invalid)
}

/// A query parameter that is unknown and near a known one.
#[derive(Debug, PartialEq, Eq)]
pub struct Mistyped<'a> {
    given: Cow<'a, str>,
    /// The known one.
    pub meant: &'static str,
}

/// The first parameter that seems to be a mistyped one of these. A mistyped channel would join the
/// default channel. Others are ignored, since pages and proxies add their own.
///
/// `aliases` are other words for known names, each with the known one.
pub fn mistyped<'a>(
    query: &'a str,
    known: &[&'static str],
    aliases: &[(&str, &'static str)],
) -> Option<Mistyped<'a>> {
    query.split('&').take(COMPARED_MAX).find_map(|pair| {
        let given = decode_form(pair.split_once('=').map_or(pair, |(name, _)| name))?;
        if known.contains(&&*given) {
            return None;
        }
        let alias = aliases.iter().find(|(alias, _)| is_variant(&given, alias)).map(|(_, meant)| *meant);
        let meant = alias.or_else(|| typing_error(&given, known.iter().copied()))?;
        Some(Mistyped { given, meant })
    })
}

impl Mistyped<'_> {
    pub fn rejection(&self) -> Rejection {
        let Mistyped { given, meant } = self;
        Rejection::new(400, format!("unknown query parameter {given:?}: did you mean {meant}?"))
    }
}

fn decode_form(text: &str) -> Option<Cow<'_, str>> {
    if text.contains('+') {
        return percent_decode(&text.replace('+', " ")).map(|text| Cow::Owned(text.into_owned()));
    }
    percent_decode(text)
}
