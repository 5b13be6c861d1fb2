//! Access control: origins, the admin key, and what clients may publish.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use serde_json::json;

use crate::common;
use crate::common::process::{Directory, make_fifo};
use crate::common::{Client, Frame, Node, Options, Raw, TokenKey, http, until};

#[tokio::test]
async fn other_origins_are_rejected() {
    let node = Node::start(&[]).await;
    let own = format!("http://{}", node.public);
    let other_port = format!("http://127.0.0.1:{}", node.admin.port());
    for (origin, status) in [
        (own.as_str(), 101),
        (&other_port, 101), // the page's second pane; both are loopback
        ("http://localhost:3000", 101),
        ("https://example.com", 403),
        ("http://127.0.0.1.example.com", 403),
        ("null", 403),
        ("nonsense", 403),
    ] {
        let mut raw = Raw::connect(node.public).await;
        let response = raw.upgrade("/ws/a", &[("Origin", origin)]).await;
        assert_eq!(response.status, status, "{origin}: {response:?}");
        if status == 403 {
            response.expect_rejection(403);
            raw.expect_end().await;
        }
    }
    let mut raw = Raw::connect(node.public).await;
    let twice = [("Origin", own.as_str()), ("Origin", "https://example.com")];
    raw.upgrade("/ws/a", &twice).await.expect_rejection(403);
    assert_eq!(
        node.metric_of("fanfare_connections_closed_total", r#"reason="origin_not_allowed""#).await,
        5.0
    );
    // The other paths are public.
    assert_eq!(node.get("/healthz").await.status, 200);
}

#[tokio::test]
async fn only_allowed_origins_may_connect() {
    let node =
        Node::start(&["--allow-origin", "https://example.com", "--allow-origin", "https://*.example.org"])
            .await;
    let own = format!("http://{}", node.public);
    for (origin, status) in [
        ("https://example.com", 101),
        ("https://chat.example.org", 101),
        ("https://example.org", 403),
        ("http://example.com", 403),
        (&own, 403),
        ("null", 403),
    ] {
        let mut raw = Raw::connect(node.public).await;
        assert_eq!(raw.upgrade("/ws/a", &[("Origin", origin)]).await.status, status, "{origin}");
    }
    Raw::upgraded(node.public, "/ws/program").await;
}

#[tokio::test]
async fn origins_of_apps_can_be_allowed() {
    let node = Node::start(&["--allow-origin", "capacitor://localhost,ionic://localhost,app://-"]).await;
    let status = async |node: &Node, origin: &str, path: &str| {
        Raw::connect(node.public).await.upgrade(path, &[("Origin", origin)]).await.status
    };
    for (origin, expected) in [
        ("capacitor://localhost", 101),
        ("ionic://localhost", 101),
        ("app://-", 101),
        ("capacitor://example.com", 403),
        ("app://other", 403),
        ("http://localhost", 403),
        ("null", 403),
    ] {
        assert_eq!(status(&node, origin, "/ws/a").await, expected, "{origin}");
    }

    // Pages of every site can have the origin `null`, so it needs a token.
    let key = TokenKey::new();
    let node = Node::start(&["--allow-origin", "null", "--jwt-key", &key.path()]).await;
    let path = format!("/ws/a?token={}", key.token("a", &[]));
    assert_eq!(status(&node, "null", &path).await, 101);
    assert_eq!(status(&node, "null", "/ws/a").await, 401);
    assert_eq!(status(&node, "https://example.com", &path).await, 403);
}

async fn admin(
    node: &Node,
    method: &str,
    path: &str,
    authorization: &[&str],
    body: &[u8],
) -> common::Response {
    let headers: Vec<_> = authorization.iter().map(|value| ("Authorization", *value)).collect();
    http::request(node.admin, method, path, &headers, body).await
}

#[tokio::test]
async fn admin_listener_requires_its_key() {
    let directory = Directory::new();
    let file = directory.path().join("admin.key");
    std::fs::write(&file, "correct-horse-battery\n").expect("a file");
    let node = Node::start(&["--admin-key", file.to_str().expect("UTF-8")]).await;
    let right = "Bearer correct-horse-battery";
    for (method, path) in [("GET", "/metrics"), ("GET", "/stats"), ("POST", "/publish"), ("GET", "/nothing")]
    {
        for wrong in [
            &[][..],
            &["Bearer correct-horse-batterx"],
            &["Bearer correct-horse-batter"],
            &["Bearer correct-horse-battery2"],
            &["Bearer"],
            &["Bearer "],
            &["Basic correct-horse-battery"],
            &["correct-horse-battery"],
            &[right, right],
        ] {
            let response = admin(&node, method, path, wrong, b"").await;
            response.expect_rejection(401);
            assert_eq!(response.header("www-authenticate"), Some("Bearer"));
            assert!(!response.body.contains("horse"));
        }
    }
    for (method, path, body) in [("GET", "/metrics", ""), ("GET", "/stats", ""), ("POST", "/publish", "{}")] {
        assert_eq!(admin(&node, method, path, &[right], body.as_bytes()).await.status, 200, "{path}");
        assert_eq!(
            admin(&node, method, path, &["bearer correct-horse-battery"], body.as_bytes()).await.status,
            200
        );
    }
    admin(&node, "GET", "/nothing", &[right], b"").await.expect_rejection(404);
    for path in ["/healthz", "/readyz"] {
        assert_eq!(admin(&node, "GET", path, &[], b"").await.status, 200);
    }
    // The body of an unauthenticated request is not read.
    let mut raw = Raw::connect(node.admin).await;
    raw.write(b"POST /publish HTTP/1.1\r\nHost: a\r\nContent-Length: 60000\r\n\r\n{").await;
    raw.response().await.expect_rejection(401);
    raw.expect_end().await;
    let metrics = admin(&node, "GET", "/metrics", &[right], b"").await.body;
    assert!(metrics.lines().any(|line| line == "fanfare_admin_rejections_total 37"), "{metrics}");

    // Changes the key without a restart. A file without a valid key changes nothing.
    std::fs::write(&file, "short").expect("a file");
    node.signal("HUP");
    until("the reload to be rejected", || async {
        node.log().contains("keeping the current keys").then_some(())
    })
    .await;
    assert_eq!(admin(&node, "GET", "/stats", &[right], b"").await.status, 200);
    // A FIFO without a writer blocks neither the reload nor the listener.
    std::fs::remove_file(&file).expect("it is there");
    make_fifo(&file);
    node.signal("HUP");
    let rejected = || async { node.log().contains("must be a regular file").then_some(()) };
    until("the reload of a FIFO to be rejected", rejected).await;
    assert_eq!(admin(&node, "GET", "/stats", &[right], b"").await.status, 200);
    std::fs::remove_file(&file).expect("it is there");
    std::fs::write(&file, "another-horse-battery").expect("a file");
    node.signal("HUP");
    until("the new key to be in force", || async {
        let response = admin(&node, "GET", "/stats", &["Bearer another-horse-battery"], b"").await;
        (response.status == 200).then_some(())
    })
    .await;
    assert_eq!(admin(&node, "GET", "/stats", &[right], b"").await.status, 401);
    assert!(!node.log().contains("horse"));
}

/// Checks `--client-publish` or a token's `publish` with a text and a private message, in both
/// modes.
async fn expect_publishing(node: &Node, path_query: &str, text: bool, private: bool) {
    let mut subscriber = Client::plain(node, "subscriber", "room").await;
    let options = Options {
        query: format!("channel=room{path_query}"),
        subprotocol: Some("fanfare.v1"),
        ..Options::default()
    };
    let mut json = Client::try_open(node.public, "a", &options).await.expect("it may join");
    json.welcome().await;
    for (message, allowed) in
        [(json!({"text": "hi"}), text), (json!({"text": "psst", "to": "subscriber"}), private)]
    {
        let (answer, _) = json.send_for_ack(message.clone()).await;
        match answer {
            Ok(id) => {
                assert!(allowed, "{message} was published");
                assert_eq!(subscriber.next_event().await.0, id);
            }
            Err(error) => {
                assert!(!allowed, "{message}: {error}");
                assert_eq!(error["code"], "forbidden");
            }
        }
    }
    // It may still send pings, and stays connected.
    json.send(r#"{"type":"ping"}"#).await;
    while json.next_json().await["type"] != "ping" {}

    let options =
        Options { query: format!("channel=room{path_query}"), subprotocol: None, ..Options::default() };
    let mut plain = Client::try_open(node.public, "a", &options).await.expect("it may join");
    plain.send("plain").await;
    if text {
        assert_eq!(subscriber.next_event().await.1, json!({"sender": "a", "text": "plain"}));
        return;
    }
    assert_eq!(plain.expect_close().await.0, 4003);
    let options = Options {
        query: format!("channel=room&lastEventId={path_query}"),
        subprotocol: None,
        ..Options::default()
    };
    let mut plain = Client::try_open(node.public, "a", &options).await.expect("it may join");
    plain.welcome().await;
    plain.send("plain").await;
    assert_eq!(plain.expect_error(None).await, "forbidden");
    let id = node.publish("room", &json!({"n": 1})).await;
    plain.expect_event(id, &json!({"n": 1})).await;
    subscriber.expect_event(id, &json!({"n": 1})).await; // no rejected message was delivered
}

#[tokio::test]
async fn client_publish_setting_is_enforced() {
    expect_publishing(&Node::start(&["--client-publish", "any"]).await, "", true, true).await;
    expect_publishing(&Node::start(&["--client-publish", "channel"]).await, "", true, false).await;
    let node = Node::start(&["--client-publish", "off"]).await;
    expect_publishing(&node, "", false, false).await;
    assert_eq!(node.metric_of("fanfare_connections_closed_total", r#"reason="forbidden""#).await, 1.0);
}

#[tokio::test]
async fn forbidden_message_discards_rest_of_read() {
    let node = Node::start(&["--client-publish", "off"]).await;
    let mut raw = Raw::upgraded(node.public, "/ws/a?channel=room").await;
    let frame = common::raw::frame_bytes(true, common::raw::opcode::TEXT, true, b"hi");
    raw.write(&frame.repeat(50)).await;
    assert_eq!(raw.expect_close().await, 4003);
    let mut good = Client::plain(&node, "good", "room").await;
    let id = node.publish("room", &json!({"n": 1})).await;
    assert!(matches!(good.next_frame().await, Frame::Text(text) if text.contains(&id.to_string())));
}

#[tokio::test]
async fn world_readable_secrets_are_warned_about() {
    let directory = Directory::new();
    let [admin, token] = ["admin.key", "jwt.key"].map(|name| {
        let path = directory.path().join(name);
        std::fs::write(&path, "k".repeat(32)).expect("a file");
        path
    });
    let mode =
        |path: &Path, mode| std::fs::set_permissions(path, Permissions::from_mode(mode)).expect("ours");
    mode(&admin, 0o644);
    mode(&token, 0o640);
    let flags = ["--admin-key", admin.to_str().expect("UTF-8"), "--jwt-key", token.to_str().expect("UTF-8")];
    let node = Node::start(&flags).await;
    let warning = |path: &Path| format!("chmod o-r {}", path.display());
    assert!(node.log().contains(&warning(&admin)), "{}", node.log());
    assert!(!node.log().contains(&warning(&token)), "{}", node.log());
    mode(&token, 0o604);
    node.signal("HUP");
    until("a warning", || async { node.log().contains(&warning(&token)).then_some(()) }).await;
}

#[tokio::test]
async fn dns_rebinding_is_rejected() {
    let node = Node::start(&[]).await;
    let (public, admin_port) = (node.public.port(), node.admin.port());
    let host = format!("evil.example:{public}");
    let origin = format!("http://{host}");
    // A browser sends the name under which it resolved the address.
    let upgrade = async |node: &Node, host: &str, headers: &str| {
        let mut raw = Raw::connect(node.public).await;
        let request = format!(
            "GET /ws/a HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{headers}\r\n"
        );
        raw.write(request.as_bytes()).await;
        raw.response().await
    };
    let response = upgrade(&node, &host, &format!("Origin: {origin}\r\n")).await;
    response.expect_rejection(403);
    assert!(response.body.contains("--allow-origin") && response.body.contains("--trusted-proxy"));
    for (method, path) in [("GET", "/stats"), ("GET", "/metrics"), ("GET", "/readyz"), ("POST", "/publish")] {
        let mut raw = Raw::connect(node.admin).await;
        let length = if method == "POST" { "Content-Length: 2\r\n\r\n{}" } else { "\r\n" };
        let request = format!("{method} {path} HTTP/1.1\r\nHost: evil.example:{admin_port}\r\n{length}");
        raw.write(request.as_bytes()).await;
        raw.response().await.expect_rejection(403);
    }
    // The node's own pages, and programs under any name, are accepted.
    let own = format!("Origin: http://127.0.0.1:{public}\r\n");
    assert_eq!(upgrade(&node, &format!("127.0.0.1:{public}"), &own).await.status, 101);
    assert_eq!(upgrade(&node, "chat.internal", "").await.status, 101);

    // A trusted proxy on this machine forwards the names of its sites.
    let page = "Origin: https://chat.example\r\nX-Forwarded-For: 192.0.2.1\r\n";
    let proxied = Node::start(&["--trusted-proxy", "127.0.0.1"]).await;
    assert_eq!(upgrade(&proxied, "chat.example", page).await.status, 101);
    // Without a trusted proxy the origin must be allowed.
    let named = Node::start(&["--allow-origin", "https://chat.example"]).await;
    assert_eq!(upgrade(&named, "chat.example", "Origin: https://chat.example\r\n").await.status, 101);
    assert_eq!(upgrade(&named, &host, &format!("Origin: {origin}\r\n")).await.status, 403);
}
