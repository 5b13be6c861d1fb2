//! Possible losses of Redis are announced, and no id is ever reused.

use std::time::Duration;

use fanfare::bus::{BLOCK, PublishError};
use fanfare::protocol::event::EventId;
use tokio::time::{sleep, timeout};

use super::node::{Node, event, mark, settings, until};
use super::redis_server::{Proxy, RedisServer, Reply, TIMEOUT};

#[tokio::test]
async fn wiped_redis_is_announced_and_ids_rise() {
    let redis = RedisServer::start();
    let mut node = Node::ready(settings(&redis.url())).await;
    let mut reader = node.follow("room", 0).await;
    let one = node.publish("room", &event(1)).await.unwrap();
    reader.until(&mut node, one).await;
    redis.raw().command(&["FLUSHALL"]);
    // Without a publisher, the probe notices it.
    reader.until_it(&mut node, |reader| !reader.resets.is_empty()).await;
    let two = node.publish("room", &event(2)).await.unwrap();
    reader.until(&mut node, two).await;
    assert_eq!(reader.resets.len(), 1);
    assert!(one.0 < reader.resets[0] && reader.resets[0] < two.0);
    reader.assert_has(two, &mark(2));
}

#[tokio::test]
async fn ids_rise_although_the_clock_is_set_back() {
    let redis = RedisServer::start();
    let mut node = Node::ready(settings(&redis.url())).await;
    let far = EventId::LIMIT / 2; // years ahead of the clock, as if that had been set back
    redis.raw().command(&["FCALL", "fanfare_publish", "1", "fanfare:{room}", "{}"]);
    redis.raw().command(&["HSET", "fanfare:{room}:meta", "head", &far.to_string(), "base", &far.to_string()]);
    redis.raw().command(&["DEL", "fanfare:{room}:events"]);
    let mut reader = node.follow("room", 0).await;
    assert_eq!(reader.position.0, far);
    redis.raw().command(&["FLUSHALL"]);
    let id = node.publish("room", &event(1)).await.unwrap();
    assert!(id.0 > far + (1 << 20) && id.0 < EventId::LIMIT);
    reader.until(&mut node, id).await;
    assert_eq!(reader.resets, [id.0 - 1]);
}

#[tokio::test]
async fn resumes_after_redis_restart_under_load() {
    let mut redis = RedisServer::start();
    let mut nodes = [Node::ready(settings(&redis.url())).await, Node::ready(settings(&redis.url())).await];
    let mut readers = Vec::new();
    for node in &mut nodes {
        readers.push(node.follow("room", 0).await);
    }
    let mut acked = Vec::new();
    let mut n = 0;
    for _round in 0..3 {
        let mut results = Vec::new();
        for at in 0..200 {
            results.push((n, nodes[n % 2].publish_later("room", None, &event(n))));
            n += 1;
            if at == 100 {
                sleep(Duration::from_millis(3)).await; // so that some are in flight
                redis.restart();
            }
        }
        for (n, result) in results {
            match timeout(TIMEOUT, result).await.unwrap().unwrap() {
                Ok(id) => acked.push((n, id)),
                Err(PublishError::Unknown) => {}
                Err(error) => panic!("{error}"),
            }
        }
        for node in &nodes {
            node.until_ready().await;
        }
    }
    let last = nodes[0].publish("room", &event(n)).await.unwrap();
    acked.push((n, last));
    let ids: std::collections::HashSet<_> = acked.iter().map(|(_, id)| id.0).collect();
    assert_eq!(ids.len(), acked.len(), "no id is given twice");
    for (node, reader) in nodes.iter_mut().zip(&mut readers) {
        reader.until(node, last).await;
        assert!((1..=3).contains(&reader.resets.len()), "{:?}", reader.resets);
        assert!(reader.events.windows(2).all(|pair| pair[0].0 < pair[1].0));
        for shown in 0..=n {
            assert!(reader.count(&mark(shown)) <= 1, "event {shown} twice");
        }
        // Every event acknowledged in the last epoch has arrived.
        let base = *reader.resets.last().unwrap();
        for (n, id) in acked.iter().filter(|(_, id)| id.0 > base) {
            reader.assert_has(*id, &mark(*n));
        }
    }
}

