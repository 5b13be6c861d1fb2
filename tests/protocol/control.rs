//! Commands of backends about the connections of users, on a node without Redis.

use serde_json::json;

use crate::common::client::JSON_MODE;
use crate::common::{Client, Node, Raw, TokenKey, until};
use crate::rejections::closed;

#[tokio::test]
async fn user_is_disconnected_from_all_shards() {
    let node = Node::start(&["--shards", "3"]).await;
    let mut alices = Vec::new();
    for number in 0..7 {
        alices.push(Client::json(&node, "alice", &format!("room.{}", number % 3)).await.0);
    }
    let (mut bob, _) = Client::json(&node, "bob", "room.1").await;
    // An event that was published before is still delivered.
    let before = node.publish("room.1", &json!({"n": 0})).await;
    let first = node.disconnect("user=alice").await;
    for (number, alice) in alices.iter_mut().enumerate() {
        if number % 3 == 1 {
            alice.expect_event(before, &json!({"n": 0})).await;
        }
        assert_eq!(alice.expect_close().await, (4010, "disconnected by the application".into()));
    }
    bob.expect_event(before, &json!({"n": 0})).await;
    let id = node.publish("room.1", &json!({"n": 1})).await;
    bob.expect_event(id, &json!({"n": 1})).await;
    let closed = node.metric_of("fanfare_connections_closed_total", r#"reason="disconnected""#).await;
    assert_eq!((closed, node.metric("fanfare_commands_total").await), (7.0, 1.0));
    // Nobody has this name, and the command is executed all the same.
    assert!(node.disconnect("user=nobody").await > first);
    Client::json(&node, "alice", "room.1").await;
}

#[tokio::test]
async fn full_sockets_are_disconnected() {
    let node = Node::start(&["--max-message-size", "64KiB"]).await;
    let mut raw = Raw::connect_with_small_buffers(node.public).await;
    let response = raw.upgrade("/ws/alice?channel=room.1", &[]).await;
    assert_eq!(response.status, 101);
    // Far more than the buffers of both sockets hold.
    for _ in 0..100 {
        node.publish("room.1", &json!({"text": "x".repeat(60_000)})).await;
    }
    node.disconnect("user=alice").await;
    let mut last = None;
    while let Some((opcode, payload)) = raw.next().await {
        last = Some((opcode, payload));
    }
    let (opcode, payload) = last.expect("frames");
    assert_eq!((opcode, &payload[..2]), (8, &4010_u16.to_be_bytes()[..]));
}

#[tokio::test]
async fn channel_is_taken_from_its_followers() {
    let node = Node::start(&["--shards", "2"]).await;
    let (mut client, _) = Client::json(&node, "alice", "home").await;
    client.send(r#"{"type":"subscribe","channels":[{"channel":"room.1"},{"channel":"room.2"}]}"#).await;
    for _ in 0..2 {
        client.welcome().await;
    }
    node.disconnect("user=alice&channel=room.1").await;
    let unsubscribed = client.next_text().await;
    assert_eq!(unsubscribed, r#"{"type":"unsubscribed","channel":"room.1","reason":"disconnected"}"#);
    node.publish("room.1", &json!({"n": 1})).await;
    let id = node.publish("room.2", &json!({"n": 2})).await;
    client.expect_event(id, &json!({"channel": "room.2", "n": 2})).await;
    // A channel that the user does not follow, or not any more.
    node.disconnect("user=alice&channel=room.1").await;
    node.disconnect("user=alice&channel=room.9").await;
    node.disconnect("user=alice&channel=home").await;
    assert_eq!(client.expect_close().await, (4010, "disconnected by the application".into()));
}

#[tokio::test]
async fn banned_users_are_refused_with_reason() {
    let key = TokenKey::new();
    let node = Node::start(&["--jwt-key", &key.path()]).await;
    let token = key.token("alice", &[]);
    let path = format!("/ws/alice?token={token}");
    let mut open = Client::open(&node, "alice", &format!("token={token}"), Some(JSON_MODE)).await;
    open.welcome().await;
    node.disconnect("user=alice&ban=10m").await;
    assert_eq!(open.expect_close().await, (4010, "banned by the application".into()));
    // The answer depends on what the client reads, as for other rejections.
    let json = ("Sec-WebSocket-Protocol", "fanfare.v1");
    let (_, code, reason) = closed(&node, &path, &[json]).await;
    assert_eq!((code, reason.as_str()), (4010, "banned by the application"));
    let (_, code, _) = closed(&node, &format!("{path}&lastEventId="), &[]).await;
    assert_eq!(code, 4010);
    let response = Raw::connect(node.public).await.upgrade(&path, &[]).await;
    response.expect_rejection(403);
    assert_eq!(response.body.trim_end(), "banned by the application");
    let seconds = response.header("retry-after").and_then(|seconds| seconds.parse::<u32>().ok());
    assert!(seconds.is_some_and(|seconds| (500..=600).contains(&seconds)), "{response:?}");
    // Without a valid token nobody learns of the ban.
    let (_, code, _) = closed(&node, "/ws/alice", &[json]).await;
    assert_eq!(code, 4401);
    assert_eq!(node.metric_of("fanfare_connections_closed_total", r#"reason="banned""#).await, 4.0);
    assert_eq!(node.metric_of("fanfare_http_rejections_total", r#"status="403""#).await, 3.0);
    assert!(node.log().contains("banned by the application"), "{}", node.log());
    node.order("DELETE", "/ban?user=alice").await;
    Client::open(&node, "alice", &format!("token={token}"), None).await;
}

#[tokio::test]
async fn bans_are_listed_in_pages_and_end() {
    let node = Node::start(&[]).await;
    for user in ["carol", "alice", "b%22ob"] {
        node.disconnect(&format!("user={user}&ban=1h")).await;
    }
    node.disconnect("user=dave&ban=1s").await;
    let page = node.admin("GET", "/bans?limit=2", b"").await.json();
    let users = |page: &serde_json::Value| -> Vec<String> {
        let bans = page["bans"].as_array().expect("a list");
        bans.iter().map(|ban| ban["user"].as_str().expect("a user").to_owned()).collect()
    };
    assert_eq!((users(&page), &page["next"]), (vec!["alice".into(), "b\"ob".into()], &json!("b\"ob")));
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970");
    let left = page["bans"][0]["until"].as_u64().expect("a time") - now.as_secs();
    assert!((3500..=3600).contains(&left), "{page}");
    until("the end of a ban", || async {
        let page = node.admin("GET", "/bans?after=b%22ob", b"").await.json();
        assert_eq!(page["next"], json!(null));
        (users(&page) == ["carol"]).then_some(())
    })
    .await;
    Client::simple(&node, "dave").await;
    assert!(node.metric("fanfare_bans").await >= 3.0, "those in force, and perhaps the one that just ended");
}

#[tokio::test]
async fn invalid_orders_are_rejected() {
    let node = Node::start(&[]).await;
    let (mut alice, _) = Client::json(&node, "alice", "room.1").await;
    for (method, path, status, part) in [
        ("GET", "/disconnect?user=alice", 405, "/disconnect accepts POST"),
        ("POST", "/ban?user=alice", 405, "/ban accepts DELETE"),
        ("DELETE", "/bans?user=alice", 405, "/bans accepts GET, HEAD"),
        ("POST", "/disconnect", 400, "user must be given"),
        ("POST", "/disconnect?user=", 400, "user must be given"),
        ("POST", "/disconnect?user=a%0Ab", 400, "user must be given"),
        ("POST", "/disconnect?user=%FF", 400, "user is not percent-encoded UTF-8"),
        ("POST", "/disconnect?usr=alice", 400, "unknown parameter usr"),
        ("POST", "/disconnect?user=alice&user=bob", 400, "parameter user is given twice"),
        ("POST", "/disconnect?user=alice&channel=", 400, "channel must be 1 to 128"),
        ("POST", "/disconnect?user=alice&channel=@control", 400, "channel must be 1 to 128"),
        ("POST", "/disconnect?user=alice&ban=10", 400, "ban: \"10\" is not a duration"),
        ("POST", "/disconnect?user=alice&ban=0s", 400, "ban must be from 1s to 365d"),
        ("POST", "/disconnect?user=alice&ban=366d", 400, "ban must be from 1s to 365d"),
        ("POST", "/disconnect?user=alice&ban=", 400, "is not a duration"),
        ("POST", "/disconnect?user=alice&channel=room.1&ban=1h", 400, "a ban is for all channels"),
        ("DELETE", "/ban", 400, "user must be given"),
        ("DELETE", "/ban?user=alice&channel=room.1", 400, "unknown parameter channel"),
        ("GET", "/bans?limit=0", 400, "limit must be a number from 1 to 1000"),
    ] {
        let response = node.admin(method, path, b"").await;
        assert_eq!(response.status, status, "{method} {path}: {}", response.body);
        assert!(response.body.contains(part), "{method} {path}: {}", response.body);
    }
    // Pages in a browser on this machine could send such requests.
    let origin = [("Origin", "http://localhost:3000")];
    for (method, path) in [("POST", "/disconnect?user=alice"), ("DELETE", "/ban?user=alice")] {
        let response = node.admin_with(method, path, &origin, b"").await;
        assert_eq!(response.status, 403, "{}", response.body);
    }
    assert_eq!(node.metric("fanfare_commands_total").await, 0.0);
    let id = node.publish("room.1", &json!({"n": 1})).await;
    alice.expect_event(id, &json!({"n": 1})).await;
}

#[tokio::test]
async fn connections_of_a_user_are_listed_in_pages() {
    let node = Node::start(&["--shards", "2"]).await;
    let (mut home, _) = Client::json(&node, "alice", "home").await;
    home.send(r#"{"type":"subscribe","channels":[{"channel":"room.1"},{"channel":"room.2"}]}"#).await;
    for _ in 0..2 {
        home.welcome().await;
    }
    let mut all = vec![home, Client::plain(&node, "alice", "room.1").await];
    let mut without_channel = Client::open(&node, "alice", "channel=", Some(JSON_MODE)).await;
    without_channel.next_control("welcome").await;
    all.push(without_channel);
    Client::json(&node, "bob", "home").await;
    let id = node.publish("room.1", &json!({"n": 1})).await;
    all[0].expect_event(id, &json!({"channel": "room.1", "n": 1})).await;
    all[1].expect_event(id, &json!({"n": 1})).await;

    let (mut listed, mut after) = (Vec::new(), String::new());
    loop {
        let path = format!("/connections?user=alice&limit=1{after}");
        let page = node.admin("GET", &path, b"").await.json();
        let connections = page["connections"].as_array().expect("a list");
        assert_eq!(connections.len(), 1, "{page}");
        listed.push(connections[0].clone());
        match page["next"].as_u64() {
            Some(next) => after = format!("&after={next}"),
            None => break,
        }
    }
    assert_eq!(listed.len(), 3);
    for connection in &listed {
        assert_eq!((&connection["client"], &connection["minutes"]), (&json!("127.0.0.1"), &json!(0)));
        assert_eq!(connection["queued"], 0);
    }
    let channels = |connection: &serde_json::Value| -> Vec<(String, u64)> {
        let channels = connection["channels"].as_array().expect("a list").iter();
        let position = |channel: &serde_json::Value| channel["position"].as_u64().expect("a position");
        channels.map(|it| (it["channel"].as_str().expect("a name").to_owned(), position(it))).collect()
    };
    listed.sort_by_key(|connection| channels(connection).len());
    assert_eq!(channels(&listed[0]), []);
    assert_eq!(channels(&listed[1]), [("room.1".to_owned(), id)]);
    let names: Vec<_> = channels(&listed[2]).into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["home", "room.1", "room.2"]);
    assert_eq!(channels(&listed[2])[1].1, id);

    // After the answer none is left on this node.
    node.disconnect("user=alice").await;
    let none = json!({"connections": [], "next": null});
    assert_eq!(node.admin("GET", "/connections?user=alice", b"").await.json(), none);
    for (path, part) in [
        ("/connections", "user must be given"),
        ("/connections?user=alice&after=x", "after must be a number"),
        ("/connections?user=alice&limit=1001", "limit must be a number"),
        ("/connections?user=alice&channel=room.1", "unknown parameter channel"),
    ] {
        let response = node.admin("GET", path, b"").await;
        assert!(response.status == 400 && response.body.contains(part), "{path}: {}", response.body);
    }
    // Places that no shard has.
    for after in [u64::from(u32::MAX), 1 << 32 | 7, (1 << 53) - 1] {
        let page = node.admin("GET", &format!("/connections?user=alice&after={after}"), b"").await;
        assert_eq!(page.json(), none, "{after}");
    }
}
