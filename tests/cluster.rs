//! Two nodes and one real Redis: one order for everybody, whoever publishes and by whichever way.

mod common;

use common::client::position;
use common::{Client, Node, Proxy, Redis, within};
use serde_json::{Value, json};

/// A Redis and two nodes on it.
async fn cluster(flags: &[&str]) -> (Redis, Node, Node) {
    let redis = Redis::start(&[]).await;
    let (a, b) = tokio::join!(Node::on(&redis, flags), Node::on(&redis, flags));
    (redis, a, b)
}

/// Reads `count` events; their ids must be contiguous.
async fn read_contiguous(client: &mut Client, count: usize) -> Vec<(u64, Value)> {
    let mut events: Vec<(u64, Value)> = Vec::new();
    for _ in 0..count {
        let event = client.next_event().await;
        if let Some((last, _)) = events.last() {
            assert_eq!(event.0, last + 1, "after {events:?}");
        }
        events.push(event);
    }
    events
}

#[tokio::test]
async fn a_simple_chat_spans_both_nodes() {
    let (_redis, a, b) = cluster(&[]).await;
    let mut alice = Client::simple(&a, "alice").await;
    let mut bob = Client::simple(&b, "bob").await;
    alice.send("hi").await;
    let (id, event) = bob.next_event().await;
    assert_eq!(event, json!({"sender": "alice", "text": "hi"}));
    alice.expect_event(id, &event).await;
    bob.send("hello \"\\\n👋").await;
    let event = json!({"sender": "bob", "text": "hello \"\\\n👋"});
    alice.expect_event(id + 1, &event).await;
    bob.expect_event(id + 1, &event).await;
}

#[tokio::test]
async fn the_order_is_equal_on_both_nodes_and_ids_are_contiguous() {
    const EACH: u64 = 100;
    let (redis, a, b) = cluster(&[]).await;
    let mut watchers = Vec::new();
    for node in [&a, &b, &a, &b] {
        watchers.push(Client::plain(node, "watcher", "room").await);
    }
    let chat = async |node: &Node, user: &str| {
        let mut client = Client::plain(node, user, "room").await;
        for n in 0..EACH {
            client.send(n.to_string()).await;
        }
        client // stays until all is read
    };
    let post = async |node: &Node, user: &str| {
        for n in 0..EACH {
            node.publish("room", &json!({"sender": user, "text": n.to_string()})).await;
        }
    };
    let fcall = async |user: &str| {
        let mut client = redis.client().await;
        for n in 0..EACH {
            let event = json!({"sender": user, "text": n.to_string()}).to_string();
            assert!(client.fcall("room", event.as_bytes(), None).await.int() > 0);
        }
    };
    let watch = async {
        let mut seen = Vec::new();
        for watcher in &mut watchers {
            seen.push(read_contiguous(watcher, 6 * EACH as usize).await);
        }
        seen
    };
    let (_c1, _c2, _c3, (), (), (), seen) = tokio::join!(
        chat(&a, "chat-a"),
        chat(&b, "chat-b"),
        chat(&b, "chat-b2"),
        post(&a, "post-a"),
        post(&b, "post-b"),
        fcall("fcall"),
        watch,
    );
    for other in &seen[1..] {
        assert_eq!(other, &seen[0]);
    }
    for user in ["chat-a", "chat-b", "chat-b2", "post-a", "post-b", "fcall"] {
        let of_user = seen[0].iter().filter(|(_, event)| event["sender"] == user);
        let texts: Vec<_> = of_user.map(|(_, event)| event["text"].clone()).collect();
        assert_eq!(texts, (0..EACH).map(|n| json!(n.to_string())).collect::<Vec<_>>(), "{user}");
    }
}

