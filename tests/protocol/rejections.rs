//! Rejections that scripts in browsers can read: an upgrade, and at once a close frame.

use serde_json::json;

use crate::common::raw::frame_bytes;
use crate::common::raw::opcode::{CLOSE, TEXT};
use crate::common::{Client, Node, Raw, Response, until};

/// Requests an upgrade, and expects a close frame as the answer. Returns the 101 response, the close
/// code and its reason.
pub async fn closed(node: &Node, path: &str, headers: &[(&str, &str)]) -> (Response, u16, String) {
    let mut raw = Raw::connect(node.public).await;
    let response = raw.upgrade(path, headers).await;
    assert_eq!(response.status, 101, "{path} {headers:?}: {response:?}");
    assert_eq!(response.header("sec-websocket-accept"), Some("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="));
    let Some((CLOSE, payload)) = raw.next().await else { panic!("no close frame: {path} {headers:?}") };
    raw.expect_end().await;
    let (code, reason) = payload.split_first_chunk().expect("a code");
    (response, u16::from_be_bytes(*code), String::from_utf8(reason.to_vec()).expect("UTF-8"))
}

/// Sec-WebSocket-Protocol.
fn offer(protocols: &str) -> (&str, &str) {
    ("Sec-WebSocket-Protocol", protocols)
}

