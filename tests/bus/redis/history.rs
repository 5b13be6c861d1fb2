//! Missed events are read from history, or announced as lost.

use std::time::Duration;

use fanfare::bus::{BLOCK, BusMessage};
use fanfare::protocol::event::EventId;
use tokio::time::{sleep, timeout};

use super::node::{Node, block_after, event, settings, until};
use super::redis_server::{Proxy, RedisServer, Reply, TIMEOUT};

#[tokio::test]
async fn gap_beyond_history_is_a_reset() {
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
        last = timeout(TIMEOUT, result).await.unwrap().unwrap().unwrap();
    }
    proxy.close(false);
    reader.until(&mut node, last).await;
    assert_eq!(reader.resets.len(), 1);
    assert!(last.0 - reader.resets[0] >= 1000, "at least --history events are kept");
    assert!(last.0 - reader.resets[0] < 2000, "and not many more");
}

#[tokio::test]
async fn page_is_read_once_for_all() {
    let redis = RedisServer::start();
    let mut node = Node::ready(settings(&redis.url())).await;
    let reader = node.follow("room", 0).await;
    // Fills up the first block, to test whole blocks.
    let mut last = reader.position;
    let pad = "x".repeat(16 << 10);
    let target = EventId((last.0 / BLOCK + 2) * BLOCK - 1 + 10);
    let mut results = Vec::new();
    for n in 0..(target.0 - last.0) as usize {
        let to = (n % 50 == 3).then_some("bob");
        results.push(node.publish_later("room", to, &format!("{{\"n\":\"<{n}>\",\"pad\":\"{pad}\"}}")));
    }
    for result in results {
        last = timeout(TIMEOUT, result).await.unwrap().unwrap().unwrap();
    }
    assert_eq!(last, target);
    let block = target.0 / BLOCK - 1;
    let (start, end) = (block_after(block), block_after(block + 1));
    let before = node.metrics.reads.get();
    let mut at = start;
    while at < end {
        for _ in 0..10 {
            node.ask_page("room", at, 0);
            node.ask_page("room", at, 1);
        }
        let mut reached = at;
        for shard in [0, 1].repeat(10) {
            let part = node.page_answer(at, shard).await.unwrap();
            assert_eq!((part.base, part.oldest, part.head), (reader.base, reader.base.next(), last));
            assert_eq!(part.entries[0].before(), at);
            assert!(part.entries.windows(2).all(|pair| pair[0].last == pair[1].before()));
            reached = part.entries.last().unwrap().last;
        }
        assert!(at < reached && reached <= end);
        at = reached;
    }
    // 256 events of 16 KiB are 4 MiB and arrive in parts of a bit more than 1 MiB.
    let reads = node.metrics.reads.get() - before;
    assert!((3..=4).contains(&reads), "{reads} reads for one page");
    let tail = node.page("room", block + 1, 0).await.unwrap();
    assert_eq!((tail.head, tail.entries.last().unwrap().last), (last, last));
    let empty = node.page("room", block + 100, 0).await.unwrap();
    assert!(empty.entries.is_empty());
}