#[tokio::test]
async fn a_bare_publish_reaches_everybody_at_once_without_id() {
    let (redis, a, b) = cluster(&[]).await;
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
    // What is not UTF-8 can't be text in a browser; what can be read of it is there.
    publisher.call(&[&b"PUBLISH"[..], b"ws_broadcast", b"caf\xE9 au lait"]).await;
    for client in [&mut on_a, &mut on_b] {
        let data = client.next_json().await;
        assert!(data["data"].as_str().is_some_and(|text| text.starts_with("caf")), "{data}");
    }
    // A pretty-printed object is one event still.
    publisher.call(&["PUBLISH", "ws_broadcast", "{\n  \"a\": [\r\n1]\n}\n"]).await;
    assert_eq!(on_a.next_json().await, json!({"a": [1]}));
    assert_eq!(on_b.next_json().await, json!({"a": [1]}));
    // What begins with a TAB is a copy of what came already, or pretends to be.
    publisher.call(&["PUBLISH", "ws_broadcast", "\t{\"sender\":\"x\",\"id\":1}"]).await;
    // None of these took an id, and none of them is replayed.
    let id = a.publish("ws_broadcast", &json!({"n": 1})).await;
    assert_eq!(id, head + 1);
    on_a.expect_event(id, &json!({"n": 1})).await;
    on_b.expect_event(id, &json!({"n": 1})).await;
    let (mut late, welcome) = Client::resume(&b, "late", "ws_broadcast", head).await;
    assert_eq!(welcome["recovered"], true);
    late.expect_event(id, &json!({"n": 1})).await;
    publisher.call(&["PUBLISH", "ws_broadcast", r#"{"n":2}"#]).await;
    assert_eq!(late.next_json().await, json!({"n": 2}));
}

#[tokio::test]
async fn only_listed_channels_are_bare() {
    let (redis, a, b) = cluster(&["--bare-channels", "news,alerts"]).await;
    let mut publisher = redis.client().await;
    for (channel, bare) in [("news", true), ("alerts", true), ("ws_broadcast", false), ("room", false)] {
        let mut on_a = Client::plain(&a, "a", channel).await;
        let mut on_b = Client::plain(&b, "b", channel).await;
        publisher.call(&["PUBLISH", channel, r#"{"bare":1}"#]).await;
        if bare {
            assert_eq!(on_a.next_json().await, json!({"bare": 1}));
            assert_eq!(on_b.next_json().await, json!({"bare": 1}));
        }
        let id = a.publish(channel, &json!({"n": 1})).await;
        on_a.expect_event(id, &json!({"n": 1})).await;
        on_b.expect_event(id, &json!({"n": 1})).await;
    }
    let none = Node::on(&redis, &["--bare-channels", "none"]).await;
    let mut client = Client::simple(&none, "c").await;
    publisher.call(&["PUBLISH", "ws_broadcast", r#"{"bare":1}"#]).await;
    let id = none.publish("ws_broadcast", &json!({"n": 1})).await;
    client.expect_event(id, &json!({"n": 1})).await;
}

#[tokio::test]
async fn a_subscriber_of_the_bare_channel_sees_copies_of_broadcasts_alone() {
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
    // In other channels nothing is copied, whatever their name.
    a.publish("room", &json!({"n": 5})).await;
    a.publish("ws_broadcast", &json!({"n": 6})).await;
    copies.push(client.next_text().await);
    for copy in copies {
        let message = String::from_utf8(subscriber.message().await).expect("UTF-8");
        assert_eq!(message.strip_prefix('\t').map(str::trim_end), Some(copy.as_str()));
    }
}

#[tokio::test]
async fn any_program_publishes_with_fcall() {
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
        r#"{"n":12345678901234567890123,"f":0.1,"e":1e400,"s":"\u00e4\ud83d\udc4b äöü"}"#,
        r#"{"empty":[],"object":{},"deep":[[[[[[[[[[{}]]]]]]]]]]}"#,
    ] {
        let id = publisher.fcall("room", event.as_bytes(), None).await;
        head += 1;
        assert_eq!(id.int(), head as i64, "{event}: {id:?}");
        let text = on_a.next_text().await;
        assert!(text.ends_with(&format!("\"id\":{head}}}")), "{text}");
        // Even what no JSON library would keep goes out as it came: digits, order, empty lists.
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
    // What came this way is replayed like anything else.
    let (mut late, _) = Client::resume(&b, "b", "room", head).await;
    late.expect_event(head + 1, &json!({"text": "psst", "to": "b"})).await;
    late.expect_event(id, &json!({"n": 1})).await;
}

#[tokio::test]
async fn fcall_refuses_what_it_must() {
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

#[tokio::test]
async fn whatever_fcall_takes_reaches_clients_as_json() {
    let (redis, a, b) = cluster(&[]).await;
    let (mut on_a, _) = Client::resume(&a, "a", "room", "").await;
    let (mut on_b, _) = Client::resume(&b, "b", "room", "").await;
    let mut publisher = redis.client().await;
    // Lua's JSON reader is laxer than browsers. Whether these are refused is open; that clients can go on is not.
    for event in [
        &br#"{"a":NaN}"#[..],
        br#"{"a":Infinity}"#,
        br#"{"a":-inf}"#,
        br#"{"a":0x10}"#,
        br#"{"a":01}"#,
        br#"{"a":+1}"#,
        b"{\"a\":\"\xFF\"}",
        b"{\"a\":\"\xED\xA0\x80\"}",
        b"{\"a\":\"tab\tinside\"}",
        b"{\"a\":\"nul\0inside\"}",
        b"{\"a\":\"line\nbreak\"}",
        b"{\"a\":1}\0",
        b"\xEF\xBB\xBF{\"a\":1}",
        br#"{"a":1,}"#,
        br#"{"a":"\ud800"}"#,
    ] {
        let answer = publisher.fcall("room", event, None).await;
        if !matches!(answer, common::Value::Error(_)) {
            let seen = on_a.next_event().await; // reading it asserts that it is JSON
            assert_eq!(seen.0, answer.int() as u64, "{}", String::from_utf8_lossy(event));
            on_b.expect_event(seen.0, &seen.1).await;
        }
    }
    let id = a.publish("room", &json!({"end": 1})).await;
    on_a.expect_event(id, &json!({"end": 1})).await;
    on_b.expect_event(id, &json!({"end": 1})).await;
}

#[tokio::test]
async fn an_event_with_to_reaches_all_connections_of_that_user_on_both_nodes() {
    let (redis, a, b) = cluster(&[]).await;
    let mut bobs = [
        Client::plain(&a, "bob", "room").await,
        Client::plain(&a, "bob", "room").await,
        Client::plain(&b, "bob", "room").await,
    ];
    let (mut alice, welcome) = Client::json(&a, "alice", "room").await;
    let mut carol = Client::plain(&b, "carol", "room").await;
    let mut head = position(&welcome["head"]);
    alice.send(r#"{"text":"psst","to":"bob"}"#).await;
    // One after the other, so that their order is known.
    bobs[0].next_event().await;
    assert_eq!(a.publish_to("room", "bob", &json!({"n": 1})).await, head + 2);
    assert_eq!(b.publish_to("room", "bob", &json!({"n": 2})).await, head + 3);
    let fcalled = redis.client().await.fcall("room", br#"{"n":3}"#, Some("bob")).await;
    assert_eq!(fcalled.int() as u64, head + 4);
    b.publish("room", &json!({"end": 1})).await;
    for bob in &mut bobs[1..] {
        bob.expect_event(head + 1, &json!({"sender": "alice", "to": "bob", "text": "psst"})).await;
    }
    for bob in &mut bobs {
        for n in 1..=3 {
            bob.expect_event(head + 1 + n, &json!({"to": "bob", "n": n})).await;
        }
        bob.expect_event(head + 5, &json!({"end": 1})).await;
    }
    head += 5;
    alice.expect_event(head, &json!({"end": 1})).await;
    carol.expect_event(head, &json!({"end": 1})).await;
}

#[tokio::test]
async fn a_client_resumes_on_the_other_node() {
    let (_redis, a, b) = cluster(&[]).await;
    let (mut client, welcome) = Client::resume(&a, "bob", "room", "").await;
    let base = position(&welcome["head"]);
    let ids = a.publish_numbers("room", 0..5).await;
    client.expect_numbers(&ids, 0).await;
    client.leave().await;
    a.publish_to("room", "bob", &json!({"n": 5})).await;
    b.publish_to("room", "carol", &json!({"n": 6})).await;
    b.publish("room", &json!({"n": 7})).await;
    // B has followed nobody here yet, so all of it comes from Redis.
    let (mut client, welcome) = Client::resume(&b, "bob", "room", ids[4]).await;
    let expected = json!({"type": "welcome", "lastEventId": ids[4], "head": ids[4] + 3, "recovered": true});
    assert_eq!(welcome, expected);
    client.expect_event(ids[4] + 1, &json!({"to": "bob", "n": 5})).await;
    client.expect_event(ids[4] + 3, &json!({"n": 7})).await;
    let (mut from_base, _) = Client::resume(&b, "carol", "room", base).await;
    from_base.expect_numbers(&ids, 0).await;
    from_base.expect_event(ids[4] + 2, &json!({"to": "carol", "n": 6})).await;
    from_base.expect_event(ids[4] + 3, &json!({"n": 7})).await;
}

#[tokio::test]
async fn a_client_from_a_node_that_was_ahead_misses_and_doubles_nothing() {
    let redis = Redis::start(&[]).await;
    let proxy = Proxy::to(redis.port()).await;
    let a = Node::on(&redis, &[]).await;
    let behind = Node::start(&["--redis", &proxy.url()]).await;
    let mut stays = Client::plain(&behind, "stays", "room").await;
    let mut before = a.publish_numbers("room", 0..3).await;
    stays.expect_numbers(&before, 0).await;
    for round in 0..5u64 {
        let first = 3 + round * 10;
        proxy.hold_messages(true);
        let ids = a.publish_numbers("room", first..first + 5).await;
        // It has seen the third of them elsewhere; the node it comes to has heard of none.
        let (mut client, welcome) = Client::resume(&behind, "mover", "room", ids[2]).await;
        assert_eq!((&welcome["recovered"], &welcome["lastEventId"]), (&json!(true), &json!(ids[2])));
        assert_eq!(welcome["head"], ids[4]);
        client.expect_numbers(&ids[3..], first + 3).await;
        proxy.hold_messages(false);
        stays.expect_numbers(&ids, first).await;
        let more = a.publish_numbers("room", first + 5..first + 10).await;
        client.expect_numbers(&more, first + 5).await;
        stays.expect_numbers(&more, first + 5).await;
        before = more;
    }
    // Who claims to be ahead of everybody is not believed.
    let head = before[4];
    let (_, welcome) = Client::resume(&behind, "liar", "room", head + 1).await;
    assert_eq!((&welcome["recovered"], &welcome["lastEventId"]), (&json!(false), &json!(head)));
}

#[tokio::test]
async fn history_is_read_from_redis_when_memory_is_small() {
    let (_redis, a, b) = cluster(&["--feed-memory", "64KiB"]).await;
    let (mut first, welcome) = Client::resume(&a, "a", "room", "").await;
    let base = position(&welcome["head"]);
    let padding = "x".repeat(1000);
    let mut ids = Vec::new();
    for n in 0..700 {
        ids.push(a.publish("room", &json!({"n": n, "padding": padding})).await);
    }
    for node in [&a, &b] {
        for (last, from) in [(base, 0), (ids[300], 301), (ids[690], 691)] {
            let (mut client, welcome) = Client::resume(node, "b", "room", last).await;
            assert_eq!(welcome["recovered"], true, "{welcome}");
            for (n, id) in ids.iter().enumerate().skip(from) {
                client.expect_event(*id, &json!({"n": n, "padding": padding})).await;
            }
        }
    }
    for (n, id) in ids.iter().enumerate() {
        first.expect_event(*id, &json!({"n": n, "padding": padding})).await;
    }
}

#[tokio::test]
async fn past_the_end_of_history_nothing_is_recovered() {
    let (_redis, a, b) = cluster(&["--history", "1000", "--feed-memory", "64KiB"]).await;
    let (_stays, welcome) = Client::resume(&a, "a", "room", "").await;
    let base = position(&welcome["head"]);
    let publish = async |node: &Node| node.publish_numbers("room", 0..750).await;
    let (mut ids, more) = tokio::join!(publish(&a), publish(&b));
    ids.extend(more);
    ids.sort_unstable();
    for node in [&a, &b] {
        for last in [base, ids[0]] {
            let (_, welcome) = Client::resume(node, "b", "room", last).await;
            assert_eq!((&welcome["recovered"], &welcome["lastEventId"]), (&json!(false), &json!(ids[1499])));
        }
        let (mut client, welcome) = Client::resume(node, "b", "room", ids[499]).await;
        assert_eq!(welcome["recovered"], true, "a thousand are kept");
        let seen = read_contiguous(&mut client, 1000).await;
        assert_eq!((seen[0].0, seen[999].0), (ids[500], ids[1499]));
    }
}

#[tokio::test]
async fn a_lost_answer_doubles_nothing() {
    let redis = Redis::start(&[]).await;
    let proxy = Proxy::to(redis.port()).await;
    let a = Node::start(&["--redis", &proxy.url()]).await;
    let b = Node::on(&redis, &[]).await;
    let (mut sender, welcome) = Client::json(&a, "sender", "room").await;
    let (mut watcher, _) = Client::resume(&b, "watcher", "room", "").await;
    let mut head = position(&welcome["head"]);
    for round in 1..=5 {
        let text = format!("answer lost {round}");
        proxy.lose_answer_to(&text).await;
        let (answer, mut seen) = sender.send_for_ack(json!({ "text": text })).await;
        head += 1;
        assert_eq!(answer, Ok(head), "the retry gets the first one's answer");
        assert_eq!(proxy.lost(), round, "an answer was lost indeed");
        let event = json!({"sender": "sender", "text": text});
        watcher.expect_event(head, &event).await;
        if seen.is_empty() {
            seen.push(sender.next_json().await);
        }
        assert_eq!((seen.len(), &seen[0]["id"]), (1, &json!(head)));
    }
    let id = b.publish("room", &json!({"end": 1})).await;
    assert_eq!(id, head + 1);
    watcher.expect_event(id, &json!({"end": 1})).await;
    sender.expect_event(id, &json!({"end": 1})).await;
}

#[tokio::test]
async fn deployments_with_different_prefixes_do_not_meet() {
    let redis = Redis::start(&[]).await;
    let red = Node::on(&redis, &["--redis-prefix", "red", "--bare-channels", "none"]).await;
    let blue = Node::on(&redis, &["--redis-prefix", "blue", "--bare-channels", "none"]).await;
    let mut on_red = Client::plain(&red, "r", "room").await;
    let mut on_blue = Client::plain(&blue, "b", "room").await;
    let red_id = red.publish("room", &json!({"n": "red"})).await;
    let blue_id = blue.publish("room", &json!({"n": "blue"})).await;
    on_red.expect_event(red_id, &json!({"n": "red"})).await;
    on_blue.expect_event(blue_id, &json!({"n": "blue"})).await;
}

#[tokio::test]
async fn a_last_event_that_no_message_told_of_is_noticed_soon() {
    let redis = Redis::start(&[]).await;
    let proxy = Proxy::to(redis.port()).await;
    let a = Node::on(&redis, &[]).await;
    let b = Node::start(&["--redis", &proxy.url()]).await;
    let mut watcher = Client::plain(&b, "watcher", "room").await;
    let ids = a.publish_numbers("room", 0..2).await;
    watcher.expect_numbers(&ids, 0).await;
    // The message is lost together with its connection; nothing else ever comes in this channel.
    proxy.hold_messages(true);
    let id = a.publish("room", &json!({"n": 2})).await;
    proxy.cut();
    proxy.hold_messages(false);
    within("the last event", watcher.expect_event(id, &json!({"n": 2}))).await;
}