#[tokio::test]
async fn closes_fanfare_clients_with_reason() {
    let node = Node::start(&["--log", "debug"]).await;
    let foreign = ("Origin", "https://example.com");
    let json = offer("fanfare.v1");
    let long = "x".repeat(129);
    let cases = [
        ("/ws/a%0Ab", &[json][..], 4400, "the user id in /ws/{user_id}"),
        ("/ws/a/b", &[json], 4400, "the user id in /ws/{user_id}"),
        (&format!("/ws/{long}"), &[json], 4400, "the user id in /ws/{user_id}"),
        ("/ws/a%0Ab?lastEventId=", &[], 4400, "the user id in /ws/{user_id}"),
        ("/ws/a?channel=a%20b", &[json], 4400, "channel must be 1 to 128 of"),
        ("/ws/a?channel=&lastEventId=7", &[], 4400, "name a channel, or use fanfare.v1"),
        ("/ws/a?channel=%FF", &[json], 4400, "channel is not percent-encoded"),
        ("/ws/a", &[json, foreign], 4403, "origin not allowed: add it to --allow-origin"),
        ("/ws/a?lastEventId", &[foreign], 4403, "origin not allowed: add it to --allow-origin"),
    ];
    for (path, headers, code, text) in cases {
        let (response, closed, reason) = closed(&node, path, headers).await;
        assert_eq!(closed, code, "{path}: {reason}");
        assert!(reason.contains(text) && reason.len() <= 123, "{path}: {reason}");
        let offered = headers.contains(&json).then_some("fanfare.v1");
        assert_eq!(response.header("sec-websocket-protocol"), offered);
        // Other clients get the same text, with a status.
        let others: Vec<_> = headers.iter().filter(|header| **header != json).copied().collect();
        let path = path.replace("lastEventId", "x");
        let answer = Raw::connect(node.public).await.upgrade(&path, &others).await;
        assert_eq!((answer.status, answer.body.trim_end()), (code - 4000, reason.as_str()), "{path}");
    }
    // Both are counted and logged alike.
    let count = async |name: &str, label: &str| node.metric_of(name, label).await;
    assert_eq!(count("fanfare_http_rejections_total", r#"status="400""#).await, 14.0);
    assert_eq!(count("fanfare_http_rejections_total", r#"status="403""#).await, 4.0);
    assert_eq!(count("fanfare_connections_closed_total", r#"reason="origin_not_allowed""#).await, 4.0);
    assert_eq!(node.metric("fanfare_connections_upgraded_total").await, 0.0);
    let logged = || async { node.log().contains("request rejected: the user id in").then_some(()) };
    until("the rejection in the log", logged).await;
    until("no connection", || async { (node.metric("fanfare_connections").await == 0.0).then_some(()) })
        .await;
}

#[tokio::test]
async fn overload_and_malformed_requests_stay_http() {
    let node = Node::start(&["--max-connections-per-user", "1", "--max-channels", "1"]).await;
    let _held = Raw::upgraded(node.public, "/ws/a").await;
    let json = offer("fanfare.v1");
    for (path, headers, status) in [
        ("/ws/a", &[json][..], 429),
        ("/ws/b?channel=other", &[json], 503),
        ("/ws/c?lastEventId=&channel=other", &[], 503),
        ("/ws/b", &[json, ("Sec-WebSocket-Version", "8")], 426),
        ("/ws/b", &[json, ("Sec-WebSocket-Key", "short")], 400),
        ("/ws/b", &[json, ("X-Forwarded-For", "192.0.2.1")], 400),
        ("/nothing?lastEventId=", &[json], 404),
        ("/ws/d?channel=a%20b", &[offer("")], 400),
        ("/ws/d?channel=a%20b", &[offer("no token")], 400),
    ] {
        let response = Raw::connect(node.public).await.upgrade(path, headers).await;
        response.expect_rejection(status);
    }
}

/// As after an HTTP rejection: what the client sends has no effect, and the connection does not
/// wait long for the client to close it.
#[tokio::test]
async fn rejected_client_gets_no_further() {
    let node = Node::start(&["--shards", "1"]).await;
    let mut room = Client::plain(&node, "b", "ws_broadcast").await;
    let mut raw = Raw::connect(node.public).await;
    let foreign = [offer("fanfare.v1"), ("Origin", "https://example.com")];
    assert_eq!(raw.upgrade("/ws/a", &foreign).await.status, 101);
    for _ in 0..1000 {
        if !raw.write_some(&frame_bytes(true, TEXT, true, br#"{"text":"hi"}"#)).await {
            break;
        }
    }
    assert_eq!(raw.next().await.map(|(opcode, _)| opcode), Some(CLOSE));
    let id = node.publish("ws_broadcast", &json!({"n": 1})).await;
    room.expect_event(id, &json!({"n": 1})).await;
    until("the rejected connection to be gone", || async {
        (node.metric("fanfare_connections").await == 1.0).then_some(())
    })
    .await;
    assert_eq!(node.metric("fanfare_messages_received_total").await, 0.0);
    drop(raw);
}

#[tokio::test]
async fn offered_subprotocols_are_answered() {
    let node = Node::start(&[]).await;
    for (offered, answer) in [
        ("fanfare.v1", Some("fanfare.v1")),
        ("graphql-ws, fanfare.v1", Some("fanfare.v1")),
        ("bearer.abc, fanfare.v1", Some("fanfare.v1")),
        ("bearer.abc", Some("bearer.abc")),
        ("graphql-ws, bearer.abc", Some("bearer.abc")),
        ("", None),
    ] {
        let mut raw = Raw::connect(node.public).await;
        let response = raw.upgrade("/ws/a?channel=room", &[offer(offered)]).await;
        assert_eq!((response.status, response.header("sec-websocket-protocol")), (101, answer), "{offered}");
        if answer != Some("fanfare.v1") {
            raw.frame(true, TEXT, b"plain").await;
            assert!(raw.next_text().await.contains(r#""text":"plain""#), "{offered}");
        }
    }
    for (offered, answer) in [
        ("graphql-ws", "graphql-ws"),
        ("mqtt, graphql-ws", "mqtt"),
        ("no token, v2.fanfare", "v2.fanfare"),
        ("fanfare.v2", "fanfare.v2"),
        ("Fanfare.v1", "Fanfare.v1"),
    ] {
        let (response, code, reason) = closed(&node, "/ws/a", &[offer(offered)]).await;
        assert_eq!(response.header("sec-websocket-protocol"), Some(answer));
        let text = "subprotocol not supported: offer fanfare.v1 or none, and a token as bearer.TOKEN";
        assert!(code == 4400 && reason.starts_with(text), "{offered}: {code} {reason}");
    }
}

#[tokio::test]
async fn mistyped_query_parameters_are_rejected() {
    let node = Node::start(&[]).await;
    for (query, meant) in [
        ("chanel=secret", "channel"),
        ("Channel=secret", "channel"),
        ("channels=secret", "channel"),
        ("chan=secret", "channel"),
        ("lastEventID=1", "lastEventId"),
        ("last_event_id=1", "lastEventId"),
        ("lasteventid=1", "lastEventId"),
        ("eventId=1", "lastEventId"),
        ("last_id=1", "lastEventId"),
        ("histroy=5", "history"),
        ("channel=room&last-event-id=1", "lastEventId"),
        ("tokn=x", "token"),
        ("Token=x", "token"),
    ] {
        let path = format!("/ws/a?{query}");
        let advice = format!("did you mean {meant}?");
        let (_, code, reason) = closed(&node, &path, &[offer("fanfare.v1")]).await;
        assert!(code == 4400 && reason.ends_with(&advice), "{query}: {code} {reason}");
        if matches!(meant, "lastEventId" | "history") {
            assert_eq!(closed(&node, &path, &[]).await.1, 4400, "{query}");
        } else {
            let response = Raw::connect(node.public).await.upgrade(&path, &[]).await;
            response.expect_rejection(400);
            assert!(response.body.trim_end().ends_with(&advice), "{query}: {response:?}");
        }
    }
    assert_eq!(node.metric("fanfare_connections_upgraded_total").await, 0.0);
    let others = "utm_source=x&utm_medium=y&gclid=z&_=1764000000&t=1&v=2&nocache&theme=dark&x=channel";
    Raw::upgraded(node.public, &format!("/ws/a?{others}&channel=room")).await;
    // The admin listener accepts no other parameters at all.
    for (query, text) in [
        ("chanel=room", "did you mean channel?"),
        ("Channel=room", "did you mean channel?"),
        ("To=a", "did you mean to?"),
        ("user=a", "use channel, to"),
    ] {
        let response = node.admin("POST", &format!("/publish?{query}"), b"{}").await;
        response.expect_rejection(400);
        assert!(response.body.trim_end().ends_with(text), "{query}: {response:?}");
    }
}
