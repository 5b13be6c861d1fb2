//! Limits on connections, the addresses that they count for behind proxies, and the release of
//! every slot.

use futures_util::future::join_all;
use serde_json::json;

use crate::common;
use crate::common::{Client, Node, Raw, Rng, http, until};

const PROXY: [u8; 4] = [127, 0, 0, 2];
const OTHER: [u8; 4] = [127, 0, 0, 3];
const UPGRADE: [(&str, &str); 4] = [
    ("Connection", "Upgrade"),
    ("Upgrade", "websocket"),
    ("Sec-WebSocket-Version", "13"),
    ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
];

/// Requests an upgrade, which must be rejected because a limit is reached.
async fn expect_full(mut raw: Raw, path: &str, headers: &[(&str, &str)], status: u16) {
    let response = raw.upgrade(path, headers).await;
    response.expect_rejection(status);
    assert_eq!(response.header("retry-after"), Some("5"), "{response:?}");
    raw.expect_end().await;
}

/// Requests an upgrade, which must succeed. Returns the connection.
async fn upgraded(mut raw: Raw, path: &str, headers: &[(&str, &str)]) -> Raw {
    let response = raw.upgrade(path, headers).await;
    assert_eq!(response.status, 101, "{response:?}");
    raw
}

async fn ends(node: &Node, reason: &str) -> f64 {
    node.metric_of("fanfare_connections_closed_total", &format!(r#"reason="{reason}""#)).await
}

async fn empty(node: &Node) {
    until("every connection to be gone", || async {
        (node.metric("fanfare_connections").await == 0.0).then_some(())
    })
    .await;
}

/// Connects and sends a PROXY header before the request.
async fn proxied(node: &Node, client: &str) -> Raw {
    let mut raw = Raw::connect_from(PROXY, node.public).await;
    raw.write_some(format!("PROXY TCP4 {client} 127.0.0.1 1 2\r\n").as_bytes()).await;
    raw
}

#[tokio::test]
async fn full_node_answers_503_and_serves_on() {
    let node = Node::start(&["--max-connections", "3"]).await;
    assert_eq!(node.metric("fanfare_max_connections").await, 3.0);
    empty(&node).await; // the readiness probes
    let mut first = Client::plain(&node, "a", "room").await;
    let second = Client::plain(&node, "a", "room").await;
    let third = Raw::connect(node.public).await; // it sends nothing and counts nevertheless
    until("the third to be counted", || async {
        (node.metric("fanfare_connections").await == 3.0).then_some(())
    })
    .await;
    for _ in 0..3 {
        expect_full(Raw::connect(node.public).await, "/ws/a", &[], 503).await;
    }
    assert_eq!(ends(&node, "node_limit").await, 3.0);
    assert_eq!(node.get("/healthz").await.status, 200);
    assert_eq!(node.get("/readyz").await.status, 200);
    let id = node.publish("room", &json!({"n": 1})).await;
    first.expect_event(id, &json!({"n": 1})).await;
    // A closed connection frees its slot, and so does a request timeout.
    second.leave().await;
    let mut third = third;
    third.response().await.expect_rejection(408);
    drop(third);
    until("room for two more", || async { (node.metric("fanfare_connections").await == 1.0).then_some(()) })
        .await;
    let _two = [Client::plain(&node, "b", "room").await, Client::plain(&node, "b", "room").await];
    expect_full(Raw::connect(node.public).await, "/ws/a", &[], 503).await;
}

#[tokio::test]
async fn silent_client_over_the_limit_gets_429() {
    let node = Node::start(&["--max-connections-per-ip", "1"]).await;
    empty(&node).await;
    let _first = Raw::upgraded(node.public, "/ws/a").await;
    let mut silent = Raw::connect(node.public).await;
    let response = silent.response().await;
    response.expect_rejection(429);
    assert_eq!(response.header("retry-after"), Some("5"));
    silent.expect_end().await;
    assert_eq!(ends(&node, "ip_limit").await, 1.0);
}

#[tokio::test]
async fn limit_per_ip_protects_others() {
    let node = Node::start(&["--max-connections-per-ip", "2"]).await;
    empty(&node).await;
    // The first connection sends nothing.
    let silent = Raw::connect_from(OTHER, node.public).await;
    let one = upgraded(Raw::connect_from(OTHER, node.public).await, "/ws/a", &[]).await;
    for _ in 0..10 {
        expect_full(Raw::connect_from(OTHER, node.public).await, "/ws/a", &[], 429).await;
    }
    assert_eq!(ends(&node, "ip_limit").await, 10.0);
    let _others = [Raw::upgraded(node.public, "/ws/a").await, Raw::upgraded(node.public, "/ws/b").await];
    expect_full(Raw::connect(node.public).await, "/ws/c", &[], 429).await;
    drop((silent, one));
    until("room for two more of that address", || async {
        (node.metric("fanfare_connections").await == 2.0).then_some(())
    })
    .await;
    let mut two = Vec::new();
    for _ in 0..2 {
        two.push(upgraded(Raw::connect_from(OTHER, node.public).await, "/ws/a", &[]).await);
    }
    expect_full(Raw::connect_from(OTHER, node.public).await, "/ws/a", &[], 429).await;
}

#[tokio::test]
async fn limit_per_user_protects_others() {
    let node = Node::start(&["--max-connections-per-user", "2"]).await;
    let first = Client::plain(&node, "alice", "one").await;
    let _second = Client::plain(&node, "alice", "two").await;
    for channel in ["one", "two", "three"] {
        expect_full(Raw::connect(node.public).await, &format!("/ws/alice?channel={channel}"), &[], 429).await;
    }
    assert_eq!(ends(&node, "user_limit").await, 3.0);
    let _bob = Client::plain(&node, "bob", "one").await;
    first.leave().await;
    until("room for one more of alice", || async {
        let mut raw = Raw::connect(node.public).await;
        (raw.upgrade("/ws/%61lice", &[]).await.status == 101).then_some(())
    })
    .await;
}

#[tokio::test]
async fn flood_over_the_limit_is_answered_at_once() {
    let node = Node::start(&["--max-connections", "1"]).await;
    empty(&node).await;
    let mut first = Client::plain(&node, "a", "room").await;
    // Far more than may wait for their 503. None sends a byte.
    let mut flood = join_all((0..600).map(|_| Raw::connect(node.public))).await;
    let answers = join_all(flood.iter_mut().map(|raw| raw.response())).await;
    assert!(answers.iter().all(|answer| answer.status == 503 && answer.header("retry-after").is_some()));
    let rejected = node.metric("fanfare_connections_rejected_total").await;
    let in_time = ends(&node, "node_limit").await;
    assert!(rejected > 300.0 && in_time > 0.0, "{rejected} at once, {in_time} in time");
    assert_eq!(rejected + in_time, 600.0);
    let id = node.publish("room", &json!({"n": 1})).await;
    first.expect_event(id, &json!({"n": 1})).await;
    drop(flood);
    first.leave().await;
    empty(&node).await;
    let _seat = Client::plain(&node, "b", "room").await;
    expect_full(Raw::connect(node.public).await, "/ws/c", &[], 503).await;
}

#[tokio::test]
async fn trusted_proxy_names_its_clients() {
    let flags = [
        "--trusted-proxy",
        "127.0.0.2,127.0.0.8/30",
        "--max-connections-per-ip",
        "1",
        "--log",
        "fanfare=debug",
    ];
    let node = Node::start(&flags).await;
    let direct = || Raw::connect_from(PROXY, node.public);
    let forwarded = [("X-Forwarded-For", "198.51.100.9, 192.0.2.7:5678, 127.0.0.9")];
    let first = upgraded(direct().await, "/ws/a", &forwarded).await;
    expect_full(direct().await, "/ws/a", &forwarded, 429).await;
    expect_full(proxied(&node, "192.0.2.7").await, "/ws/a", &[], 429).await;
    let _second = upgraded(direct().await, "/ws/a", &[("X-Forwarded-For", "[2001:db8::1]:443")]).await;
    expect_full(direct().await, "/ws/a", &[("X-Forwarded-For", "2001:db8::2")], 429).await;
    // A header of the client itself changes nothing.
    expect_full(direct().await, "/ws/a", &[("X-Forwarded-For", "10.1.1.1, 192.0.2.7")], 429).await;
    // With PROXY headers of versions 1 and 2, with the request in one segment, or later.
    let _third = upgraded(proxied(&node, "192.0.2.8").await, "/ws/a", &[]).await;
    let v2 = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0F\xC0\0\x02\x09\xC0\0\x02\x01\0\x01\0\x02\x04\0\0";
    let mut raw = direct().await;
    let request = http::request_bytes(node.public, "GET", "/ws/a", &UPGRADE, b"");
    raw.write(&[&v2[..], &request].concat()).await;
    assert_eq!(raw.response().await.status, 101);
    let mut again = direct().await;
    for byte in v2 {
        again.write(&[*byte]).await;
    }
    expect_full(again, "/ws/a", &[], 429).await;
    // The proxy's own connections are not limited.
    let local = b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0";
    let mut own = Vec::new();
    for start in [&b""[..], local, b"PROXY UNKNOWN\r\n", b"PROXY TCP4 127.0.0.9 127.0.0.1 1 2\r\n"] {
        let mut raw = direct().await;
        raw.write(start).await;
        own.push(upgraded(raw, "/ws/a", &[]).await);
    }
    // A slot is released for the address for which it was acquired.
    drop(first);
    until("the first to be gone", || async { node.log().contains("client=192.0.2.7").then_some(()) }).await;
    let _again = upgraded(direct().await, "/ws/a", &forwarded).await;
}

#[tokio::test]
async fn untrusted_proxy_is_rejected_with_advice() {
    let node = Node::start(&["--trusted-proxy", "127.0.0.2"]).await;
    let forwarded = [("X-Forwarded-For", "192.0.2.7")];
    let expect = async |mut raw: Raw, bytes: &[u8], status: u16, text: &str| {
        raw.write(bytes).await;
        let response = raw.response().await;
        response.expect_rejection(status);
        assert!(response.body.contains(text), "{response:?}");
        raw.expect_end().await;
    };
    let upgrade = http::request_bytes(node.public, "GET", "/ws/a", &forwarded, b"");
    for start in [&upgrade[..], b"PROXY TCP4 192.0.2.7 127.0.0.1 1 2\r\n", b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0"]
    {
        expect(Raw::connect(node.public).await, start, 400, "--trusted-proxy").await;
    }
    expect(proxied(&node, "127.0.0.3").await, &upgrade, 400, "--trusted-proxy").await;
    assert_eq!(ends(&node, "proxy_not_trusted").await, 4.0);
    let advice = "add its address to --trusted-proxy (the peer is 127.0.0.1)";
    assert!(node.log().contains(advice), "{}", node.log());
    for start in [&b"PROXY TCP4 192.0.2.7\r\n"[..], b"PROXY TCP4 192.0.2.7 127.0.0.1 1 2\n", b"PROXY \r\n"] {
        expect(Raw::connect_from(PROXY, node.public).await, start, 400, "").await;
    }
    let unreadable =
        http::request_bytes(node.public, "GET", "/ws/a", &[("X-Forwarded-For", "192.0.2.7, unknown")], b"");
    expect(Raw::connect_from(PROXY, node.public).await, &unreadable, 400, "X-Forwarded-For").await;
    // Health checks are answered through any proxy.
    let health = http::request_bytes(node.public, "GET", "/healthz", &forwarded, b"");
    let mut raw = Raw::connect(node.public).await;
    raw.write(&health).await;
    assert_eq!(raw.response().await.status, 200);
}

#[tokio::test]
async fn proxy_header_counts_before_the_request() {
    let node = Node::start(&["--trusted-proxy", "127.0.0.2", "--max-connections-per-ip", "1"]).await;
    empty(&node).await;
    let before = node.metric("fanfare_received_bytes_total").await;
    let mut silent = proxied(&node, "192.0.2.7").await;
    until("its header to be read", || async {
        (node.metric("fanfare_received_bytes_total").await > before).then_some(())
    })
    .await;
    expect_full(proxied(&node, "192.0.2.7").await, "/ws/a", &[], 429).await;
    silent.response().await.expect_rejection(408);
    drop(silent);
    until("its place to be free", || async {
        let mut raw = proxied(&node, "192.0.2.7").await;
        (raw.upgrade("/ws/a", &[]).await.status == 101).then_some(())
    })
    .await;
}

/// However connections end, all slots are free afterwards: as many can connect as before, and no
/// more.
#[tokio::test]
async fn every_slot_is_released_exactly_once() {
    const SLOTS: usize = 20;
    let flags = [
        "--trusted-proxy",
        "127.0.0.2",
        "--max-connections",
        "60",
        "--max-connections-per-ip",
        "20",
        "--max-connections-per-user",
        "20",
        "--shards",
        "3",
    ];
    let node = Node::start(&flags).await;
    let churn = async |number: u64| {
        let mut rng = Rng(number);
        for _ in 0..25 {
            let mut raw = match rng.below(3) {
                0 => Raw::connect(node.public).await,
                1 => Raw::connect_from(OTHER, node.public).await,
                _ => proxied(&node, "192.0.2.7").await,
            };
            match rng.below(7) {
                0 => drop(raw),
                1 => drop(raw.write_some(b"GET /ws/a HTTP/1.1\r\n").await),
                2 => drop(raw.write_some(b"\x16\x03\x01\r\n\r\n").await), // and gone before the answer
                3 => drop(raw.write_some(b"POST /ws/a HTTP/1.1\r\nHost: a\r\n\r\n").await),
                _ => {
                    let path = format!("/ws/user{}?channel=room{}", rng.below(2), rng.below(3));
                    // The node may answer and close before the request.
                    raw.write_some(&http::request_bytes(node.public, "GET", &path, &UPGRADE, b"")).await;
                    let status = raw.status().await;
                    assert!(matches!(status, 101 | 429 | 503), "{status}");
                    if status == 101 && rng.below(2) == 0 {
                        raw.frame(true, common::raw::opcode::CLOSE, &[0x03, 0xE8]).await;
                        raw.rest().await;
                    }
                }
            }
        }
    };
    join_all((0..40).map(churn)).await;
    empty(&node).await;
    for client in 0..3 {
        let connect = async || match client {
            0 => Raw::connect(node.public).await,
            1 => Raw::connect_from(OTHER, node.public).await,
            _ => proxied(&node, "192.0.2.7").await,
        };
        let mut held = Vec::new();
        for _ in 0..SLOTS {
            held.push(upgraded(connect().await, "/ws/user0", &[]).await);
        }
        expect_full(connect().await, "/ws/user1", &[], 429).await;
        expect_full(proxied(&node, "192.0.2.8").await, "/ws/user0", &[], 429).await;
        let _other = upgraded(proxied(&node, "192.0.2.8").await, "/ws/user1", &[]).await;
        drop((held, _other));
        empty(&node).await;
    }
}
