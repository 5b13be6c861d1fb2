//! Shutdown of a node: when it exits, how evenly connections are closed, with which frames, and
//! with clients that do not read.

use std::time::{Duration, Instant};

use futures_util::{SinkExt, StreamExt};
use serde_json::json;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_tungstenite::tungstenite::Message;

use crate::common::proxy::Silence;
use crate::common::{Client, Node, Proxy, Raw, Redis, until, within};

/// What a drain may take in addition: two ticks of the shards, and a busy machine.
const SLACK: Duration = Duration::from_millis(1500);

#[tokio::test]
async fn closes_are_spread_over_the_drain() {
    let node = Node::start(&["--drain-timeout", "4s", "--shards", "2"]).await;
    let mut clients = Vec::new();
    for n in 0..60 {
        clients.push(Client::plain(&node, &format!("user{n}"), "room").await);
    }
    let started = Instant::now();
    node.signal("TERM");
    let mut closes = JoinSet::new();
    for mut client in clients {
        closes.spawn(async move {
            let close = client.expect_close().await;
            assert_eq!(close, (1012, "the node is restarting: reconnect".into()));
            started.elapsed()
        });
    }
    until("readiness to go", || async {
        let response = node.admin("GET", "/readyz", b"").await;
        (response.body == "this node is stopping\n").then_some(())
    })
    .await;
    let closes = closes.join_all().await;
    assert!(node.ended().await.success());
    let took = started.elapsed();
    assert!(took < Duration::from_secs(4), "all clients have gone: {took:?} {closes:?}");
    // The last quarter of the time is for flushing: 60 closes in 3 seconds.
    let after = |time| closes.iter().filter(|close| **close >= Duration::from_millis(time)).count();
    assert!((15..=45).contains(&after(1500)), "{closes:?}");
    for start in (0..=2000).step_by(250) {
        let many = after(start) - after(start + 1000);
        assert!((8..=40).contains(&many), "{many} closes from {start} ms on for a second: {closes:?}");
    }
}

#[tokio::test]
async fn unresponsive_clients_do_not_delay_exit() {
    let node = Node::start(&["--drain-timeout", "2s"]).await;
    let mut deaf = Vec::new();
    for n in 0..10 {
        // Half of them read nothing at all, so that not even the close frame fits.
        let small = n % 2 == 0;
        let mut raw = match small {
            true => Raw::connect_with_small_buffers(node.public).await,
            false => Raw::connect(node.public).await,
        };
        assert_eq!(raw.upgrade("/ws/a?channel=room", &[]).await.status, 101);
        deaf.push(raw);
    }
    until("sockets that are full", || async {
        node.publish("room", &json!({"text": "x".repeat(60_000)})).await;
        (node.metric("fanfare_slow_connections").await >= 5.0).then_some(())
    })
    .await;
    let started = Instant::now();
    node.signal("TERM");
    assert!(node.ended().await.success());
    let took = started.elapsed();
    assert!((Duration::from_millis(1900)..Duration::from_secs(2) + SLACK).contains(&took), "{took:?}");
    drop(deaf);
}

#[tokio::test]
async fn drain_timeout_of_zero_closes_all_at_once() {
    let node = Node::start(&["--drain-timeout", "0s"]).await;
    let mut clients = Vec::new();
    for _ in 0..20 {
        clients.push(Client::plain(&node, "a", "room").await);
    }
    let started = Instant::now();
    node.signal("INT");
    for client in &mut clients {
        assert_eq!(client.expect_close().await.0, 1012);
    }
    assert!(node.ended().await.success());
    assert!(started.elapsed() < SLACK);
}

#[tokio::test]
async fn node_without_clients_exits_at_once() {
    let node = Node::start(&["--drain-timeout", "10m"]).await;
    Client::plain(&node, "a", "room").await.leave().await;
    let started = Instant::now();
    node.signal("TERM");
    assert!(node.ended().await.success());
    assert!(started.elapsed() < SLACK);
}

#[tokio::test]
async fn second_signal_exits_at_once() {
    for (first, second) in [("TERM", "TERM"), ("INT", "TERM"), ("TERM", "INT")] {
        let node = Node::start(&["--drain-timeout", "10m", "--drain-delay", "10m"]).await;
        let _client = Client::plain(&node, "a", "room").await;
        node.signal(first);
        node.unready().await;
        let started = Instant::now();
        node.signal(second);
        assert!(node.ended().await.success(), "it was asked to, twice");
        assert!(started.elapsed() < SLACK);
        let has_line = || async { node.log().contains("stopping at once").then_some(()) };
        until("its last line, which may come later than its end", has_line).await;
    }
}

#[tokio::test]
async fn clients_can_join_during_the_drain_delay() {
    let node = Node::start(&["--drain-delay", "2s", "--drain-timeout", "1s"]).await;
    let mut before = Client::plain(&node, "a", "room").await;
    let started = Instant::now();
    node.signal("TERM");
    let response = until("the notice", || async {
        let response = node.get("/readyz").await;
        (response.status == 503).then_some(response)
    })
    .await;
    assert_eq!(response.body, "not ready\n");
    let mut after = Client::plain(&node, "b", "room").await;
    let id = node.publish("room", &json!({"n": 1})).await;
    for client in [&mut before, &mut after] {
        client.expect_event(id, &json!({"n": 1})).await;
        assert_eq!(client.expect_close().await.0, 1012);
        assert!(started.elapsed() >= Duration::from_secs(2));
    }
    assert!(TcpStream::connect(node.public).await.is_err(), "the listener is closed");
    assert!(node.ended().await.success());
}

