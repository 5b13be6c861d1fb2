//! `GET /channels`: the channels that this node follows, with their connections.

use std::collections::BTreeMap;

use tokio::sync::oneshot;

use super::{Shared, query};
use crate::bus::{BusError, ShardId};
use crate::http::{self, Rejection};
use crate::protocol::event::{ChannelName, EventId};
use crate::shard::mailbox::{ChannelList, ListChannels, ShardMessage};

/// Which channels to list: the first ones after this name.
#[derive(Debug)]
pub(super) struct ChannelsQuery {
    after: Option<ChannelName>,
    limit: usize,
}

/// A channel on all shards.
#[derive(Debug, Default)]
struct Total {
    connections: usize,
    position: EventId,
}

impl ChannelsQuery {
    pub fn parse(query: &str) -> Result<ChannelsQuery, Rejection> {
        query::check_names(query, &["after", "limit"])?;
        let after = http::query_value(query, "after")?;
        let after = after.map(|name| http::parse_channel("after", &name)).transpose()?;
        Ok(ChannelsQuery { after, limit: query::limit(query)? })
    }

    /// Asks all shards, one after the other. The response is JSON.
    pub async fn answer(&self, shared: &Shared) -> Result<String, BusError> {
        // The first `limit` names so far, plus one that shows whether there is a next page.
        let mut totals: BTreeMap<ChannelName, Total> = BTreeMap::new();
        for shard in 0..shared.context.shards.count() {
            let mut from = Some(0);
            while let Some(key) = from {
                let last = totals.last_key_value().filter(|_| totals.len() > self.limit);
                let list = self.ask(shard, key, last.map(|(name, _)| name.clone()), shared).await?;
                for (name, connections, position) in list.channels {
                    let total = totals.entry(name).or_default();
                    total.connections += connections;
                    total.position = total.position.max(position);
                }
                while totals.len() > self.limit + 1 {
                    totals.pop_last();
                }
                from = list.next;
            }
        }
        let is_all = totals.len() <= self.limit;
        let listed: Vec<_> = totals.iter().take(self.limit).collect();
        let next = listed.last().filter(|_| !is_all).map(|(name, _)| format!(r#""{name}""#));
        let lines = listed.iter().map(|(name, Total { connections, position })| {
            format!(r#"{{"channel":"{name}","connections":{connections},"position":{position}}}"#)
        });
        let (lines, next) = (lines.collect::<Vec<_>>().join(","), next.as_deref().unwrap_or("null"));
        Ok(format!(r#"{{"channels":[{lines}],"next":{next}}}"#))
    }

    /// Asks a shard for the channels from this key on.
    async fn ask(
        &self,
        shard: ShardId,
        from: u32,
        up_to: Option<ChannelName>,
        shared: &Shared,
    ) -> Result<ChannelList, BusError> {
        let (answer, list) = oneshot::channel();
        let request = ListChannels { from, after: self.after.clone(), up_to, answer };
        shared.context.shards.send(shard, ShardMessage::ListChannels(request));
        list.await.map_err(|_| BusError::Unavailable("this node is stopping".into()))
    }
}
