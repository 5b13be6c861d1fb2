//! `GET /presence`: the users in a channel, on all nodes.

use tokio::sync::oneshot;

use super::{Shared, query};
use crate::bus::{BusError, PresencePage, Request};
use crate::config::Settings;
use crate::http::{self, Rejection};
use crate::protocol::event::ChannelName;

/// Which users to list.
#[derive(Debug)]
pub(super) struct PresenceQuery {
    channel: ChannelName,
    /// `next` of the page before.
    from: Option<String>,
    limit: usize,
}

impl PresenceQuery {
    pub fn parse(query: &str, settings: &Settings) -> Result<PresenceQuery, Rejection> {
        query::check_names(query, &["channel", "after", "limit"])?;
        let channel = http::query_channel(query)?;
        if !settings.tracks_presence(&channel) {
            return Err(Rejection::new(400, format!("{channel} is not in --presence of this node")));
        }
        let from = http::query_value(query, "after")?.map(|given| match settings.redis.is_some() {
            // The cursor of HSCAN: another text would be an error of the script.
            true if given.starts_with('+') || given.parse::<u64>().is_err() => {
                Err(Rejection::new(400, "after must be `next` of the page before"))
            }
            _ => Ok(given.into_owned()),
        });
        Ok(PresenceQuery { channel, from: from.transpose()?, limit: query::limit(query)? })
    }

    /// Reads the users. The response is JSON.
    pub async fn answer(&self, shared: &Shared) -> Result<String, BusError> {
        let (answer, page) = oneshot::channel();
        let (channel, from) = (self.channel.clone(), self.from.clone());
        let request = Request::ReadPresence { channel, from, limit: self.limit, answer };
        let _ = shared.context.requests.send(request);
        let stopping = |_| Err(BusError::Unavailable("this node is stopping".into()));
        let PresencePage { users, count, next } = page.await.unwrap_or_else(stopping)?;
        let users: Vec<String> = users.iter().map(|user| json_string(user)).collect();
        let next = next.map_or_else(|| "null".into(), |next| json_string(&next));
        Ok(format!(r#"{{"users":[{}],"count":{count},"next":{next}}}"#, users.join(",")))
    }
}

fn json_string(text: &str) -> String {
    serde_json::to_string(text).expect("a string is JSON")
}
