//! Invalid data in one channel affects only that channel, and ids stay below 2^53 whatever is
//! stored.

use fanfare::bus::PublishError;
use fanfare::protocol::event::EventId;

use super::node::{Node, event, mark, settings, until};
use super::redis_server::RedisServer;

/// Waits for two more probes, of which the second started after this call.
async fn two_probes(node: &Node) {
    let probes = || node.metrics.round_trips.count();
    let before = probes();
    until("two probes", || probes() >= before + 2).await;
}

#[tokio::test]
async fn keys_of_a_wrong_type_affect_one_channel() {
    let redis = RedisServer::start();
    let mut node = Node::ready(settings(&redis.url())).await;
    let mut raw = redis.raw();
    for key in ["meta", "events"] {
        let (broken, works) = (format!("broken.{key}"), format!("works.{key}"));
        let mut reader = node.follow(&broken, 0).await;
        let mut other = node.follow(&works, 0).await;
        let one = node.publish(&broken, &event(1)).await.unwrap();
        reader.until(&mut node, one).await;
        let name = format!("fanfare:{{{broken}}}:{key}");
        raw.command(&["DEL", &name]);
        raw.command(&["SET", &name, "x"]);
        two_probes(&node).await;
        assert_eq!(node.readiness.not_ready_reason(), None);
        node.follow(&format!("joined.{key}"), 0).await;
        let id = node.publish(&works, &event(1)).await.unwrap();
        other.until(&mut node, id).await;
        match node.publish(&broken, &event(2)).await {
            Err(PublishError::Rejected(why)) => assert!(why.contains("this channel's data"), "{why}"),
            other => panic!("{other:?}"),
        }
        let fcall = raw.command(&["FCALL", "fanfare_publish", "1", &format!("fanfare:{{{broken}}}"), "{}"]);
        assert!(fcall.error().starts_with(&format!("FAULT {name}: ")), "{fcall:?}");
        // A node that does not know the channel yet answers just as clearly, and at once.
        let fresh = Node::ready(settings(&redis.url())).await;
        match fresh.publish(&broken, &event(2)).await {
            Err(PublishError::Rejected(why)) => assert!(why.contains("this channel's data"), "{why}"),
            other => panic!("{other:?}"),
        }
        raw.command(&["DEL", &name]);
        let three = node.publish(&broken, &event(3)).await.unwrap();
        assert!(three > one);
        reader.until(&mut node, three).await;
        reader.assert_has(three, &mark(3));
        assert_eq!(reader.count(&mark(2)), 0);
    }
}

#[tokio::test]
async fn other_keys_of_a_wrong_type_stop_no_channel() {
    let redis = RedisServer::start();
    let mut node = Node::ready(settings(&redis.url())).await;
    let mut reader = node.follow("room", 0).await;
    node.publish("room", &event(1)).await.unwrap();
    let mut raw = redis.raw();
    raw.command(&["DEL", "fanfare:epoch"]);
    raw.command(&["SET", "fanfare:epoch", "x"]);
    let two = node.publish("room", &event(2)).await.unwrap();
    reader.until(&mut node, two).await;
    two_probes(&node).await;
    assert_eq!((node.readiness.not_ready_reason(), reader.resets.len()), (None, 0));
    // An idempotency key of a wrong type rejects the publish that uses it, with certainty.
    raw.command(&["LPUSH", "fanfare:{room}:key:k", "x"]);
    let fcall = raw.command(&["FCALL", "fanfare_publish", "1", "fanfare:{room}", "{}", "", "k"]);
    assert!(fcall.error().starts_with("FAULT fanfare:{room}:key:k: "), "{fcall:?}");
    assert_eq!(redis.head("room"), two.0);
}