#[tokio::test]
async fn durable_redis_restarts_without_a_reset() {
    let mut redis =
        RedisServer::start_with(&["--save", "", "--appendonly", "yes", "--appendfsync", "always"]);
    let durable = || {
        let mut settings = settings(&redis.url());
        settings.redis_durable = true;
        settings
    };
    let mut node = Node::ready(durable()).await;
    let mut reader = node.follow("room", 0).await;
    let mut last = EventId(0);
    for n in 0..3 {
        let results: Vec<_> =
            (0..50).map(|at| node.publish_later("room", None, &event(n * 50 + at))).collect();
        redis.restart();
        for result in results {
            last = timeout(TIMEOUT, result).await.unwrap().unwrap().unwrap();
        }
        node.until_ready().await;
    }
    reader.until(&mut node, last).await;
    assert!(reader.resets.is_empty());
    assert!((0..150).all(|n| reader.count(&mark(n)) == 1));
    assert_eq!(reader.events.len(), 150);
}

#[tokio::test]
async fn promoted_copy_is_announced_even_if_durable() {
    let redis = RedisServer::start();
    let copy = RedisServer::start();
    let proxy = Proxy::start(redis.port).await;
    let mut durable = settings(&proxy.url());
    durable.redis_durable = true;
    let mut node = Node::ready(durable).await;
    let mut reader = node.follow("room", 0).await;
    copy.raw().command(&["REPLICAOF", "127.0.0.1", &redis.port.to_string()]);
    until("the copy is linked", || {
        copy.raw().command(&["INFO", "replication"]).text().contains("master_link_status:up")
    })
    .await;
    let one = node.publish("room", &event(1)).await.unwrap();
    until("the copy has it", || copy.head("room") == one.0).await;
    copy.raw().command(&["REPLICAOF", "NO", "ONE"]);
    proxy.point_to(copy.port);
    let two = node.publish("room", &event(2)).await;
    let two = match two {
        Ok(id) => id,
        // It met the new epoch on a retry.
        Err(_) => node.publish("room", &event(2)).await.unwrap(),
    };
    reader.until(&mut node, two).await;
    assert_eq!(reader.resets.len(), 1);
    assert!(two > one);
}

#[tokio::test]
async fn new_epoch_with_a_lower_base_is_announced() {
    let (here, there) = (RedisServer::start(), RedisServer::start());
    let proxy = Proxy::start(there.port).await;
    // `there` creates its epoch first and has counted far ahead; `here` has the higher base.
    let first = Node::ready(settings(&there.url())).await;
    let old = first.publish("room", &event(0)).await.unwrap();
    proxy.point_to(here.port);
    let mut node = Node::ready(settings(&proxy.url())).await;
    let mut reader = node.follow("room", 0).await;
    assert!(reader.base > old);
    let ahead = (reader.position.0 + 1_000_000).to_string();
    there.raw().command(&["HSET", "fanfare:{room}:meta", "head", &ahead]);
    proxy.point_to(there.port);
    reader.until_it(&mut node, |reader| !reader.resets.is_empty()).await;
    let id = node.publish("room", &event(1)).await.unwrap();
    reader.until(&mut node, id).await;
    reader.assert_has(id, &mark(1));
}