#[tokio::test]
async fn queued_connections_are_answered_at_shutdown() {
    let node = Node::start(&["--shards", "1"]).await;
    // While the process is stopped, the kernel accepts connections for it.
    node.signal("STOP");
    let mut waiting = Vec::new();
    for _ in 0..300 {
        waiting.push(Raw::connect(node.public).await);
    }
    node.signal("TERM");
    node.signal("CONT");
    for raw in &mut waiting {
        let response = raw.upgrade("/ws/a?channel=room", &[]).await;
        assert!([101, 503].contains(&response.status), "{response:?}");
        if response.status == 503 {
            assert!(response.header("retry-after").is_some(), "{response:?}");
        }
    }
    drop(waiting);
    assert!(node.ended().await.success());
}

#[tokio::test]
async fn flooding_clients_get_1012() {
    let flags = [
        "--drain-timeout",
        "4s",
        "--ping-interval",
        "1s",
        "--ping-timeout",
        "1s",
        "--max-message-rate",
        "0",
        "--max-byte-rate",
        "0",
    ];
    let node = Node::start(&flags).await;
    let mut readers = JoinSet::new();
    for n in 0..20 {
        let name = format!("user{n}");
        let (client, _) = Client::json(&node, &name, "room").await;
        let (mut sink, mut stream) = client.split();
        let text = json!({"text": "x".repeat(200)}).to_string();
        let writer =
            tokio::spawn(async move { while sink.send(Message::text(text.clone())).await.is_ok() {} });
        readers.spawn(async move {
            let mut frames = 0;
            loop {
                match within("the next frame", stream.next()).await {
                    Some(Ok(Message::Close(close))) => {
                        writer.abort();
                        return (name, frames, close.map(|close| u16::from(close.code)));
                    }
                    Some(Ok(_)) => frames += 1,
                    other => panic!("{name}: {other:?} after {frames} frames"),
                }
            }
        });
    }
    until("the flood", || async {
        (node.metric("fanfare_messages_received_total").await > 1e4).then_some(())
    })
    .await;
    node.signal("TERM");
    let ends = readers.join_all().await;
    assert!(ends.iter().all(|(.., code)| *code == Some(1012)), "{ends:?}");
    assert!(node.ended().await.success());
}

/// Sends a POST /publish on its own connection.
async fn begin_publish(node: &Node, event: &str) -> Raw {
    let mut raw = Raw::connect(node.admin).await;
    let length = event.len();
    let head = format!("POST /publish?channel=room HTTP/1.1\r\nHost: {}\r\n", node.admin);
    raw.write(format!("{head}Content-Length: {length}\r\n\r\n{event}").as_bytes()).await;
    raw
}

#[tokio::test]
async fn publish_in_flight_is_answered_before_exit() {
    let redis = Redis::start(&[]).await;
    let proxy = Proxy::to(redis.port()).await;
    let flags = ["--redis", &proxy.url(), "--drain-timeout", "4s", "--log", "debug"];
    let node = Node::start(&flags).await;
    node.publish("room", &json!({"n": 0})).await;
    let before = redis.head("room").await;
    proxy.silence(Silence { up: false, down: true });
    let mut publishing = begin_publish(&node, r#"{"n":1}"#).await;
    until("Redis to take the event", || async { (redis.head("room").await > before).then_some(()) }).await;
    let idle = Raw::connect(node.admin).await;
    node.signal("TERM");
    until("the stop", || async { node.log().contains("stopping").then_some(()) }).await;
    tokio::time::sleep(Duration::from_millis(300)).await; // there are no other clients to wait for
    proxy.silence(Silence::default());
    let response = publishing.response().await;
    assert_eq!((response.status, &response.json()["id"]), (200, &json!(before + 1)), "{response:?}");
    assert_eq!(response.header("connection"), Some("close"));
    drop(publishing);
    assert!(node.ended().await.success());
    drop(idle);
}

#[tokio::test]
async fn unanswered_publishes_get_504_at_shutdown() {
    let redis = Redis::start(&[]).await;
    let proxy = Proxy::to(redis.port()).await;
    let node =
        Node::start(&["--redis", &proxy.url(), "--drain-timeout", "1s", "--publish-timeout", "10m"]).await;
    node.publish("room", &json!({"n": 0})).await;
    let before = redis.head("room").await;
    proxy.silence(Silence { up: false, down: true });
    let mut publishing = begin_publish(&node, r#"{"n":1}"#).await;
    until("Redis to take the event", || async { (redis.head("room").await > before).then_some(()) }).await;
    let started = Instant::now();
    node.signal("TERM");
    publishing.response().await.expect_rejection(504);
    drop(publishing);
    assert!(node.ended().await.success());
    assert!(started.elapsed() < Duration::from_secs(2) + 2 * SLACK, "{:?}", started.elapsed());
}
