//! Stalled readers: they cost the node no memory, delay no other client, and get everything when
//! they read on.

use std::time::Duration;

use serde_json::{Value, json};

use crate::common;
use crate::common::client::{JSON_MODE, position};
use crate::common::raw::{frame_bytes, opcode};
use crate::common::stalled::{
    EVENTS, LONG, publish, read_numbers, stalled, stalled_readers_cost_nothing_and_miss_nothing,
};
use crate::common::{Client, Node, Raw};

#[tokio::test]
async fn stalled_readers_cost_no_local_memory() {
    // Its history is in memory, so half of the events must fit.
    let node = Node::start(&["--history", "2000", "--buffer-memory", "16MiB", "--ping-timeout", LONG]).await;
    stalled_readers_cost_nothing_and_miss_nothing(&node).await;
}

#[tokio::test]
async fn slow_reader_with_late_pongs_stays() {
    let node = Node::start(&["--ping-interval", "1s", "--ping-timeout", "1s"]).await;
    let (_, welcome) = Client::resume(&node, "head", "room", "").await;
    let first = position(&welcome["head"]) + 1;
    let ids: Vec<u64> = (first..first + EVENTS).collect();
    // With a normal receive window: Linux counts a tiny window that fills up repeatedly as no
    // progress.
    let mut raw = Raw::upgraded(node.public, "/ws/slow?channel=room").await;
    // It answers no ping, but reads some events now and then, for much longer than ping interval and
    // timeout. It stops while there is more unread than the kernel holds (4 MB): then the server
    // can no longer see that it reads.
    let read = async {
        for part in 0..18 {
            read_numbers(&mut raw, part * 100..(part + 1) * 100, &ids).await;
            tokio::time::sleep(Duration::from_millis(400)).await; // the slowness is what is tested
        }
    };
    let mut given = Vec::new();
    tokio::join!(read, publish(&node, 0..EVENTS, &mut given));
    assert_eq!(given, ids);
}

#[tokio::test]
async fn reader_that_never_reads_is_closed() {
    let flags = ["--ping-interval", "1s", "--ping-timeout", "1s", "--buffer-memory", "1MiB"];
    let node = Node::start(&flags).await;
    let mut raw = stalled(&node, "").await;
    let mut ids = Vec::new();
    publish(&node, 0..1500, &mut ids).await;
    common::until("its end", || async { (node.metric("fanfare_connections").await == 0.0).then_some(()) })
        .await;
    // The kernel still holds some events, in order, and nothing else.
    let rest = raw.rest().await;
    assert!(rest.len() < 6_000_000, "{}", rest.len());
}

/// Reads frames of a client that gets every event, up to position `end`. Counts pings and resets.
/// An event has the next id, a ping carries the current position, and only a reset moves it
/// forward.
async fn read_positions(raw: &mut Raw, at: &mut u64, end: u64) -> (u64, u64) {
    let (mut pings, mut resets) = (0, 0);
    while *at < end {
        let frame: Value = serde_json::from_str(&raw.next_text().await).expect("JSON");
        match frame["type"].as_str() {
            Some("ping") => {
                assert_eq!(position(&frame["lastEventId"]), *at, "ping {pings}, after {resets} resets");
                pings += 1;
            }
            Some("reset") => {
                assert!(position(&frame["lastEventId"]) > *at, "forward from {at}: {frame}");
                *at = position(&frame["lastEventId"]);
                resets += 1;
            }
            _ => {
                assert_eq!(position(&frame["id"]), *at + 1, "after {pings} pings and {resets} resets");
                *at += 1;
            }
        }
    }
    (pings, resets)
}

