//! Messages in inboxes: answers are true, and nothing is stored twice.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::time::Duration;

use fanfare::bus::PublishError;
use fanfare::config::Settings;
use fanfare::protocol::inbox::MessageId;
use fanfare::protocol::pattern::ChannelPattern;
use tokio::time::timeout;

use super::node::{Node, event, mark, message_id, settings, until};
use super::redis_server::{Proxy, RedisServer, Reply, TIMEOUT};

/// The messages in the inbox of a channel: id and fields.
fn messages(redis: &RedisServer, name: &str) -> Vec<(String, HashMap<String, String>)> {
    let reply = redis.raw().command(&["XRANGE", &stream(name), "-", "+"]);
    let Reply::List(entries) = reply else { panic!("not a stream: {reply:?}") };
    let fields = |reply: &Reply| {
        let list = reply.list();
        list.chunks(2).map(|pair| (pair[0].clone(), pair[1].clone())).collect()
    };
    entries
        .iter()
        .map(|entry| match entry {
            Reply::List(parts) => (parts[0].text().to_owned(), fields(&parts[1])),
            other => panic!("not an entry: {other:?}"),
        })
        .collect()
}

fn stream(name: &str) -> String {
    format!("fanfare:{{{name}}}:inbox")
}

fn length(redis: &RedisServer, name: &str) -> i64 {
    redis.raw().command(&["XLEN", &stream(name)]).number()
}

/// Cuts the connections of the node, whose answers the proxy swallows, so that the node calls again.
/// Does something in between.
async fn lose_answers<T>(proxy: &Proxy, node: &Node, between: impl FnOnce() -> T) {
    proxy.close(true);
    until("the node has lost Redis", || node.readiness.not_ready_reason().is_some()).await;
    between();
    proxy.swallow(false);
    proxy.close(false);
}

#[tokio::test]
async fn messages_are_stored_and_not_broadcast() {
    let redis = RedisServer::start();
    let mut node = Node::ready(settings(&redis.url())).await;
    let mut reader = node.follow("desk", 0).await;
    let first = node.store("desk", "alice", Some("k:1"), &event(1)).await.unwrap();
    let second = node.store("desk", "bob", None, &event(2)).await.unwrap();
    let published = node.publish("desk", &event(3)).await.unwrap();
    reader.until(&mut node, published).await;
    assert_eq!(reader.events.len(), 1, "only the event is broadcast");
    let stored = messages(&redis, "desk");
    assert_eq!(
        stored.iter().map(|(id, _)| id.clone()).collect::<Vec<_>>(),
        [first, second].map(|id| id.to_string())
    );
    let field = |at: usize, name: &str| stored[at].1.get(name).cloned();
    assert_eq!(field(0, "user").as_deref(), Some("alice"));
    assert_eq!(field(0, "channel").as_deref(), Some("desk"));
    assert_eq!(field(0, "event"), Some(event(1)));
    let time: u64 = field(0, "time").unwrap().parse().unwrap();
    assert!(time.abs_diff(first.time) < 1000, "{time} {first}");
    assert_eq!(field(0, "key").as_deref(), Some("k:1"));
    assert_eq!((field(1, "key"), field(1, "to")), (None, None));
}

#[tokio::test]
async fn lost_answers_of_messages_double_nothing() {
    let redis = RedisServer::start();
    let proxy = Proxy::start(redis.port).await;
    let node = Node::ready(settings(&proxy.url())).await;
    node.store("desk", "a", None, &event(99)).await.expect("the node knows the channel then");
    for round in 0..5 {
        // The second is a duplicate of the first, the third has no key.
        proxy.swallow(true);
        let key = format!("k{round}");
        let results =
            [Some(&*key), Some(&*key), None].map(|key| node.store_later("desk", "a", key, &event(round)));
        until("Redis has the messages", || length(&redis, "desk") == 2 * round as i64 + 3).await;
        lose_answers(&proxy, &node, || ()).await;
        let mut ids = Vec::new();
        for result in results {
            let id =
                timeout(TIMEOUT, result).await.unwrap().unwrap().expect("the retry gets the first answer");
            ids.push(message_id(id).to_string());
        }
        let stored: Vec<_> = messages(&redis, "desk").into_iter().map(|(id, _)| id).collect();
        assert_eq!(ids[0], ids[1]);
        assert_eq!(stored[2 * round + 1..], [ids[0].clone(), ids[2].clone()]);
        node.until_ready().await;
    }
}

