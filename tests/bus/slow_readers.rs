//! Readers that stall or resume from far behind, on Redis.

use std::time::Duration;

use serde_json::{Value, json};

use crate::common;
use crate::common::client::position;
use crate::common::raw::opcode;
use crate::common::stalled::{
    EVENTS, LONG, publish, read_numbers, stalled, stalled_readers_cost_nothing_and_miss_nothing,
};
use crate::common::{Client, Node, Raw, Redis};

const UPGRADE: [(&str, &str); 4] = [
    ("Connection", "Upgrade"),
    ("Upgrade", "websocket"),
    ("Sec-WebSocket-Version", "13"),
    ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
];

#[tokio::test]
async fn stalled_readers_cost_no_memory_on_redis() {
    let redis = Redis::start(&[]).await;
    let node = Node::on(&redis, &["--buffer-memory", "1MiB", "--ping-timeout", LONG]).await;
    stalled_readers_cost_nothing_and_miss_nothing(&node).await;
    assert!(node.metric("fanfare_bus_reads_total").await > 0.0, "they caught up from history");
}

/// Events of 30 KB: a page of 256 is far larger than what a shard keeps of history, or Redis
/// returns at once.
const LARGE: usize = 30_000;
const LARGE_EVENTS: u64 = 700;

/// Bytes that Redis has sent since it started.
async fn sent_by(redis: &Redis) -> u64 {
    redis.info("total_net_output_bytes").await.parse().expect("a number")
}

/// Publishes large events to a channel with one client, of which a shard has about the last thirty
/// in memory. Returns the client and the ids.
async fn large_events(node: &Node, redis: &Redis) -> (Client, Vec<u64>) {
    let client = Client::plain(node, "live", "room").await;
    let mut publisher = redis.client().await;
    let mut ids = Vec::new();
    for n in 0..LARGE_EVENTS {
        let event = json!({"n": n, "padding": "x".repeat(LARGE)}).to_string();
        ids.push(publisher.fcall("room", event.as_bytes(), None).await.int() as u64);
    }
    (client, ids)
}

/// A position 250 events into a page, with nearly all events after it.
fn far_into_a_page(ids: &[u64]) -> usize {
    ids.iter().position(|id| (id + 1) % 256 == 250).expect("there are more than two pages")
}

#[tokio::test]
async fn large_events_are_read_once_from_history() {
    let redis = Redis::start(&[]).await;
    let node = Node::on(&redis, &["--shards", "1", "--buffer-memory", "1MiB"]).await;
    let (_live, ids) = large_events(&node, &redis).await;
    let at = far_into_a_page(&ids);
    for last in [at, at + 3, ids.len() - 50] {
        let before = sent_by(&redis).await;
        let path = format!("/ws/late?channel=room&lastEventId={}", ids[last]);
        let mut raw = Raw::upgraded(node.public, &path).await;
        assert!(raw.next_text().await.contains(r#""recovered":true"#));
        read_numbers(&mut raw, last as u64 + 1..LARGE_EVENTS, &ids).await;
        let (read, got) = (sent_by(&redis).await - before, (ids.len() - last - 1) * LARGE);
        assert!(read <= 2 * got as u64, "Redis has sent {read} bytes for {got}");
    }
}

#[tokio::test]
async fn readers_of_large_events_all_progress() {
    const READERS: usize = 16;
    let redis = Redis::start(&[]).await;
    let node = Node::on(&redis, &["--shards", "1", "--buffer-memory", "1MiB"]).await;
    let (_live, ids) = large_events(&node, &redis).await;
    let before = sent_by(&redis).await;
    let ids = std::sync::Arc::new(ids);
    let mut readers = Vec::new();
    let mut got = 0;
    for n in 0..READERS {
        let last = far_into_a_page(&ids) + 7 * n;
        got += (ids.len() - last - 1) * LARGE;
        // Every other reader has a small window, so that its socket fills up repeatedly.
        let path = format!("&lastEventId={}", ids[last]);
        let mut raw = match n % 2 {
            0 => stalled(&node, &path).await,
            _ => Raw::upgraded(node.public, &format!("/ws/late?channel=room{path}")).await,
        };
        let ids = ids.clone();
        readers.push(tokio::spawn(async move {
            assert!(raw.next_text().await.contains(r#""recovered":true"#));
            read_numbers(&mut raw, last as u64 + 1..LARGE_EVENTS, &ids).await;
        }));
    }
    for reader in &mut readers {
        common::within("all events", reader).await.expect("all in order");
    }
    let read = sent_by(&redis).await - before;
    assert!(read <= 2 * got as u64, "Redis has sent {read} bytes for {got}");
}

#[tokio::test]
async fn closed_readers_cause_no_more_reads() {
    let redis = Redis::start(&[]).await;
    let node = Node::on(&redis, &["--shards", "1", "--buffer-memory", "1MiB"]).await;
    let (_live, ids) = large_events(&node, &redis).await;
    let at = far_into_a_page(&ids);
    for n in 0..50 {
        // Half of them close before the response, the others after it.
        let mut raw = Raw::connect(node.public).await;
        let path = format!("/ws/gone?channel=room&lastEventId={}", ids[at + n]);
        if n % 2 == 0 {
            raw.upgrade(&path, &[]).await;
        } else {
            raw.write(&common::http::request_bytes(node.public, "GET", &path, &UPGRADE, b"")).await;
        }
    }
    common::until("their end", || async { (node.metric("fanfare_connections").await == 1.0).then_some(()) })
        .await;
    let before = sent_by(&redis).await;
    tokio::time::sleep(Duration::from_secs(2)).await; // nothing must happen
    let read = sent_by(&redis).await - before;
    assert!(read < 1 << 20, "Redis has sent {read} bytes for no client");
}

#[tokio::test]
async fn stall_beyond_history_is_announced() {
    let redis = Redis::start(&[]).await;
    let flags = ["--history", "1000", "--buffer-memory", "1MiB", "--ping-timeout", LONG];
    let local = Node::start(&flags).await;
    let on_redis = Node::on(&redis, &flags).await;
    for node in [&local, &on_redis] {
        let mut ids = Vec::new();
        let mut recovering = stalled(node, "&lastEventId=").await;
        let mut plain = stalled(node, "").await;
        publish(node, 0..EVENTS, &mut ids).await;

        let welcome: Value = serde_json::from_str(&recovering.next_text().await).expect("JSON");
        let mut at = position(&welcome["lastEventId"]);
        let mut resets = 0;
        while at < ids[EVENTS as usize - 1] {
            let frame: Value = serde_json::from_str(&recovering.next_text().await).expect("JSON");
            if frame["type"] == "reset" {
                resets += 1;
                assert!(position(&frame["lastEventId"]) > at, "forward");
                at = position(&frame["lastEventId"]);
            } else {
                assert_eq!(position(&frame["id"]), at + 1, "nothing is missing without a word");
                assert_eq!(frame["n"], ids.binary_search(&(at + 1)).expect("a known id"));
                at += 1;
            }
        }
        assert!(resets >= 1, "far more was published than buffers and history hold");
        let mut last = None;
        let code = loop {
            match plain.next().await {
                Some((opcode::TEXT, text)) => {
                    let event: Value = serde_json::from_slice(&text).expect("JSON");
                    let id = position(&event["id"]);
                    assert!(last.is_none_or(|last| id == last + 1), "{id} after {last:?}");
                    last = Some(id);
                }
                Some((opcode::CLOSE, payload)) => break u16::from_be_bytes([payload[0], payload[1]]),
                Some((opcode::PING, _)) => {}
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(code, 4008);
    }
}
