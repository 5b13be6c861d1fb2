//! Rate limits whose effect only a quiet machine shows.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
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

/// Clients that resume, and newcomers with `history`.
#[tokio::test]
async fn history_reads_per_ip_are_rate_limited() {
    let _alone = crate::alone().await;
    const CHANNELS: u64 = 20;
    const EVENTS: u64 = 100;
    const JOINS: u64 = 4000; // 64 KiB each: four times the burst
    let flags = ["--trusted-proxy", "127.0.0.2", "--buffer-memory", "64KiB", "--shards", "1"];
    let node = Node::start(&flags).await;
    let event = json!({ "text": "x".repeat(8_000) });
    let channels = join_all((0..CHANNELS).map(async |channel| {
        let name = format!("room.{channel}");
        let stays = Client::plain(&node, "stays", &name).await;
        let first = node.publish(&name, &event).await;
        for _ in 1..EVENTS {
            node.publish(&name, &event).await;
        }
        (first, stays)
    }))
    .await;
    let join = async |address: String, query: String| {
        let mut raw = Raw::connect_from([127, 0, 0, 2], node.public).await;
        raw.write(format!("PROXY TCP4 {address} 127.0.0.1 1 2\r\n").as_bytes()).await;
        assert_eq!(raw.upgrade(&format!("/ws/a?{query}"), &[]).await.status, 101);
    };
    // Neighbours are in different channels, so that they share no page.
    let resume = |number: u64| {
        let channel = number % CHANNELS;
        let position = channels[channel as usize].0 + number * 7919 % (EVENTS - 10);
        format!("channel=room.{channel}&lastEventId={position}")
    };
    let newcomer = |number: u64| {
        format!("channel=room.{}&history={}", number % CHANNELS, EVENTS - number * 7919 % (EVENTS - 10))
    };
    for (address, query) in [(7, &resume as &dyn Fn(u64) -> String), (8, &newcomer)] {
        let (before, started) = (node.metric("fanfare_bus_reads_total").await, Instant::now());
        let joins = (0..JOINS).map(|number| join(format!("192.0.2.{address}"), query(number)));
        stream::iter(joins).buffer_unordered(20).collect::<Vec<()>>().await;
        let reads = node.metric("fanfare_bus_reads_total").await - before;
        // 64 MiB at once, then 32 MiB per second.
        let allowed = 1024.0 + 512.0 * started.elapsed().as_secs_f64();
        assert!(reads <= allowed, "{reads} reads, {allowed} are allowed");
        let started = Instant::now();
        join("192.0.2.9".into(), resume(0)).await;
        assert!(started.elapsed() < Duration::from_secs(2), "another address waited {:?}", started.elapsed());
    }
}
