//! The Redis bus against real Redis servers, and against what goes wrong with them.
#![allow(clippy::unwrap_used)] // clippy.toml excepts test functions, not the helpers beside them

#[path = "bus/node.rs"]
mod node;
#[path = "bus/redis_server.rs"]
mod redis_server;

use std::time::Duration;

use fanfare::bus::{BusError, PAGE, PublishError, ToShard};
use fanfare::event::EventId;
use tokio::time::{sleep, timeout};

use node::{Node, Reader, page_after, settings, until};
use redis_server::{PATIENCE, Proxy, RedisServer, Reply};

fn event(n: usize) -> String {
    format!(r#"{{"n":"<{n}>"}}"#)
}

fn mark(n: usize) -> String {
    format!("\"<{n}>\"")
}

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
        ids.push(timeout(PATIENCE, result).await.unwrap().unwrap().unwrap());
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
    // Each node's own events keep their order.
    assert!(ids.iter().step_by(2).is_sorted() && ids.iter().skip(1).step_by(2).is_sorted());
    assert_eq!(nodes[0].numbers.published.get(), 500);
}

#[tokio::test]
async fn a_further_shard_is_admitted_at_once_and_gets_what_follows() {
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
    // Followed anew, it stands where the bus stands.
    let third = node.follow("room", 1).await;
    assert_eq!(third.position, two);
}

#[tokio::test]
async fn a_retry_after_a_lost_answer_doubles_nothing() {
    let redis = RedisServer::start();
    let proxy = Proxy::start(redis.port).await;
    let mut node = Node::ready(settings(&proxy.url())).await;
    let mut reader = node.follow("room", 0).await;
    for round in 0..5 {
        let before = head(&redis, "room");
        proxy.swallow(true);
        let result = node.publish_later("room", None, &event(round));
        until("Redis has taken it", || head(&redis, "room") > before).await;
        proxy.swallow(false);
        proxy.cut();
        let id = timeout(PATIENCE, result).await.unwrap().unwrap().expect("the retry gets the first answer");
        assert_eq!(id.0, before + 1);
        assert_eq!(head(&redis, "room"), before + 1);
        reader.until(&mut node, id).await;
        node.until_ready().await;
    }
    assert!(reader.resets.is_empty());
    assert_eq!(reader.events.len(), 5);
}

fn head(redis: &RedisServer, name: &str) -> u64 {
    match redis.raw().command(&["HGET", &format!("fanfare:{{{name}}}:meta"), "head"]) {
        Reply::Text(text) => text.parse().unwrap(),
        _ => 0,
    }
}

#[tokio::test]
async fn a_retry_that_meets_a_wiped_redis_is_unknown_and_publishes_nothing() {
    let redis = RedisServer::start();
    let proxy = Proxy::start(redis.port).await;
    let mut node = Node::ready(settings(&proxy.url())).await;
    let mut reader = node.follow("room", 0).await;
    let before = head(&redis, "room");
    proxy.swallow(true);
    let result = node.publish_later("room", None, &event(1));
    until("Redis has taken it", || head(&redis, "room") > before).await;
    redis.raw().command(&["FLUSHALL"]);
    proxy.swallow(false);
    proxy.cut();
    assert_eq!(timeout(PATIENCE, result).await.unwrap().unwrap(), Err(PublishError::Unknown));
    let id = node.publish("room", &event(2)).await.unwrap();
    reader.until(&mut node, id).await;
    assert_eq!(reader.resets.len(), 1);
    assert_eq!(redis.raw().command(&["XLEN", "fanfare:{room}:events"]), Reply::Number(1));
    assert_eq!(node.numbers.unknown.get(), 1);
}

#[tokio::test]
async fn a_wiped_redis_is_announced_and_ids_go_on_above_all_seen() {
    let redis = RedisServer::start();
    let mut node = Node::ready(settings(&redis.url())).await;
    let mut reader = node.follow("room", 0).await;
    let one = node.publish("room", &event(1)).await.unwrap();
    reader.until(&mut node, one).await;
    redis.raw().command(&["FLUSHALL"]);
    // Nobody publishes: the canary finds it.
    reader.until_it(&mut node, |reader| !reader.resets.is_empty()).await;
    let two = node.publish("room", &event(2)).await.unwrap();
    reader.until(&mut node, two).await;
    assert_eq!(reader.resets.len(), 1);
    assert!(one.0 < reader.resets[0] && reader.resets[0] < two.0);
    reader.assert_has(two, &mark(2));
}

