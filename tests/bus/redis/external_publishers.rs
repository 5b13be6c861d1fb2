//! FCALL and plain PUBLISH of other programs, other settings, and Redis servers that cannot be
//! used.

use std::time::Duration;

use fanfare::bus::BusError;
use fanfare::protocol::event::EventId;
use fanfare::protocol::json;
use serde_json::Value;
use tokio::time::timeout;

use super::node::{Node, event, mark, settings, until};
use super::redis_server::{RedisServer, Reply, TIMEOUT, free_port};
use crate::common::cases::cases;

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
        (&["[1]"][..], "a JSON object"),
        (&["[]"], "a JSON object"),
        (&["7"], "a JSON object"),
        (&["null"], "a JSON object"),
        (&["false"], "a JSON object"),
        (&["{\"a\":}"], "not JSON"),
        (&["{}\0"], "not JSON"),
        (&["\u{feff}{}"], "not JSON"),
        (&["{\"type\":\"welcome\",\"type\":\"chat\"}"], "same name"),
        (&["{\"t\\u006f\":\"bob\"}"], "reserved"),
        (&[""], "not JSON"),
        (&["{\"id\":null}"], "reserved"),
        (&["{\"to\":\"bob\"}"], "reserved"),
        (&["{\"type\":\"ping\"}"], "control"),
        (&["{\"type\":\"\\u0070ing\"}"], "control"),
        (&["{}", ""], "user id"),
        (&["{}", "a\u{7}b"], "user id"),
        (&["{}", "a\u{85}b"], "user id"),
        (&["{}", &long_user], "user id"),
        (&["{}", "", ""], "idempotency key"),
        (&["{}", "", "a b"], "idempotency key"),
        (&["{}", "bob", "a\""], "idempotency key"),
        (&["{}", "bob", &long_user], "idempotency key"),
        (&["{}", "bob", "key", "more"], "then optionally"),
        (&[], "JSON object"),
        (&[&large], "--max-message-size"),
    ] {
        let reply = fcall(args);
        assert!(reply.error().contains(says), "{args:?}: {reply:?}");
    }
    for key in ["room", "fanfare:room", "fanfare:{}", "fanfare:{a b}", "fanfare:{room}:to"] {
        let reply = redis.raw().command(&["FCALL", "fanfare_publish", "1", key, "{}"]);
        assert!(reply.error().contains("<prefix>:{<channel>}"), "{key}: {reply:?}");
    }
    assert_eq!(redis.head("room"), three, "rejected events take no id");
}

fn value(text: impl AsRef<[u8]>) -> Value {
    serde_json::from_slice(text.as_ref()).unwrap()
}

#[tokio::test]
async fn fcall_checks_json_by_the_rule() {
    let redis = RedisServer::start();
    let mut node = Node::ready(settings(&redis.url())).await;
    let mut reader = node.follow("room", 0).await;
    let mut raw = redis.raw();
    let mut expected = Vec::new();
    for case in cases() {
        let event = case.event();
        let reply = raw.command(&[b"FCALL", &b"fanfare_publish"[..], b"1", b"fanfare:{room}", &event]);
        match case.error() {
            None => expected.push((reply.number() as u64, event)),
            Some(words) => assert!(reply.error().contains(words), "{}: {reply:?}", case.name()),
        }
    }
    reader.until(&mut node, EventId(expected.last().unwrap().0)).await;
    assert_eq!(reader.events.len(), expected.len(), "rejected events take no id");
    for ((id, text), (given, event)) in reader.events.iter().zip(expected) {
        let (mut text, event) = (value(text), value(event));
        assert_eq!((*id, text["data"].take()), (given, event["data"].clone()));
    }
}

#[tokio::test]
async fn fcall_and_node_check_json_alike() {
    let redis = RedisServer::start();
    let _node = Node::ready(settings(&redis.url())).await;
    let mut raw = redis.raw();
    let mut random: u64 = 1;
    let mut below = |limit: usize| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) as usize % limit
    };
    let bytes = b"\"\"\"\\\\{}[],::.eE+-0019u d8ab\x00\t\x1f\x7f\x80\xc3\xa9\xed\xf0\xff";
    for case in cases() {
        for _ in 0..20 {
            let mut event = case.event();
            for _ in 0..=below(2) {
                let at = 1 + below(event.len() - 1);
                match below(3) {
                    0 => event[at] = bytes[below(bytes.len())],
                    1 => event.insert(at, bytes[below(bytes.len())]),
                    _ => drop(event.drain(at..(at + 1 + below(3)).min(event.len()))),
                }
            }
            let reply = raw.command(&[b"FCALL", &b"fanfare_publish"[..], b"1", b"fanfare:{room}", &event]);
            let taken = matches!(reply, Reply::Number(_));
            assert_eq!(
                json::check(&event, json::DEPTH_MAX).is_ok(),
                taken,
                "{}: {reply:?}",
                event.escape_ascii()
            );
        }
    }
}

