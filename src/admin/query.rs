//! Query parameters of the admin API.

use crate::http::{self, Rejection};
use crate::protocol::closest::closest;
use crate::protocol::event::{ChannelName, DEFAULT_CHANNEL};

/// Items in a response that gives no `limit`, and most items in one.
const LIMIT_DEFAULT: usize = 100;
const LIMIT_MAX: usize = 1000;

/// Rejects parameters that are not in this list: a mistyped `channel` would be the default channel,
/// a mistyped `to` all users.
pub(super) fn check_names(query: &str, known: &[&str]) -> Result<(), Rejection> {
    let mut seen = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let name = pair.split_once('=').map_or(pair, |(name, _)| name);
        if !known.contains(&name) {
            let advice = closest(name, known.iter().copied()).map_or_else(
                || format!("use {}", known.join(", ")),
                |meant| format!("did you mean {meant}?"),
            );
            return Err(Rejection::new(400, format!("unknown parameter {name:.64}: {advice}")));
        }
        if seen.contains(&name) {
            return Err(Rejection::new(400, format!("parameter {name} is given twice")));
        }
        seen.push(name);
    }
    Ok(())
}

/// The channel to publish to or to read.
pub(super) fn channel(query: &str) -> Result<ChannelName, Rejection> {
    let channel = http::query_value(query, "channel")?;
    parse_channel("channel", channel.as_deref().unwrap_or(DEFAULT_CHANNEL))
}

pub(super) fn parse_channel(parameter: &str, value: &str) -> Result<ChannelName, Rejection> {
    ChannelName::parse(value).ok_or_else(|| {
        Rejection::new(400, format!("{parameter} must be 1 to 128 letters, digits, _ . : and -"))
    })
}

/// Most items in the response.
pub(super) fn limit(query: &str) -> Result<usize, Rejection> {
    let Some(given) = http::query_value(query, "limit")? else { return Ok(LIMIT_DEFAULT) };
    let is_number = !given.is_empty() && given.bytes().all(|byte| byte.is_ascii_digit());
    let limit = is_number.then(|| given.parse().ok()).flatten();
    limit
        .filter(|limit| (1..=LIMIT_MAX).contains(limit))
        .ok_or_else(|| Rejection::new(400, format!("limit must be a number from 1 to {LIMIT_MAX}")))
}
