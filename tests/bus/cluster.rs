//! Two nodes on one Redis: one order for all clients, for all ways to publish.

use std::collections::BTreeSet;
use std::sync::Arc;

use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::common::client::position;
use crate::common::{Client, Node, Proxy, Redis, Silence, cluster, http, until, within};

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
async fn chat_spans_both_nodes() {
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
async fn both_nodes_have_one_order_without_gaps() {
    const EACH: u64 = 100;
    let (redis, a, b) = cluster(&[]).await;
    let mut subscribers = Vec::new();
    for node in [&a, &b, &a, &b] {
        subscribers.push(Client::plain(node, "subscriber", "room").await);
    }
    let chat = async |node: &Node, user: &str| {
        let mut client = Client::plain(node, user, "room").await;
        for n in 0..EACH {
            client.send(n.to_string()).await;
        }
        client // stays open until all is read
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
        for subscriber in &mut subscribers {
            seen.push(read_contiguous(subscriber, 6 * EACH as usize).await);
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
async fn private_event_reaches_its_user_on_both_nodes() {
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
async fn client_resumes_on_the_other_node() {
    let (_redis, a, b) = cluster(&[]).await;
    let (mut client, welcome) = Client::resume(&a, "bob", "room", "").await;
    let base = position(&welcome["head"]);
    let ids = a.publish_numbers("room", 0..5).await;
    client.expect_numbers(&ids, 0).await;
    client.leave().await;
    a.publish_to("room", "bob", &json!({"n": 5})).await;
    b.publish_to("room", "carol", &json!({"n": 6})).await;
    b.publish("room", &json!({"n": 7})).await;
    // B has not followed the channel yet, so everything comes from Redis.
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
async fn resumes_on_a_node_that_is_behind() {
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
        // The client has seen the third event on the other node. This node has received none of
        // them.
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
    // A position ahead of everything is not accepted.
    let head = before[4];
    let (_, welcome) = Client::resume(&behind, "liar", "room", head + 1).await;
    assert_eq!((&welcome["recovered"], &welcome["lastEventId"]), (&json!(false), &json!(head)));
}

#[tokio::test]
async fn joins_during_a_refresh_wait_for_the_next_one() {
    let redis = Redis::start(&[]).await;
    let proxy = Proxy::to(redis.port()).await;
    let a = Node::on(&redis, &[]).await;
    let behind = Node::start(&["--redis", &proxy.url(), "--shards", "1"]).await;
    let _stays = Client::plain(&behind, "stays", "room").await;
    proxy.hold_messages(true);
    let ids = a.publish_numbers("room", 0..3).await;
    // The node reads history for the first one. The read is done, and its answer is still in
    // transit.
    let reads = async || redis.info("cmdstat_xrange").await;
    let before = reads().await;
    proxy.silence(Silence { up: false, down: true });
    let resume = async |user: &str, id: u64| Client::resume(&behind, user, "room", id).await;
    let first = resume("first", ids[2]);
    let second = async {
        until("the look", async || (reads().await != before).then_some(())).await;
        // Meanwhile another client has seen more on the other node.
        let more = a.publish("room", &json!({"n": 3})).await;
        let release = async {
            let there = async || (behind.metric("fanfare_connections").await >= 3.0).then_some(());
            until("the second client's request", there).await;
            behind.get("/healthz").await; // by the same thread, and so after it
            proxy.silence(Silence::default());
        };
        let ((client, welcome), ()) = tokio::join!(resume("second", more), release);
        (client, welcome, more)
    };
    let ((_first, welcome), (mut client, second, more)) = tokio::join!(first, second);
    assert_eq!((&welcome["recovered"], &welcome["lastEventId"]), (&json!(true), &json!(ids[2])));
    assert_eq!((&second["recovered"], &second["lastEventId"]), (&json!(true), &json!(more)), "{second}");
    proxy.hold_messages(false);
    let id = a.publish("room", &json!({"n": 4})).await;
    client.expect_event(id, &json!({"n": 4})).await;
}

#[tokio::test]
async fn history_beyond_memory_is_read_from_redis() {
    let (_redis, a, b) = cluster(&["--buffer-memory", "64KiB"]).await;
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
async fn evicted_history_is_not_recovered() {
    let (_redis, a, b) = cluster(&["--history", "1000", "--buffer-memory", "64KiB"]).await;
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
async fn lost_answer_doubles_nothing() {
    let redis = Redis::start(&[]).await;
    let proxy = Proxy::to(redis.port()).await;
    let a = Node::start(&["--redis", &proxy.url()]).await;
    let b = Node::on(&redis, &[]).await;
    let (mut sender, welcome) = Client::json(&a, "sender", "room").await;
    let (mut subscriber, _) = Client::resume(&b, "subscriber", "room", "").await;
    let mut head = position(&welcome["head"]);
    for round in 1..=5 {
        let text = format!("answer lost {round}");
        proxy.lose_answer_to(&text).await;
        let (answer, mut seen) = sender.send_for_ack(json!({ "text": text })).await;
        head += 1;
        assert_eq!(answer, Ok(head), "the retry gets the first one's answer");
        assert_eq!(proxy.lost(), round, "an answer was lost indeed");
        let event = json!({"sender": "sender", "text": text});
        subscriber.expect_event(head, &event).await;
        if seen.is_empty() {
            seen.push(sender.next_json().await);
        }
        assert_eq!((seen.len(), &seen[0]["id"]), (1, &json!(head)));
    }
    let id = b.publish("room", &json!({"end": 1})).await;
    assert_eq!(id, head + 1);
    subscriber.expect_event(id, &json!({"end": 1})).await;
    sender.expect_event(id, &json!({"end": 1})).await;
}

#[tokio::test]
async fn prefixes_separate_deployments() {
    let redis = Redis::start(&[]).await;
    let red = Node::on(&redis, &["--redis-prefix", "red", "--pubsub-channels", "none"]).await;
    let blue = Node::on(&redis, &["--redis-prefix", "blue", "--pubsub-channels", "none"]).await;
    let mut on_red = Client::plain(&red, "r", "room").await;
    let mut on_blue = Client::plain(&blue, "b", "room").await;
    let red_id = red.publish("room", &json!({"n": "red"})).await;
    let blue_id = blue.publish("room", &json!({"n": "blue"})).await;
    on_red.expect_event(red_id, &json!({"n": "red"})).await;
    on_blue.expect_event(blue_id, &json!({"n": "blue"})).await;
}

#[tokio::test]
async fn lost_last_event_is_noticed() {
    let redis = Redis::start(&[]).await;
    let proxy = Proxy::to(redis.port()).await;
    let a = Node::on(&redis, &[]).await;
    let b = Node::start(&["--redis", &proxy.url()]).await;
    let mut subscriber = Client::plain(&b, "subscriber", "room").await;
    let ids = a.publish_numbers("room", 0..2).await;
    subscriber.expect_numbers(&ids, 0).await;
    // The message is lost together with its connection, and no other message follows in this
    // channel.
    proxy.hold_messages(true);
    let id = a.publish("room", &json!({"n": 2})).await;
    proxy.cut();
    proxy.hold_messages(false);
    within("the last event", subscriber.expect_event(id, &json!({"n": 2}))).await;
}

#[tokio::test]
async fn resumes_from_memory_without_reading_redis() {
    let (_redis, a, _b) = cluster(&["--shards", "1"]).await;
    let (mut stays, welcome) = Client::resume(&a, "stays", "room", "").await;
    let base = position(&welcome["head"]);
    let ids = a.publish_numbers("room", 0..500).await;
    stays.expect_numbers(&ids, 0).await;
    let before = a.metric("fanfare_bus_reads_total").await;
    for (last, from) in [(base, 0), (ids[250], 251)] {
        let (mut client, _) = Client::resume(&a, "back", "room", last).await;
        client.expect_numbers(&ids[from..], from as u64).await;
    }
    assert_eq!(a.metric("fanfare_bus_reads_total").await, before);
}

#[tokio::test]
async fn simultaneous_resumes_share_history_reads() {
    const CLIENTS: usize = 200;
    let (_redis, a, b) = cluster(&["--shards", "1"]).await;
    let (_, welcome) = Client::resume(&a, "first", "room", "").await;
    let base = position(&welcome["head"]);
    let ids = a.publish_numbers("room", 0..1000).await;
    // B has not followed the channel yet, so it has nothing in memory.
    let (b, ids) = (Arc::new(b), Arc::new(ids));
    let back = (0..CLIENTS).map(|n| {
        let (b, ids) = (b.clone(), ids.clone());
        tokio::spawn(async move {
            let from = n % 500; // each client resumes from another position
            let last = if from == 0 { base } else { ids[from - 1] };
            let (mut client, welcome) = Client::resume(&b, &format!("user{n}"), "room", last).await;
            assert_eq!(welcome["recovered"], true);
            client.expect_numbers(&ids[from..], from as u64).await;
        })
    });
    for client in back.collect::<Vec<_>>() {
        client.await.expect("a client that misses nothing");
    }
    // A thousand events are on at most five pages of 256. A page that arrives in parts may count
    // twice.
    let reads = b.metric("fanfare_bus_reads_total").await;
    assert!((4.0..=10.0).contains(&reads), "{reads} reads for {CLIENTS} clients");
}

/// `POST /publish` with an idempotency key.
async fn post_with_key(node: &Node, event: &str, key: &str) -> u64 {
    let path = "/publish?channel=room";
    let response =
        http::request(node.admin, "POST", path, &[("Idempotency-Key", key)], event.as_bytes()).await;
    assert_eq!(response.status, 200, "{response:?}");
    response.json()["id"].as_u64().expect("an id")
}

#[tokio::test]
async fn idempotency_key_holds_for_all_ways_to_publish() {
    let redis = Redis::start(&[]).await;
    let (a, b) = (Node::on(&redis, &[]).await, Node::on(&redis, &[]).await);
    let mut client = Client::plain(&a, "alice", "room").await;
    let mut backend = redis.client().await;
    let id = post_with_key(&a, r#"{"n":1}"#, "order-1").await;
    // Retries with a quoted key, on another node, and on Redis itself.
    assert_eq!(post_with_key(&a, r#"{"n":1}"#, "\"order-1\"").await, id);
    assert_eq!(post_with_key(&b, r#"{"n":1}"#, "order-1").await, id);
    let fcall = ["FCALL", "fanfare_publish", "1", "fanfare:{room}", r#"{"n":1}"#, "", "order-1"];
    assert_eq!(backend.call(&fcall).await.int() as u64, id);
    let fcall = ["FCALL", "fanfare_publish", "1", "fanfare:{room}", r#"{"n":2}"#, "alice", "order-2"];
    let second = backend.call(&fcall).await.int() as u64;
    assert_eq!(post_with_key(&b, r#"{"n":2}"#, "order-2").await, second);
    // Another channel has its own keys.
    let fcall = ["FCALL", "fanfare_publish", "1", "fanfare:{other}", "{}", "", "order-1"];
    assert_ne!(backend.call(&fcall).await.int() as u64, id);
    // Many at once, with and without a key: one event per key, and all others.
    let mut posts = JoinSet::new();
    for n in 0..40 {
        let (node, key) = ([a.admin, b.admin][n % 2], format!("burst-{}", n / 4));
        posts.spawn(async move {
            let headers = [("Idempotency-Key", key.as_str())];
            let headers = if n % 4 == 3 { &[][..] } else { &headers };
            let path = "/publish?channel=room";
            let response = http::request(node, "POST", path, headers, br#"{"n":3}"#).await;
            (n, response.json()["id"].as_u64().expect("an id"))
        });
    }
    let ids: Vec<(usize, u64)> = posts.join_all().await;
    let keyed: BTreeSet<_> = ids.iter().filter(|(n, _)| n % 4 != 3).map(|(n, id)| (n / 4, *id)).collect();
    let all: BTreeSet<_> = ids.iter().map(|(_, id)| *id).collect();
    assert_eq!((keyed.len(), all.len()), (10, 20), "{ids:?}");
    client.expect_event(id, &json!({"n": 1})).await;
    client.expect_event(second, &json!({"n": 2, "to": "alice"})).await;
    for id in all {
        client.expect_event(id, &json!({"n": 3})).await;
    }
    let ttl = backend.call(&["PTTL", "fanfare:{room}:key:order-1"]).await.int();
    assert!((500_000..=600_000).contains(&ttl), "{ttl} ms");
}

#[tokio::test]
async fn retry_of_an_unknown_publish_doubles_nothing() {
    let redis = Redis::start(&[]).await;
    let proxy = Proxy::to(redis.port()).await;
    let a = Node::start(&["--redis", &proxy.url(), "--publish-timeout", "1s"]).await;
    let b = Node::on(&redis, &[]).await;
    let before = a.publish("room", &json!({"n": 0})).await;
    let mut client = Client::plain(&b, "alice", "room").await;
    proxy.silence(Silence { up: false, down: true });
    let key = [("Idempotency-Key", "order-1")];
    let path = "/publish?channel=room";
    let response = http::request(a.admin, "POST", path, &key, br#"{"n":1}"#).await;
    response.expect_rejection(504);
    let id = post_with_key(&b, r#"{"n":1}"#, "order-1").await;
    assert_eq!(id, before + 1);
    let last = b.publish("room", &json!({"n": 2})).await;
    client.expect_event(id, &json!({"n": 1})).await;
    client.expect_event(last, &json!({"n": 2})).await;
    proxy.silence(Silence::default());
}

#[tokio::test]
async fn local_bus_keeps_keys_and_rejects_bad_ones() {
    let node = Node::start(&[]).await;
    let mut client = Client::plain(&node, "alice", "room").await;
    let id = post_with_key(&node, r#"{"n":1}"#, "order-1").await;
    assert_eq!(post_with_key(&node, r#"{"n":1}"#, "\"order-1\"").await, id);
    let next = post_with_key(&node, r#"{"n":2}"#, "order-2").await;
    client.expect_event(id, &json!({"n": 1})).await;
    client.expect_event(next, &json!({"n": 2})).await;
    let long = "k".repeat(129);
    for key in ["", "\"\"", "a b", "a\"b", "gr\u{fc}n", &long] {
        let headers = [("Idempotency-Key", key)];
        let response = http::request(node.admin, "POST", "/publish", &headers, b"{}").await;
        response.expect_rejection(400);
        assert!(response.body.contains("Idempotency-Key"), "{response:?}");
    }
    let twice = [("Idempotency-Key", "a"), ("Idempotency-Key", "b")];
    http::request(node.admin, "POST", "/publish", &twice, b"{}").await.expect_rejection(400);
}