#[tokio::test]
async fn message_retry_on_a_wiped_redis_is_unknown() {
    let redis = RedisServer::start();
    let proxy = Proxy::start(redis.port).await;
    let mut node = Node::ready(settings(&proxy.url())).await;
    let mut reader = node.follow("desk", 0).await;
    proxy.swallow(true);
    let result = node.store_later("desk", "a", Some("k"), &event(1));
    until("Redis has the message", || length(&redis, "desk") == 1).await;
    lose_answers(&proxy, &node, || redis.raw().command(&["FLUSHALL"])).await;
    assert_eq!(timeout(TIMEOUT, result).await.unwrap().unwrap(), Err(PublishError::Unknown));
    reader.until_it(&mut node, |reader| reader.resets.len() == 1).await;
    // The client's retry is safe.
    let again = node.store("desk", "a", Some("k"), &event(1)).await.unwrap();
    assert_eq!(node.store("desk", "a", Some("k"), &event(1)).await, Ok(again));
    assert_eq!(length(&redis, "desk"), 1);
}

#[tokio::test]
async fn keys_belong_to_their_user() {
    let redis = RedisServer::start();
    let node = Node::ready(settings(&redis.url())).await;
    let same = [("a", "b:c"), ("a:b", "c"), ("a", "c"), ("1:a", "c")];
    for round in 0..2 {
        for (user, key) in same {
            node.store("desk", user, Some(key), &event(round)).await.unwrap();
        }
    }
    assert_eq!(length(&redis, "desk"), same.len() as i64);
    // Another channel has other keys.
    node.store("other", "a", Some("c"), &event(1)).await.unwrap();
    assert_eq!(length(&redis, "other"), 1);
    let remembered = redis.raw().command(&["PTTL", "fanfare:{desk}:inbox:key:1:a:c"]).number();
    assert!((590_000..=600_000).contains(&remembered), "{remembered} ms");
}

#[tokio::test]
async fn full_inbox_rejects_until_messages_are_deleted() {
    let redis = RedisServer::start();
    let node = Node::ready(Settings { inbox_max: 3, ..settings(&redis.url()) }).await;
    let results: Vec<_> =
        (0..5).map(|n| node.store_later("desk", "a", Some(&format!("k{n}")), &event(n))).collect();
    let mut ids = Vec::new();
    for result in results {
        ids.push(timeout(TIMEOUT, result).await.unwrap().unwrap().map(message_id));
    }
    let stored: Vec<MessageId> = ids[..3].iter().map(|id| id.clone().unwrap()).collect();
    assert_eq!(ids[3..], [Err(PublishError::Full), Err(PublishError::Full)]);
    // A message that is stored already is no new one.
    assert_eq!(node.store("desk", "a", Some("k1"), &event(1)).await, Ok(stored[1]));
    assert_eq!(node.store("desk", "a", Some("k4"), &event(4)).await, Err(PublishError::Full));
    redis.raw().command(&["XDEL", &stream("desk"), &stored[0].to_string()]);
    assert!(node.store("desk", "a", Some("k4"), &event(4)).await.is_ok());
    assert_eq!(node.store("desk", "a", None, &event(5)).await, Err(PublishError::Full));
    assert_eq!(node.publish("desk", &event(6)).await.map(|_| ()), Ok(()), "events are not messages");
}

