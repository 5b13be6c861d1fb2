//! What clients see on one node with the local bus: every row of the protocol's tables.

use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Error;

use crate::common;
use crate::common::cases::cases;
use crate::common::client::{JSON_MODE, position};
use crate::common::{Client, Frame, Node, Options, Raw, until, within};

/// The status of a rejected join.
async fn rejection(node: &Node, user: &str, query: &str) -> u16 {
    let options = Options { query: query.into(), ..Options::default() };
    match Client::try_open(node.public, user, &options).await {
        Err(Error::Http(response)) => response.status().as_u16(),
        Err(error) => panic!("{user:?} {query:?}: no HTTP answer: {error}"),
        Ok(_) => panic!("{user:?} {query:?} was let in"),
    }
}

#[tokio::test]
async fn plain_chat_client_works() {
    let node = Node::start(&[]).await;
    let mut alice = Client::simple(&node, "alice").await;
    let mut bob = Client::simple(&node, "bob").await;

    for text in ["hi", "", " \"quoted\" \\ {\"text\":1}\n\tlines", "grüße 👋\u{2028}"] {
        alice.send(text).await;
        let (id, event) = alice.next_event().await;
        assert_eq!(event, json!({"sender": "alice", "text": text}));
        bob.expect_event(id, &event).await;
    }
    // An event has exactly the documented form.
    bob.send("hi").await;
    let text = alice.next_text().await;
    let id = serde_json::from_str::<Value>(&text).expect("JSON")["id"].clone();
    assert_eq!(text, format!(r#"{{"sender":"bob","text":"hi","id":{id}}}"#));
    assert_eq!(bob.next_text().await, text);
    alice.leave().await;
    bob.send("still here").await;
    bob.expect_event(position(&id) + 1, &json!({"sender": "bob", "text": "still here"})).await;
}

#[tokio::test]
async fn ids_are_contiguous_and_safe_in_javascript() {
    let node = Node::start(&[]).await;
    let mut client = Client::plain(&node, "a", "room").await;
    let ids = node.publish_numbers("room", 0..50).await;
    client.expect_numbers(&ids, 0).await;
    assert!(ids.windows(2).all(|pair| pair[1] == pair[0] + 1), "{ids:?}");
    assert!(ids[49] < 1 << 53);
    let year_2020_in_micros = 1_577_836_800_000_000;
    assert!(ids[0] > year_2020_in_micros, "a sequence starts at the clock: {ids:?}");
}

#[tokio::test]
async fn user_ids_are_percent_decoded() {
    let node = Node::start(&[]).await;
    let longest = "x".repeat(128);
    let users = [
        ("J%C3%BCrgen%20X", "Jürgen X"),
        ("a%2Fb", "a/b"),
        ("a+b", "a+b"),
        ("100%25", "100%"),
        ("%22%5C", "\"\\"),
        (longest.as_str(), longest.as_str()),
    ];
    for (path, user) in users {
        let mut client = Client::simple(&node, path).await;
        client.send("hi").await;
        assert_eq!(client.next_event().await.1["sender"], user);
    }
}

#[tokio::test]
async fn bad_user_ids_are_rejected() {
    let node = Node::start(&[]).await;
    let too_long = "x".repeat(129);
    for user in ["%00", "a%0Ab", "%7F", "%C2%85", "%FF", "%C3", "%", "%4", "%zz", &too_long] {
        assert_eq!(rejection(&node, user, "").await, 400, "{user}");
    }
}

#[tokio::test]
async fn bad_channels_are_rejected() {
    let node = Node::start(&[]).await;
    let too_long = "x".repeat(129);
    for channel in ["", "a%20b", "a/b", "%C3%A9", "a%00", "*", "%zz", "{a}", &too_long] {
        assert_eq!(rejection(&node, "a", &format!("channel={channel}")).await, 400, "{channel}");
    }
    let longest = "x".repeat(128);
    for (given, channel) in [("a%3Ab", "a:b"), ("A_z.0:-", "A_z.0:-"), (&longest, &longest)] {
        let mut client = Client::plain(&node, "a", given).await;
        let id = node.publish(channel, &json!({"n": 1})).await;
        client.expect_event(id, &json!({"n": 1})).await;
    }
}

#[tokio::test]
async fn channels_are_separate() {
    let node = Node::start(&[]).await;
    let mut red = Client::plain(&node, "r", "red").await;
    let mut blue = Client::plain(&node, "b", "blue").await;
    for n in 0..10 {
        let channel = if n % 2 == 0 { "red" } else { "blue" };
        node.publish(channel, &json!({ "n": n })).await;
    }
    for n in 0..5 {
        assert_eq!(red.next_event().await.1["n"], 2 * n);
        assert_eq!(blue.next_event().await.1["n"], 2 * n + 1);
    }
}

#[tokio::test]
async fn default_channel_is_ws_broadcast() {
    let node = Node::start(&[]).await;
    let mut nameless = Client::simple(&node, "a").await;
    let mut named = Client::plain(&node, "b", "ws_broadcast").await;
    nameless.send("hi").await;
    let (id, event) = named.next_event().await;
    nameless.expect_event(id, &event).await;
}

#[tokio::test]
async fn without_last_event_id_there_are_only_events() {
    let node = Node::start(&[]).await;
    node.publish("room", &json!({"n": 0})).await;
    let mut client = Client::plain(&node, "a", "room").await;
    let id = node.publish("room", &json!({"n": 1})).await;
    client.expect_event(id, &json!({"n": 1})).await;
}

#[tokio::test]
async fn empty_last_event_id_starts_at_the_head() {
    let node = Node::start(&[]).await;
    let (_client, fresh) = Client::resume(&node, "a", "room", "").await;
    assert_eq!(fresh["recovered"], true, "an unused channel has a position: {fresh}");
    assert!(position(&fresh["head"]) > 0);

    let ids = node.publish_numbers("room", 0..3).await;
    assert_eq!(ids[0], position(&fresh["head"]) + 1);
    let (mut client, welcome) = Client::resume(&node, "a", "room", "").await;
    assert_eq!(welcome, json!({"type": "welcome", "lastEventId": ids[2], "head": ids[2], "recovered": true}));
    let id = node.publish("room", &json!({"n": 3})).await;
    client.expect_event(id, &json!({"n": 3})).await;
}

#[tokio::test]
async fn known_last_event_id_replays_what_follows() {
    let node = Node::start(&[]).await;
    let (_first, welcome) = Client::resume(&node, "a", "room", "").await;
    let base = position(&welcome["head"]);
    let ids = node.publish_numbers("room", 0..40).await;
    let head = ids[39];

    let mut clients = Vec::new();
    for (last, n) in [(base, 0), (ids[0], 1), (ids[17], 18), (ids[38], 39), (head, 40)] {
        let (mut client, welcome) = Client::resume(&node, "a", "room", last).await;
        let expected = json!({"type": "welcome", "lastEventId": last, "head": head, "recovered": true});
        assert_eq!(welcome, expected);
        client.expect_numbers(&ids[n as usize..], n).await;
        clients.push(client);
    }
    let live = node.publish_numbers("room", 40..45).await;
    for client in &mut clients {
        client.expect_numbers(&live, 40).await;
    }
}

#[tokio::test]
async fn unknown_last_event_id_is_not_recovered() {
    let node = Node::start(&[]).await;
    let ids = node.publish_numbers("room", 0..5).await;
    let head = ids[4];
    let strange = [
        "abc".to_string(),
        "-1".into(),
        "0".into(),
        "1".into(),
        "1.5".into(),
        "0x10".into(),
        "null".into(),
        "%20".into(),
        "%FF".into(),
        "99999999999999999999999999".into(),
        ((1u64 << 53) - 1).to_string(),
        u64::MAX.to_string(),
        (head + 1).to_string(),
        (head + 1_000_000).to_string(),
        (ids[0] - 1_000_000).to_string(),
        format!("{head}x"),
    ];
    for last in &strange {
        let (mut client, welcome) = Client::resume(&node, "a", "room", last).await;
        let expected = json!({"type": "welcome", "lastEventId": head, "head": head, "recovered": false});
        assert_eq!(welcome, expected, "{last}");
        client.send_message(tokio_tungstenite::tungstenite::Message::Ping("x".into())).await;
        assert_eq!(client.next_frame().await, Frame::Pong(b"x".to_vec()), "nothing from the past");
    }
    let (mut client, _) = Client::resume(&node, "a", "room", "abc").await;
    let id = node.publish("room", &json!({"n": 5})).await;
    client.expect_event(id, &json!({"n": 5})).await;
}

#[tokio::test]
async fn local_bus_restart_is_not_recovered() {
    let first = Node::start(&[]).await;
    let last = first.publish_numbers("room", 0..5).await[4];
    first.kill();
    let next = Node::start(&[]).await;
    let (mut client, welcome) = Client::resume(&next, "a", "room", last).await;
    let head = welcome["head"].as_u64().expect("a head");
    let expected = json!({"type": "welcome", "lastEventId": head, "head": head, "recovered": false});
    assert_eq!(welcome, expected);
    assert!(head > last, "no id is given twice");
    let id = next.publish("room", &json!({"n": 5})).await;
    assert_eq!(id, head + 1);
    client.expect_event(id, &json!({"n": 5})).await;
}

#[tokio::test]
async fn evicted_local_history_is_not_recovered() {
    let node = Node::start(&["--history", "1000"]).await;
    let ids = node.publish_numbers("room", 0..1100).await;
    let (mut client, welcome) = Client::resume(&node, "a", "room", ids[0]).await;
    assert_eq!((&welcome["recovered"], &welcome["lastEventId"]), (&json!(false), &json!(ids[1099])));
    let id = node.publish("room", &json!({"n": 1100})).await;
    client.expect_event(id, &json!({"n": 1100})).await;
    let (mut client, welcome) = Client::resume(&node, "a", "room", ids[150]).await;
    assert_eq!((&welcome["recovered"], &welcome["lastEventId"]), (&json!(true), &json!(ids[150])));
    client.expect_numbers(&ids[151..], 151).await;
}

#[tokio::test]
async fn json_mode_publishes_and_acknowledges() {
    let node = Node::start(&[]).await;
    let (mut alice, welcome) = Client::json(&node, "alice", "room").await;
    assert_eq!(alice.subprotocol.as_deref(), Some(JSON_MODE));
    assert_eq!(welcome["recovered"], true, "no lastEventId is the same as an empty one");
    let mut bob = Client::plain(&node, "bob", "room").await;

    let messages = [
        (json!({"text": "hi", "ref": 7}), json!({"sender": "alice", "text": "hi"})),
        (
            json!({"data": {"a": [1, null, "x"]}, "ref": "r"}),
            json!({"sender": "alice", "data": {"a": [1, null, "x"]}}),
        ),
        (json!({"data": null, "ref": ""}), json!({"sender": "alice", "data": null})),
        (json!({"data": false, "ref": -1.5}), json!({"sender": "alice", "data": false})),
    ];
    let mut head = position(&welcome["head"]);
    for (message, event) in messages {
        alice.send(message.to_string()).await;
        head += 1;
        bob.expect_event(head, &event).await;
        // The order of the event and its acknowledgement is not defined.
        let mut both = [alice.next_json().await, alice.next_json().await];
        both.sort_by_key(|frame| frame["type"] == "ack");
        assert_eq!(both[1], json!({"type": "ack", "ref": message["ref"], "id": head}));
        assert_eq!((&both[0]["sender"], &both[0]["id"]), (&json!("alice"), &json!(head)));
    }
    // Without `ref` there is no answer: the next two frames are events.
    alice.send(r#"{"text":"one"}"#).await;
    alice.send(r#"{"text":"two"}"#).await;
    alice.expect_event(head + 1, &json!({"sender": "alice", "text": "one"})).await;
    alice.expect_event(head + 2, &json!({"sender": "alice", "text": "two"})).await;
}

#[tokio::test]
async fn json_mode_reports_invalid_frames() {
    let node = Node::start(&[]).await;
    let (mut client, welcome) = Client::json(&node, "a", "room").await;
    for bad in [
        "no JSON",
        "",
        "[]",
        "5",
        "\"text\"",
        "{}",
        r#"{"text":1}"#,
        r#"{"text":"a""#,
        r#"{"ref":{},"text":"a"}"#,
    ] {
        client.send(bad).await;
        client.expect_error(None).await;
    }
    for bad in [
        json!({"ref": 3}),
        json!({"ref": "x", "text": null}),
        json!({"ref": 4, "text": ["a"]}),
        json!({"ref": 5, "text": "a", "to": 7}),
        json!({"ref": 6, "text": "a", "to": ""}),
        json!({"ref": 9, "text": "a", "to": null}), // must not become a public event
        json!({"ref": 10, "text": "a", "data": 1}),
        json!({"ref": 7, "text": "a", "to": "x".repeat(129)}),
        json!({"ref": 8, "text": "a", "to": "line\nbreak"}),
    ] {
        client.send(bad.to_string()).await;
        client.expect_error(Some(bad["ref"].clone())).await;
    }
    for (bad, reference, message) in [
        (r#"{"txt":"hi","ref":11}"#, json!(11), r#"unknown key "txt": did you mean "text"?"#),
        (r#"{"text":"a","ref":12,"TO":"b"}"#, json!(12), r#"unknown key "TO": did you mean "to"?"#),
        (
            r#"{"text":"a","room":"b"}"#,
            json!(null),
            r#"unknown key "room": the keys are text, data, to, channel, key, ref, type"#,
        ),
        (r#"{"text":1,"ref":13}"#, json!(13), r#""text" must be a string"#),
        // The members in their order, which serde would take for an object.
        (r#"[null,"hi"]"#, json!(null), "send a JSON object: this is an array"),
        (r#"["ping"]"#, json!(null), "send a JSON object: this is an array"),
        ("5", json!(null), "send a JSON object: this is a number"),
    ] {
        client.send(bad).await;
        let error = client.next_control("error").await;
        assert_eq!(
            (&error["ref"], &error["code"], &error["message"]),
            (&reference, &json!("invalid"), &json!(message))
        );
    }
    let long = format!(r#"{{"{}":1}}"#, "x".repeat(50_000));
    client.send(long).await;
    let error = client.next_control("error").await.to_string();
    assert!(error.len() < 300 && error.contains("xxx…"), "{error}");
    client.send(r#"{"text":"good"}"#).await;
    let expected = json!({"sender": "a", "text": "good"});
    client.expect_event(position(&welcome["head"]) + 1, &expected).await;
}

#[tokio::test]
async fn json_mode_answers_a_ping_with_the_position() {
    let node = Node::start(&[]).await;
    let (mut client, _) = Client::json(&node, "a", "room").await;
    let id = node.publish("room", &json!({"n": 1})).await;
    client.expect_event(id, &json!({"n": 1})).await;
    client.send(r#"{"type":"ping"}"#).await;
    assert_eq!(client.next_json().await, json!({"type": "ping", "lastEventId": id}));
    let private = node.publish_to("room", "nobody", &json!({"n": 2})).await;
    client.send(r#"{"type":"ping"}"#).await;
    assert_eq!(client.next_json().await, json!({"type": "ping", "lastEventId": private}));
    for bad in [r#"{"type":"reset"}"#, r#"{"type":"ping","text":"a"}"#] {
        client.send(bad).await;
        client.expect_error(None).await;
    }
    // In plain mode it is a chat message.
    let mut plain = Client::plain(&node, "b", "room").await;
    plain.send(r#"{"type":"ping"}"#).await;
    assert_eq!(plain.next_event().await.1, json!({"sender": "b", "text": r#"{"type":"ping"}"#}));
}

#[tokio::test]
async fn pipelined_publishes_lose_nothing() {
    const MESSAGES: u64 = 5000;
    let node = Node::start(&["--max-message-rate", "0", "--max-byte-rate", "0"]).await;
    let (mut client, welcome) = Client::json(&node, "a", "room").await;
    let mut subscriber = Client::plain(&node, "w", "room").await;
    let head = position(&welcome["head"]);
    // All are sent before the first answer is read: the kernel buffers what the server does not
    // read.
    for n in 0..MESSAGES {
        client.send(json!({"data": n, "ref": n}).to_string()).await;
    }
    let (mut acks, mut events) = (0, 0);
    while acks < MESSAGES || events < MESSAGES {
        let value = client.next_json().await;
        if value["type"] == "ack" {
            assert_eq!(value, json!({"type": "ack", "ref": acks, "id": head + 1 + acks}));
            acks += 1;
        } else {
            assert_eq!(value, json!({"sender": "a", "data": events, "id": head + 1 + events}));
            events += 1;
        }
    }
    for n in 0..MESSAGES {
        subscriber.expect_event(head + 1 + n, &json!({"sender": "a", "data": n})).await;
    }
}

#[tokio::test]
async fn json_mode_resumes_like_plain_mode() {
    let node = Node::start(&[]).await;
    let ids = node.publish_numbers("room", 0..5).await;
    let query = format!("channel=room&lastEventId={}", ids[1]);
    let mut client = Client::open(&node, "a", &query, Some(JSON_MODE)).await;
    let welcome = client.welcome().await;
    let expected = json!({"type": "welcome", "lastEventId": ids[1], "head": ids[4], "recovered": true});
    assert_eq!(welcome, expected);
    client.expect_numbers(&ids[2..], 2).await;
}

#[tokio::test]
async fn private_event_reaches_its_user_only() {
    let node = Node::start(&[]).await;
    let (mut alice, welcome) = Client::json(&node, "alice", "room").await;
    let mut bobs = [Client::plain(&node, "bob", "room").await, Client::plain(&node, "bob", "room").await];
    let mut elsewhere = Client::plain(&node, "bob", "other").await;
    let head = position(&welcome["head"]);

    alice.send(r#"{"text":"psst","to":"bob","ref":1}"#).await;
    assert_eq!(alice.next_json().await, json!({"type": "ack", "ref": 1, "id": head + 1}));
    let data = json!({"data": [1], "to": "bob"});
    alice.send(data.to_string()).await;
    for bob in &mut bobs {
        let text = bob.next_text().await;
        assert_eq!(text, format!(r#"{{"sender":"alice","to":"bob","text":"psst","id":{}}}"#, head + 1));
        bob.expect_event(head + 2, &json!({"sender": "alice", "to": "bob", "data": [1]})).await;
    }
    assert_eq!(node.publish_to("room", "bob", &json!({"n": 1})).await, head + 3);
    assert_eq!(node.publish("room", &json!({"n": 2})).await, head + 4);
    for bob in &mut bobs {
        bob.expect_event(head + 3, &json!({"to": "bob", "n": 1})).await;
        bob.expect_event(head + 4, &json!({"n": 2})).await;
    }
    alice.expect_event(head + 4, &json!({"n": 2})).await;
    let id = node.publish("other", &json!({"n": 3})).await;
    elsewhere.expect_event(id, &json!({"n": 3})).await;
}

#[tokio::test]
async fn private_event_is_replayed_to_its_user_only() {
    let node = Node::start(&[]).await;
    let (_stay, welcome) = Client::resume(&node, "x", "room", "").await;
    let head = position(&welcome["head"]);
    node.publish_to("room", "bob", &json!({"n": 1})).await;
    node.publish("room", &json!({"n": 2})).await;
    node.publish_to("room", "carol", &json!({"n": 3})).await;
    node.publish_to("room", "bob", &json!({"n": 4})).await;

    let (mut bob, welcome) = Client::resume(&node, "bob", "room", head).await;
    assert_eq!((&welcome["recovered"], &welcome["head"]), (&json!(true), &json!(head + 4)));
    let (mut alice, _) = Client::resume(&node, "alice", "room", head).await;
    let (mut carol, _) = Client::resume(&node, "carol", "room", head).await;
    node.publish("room", &json!({"n": 5})).await;
    bob.expect_event(head + 1, &json!({"to": "bob", "n": 1})).await;
    bob.expect_event(head + 2, &json!({"n": 2})).await;
    bob.expect_event(head + 4, &json!({"to": "bob", "n": 4})).await;
    bob.expect_event(head + 5, &json!({"n": 5})).await;
    alice.expect_event(head + 2, &json!({"n": 2})).await;
    alice.expect_event(head + 5, &json!({"n": 5})).await;
    carol.expect_event(head + 2, &json!({"n": 2})).await;
    carol.expect_event(head + 3, &json!({"to": "carol", "n": 3})).await;
    carol.expect_event(head + 5, &json!({"n": 5})).await;
}

#[tokio::test]
async fn control_types_in_client_data_stay_data() {
    let node = Node::start(&[]).await;
    let (mut alice, welcome) = Client::json(&node, "alice", "room").await;
    let mut bob = Client::plain(&node, "bob", "room").await;
    let mut head = position(&welcome["head"]);
    for kind in ["welcome", "reset", "ping", "error", "ack"] {
        let fake = json!({"type": kind, "lastEventId": 5, "id": 9, "to": "carol"});
        alice.send(json!({ "data": fake }).to_string()).await;
        bob.send(fake.to_string()).await;
        let mut seen = [bob.next_event().await, bob.next_event().await];
        alice.expect_event(seen[0].0, &seen[0].1).await;
        alice.expect_event(seen[1].0, &seen[1].1).await;
        assert_eq!((seen[0].0, seen[1].0), (head + 1, head + 2));
        head += 2;
        seen.sort_by_key(|(_, event)| event["sender"] == "bob");
        assert_eq!(seen[0].1, json!({"sender": "alice", "data": fake}));
        assert_eq!(seen[1].1, json!({"sender": "bob", "text": fake.to_string()}));
    }
}

#[tokio::test]
async fn pings_are_websocket_frames() {
    let node = Node::start(&["--ping-interval", "1s", "--ping-timeout", "1s"]).await;
    let mut client = Client::simple(&node, "a").await;
    // It answers, so it stays connected far beyond the timeout.
    for _ in 0..4 {
        assert!(matches!(client.next_frame().await, Frame::Ping(_)));
    }
    let id = node.publish("ws_broadcast", &json!({"n": 1})).await;
    client.expect_event(id, &json!({"n": 1})).await;
}

#[tokio::test]
async fn json_pings_carry_the_position() {
    let flags = ["--ping-interval", "1s", "--ping-timeout", "10s", "--ping-format", "json"];
    let node = Node::start(&flags).await;
    let mut simple = Client::plain(&node, "a", "room").await;
    let (mut resuming, welcome) = Client::resume(&node, "b", "room", "").await;
    let (mut json_mode, _) = Client::json(&node, "c", "room").await;
    let positioned = format!(r#"{{"type":"ping","lastEventId":{}}}"#, welcome["head"]);
    assert_eq!(simple.next_frame().await, Frame::Text(r#"{"type":"ping"}"#.into()));
    assert_eq!(resuming.next_frame().await, Frame::Text(positioned.clone()));
    assert_eq!(json_mode.next_frame().await, Frame::Text(positioned));
    // An event for another user moves the position too, and the ping carries it.
    let id = node.publish_to("room", "nobody", &json!({})).await;
    let positioned = format!(r#"{{"type":"ping","lastEventId":{id}}}"#);
    within("a ping that shows it", async { while resuming.next_text().await != positioned {} }).await;
}

#[tokio::test]
async fn pings_can_have_both_formats() {
    let flags = ["--ping-interval", "1s", "--ping-timeout", "10s", "--ping-format", "both"];
    let node = Node::start(&flags).await;
    let mut client = Client::simple(&node, "a").await;
    let (mut frames, mut texts) = (0, 0);
    while frames < 2 || texts < 2 {
        match client.next_frame().await {
            Frame::Ping(_) => frames += 1,
            Frame::Text(text) if text == r#"{"type":"ping"}"# => texts += 1,
            other => panic!("{other:?}"),
        }
    }
    assert!(frames <= 3 && texts <= 3, "they come together: {frames} frames, {texts} texts");
}

#[tokio::test]
async fn client_without_pongs_is_closed() {
    let node = Node::start(&["--ping-interval", "1s", "--ping-timeout", "1s"]).await;
    let mut silent = Raw::upgraded(node.public, "/ws/a").await;
    let mut pings = 0;
    let start = std::time::Instant::now();
    while let Some((opcode, _)) = silent.next().await {
        match opcode {
            common::raw::opcode::PING => pings += 1,
            common::raw::opcode::CLOSE => {}
            other => panic!("opcode {other}"),
        }
    }
    assert!(pings >= 1);
    assert!(start.elapsed().as_millis() >= 1000, "not before the timeout");
}

#[tokio::test]
async fn closes_are_counted_by_reason() {
    let node = Node::start(&[]).await;
    Client::simple(&node, "a").await.leave().await;
    drop(Client::simple(&node, "a").await);
    for bytes in [
        common::raw::frame_bytes(true, common::raw::opcode::BINARY, true, b""),
        common::raw::frame_bytes(true, common::raw::opcode::TEXT, false, b""),
        common::raw::frame_bytes(true, common::raw::opcode::TEXT, true, b"\xFF"),
    ] {
        let mut raw = Raw::upgraded(node.public, "/ws/a").await;
        raw.write(&bytes).await;
        raw.expect_close().await;
    }
    for reason in ["closed_by_peer", "connection_lost", "binary", "protocol", "invalid_text"] {
        let series = format!(r#"fanfare_connections_closed_total{{reason="{reason}"}}"#);
        until(&series, || async { (node.metric(&series).await == 1.0).then_some(()) }).await;
    }
    until("no connection", || async { (node.metric("fanfare_connections").await == 0.0).then_some(()) })
        .await;
}

#[tokio::test]
async fn sigterm_closes_all_with_1012() {
    let node = Node::start(&[]).await;
    let mut clients = Vec::new();
    for n in 0..20 {
        clients.push(Client::simple(&node, &format!("user{n}")).await);
    }
    let (resuming, _) = Client::resume(&node, "r", "room", "").await;
    clients.push(resuming);
    clients.push(Client::json(&node, "j", "room").await.0);
    node.signal("TERM");
    for client in &mut clients {
        assert_eq!(client.expect_close().await.0, 1012);
    }
    assert_eq!(node.ended().await.code(), Some(0));
}

#[tokio::test]
async fn idle_node_exits_at_sigterm_and_sigint() {
    for signal in ["TERM", "INT"] {
        let node = Node::start(&[]).await;
        node.signal(signal);
        assert_eq!(node.ended().await.code(), Some(0), "{signal}");
    }
}

#[tokio::test]
async fn clients_and_backends_publish_json_by_the_rule() {
    let node = Node::start(&["--max-message-rate", "0"]).await;
    let (mut alice, _) = Client::json(&node, "alice", "room").await;
    let mut bob = Client::plain(&node, "bob", "room").await;
    for (number, case) in cases().into_iter().enumerate() {
        let mut expected = Vec::new();
        let posted = node.admin("POST", "/publish?channel=room", &case.event()).await;
        match case.error() {
            None => {
                assert_eq!(posted.status, 200, "{}: {}", case.name(), posted.body);
                expected.push(serde_json::from_slice(&case.event()).expect("JSON"));
            }
            Some(words) => {
                let rejected = posted.status == 400 && posted.body.contains(words);
                assert!(rejected, "{}: {posted:?}", case.name());
            }
        }
        // A message that is not UTF-8 closes the connection with 1007.
        if let Ok(value) = std::str::from_utf8(&case.value) {
            alice.send(format!(r#"{{"ref":{number},"data":{value}}}"#)).await;
            let answer = loop {
                let frame = alice.next_json().await;
                if matches!(frame["type"].as_str(), Some("ack" | "error")) {
                    break frame;
                }
            };
            match case.error() {
                None => {
                    assert_eq!(answer["type"], "ack", "{}: {answer}", case.name());
                    let data: Value = serde_json::from_str(value).expect("JSON");
                    expected.push(json!({"sender": "alice", "data": data}));
                }
                Some(words) => {
                    let message = answer["message"].as_str().unwrap_or_default();
                    let rejected = answer["code"] == "invalid" && message.contains(words);
                    assert!(rejected, "{}: {answer}", case.name());
                }
            }
        }
        for event in expected {
            assert_eq!(bob.next_event().await.1, event, "{}", case.name());
        }
    }
}