#[tokio::test]
async fn plain_publish_is_valid_json_or_text() {
    let redis = RedisServer::start();
    let mut node = Node::ready(settings(&redis.url())).await;
    let mut reader = node.follow("ws_broadcast", 0).await;
    let mut raw = redis.raw();
    let cases = cases();
    for case in &cases {
        raw.command(&[&b"PUBLISH"[..], b"ws_broadcast", &case.event()]);
    }
    reader.until_it(&mut node, |reader| reader.raw.len() == cases.len()).await;
    for (case, shown) in cases.iter().zip(&reader.raw) {
        let event = case.event();
        let expected = match case.error() {
            None => value(&event)["data"].clone(),
            Some(_) => String::from_utf8_lossy(&event).into(),
        };
        assert_eq!(value(shown)["data"], expected, "{}", case.name());
    }
}

#[tokio::test]
async fn invalid_stored_events_arrive_as_text() {
    let redis = RedisServer::start();
    let mut node = Node::ready(settings(&redis.url())).await;
    let mut reader = node.follow("room", 0).await;
    let mut raw = redis.raw();
    let first = node.publish("room", &event(1)).await.unwrap();
    // As an older version stored and announced them. Some of the announcements are lost.
    let bad = cases().into_iter().filter(|case| case.error().is_some());
    let data = |value: Vec<u8>| [b"{\"data\":", &value[..], b",\"id\":"].concat();
    let mut bad: Vec<_> = bad.map(|case| (case.name(), data(case.value))).collect();
    for frame in [r#"{"type":"welcome","head":1,"id":"#, r#"{"\u0074ype":"re\u0073et","id":"#, r#"{"a\"id":"#]
    {
        bad.push((frame.to_owned(), frame.into()));
    }
    let mut head = first.0;
    let mut stored = Vec::new();
    for (number, (_, event)) in bad.iter().enumerate() {
        head += 1;
        let event = [&event[..], format!("{head}}}").as_bytes()].concat();
        let id = format!("{head}-0");
        raw.command(&[b"XADD", &b"fanfare:{room}:events"[..], id.as_bytes(), b"e", &event]);
        raw.command(&["HSET", "fanfare:{room}:meta", "head", &head.to_string()]);
        if number % 3 > 0 && !event.contains(&b'\n') {
            raw.command(&[&b"PUBLISH"[..], b"fanfare:{room}", &event]);
        }
        stored.push(event);
    }
    let last = node.publish("room", &event(2)).await.unwrap();
    reader.until(&mut node, last).await;
    assert!(reader.resets.is_empty());
    assert_eq!(reader.events.len(), bad.len() + 2);
    for (((name, _), event), (id, shown)) in bad.iter().zip(&stored).zip(&reader.events[1..]) {
        let shown = value(shown);
        assert_eq!(shown["data"], *String::from_utf8_lossy(event), "{name}");
        assert_eq!(shown["id"], *id);
    }
}

#[tokio::test]
async fn pubsub_channel_works_both_ways() {
    let redis = RedisServer::start();
    let mut node = Node::ready(settings(&redis.url())).await;
    let mut reader = node.follow("ws_broadcast", 0).await;
    let mut other = node.follow("room", 0).await;
    let mut listener = redis.raw();
    listener.command(&["SUBSCRIBE", "ws_broadcast"]);

    let mut raw = redis.raw();
    let messages: [&[u8]; 6] =
        [b"{\"a\":1}", b"{\"id\":7}", b"{\"type\":\"reset\"}", b"[1,\n2]", b"hello", b"\xff\"\n"];
    for message in messages {
        raw.command(&[&b"PUBLISH"[..], b"ws_broadcast", message]);
        listener.next_message();
    }
    raw.command(&["PUBLISH", "ws_broadcast", &"x".repeat((64 << 10) + 1)]);
    listener.next_message();
    raw.command(&["PUBLISH", "room", "{\"b\":1}"]); // not in --pubsub-channels
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

    // Subscribers of this Redis channel see sequenced events, but no private ones.
    let private = node.publish_later("ws_broadcast", Some("bob"), "{\"to\":\"bob\",\"psst\":1}");
    let id = node.publish("ws_broadcast", &event(1)).await.unwrap();
    let by_function = raw.command(&["FCALL", "fanfare_publish", "1", "fanfare:{ws_broadcast}", "{}", "bob"]);
    let last =
        raw.command(&["FCALL", "fanfare_publish", "1", "fanfare:{ws_broadcast}", "{}"]).number() as u64;
    let secret = timeout(TIMEOUT, private).await.unwrap().unwrap().unwrap();
    assert_eq!(listener.next_message().1, format!("\t{{\"n\":\"<1>\",\"id\":{id}}}"));
    assert_eq!(listener.next_message().1, format!("\t{{\"id\":{last}}}"));
    reader.until(&mut node, EventId(last)).await;
    assert_eq!(reader.raw.len(), 6, "the node does not take its own copies for messages");
    assert_eq!(reader.private.len(), 2);
    assert_eq!((reader.private[0].0, reader.private[0].1.as_str()), (secret.0, "bob"));
    assert_eq!(reader.private[1].0 as i64, by_function.number());
    assert_eq!(node.metrics.oversized.get(), 1);
    let id = node.publish("room", &event(2)).await.unwrap();
    other.until(&mut node, id).await;
    assert!(other.raw.is_empty());
}

#[tokio::test]
async fn copies_are_published_to_listeners_only() {
    let redis = RedisServer::start();
    let mut node = Node::ready(settings(&redis.url())).await;
    node.follow("ws_broadcast", 0).await;
    let mut raw = redis.raw();
    // Together, so that the node's probe, which publishes too, does not come between.
    let mut publishes = || {
        raw.command(&["MULTI"]);
        raw.command(&["INFO", "commandstats"]);
        raw.command(&["FCALL", "fanfare_publish", "1", "fanfare:{ws_broadcast}", "{}"]);
        raw.command(&["INFO", "commandstats"]);
        let Reply::List(replies) = raw.command(&["EXEC"]) else { panic!("no list") };
        assert!(replies[1].number() > 0);
        let calls = |info: &Reply| -> u64 {
            let rest = info.text().split_once("cmdstat_publish:calls=").map_or("0,", |(_, rest)| rest);
            rest.split(',').next().unwrap().parse().unwrap()
        };
        calls(&replies[2]) - calls(&replies[0])
    };
    assert_eq!(publishes(), 1);
    for [listen, leave, topic] in
        [["SUBSCRIBE", "UNSUBSCRIBE", "ws_broadcast"], ["PSUBSCRIBE", "PUNSUBSCRIBE", "ws_*"]]
    {
        let mut listener = redis.raw();
        listener.command(&[listen, topic]);
        assert_eq!(publishes(), 2, "{listen}");
        assert!(listener.next_message().1.starts_with("\t{\"id\":"));
        listener.command(&[leave, topic]);
        assert_eq!(publishes(), 1, "{leave}");
    }
    // Subscribers of a replica can't be counted.
    let replica = RedisServer::start();
    replica.raw().command(&["REPLICAOF", "127.0.0.1", &redis.port.to_string()]);
    let attached = || redis.raw().command(&["INFO", "replication"]).text().contains("state=online");
    until("the replica is connected", attached).await;
    assert_eq!(publishes(), 2);
}

#[tokio::test]
async fn acl_errors_are_explained() {
    let redis = RedisServer::start();
    let mut raw = redis.raw();
    raw.command(&["ACL", "SETUSER", "node", "on", ">secret", "~*", "+@all", "resetchannels"]);
    let url = format!("redis://node:secret@127.0.0.1:{}", redis.port);
    let mut node = Node::start(settings(&url));
    until("it says what is missing", || {
        node.readiness
            .not_ready_reason()
            .is_some_and(|why| why.contains("SUBSCRIBE") && why.contains("&fanfare:*"))
    })
    .await;
    let rejection = node.try_follow("room", 0).await.unwrap_err();
    assert!(rejection.to_string().contains("SUBSCRIBE"), "{rejection}");
    raw.command(&["ACL", "SETUSER", "node", "&fanfare:*"]);
    until("now the plain channel is missing", || {
        node.readiness.not_ready_reason().is_some_and(|why| why.contains("SUBSCRIBE ws_broadcast"))
    })
    .await;
    raw.command(&["ACL", "SETUSER", "node", "&ws_broadcast"]);
    node.until_ready().await;
    node.follow("room", 0).await;
    // The rights in the error text are sufficient.
    raw.command(&["ACL", "SETUSER", "least", "on", ">secret", "~fanfare:*", "&fanfare:*", "&ws_broadcast"]);
    let granted = ["+@read", "+@write", "+@pubsub", "+@scripting", "+@connection", "+info", "+time"];
    raw.command(&[&["ACL", "SETUSER", "least"][..], &granted].concat());
    let mut least = Node::ready(settings(&format!("redis://least:secret@127.0.0.1:{}", redis.port))).await;
    let mut reader = least.follow("ws_broadcast", 0).await;
    let id = least.publish("ws_broadcast", &event(1)).await.unwrap();
    reader.until(&mut least, id).await;
    // Rights removed at run time are reported.
    raw.command(&["ACL", "SETUSER", "node", "resetchannels"]);
    until("the node notices", || {
        node.readiness.not_ready_reason().is_some_and(|why| why.contains("SUBSCRIBE"))
    })
    .await;
}

#[tokio::test]
async fn cluster_mode_is_rejected_with_a_reason() {
    let bus_port = free_port().to_string();
    let redis =
        RedisServer::start_with(&["--save", "", "--cluster-enabled", "yes", "--cluster-port", &bus_port]);
    let node = Node::start(settings(&redis.url()));
    let end = timeout(TIMEOUT, node.task).await.unwrap().unwrap();
    assert!(end.unwrap_err().to_string().contains("cluster"));
}

#[tokio::test]
async fn unix_socket_and_other_prefix() {
    let redis = RedisServer::start_with(&["--save", "", "--unixsocket", "redis.sock"]);
    let mut elsewhere = settings(&format!("redis+unix://{}", redis.dir.join("redis.sock").display()));
    elsewhere.redis_prefix = "app:one".into();
    let mut node = Node::ready(elsewhere).await;
    let mut reader = node.follow("ws_broadcast", 0).await;
    let mut other = Node::ready(settings(&redis.url())).await;
    let mut other_reader = other.follow("ws_broadcast", 0).await;
    let one = node.publish("ws_broadcast", &event(1)).await.unwrap();
    let two =
        redis.raw().command(&["FCALL", "fanfare_publish", "1", "app:one:{ws_broadcast}", "{}"]).number();
    reader.until(&mut node, EventId(two as u64)).await;
    reader.assert_has(one, &mark(1));
    let own = other.publish("ws_broadcast", &event(2)).await.unwrap();
    other_reader.until(&mut other, own).await;
    assert_eq!(
        (other_reader.events.len(), other_reader.count(&mark(1))),
        (1, 0),
        "another prefix is another testbed"
    );
}

#[tokio::test]
async fn node_starts_without_redis() {
    let mut redis = RedisServer::not_started();
    let mut node = Node::start(settings(&redis.url()));
    until("it has tried", || {
        node.readiness.not_ready_reason().is_some_and(|why| why.contains("can't be reached"))
    })
    .await;
    assert!(matches!(node.try_follow("room", 0).await, Err(BusError::Unavailable(_))));
    let result = node.publish_later("room", None, &event(1));
    redis.restart();
    node.until_ready().await;
    let id = timeout(TIMEOUT, result).await.unwrap().unwrap().unwrap();
    assert_eq!(node.follow("room", 0).await.position, id);
}

#[tokio::test]
async fn fcall_follows_the_settings_of_its_prefix() {
    let redis = RedisServer::start();
    let of = |prefix: &str, history: u64, hours: u64, max_message_size: usize| {
        let mut settings = settings(&redis.url());
        settings.redis_prefix = prefix.into();
        (settings.history, settings.max_message_size) = (history, max_message_size);
        settings.history_ttl = Duration::from_secs(hours * 3600);
        settings
    };
    let _large = Node::ready(of("large", 3000, 24, 4096)).await;
    let _small = Node::ready(of("small", 1000, 1, 1024)).await;
    let mut raw = redis.raw();
    let event = format!("{{\"a\":\"{}\"}}", "x".repeat(2000));
    for (prefix, history, hours, takes_it) in [("large", 3000, 24, true), ("small", 1000, 1, false)] {
        let key = format!("{prefix}:{{room}}");
        let answers = raw.repeat(&["FCALL", "fanfare_publish", "1", &key, "{}"], 4000);
        assert!(answers.iter().all(|answer| answer.number() > 0));
        let events = format!("{key}:events");
        let kept = raw.command(&["XLEN", &events]).number();
        assert!((history..history + 200).contains(&kept), "{prefix} keeps {kept}");
        let millis = raw.command(&["PTTL", &events]).number();
        assert!(
            (hours - 1..=hours + hours / 16).contains(&(millis / 3_600_000)),
            "{prefix} keeps them for {millis} ms"
        );
        let answer = raw.command(&["FCALL", "fanfare_publish", "1", &key, &event]);
        assert_eq!(matches!(answer, Reply::Number(_)), takes_it, "{answer:?}");
    }
    let before = raw.command(&["DBSIZE"]);
    let answer = raw.command(&["FCALL", "fanfare_publish", "1", "typo:{room}", "{}"]);
    assert!(answer.error().contains("no node has the --redis-prefix \"typo\""), "{answer:?}");
    assert_eq!(raw.command(&["DBSIZE"]), before, "nothing is stored for it");
}

#[tokio::test]
async fn fcall_works_again_after_a_flush() {
    let redis = RedisServer::start();
    let node = Node::ready(settings(&redis.url())).await;
    let mut raw = redis.raw();
    for flush in [
        &["FUNCTION", "FLUSH"][..],
        &["FUNCTION", "DELETE", "fanfare1"],
        &["FLUSHALL"],
        &["DEL", "fanfare:settings"],
    ] {
        raw.command(flush);
        let fcall = ["FCALL", "fanfare_publish", "1", "fanfare:{room}", "{}"];
        assert!(matches!(raw.command(&fcall), Reply::Error(_)), "{flush:?}");
        until("FCALL works", || matches!(redis.raw().command(&fcall), Reply::Number(_))).await;
        assert_eq!(node.readiness.not_ready_reason(), None);
    }
}

#[tokio::test]
async fn newest_version_of_the_function_stays() {
    let redis = RedisServer::start();
    let mut raw = redis.raw();
    let mut load = |version: &str| {
        let text = format!(
            "#!lua name=fanfare1\nredis.register_function{{function_name = 'fanfare_publish', \
             description = '{version}', callback = function() return 7 end}}"
        );
        raw.command(&["FUNCTION", "LOAD", "REPLACE", &text]);
    };
    let fcall = || redis.raw().command(&["FCALL", "fanfare_publish", "1", "fanfare:{room}", "{}"]);
    load("99.0.0");
    let _node = Node::ready(settings(&redis.url())).await;
    assert_eq!(fcall(), Reply::Number(7), "a node of an older version leaves it");
    load("0.0.1");
    until("the node replaces an older one", || fcall() != Reply::Number(7)).await;
    assert!(fcall().number() > 7);
}

#[tokio::test]
async fn renamed_command_is_named() {
    for command in ["XTRIM", "PEXPIRE", "INFO", "EVAL", "SUBSCRIBE"] {
        let redis = RedisServer::start_with(&["--save", "", "--rename-command", command, "hidden"]);
        let node = Node::start(settings(&redis.url()));
        let says = || node.readiness.not_ready_reason().is_some_and(|why| why.contains("rename-command"));
        until(&format!("it says that {command} is missing"), says).await;
        let why = node.readiness.not_ready_reason().unwrap();
        assert!(!why.contains("grant"), "{why}");
    }
}

/// The answer of `check.lua` for a Redis whose INFO in scripts is `info`, as Lua text.
fn check_with_info(redis: &RedisServer, info: &str) -> Vec<String> {
    let script = format!(
        "local redis = setmetatable({{pcall = function(_, section) return {info} end}}, {{__index = redis}})\n{}",
        include_str!("../../../src/bus/redis/lua/check.lua")
    );
    let keys = ["0", "fanfare:{x}", "fanfare:node:x", "fanfare:settings", "volatile"];
    match redis.raw().command(&[&["EVAL", &script][..], &keys].concat()) {
        Reply::List(lists) => lists[1].list(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn hidden_replication_id_is_reported() {
    let redis = RedisServer::start();
    assert_eq!(check_with_info(&redis, "redis.call('INFO', section)"), [""; 0]);
    let all = "'run_id:ab\\r\\nmaster_replid:ab\\r\\nmaster_replid2:00\\r\\nconnected_slaves:0'";
    assert_eq!(check_with_info(&redis, all), [""; 0]);
    for field in ["run_id", "master_replid", "master_replid2", "connected_slaves"] {
        let lacking = check_with_info(&redis, &all.replace(&format!("{field}:"), "x:"));
        assert_eq!(lacking.len(), 1, "{field}: {lacking:?}");
        assert!(lacking[0].starts_with(&format!("{field} in INFO ")), "{lacking:?}");
    }
    let rejected = check_with_info(&redis, "{err = 'ERR not allowed from script'}");
    assert!(rejected.iter().all(|text| text.contains("in scripts (ERR not allowed from script)")));
    assert_eq!(rejected.len(), 2);
}
