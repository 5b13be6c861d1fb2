//! Answers to publishes are true, and nothing is published twice.

use std::time::Duration;

use fanfare::bus::{BLOCK, BusError, PublishError};
use fanfare::config::Settings;
use fanfare::protocol::event::EventId;
use tokio::time::{sleep, timeout};

use super::node::{Node, event, mark, settings, until};
use super::redis_server::{Proxy, RedisServer, Reply, TIMEOUT};

#[tokio::test]
async fn retry_after_a_lost_answer_doubles_nothing() {
    let redis = RedisServer::start();
    let proxy = Proxy::start(redis.port).await;
    let mut node = Node::ready(settings(&proxy.url())).await;
    let mut reader = node.follow("room", 0).await;
    for round in 0..5 {
        let before = redis.head("room");
        proxy.swallow(true);
        let result = node.publish_later("room", None, &event(round));
        until("Redis has taken it", || redis.head("room") > before).await;
        proxy.swallow(false);
        proxy.cut();
        let id = timeout(TIMEOUT, result).await.unwrap().unwrap().expect("the retry gets the first answer");
        assert_eq!(id.0, before + 1);
        assert_eq!(redis.head("room"), before + 1);
        reader.until(&mut node, id).await;
        node.until_ready().await;
    }
    assert!(reader.resets.is_empty());
    assert_eq!(reader.events.len(), 5);
}

#[tokio::test]
async fn retry_on_a_wiped_redis_is_unknown() {
    let redis = RedisServer::start();
    let proxy = Proxy::start(redis.port).await;
    let mut node = Node::ready(settings(&proxy.url())).await;
    let mut reader = node.follow("room", 0).await;
    let before = redis.head("room");
    proxy.swallow(true);
    let result = node.publish_later("room", None, &event(1));
    until("Redis has taken it", || redis.head("room") > before).await;
    redis.raw().command(&["FLUSHALL"]);
    proxy.swallow(false);
    proxy.cut();
    assert_eq!(timeout(TIMEOUT, result).await.unwrap().unwrap(), Err(PublishError::Unknown));
    let id = node.publish("room", &event(2)).await.unwrap();
    reader.until(&mut node, id).await;
    assert_eq!(reader.resets.len(), 1);
    assert_eq!(redis.raw().command(&["XLEN", "fanfare:{room}:events"]), Reply::Number(1));
    assert_eq!(node.metrics.publish_unknown.get(), 1);
}

#[tokio::test]
async fn killed_connections_double_nothing() {
    let redis = RedisServer::start();
    let mut node = Node::ready(settings(&redis.url())).await;
    let mut reader = node.follow("room", 0).await;
    let mut results = Vec::new();
    for n in 0..300 {
        results.push(node.publish_later("room", None, &event(n)));
        if n % 60 == 30 {
            redis.raw().command(&["CLIENT", "KILL", "TYPE", "normal"]);
        }
        tokio::task::yield_now().await;
    }
    let mut last = EventId(0);
    for result in results {
        last = last.max(timeout(TIMEOUT, result).await.unwrap().unwrap().expect("Redis kept everything"));
    }
    reader.until(&mut node, last).await;
    assert_eq!(reader.events.len(), 300);
    assert!((0..300).all(|n| reader.count(&mark(n)) == 1));
    assert!(reader.resets.is_empty());
}

#[tokio::test]
async fn frozen_redis_costs_readiness_but_no_event() {
    let redis = RedisServer::start();
    let mut node = Node::ready(settings(&redis.url())).await;
    let mut reader = node.follow("room", 0).await;
    redis.signal("STOP");
    let results: Vec<_> = (0..100).map(|n| node.publish_later("room", None, &event(n))).collect();
    until("the node notices", || node.readiness.not_ready_reason().is_some()).await;
    assert!(matches!(node.try_follow("other", 0).await, Err(BusError::Unavailable(_))));
    // A channel that is already followed can be followed by other shards.
    assert_eq!(node.follow("room", 1).await.position, reader.position);
    sleep(Duration::from_secs(5)).await; // the connections are replaced meanwhile
    redis.signal("CONT");
    let mut last = EventId(0);
    for result in results {
        last = last.max(timeout(TIMEOUT, result).await.unwrap().unwrap().unwrap());
    }
    reader.until(&mut node, last).await;
    assert_eq!(reader.events.len(), 100);
    assert!((0..100).all(|n| reader.count(&mark(n)) == 1));
    assert!(reader.resets.is_empty());
    node.until_ready().await;
}

