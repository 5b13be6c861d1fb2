//! Limits that involve Redis.

use std::time::Duration;

use futures_util::future::join_all;
use serde_json::json;
use tokio::net::TcpStream;

use crate::common::client::position;
use crate::common::{Client, Frame, Node, Options, Raw, Redis, cluster, until};

#[tokio::test]
async fn max_channels_is_enforced() {
    let redis = Redis::start(&[]).await;
    let local = Node::start(&["--max-channels", "2"]).await;
    let on_redis = Node::on(&redis, &["--max-channels", "2"]).await;
    for node in [&local, &on_redis] {
        let mut one = Client::plain(node, "a", "one").await;
        let two = Client::plain(node, "a", "two").await;
        let mut raw = Raw::connect(node.public).await;
        let response = raw.upgrade("/ws/a?channel=three", &[]).await;
        response.expect_rejection(503);
        assert!(response.header("retry-after").is_some(), "{response:?}");
        let id = node.publish("one", &json!({"n": 1})).await;
        one.expect_event(id, &json!({"n": 1})).await;
        // Publishing needs no subscriber.
        node.publish("three", &json!({"n": 1})).await;
        // A channel without clients is unfollowed after a while.
        two.leave().await;
        until("room for a third", || async {
            let mut raw = Raw::connect(node.public).await;
            (raw.upgrade("/ws/a?channel=three", &[]).await.status == 101).then_some(())
        })
        .await;
    }
}

/// Joins a channel and leaves it at once.
async fn visit(node: &Node, channel: &str) {
    Client::plain(node, "a", channel).await.leave().await;
}

#[tokio::test]
async fn empty_channels_are_evicted_for_new_ones() {
    let redis = Redis::start(&[]).await;
    let local = Node::start(&["--max-channels", "16"]).await;
    let on_redis = Node::on(&redis, &["--max-channels", "16", "--shards", "1"]).await;
    for node in [&local, &on_redis] {
        let mut stays = Client::plain(node, "b", "stays").await;
        for n in 0..50 {
            visit(node, &format!("room{n}")).await;
        }
        let id = node.publish("stays", &json!({"n": 1})).await;
        stays.expect_event(id, &json!({"n": 1})).await;
    }
    // The channels left last are still followed. The oldest ones are not.
    let mut program = redis.client().await;
    let mut followed = async |channel: &str| {
        let named = program.call(&["PUBSUB", "NUMSUB", &format!("fanfare:{{{channel}}}")]).await;
        named.list()[1].int()
    };
    visit(&on_redis, "last").await;
    assert_eq!([followed("last").await, followed("stays").await, followed("room20").await], [1, 1, 0]);
}

#[tokio::test]
async fn survives_running_out_of_descriptors() {
    let redis = Redis::start(&[]).await;
    let node = Node::on(&redis, &["--shards", "1"]).await;
    let mut first = Client::plain(&node, "first", "room").await;
    node.limit_files(60); // after it has divided a higher limit: as when the whole host is short of files
    let mut held = Vec::new();
    for _ in 0..150 {
        held.push(TcpStream::connect(node.public).await.expect("the kernel completes it"));
    }
    // A client without a descriptor is answered at once.
    let mut late = Raw::connect(node.public).await;
    let response = late.response().await;
    response.expect_rejection(503);
    assert!(response.header("retry-after").is_some(), "{response:?}");
    late.expect_end().await;
    // Existing connections are served, and Redis is used.
    for n in 0..10 {
        first.send(n.to_string()).await;
        assert_eq!(first.next_event().await.1, json!({"sender": "first", "text": n.to_string()}));
    }
    drop(held);
    // The node answers 503 until it has noticed the closed connections.
    let options = Options { query: "channel=room".into(), ..Options::default() };
    let join = || async { Client::try_open(node.public, "second", &options).await.ok() };
    let mut second = until("room for a second", join).await;
    first.send("room again").await;
    assert_eq!(second.next_event().await.1["text"], "room again");
    assert!(node.metric("fanfare_accept_failures_total").await > 50.0);
    let log = node.log();
    assert_eq!(log.matches("accept failed").count(), 1, "one line, however many came: {log}");
    assert!(log.contains("LimitNOFILE") && log.contains("listener=\"public\""), "{log}");
}

#[tokio::test]
async fn descriptors_are_reserved_per_shard() {
    const FILES: f64 = 600.0;
    let redis = Redis::start(&[]).await;
    for shards in ["1", "9", "65"] {
        let flags = ["--shards", shards, "--listen", "127.0.0.1:0,127.0.0.1:0", "--redis", &redis.url()];
        let node = Node::start_with_files(FILES as u32, &flags).await;
        let _client = Client::plain(&node, "a", "room").await;
        let connections = node.metric("fanfare_max_connections").await;
        // Clients waiting for their 503 have an eighth more, and admin clients an eighth of all.
        let all = node.descriptors() as f64 + connections * 9.0 / 8.0 + FILES / 8.0;
        assert!(all <= FILES, "{all} with {shards} shards");
        assert!(all >= FILES * 0.9, "{all} with {shards} shards: too many are reserved");
    }
}

