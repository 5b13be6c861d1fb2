//! Every subscriber sees every event once and in one order, whatever is lost in between.

use fanfare::bus::BusError;
use fanfare::protocol::event::EventId;
use tokio::time::timeout;

use super::node::{Node, Reader, event, mark, settings};
use super::redis_server::{RedisServer, TIMEOUT};

#[tokio::test]
async fn two_nodes_see_one_order_without_gaps() {
    let redis = RedisServer::start();
    let mut nodes = [Node::ready(settings(&redis.url())).await, Node::ready(settings(&redis.url())).await];
    let mut readers = Vec::new();
    for node in &mut nodes {
        readers.push(node.follow("room", 0).await);
    }
    let results: Vec<_> = (0..1000).map(|n| nodes[n % 2].publish_later("room", None, &event(n))).collect();
    let mut ids = Vec::new();
    for result in results {
        ids.push(timeout(TIMEOUT, result).await.unwrap().unwrap().unwrap());
    }
    let last = *ids.iter().max().unwrap();
    for (node, reader) in nodes.iter_mut().zip(&mut readers) {
        reader.until(node, last).await;
        for (n, id) in ids.iter().enumerate() {
            reader.assert_has(*id, &mark(n));
        }
        assert!(reader.resets.is_empty());
    }
    assert_eq!(readers[0].events.len(), 1000);
    assert_eq!(readers[0].events, readers[1].events);
    assert!(last.0 < EventId::LIMIT);
    // Events of one node keep their order.
    assert!(ids.iter().step_by(2).is_sorted() && ids.iter().skip(1).step_by(2).is_sorted());
    assert_eq!(nodes[0].metrics.published.get(), 500);
}

#[tokio::test]
async fn second_shard_joins_a_followed_channel() {
    let redis = RedisServer::start();
    let mut node = Node::ready(settings(&redis.url())).await;
    let mut first = node.follow("room", 0).await;
    let one = node.publish("room", &event(1)).await.unwrap();
    first.until(&mut node, one).await;
    let mut second = node.follow("room", 1).await;
    assert_eq!(second.position, one);
    let two = node.publish("room", &event(2)).await.unwrap();
    second.until(&mut node, two).await;
    assert_eq!(second.events.len(), 1);
    node.unfollow(second);
    node.unfollow(first);
    // A new follower starts at the position of the bus.
    let third = node.follow("room", 1).await;
    assert_eq!(third.position, two);
}

#[tokio::test]
async fn joining_and_leaving_under_load_loses_nothing() {
    let redis = RedisServer::start();
    let publisher = Node::ready(settings(&redis.url())).await;
    let mut node = Node::ready(settings(&redis.url())).await;
    let mut stays = node.follow("other", 1).await;
    for round in 0..50 {
        let before: Vec<_> = (0..20).map(|n| publisher.publish_later("room", None, &event(n))).collect();
        let mut reader = node.follow("room", 0).await;
        let after: Vec<_> = (20..40).map(|n| publisher.publish_later("room", None, &event(n))).collect();
        let mut ids = Vec::new();
        for result in before.into_iter().chain(after) {
            ids.push(timeout(TIMEOUT, result).await.unwrap().unwrap().unwrap());
        }
        let start = reader.position;
        reader.until(&mut node, *ids.last().unwrap()).await; // checks that none is missing or duplicated
        assert!(reader.resets.is_empty());
        for (n, id) in ids.iter().enumerate().filter(|(_, id)| **id > start) {
            reader.assert_has(*id, &mark(n));
        }
        if round % 2 == 0 {
            node.unfollow(reader);
        }
        // After an odd round the shard still follows; the next Follow is answered with the current
        // position.
    }
    let id = publisher.publish("other", &event(1)).await.unwrap();
    stays.until(&mut node, id).await;
}

