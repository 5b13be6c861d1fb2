//! Events from before a client joined, on Redis.

use serde_json::json;

use crate::common::recent_events::{backends_read_history, newcomers_get_recent_events};
use crate::common::{Client, Node, Redis, cluster};

#[tokio::test]
async fn newcomers_get_recent_events_on_redis() {
    let (_redis, node, other) = cluster(&["--shards", "1"]).await;
    newcomers_get_recent_events(&node).await;
    // A node that has not followed the channel reads all of them.
    let mut client = Client::open(&other, "c", "channel=room&history=3&lastEventId=", None).await;
    assert_eq!(client.welcome().await["recovered"], true);
    for n in 40..43 {
        assert_eq!(client.next_event().await.1, json!({ "n": n }));
    }
}

#[tokio::test]
async fn backends_read_history_on_redis() {
    backends_read_history(&Node::on(&Redis::start(&[]).await, &[]).await).await;
}

#[tokio::test]
async fn history_needs_redis() {
    let mut redis = Redis::start(&[]).await;
    let node = Node::on(&redis, &[]).await;
    redis.kill();
    node.unready().await;
    node.admin("GET", "/history?channel=room", b"").await.expect_rejection(503);
    assert_eq!(node.admin("GET", "/channels", b"").await.status, 200);
}