#[tokio::test]
async fn refresh_delivers_new_events_before_it_answers() {
    let redis = RedisServer::start();
    let mut node = Node::ready(settings(&redis.url())).await;
    let mut reader = node.follow("room", 0).await;
    node.follow("room", 1).await;
    // Written without a message, as if every message had been lost.
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
            .message(shard, |message| match message {
                BusMessage::Entry { entry, .. } => {
                    assert_eq!(entry.last.0, id);
                    entry_came = true;
                    None
                }
                BusMessage::Refreshed { result, .. } => Some(result.clone()),
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
async fn expired_history_keeps_the_sequence() {
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
    sleep(Duration::from_secs(2)).await; // twice the time, but the channel is followed
    let page = publisher.page("room", one.0 / BLOCK, 0).await.unwrap();
    assert_eq!((page.base, page.head, page.oldest), (stays.base, one, one.next()));
    proxy.close(false);
    misses.until_it(&mut node, |reader| !reader.resets.is_empty()).await;
    assert_eq!(misses.resets, [one.0]);
    let two = publisher.publish("room", &event(2)).await.unwrap();
    assert_eq!(two, one.next());
    stays.until(&mut publisher, two).await;
    misses.until(&mut node, two).await;
    assert!(stays.resets.is_empty());
    // The same without a follower.
    publisher.unfollow(stays);
    node.unfollow(misses);
    let gone = || redis.raw().command(&["EXISTS", "fanfare:{room}:meta"]) == Reply::Number(0);
    until("the sequence is forgotten", gone).await;
}

#[tokio::test]
async fn deleted_entries_are_announced() {
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

#[tokio::test]
async fn history_is_limited_in_bytes() {
    const LIMIT: usize = 64 << 10;
    let redis = RedisServer::start();
    let mut limited = settings(&redis.url());
    (limited.history_bytes, limited.history) = (LIMIT, 1000);
    let mut node = Node::ready(limited).await;
    let mut reader = node.follow("room", 0).await;
    let mut raw = redis.raw();
    let (mut last, mut total) = (EventId(0), 0);
    for n in 0..1000_usize {
        // Small events, large ones, one beyond the limit alone, and small ones up to the limit of
        // their number.
        let size = match n {
            300 => 60 << 10,
            200..320 => n * 7919 % 9000,
            _ => n * 7919 % 90,
        };
        let event = format!(r#"{{"n":"<{n}>","text":"{}"}}"#, "x".repeat(size));
        if n % 3 == 0 {
            let fcall = ["FCALL", "fanfare_publish", "1", "fanfare:{room}", &event];
            last = EventId(raw.command(&fcall).number() as u64);
        } else {
            let batch: Vec<_> = (0..n % 5 + 1).map(|_| node.publish_later("room", None, &event)).collect();
            for result in batch {
                last = timeout(TIMEOUT, result).await.unwrap().unwrap().unwrap();
            }
        }
        let events = if n % 3 == 0 { 1 } else { n % 5 + 1 };
        total += events * (event.len() + r#","id":"#.len() + last.to_string().len());
        if n % 7 != 0 {
            continue;
        }
        let Reply::List(entries) = raw.command(&["XRANGE", "fanfare:{room}:events", "-", "+"]) else {
            panic!("a stream is a list")
        };
        let sizes = entries.iter().map(|entry| match entry {
            Reply::List(parts) => parts[1].list()[1].len(),
            other => panic!("{other:?}"),
        });
        let (count, held) = (entries.len(), sizes.sum::<usize>());
        let counted = raw.command(&["HGET", "fanfare:{room}:meta", "bytes"]);
        assert_eq!(counted.text(), total.to_string(), "after event {n}");
        assert!(held >= LIMIT / 16 * 11 || !(250..300).contains(&n), "only {held} bytes after event {n}");
        assert!(held <= LIMIT || count <= 5, "{held} bytes in {count} events after event {n}");
        assert!(count < 1000 + 100 + 5, "{count} events after event {n}");
    }
    reader.until(&mut node, last).await;
    assert!(reader.resets.is_empty());
}

#[tokio::test]
async fn history_is_limited_if_its_size_is_overwritten() {
    let redis = RedisServer::start();
    let mut limited = settings(&redis.url());
    limited.history_bytes = 64 << 10;
    let node = Node::ready(limited).await;
    let mut raw = redis.raw();
    let event = format!(r#"{{"text":"{}"}}"#, "x".repeat(1000));
    for bytes in ["inf", "-1", "nonsense", "9007199254740992", "9007199254740991", "0.5"] {
        for _ in 0..2 {
            raw.command(&["HSET", "fanfare:{room}:meta", "bytes", bytes]);
            node.publish("room", &event).await.unwrap();
        }
        for _ in 0..100 {
            node.publish("room", &event).await.unwrap();
        }
        let kept = raw.command(&["XLEN", "fanfare:{room}:events"]).number();
        assert!((1..=80).contains(&kept), "{kept} after {bytes}");
    }
}

#[tokio::test]
async fn deleted_stream_expires_again() {
    let redis = RedisServer::start();
    let node = Node::ready(settings(&redis.url())).await;
    let mut raw = redis.raw();
    node.publish("room", &event(1)).await.unwrap();
    for by_function in [false, true] {
        raw.command(&["DEL", "fanfare:{room}:events"]);
        if by_function {
            raw.command(&["FCALL", "fanfare_publish", "1", "fanfare:{room}", "{}"]).number();
        } else {
            node.publish("room", &event(2)).await.unwrap();
        }
        assert!(raw.command(&["PTTL", "fanfare:{room}:events"]).number() > 0);
    }
}