#[tokio::test]
async fn clients_never_take_the_descriptors_of_redis() {
    let mut redis = Redis::start(&[]).await;
    let flags = ["--redis", &redis.url(), "--shards", "4", "--max-connections", "1000"];
    let node = Node::start_with_files(300, &flags).await;
    let most = node.metric("fanfare_max_connections").await as usize;
    assert!((100..300).contains(&most), "{most}");
    let warning = "--max-connections 1000 is more than the limit on open files allows";
    assert!(node.log().contains(warning), "{}", node.log());
    until("the end of the readiness probes", || async {
        (node.metric("fanfare_connections").await == 0.0).then_some(())
    })
    .await;
    let mut clients = Vec::new();
    for number in 0..most {
        clients.push(Client::resume(&node, &format!("user{number}"), "room", "").await.0);
    }
    // More than may wait for their 503, and more than the admin listener serves. None sends a byte.
    let silent = join_all((0..200).map(|_| TcpStream::connect(node.public))).await;
    let admin = join_all((0..100).map(|_| TcpStream::connect(node.admin))).await;
    redis.kill();
    redis.up().await;
    let mut publisher = redis.client().await;
    let event = br#"{"n":1}"#;
    redis.subscribed("fanfare:{room}", 1).await;
    let id = publisher.fcall("room", event, None).await.int() as u64;
    for client in &mut clients {
        client.next_control("reset").await;
        client.expect_event(id, &json!({"n": 1})).await;
    }
    assert!(!node.log().contains("accept failed"), "{}", node.log());
    drop((silent, admin));
}

#[tokio::test]
async fn large_events_are_delivered_and_replayed() {
    let (redis, a, b) = cluster(&["--max-message-size", "2MiB", "--buffer-memory", "4MiB"]).await;
    let (mut live, welcome) = Client::resume(&a, "live", "room", "").await;
    let base = position(&welcome["head"]);
    let large = |n: u64| json!({"n": n, "text": format!("{n}").repeat(1_500_000 / n.to_string().len())});
    let mut ids = Vec::new();
    for n in 10..30 {
        let node = if n % 2 == 0 { &a } else { &b };
        ids.push(node.publish("room", &large(n)).await);
    }
    for (n, id) in (10..).zip(&ids) {
        live.expect_event(*id, &large(n)).await;
    }
    let (mut back, _) = Client::resume(&b, "back", "room", base).await;
    for (n, id) in (10..).zip(&ids) {
        back.expect_event(*id, &large(n)).await;
    }
    let too_large = json!({"text": "x".repeat(2 << 20)}).to_string();
    a.admin("POST", "/publish?channel=room", too_large.as_bytes()).await.expect_rejection(413);
    assert!(!redis.client().await.fcall("room", too_large.as_bytes(), None).await.error().is_empty());
}

#[tokio::test]
async fn history_expires_after_the_last_event() {
    let (redis, a, b) = cluster(&["--history-ttl", "1s", "--buffer-memory", "64KiB"]).await;
    let (mut stays, _) = Client::resume(&a, "stays", "room", "").await;
    let ids = a.publish_numbers("room", 0..3).await;
    stays.expect_numbers(&ids, 0).await;
    until("the end of history", || async {
        let exists = redis.client().await.call(&["EXISTS", "fanfare:{room}:events"]).await;
        (exists.int() == 0).then_some(())
    })
    .await;
    let (_, welcome) = Client::resume(&b, "late", "room", ids[0]).await;
    assert_eq!((&welcome["recovered"], &welcome["lastEventId"]), (&json!(false), &json!(ids[2])));
    let (mut current, welcome) = Client::resume(&b, "current", "room", ids[2]).await;
    assert_eq!(welcome["recovered"], true, "it has all there was");
    // Nodes keep the sequence of a followed channel, however long it has no events.
    tokio::time::sleep(Duration::from_secs(4)).await; // twice what it would last without the node
    let id = b.publish("room", &json!({"n": 3})).await;
    assert_eq!(id, ids[2] + 1);
    stays.expect_event(id, &json!({"n": 3})).await;
    current.expect_event(id, &json!({"n": 3})).await;
}

#[tokio::test]
async fn expired_channel_restarts_above_its_old_ids() {
    let (redis, a, b) = cluster(&["--history-ttl", "1s"]).await;
    let ids = a.publish_numbers("room", 0..3).await;
    until("the end of the channel", || async {
        let exists = redis.client().await.call(&["EXISTS", "fanfare:{room}:meta"]).await;
        (exists.int() == 0).then_some(())
    })
    .await;
    let (_, welcome) = Client::resume(&b, "late", "room", ids[2]).await;
    assert_eq!(welcome["recovered"], false);
    assert!(position(&welcome["head"]) > ids[2]);
    assert!(a.publish("room", &json!({"n": 3})).await > ids[2]);
}

#[tokio::test]
async fn waiting_for_the_bus_is_no_ping_timeout() {
    let redis = Redis::start(&[]).await;
    let flags = ["--ping-interval", "1s", "--ping-timeout", "1s", "--publish-timeout", "6s"];
    let node = Node::on(&redis, &flags).await;
    let (mut client, _) = Client::json(&node, "a", "room").await;
    redis.freeze();
    // More than a connection may have unanswered: the node pauses reading, so that pongs are not
    // read either.
    for n in 0..400 {
        client.send(json!({"text": "hi", "ref": n}).to_string()).await;
    }
    let mut rejected = 0;
    while rejected < 256 {
        match client.next_frame().await {
            Frame::Ping(_) => {}
            Frame::Text(text) => {
                assert!(text.contains(r#""type":"error""#), "{text}");
                rejected += 1;
            }
            other => panic!("{other:?} after {rejected} answers"),
        }
    }
    redis.thaw();
}