#[tokio::test]
async fn burst_arrives_complete() {
    let redis = RedisServer::start();
    let mut node = Node::ready(settings(&redis.url())).await;
    let mut reader = node.follow("room", 0).await;
    // The node runs on this thread, so it handles nothing until the burst is over. By then there
    // are more messages than it buffers. How many it loses and reads from history depends on how
    // fast Redis sends them.
    let mut raw = redis.raw();
    let mut last = 0;
    for _ in 0..20 {
        let fcall = ["FCALL", "fanfare_publish", "1", "fanfare:{room}", "{}"];
        last = raw.repeat(&fcall, 400).last().unwrap().number() as u64;
    }
    reader.until(&mut node, EventId(last)).await;
    assert_eq!(reader.events.len(), 8000);
    assert!(reader.resets.is_empty());
}

#[tokio::test]
async fn gaps_are_filled_when_subscribers_are_killed() {
    let redis = RedisServer::start();
    let publisher = Node::ready(settings(&redis.url())).await;
    let mut node = Node::ready(settings(&redis.url())).await;
    let mut reader = node.follow("room", 0).await;
    let mut ids = Vec::new();
    for n in 0..400 {
        ids.push((n, publisher.publish("room", &event(n)).await.unwrap()));
        if n % 25 == 10 {
            redis.raw().command(&["CLIENT", "KILL", "TYPE", "pubsub"]);
        }
    }
    let last = ids.last().unwrap().1;
    reader.until(&mut node, last).await;
    for (n, id) in ids {
        reader.assert_has(id, &mark(n));
    }
    assert!(reader.resets.is_empty());
    assert_eq!(reader.events.len(), 400);
    assert!(node.metrics.gaps_filled.get() > 0, "some gap was filled");
}

#[tokio::test]
async fn hint_without_event_is_forgotten() {
    let redis = RedisServer::start();
    let mut node = Node::ready(settings(&redis.url())).await;
    let mut reader = node.follow("room", 0).await;
    let far = reader.position.0 + 1000;
    let mut raw = redis.raw();
    for garbage in
        [&format!("{{\"id\":{far}}}"), "garbage", "", "{\"id\":1}", "{\"id\":0}", "u\n{\"id\":0}", "{}\n{}"]
    {
        raw.command(&["PUBLISH", "fanfare:{room}", garbage]);
        raw.command(&["PUBLISH", "fanfare:{room}:to", garbage]);
    }
    let id = node.publish("room", &event(1)).await.unwrap();
    reader.until(&mut node, id).await;
    assert_eq!(id, reader.base.next());
    assert!(reader.resets.is_empty());
    assert_eq!(reader.events.len(), 1);
}

#[tokio::test]
async fn max_channels_is_enforced() {
    let redis = RedisServer::start();
    let mut few = settings(&redis.url());
    few.max_channels = 2.try_into().unwrap();
    let mut node = Node::ready(few).await;
    let first: Reader = node.follow("a", 0).await;
    node.follow("b", 0).await;
    assert_eq!(node.try_follow("c", 0).await.unwrap_err(), BusError::TooManyChannels);
    node.follow("b", 1).await;
    node.unfollow(first);
    node.follow("c", 0).await;
    assert_eq!(node.metrics.channels.get(), 2);
}

#[tokio::test]
async fn probes_rotate_over_many_channels() {
    let redis = RedisServer::start();
    let mut many = settings(&redis.url());
    many.max_channels = 2000.try_into().unwrap();
    let mut node = Node::ready(many).await;
    let mut readers = Vec::new();
    for n in 0..1500 {
        readers.push(node.follow(&format!("room-{n}"), 0).await);
    }
    let mut raw = redis.raw();
    for at in [0, 700, 1499] {
        let reader = &mut readers[at];
        let id = reader.position.0 + 1;
        let key = format!("fanfare:{{{}}}", reader.channel);
        raw.command(&[
            "XADD",
            &format!("{key}:events"),
            &format!("{id}-0"),
            "e",
            &format!("{{\"id\":{id}}}"),
        ]);
        raw.command(&["HSET", &format!("{key}:meta"), "head", &id.to_string()]);
    }
    for at in [0, 700, 1499] {
        let id = readers[at].position.next();
        readers[at].until(&mut node, id).await;
        assert_eq!(readers[at].events.len(), 1);
    }
    assert_eq!(node.metrics.probe_interval_seconds.get(), 2);
    assert_eq!(node.metrics.channels.get(), 1500);
}
