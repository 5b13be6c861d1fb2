//! Recovery: Redis dies, hangs, comes back empty or is replaced, and connections are cut.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Error;

use crate::checker::{Attempt, Outcome, Seen};
use crate::common::client::{JSON_MODE, position};
use crate::common::{Client, Frame, Node, Nodes, Options, Proxy, Redis, until, within};
use crate::workload::run::{Run, Workload};

/// Two nodes, each with its Redis URL.
async fn two_nodes(a: &str, b: &str, flags: &[&str]) -> Nodes {
    let start = |url| async move { Node::start(&[&["--redis", url], flags].concat()).await };
    let (a, b) = tokio::join!(start(a), start(b));
    Nodes::new([a, b])
}

/// Clients and backends that publish, and subscribers that stay.
async fn stream(nodes: &Nodes, redis: &Redis) -> Run {
    Run::at(nodes, 2, redis, Workload { users: 2, roamers: 0, programs: 0, ..Workload::default() }).await
}

/// Waits until this node has delivered this many more events, so that faults happen under load.
async fn flowing(node: &Node, more: u64) {
    let options = Options { query: "channel=room&lastEventId=".into(), ..Options::default() };
    let join = || async { Client::try_open(node.public, "flow", &options).await.ok() };
    let mut client = until("a join", join).await;
    let mut events = 0;
    while events < more {
        events += u64::from(client.next_json().await.get("id").is_some());
    }
}

/// Kills and restarts Redis twice under load.
async fn restarted_twice(redis: &mut Redis, nodes: &Nodes) {
    let (a, b) = (nodes.get(0), nodes.get(1));
    for _ in 0..2 {
        flowing(&b, 30).await;
        redis.kill();
        a.unready().await;
        b.unready().await;
        redis.up().await;
        a.ready().await;
        b.ready().await;
    }
    flowing(&a, 30).await;
}

/// The status and Retry-After of a rejected join, or `None` if it succeeds.
async fn rejected(node: &Node, query: &str) -> Option<(u16, Option<String>)> {
    let options = Options { query: query.into(), ..Options::default() };
    match Client::try_open(node.public, "joiner", &options).await {
        Ok(_) => None,
        Err(Error::Http(response)) => {
            let retry = response.headers().get("Retry-After").and_then(|value| value.to_str().ok());
            Some((response.status().as_u16(), retry.map(String::from)))
        }
        Err(error) => panic!("no HTTP answer: {error}"),
    }
}