#[tokio::test]
async fn unsent_is_rejected_and_sent_is_unknown() {
    let mut redis = RedisServer::start();
    let hasty = || {
        let mut settings = settings(&redis.url());
        settings.publish_timeout = Duration::from_millis(500);
        settings
    };
    let node = Node::ready(hasty()).await;
    node.publish("room", &event(0)).await.unwrap(); // now it knows the channel's base
    redis.signal("STOP");
    assert_eq!(node.publish("room", &event(1)).await, Err(PublishError::Unknown));
    redis.signal("CONT");
    redis.kill();
    until("the node notices", || node.readiness.not_ready_reason().is_some()).await;
    assert!(matches!(node.publish("room", &event(2)).await, Err(PublishError::Rejected(_))));
}

#[tokio::test]
async fn out_of_memory_rejects_events_only() {
    let redis = RedisServer::start();
    let mut node = Node::ready(settings(&redis.url())).await;
    let mut reader = node.follow("room", 0).await;
    node.publish("room", &event(0)).await.unwrap();
    redis.raw().command(&["CONFIG", "SET", "maxmemory", "1"]);
    match node.publish("room", &event(1)).await {
        Err(PublishError::Rejected(why)) => assert!(why.starts_with("Redis is out of memory"), "{why}"),
        other => panic!("{other:?}"),
    }
    let other = node.follow("other", 1).await;
    node.page("other", other.position.0 / BLOCK, 1).await.unwrap();
    redis.raw().command(&["CONFIG", "SET", "maxmemory", "0"]);
    let id = node.publish("room", &event(2)).await.unwrap();
    reader.until(&mut node, id).await;
    assert_eq!((reader.events.len(), reader.count(&mark(1))), (2, 0));
    assert_eq!(node.metrics.publish_rejected.get(), 1);
}

#[tokio::test]
async fn missing_script_is_sent_again() {
    let redis = RedisServer::start();
    let mut node = Node::ready(settings(&redis.url())).await;
    let mut reader = node.follow("room", 0).await;
    for n in 0..3 {
        redis.raw().command(&["SCRIPT", "FLUSH"]);
        let id = node.publish("room", &event(n)).await.unwrap();
        reader.until(&mut node, id).await;
    }
    assert_eq!(reader.events.len(), 3);
}

#[tokio::test]
async fn private_events_share_entries() {
    let redis = RedisServer::start();
    let local = Settings { redis: None, ..settings("redis://127.0.0.1") };
    for settings in [settings(&redis.url()), local] {
        let mut node = Node::ready(settings).await;
        let mut reader = node.follow("room", 0).await;
        let mut last = None;
        for to in [Some("bob"), Some("eve"), None] {
            for n in 0..50 {
                last = Some(node.publish_later("room", to, &event(n)));
            }
        }
        let last = timeout(TIMEOUT, last.unwrap()).await.unwrap().unwrap().expect("it is published");
        let mut entries = 0;
        while reader.position < last {
            reader.next(&mut node).await;
            entries += 1;
        }
        let count = |user| reader.private.iter().filter(|(_, to, _)| to == user).count();
        assert_eq!((count("bob"), count("eve"), reader.events.len()), (50, 50, 50));
        // The first call may be sent before the others have arrived, which divides an entry.
        assert!(entries <= 4, "{entries} entries");
    }
}