#[tokio::test]
async fn a_full_inbox_answers_a_retry_alike() {
    let redis = RedisServer::start();
    let proxy = Proxy::start(redis.port).await;
    let node = Node::ready(Settings { inbox_max: 2, ..settings(&proxy.url()) }).await;
    node.store("desk", "a", Some("known"), &event(0)).await.unwrap();
    proxy.swallow(true);
    let keys = [None, Some("known"), None, Some("new")];
    let results = keys.map(|key| node.store_later("desk", "a", key, &event(1)));
    until("Redis has a message", || length(&redis, "desk") == 2).await;
    let first = messages(&redis, "desk")[0].0.clone();
    lose_answers(&proxy, &node, || redis.raw().command(&["XDEL", &stream("desk"), &first])).await;
    let mut answers = Vec::new();
    for result in results {
        answers.push(timeout(TIMEOUT, result).await.unwrap().unwrap().map(message_id));
    }
    let [(left, _)] = &messages(&redis, "desk")[..] else { panic!("one is left") };
    assert_eq!(answers[0].as_ref().unwrap().to_string(), *left);
    assert!(answers[1].is_ok());
    assert_eq!(answers[2..], [Err(PublishError::Full), Err(PublishError::Full)]);
}

#[tokio::test]
async fn messages_of_a_wrong_key_type_are_a_fault() {
    let redis = RedisServer::start();
    let node = Node::ready(settings(&redis.url())).await;
    redis.raw().command(&["SET", &stream("desk"), "x"]);
    match node.store("desk", "a", None, &event(1)).await {
        Err(PublishError::Rejected(why)) => assert!(why.contains("this channel's data"), "{why}"),
        other => panic!("{other:?}"),
    }
    assert!(node.store("other", "a", None, &event(1)).await.is_ok());
    assert!(node.publish("desk", &event(2)).await.is_ok());
}

#[tokio::test]
async fn messages_and_events_share_a_channel() {
    let redis = RedisServer::start();
    let mut node = Node::ready(settings(&redis.url())).await;
    let mut reader = node.follow("desk", 0).await;
    let (mut stored, mut published) = (Vec::new(), Vec::new());
    for n in 0..600 {
        match n % 3 {
            0 => published.push(node.publish_later("desk", None, &event(n))),
            _ => stored.push(node.store_later("desk", "a", None, &event(n))),
        }
        if n % 150 == 70 {
            redis.raw().command(&["CLIENT", "KILL", "TYPE", "normal"]);
        }
        tokio::task::yield_now().await;
    }
    let mut last = fanfare::protocol::event::EventId(0);
    for result in published {
        last = last.max(timeout(TIMEOUT, result).await.unwrap().unwrap().unwrap());
    }
    for result in stored {
        timeout(TIMEOUT, result).await.unwrap().unwrap().expect("Redis kept everything");
    }
    reader.until(&mut node, last).await;
    assert!(reader.resets.is_empty());
    assert!((0..600).all(|n| reader.count(&mark(n)) == usize::from(n % 3 == 0)));
    assert_eq!(length(&redis, "desk"), 400);
}

#[tokio::test]
async fn messages_keep_the_numbers_of_calls() {
    let redis = RedisServer::start();
    let node = Node::ready(settings(&redis.url())).await;
    node.store("desk", "a", None, &event(1)).await.unwrap();
    let mut raw = redis.raw();
    raw.command(&["PEXPIRE", "fanfare:{desk}:meta", "5000"]);
    node.store("desk", "a", None, &event(2)).await.unwrap();
    let left = Duration::from_millis(raw.command(&["PTTL", "fanfare:{desk}:meta"]).number() as u64);
    assert!(left > Duration::from_secs(590), "{left:?}");
}