fn pings(count: usize) -> Vec<u8> {
    frame_bytes(true, opcode::TEXT, true, br#"{"type":"ping"}"#).repeat(count)
}

#[tokio::test]
async fn reset_precedes_the_events_after_the_gap() {
    const PINGS: usize = 900; // more than go into one write, and fewer than the burst of --max-message-rate
    let node = Node::start(&["--buffer-memory", "64KiB", "--history", "1000", "--ping-timeout", LONG]).await;
    let mut raw = Raw::connect_with_small_buffers(node.public).await;
    let path = "/ws/stalled?channel=room&lastEventId=";
    assert_eq!(raw.upgrade(path, &[("Sec-WebSocket-Protocol", JSON_MODE)]).await.status, 101);
    let welcome: Value = serde_json::from_str(&raw.next_text().await).expect("JSON");
    let mut at = position(&welcome["lastEventId"]);

    let mut ids = Vec::new();
    publish(&node, 0..400, &mut ids).await;
    let first = ids[0] + 150; // more than the socket holds, so that it reads history now
    read_positions(&mut raw, &mut at, first).await;
    raw.write(&pings(PINGS)).await;
    common::until("the pings to be read", || async {
        (node.metric("fanfare_messages_received_total").await >= PINGS as f64).then_some(())
    })
    .await;
    publish(&node, 400..1700, &mut ids).await;

    let counts = read_positions(&mut raw, &mut at, ids[1699]).await;
    assert_eq!(counts, (PINGS as u64, 1), "pings and resets");
}

#[tokio::test]
async fn pings_carry_positions_in_order() {
    let node = Node::start(&["--max-message-rate", "0"]).await;
    let mut raw = Raw::connect(node.public).await;
    let path = "/ws/fast?channel=room&lastEventId=";
    assert_eq!(raw.upgrade(path, &[("Sec-WebSocket-Protocol", JSON_MODE)]).await.status, 101);
    let welcome: Value = serde_json::from_str(&raw.next_text().await).expect("JSON");
    let mut at = position(&welcome["lastEventId"]);
    // Its own events between pings: they arrive while the next pings are read.
    let event = frame_bytes(true, opcode::TEXT, true, br#"{"text":"x"}"#);
    for round in 1..=40 {
        raw.write(&[event.clone(), pings(640)].concat().repeat(4)).await;
        let end = at + 4;
        let (mut seen, _) = read_positions(&mut raw, &mut at, end).await;
        while seen < 4 * 640 {
            let ping: Value = serde_json::from_str(&raw.next_text().await).expect("JSON");
            assert_eq!(ping, json!({"type": "ping", "lastEventId": at}), "round {round}");
            seen += 1;
        }
    }
}

/// Each reader stalls in a different frame, which the node keeps for it after the feed has evicted
/// the entry.
#[tokio::test]
async fn stalled_readers_of_large_events_share_a_limit() {
    const SIZE: usize = 15 << 20;
    const LIMIT: f64 = (64 << 20) as f64;
    let flags = [
        "--shards",
        "1",
        "--max-message-size",
        "16MiB",
        "--buffer-memory",
        "16MiB",
        "--history-bytes",
        "16MiB",
        "--ping-timeout",
        LONG,
    ];
    let node = Node::start(&flags).await;
    let mut live = Raw::upgraded(node.public, "/ws/live?channel=room").await;
    let mut readers = Vec::new();
    let mut largest = 0.0_f64;
    for n in 0..7 {
        readers.push(stalled(&node, "").await);
        node.publish("room", &json!({"n": n, "padding": "x".repeat(SIZE)})).await;
        let event: Value = serde_json::from_str(&live.next_text().await).expect("JSON");
        assert_eq!(event["n"], n, "a client that reads gets all of them");
        largest = largest.max(node.metric("fanfare_unsent_bytes").await);
    }
    let cut = || node.metric_of("fanfare_connections_closed_total", r#"reason="slow_reader""#);
    common::until("the costliest to be cut", || async { (cut().await >= 2.0).then_some(()) }).await;
    let kept = node.metric("fanfare_unsent_bytes").await;
    assert!(kept > 0.0 && kept.max(largest) <= LIMIT, "{kept} bytes are kept, {largest} were");
    assert!(node.metric("fanfare_connections").await >= 4.0, "the others stay");
    // The newest reader gets its frame completely.
    let last = readers.last_mut().expect("there are some");
    let event: Value = serde_json::from_str(&last.next_text().await).expect("JSON");
    assert_eq!(event["n"], 6);
}

#[tokio::test]
async fn pongs_do_not_keep_a_client_that_never_reads() {
    let flags = ["--ping-interval", "1s", "--ping-timeout", "1s", "--buffer-memory", "1MiB"];
    let node = Node::start(&flags).await;
    let mut raw = stalled(&node, "").await;
    publish(&node, 0..300, &mut Vec::new()).await; // more than the socket holds
    let pong = frame_bytes(true, opcode::PONG, true, b"");
    common::within("its end", async {
        while node.metric("fanfare_connections").await > 0.0 {
            raw.write_some(&pong).await;
            tokio::time::sleep(Duration::from_millis(100)).await; // below --max-message-rate
        }
    })
    .await;
    let ended = node.metric(r#"fanfare_connections_closed_total{reason="ping_timeout"}"#).await;
    assert_eq!(ended, 1.0);
}
