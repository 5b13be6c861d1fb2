//! Many channels on one socket, with two nodes on one Redis.

use serde_json::{Value, json};

use crate::common::client::{JSON_MODE, position};
use crate::common::{Client, Node, cluster};

async fn without_channel(node: &Node, user: &str) -> Client {
    let mut client = Client::open(node, user, "channel=", Some(JSON_MODE)).await;
    client.next_control("welcome").await;
    client
}

async fn subscribe(client: &mut Client, channels: Value) {
    client.send(json!({"type": "subscribe", "channels": channels}).to_string()).await;
}

#[tokio::test]
async fn subscriptions_resume_on_another_node() {
    const ROOMS: [&str; 2] = ["room.1", "room.2"];
    let (_redis, node, other) = cluster(&["--shards", "2"]).await;
    let mut client = without_channel(&node, "alice").await;
    subscribe(&mut client, json!([{"channel": ROOMS[0]}, {"channel": ROOMS[1]}])).await;
    let mut last = [0; 2];
    for _ in ROOMS {
        let welcome = client.welcome().await;
        let room = ROOMS.iter().position(|room| welcome["channel"] == *room).expect("a room");
        last[room] = position(&welcome["head"]);
    }
    for n in 0..20 {
        let from = if n % 2 == 0 { &node } else { &other };
        let room = n % 3 % 2;
        let id = from.publish(ROOMS[room], &json!({ "n": n })).await;
        client.expect_event(id, &json!({"channel": ROOMS[room], "n": n})).await;
        last[room] = id;
    }
    client.leave().await;

    let mut missed = [const { Vec::new() }; 2];
    for n in 0..20 {
        missed[n % 2].push(node.publish(ROOMS[n % 2], &json!({ "n": n })).await);
    }
    let mut client = without_channel(&other, "alice").await;
    let resumes = json!([
        {"channel": ROOMS[0], "lastEventId": last[0]},
        {"channel": ROOMS[1], "lastEventId": last[1]},
    ]);
    subscribe(&mut client, resumes).await;
    let mut welcomes = 0;
    while welcomes < 2 || missed.iter().any(|ids| !ids.is_empty()) {
        let frame = client.next_json().await;
        let room = ROOMS.iter().position(|room| frame["channel"] == *room).expect("a room");
        if frame["type"] == "welcome" {
            welcomes += 1;
            assert_eq!((&frame["recovered"], &frame["lastEventId"]), (&json!(true), &json!(last[room])));
        } else {
            assert_eq!(position(&frame["id"]), missed[room].remove(0));
        }
    }
}

#[tokio::test]
async fn subscribes_fail_while_redis_is_away() {
    let (mut redis, node, _other) = cluster(&[]).await;
    let mut client = without_channel(&node, "alice").await;
    subscribe(&mut client, json!([{"channel": "room.1"}])).await;
    client.welcome().await;
    redis.kill();
    node.unready().await;
    client.send(r#"{"type":"subscribe","channel":"room.2","ref":1}"#).await;
    let error = client.next_control("error").await;
    assert_eq!((&error["code"], &error["channel"]), (&json!("unavailable"), &json!("room.2")));
    assert_eq!(error["ref"], 1);
    client.send(r#"{"text":"hi","channel":"room.1","ref":2}"#).await;
    let error = client.next_control("error").await;
    assert_eq!((&error["code"], &error["channel"]), (&json!("unavailable"), &json!("room.1")));
    assert_eq!(error["ref"], 2);
}
