//! Rate limits, and clients that exceed them.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::common::raw::{frame_bytes, opcode::*};
use crate::common::{Client, Node, Raw, TokenKey, until};

/// Joins `room` as `flood`, in JSON mode with a subprotocol, otherwise in plain mode.
async fn join(node: &Node, query: &str, subprotocol: &str) -> Raw {
    let mut raw = Raw::connect(node.public).await;
    let path = format!("/ws/flood?channel=room{query}");
    assert_eq!(raw.upgrade(&path, &[("Sec-WebSocket-Protocol", subprotocol)]).await.status, 101);
    raw
}

/// What a client gets until it is closed. Some answers of the bus may come too late for it.
#[derive(Default)]
struct Answers {
    errors: Vec<Value>,
    pongs: Vec<Vec<u8>>,
    code: u16,
}

async fn read_answers(raw: &mut Raw) -> Answers {
    let mut answers = Answers::default();
    loop {
        match raw.next().await {
            Some((TEXT, text)) => {
                let value: Value = serde_json::from_slice(&text).expect("JSON");
                if value["type"] == "error" {
                    answers.errors.push(value);
                }
            }
            Some((PONG, payload)) => answers.pongs.push(payload),
            Some((CLOSE, payload)) => {
                answers.code = u16::from_be_bytes([payload[0], payload[1]]);
                raw.expect_end().await;
                return answers;
            }
            other => panic!("{other:?}"),
        }
    }
}

/// The events that a subscriber has seen of a flood so far.
async fn published(node: &Node, subscriber: &mut Client) -> Vec<Value> {
    let marker = node.publish("room", &json!({"marker": 1})).await;
    let mut events = Vec::new();
    loop {
        match subscriber.next_event().await {
            (id, _) if id == marker => return events,
            (_, event) => events.push(event),
        }
    }
}

