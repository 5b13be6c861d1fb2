//! `GET /connections`: the connections of a user on this node.

use std::sync::Arc;

use serde_json::json;
use tokio::sync::oneshot;

use super::control::required_user;
use super::{Shared, query};
use crate::bus::{BusError, ShardId};
use crate::http::{self, Rejection};
use crate::shard::mailbox::{ConnectionList, ListConnections, ListedConnection, ShardMessage};

/// Soft limit of a response, in bytes: a connection may have a hundred channels.
const BYTES_MAX: usize = 256 * 1024;

/// Which connections to list: those of the user after this place.
#[derive(Debug)]
pub(super) struct ConnectionsQuery {
    user: Arc<str>,
    after: Option<Place>,
    limit: usize,
}

/// Where a connection is: its shard and slot, as one number in the response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    shard: ShardId,
    slot: u32,
}

impl Place {
    /// Numbers stay below 2^53, so that JavaScript holds them.
    const LIMIT: u64 = 1 << 53;

    fn number(self) -> u64 {
        (self.shard as u64) << 32 | u64::from(self.slot)
    }

    fn of(number: u64) -> Place {
        Place { shard: (number >> 32) as ShardId, slot: number as u32 }
    }
}

impl ConnectionsQuery {
    pub fn parse(query: &str) -> Result<ConnectionsQuery, Rejection> {
        query::check_names(query, &["user", "after", "limit"])?;
        let after = http::query_number(query, "after", 0..=Place::LIMIT - 1)?.map(Place::of);
        Ok(ConnectionsQuery { user: required_user(query)?, after, limit: query::limit(query)? })
    }

    /// Asks the shards, one after the other. The response is JSON.
    pub async fn answer(&self, shared: &Shared) -> Result<String, BusError> {
        let mut json = String::new();
        let (mut count, mut last) = (0, None);
        let (first, mut from) = match self.after {
            Some(Place { shard, slot }) => (shard, slot.checked_add(1)),
            None => (0, Some(0)),
        };
        for shard in first..shared.context.shards.count() {
            while let Some(slot) = from {
                let list = self.ask(shard, slot, shared).await?;
                for connection in list.connections {
                    if count == self.limit || json.len() >= BYTES_MAX {
                        return Ok(page(&json, last));
                    }
                    let comma = if count > 0 { "," } else { "" };
                    json += &format!("{comma}{}", shown(&connection));
                    (count, last) = (count + 1, Some(Place { shard, slot: connection.slot }));
                }
                from = list.next;
            }
            from = Some(0);
        }
        Ok(page(&json, None))
    }

    /// Asks a shard for the connections from this slot on.
    async fn ask(&self, shard: ShardId, from: u32, shared: &Shared) -> Result<ConnectionList, BusError> {
        let (answer, list) = oneshot::channel();
        let request = ListConnections { user: self.user.clone(), from, answer };
        shared.context.shards.send(shard, ShardMessage::ListConnections(request));
        list.await.map_err(|_| BusError::Unavailable("this node is stopping".into()))
    }
}

fn page(connections: &str, next: Option<Place>) -> String {
    let next = next.map_or_else(|| "null".into(), |place| place.number().to_string());
    format!(r#"{{"connections":[{connections}],"next":{next}}}"#)
}

fn shown(connection: &ListedConnection) -> String {
    let channels: Vec<_> = connection
        .channels
        .iter()
        .map(|(channel, position)| {
            json!({"channel": channel.as_str(), "position": position.map(|position| position.0)})
        })
        .collect();
    json!({
        "client": connection.client.map(|client| client.to_string()),
        "minutes": connection.minutes_connected,
        "queued": connection.queued,
        "channels": channels,
    })
    .to_string()
}