#[tokio::test]
async fn empty_inboxes_of_a_prefix_expire() {
    let redis = RedisServer::start();
    let inbox = ["kept", "desk.*"].map(|text| ChannelPattern::parse(text).unwrap()).into();
    let max_channels = NonZeroUsize::new(2).unwrap();
    let node = Node::ready(Settings { inbox, max_channels, ..settings(&redis.url()) }).await;
    let first = node.store("desk.1", "a", None, &event(1)).await.unwrap();
    let second = node.store("desk.2", "a", None, &event(2)).await.unwrap();
    let kept = node.store("kept", "a", None, &event(3)).await.unwrap();
    assert_eq!(node.store("desk.3", "a", None, &event(4)).await, Err(PublishError::Full), "too many inboxes");
    until("the messages are counted", || node.metrics.inbox_messages.get() == 3).await;
    assert_eq!((node.metrics.inboxes.get(), node.metrics.inbox_stored.get()), (3, 3));
    let mut raw = redis.raw();
    for (name, id) in [("desk.1", first), ("desk.2", second), ("kept", kept)] {
        raw.command(&["XGROUP", "CREATE", &stream(name), "workers", "0"]);
        raw.command(&["XDEL", &stream(name), &id.to_string()]);
    }
    until("they are gone", || node.metrics.inbox_messages.get() == 0).await;
    let mut expiry = |name: &str| raw.command(&["PTTL", &stream(name)]).number();
    assert!((590_000..=600_000).contains(&expiry("desk.1")) && expiry("kept") == -1);
    node.store("desk.1", "a", None, &event(5)).await.unwrap();
    assert_eq!(expiry("desk.1"), -1, "messages never expire");
    // Also behind an entry of another program.
    redis.raw().command(&["XADD", &stream("desk.2"), "*", "event", "{}"]);
    assert!(expiry("desk.2") > 0);
    node.store("desk.2", "a", None, &event(6)).await.unwrap();
    assert_eq!(expiry("desk.2"), -1);
}

#[tokio::test]
async fn a_damaged_key_rejects_its_whole_call() {
    let redis = RedisServer::start();
    let node = Node::ready(settings(&redis.url())).await;
    node.store("desk", "a", None, &event(0)).await.expect("the node knows the channel then");
    redis.raw().command(&["LPUSH", "fanfare:{desk}:inbox:key:1:a:k", "x"]);
    let results = [None, Some("k")].map(|key| node.store_later("desk", "a", key, &event(1)));
    for result in results {
        let result = timeout(TIMEOUT, result).await.unwrap().unwrap();
        assert!(matches!(result, Err(PublishError::Rejected(_))), "{result:?}");
    }
    assert_eq!(length(&redis, "desk"), 1, "what is rejected is not stored");
}

#[tokio::test]
async fn bytes_of_an_inbox_are_limited() {
    let redis = RedisServer::start();
    let node = Node::ready(Settings { history_bytes: 100_000, ..settings(&redis.url()) }).await;
    let long = format!(r#"{{"text":"{}"}}"#, "x".repeat(10_000));
    let mut stored = 0;
    while node.store("desk", "a", None, &long).await.is_ok() {
        stored += 1;
    }
    assert!((6..=12).contains(&stored), "{stored} messages");
    assert_eq!(node.store("desk", "a", None, "{}").await, Err(PublishError::Full));
    redis.raw().command(&["XTRIM", &stream("desk"), "MAXLEN", "1"]);
    node.store("desk", "a", None, &long).await.unwrap();
}

#[tokio::test]
async fn a_duplicate_renews_its_key() {
    let redis = RedisServer::start();
    let node = Node::ready(settings(&redis.url())).await;
    let first = node.store("desk", "a", Some("k"), &event(1)).await;
    let (mut raw, key) = (redis.raw(), "fanfare:{desk}:inbox:key:1:a:k");
    raw.command(&["PEXPIRE", key, "5000"]);
    assert_eq!(node.store("desk", "a", Some("k"), &event(1)).await, first);
    assert!(raw.command(&["PTTL", key]).number() > 590_000, "a retry of that call finds it");
}
