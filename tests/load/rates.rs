//! Rate limits whose effect only a quiet machine shows.

use std::time::{Duration, Instant};

use futures_util::stream::{self, StreamExt};
use serde_json::json;
use tokio::task::JoinSet;

use crate::common::raw::{frame_bytes, opcode::*};
use crate::common::{Client, Node, Raw, until};

#[tokio::test]
async fn busy_senders_get_no_extra_turns() {
    let _alone = crate::alone().await;
    let node = Node::start(&["--shards", "1", "--max-message-rate", "0", "--max-byte-rate", "0"]).await;
    // The most expensive bytes: as many empty fragments as a message may have.
    let message = [
        frame_bytes(false, TEXT, true, b""),
        frame_bytes(false, CONTINUATION, true, b"").repeat(1990),
        frame_bytes(true, CONTINUATION, true, b"e"),
    ]
    .concat();
    let mut floods = JoinSet::new();
    for _ in 0..4 {
        let mut raw = Raw::upgraded(node.public, "/ws/flood?channel=flood").await;
        let message = message.clone();
        floods.spawn(async move {
            loop {
                raw.write(&message).await;
            }
        });
    }
    let mut calm = Raw::upgraded(node.public, "/ws/calm?channel=calm").await;
    let received = || node.metric("fanfare_received_bytes_total");
    until("a long flood", || async { (received().await > 8e6).then_some(()) }).await;
    // Bytes read from the others until a ping is answered. The test itself may be slow, so the best
    // of several counts.
    let mut least = f64::MAX;
    for _ in 0..10 {
        let before = received().await;
        calm.frame(true, PING, b"").await;
        assert_eq!(calm.next().await, Some((PONG, Vec::new())));
        least = least.min(received().await - before);
    }
    let turn = 4.0 * f64::from(16 << 10);
    assert!(least < 6.0 * turn, "{} rounds of all clients until a ping is answered", least / turn);
}

#[tokio::test]
async fn history_reads_per_ip_are_rate_limited() {
    let _alone = crate::alone().await;
    const EVENTS: u64 = 1000;
    const JOINS: u64 = 5000; // 64 KiB each: five times the burst
    let flags = ["--trusted-proxy", "127.0.0.2", "--buffer-memory", "64KiB", "--shards", "1"];
    let node = Node::start(&flags).await;
    let _stays = Client::plain(&node, "stays", "room").await;
    let event = json!({ "text": "x".repeat(30_000) });
    let first = node.publish("room", &event).await;
    for _ in 1..EVENTS {
        node.publish("room", &event).await;
    }
    let join = async |address: &str, number: u64| {
        let mut raw = Raw::connect_from([127, 0, 0, 2], node.public).await;
        raw.write(format!("PROXY TCP4 {address} 127.0.0.1 1 2\r\n").as_bytes()).await;
        let position = first + number * 7919 % (EVENTS - 10);
        let path = format!("/ws/a?channel=room&lastEventId={position}");
        assert_eq!(raw.upgrade(&path, &[]).await.status, 101);
    };
    let start = Instant::now();
    let many = stream::iter((0..JOINS).map(|number| join("192.0.2.7", number))).buffer_unordered(50);
    many.collect::<Vec<()>>().await;
    // 64 MiB at once, then 32 MiB per second. Some joins are served from memory.
    assert!(start.elapsed() > Duration::from_secs(4), "{:?}", start.elapsed());
    let start = Instant::now();
    join("192.0.2.8", 0).await;
    assert!(start.elapsed() < Duration::from_secs(2), "another address waited {:?}", start.elapsed());
}
