//! `POST /disconnect`, `DELETE /ban` and `GET /bans`: commands about the connections of users.

use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tokio::sync::oneshot;

use super::{STOPPING, Shared, acquire_wait_slot, ask_bus, query, reject_and_log, reject_pages};
use crate::bus::{OrderError, Request};
use crate::config::parse_duration;
use crate::http::{self, Head, Rejection, Response};
use crate::protocol::control::{BAN_MAX, Order};
use crate::protocol::event::{EventId, is_user_id};

const DISCONNECT: [&str; 3] = ["user", "channel", "ban"];

pub(super) fn parse_disconnect(query: &str) -> Result<Order, Rejection> {
    query::check_names(query, &DISCONNECT)?;
    let user = required_user(query)?;
    let channel = http::query_value(query, "channel")?;
    let channel = channel.map(|name| http::parse_channel("channel", &name)).transpose()?;
    let Some(ban) = http::query_value(query, "ban")? else {
        return Ok(Order::Disconnect { user, channel });
    };
    if channel.is_some() {
        let text = "a ban is for all channels: leave out channel, or leave out ban and give the user tokens \
            without the channel";
        return Err(Rejection::new(400, text));
    }
    let time = parse_duration(&ban).map_err(|why| Rejection::new(400, format!("ban: {why}")))?;
    if !(Duration::from_secs(1)..=BAN_MAX).contains(&time) {
        return Err(Rejection::new(400, "ban must be from 1s to 365d"));
    }
    Ok(Order::Ban { user, time })
}

pub(super) fn parse_unban(query: &str) -> Result<Order, Rejection> {
    query::check_names(query, &["user"])?;
    Ok(Order::Unban { user: required_user(query)? })
}

/// The user that a request is about.
pub(super) fn required_user(query: &str) -> Result<Arc<str>, Rejection> {
    let user = http::query_value(query, "user")?.filter(|user| is_user_id(user));
    let rule = "user must be given: a user id of 1 to 128 bytes without control characters";
    user.map(|user| user.as_ref().into()).ok_or_else(|| Rejection::new(400, rule))
}

/// Has all nodes execute a command.
pub(super) async fn execute(head: &Head<'_>, order: Order, shared: &Shared) -> Result<Response, Rejection> {
    reject_pages(head, "change connections")?;
    let _permit = acquire_wait_slot(shared)?;
    let id = match send(order, shared).await {
        Ok(id) => id,
        Err(error) => {
            let (status, reason) = match error {
                OrderError::Rejected(_) => (503, "unavailable"),
                OrderError::TooManyBans => (409, "bans"),
                OrderError::Unknown => (504, "unknown"),
            };
            return Err(reject_and_log(error.to_string(), status, reason, shared));
        }
    };
    Ok(Response::json(200, &format!(r#"{{"id":{id}}}"#)))
}

async fn send(order: Order, shared: &Shared) -> Result<EventId, OrderError> {
    let (waiter, answer) = oneshot::channel();
    let stopping = OrderError::Rejected(STOPPING.into());
    ask_bus(Request::Order { order, waiter }, answer, stopping, OrderError::Unknown, shared).await
}

/// A page of the users who are banned, as JSON.
pub(super) fn list_bans(query: &str, shared: &Shared) -> Result<Response, Rejection> {
    query::check_names(query, &["after", "limit"])?;
    let after = http::query_value(query, "after")?;
    let limit = query::limit(query)?;
    let mut bans = shared.context.bans.list(after.as_deref(), limit + 1);
    let is_all = bans.len() <= limit;
    bans.truncate(limit);
    let next = bans.last().filter(|_| !is_all).map(|(user, _)| user);
    let lines: Vec<_> =
        bans.iter().map(|(user, end)| json!({"user": &**user, "until": end / 1000})).collect();
    Ok(Response::json(200, &json!({"bans": lines, "next": next.map(|user| &**user)}).to_string()))
}