#[tokio::test]
async fn ids_stay_above_all_seen_when_the_clock_is_set_back() {
    let redis = RedisServer::start();
    let mut node = Node::ready(settings(&redis.url())).await;
    let far = EventId::LIMIT / 2; // years ahead of the clock: as if that had been set back
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
async fn redis_killed_and_restarted_in_a_stream_of_events() {
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
                sleep(Duration::from_millis(3)).await; // lets some of them be on their way
                redis.restart();
            }
        }
        for (n, result) in results {
            match timeout(PATIENCE, result).await.unwrap().unwrap() {
                Ok(id) => acked.push((n, id)),
                Err(PublishError::Unknown) => {}
                Err(PublishError::Refused(why)) => panic!("refused: {why}"),
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
        // Whatever was acknowledged in the last run is there.
        let base = *reader.resets.last().unwrap();
        for (n, id) in acked.iter().filter(|(_, id)| id.0 > base) {
            reader.assert_has(*id, &mark(*n));
        }
    }
}

#[tokio::test]
async fn holes_are_filled_when_subscribers_are_killed_again_and_again() {
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
    assert!(node.numbers.holes.get() > 0, "some hole was filled");
}

#[tokio::test]
async fn every_connection_killed_again_and_again_doubles_nothing() {
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
        last = last.max(timeout(PATIENCE, result).await.unwrap().unwrap().expect("Redis kept everything"));
    }
    reader.until(&mut node, last).await;
    assert_eq!(reader.events.len(), 300);
    assert!((0..300).all(|n| reader.count(&mark(n)) == 1));
    assert!(reader.resets.is_empty());
}

#[tokio::test]
async fn a_redis_that_hangs_for_seconds_costs_readiness_but_no_event() {
    let redis = RedisServer::start();
    let mut node = Node::ready(settings(&redis.url())).await;
    let mut reader = node.follow("room", 0).await;
    redis.signal("STOP");
    let results: Vec<_> = (0..100).map(|n| node.publish_later("room", None, &event(n))).collect();
    until("the node notices", || node.readiness.trouble().is_some()).await;
    assert!(matches!(node.try_follow("other", 0).await, Err(BusError::Away(_))));
    // A channel that is followed already is there for others.
    assert_eq!(node.follow("room", 1).await.position, reader.position);
    sleep(Duration::from_secs(5)).await; // the connections are given up meanwhile
    redis.signal("CONT");
    let mut last = EventId(0);
    for result in results {
        last = last.max(timeout(PATIENCE, result).await.unwrap().unwrap().unwrap());
    }
    reader.until(&mut node, last).await;
    assert_eq!(reader.events.len(), 100);
    assert!((0..100).all(|n| reader.count(&mark(n)) == 1));
    assert!(reader.resets.is_empty());
    node.until_ready().await;
}

#[tokio::test]
async fn what_was_never_sent_is_refused_and_what_was_sent_is_unknown() {
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
    until("the node notices", || node.readiness.trouble().is_some()).await;
    assert!(matches!(node.publish("room", &event(2)).await, Err(PublishError::Refused(_))));
}

#[tokio::test]
async fn a_node_starts_without_redis_and_joins_when_it_comes() {
    let mut redis = RedisServer::not_started();
    let mut node = Node::start(settings(&redis.url()));
    until("it has tried", || node.readiness.trouble().is_some_and(|why| why.contains("away"))).await;
    assert!(matches!(node.try_follow("room", 0).await, Err(BusError::Away(_))));
    let result = node.publish_later("room", None, &event(1));
    redis.restart();
    node.until_ready().await;
    let id = timeout(PATIENCE, result).await.unwrap().unwrap().unwrap();
    assert_eq!(node.follow("room", 0).await.position, id);
}

