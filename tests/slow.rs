//! Readers that stall: they cost the node no memory, hinder nobody, and get everything when they read again.

mod common;

use std::time::Duration;

use common::client::{JSON_MODE, position};
use common::raw::{frame_bytes, opcode};
use common::{Client, Node, Raw, Redis};
use serde_json::{Value, json};

/// Larger than what kernel buffers of a connection with a small receive window take.
const EVENTS: u64 = 3000;

/// A `--ping-timeout` beyond any pause that a busy machine makes between two reads.
const LONG: &str = "10m";

/// The headers of an upgrade.
const UPGRADE: [(&str, &str); 4] = [
    ("Connection", "Upgrade"),
    ("Upgrade", "websocket"),
    ("Sec-WebSocket-Version", "13"),
    ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
];

/// One event's text: 3000 of these are 12 MB.
fn padding() -> String {
    "x".repeat(4000)
}

/// Joins with a connection whose kernel buffers are small, so that not reading is felt by the server soon.
async fn stalled(node: &Node, query: &str) -> Raw {
    let mut raw = Raw::connect_with_small_buffers(node.public).await;
    let response = raw.upgrade(&format!("/ws/stalled?channel=room{query}"), &[]).await;
    assert_eq!(response.status, 101, "{response:?}");
    raw
}

/// Reads events, which must be those from number `first` on, until number `end`.
async fn read_numbers(raw: &mut Raw, numbers: std::ops::Range<u64>, ids: &[u64]) {
    for n in numbers {
        let event: Value = serde_json::from_str(&raw.next_text().await).expect("JSON");
        let got = (event["n"].as_u64(), event["id"].as_u64());
        assert_eq!(got, (Some(n), Some(ids[n as usize])), "{:.100}", event.to_string());
    }
}

/// Publishes these numbers, with padding.
async fn publish(node: &Node, numbers: std::ops::Range<u64>, ids: &mut Vec<u64>) {
    for n in numbers {
        ids.push(node.publish("room", &json!({"n": n, "padding": padding()})).await);
    }
}

