//! HTTP: the other paths of the public listener, and the admin listener.

use serde_json::{Value, json};
use tokio::io::{AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

use crate::common;
use crate::common::{Client, Node, Raw, http};

/// The response to these bytes on a new connection.
async fn answer(node: &Node, bytes: &[u8]) -> common::Response {
    let mut raw = Raw::connect(node.public).await;
    raw.write(bytes).await;
    raw.response().await
}

#[tokio::test]
async fn public_paths_answer() {
    let node = Node::start(&[]).await;
    for path in ["/healthz", "/readyz"] {
        let response = node.get(path).await;
        assert_eq!(response.status, 200, "{response:?}");
    }
    let page = node.get("/").await;
    assert_eq!(page.status, 200);
    assert!(page.header("content-type").is_some_and(|kind| kind.starts_with("text/html")), "{page:?}");
    assert!(page.body.contains("</html>"));
    let script = node.get("/fanfare.js").await;
    assert_eq!(script.status, 200);
    assert!(
        script.header("content-type").is_some_and(|kind| kind.starts_with("text/javascript")),
        "{script:?}"
    );
    assert!(script.body.contains("export"));
    assert_eq!(node.get("/healthz?a=b").await.status, 200, "a query changes nothing");
}

#[tokio::test]
async fn wrong_paths_and_methods_are_rejected() {
    let node = Node::start(&[]).await;
    for path in ["/nothing", "/wsx/a", "/metrics", "/stats", "/publish", "/healthz/", "//"] {
        node.get(path).await.expect_rejection(404);
    }
    for path in ["/ws", "/ws/", "/ws/a/b"] {
        let mut raw = Raw::connect(node.public).await;
        raw.upgrade(path, &[]).await.expect_rejection(400);
    }
    for (method, path) in [("POST", "/"), ("POST", "/ws/a"), ("DELETE", "/healthz"), ("PUT", "/fanfare.js")] {
        let response = http::request(node.public, method, path, &[], b"").await;
        response.expect_rejection(405);
        assert!(response.header("allow").is_some_and(|allow| allow.contains("GET")), "{response:?}");
    }
}

#[tokio::test]
async fn missing_upgrade_gets_426() {
    let node = Node::start(&[]).await;
    let response = node.get("/ws/a").await;
    response.expect_rejection(426);
    assert!(
        response.header("upgrade").is_some_and(|to| to.eq_ignore_ascii_case("websocket")),
        "{response:?}"
    );

    for version in ["8", "14", "x"] {
        let mut raw = Raw::connect(node.public).await;
        let response = raw.upgrade("/ws/a", &[("Sec-WebSocket-Version", version)]).await;
        response.expect_rejection(426);
        assert_eq!(response.header("sec-websocket-version"), Some("13"), "RFC 6455 section 4.4");
    }
    for key in ["", "short", "dGhlIHNhbXBsZSBub25jZQ", "!!!!!!!!!!!!!!!!!!!!!!=="] {
        let mut raw = Raw::connect(node.public).await;
        raw.upgrade("/ws/a", &[("Sec-WebSocket-Key", key)]).await.expect_rejection(400);
    }
}

#[tokio::test]
async fn invalid_http_is_rejected() {
    let node = Node::start(&[]).await;
    for bytes in
        ["nonsense\r\n\r\n", "GET /healthz\r\n\r\n", "GET / HTTP/9.9\r\n\r\n", "\u{16}\u{3}\u{1}\r\n\r\n"]
    {
        let response = answer(&node, bytes.as_bytes()).await;
        assert!([400, 505].contains(&response.status), "{bytes:?}: {response:?}");
    }
    let response = answer(&node, b"GET /healthz HTTP/1.1\r\nHost : a\r\n\r\n").await;
    response.expect_rejection(400);
}

#[tokio::test]
async fn oversized_heads_and_paths_are_rejected() {
    let node = Node::start(&[]).await;
    let long = "x".repeat(100_000);
    // The server may answer and close before it has read everything, so writes may fail.
    for (head, status) in [
        (format!("GET /{long} HTTP/1.1\r\nHost: a\r\n\r\n"), 414),
        (format!("GET / HTTP/1.1\r\nHost: a\r\nX-Long: {long}\r\n\r\n"), 431),
        (format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", "X-Many: 1\r\n".repeat(1000)), 431),
    ] {
        let mut socket = BufReader::new(TcpStream::connect(node.public).await.expect("it listens"));
        let _ = socket.get_mut().write_all(head.as_bytes()).await;
        let response = common::within("a rejection", http::read_response(&mut socket, false)).await;
        response.expect("a rejection that arrives").expect_rejection(status);
    }
}

#[tokio::test]
async fn incomplete_head_times_out() {
    let node = Node::start(&[]).await;
    let mut nothing = Raw::connect(node.public).await;
    let mut slow = Raw::connect(node.public).await;
    slow.write(b"GET /healthz HTTP/1.1\r\nHost:").await;
    slow.response().await.expect_rejection(408);
    slow.expect_end().await;
    // A client that sent nothing gets a 408 or no response.
    let rest = String::from_utf8(nothing.rest().await).expect("text");
    assert!(rest.is_empty() || rest.starts_with("HTTP/1.1 408"), "{rest}");
}

#[tokio::test]
async fn publish_accepts_json_and_returns_the_id() {
    let node = Node::start(&[]).await;
    let mut client = Client::plain(&node, "a", "room").await;
    let cases = [
        (r#"{"a":1}"#, r#"{"a":1,"#),
        (r#"{}"#, r#"{"#),
        ("{\n  \"a\" : [ 1,\r\n 2 ]\n}\n", ""),
        ("5", r#"{"data":5,"#),
        ("\"text\"", r#"{"data":"text","#),
        ("[1]", r#"{"data":[1],"#),
        ("null", r#"{"data":null,"#),
        (r#"{"nested":{"id":1,"to":2,"type":"reset"}}"#, r#"{"nested":{"id":1,"to":2,"type":"reset"},"#),
        (
            r#"{"type":"news","n":12345678901234567890123,"f":1.0}"#,
            r#"{"type":"news","n":12345678901234567890123,"f":1.0,"#,
        ),
        (r#"{"text":"\u0041\ud83d\udc4b äöü"}"#, ""),
    ];
    for (body, start) in cases {
        let response = node.admin("POST", "/publish?channel=room", body.as_bytes()).await;
        assert_eq!(response.status, 200, "{body}: {response:?}");
        let id = response.json()["id"].clone();
        assert_eq!(response.json(), json!({ "id": id }));
        let text = client.next_text().await;
        assert!(text.starts_with(start), "{body} became {text}");
        assert!(text.ends_with(&format!(r#""id":{id}}}"#)) && !text.contains(['\n', '\r']), "{text:?}");
        let mut event: Value = serde_json::from_str(&text).expect("JSON");
        event.as_object_mut().expect("an object").remove("id");
        let given: Value = serde_json::from_str(body).expect("JSON");
        assert_eq!(event, if given.is_object() { given } else { json!({ "data": given }) });
    }
}

#[tokio::test]
async fn publish_rejects_invalid_requests() {
    let node = Node::start(&["--max-message-size", "1KiB"]).await;
    let mut client = Client::plain(&node, "a", "room").await;
    let not_utf8 = b"{\"text\":\"\xFF\"}";
    for body in [
        &b""[..],
        b"no JSON",
        b"{",
        b"{} {}",
        br#"{"id":1}"#,
        br#"{"to":"bob"}"#,
        br#"{"a":1,"\u0069d":2}"#,
        br#"{"t\u006f":"bob"}"#,
        not_utf8,
    ] {
        let response = node.admin("POST", "/publish?channel=room", body).await;
        assert_eq!(response.status, 400, "{}: {response:?}", String::from_utf8_lossy(body));
        assert!(!response.body.trim().is_empty());
    }
    let long = json!({"text": "x".repeat(200_000)}).to_string();
    node.admin("POST", "/publish?channel=room", long.as_bytes()).await.expect_rejection(413);
    for query in
        ["channel=", "channel=a%20b", "channel=room&to=", "channel=room&to=%0A", "channel=room&to=%FF"]
    {
        node.admin("POST", &format!("/publish?{query}"), b"{}").await.expect_rejection(400);
    }
    let response = node.admin("GET", "/publish?channel=room", b"").await;
    response.expect_rejection(405);
    assert_eq!(response.header("allow"), Some("POST"));
    // None of them was published.
    let id = node.publish("room", &json!({"marker": 1})).await;
    client.expect_event(id, &json!({"marker": 1})).await;
}

#[tokio::test]
async fn metrics_and_stats_are_well_formed() {
    let node = Node::start(&[]).await;
    let mut client = Client::plain(&node, "a", "room").await;
    client.send("hi").await;
    client.next_event().await;

    let metrics = node.admin("GET", "/metrics", b"").await;
    assert_eq!(metrics.status, 200);
    assert!(metrics.header("content-type").is_some_and(|kind| kind.starts_with("text/plain")), "{metrics:?}");
    let mut typed = Vec::new();
    for line in metrics.body.lines() {
        match line.strip_prefix("# TYPE ") {
            Some(rest) => typed.push(rest.split(' ').next().expect("a name").to_string()),
            None if line.starts_with('#') || line.is_empty() => {}
            None => {
                let (name, value) = line.rsplit_once(' ').expect("name and value");
                let name = name.split('{').next().expect("a name");
                let bare = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end));
                let known = |name: &str| typed.iter().any(|known| known == name);
                assert!(known(name) || bare.is_some_and(known), "no TYPE before {line}");
                assert!(name.starts_with("fanfare_") || name.starts_with("process_"), "{line}");
                assert!(value.parse::<f64>().is_ok(), "{line}");
            }
        }
    }
    assert!(node.admin("GET", "/stats", b"").await.json().is_object());
    for path in ["/nothing", "/ws/a", "/page.js"] {
        node.admin("GET", path, b"").await.expect_rejection(404);
    }
    for path in ["/", "/metrics", "/stats"] {
        node.admin("POST", path, b"{}").await.expect_rejection(405);
    }
}

#[tokio::test]
async fn admin_listener_keeps_connections_alive() {
    let node = Node::start(&[]).await;
    let mut raw = Raw::connect(node.admin).await;
    let publish = http::request_bytes(node.admin, "POST", "/publish?channel=room", &[], b"{}");
    let stats = http::request_bytes(node.admin, "GET", "/stats", &[], b"");
    let bad = http::request_bytes(node.admin, "POST", "/publish?channel=room", &[], b"no JSON");
    raw.write(&publish).await;
    let first = raw.response().await.json()["id"].as_u64().expect("an id");
    // Several at once, and one in pieces.
    raw.write(&[&publish[..], &bad, &stats, &publish].concat()).await;
    assert_eq!(raw.response().await.json(), json!({"id": first + 1}));
    raw.response().await.expect_rejection(400);
    assert_eq!(raw.response().await.status, 200);
    assert_eq!(raw.response().await.json(), json!({"id": first + 2}));
    for piece in publish.chunks(5) {
        raw.write(piece).await;
    }
    assert_eq!(raw.response().await.json(), json!({"id": first + 3}));
    raw.write(&http::request_bytes(node.admin, "GET", "/stats", &[("Connection", "close")], b"")).await;
    assert_eq!(raw.response().await.status, 200);
    raw.expect_end().await;
}

#[tokio::test]
async fn admin_connections_share_one_sequence() {
    let node = Node::start(&[]).await;
    let mut client = Client::plain(&node, "a", "room").await;
    let publish = async |first: u64| {
        let mut ids = Vec::new();
        for n in first..first + 50 {
            ids.push(node.publish("room", &json!({ "n": n })).await);
        }
        ids
    };
    let (a, b, c, d) = tokio::join!(publish(0), publish(100), publish(200), publish(300));
    let mut ids = [a, b, c, d].concat();
    ids.sort_unstable();
    assert!(ids.windows(2).all(|pair| pair[1] == pair[0] + 1), "{ids:?}");
    for id in ids {
        assert_eq!(client.next_event().await.0, id);
    }
}