/// An eviction may remove any key, also between a lost answer and its retry.
#[tokio::test]
async fn retry_after_an_eviction_doubles_nothing() {
    let redis = RedisServer::start();
    let proxy = Proxy::start(redis.port).await;
    let mut node = Node::ready(settings(&proxy.url())).await;
    let mut reader = node.follow("room", 0).await;
    let first = node.publish("room", &event(0)).await.unwrap();
    reader.until(&mut node, first).await;
    let keys = redis.raw().command(&["KEYS", "fanfare:*"]).list();
    assert!(keys.iter().any(|key| key.ends_with(":meta")) && keys.iter().any(|key| key.ends_with(":events")));
    let mut unknown = 0;
    for (n, key) in keys.iter().enumerate() {
        let before = redis.head("room");
        proxy.swallow(true);
        let result = node.publish_later("room", None, &event(n + 1));
        until("Redis has taken it", || redis.head("room") > before).await;
        redis.raw().command(&["DEL", key]);
        // Another publisher is active meanwhile.
        redis.raw().command(&["FCALL", "fanfare_publish", "1", "fanfare:{room}", "{}"]);
        proxy.cut();
        until("the answer is lost", || node.readiness.not_ready_reason().is_some()).await;
        proxy.swallow(false);
        match timeout(TIMEOUT, result).await.unwrap().unwrap() {
            Ok(id) => assert_eq!(id.0, before + 1, "{key}"),
            Err(PublishError::Unknown) => unknown += 1,
            Err(rejected) => panic!("{key}: {rejected}"),
        }
        node.until_ready().await;
        let last = node.publish("room", "{\"last\":true}").await.unwrap();
        reader.until(&mut node, last).await;
        assert!(reader.count(&mark(n + 1)) <= 1, "{key}: it came twice");
    }
    assert!(unknown >= 1, "without meta nothing can be known");
}

#[tokio::test]
async fn publish_numbers_of_dead_nodes_expire() {
    let redis = RedisServer::start();
    let key = "fanfare:{room}:meta";
    let numbers = || {
        let fields = redis.raw().command(&["HKEYS", key]).list();
        fields.into_iter().filter(|field| field.starts_with("from:")).collect::<Vec<_>>()
    };
    for n in 0..3 {
        let node = Node::ready(settings(&redis.url())).await;
        node.publish("room", &event(n)).await.unwrap();
    }
    let gone = numbers();
    assert_eq!(gone.len(), 3);
    // Two of them two hours ago.
    for field in &gone[..2] {
        let value = redis.raw().command(&["HGET", key, field]).text().to_owned();
        let (numbers, seconds) = value.rsplit_once(' ').unwrap();
        let earlier = seconds.parse::<u64>().unwrap() - 7200;
        redis.raw().command(&["HSET", key, field, &format!("{numbers} {earlier}")]);
    }
    let node = Node::ready(settings(&redis.url())).await;
    node.publish("room", &event(3)).await.unwrap();
    let left = numbers();
    assert_eq!(left.len(), 2);
    assert!(left.contains(&gone[2]));
}

#[tokio::test]
async fn events_too_long_for_redis_are_rejected() {
    let redis = RedisServer::start_with(&["--save", "", "--proto-max-bulk-len", "1mb"]);
    let mut large = settings(&redis.url());
    large.max_message_size = 4 << 20;
    let mut node = Node::ready(large).await;
    let mut reader = node.follow("room", 0).await;
    let id = node.publish("room", &event(1)).await.unwrap();
    reader.until(&mut node, id).await;
    for _ in 0..3 {
        let event = format!("{{\"a\":\"{}\"}}", "x".repeat(2 << 20));
        match node.publish("room", &event).await {
            Err(PublishError::Rejected(why)) => assert!(why.contains("proto-max-bulk-len"), "{why}"),
            other => panic!("{other:?}"),
        }
    }
    node.until_ready().await;
    let id = node.publish("room", &event(2)).await.unwrap();
    reader.until(&mut node, id).await;
    assert_eq!((reader.events.len(), reader.resets.len()), (2, 0));
}
