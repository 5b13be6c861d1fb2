//! Redis as an interface: what other programs can publish and see.

use serde_json::{Value, json};

use crate::common;
use crate::common::client::position;
use crate::common::{Client, Node, Redis, cluster};

#[tokio::test]
async fn plain_publish_reaches_all_clients_without_id() {
    let (redis, a, b) = cluster(&["--shards", "1"]).await;
    let (mut on_a, welcome) = Client::resume(&a, "a", "ws_broadcast", "").await;
    let mut on_b = Client::simple(&b, "b").await;
    let head = position(&welcome["head"]);
    let mut publisher = redis.client().await;
    let cases = [
        (r#"{"text":"hi","n":12345678901234567890123}"#, r#"{"text":"hi","n":12345678901234567890123}"#),
        (r#"{}"#, r#"{}"#),
        (r#"{"type":"news"}"#, r#"{"type":"news"}"#),
        (r#"{"nested":{"id":1}}"#, r#"{"nested":{"id":1}}"#),
        (r#"{"id":5,"text":"hi"}"#, r#"{"data":{"id":5,"text":"hi"}}"#),
        (r#"{"\u0069d":5}"#, r#"{"data":{"\u0069d":5}}"#),
        (r#"{"type":"reset","lastEventId":1}"#, r#"{"data":{"type":"reset","lastEventId":1}}"#),
        (r#"{"type":"welcome"}"#, r#"{"data":{"type":"welcome"}}"#),
        (r#"{"type":"ping"}"#, r#"{"data":{"type":"ping"}}"#),
        (r#"{"type":"error"}"#, r#"{"data":{"type":"error"}}"#),
        (r#"{"type":"ack","ref":1}"#, r#"{"data":{"type":"ack","ref":1}}"#),
        ("5", r#"{"data":5}"#),
        ("[1,2]", r#"{"data":[1,2]}"#),
        ("null", r#"{"data":null}"#),
        ("\"text\"", r#"{"data":"text"}"#),
        ("no \"JSON\"\n", r#"{"data":"no \"JSON\"\n"}"#),
        ("", r#"{"data":""}"#),
        (r#"{"broken""#, r#"{"data":"{\"broken\""}"#),
    ];
    for (message, expected) in cases {
        publisher.call(&["PUBLISH", "ws_broadcast", message]).await;
        let expected: Value = serde_json::from_str(expected).expect("JSON");
        assert_eq!(on_a.next_json().await, expected, "{message}");
        assert_eq!(on_b.next_json().await, expected, "{message}");
    }
    // An object that is not JSON is probably a mistake: the log says why it is delivered as text.
    for node in [&a, &b] {
        let warned = || async {
            node.log().contains("sent Pub/Sub message as text: not JSON (RFC 8259)").then_some(())
        };
        common::until("a warning", warned).await;
    }
    // Invalid UTF-8 is replaced, since browsers accept no such text.
    publisher.call(&[&b"PUBLISH"[..], b"ws_broadcast", b"caf\xE9 au lait"]).await;
    for client in [&mut on_a, &mut on_b] {
        let data = client.next_json().await;
        assert!(data["data"].as_str().is_some_and(|text| text.starts_with("caf")), "{data}");
    }
    // A pretty-printed object is one event.
    publisher.call(&["PUBLISH", "ws_broadcast", "{\n  \"a\": [\r\n1]\n}\n"]).await;
    assert_eq!(on_a.next_json().await, json!({"a": [1]}));
    assert_eq!(on_b.next_json().await, json!({"a": [1]}));
    // A message that starts with a TAB is a copy of an event, or pretends to be one.
    publisher.call(&["PUBLISH", "ws_broadcast", "\t{\"sender\":\"x\",\"id\":1}"]).await;
    // None of these took an id, and none is replayed.
    let id = a.publish("ws_broadcast", &json!({"n": 1})).await;
    assert_eq!(id, head + 1);
    on_a.expect_event(id, &json!({"n": 1})).await;
    on_b.expect_event(id, &json!({"n": 1})).await;
    publisher.call(&["PUBLISH", "ws_broadcast", r#"{"between":1}"#]).await;
    assert_eq!(on_a.next_json().await, json!({"between": 1}));
    assert_eq!(on_b.next_json().await, json!({"between": 1}));
    let last = a.publish("ws_broadcast", &json!({"n": 2})).await;
    on_b.expect_event(last, &json!({"n": 2})).await;
    for node in [&a, &b] {
        let (mut late, welcome) = Client::resume(node, "late", "ws_broadcast", head).await;
        assert_eq!(welcome["recovered"], true);
        late.expect_event(id, &json!({"n": 1})).await;
        late.expect_event(last, &json!({"n": 2})).await;
    }
    let (mut late, _) = Client::resume(&b, "late", "ws_broadcast", last).await;
    publisher.call(&["PUBLISH", "ws_broadcast", r#"{"n":3}"#]).await;
    assert_eq!(late.next_json().await, json!({"n": 3}));
}

#[tokio::test]
async fn plain_event_larger_than_a_feed_reaches_all() {
    let redis = Redis::start(&[]).await;
    let node =
        Node::on(&redis, &["--shards", "64", "--buffer-memory", "2MiB", "--max-message-size", "2MiB"]).await;
    let mut clients = Vec::new();
    for n in 0..20 {
        clients.push(Client::plain(&node, &format!("user{n}"), "ws_broadcast").await);
    }
    let mut publisher = redis.client().await;
    for size in [60_000, 1_900_000] {
        let event = json!({"plain": "x".repeat(size)});
        publisher.call(&["PUBLISH", "ws_broadcast", &event.to_string()]).await;
        for client in &mut clients {
            assert!(client.next_json().await == event);
        }
    }
    assert_eq!(node.metric("fanfare_pubsub_misses_total").await, 0.0);
}

#[tokio::test]
async fn only_listed_channels_accept_plain_publish() {
    let (redis, a, b) = cluster(&["--pubsub-channels", "news,alerts"]).await;
    let mut publisher = redis.client().await;
    for (channel, is_plain) in [("news", true), ("alerts", true), ("ws_broadcast", false), ("room", false)] {
        let mut on_a = Client::plain(&a, "a", channel).await;
        let mut on_b = Client::plain(&b, "b", channel).await;
        publisher.call(&["PUBLISH", channel, r#"{"plain":1}"#]).await;
        if is_plain {
            assert_eq!(on_a.next_json().await, json!({"plain": 1}));
            assert_eq!(on_b.next_json().await, json!({"plain": 1}));
        }
        let id = a.publish(channel, &json!({"n": 1})).await;
        on_a.expect_event(id, &json!({"n": 1})).await;
        on_b.expect_event(id, &json!({"n": 1})).await;
    }
    let none = Node::on(&redis, &["--pubsub-channels", "none"]).await;
    let mut client = Client::simple(&none, "c").await;
    publisher.call(&["PUBLISH", "ws_broadcast", r#"{"plain":1}"#]).await;
    let id = none.publish("ws_broadcast", &json!({"n": 1})).await;
    client.expect_event(id, &json!({"n": 1})).await;
}

#[tokio::test]
async fn only_public_events_are_copied_to_pubsub() {
    let (redis, a, b) = cluster(&[]).await;
    let mut subscriber = redis.client().await;
    subscriber.subscribe("ws_broadcast").await;
    let mut client = Client::simple(&a, "alice").await;
    let (mut bob, _) = Client::json(&b, "bob", "ws_broadcast").await;

    let mut copies = Vec::new();
    client.send("one").await;
    copies.push(client.next_text().await);
    bob.next_event().await;
    bob.send(r#"{"text":"secret","to":"alice"}"#).await;
    assert!(client.next_text().await.contains("secret"));
    a.publish_to("ws_broadcast", "bob", &json!({"secret": 2})).await;
    redis.client().await.fcall("ws_broadcast", br#"{"secret":3}"#, Some("bob")).await.int();
    bob.send(r#"{"data":"two"}"#).await;
    copies.push(client.next_text().await);
    b.publish("ws_broadcast", &json!({"n": 3})).await;
    copies.push(client.next_text().await);
    redis.client().await.fcall("ws_broadcast", br#"{"n":4}"#, None).await.int();
    copies.push(client.next_text().await);
    // Events of other channels are not copied, whatever their name.
    a.publish("room", &json!({"n": 5})).await;
    a.publish("ws_broadcast", &json!({"n": 6})).await;
    copies.push(client.next_text().await);
    for copy in copies {
        let message = String::from_utf8(subscriber.message().await).expect("UTF-8");
        assert_eq!(message.strip_prefix('\t').map(str::trim_end), Some(copy.as_str()));
    }
}

#[tokio::test]
async fn fcall_publishes_any_object() {
    let (redis, a, b) = cluster(&[]).await;
    let (mut on_a, welcome) = Client::resume(&a, "a", "room", "").await;
    let mut on_b = Client::plain(&b, "b", "room").await;
    let mut head = position(&welcome["head"]);
    let mut publisher = redis.client().await;
    for event in [
        r#"{"text":"hi"}"#,
        r#"{}"#,
        "{\n\"a\":\r\n[1, 2]\n}\n",
        " {\"a\":1}",
        r#"{"nested":{"id":1,"to":"x","type":"reset"},"type":"news"}"#,
        r#"{"n":12345678901234567890123,"f":0.1,"e":1e300,"s":"\u00e4\ud83d\udc4b äöü"}"#,
        r#"{"empty":[],"object":{},"deep":[[[[[[[[[[{}]]]]]]]]]]}"#,
    ] {
        let id = publisher.fcall("room", event.as_bytes(), None).await;
        head += 1;
        assert_eq!(id.int(), head as i64, "{event}: {id:?}");
        let text = on_a.next_text().await;
        assert!(text.ends_with(&format!("\"id\":{head}}}")), "{text}");
        // Digits, order and empty lists are kept, which no JSON library would do.
        let squeezed = |text: &str| text.replace([' ', '\n', '\r'], "");
        let body = squeezed(event).trim_end_matches('}').to_string();
        assert!(squeezed(&text).starts_with(&body), "{event} became {text}");
        assert_eq!(on_b.next_text().await, text);
    }
    let id = publisher.fcall("room", br#"{"text":"psst"}"#, Some("b")).await.int() as u64;
    assert_eq!(id, head + 1);
    on_b.expect_event(id, &json!({"text": "psst", "to": "b"})).await;
    let id = publisher.fcall("room", br#"{"n":1}"#, None).await.int() as u64;
    on_b.expect_event(id, &json!({"n": 1})).await;
    on_a.expect_event(id, &json!({"n": 1})).await;
    // These events are replayed like all others.
    let (mut late, _) = Client::resume(&b, "b", "room", head).await;
    late.expect_event(head + 1, &json!({"text": "psst", "to": "b"})).await;
    late.expect_event(id, &json!({"n": 1})).await;
}

#[tokio::test]
async fn fcall_rejects_invalid_events() {
    let (redis, a, b) = cluster(&[]).await;
    let (mut on_a, welcome) = Client::resume(&a, "a", "room", "").await;
    let mut on_b = Client::plain(&b, "b", "room").await;
    let mut publisher = redis.client().await;
    let long = format!(r#"{{"text":"{}"}}"#, "x".repeat(2_000_000));
    for event in [
        &b""[..],
        b"no JSON",
        b"[1]",
        b"5",
        b"\"text\"",
        b"null",
        b"{",
        br#"{"a":1"#,
        br#"{"a":1} {"b":2}"#,
        br#"{"id":1}"#,
        br#"{"\u0069d":1}"#,
        br#"{"to":"bob"}"#,
        br#"{"type":"welcome"}"#,
        br#"{"type":"reset","lastEventId":1}"#,
        br#"{"type":"ping"}"#,
        br#"{"type":"error"}"#,
        br#"{"type":"ack"}"#,
        long.as_bytes(),
    ] {
        let answer = publisher.fcall("room", event, None).await;
        assert!(!answer.error().is_empty(), "{:.80}", String::from_utf8_lossy(event));
    }
    let too_long = "x".repeat(129);
    for to in ["", "line\nbreak", &too_long] {
        assert!(!publisher.fcall("room", b"{}", Some(to)).await.error().is_empty(), "{to:?}");
    }
    for key in ["room", "fanfare:room", "fanfare:{a b}", "fanfare:{}"] {
        let answer = publisher.call(&["FCALL", "fanfare_publish", "1", key, "{}"]).await;
        assert!(!answer.error().is_empty(), "{key}");
    }
    let id = publisher.fcall("room", br#"{"n":1}"#, None).await.int() as u64;
    assert_eq!(id, position(&welcome["head"]) + 1, "none of them took an id");
    on_a.expect_event(id, &json!({"n": 1})).await;
    on_b.expect_event(id, &json!({"n": 1})).await;
}