#[tokio::test]
async fn invalid_positions_count_as_lost() {
    let redis = RedisServer::start();
    let mut node = Node::ready(settings(&redis.url())).await;
    let mut raw = redis.raw();
    let limit = EventId::LIMIT.to_string();
    let heads = ["x", "", "-5", "1.5", "1e300", "inf", "nan", "-inf", "18446744073709551616", &limit];
    for (n, head) in heads.iter().enumerate() {
        // By a node that knows the channel, by its probe, and by FCALL, which knows nothing.
        for way in ["publish", "probe", "fcall"] {
            let name = format!("room.{n}.{way}");
            let (meta, key) = (format!("fanfare:{{{name}}}:meta"), format!("fanfare:{{{name}}}"));
            let mut reader = node.follow(&name, 0).await;
            let one = node.publish(&name, &event(1)).await.unwrap();
            reader.until(&mut node, one).await;
            raw.command(&["HSET", &meta, "head", head]);
            let two = match way {
                "publish" => node.publish(&name, &event(2)).await.unwrap().0,
                "probe" => {
                    reader.until_it(&mut node, |reader| !reader.resets.is_empty()).await;
                    node.publish(&name, &event(2)).await.unwrap().0
                }
                _ => raw.command(&["FCALL", "fanfare_publish", "1", &key, &event(2)]).number() as u64,
            };
            assert!(one.0 < two && two < EventId::LIMIT, "{head:?} by {way}: {two} after {one}");
            reader.until(&mut node, EventId(two)).await;
            reader.assert_has(EventId(two), &mark(2));
            assert_eq!(reader.resets.len(), 1, "{head:?} by {way}");
        }
    }
    for base in ["9007199254740991", "x", "0.5", "inf"] {
        let name = format!("base.{base}");
        let mut reader = node.follow(&name, 0).await;
        let one = node.publish(&name, &event(1)).await.unwrap();
        raw.command(&["HSET", &format!("fanfare:{{{name}}}:meta"), "base", base]);
        let two = node.publish(&name, &event(2)).await.unwrap();
        assert!(one < two && two.0 < EventId::LIMIT, "{base}: {two} after {one}");
        reader.until(&mut node, two).await;
    }
    assert_eq!(node.readiness.not_ready_reason(), None);
}

#[tokio::test]
async fn head_behind_the_stream_gets_a_new_base() {
    let redis = RedisServer::start();
    let node = Node::ready(settings(&redis.url())).await;
    let one = node.publish("room", &event(1)).await.unwrap();
    let two = node.publish("room", &event(2)).await.unwrap();
    let mut raw = redis.raw();
    raw.command(&["HSET", "fanfare:{room}:meta", "head", &one.0.to_string()]);
    let mut fcall = || raw.command(&["FCALL", "fanfare_publish", "1", "fanfare:{room}", "{}"]);
    let rejected = fcall();
    assert!(rejected.error().starts_with("FAULT fanfare:{room}:events: "), "{rejected:?}");
    assert!(fcall().number() as u64 > two.0);
}

#[tokio::test]
async fn ids_end_below_the_limit_with_a_clear_error() {
    let redis = RedisServer::start();
    let mut node = Node::ready(settings(&redis.url())).await;
    let mut reader = node.follow("room", 0).await;
    let mut other = node.follow("other", 0).await;
    let last = EventId::LIMIT - 1;
    let mut raw = redis.raw();
    raw.command(&["HSET", "fanfare:{room}:meta", "head", &(last - 1).to_string()]);
    assert_eq!(node.publish("room", &event(1)).await, Ok(EventId(last)));
    reader.until(&mut node, EventId(last)).await;
    for _ in 0..2 {
        assert!(matches!(node.publish("room", &event(2)).await, Err(PublishError::Rejected(_))));
        let fcall = raw.command(&["FCALL", "fanfare_publish", "1", "fanfare:{room}", "{}"]);
        assert!(fcall.error().contains("fanfare:{room}:meta: no ids are left below 2^53"), "{fcall:?}");
        two_probes(&node).await;
        assert_eq!(node.readiness.not_ready_reason(), None);
        let id = node.publish("other", &event(1)).await.unwrap();
        other.until(&mut node, id).await;
        // The advice of the error, followed too early: a node still knows the last id.
        raw.command(&["DEL", "fanfare:{room}:meta", "fanfare:{room}:events"]);
        two_probes(&node).await;
    }
    assert_eq!(reader.count(&mark(2)), 0);
    // No node knows it any more.
    let fresh = Node::ready(settings(&redis.url())).await;
    node.task.abort();
    raw.command(&["DEL", "fanfare:{room}:meta", "fanfare:{room}:events"]);
    assert!(fresh.publish("room", &event(3)).await.unwrap().0 < last);
}
