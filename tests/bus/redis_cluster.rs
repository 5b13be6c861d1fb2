//! Nodes on a Redis Cluster.

use std::time::Duration;

use serde_json::json;

use crate::common::{Client, Node, Redis, RedisCluster, Value, until};

async fn nodes(cluster: &RedisCluster) -> (Node, Node) {
    let url = cluster.url();
    let flags = ["--redis", &url];
    tokio::join!(Node::start(&flags), Node::start(&flags))
}

/// Publishes by FCALL at the primary of a channel, once that is available.
async fn fcall(cluster: &RedisCluster, channel: &str, event: &[u8]) -> u64 {
    until("FCALL", || async {
        let answer = cluster.client_of(channel).await.fcall(channel, event, None).await;
        (!matches!(answer, Value::Error(_))).then(|| answer.int() as u64)
    })
    .await
}

#[tokio::test]
async fn channels_of_all_primaries_reach_both_nodes() {
    let cluster = RedisCluster::start(&[]).await;
    let (a, b) = nodes(&cluster).await;
    for channel in cluster.channels(1).await.concat() {
        let (mut listener, _) = Client::json(&b, "listener", &channel).await;
        let (mut sender, _) = Client::json(&a, "sender", &channel).await;
        let (sent, _) = sender.send_for_ack(json!({"text": "from a client"})).await;
        listener.expect_event(sent.unwrap(), &json!({"sender": "sender", "text": "from a client"})).await;
        let posted = a.publish(&channel, &json!({"text": "from a backend"})).await;
        listener.expect_event(posted, &json!({"text": "from a backend"})).await;
        let called = fcall(&cluster, &channel, br#"{"text":"from a program"}"#).await;
        assert_eq!(called, posted + 1, "they share one sequence");
        listener.expect_event(called, &json!({"text": "from a program"})).await;
        let (mut resumed, welcome) = Client::resume(&a, "listener", &channel, posted).await;
        assert_eq!(welcome["recovered"], true);
        resumed.expect_event(called, &json!({"text": "from a program"})).await;
    }
}

#[tokio::test]
async fn publish_of_other_programs_arrives_once() {
    let cluster = RedisCluster::start(&[]).await;
    let (a, b) = nodes(&cluster).await;
    let mut clients = [Client::simple(&a, "a").await, Client::simple(&b, "b").await];
    for n in 0..cluster.nodes.len() {
        cluster.ok(n, &["PUBLISH", "ws_broadcast", &format!(r#"{{"n":{n}}}"#)]).await;
        for client in &mut clients {
            assert_eq!(client.next_json().await, json!({"n": n}));
        }
    }
}

#[tokio::test]
async fn idempotency_key_moves_with_its_slot() {
    let cluster = RedisCluster::start(&[]).await;
    let (a, _b) = nodes(&cluster).await;
    let channel = &cluster.channels(1).await[0][0];
    let post = async || {
        let path = format!("/publish?channel={channel}");
        let headers = [("Idempotency-Key", "one")];
        let answer = a.admin_with("POST", &path, &headers, br#"{"text":"once"}"#).await;
        assert_eq!(answer.status, 200, "{}", answer.body);
        answer.json()["id"].as_u64().unwrap()
    };
    let id = post().await;
    cluster.move_slot(cluster.slot(channel).await, 0, 1, Duration::from_millis(50)).await;
    assert_eq!(post().await, id);
}

#[tokio::test]
async fn nodes_of_other_modes_are_refused() {
    let cluster = RedisCluster::of(3, false, &[]).await;
    let single = Redis::start(&[]).await;
    for (url, part) in [
        (cluster.nodes[0].url(), "use redis-cluster://HOST:PORT"),
        (format!("redis-cluster://127.0.0.1:{}", single.port()), "use redis://HOST:PORT"),
    ] {
        let node = Node::start_unready(&["--redis", &url]).await;
        assert!(!node.ended().await.success());
        assert!(node.log().contains(part), "{}", node.log());
    }
}