#[tokio::test]
async fn restart_reuses_no_id_of_lost_events() {
    let mut redis = RedisServer::start_with(&["--save", "", "--dbfilename", "dump.rdb"]);
    let mut node = Node::ready(settings(&redis.url())).await;
    let mut reader = node.follow("room", 0).await;
    let kept = node.publish("room", &event(1)).await.unwrap();
    assert_eq!(redis.raw().command(&["SAVE"]), Reply::Text("OK".into()));
    let lost = node.publish("room", &event(2)).await.unwrap();
    reader.until(&mut node, lost).await;
    redis.restart();
    assert_eq!(redis.head("room"), kept.0, "Redis is back with what it had saved");
    // Another program comes first, which knows none of the ids.
    let mut raw = redis.raw();
    let fcall = ["FCALL", "fanfare_publish", "1", "fanfare:{room}", "{\"n\":\"<3>\"}"];
    let next = match raw.command(&fcall) {
        Reply::Number(id) => id as u64,
        _ => {
            // The function was lost as well; the nodes load it again.
            node.until_ready().await;
            raw.command(&fcall).number() as u64
        }
    };
    assert!(next > lost.0);
    reader.until(&mut node, EventId(next)).await;
    assert_eq!(reader.resets.len(), 1);
    reader.assert_has(EventId(next), &mark(3));
    // History does not reach back beyond the new base.
    let page = node.page("room", next / BLOCK, 0).await.unwrap();
    assert!(page.base > lost && page.oldest > page.base);
}

#[tokio::test]
async fn head_behind_the_last_seen_is_a_new_epoch() {
    let redis = RedisServer::start();
    let mut node = Node::ready(settings(&redis.url())).await;
    let mut reader = node.follow("room", 0).await;
    for n in 0..5 {
        node.publish("room", &event(n)).await.unwrap();
    }
    let last = node.publish("room", &event(5)).await.unwrap();
    reader.until(&mut node, last).await;
    // A Redis that is declared durable and is not: it has an earlier state, and continues from
    // there.
    let mut raw = redis.raw();
    raw.command(&["HSET", "fanfare:{room}:meta", "head", &(last.0 - 3).to_string()]);
    raw.command(&["XTRIM", "fanfare:{room}:events", "MAXLEN", "0"]);
    let next = node.publish("room", &event(6)).await.unwrap();
    assert!(next > last);
    reader.until(&mut node, next).await;
    assert_eq!(reader.resets.len(), 1);
}

#[tokio::test]
async fn sentinel_failover_is_followed_and_announced() {
    let mut first = RedisServer::start();
    let second = RedisServer::start();
    second.raw().command(&["REPLICAOF", "127.0.0.1", &first.port.to_string()]);
    until("the copy is linked", || {
        second.raw().command(&["INFO", "replication"]).text().contains("master_link_status:up")
    })
    .await;
    let sentinel = RedisServer::sentinel("main", first.port);
    until("the sentinel knows the copy", || {
        match sentinel.raw().command(&["SENTINEL", "REPLICAS", "main"]) {
            Reply::List(copies) => copies.len() == 1,
            _ => false,
        }
    })
    .await;
    let url = format!("redis-sentinel://127.0.0.1:{}?sentinelServiceName=main", sentinel.port);
    let mut node = Node::ready(settings(&url)).await;
    let mut reader = node.follow("room", 0).await;
    let one = node.publish("room", &event(1)).await.unwrap();
    reader.until(&mut node, one).await;
    until("the copy has it", || second.head("room") == one.0).await;
    first.kill();
    until("the node notices", || node.readiness.not_ready_reason().is_some()).await;
    node.until_ready().await;
    let two = node.publish("room", &event(2)).await.unwrap();
    reader.until(&mut node, two).await;
    assert_eq!(reader.resets.len(), 1);
    assert_eq!(second.head("room"), two.0);
}

#[tokio::test]
async fn demoted_redis_is_left() {
    let (old, new) = (RedisServer::start(), RedisServer::start());
    let proxy = Proxy::start(old.port).await;
    let mut node = Node::ready(settings(&proxy.url())).await;
    let mut reader = node.follow("room", 0).await;
    proxy.close(false);
    // Its connections stay open: only READONLY shows the demotion.
    old.raw().command(&["REPLICAOF", "127.0.0.1", &new.port.to_string()]);
    until("the node notices", || node.readiness.not_ready_reason().is_some()).await;
    proxy.point_to(new.port);
    node.until_ready().await;
    let id = node.publish("room", &event(1)).await.unwrap();
    reader.until(&mut node, id).await;
    assert_eq!(reader.resets.len(), 1);
}
