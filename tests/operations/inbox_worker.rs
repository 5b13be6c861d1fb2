//! The worker in examples/inbox, run as its README says, with faults.

use std::process::Command;

use serde_json::{Value, json};

use super::examples::example;
use crate::common::process::{Process, installed};
use crate::common::{Client, Node, Redis, until};

const STREAM: &str = "fanfare:{chat}:inbox";

/// Starts a worker that takes messages over after 300 ms, and waits until it reads.
async fn start_worker(redis: &Redis) -> Process {
    let mut command = Command::new(installed("python/bin/python"));
    command.args(["-u", "worker.py", "chat", "--take-over", "0.3"]).current_dir(example("inbox"));
    command.env("REDIS_URL", redis.url()).env("PYTHONDONTWRITEBYTECODE", "1");
    let process = Process::start("worker", &mut command);
    line(&process, "started").await;
    process
}

async fn line(process: &Process, part: &str) {
    let found = process.line(part, |line| line.contains(part).then_some(())).await;
    found.unwrap_or_else(|ended| panic!("{ended}"));
}

async fn inbox_length(redis: &Redis) -> i64 {
    redis.client().await.call(&["XLEN", STREAM]).await.int()
}

async fn until_empty(redis: &Redis) {
    until("an empty inbox", || async { (inbox_length(redis).await == 0).then_some(()) }).await;
}

/// Sends a message and waits for its ack, which may come after events.
async fn send(client: &mut Client, message: Value) {
    let mut message = message;
    message["ref"] = json!("r");
    client.send(message.to_string()).await;
    loop {
        let frame = client.next_json().await;
        if frame["ref"] == "r" {
            assert_eq!(frame["type"], "ack", "{frame}");
            return;
        }
    }
}

#[tokio::test]
async fn worker_moderates_and_publishes() {
    let redis = Redis::start(&[]).await;
    let node = Node::on(&redis, &["--inbox", "chat"]).await;
    let (mut alice, _) = Client::json(&node, "alice", "chat").await;
    let (mut bob, _) = Client::json(&node, "bob", "chat").await;
    send(&mut alice, json!({ "text": "this is spam" })).await;
    send(&mut alice, json!({ "text": "hello" })).await;
    send(&mut alice, json!({ "text": "psst", "to": "bob" })).await;
    let worker = start_worker(&redis).await;
    // Bob does not see what was rejected.
    assert_eq!(bob.next_event().await.1, json!({ "sender": "alice", "text": "hello" }));
    assert_eq!(bob.next_event().await.1, json!({ "sender": "alice", "text": "psst", "to": "bob" }));
    let rejected = alice.next_event().await.1;
    assert_eq!((&rejected["to"], &rejected["rejected"]), (&json!("alice"), &json!("this is spam")));
    until_empty(&redis).await;
    worker.signal("TERM");
    assert!(worker.ended().await.success());
}

#[tokio::test]
async fn two_workers_survive_kills_of_one_and_of_redis() {
    let mut redis = Redis::start(&["--appendonly", "yes", "--appendfsync", "always"]).await;
    let node = Node::on(&redis, &["--inbox", "chat", "--redis-durable", "--max-message-rate", "0"]).await;
    let (mut alice, _) = Client::json(&node, "alice", "chat").await;
    let (mut bob, _) = Client::json(&node, "bob", "chat").await;
    let first = start_worker(&redis).await;
    for n in 0..100 {
        send(&mut alice, json!({ "text": format!("m{n}") })).await;
    }
    line(&first, "handled").await;
    first.kill(); // in the middle
    let second = start_worker(&redis).await;
    let third = start_worker(&redis).await;
    for n in 100..200 {
        send(&mut alice, json!({ "text": format!("m{n}") })).await;
    }
    redis.kill();
    node.unready().await;
    redis.up().await;
    node.ready().await;
    send(&mut alice, json!({ "text": "m200" })).await;
    // Each message once: the id of the message is the idempotency key.
    let mut seen = std::collections::BTreeSet::new();
    while seen.len() < 201 {
        let (_, event) = bob.next_event().await;
        let text = event["text"].as_str().expect("a text").to_owned();
        assert!(seen.insert(text), "twice: {event}");
    }
    until_empty(&redis).await;
    drop((second, third));
}

#[tokio::test]
async fn message_that_fails_five_times_is_a_dead_letter() {
    let redis = Redis::start(&[]).await;
    let node = Node::on(&redis, &["--inbox", "chat", "--inbox-max", "2"]).await;
    let (mut alice, _) = Client::json(&node, "alice", "chat").await;
    send(&mut alice, json!({ "data": 7 })).await; // no text
    send(&mut alice, json!({ "text": "hello" })).await;
    alice.send(json!({ "text": "too many", "ref": 1 }).to_string()).await;
    assert_eq!(alice.next_control("error").await["code"], "full");
    let _worker = start_worker(&redis).await;
    assert_eq!(alice.next_event().await.1["text"], "hello");
    until_empty(&redis).await;
    let dead = redis.client().await.call(&["XRANGE", "fanfare:{chat}:inbox:dead", "-", "+"]).await;
    let fields: Vec<_> =
        dead.list()[0].list()[1].list().iter().map(|field| field.text().to_owned()).collect();
    assert_eq!(dead.list().len(), 1);
    assert!(fields.contains(&r#"{"sender":"alice","data":7}"#.to_owned()), "{fields:?}");
    send(&mut alice, json!({ "text": "there is room again" })).await;
}
