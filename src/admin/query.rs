//! Query parameters of the admin API.

use crate::http::{self, Rejection};
use crate::protocol::closest::advice;

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
            let advice = advice(name, known.iter().copied());
            let advice = advice.unwrap_or_else(|| format!("use {}", known.join(", ")));
            return Err(Rejection::new(400, format!("unknown parameter {name:.64}: {advice}")));
        }
        if seen.contains(&name) {
            return Err(Rejection::new(400, format!("parameter {name} is given twice")));
        }
        seen.push(name);
    }
    Ok(())
}

/// Most items in the response.
pub(super) fn limit(query: &str) -> Result<usize, Rejection> {
    Ok(http::query_number(query, "limit", 1..=LIMIT_MAX)?.unwrap_or(LIMIT_DEFAULT))
}