#[tokio::test]
async fn a_durable_redis_is_restarted_without_a_reset() {
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
            last = timeout(PATIENCE, result).await.unwrap().unwrap().unwrap();
        }
        node.until_ready().await;
    }
    reader.until(&mut node, last).await;
    assert!(reader.resets.is_empty());
    assert!((0..150).all(|n| reader.count(&mark(n)) == 1));
    assert_eq!(reader.events.len(), 150);
}

#[tokio::test]
async fn a_copy_that_takes_over_is_announced_even_when_durable() {
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
    until("the copy has it", || head(&copy, "room") == one.0).await;
    copy.raw().command(&["REPLICAOF", "NO", "ONE"]);
    proxy.point_to(copy.port);
    let two = node.publish("room", &event(2)).await;
    let two = match two {
        Ok(id) => id,
        // It met the new run on a retry.
        Err(_) => node.publish("room", &event(2)).await.unwrap(),
    };
    reader.until(&mut node, two).await;
    assert_eq!(reader.resets.len(), 1);
    assert!(two > one);
}

#[tokio::test]
async fn a_redis_that_counts_another_run_with_a_lower_base_is_announced_not_waited_for() {
    let (here, there) = (RedisServer::start(), RedisServer::start());
    let proxy = Proxy::start(there.port).await;
    // `there` anchors first and has counted far beyond; `here` has the higher base.
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
async fn a_demoted_redis_is_left() {
    let (old, new) = (RedisServer::start(), RedisServer::start());
    let proxy = Proxy::start(old.port).await;
    let mut node = Node::ready(settings(&proxy.url())).await;
    let mut reader = node.follow("room", 0).await;
    proxy.close(false);
    // Its connections stay open: only READONLY tells.
    old.raw().command(&["REPLICAOF", "127.0.0.1", &new.port.to_string()]);
    until("the node notices", || node.readiness.trouble().is_some()).await;
    proxy.point_to(new.port);
    node.until_ready().await;
    let id = node.publish("room", &event(1)).await.unwrap();
    reader.until(&mut node, id).await;
    assert_eq!(reader.resets.len(), 1);
}

#[tokio::test]
async fn fcall_publishes_like_a_node() {
    let redis = RedisServer::start();
    let mut node = Node::ready(settings(&redis.url())).await;
    let mut reader = node.follow("room", 0).await;
    let mut raw = redis.raw();
    let mut fcall = |args: &[&str]| {
        let mut command = vec!["FCALL", "fanfare_publish", "1", "fanfare:{room}"];
        command.extend(args);
        raw.command(&command)
    };
    let one = fcall(&["  {\"a\":\r\n1, \"deep\": {\"id\": 1}}\n"]).number() as u64;
    let two = fcall(&["{ }"]).number() as u64;
    let three = fcall(&["{\"text\":\"gr\u{fc}\u{df}e \u{1F600}\"}", "b/o\"b"]).number() as u64;
    assert_eq!((two, three), (one + 1, one + 2));
    reader.until(&mut node, EventId(three)).await;
    assert_eq!(reader.events[0].1, format!("{{\"a\":  1, \"deep\": {{\"id\": 1}},\"id\":{one}}}"));
    assert_eq!(reader.events[1].1, format!("{{ \"id\":{two}}}"));
    let (id, user, text) = &reader.private[0];
    assert_eq!((*id, user.as_str()), (three, "b/o\"b"));
    assert_eq!(
        *text,
        format!("{{\"text\":\"gr\u{fc}\u{df}e \u{1F600}\",\"to\":\"b\\/o\\\"b\",\"id\":{three}}}")
    );

    let long_user = "u".repeat(129);
    let large = format!("{{\"a\":\"{}\"}}", "x".repeat(64 << 10));
    for (args, says) in [
        (&["[1]"][..], "one JSON object"),
        (&["[]"], "one JSON object"),
        (&["7"], "one JSON object"),
        (&["{\"a\":}"], "one JSON object"),
        (&["{\"a\":NaN}"], "one JSON object"),
        (&[""], "one JSON object"),
        (&["{\"id\":null}"], "reserved"),
        (&["{\"to\":\"bob\"}"], "reserved"),
        (&["{\"type\":\"ping\"}"], "control"),
        (&["{\"type\":\"\\u0070ing\"}"], "control"),
        (&["{}", ""], "user id"),
        (&["{}", "a\u{7}b"], "user id"),
        (&["{}", "a\u{85}b"], "user id"),
        (&["{}", &long_user], "user id"),
        (&["{}", "bob", "more"], "for one user"),
        (&[], "JSON object"),
        (&[&large], "--max-message"),
    ] {
        let reply = fcall(args);
        assert!(reply.error().contains(says), "{args:?}: {reply:?}");
    }
    for bytes in [
        &b"{\"a\":\"\xff\"}"[..],
        b"{\"a\":\"\xc0\x80\"}",
        b"{\"a\":\"\xed\xa0\x80\"}",
        b"{\"a\":\"\xf4\x90\x80\x80\"}",
    ] {
        let reply = redis.raw().command(&[b"FCALL", &b"fanfare_publish"[..], b"1", b"fanfare:{room}", bytes]);
        assert!(reply.error().contains("UTF-8"), "{bytes:?}: {reply:?}");
    }
    for key in ["room", "fanfare:room", "fanfare:{}", "fanfare:{a b}", "fanfare:{room}:to"] {
        let reply = redis.raw().command(&["FCALL", "fanfare_publish", "1", key, "{}"]);
        assert!(reply.error().contains("<prefix>:{<channel>}"), "{key}: {reply:?}");
    }
    assert_eq!(head(&redis, "room"), three, "what is refused takes no id");
}

#[tokio::test]
async fn the_bare_channel_works_both_ways() {
    let redis = RedisServer::start();
    let mut node = Node::ready(settings(&redis.url())).await;
    let mut reader = node.follow("ws_broadcast", 0).await;
    let mut other = node.follow("room", 0).await;
    let mut listener = redis.raw();
    listener.command(&["SUBSCRIBE", "ws_broadcast"]);

    let mut raw = redis.raw();
    let said: [&[u8]; 6] =
        [b"{\"a\":1}", b"{\"id\":7}", b"{\"type\":\"reset\"}", b"[1,\n2]", b"hello", b"\xff\"\n"];
    for message in said {
        raw.command(&[&b"PUBLISH"[..], b"ws_broadcast", message]);
        listener.next_message();
    }
    raw.command(&["PUBLISH", "ws_broadcast", &"x".repeat((64 << 10) + 1)]);
    listener.next_message();
    raw.command(&["PUBLISH", "room", "{\"b\":1}"]); // no bare channel
    reader.until_it(&mut node, |reader| reader.raw.len() == 6).await;
    assert_eq!(
        reader.raw,
        [
            "{\"a\":1}",
            "{\"data\":{\"id\":7}}",
            "{\"data\":{\"type\":\"reset\"}}",
            "{\"data\":[1, 2]}",
            "{\"data\":\"hello\"}",
            "{\"data\":\"\u{fffd}\\\"\\n\"}",
        ]
    );

    // Whoever listens there sees sequenced events, but none that is for one user.
    let private = node.publish_later("ws_broadcast", Some("bob"), "{\"to\":\"bob\",\"psst\":1}");
    let id = node.publish("ws_broadcast", &event(1)).await.unwrap();
    let by_function = raw.command(&["FCALL", "fanfare_publish", "1", "fanfare:{ws_broadcast}", "{}", "bob"]);
    let last =
        raw.command(&["FCALL", "fanfare_publish", "1", "fanfare:{ws_broadcast}", "{}"]).number() as u64;
    let secret = timeout(PATIENCE, private).await.unwrap().unwrap().unwrap();
    assert_eq!(listener.next_message().1, format!("\t{{\"n\":\"<1>\",\"id\":{id}}}"));
    assert_eq!(listener.next_message().1, format!("\t{{\"id\":{last}}}"));
    reader.until(&mut node, EventId(last)).await;
    assert_eq!(reader.raw.len(), 6, "the node does not take its own copies for messages");
    assert_eq!(reader.private.len(), 2);
    assert_eq!((reader.private[0].0, reader.private[0].1.as_str()), (secret.0, "bob"));
    assert_eq!(reader.private[1].0 as i64, by_function.number());
    assert_eq!(node.numbers.oversized.get(), 1);
    let id = node.publish("room", &event(2)).await.unwrap();
    other.until(&mut node, id).await;
    assert!(other.raw.is_empty());
}

#[tokio::test]
async fn a_hole_beyond_history_is_a_reset_and_then_goes_on() {
    let redis = RedisServer::start();
    let proxy = Proxy::start(redis.port).await;
    let short = |url: &str| {
        let mut settings = settings(url);
        settings.history = 1000;
        settings
    };
    let publisher = Node::ready(short(&redis.url())).await;
    let mut node = Node::ready(short(&proxy.url())).await;
    let mut reader = node.follow("room", 0).await;
    let one = publisher.publish("room", &event(1)).await.unwrap();
    reader.until(&mut node, one).await;
    proxy.close(true);
    let results: Vec<_> = (0..3000).map(|n| publisher.publish_later("room", None, &event(n))).collect();
    let mut last = EventId(0);
    for result in results {
        last = timeout(PATIENCE, result).await.unwrap().unwrap().unwrap();
    }
    proxy.close(false);
    reader.until(&mut node, last).await;
    assert_eq!(reader.resets.len(), 1);
    assert!(last.0 - reader.resets[0] >= 1000, "at least --history events are kept");
    assert!(last.0 - reader.resets[0] < 2000, "and not many more");
}

#[tokio::test]
async fn a_part_of_a_page_is_read_once_for_all_who_ask() {
    let redis = RedisServer::start();
    let mut node = Node::ready(settings(&redis.url())).await;
    let reader = node.follow("room", 0).await;
    // Whole pages are wanted, so the first is filled up.
    let mut last = reader.position;
    let pad = "x".repeat(16 << 10);
    let target = EventId((last.0 / PAGE + 2) * PAGE - 1 + 10);
    let mut results = Vec::new();
    for n in 0..(target.0 - last.0) as usize {
        let to = (n % 50 == 3).then_some("bob");
        results.push(node.publish_later("room", to, &format!("{{\"n\":\"<{n}>\",\"pad\":\"{pad}\"}}")));
    }
    for result in results {
        last = timeout(PATIENCE, result).await.unwrap().unwrap().unwrap();
    }
    assert_eq!(last, target);
    let page = target.0 / PAGE - 1;
    let (begin, end) = (page_after(page), page_after(page + 1));
    let before = node.numbers.reads.get();
    let mut at = begin;
    while at < end {
        for _ in 0..10 {
            node.ask_page("room", at, 0);
            node.ask_page("room", at, 1);
        }
        let mut reached = at;
        for shard in [0, 1].repeat(10) {
            let part = node.page_told(at, shard).await.unwrap();
            assert_eq!((part.base, part.oldest, part.head), (reader.base, reader.base.next(), last));
            assert_eq!(part.entries[0].before(), at);
            assert!(part.entries.windows(2).all(|pair| pair[0].last == pair[1].before()));
            reached = part.entries.last().unwrap().last;
        }
        assert!(at < reached && reached <= end);
        at = reached;
    }
    // 256 events of 16 KiB are 4 MiB and come in parts of a bit more than one.
    let reads = node.numbers.reads.get() - before;
    assert!((3..=4).contains(&reads), "{reads} reads for one page");
    let tail = node.page("room", page + 1, 0).await.unwrap();
    assert_eq!((tail.head, tail.entries.last().unwrap().last), (last, last));
    let empty = node.page("room", page + 100, 0).await.unwrap();
    assert!(empty.entries.is_empty());
}

#[tokio::test]
async fn a_look_hands_out_what_is_new_before_it_answers() {
    let redis = RedisServer::start();
    let mut node = Node::ready(settings(&redis.url())).await;
    let mut reader = node.follow("room", 0).await;
    node.follow("room", 1).await;
    // Written behind everyone's back, as if every message had been lost.
    let id = reader.position.0 + 1;
    redis.raw().command(&[
        "XADD",
        "fanfare:{room}:events",
        &format!("{id}-0"),
        "e",
        &format!("{{\"id\":{id}}}"),
    ]);
    redis.raw().command(&["HSET", "fanfare:{room}:meta", "head", &id.to_string()]);
    for shard in [0, 1, 0] {
        node.ask_look("room", shard);
    }
    for shard in [0, 1, 0] {
        let mut entry_came = false;
        let looked = node
            .told(shard, |told| match told {
                ToShard::Entry { entry, .. } => {
                    assert_eq!(entry.last.0, id);
                    entry_came = true;
                    None
                }
                ToShard::Looked { result, .. } => Some(result.clone()),
                _ => None,
            })
            .await;
        assert_eq!(looked, Ok(()));
        assert!(entry_came, "what is new comes before the answer");
    }
    reader.until(&mut node, EventId(id)).await;
    assert_eq!(reader.events.len(), 1);
}

#[tokio::test]
async fn an_acl_that_refuses_is_told_in_words() {
    let redis = RedisServer::start();
    let mut raw = redis.raw();
    raw.command(&["ACL", "SETUSER", "node", "on", ">secret", "~*", "+@all", "resetchannels"]);
    let url = format!("redis://node:secret@127.0.0.1:{}", redis.port);
    let mut node = Node::start(settings(&url));
    until("it says what is missing", || {
        node.readiness.trouble().is_some_and(|why| why.contains("SUBSCRIBE") && why.contains("&fanfare:*"))
    })
    .await;
    let refusal = node.try_follow("room", 0).await.unwrap_err();
    assert!(refusal.to_string().contains("SUBSCRIBE"), "{refusal}");
    raw.command(&["ACL", "SETUSER", "node", "&fanfare:*"]);
    until("now the bare channel is missing", || {
        node.readiness.trouble().is_some_and(|why| why.contains("SUBSCRIBE ws_broadcast"))
    })
    .await;
    raw.command(&["ACL", "SETUSER", "node", "&ws_broadcast"]);
    node.until_ready().await;
    node.follow("room", 0).await;
    // Exactly what the text asks for is enough.
    raw.command(&["ACL", "SETUSER", "least", "on", ">secret", "~fanfare:*", "&fanfare:*", "&ws_broadcast"]);
    let granted = ["+@read", "+@write", "+@pubsub", "+@scripting", "+@connection", "+info", "+time"];
    raw.command(&[&["ACL", "SETUSER", "least"][..], &granted].concat());
    let mut least = Node::ready(settings(&format!("redis://least:secret@127.0.0.1:{}", redis.port))).await;
    let mut reader = least.follow("ws_broadcast", 0).await;
    let id = least.publish("ws_broadcast", &event(1)).await.unwrap();
    reader.until(&mut least, id).await;
    // Taken away while it runs: not silence.
    raw.command(&["ACL", "SETUSER", "node", "resetchannels"]);
    until("the node notices", || node.readiness.trouble().is_some_and(|why| why.contains("SUBSCRIBE"))).await;
}

#[tokio::test]
async fn out_of_memory_refuses_events_and_nothing_else() {
    let redis = RedisServer::start();
    let mut node = Node::ready(settings(&redis.url())).await;
    let mut reader = node.follow("room", 0).await;
    node.publish("room", &event(0)).await.unwrap();
    redis.raw().command(&["CONFIG", "SET", "maxmemory", "1"]);
    match node.publish("room", &event(1)).await {
        Err(PublishError::Refused(why)) => assert!(why.starts_with("OOM"), "{why}"),
        other => panic!("{other:?}"),
    }
    let other = node.follow("other", 1).await;
    node.page("other", other.position.0 / PAGE, 1).await.unwrap();
    redis.raw().command(&["CONFIG", "SET", "maxmemory", "0"]);
    let id = node.publish("room", &event(2)).await.unwrap();
    reader.until(&mut node, id).await;
    assert_eq!((reader.events.len(), reader.count(&mark(1))), (2, 0));
    assert_eq!(node.numbers.refused.get(), 1);
}

#[tokio::test]
async fn a_forgotten_script_is_sent_again() {
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
async fn a_hint_of_an_event_that_is_not_there_is_forgotten() {
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
async fn a_cluster_is_refused_in_words() {
    let bus_port = redis_server::free_port().to_string();
    let redis =
        RedisServer::start_with(&["--save", "", "--cluster-enabled", "yes", "--cluster-port", &bus_port]);
    let node = Node::start(settings(&redis.url()));
    let end = timeout(PATIENCE, node.task).await.unwrap().unwrap();
    assert!(end.unwrap_err().to_string().contains("cluster"));
}

#[tokio::test]
async fn no_more_channels_than_allowed_are_followed() {
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
    assert_eq!(node.numbers.channels.get(), 2);
}

#[tokio::test]
async fn history_is_emptied_after_its_time_and_the_sequence_goes_on() {
    let redis = RedisServer::start();
    let proxy = Proxy::start(redis.port).await;
    let brief = |url: &str| {
        let mut settings = settings(url);
        settings.history_ttl = Duration::from_millis(700);
        settings
    };
    let mut publisher = Node::ready(brief(&redis.url())).await;
    let mut stays = publisher.follow("room", 0).await;
    let mut node = Node::ready(brief(&proxy.url())).await;
    let mut misses = node.follow("room", 0).await;
    proxy.close(true);
    let one = publisher.publish("room", &event(1)).await.unwrap();
    stays.until(&mut publisher, one).await;
    let gone = || redis.raw().command(&["EXISTS", "fanfare:{room}:events"]) == Reply::Number(0);
    until("the history is emptied", gone).await;
    sleep(Duration::from_secs(2)).await; // twice the time is over too, but the channel is followed
    let page = publisher.page("room", one.0 / PAGE, 0).await.unwrap();
    assert_eq!((page.base, page.head, page.oldest), (stays.base, one, one.next()));
    proxy.close(false);
    misses.until_it(&mut node, |reader| !reader.resets.is_empty()).await;
    assert_eq!(misses.resets, [one.0]);
    let two = publisher.publish("room", &event(2)).await.unwrap();
    assert_eq!(two, one.next());
    stays.until(&mut publisher, two).await;
    misses.until(&mut node, two).await;
    assert!(stays.resets.is_empty());
    // Without a follower the sequence goes the same way.
    publisher.unfollow(stays);
    node.unfollow(misses);
    let gone = || redis.raw().command(&["EXISTS", "fanfare:{room}:meta"]) == Reply::Number(0);
    until("the sequence is forgotten", gone).await;
}

#[tokio::test]
async fn a_lost_last_event_is_found_among_more_channels_than_one_canary_compares() {
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
    assert_eq!(node.numbers.canary_seconds.get(), 2);
    assert_eq!(node.numbers.channels.get(), 1500);
}

#[tokio::test]
async fn joining_and_leaving_during_a_stream_misses_and_doubles_nothing() {
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
            ids.push(timeout(PATIENCE, result).await.unwrap().unwrap().unwrap());
        }
        let start = reader.position;
        reader.until(&mut node, *ids.last().unwrap()).await; // checks that none is missing or double
        assert!(reader.resets.is_empty());
        for (n, id) in ids.iter().enumerate().filter(|(_, id)| **id > start) {
            reader.assert_has(*id, &mark(n));
        }
        if round % 2 == 0 {
            node.unfollow(reader);
        }
        // An odd round leaves the shard following; the next Follow is answered where the channel stands.
    }
    let id = publisher.publish("other", &event(1)).await.unwrap();
    stays.until(&mut node, id).await;
}

#[tokio::test]
async fn a_unix_socket_and_another_prefix_work_too() {
    let redis = RedisServer::start_with(&["--save", "", "--unixsocket", "redis.sock"]);
    let mut elsewhere = settings(&format!("redis+unix://{}", redis.dir.join("redis.sock").display()));
    elsewhere.redis_prefix = "app:one".into();
    let mut node = Node::ready(elsewhere).await;
    let mut reader = node.follow("ws_broadcast", 0).await;
    let mut other = Node::ready(settings(&redis.url())).await;
    let mut stranger = other.follow("ws_broadcast", 0).await;
    let one = node.publish("ws_broadcast", &event(1)).await.unwrap();
    let two =
        redis.raw().command(&["FCALL", "fanfare_publish", "1", "app:one:{ws_broadcast}", "{}"]).number();
    reader.until(&mut node, EventId(two as u64)).await;
    reader.assert_has(one, &mark(1));
    let own = other.publish("ws_broadcast", &event(2)).await.unwrap();
    stranger.until(&mut other, own).await;
    assert_eq!((stranger.events.len(), stranger.count(&mark(1))), (1, 0), "another prefix is another world");
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
    until("the copy has it", || head(&second, "room") == one.0).await;
    first.kill();
    until("the node notices", || node.readiness.trouble().is_some()).await;
    node.until_ready().await;
    let two = node.publish("room", &event(2)).await.unwrap();
    reader.until(&mut node, two).await;
    assert_eq!(reader.resets.len(), 1);
    assert_eq!(head(&second, "room"), two.0);
}

#[tokio::test]
async fn a_restart_that_lost_acknowledged_events_gives_none_of_their_ids_again() {
    let mut redis = RedisServer::start_with(&["--save", "", "--dbfilename", "dump.rdb"]);
    let mut node = Node::ready(settings(&redis.url())).await;
    let mut reader = node.follow("room", 0).await;
    let kept = node.publish("room", &event(1)).await.unwrap();
    assert_eq!(redis.raw().command(&["SAVE"]), Reply::Text("OK".into()));
    let lost = node.publish("room", &event(2)).await.unwrap();
    reader.until(&mut node, lost).await;
    redis.restart();
    assert_eq!(head(&redis, "room"), kept.0, "Redis is back with what it had saved");
    // Another program comes first: it knows nothing of what was seen.
    let mut raw = redis.raw();
    let fcall = ["FCALL", "fanfare_publish", "1", "fanfare:{room}", "{\"n\":\"<3>\"}"];
    let next = match raw.command(&fcall) {
        Reply::Number(id) => id as u64,
        _ => {
            // The function was lost with the rest; the nodes load it again.
            node.until_ready().await;
            raw.command(&fcall).number() as u64
        }
    };
    assert!(next > lost.0);
    reader.until(&mut node, EventId(next)).await;
    assert_eq!(reader.resets.len(), 1);
    reader.assert_has(EventId(next), &mark(3));
    // History does not reach back over the new anchor.
    let page = node.page("room", next / PAGE, 0).await.unwrap();
    assert!(page.base > lost && page.oldest > page.base);
}

#[tokio::test]
async fn a_head_behind_what_was_seen_is_a_new_run() {
    let redis = RedisServer::start();
    let mut node = Node::ready(settings(&redis.url())).await;
    let mut reader = node.follow("room", 0).await;
    for n in 0..5 {
        node.publish("room", &event(n)).await.unwrap();
    }
    let last = node.publish("room", &event(5)).await.unwrap();
    reader.until(&mut node, last).await;
    // As a Redis that is called durable and is not: it has an earlier state, and counts as if nothing had been.
    let mut raw = redis.raw();
    raw.command(&["HSET", "fanfare:{room}:meta", "head", &(last.0 - 3).to_string()]);
    raw.command(&["XTRIM", "fanfare:{room}:events", "MAXLEN", "0"]);
    let next = node.publish("room", &event(6)).await.unwrap();
    assert!(next > last);
    reader.until(&mut node, next).await;
    assert_eq!(reader.resets.len(), 1);
}

#[tokio::test]
async fn a_burst_arrives_whole() {
    let redis = RedisServer::start();
    let mut node = Node::ready(settings(&redis.url())).await;
    let mut reader = node.follow("room", 0).await;
    // The node shares this thread, so that it takes nothing until the burst is over. Then there are more messages than
    // it buffers; how many of them it loses and reads from history depends on how fast Redis sends them.
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
async fn what_someone_deletes_from_a_stream_is_announced() {
    let redis = RedisServer::start();
    let proxy = Proxy::start(redis.port).await;
    let publisher = Node::ready(settings(&redis.url())).await;
    let mut node = Node::ready(settings(&proxy.url())).await;
    let mut reader = node.follow("room", 0).await;
    proxy.close(true);
    let mut ids = Vec::new();
    for n in 0..10 {
        ids.push(publisher.publish("room", &event(n)).await.unwrap());
    }
    for id in &ids[4..6] {
        redis.raw().command(&["XDEL", "fanfare:{room}:events", &format!("{id}-0")]);
    }
    proxy.close(false);
    reader.until(&mut node, ids[9]).await;
    assert_eq!(reader.resets, [ids[5].0]);
    assert_eq!(reader.events.len(), 8);
}