async fn stalled_readers_cost_nothing_and_miss_nothing(node: &Node) {
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
    common::within("the reader that does not stall", &mut reader).await.expect("it saw all, live");
    let after = node.resident();
    let grown = after.saturating_sub(before);
    // 50 queues of 6 MB would be 300 MB.
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

#[tokio::test]
async fn stalled_readers_cost_no_memory_and_miss_nothing_on_redis() {
    let redis = Redis::start(&[]).await;
    let node = Node::on(&redis, &["--buffer-memory", "1MiB", "--ping-timeout", LONG]).await;
    stalled_readers_cost_nothing_and_miss_nothing(&node).await;
    assert!(node.metric("fanfare_bus_reads_total").await > 0.0, "they caught up from history");
}

#[tokio::test]
async fn stalled_readers_cost_no_memory_and_miss_nothing_on_the_local_bus() {
    // Its history is what is in memory, so half of the events must fit.
    let node = Node::start(&["--history", "2000", "--buffer-memory", "16MiB", "--ping-timeout", LONG]).await;
    stalled_readers_cost_nothing_and_miss_nothing(&node).await;
}

/// Events of 30 KB: a page of 256 of them is far larger than what a shard keeps of history, or Redis gives at once.
const LARGE: usize = 30_000;
const LARGE_EVENTS: u64 = 700;

/// Bytes that Redis has sent since it started.
async fn sent_by(redis: &Redis) -> u64 {
    redis.info("total_net_output_bytes").await.parse().expect("a number")
}

/// A channel with large events, and a client that is in it. What a shard has in memory is the last thirty or so. The ids
/// of all events.
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

/// A position 250 events into a page, with nearly all events behind it.
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
async fn readers_of_large_events_all_make_progress() {
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
        // Every other one takes what it gets through a small window, so that its socket is full again and again.
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
async fn a_reader_that_goes_away_costs_no_more_reads() {
    let redis = Redis::start(&[]).await;
    let node = Node::on(&redis, &["--shards", "1", "--buffer-memory", "1MiB"]).await;
    let (_live, ids) = large_events(&node, &redis).await;
    let at = far_into_a_page(&ids);
    for n in 0..50 {
        // It asks and closes at once, or takes a little.
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
    tokio::time::sleep(Duration::from_secs(2)).await; // nothing happens: that is what is tested
    let read = sent_by(&redis).await - before;
    assert!(read < 1 << 20, "Redis has sent {read} bytes to nobody");
}

#[tokio::test]
async fn a_reader_that_stalls_for_longer_than_history_lasts_is_told() {
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

#[tokio::test]
async fn a_slow_reader_that_reads_on_stays_though_its_pongs_are_late() {
    let node = Node::start(&["--ping-interval", "1s", "--ping-timeout", "1s"]).await;
    let (_, welcome) = Client::resume(&node, "head", "room", "").await;
    let first = position(&welcome["head"]) + 1;
    let ids: Vec<u64> = (first..first + EVENTS).collect();
    // With a receive window as usual: Linux counts a tiny one that fills up again and again as no progress.
    let mut raw = Raw::upgraded(node.public, "/ws/slow?channel=room").await;
    // It answers no ping, but takes some events every now and then, for much longer than heartbeat and timeout. It
    // stops while there is more than the kernel holds (4 MB): then the server can't see any more that it reads.
    let read = async {
        for part in 0..18 {
            read_numbers(&mut raw, part * 100..(part + 1) * 100, &ids).await;
            tokio::time::sleep(Duration::from_millis(400)).await; // slowness itself is what is tested
        }
    };
    let mut given = Vec::new();
    tokio::join!(read, publish(&node, 0..EVENTS, &mut given));
    assert_eq!(given, ids);
}

#[tokio::test]
async fn a_reader_that_never_reads_again_is_ended_and_frees_its_place() {
    let flags = ["--ping-interval", "1s", "--ping-timeout", "1s", "--buffer-memory", "1MiB"];
    let node = Node::start(&flags).await;
    let mut raw = stalled(&node, "").await;
    let mut ids = Vec::new();
    publish(&node, 0..1500, &mut ids).await;
    common::until("its end", || async { (node.metric("fanfare_connections").await == 0.0).then_some(()) })
        .await;
    // What the kernel still had is events in order, then nothing.
    let rest = raw.rest().await;
    assert!(rest.len() < 6_000_000, "{}", rest.len());
}

/// Reads frames of a client for whom every event is, until its position is `end`; counts pings and resets. An event is
/// the next after the client's position, a ping tells just that position, and only a reset moves it on.
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
async fn a_reset_comes_before_the_events_behind_the_gap() {
    const PINGS: usize = 900; // more than go into one write, and fewer than --max-message-rate takes at once
    let node = Node::start(&["--buffer-memory", "64KiB", "--history", "1000", "--ping-timeout", LONG]).await;
    let mut raw = Raw::connect_with_small_buffers(node.public).await;
    let path = "/ws/stalled?channel=room&lastEventId=";
    assert_eq!(raw.upgrade(path, &[("Sec-WebSocket-Protocol", JSON_MODE)]).await.status, 101);
    let welcome: Value = serde_json::from_str(&raw.next_text().await).expect("JSON");
    let mut at = position(&welcome["lastEventId"]);

    let mut ids = Vec::new();
    publish(&node, 0..400, &mut ids).await;
    let first = ids[0] + 150; // more than the socket takes, so that it reads history now
    read_positions(&mut raw, &mut at, first).await;
    raw.write(&pings(PINGS)).await;
    common::until("the pings to be read", || async {
        (node.metric("fanfare_messages_received_total").await >= PINGS as f64).then_some(())
    })
    .await;
    publish(&node, 400..1700, &mut ids).await;

    let told = read_positions(&mut raw, &mut at, ids[1699]).await;
    assert_eq!(told, (PINGS as u64, 1), "pings and resets");
}

#[tokio::test]
async fn pings_tell_positions_in_order_to_a_fast_reader() {
    let node = Node::start(&["--max-message-rate", "0"]).await;
    let mut raw = Raw::connect(node.public).await;
    let path = "/ws/fast?channel=room&lastEventId=";
    assert_eq!(raw.upgrade(path, &[("Sec-WebSocket-Protocol", JSON_MODE)]).await.status, 101);
    let welcome: Value = serde_json::from_str(&raw.next_text().await).expect("JSON");
    let mut at = position(&welcome["lastEventId"]);
    // Events of its own between pings: they come back while the next pings are read.
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

/// Each of them stalls in a frame of its own, which the node keeps for it once the feed has gone on.
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
    // The newest gets the whole of the frame in which it stalled.
    let last = readers.last_mut().expect("there are some");
    let event: Value = serde_json::from_str(&last.next_text().await).expect("JSON");
    assert_eq!(event["n"], 6);
}

#[tokio::test]
async fn pongs_do_not_keep_a_client_that_never_reads() {
    let flags = ["--ping-interval", "1s", "--ping-timeout", "1s", "--buffer-memory", "1MiB"];
    let node = Node::start(&flags).await;
    let mut raw = stalled(&node, "").await;
    publish(&node, 0..300, &mut Vec::new()).await; // more than the socket takes
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