#[tokio::test]
async fn redis_restarted_empty_under_load_is_announced() {
    let mut redis = Redis::start(&[]).await;
    let nodes = two_nodes(&redis.url(), &redis.url(), &[]).await;
    let mut plain = Client::plain(&nodes.get(0), "plain", "room").await;
    let run = stream(&nodes, &redis).await;
    restarted_twice(&mut redis, &nodes).await;
    let report = run.end().await;
    report.assert_loss_reported(2..=usize::MAX);
    for kind in ["json", "plain", "post"] {
        let acked = |attempt: &&Attempt| {
            attempt.line.starts_with(kind) && matches!(attempt.outcome, Outcome::Acked(_))
        };
        assert!(report.history.attempts.iter().filter(acked).count() > 20, "{kind}");
    }
    // A client without recovery is closed instead of getting a frame.
    let code = loop {
        match plain.next_frame().await {
            Frame::Close(code, _) => break code,
            Frame::Text(_) | Frame::Ping(_) => {}
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(code, 4008);
}

#[tokio::test]
async fn id_from_before_a_restart_is_not_recovered() {
    let mut redis = Redis::start(&[]).await;
    let (a, b) = tokio::join!(Node::on(&redis, &[]), Node::on(&redis, &[]));
    let ids = a.publish_numbers("room", 0..5).await;
    let (mut stays, _) = Client::resume(&a, "stays", "room", ids[0]).await;
    stays.expect_numbers(&ids[1..], 1).await;
    redis.kill();
    redis.up().await;
    let reset = stays.next_control("reset").await;
    let base = position(&reset["lastEventId"]);
    assert!(base > ids[4], "no id is given twice: {reset}");
    b.ready().await;
    for node in [&a, &b] {
        for id in [ids[0], ids[4]] {
            let (_, welcome) = Client::resume(node, "late", "room", id).await;
            assert_eq!((&welcome["recovered"], &welcome["lastEventId"]), (&json!(false), &json!(base)));
        }
        let (_, welcome) = Client::resume(node, "new", "room", base).await;
        assert_eq!(welcome["recovered"], true);
    }
    let id = b.publish("room", &json!({"n": 5})).await;
    assert_eq!(id, base + 1);
    stays.expect_event(id, &json!({"n": 5})).await;
}

#[tokio::test]
async fn durable_redis_restart_under_load_is_invisible() {
    let mut redis = Redis::start(&["--appendonly", "yes", "--appendfsync", "always"]).await;
    let nodes = two_nodes(&redis.url(), &redis.url(), &["--redis-durable"]).await;
    let mut plain = Client::plain(&nodes.get(1), "plain", "room").await;
    let run = stream(&nodes, &redis).await;
    restarted_twice(&mut redis, &nodes).await;
    let report = run.end().await;
    report.assert_no_loss_reported();
    let mut public = report.history.subscribers[0].seen.iter().filter_map(|(_, seen)| match seen {
        Seen::Event(id, _, None) => Some(*id),
        _ => None,
    });
    // The plain client may have joined first.
    let first = public.next().expect("there were events");
    let mut at = 0;
    while at < first {
        at = plain.next_event().await.0;
    }
    assert_eq!(at, first);
    for id in public {
        assert_eq!(plain.next_event().await.0, id);
    }
}

#[tokio::test]
async fn redis_restart_with_data_is_announced() {
    let mut redis = Redis::start(&["--appendonly", "yes", "--appendfsync", "always"]).await;
    let node = Node::on(&redis, &[]).await;
    let (mut client, _) = Client::resume(&node, "a", "room", "").await;
    let ids = node.publish_numbers("room", 0..3).await;
    client.expect_numbers(&ids, 0).await;
    redis.kill();
    redis.up().await;
    assert!(position(&client.next_control("reset").await["lastEventId"]) > ids[2]);
}

#[tokio::test]
async fn flushall_under_load_is_announced() {
    let redis = Redis::start(&[]).await;
    let nodes = two_nodes(&redis.url(), &redis.url(), &[]).await;
    let run = stream(&nodes, &redis).await;
    for _ in 0..2 {
        flowing(&nodes.get(0), 30).await;
        redis.client().await.call(&["FLUSHALL"]).await;
    }
    flowing(&nodes.get(1), 30).await;
    run.end().await.assert_loss_reported(2..=usize::MAX);
}

#[tokio::test]
async fn flushall_of_a_quiet_channel_is_announced() {
    let redis = Redis::start(&[]).await;
    let node = Node::on(&redis, &[]).await;
    let (mut client, _) = Client::resume(&node, "a", "room", "").await;
    let mut plain = Client::plain(&node, "b", "room").await;
    let ids = node.publish_numbers("room", 0..3).await;
    client.expect_numbers(&ids, 0).await;
    plain.expect_numbers(&ids, 0).await;
    redis.client().await.call(&["FLUSHALL"]).await;
    let base = position(&client.next_control("reset").await["lastEventId"]);
    assert!(base > ids[2]);
    assert_eq!(plain.expect_close().await.0, 4008);
    // After a flush, an external publisher that comes first reuses no id that a client has seen.
    redis.flush_all_but_settings().await;
    let given = redis.client().await.fcall("room", br#"{"n":4}"#, None).await.int() as u64;
    let reset = client.next_control("reset").await;
    assert!(position(&reset["lastEventId"]) > base);
    client.expect_event(position(&reset["lastEventId"]) + 1, &json!({"n": 4})).await;
    assert_eq!(given, position(&reset["lastEventId"]) + 1);
}

#[tokio::test]
async fn flushed_scripts_are_loaded_again() {
    let redis = Redis::start(&[]).await;
    let (a, b) = tokio::join!(Node::on(&redis, &[]), Node::on(&redis, &[]));
    let mut subscriber = Client::plain(&b, "w", "room").await;
    let mut admin = redis.client().await;
    let first = a.publish("room", &json!({"n": 0})).await;
    admin.call(&["SCRIPT", "FLUSH"]).await;
    let second = a.publish("room", &json!({"n": 1})).await;
    assert_eq!(second, first + 1);
    subscriber.expect_numbers(&[first, second], 0).await;
}

#[tokio::test]
async fn cut_connections_lose_nothing() {
    let redis = Redis::start(&[]).await;
    let proxy = Proxy::to(redis.port()).await;
    let nodes = two_nodes(&proxy.url(), &redis.url(), &[]).await;
    let run = stream(&nodes, &redis).await;
    for round in 0..6 {
        flowing(&nodes.get(1), 40).await;
        if round % 2 == 0 {
            proxy.cut();
        } else {
            let mut admin = redis.client().await;
            admin.call(&["CLIENT", "KILL", "TYPE", "pubsub"]).await;
        }
    }
    nodes.get(0).ready().await;
    flowing(&nodes.get(0), 40).await;
    let report = run.end().await;
    report.assert_no_loss_reported(); // gaps are filled from history
    let unknown = report.count(|outcome| outcome == Outcome::Unknown);
    assert_eq!(unknown, 0, "a call whose answer was lost is made again");
}

#[tokio::test]
async fn delayed_and_lost_messages_lose_nothing() {
    let redis = Redis::start(&[]).await;
    let proxy = Proxy::to(redis.port()).await;
    let nodes = two_nodes(&redis.url(), &proxy.url(), &[]).await;
    let run = stream(&nodes, &redis).await;
    for _ in 0..3 {
        flowing(&nodes.get(1), 20).await;
        proxy.hold_messages(true);
        flowing(&nodes.get(0), 50).await;
        proxy.cut(); // drops what was held back
        proxy.hold_messages(false);
    }
    nodes.get(1).ready().await;
    flowing(&nodes.get(1), 20).await;
    run.end().await.assert_no_loss_reported();
}

#[tokio::test]
async fn frozen_redis_loses_nothing() {
    let redis = Redis::start(&[]).await;
    let nodes = two_nodes(&redis.url(), &redis.url(), &[]).await;
    let (a, b) = (nodes.get(0), nodes.get(1));
    let run = stream(&nodes, &redis).await;
    flowing(&b, 30).await;
    redis.freeze();
    a.unready().await;
    b.unready().await;
    redis.thaw();
    a.ready().await;
    b.ready().await;
    flowing(&b, 30).await;
    run.end().await.assert_no_loss_reported(); // it is the same Redis with all its data
}

#[tokio::test]
async fn promoted_replica_is_announced() {
    let primary = Redis::start(&[]).await;
    let mut replica = Redis::replica_of(&primary).await;
    let proxy = Proxy::to(primary.port()).await;
    let nodes = two_nodes(&proxy.url(), &proxy.url(), &[]).await;
    let (a, b) = (nodes.get(0), nodes.get(1));
    let run = stream(&nodes, &primary).await;
    flowing(&b, 30).await;
    // The replica misses the last events: replication ends before its promotion.
    replica.promote().await;
    flowing(&b, 30).await;
    proxy.lead_to(replica.port());
    flowing(&b, 1).await;
    flowing(&a, 30).await;
    run.end().await.assert_loss_reported(1..=usize::MAX);
}

#[tokio::test]
async fn sentinel_failover_is_announced() {
    let mut primary = Redis::start(&[]).await;
    let replica = Redis::replica_of(&primary).await;
    let sentinel = Redis::sentinel_for(&primary).await;
    let url = format!("redis-sentinel://127.0.0.1:{}?sentinelServiceName=main", sentinel.port());
    let nodes = two_nodes(&url, &url, &[]).await;
    let (a, b) = (nodes.get(0), nodes.get(1));
    let run = stream(&nodes, &primary).await;
    flowing(&b, 30).await;
    primary.kill();
    a.unready().await;
    a.ready().await;
    b.ready().await;
    flowing(&a, 30).await;
    flowing(&b, 1).await;
    run.end().await.assert_loss_reported(1..=usize::MAX);
    let info = replica.client().await.call(&["INFO", "replication"]).await;
    assert!(info.text().contains("role:master"), "{}", info.text());
}

#[tokio::test]
async fn node_started_before_redis_becomes_ready() {
    let mut redis = Redis::away(&[]);
    let node = Node::start_unready(&["--redis", &redis.url()]).await;
    assert_eq!(node.get("/healthz").await.status, 200);
    assert!(!node.unready().await.trim().is_empty(), "it says why");
    for query in ["channel=room", "channel=room&lastEventId=", "channel=room&lastEventId=5"] {
        let (status, retry) = rejected(&node, query).await.expect("joins are rejected");
        assert_eq!(status, 503, "{query}");
        assert!(retry.is_some_and(|seconds| seconds.parse::<u32>().is_ok_and(|seconds| seconds >= 1)));
    }
    let publish = node.admin("POST", "/publish?channel=room", b"{}").await;
    assert_eq!(publish.status, 503, "{publish:?}");
    assert_eq!(node.get("/").await.status, 200);

    redis.up().await;
    node.ready().await;
    let other = Node::on(&redis, &[]).await;
    let mut here = Client::plain(&node, "a", "room").await;
    let mut there = Client::plain(&other, "b", "room").await;
    here.send("hi").await;
    let (id, event) = there.next_event().await;
    here.expect_event(id, &event).await;
    let fcalled = redis.client().await.fcall("room", b"{}", None).await.int() as u64;
    assert_eq!(fcalled, id + 1, "the function was loaded when Redis came");
}

#[tokio::test]
async fn connections_stay_open_without_redis() {
    let mut redis = Redis::start(&[]).await;
    let flags =
        ["--publish-timeout", "1s", "--ping-interval", "1s", "--ping-timeout", "20s", "--shards", "2"];
    let node = Node::on(&redis, &flags).await;
    let (mut json_mode, _) = Client::json(&node, "j", "room").await;
    let (mut recovering, _) = Client::resume(&node, "r", "room", "").await;
    let mut plain = Client::plain(&node, "p", "room").await;
    let mut silent = Client::plain(&node, "s", "room").await;
    let ids = node.publish_numbers("room", 0..3).await;
    for client in [&mut json_mode, &mut recovering, &mut plain, &mut silent] {
        client.expect_numbers(&ids, 0).await;
    }
    redis.kill();
    node.unready().await;
    assert_eq!(node.get("/healthz").await.status, 200);

    let start = Instant::now();
    json_mode.send(r#"{"text":"lost","ref":1}"#).await;
    recovering.send("lost").await;
    plain.send("lost").await;
    json_mode.expect_error(Some(json!(1))).await;
    recovering.expect_error(None).await;
    assert_eq!(plain.expect_close().await.0, 1013, "it has no error frames");
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    let publish = node.admin("POST", "/publish?channel=room", b"{}").await;
    assert_eq!(publish.status, 503, "{publish:?}");

    // Clients that can be served from memory may join.
    let (mut late, welcome) = Client::resume(&node, "late", "room", ids[1]).await;
    assert_eq!(welcome["recovered"], true, "{welcome}");
    late.expect_numbers(&ids[2..], 2).await;
    assert_eq!(rejected(&node, "channel=other").await.expect("not followed here").0, 503);

    // Pings continue meanwhile.
    for client in [&mut silent, &mut recovering] {
        for _ in 0..2 {
            assert!(matches!(client.next_frame().await, Frame::Ping(_)));
        }
    }
    redis.up().await;
    node.ready().await;
    for client in [&mut recovering, &mut json_mode, &mut late] {
        client.next_control("reset").await;
    }
    let id = node.publish("room", &json!({"n": 3})).await;
    for client in [&mut recovering, &mut json_mode, &mut late] {
        client.expect_event(id, &json!({"n": 3})).await;
    }
}

#[tokio::test]
async fn short_outage_delays_a_publish() {
    let mut redis = Redis::start(&["--appendonly", "yes", "--appendfsync", "always"]).await;
    let node = Node::on(&redis, &["--redis-durable", "--publish-timeout", "20s"]).await;
    let (mut client, welcome) = Client::json(&node, "a", "room").await;
    redis.kill();
    node.unready().await;
    client.send(r#"{"text":"patient","ref":1}"#).await;
    redis.up().await;
    let head = position(&welcome["head"]);
    let mut frames = [client.next_json().await, client.next_json().await];
    frames.sort_by_key(|frame| frame["type"] == "ack");
    assert_eq!(frames[0], json!({"sender": "a", "text": "patient", "id": head + 1}));
    assert_eq!(frames[1], json!({"type": "ack", "ref": 1, "id": head + 1}));
}

#[tokio::test]
async fn full_redis_rejects_until_there_is_memory() {
    let redis = Redis::start(&["--maxmemory-policy", "noeviction"]).await;
    let node = Node::on(&redis, &["--publish-timeout", "2s"]).await;
    let (mut client, welcome) = Client::json(&node, "a", "room").await;
    let mut admin = redis.client().await;
    let head = position(&welcome["head"]);
    let (answer, _) = client.send_for_ack(json!({"text": "one"})).await;
    assert_eq!(answer, Ok(head + 1));
    admin.call(&["CONFIG", "SET", "maxmemory", "1"]).await;
    let (answer, _) = client.send_for_ack(json!({"text": "no room"})).await;
    let error = answer.expect_err("there is no room");
    assert_ne!(error["code"], "unknown", "it was certainly not taken: {error}");
    admin.call(&["CONFIG", "SET", "maxmemory", "0"]).await;
    let (answer, _) = client.send_for_ack(json!({"text": "two"})).await;
    assert_eq!(answer, Ok(head + 2), "the rejected one left no gap");
}

#[tokio::test]
async fn clients_of_a_dead_node_resume_on_the_other() {
    let redis = Redis::start(&[]).await;
    let (a, b) = tokio::join!(Node::on(&redis, &[]), Node::on(&redis, &[]));
    let (mut client, _) = Client::resume(&a, "mover", "room", "").await;
    let ids = b.publish_numbers("room", 0..10).await;
    client.expect_numbers(&ids, 0).await;
    a.kill();
    assert!(matches!(client.next_frame().await, Frame::Lost(_)));
    let more = b.publish_numbers("room", 10..20).await;
    let (mut client, welcome) = Client::resume(&b, "mover", "room", ids[9]).await;
    assert_eq!(welcome["recovered"], true);
    client.expect_numbers(&more, 10).await;
}

#[tokio::test]
async fn reset_closes_plain_clients_gradually() {
    let redis = Redis::start(&[]).await;
    let node = Node::on(&redis, &["--shards", "1"]).await;
    let mut clients = Vec::new();
    for n in 0..400 {
        clients.push(Client::plain(&node, &format!("user{n}"), "room").await);
    }
    let id = node.publish("room", &json!({"n": 0})).await;
    for client in &mut clients {
        client.expect_event(id, &json!({"n": 0})).await;
    }
    redis.client().await.call(&["FLUSHALL"]).await;
    let closes = clients.into_iter().map(|mut client| {
        tokio::spawn(async move {
            assert_eq!(client.expect_close().await.0, 4008);
            Instant::now()
        })
    });
    let mut times = Vec::new();
    for close in closes.collect::<Vec<_>>() {
        times.push(within("a close", close).await.expect("closed with 4008"));
    }
    times.sort_unstable();
    let spread = times[399] - times[0];
    assert!(spread > Duration::from_secs(1), "all came back at once, within {spread:?}");
    assert!(spread < Duration::from_secs(15), "{spread:?}");
}

#[tokio::test]
async fn json_mode_gets_resets_without_asking() {
    let redis = Redis::start(&[]).await;
    let node = Node::on(&redis, &[]).await;
    let mut client = Client::open(&node, "a", "channel=room", Some(JSON_MODE)).await;
    let welcome: Value = client.welcome().await;
    redis.client().await.call(&["FLUSHALL"]).await;
    let reset = client.next_control("reset").await;
    assert!(position(&reset["lastEventId"]) > position(&welcome["head"]));
}
