//! Inboxes as clients and workers see them.

use std::collections::HashMap;

use serde_json::{Value, json};

use crate::common::{self, Client, Node, Redis, Resp, until};

/// The messages in the inbox of a channel: id and fields.
async fn messages(redis: &mut Resp, channel: &str) -> Vec<(String, HashMap<String, String>)> {
    let stream = format!("fanfare:{{{channel}}}:inbox");
    let reply = redis.call(&["XRANGE", &stream, "-", "+"]).await;
    let entry = |entry: &common::Value| {
        let fields: Vec<_> = entry.list()[1].list().iter().map(|field| field.text().to_owned()).collect();
        let fields = fields.chunks(2).map(|pair| (pair[0].clone(), pair[1].clone())).collect();
        (entry.list()[0].text().to_owned(), fields)
    };
    reply.list().iter().map(entry).collect()
}

/// Sends a frame and returns its answer. Fails if anything else comes before it.
async fn answer(client: &mut Client, frame: Value) -> Value {
    client.send(frame.to_string()).await;
    client.next_json().await
}

#[tokio::test]
async fn backends_get_messages_and_publish_the_result() {
    let redis = Redis::start(&[]).await;
    let node = Node::on(&redis, &["--inbox", "desk.*", "--inbox-max", "3"]).await;
    let (mut alice, _) = Client::json(&node, "alice", "desk.1").await;
    let ack = answer(&mut alice, json!({"text": "hi", "to": "bob", "key": "k1", "ref": 1})).await;
    let id = ack["id"].as_str().expect("the id of a stream").to_owned();
    assert_eq!(ack, json!({"type": "ack", "ref": 1, "id": id}));
    // A retry, another message, and one from a client in plain mode.
    assert_eq!(answer(&mut alice, json!({"text": "hi", "key": "k1", "ref": 2})).await["id"], *id);
    assert_ne!(answer(&mut alice, json!({"data": [1], "ref": 3})).await["id"], *id);
    let mut plain = Client::plain(&node, "carol", "desk.1").await;
    plain.send("plain").await;
    let mut program = redis.client().await;
    let stored = until("three messages", || async {
        let stored = messages(&mut redis.client().await, "desk.1").await;
        (stored.len() == 3).then_some(stored)
    })
    .await;
    let fields = |at: usize| {
        let field = |name: &str| stored[at].1.get(name).map(String::as_str);
        (field("user"), field("channel"), field("event"), field("to"), field("key"))
    };
    let desk = Some("desk.1");
    let alices = r#"{"sender":"alice","text":"hi"}"#;
    assert_eq!(stored[0].0, id);
    assert_eq!(fields(0), (Some("alice"), desk, Some(alices), Some("bob"), Some("k1")));
    assert_eq!(fields(1), (Some("alice"), desk, Some(r#"{"sender":"alice","data":[1]}"#), None, None));
    assert_eq!(fields(2), (Some("carol"), desk, Some(r#"{"sender":"carol","text":"plain"}"#), None, None));
    // Full: with recovery frames an error, without them close 1013.
    let full = answer(&mut alice, json!({"text": "x", "ref": 4})).await;
    assert_eq!((&full["code"], &full["ref"]), (&json!("full"), &json!(4)));
    plain.send("too much").await;
    assert_eq!(plain.expect_close().await.0, 1013);
    // What a backend publishes is broadcast, as the event is stored.
    let published = program.fcall("desk.1", alices.as_bytes(), None).await.int() as u64;
    alice.expect_event(published, &json!({"sender": "alice", "text": "hi"})).await;
    let posted = node.publish("desk.1", &json!({"n": 1})).await;
    alice.expect_event(posted, &json!({"n": 1})).await;
}

#[tokio::test]
async fn keys_are_for_inboxes_only() {
    let redis = Redis::start(&[]).await;
    let node = Node::on(&redis, &["--inbox", "desk"]).await;
    let (mut alice, welcome) = Client::json(&node, "alice", "room").await;
    let error = answer(&mut alice, json!({"text": "hi", "key": "k1", "ref": 1})).await;
    assert_eq!((&error["code"], &error["ref"]), (&json!("invalid"), &json!(1)));
    assert_eq!(redis.head("room").await, welcome["head"].as_u64().expect("a number"));
    // Without a subscription, as any publish.
    let ack = answer(&mut alice, json!({"text": "hi", "key": "k1", "channel": "desk", "ref": 2})).await;
    assert_eq!(messages(&mut redis.client().await, "desk").await[0].0, *ack["id"].as_str().expect("an id"));
}
