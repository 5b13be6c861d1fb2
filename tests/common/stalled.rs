//! Stalled readers: helpers and a test body for both buses.

use serde_json::{Value, json};

use super::client::position;
use super::{Client, Node, Raw, within};

/// More than the kernel buffers of a connection with a small receive window hold.
pub const EVENTS: u64 = 3000;

/// A `--ping-timeout` longer than any pause between two reads on a busy machine.
pub const LONG: &str = "10m";

/// One event's text: 3000 of these are 12 MB.
pub fn padding() -> String {
    "x".repeat(4000)
}

/// Joins with small kernel buffers, so that the server's sends block soon.
pub async fn stalled(node: &Node, query: &str) -> Raw {
    let mut raw = Raw::connect_with_small_buffers(node.public).await;
    let response = raw.upgrade(&format!("/ws/stalled?channel=room{query}"), &[]).await;
    assert_eq!(response.status, 101, "{response:?}");
    raw
}

/// Reads events, which must have these numbers and ids.
pub async fn read_numbers(raw: &mut Raw, numbers: std::ops::Range<u64>, ids: &[u64]) {
    for n in numbers {
        let event: Value = serde_json::from_str(&raw.next_text().await).expect("JSON");
        let got = (event["n"].as_u64(), event["id"].as_u64());
        assert_eq!(got, (Some(n), Some(ids[n as usize])), "{:.100}", event.to_string());
    }
}

/// Publishes these numbers, with padding.
pub async fn publish(node: &Node, numbers: std::ops::Range<u64>, ids: &mut Vec<u64>) {
    for n in numbers {
        ids.push(node.publish("room", &json!({"n": n, "padding": padding()})).await);
    }
}

pub async fn stalled_readers_cost_nothing_and_miss_nothing(node: &Node) {
    const READERS: usize = 50;
    let mut ids = Vec::new();
    let mut reader = tokio::spawn({
        let mut live = Client::plain(node, "live", "room").await;
        async move {
            for n in 0..EVENTS {
                assert_eq!(live.next_event().await.1["n"], n);
            }
        }
    });
    // A first round fills what is filled once: feeds, history, the allocator's pools.
    let warm_up = EVENTS / 2;
    publish(node, 0..warm_up, &mut ids).await;
    let (_, welcome) = Client::resume(node, "head", "room", "").await;
    assert_eq!(position(&welcome["head"]), ids[ids.len() - 1]);
    let mut readers = Vec::new();
    for _ in 0..READERS {
        let query = format!("&lastEventId={}", ids[ids.len() - 1]);
        readers.push(stalled(node, &query).await);
    }
    let before = node.resident();
    publish(node, warm_up..EVENTS, &mut ids).await;
    within("the reader that does not stall", &mut reader).await.expect("it saw all, live");
    let after = node.resident();
    let grown = after.saturating_sub(before);
    // 50 queues of 6 MB would take 300 MB.
    assert!(grown < 16 << 20, "resident memory grew by {grown} bytes from {before}");
    for raw in &mut readers {
        assert!(raw.next_text().await.contains("welcome"));
        read_numbers(raw, warm_up..EVENTS, &ids).await;
    }
    let after = node.resident();
    let grown = after.saturating_sub(before);
    assert!(grown < 16 << 20, "resident memory grew by {grown} bytes from {before} while they caught up");
    let id = node.publish("room", &json!({"n": EVENTS})).await;
    ids.push(id);
    for raw in &mut readers {
        read_numbers(raw, EVENTS..EVENTS + 1, &ids).await;
    }
}