async fn too_fast(node: &Node) -> f64 {
    node.metric_of("fanfare_publish_errors_total", r#"code="rate_limited""#).await
}

/// The limit for a rate of one per second: a burst of ten, and one more for each second of the
/// test.
fn expect_burst(taken: usize, started: Instant) {
    let most = 11 + started.elapsed().as_secs() as usize;
    assert!((10..=most).contains(&taken), "{taken} of a rate of 1 a second were taken");
}

#[tokio::test]
async fn message_flood_gets_errors_and_then_4029() {
    let node = Node::start(&["--max-message-rate", "1"]).await;
    let mut subscriber = Client::plain(&node, "subscriber", "room").await;
    let mut raw = join(&node, "", "fanfare.v1").await;
    let started = Instant::now();
    let frame = |n: usize| frame_bytes(true, TEXT, true, json!({"data": n, "ref": n}).to_string().as_bytes());
    raw.write(&(0..100).map(frame).collect::<Vec<_>>().concat()).await;
    let answers = read_answers(&mut raw).await;
    let events = published(&node, &mut subscriber).await;
    let taken = events.len();
    expect_burst(taken, started);
    // Accepted messages keep their order. Later ones are rejected with their `ref`.
    for (n, event) in events.iter().enumerate() {
        assert_eq!(*event, json!({"sender": "flood", "data": n}));
    }
    assert_eq!(answers.code, 4029);
    let rejected: Vec<_> = answers.errors.iter().map(|error| (&error["code"], &error["ref"])).collect();
    let expected: Vec<_> = (taken..taken + 10).map(|n| (json!("rate_limited"), json!(n))).collect();
    assert_eq!(rejected, expected.iter().map(|(code, n)| (code, n)).collect::<Vec<_>>());
    assert_eq!(node.metric_of("fanfare_connections_closed_total", r#"reason="rate_limited""#).await, 1.0);
    assert_eq!(too_fast(&node).await, 11.0);
    assert_eq!(node.metric("fanfare_messages_received_total").await, taken as f64);
}

#[tokio::test]
async fn plain_client_is_closed_at_the_rate_limit() {
    let node = Node::start(&["--max-message-rate", "1"]).await;
    let mut subscriber = Client::plain(&node, "subscriber", "room").await;
    let flood = frame_bytes(true, TEXT, true, b"hi").repeat(50);
    let started = Instant::now();
    let mut simple = join(&node, "", "").await;
    simple.write(&flood).await;
    assert_eq!(read_answers(&mut simple).await.code, 4029);
    expect_burst(published(&node, &mut subscriber).await.len(), started);
    assert_eq!(too_fast(&node).await, 1.0, "the first one is the last");

    let started = Instant::now();
    let mut recovering = join(&node, "&lastEventId=", "").await;
    recovering.write(&flood).await;
    let answers = read_answers(&mut recovering).await;
    assert_eq!((answers.code, answers.errors.len()), (4029, 10));
    let message = "rate limit exceeded: 1 message or 1MiB a second";
    assert_eq!(answers.errors[0], json!({"type": "error", "code": "rate_limited", "message": message}));
    expect_burst(published(&node, &mut subscriber).await.len(), started);
}

/// Floods over short consecutive connections, which must be closed after a few messages in total.
async fn expect_no_gain(node: &Node, rate: f64, connect: impl AsyncFn() -> Raw) {
    let flood = frame_bytes(true, TEXT, true, b"hi").repeat(1500);
    let before = node.metric("fanfare_messages_received_total").await;
    let started = Instant::now();
    for _ in 0..12 {
        let mut raw = connect().await;
        raw.write_some(&flood).await;
        assert_eq!(read_answers(&mut raw).await.code, 4029);
    }
    let most = 101.0 + rate * started.elapsed().as_secs_f64();
    let taken = node.metric("fanfare_messages_received_total").await - before;
    assert!((100.0..=most).contains(&taken), "{taken} messages on 12 connections, {most} are allowed");
}

#[tokio::test]
async fn reconnecting_gains_no_messages() {
    let node = Node::start(&["--trusted-proxy", "127.0.0.2"]).await;
    let connect = async |address: &str, path: &str| {
        let mut raw = Raw::connect_from([127, 0, 0, 2], node.public).await;
        raw.write(format!("PROXY TCP6 {address} ::1 1 2\r\n").as_bytes()).await;
        assert_eq!(raw.upgrade(path, &[]).await.status, 101);
        raw
    };
    // An address has the allowance of ten users, whatever user ids it sends. A new one may send a
    // tenth of it at once.
    expect_no_gain(&node, 1000.0, async || connect("2001:db8::1", "/ws/a?channel=room").await).await;
    // Nor does it gain tolerance: once too many messages were rejected, each accepted one allows
    // one more rejection.
    let flood = frame_bytes(true, TEXT, true, b"hi").repeat(4000);
    let started = Instant::now();
    let mut errors = 0.0;
    for _ in 0..2 {
        let mut raw = connect("2001:db8:0:ff::1", "/ws/b?channel=room&lastEventId=").await;
        raw.write_some(&flood).await;
        let answers = read_answers(&mut raw).await;
        assert_eq!(answers.code, 4029);
        errors += answers.errors.len() as f64;
        for error in &answers.errors {
            let text = error["message"].as_str().expect("text");
            assert!(text.ends_with(" a second for all connections of an address"), "{text}");
        }
    }
    let most = 1001.0 + 1000.0 * started.elapsed().as_secs_f64();
    assert!(errors <= most, "{errors} error frames, {most} are allowed");
    // Other addresses have their own allowance.
    expect_no_gain(&node, 1000.0, async || connect("2001:db8:0:100::1", "/ws/a?channel=room").await).await;
}

#[tokio::test]
async fn reconnecting_gains_a_user_no_messages() {
    let key = TokenKey::new();
    let node = Node::start(&["--jwt-key", &key.path()]).await;
    for user in ["alice", "bob"] {
        let path = format!("/ws/{user}?channel=room&token={}", key.token(user, &[]));
        expect_no_gain(&node, 100.0, async || Raw::upgraded(node.public, &path).await).await;
    }
}

#[tokio::test]
async fn bytes_and_fragments_are_rate_limited() {
    let node = Node::start(&["--max-byte-rate", "64KiB"]).await;
    // Each message costs nearly a second's allowance, so ten may come at once.
    let long = frame_bytes(true, TEXT, true, &[b'x'; 64_000]);
    let fragments = [
        frame_bytes(false, TEXT, true, b"e"),
        frame_bytes(false, CONTINUATION, true, b"").repeat(999),
        frame_bytes(true, CONTINUATION, true, b""),
    ]
    .concat();
    for message in [long, fragments] {
        let mut raw = join(&node, "&lastEventId=", "").await;
        let started = Instant::now();
        raw.write(&message.repeat(20)).await;
        let (mut taken, mut rejected) = (0, 0);
        while taken + rejected < 20 {
            let value: Value = serde_json::from_str(&raw.next_text().await).expect("JSON");
            match value["type"].as_str() {
                Some("error") => rejected += 1,
                Some("welcome") => {}
                _ => taken += 1,
            }
        }
        expect_burst(taken, started);
    }
}

#[tokio::test]
async fn ping_and_pong_floods_are_rate_limited() {
    let node = Node::start(&["--max-message-rate", "1"]).await;
    for opcode in [PING, PONG] {
        let mut raw = join(&node, "", "fanfare.v1").await;
        let started = Instant::now();
        let frame = |n: u8| frame_bytes(true, opcode, true, &[n]);
        raw.write(&(0..100).map(frame).collect::<Vec<_>>().concat()).await;
        let answers = read_answers(&mut raw).await;
        assert_eq!((answers.code, answers.errors.len()), (4029, 10));
        assert_eq!(answers.errors[0]["code"], "rate_limited");
        if opcode == PING {
            expect_burst(answers.pongs.len(), started);
            assert_eq!(answers.pongs[..10], [[0], [1], [2], [3], [4], [5], [6], [7], [8], [9]]);
        }
    }
}

#[tokio::test]
async fn json_pings_and_invalid_frames_count() {
    let node = Node::start(&["--max-message-rate", "1"]).await;
    for text in [r#"{"type":"ping"}"#, "no JSON"] {
        let mut raw = join(&node, "", "fanfare.v1").await;
        raw.write(&frame_bytes(true, TEXT, true, text.as_bytes()).repeat(50)).await;
        let answers = read_answers(&mut raw).await;
        let too_fast = answers.errors.iter().filter(|error| error["code"] == "rate_limited");
        assert_eq!((answers.code, too_fast.count()), (4029, 10), "{text}");
    }
}

#[tokio::test]
async fn client_that_slows_down_stays() {
    let node = Node::start(&["--max-message-rate", "20"]).await;
    let (mut client, _) = Client::json(&node, "a", "room").await;
    for _ in 0..2 {
        // Sends without a pause until the first error.
        let mut rejected = 0;
        while rejected < 5 {
            let (answer, _) = client.send_for_ack(json!({"text": "hi"})).await;
            if let Err(error) = answer {
                assert_eq!(error["code"], "rate_limited");
                rejected += 1;
            }
        }
        // After a pause its messages are published.
        tokio::time::sleep(Duration::from_millis(500)).await; // the time of ten messages
        for _ in 0..5 {
            let (answer, _) = client.send_for_ack(json!({"text": "hi"})).await;
            answer.expect("it waited");
        }
    }
}

#[tokio::test]
async fn pongs_to_server_pings_are_not_counted() {
    let node = Node::start(&["--max-message-rate", "1", "--ping-interval", "100ms"]).await;
    let mut raw = join(&node, "", "fanfare.v1").await;
    let mut pings = 0;
    while pings < 40 {
        if let Some((PING, payload)) = raw.next().await {
            raw.frame(true, PONG, &payload).await;
            pings += 1;
        }
    }
    assert_eq!(too_fast(&node).await, 0.0);
}

#[tokio::test]
async fn only_the_last_pings_are_answered() {
    let node = Node::start(&["--shards", "1"]).await;
    let mut raw = join(&node, "", "").await;
    let frame = |n: u8| frame_bytes(true, PING, true, &[n; 125]);
    raw.write(&(0..64).map(frame).collect::<Vec<_>>().concat()).await;
    let mut pongs = 0;
    loop {
        let (opcode, payload) = raw.next().await.expect("a pong");
        assert_eq!(opcode, PONG);
        pongs += 1;
        if payload[0] == 63 {
            break;
        }
    }
    // The kernel decides in how many reads they arrive, so only their total is limited.
    assert!(pongs < 64, "each of many pings has a pong of its own");
}

#[tokio::test]
async fn flood_costs_no_more_cpu_than_its_allowance() {
    let node = Node::start(&["--shards", "1"]).await;
    let mut subscriber = Client::plain(&node, "subscriber", "other").await;
    let before = node.metric("process_cpu_seconds_total").await;
    let flood = frame_bytes(true, TEXT, true, b"hi").repeat(10_000);
    let mut raw = join(&node, "&lastEventId=", "").await;
    let mut sent = 0;
    while sent < 64 << 20 && raw.write_some(&flood).await {
        sent += flood.len();
    }
    let taken = node.metric("fanfare_messages_received_total").await;
    let spent = node.metric("process_cpu_seconds_total").await - before;
    assert!((1000.0..2000.0).contains(&taken), "{taken} were taken");
    assert!(spent < 1.0, "{spent} seconds of CPU for {sent} bytes");
    let id = node.publish("other", &json!({"n": 1})).await;
    subscriber.expect_event(id, &json!({"n": 1})).await;
}

#[tokio::test]
async fn flood_without_reads_costs_no_memory() {
    for (flags, opcode) in [
        (&["--client-publish", "off", "--max-message-rate", "0", "--max-byte-rate", "0"][..], TEXT), // an error frame for each
        (&["--max-message-rate", "0", "--max-byte-rate", "0"], PING),
        (&["--client-publish", "off", "--max-message-rate", "100000"], TEXT), // and each of the last 65,534
    ] {
        let node = Node::start(&[&["--shards", "1", "--buffer-memory", "64KiB"], flags].concat()).await;
        let mut raw = Raw::connect_with_small_buffers(node.public).await;
        assert_eq!(raw.upgrade("/ws/rude?channel=room&lastEventId=", &[]).await.status, 101);
        let before = node.resident();
        let flood = frame_bytes(true, opcode, true, &[b'p'; 100]).repeat(1000);
        let mut sent = 0;
        while sent < 64 << 20 && raw.write_some(&flood).await {
            sent += flood.len();
        }
        let grown = node.resident().saturating_sub(before);
        assert!(grown < 4 << 20, "{grown} bytes after {sent} bytes: {flags:?}");
        until("the node to answer", || async { (node.get("/healthz").await.status == 200).then_some(()) })
            .await;
    }
}
