//! Untrusted input that involves Redis: rows of the table in `tests/protocol/untrusted_input.rs`.

use serde_json::json;

use crate::common::raw::opcode::TEXT;
use crate::common::{Client, Node, Raw, Redis, until};

#[tokio::test]
async fn unknown_ids_cost_one_shared_read() {
    let redis = Redis::start(&[]).await;
    let node = Node::on(&redis, &["--shards", "1"]).await;
    let _stays = Client::plain(&node, "stays", "room").await;
    let head = *node.publish_numbers("room", 0..5).await.last().expect("five");
    let reads = || async { redis.info("cmdstat_xrange").await };
    let reads_before = reads().await;
    for strange in ["-1", "abc", "%FF", "1.5", "99999999999999999999", "9007199254740992"] {
        let (_, welcome) = Client::resume(&node, "a", "room", strange).await;
        assert_eq!(welcome["recovered"], false, "{strange}");
    }
    assert_eq!(reads().await, reads_before, "what is no id is not looked for");
    // Simultaneous joins with future ids share a read. The first may have its own.
    let calls = |stat: &str| {
        let calls =
            stat.split_once("calls=").and_then(|(_, rest)| rest.split(',').next()?.parse::<u64>().ok());
        calls.unwrap_or(0)
    };
    let futures = (1..=50).map(|n| Client::resume(&node, "a", "room", head + n));
    for (_, welcome) in futures_util::future::join_all(futures).await {
        assert_eq!((&welcome["recovered"], &welcome["lastEventId"]), (&json!(false), &json!(head)));
    }
    let more = calls(&reads().await) - calls(&reads_before);
    assert!((1..=25).contains(&more), "{more} reads for 50 clients");
}

#[tokio::test]
async fn channel_named_like_a_redis_channel_is_ordinary() {
    let redis = Redis::start(&[]).await;
    let node = Node::on(&redis, &[]).await;
    for channel in ["__sentinel__:hello", "__keyspace@0__", "other-program:jobs"] {
        let mut raw = Raw::connect(node.public).await;
        let joined = raw.upgrade(&format!("/ws/a?channel={channel}"), &[]).await;
        if channel.contains('@') {
            joined.expect_rejection(400); // not a valid channel name
            continue;
        }
        assert_eq!(joined.status, 101);
        let mut program = redis.client().await;
        let named = program.call(&["PUBSUB", "NUMSUB", channel]).await;
        assert_eq!(named.list()[1].int(), 0, "the node listens to {channel}");
        program.call(&["PUBLISH", channel, r#"{"secret":1}"#]).await;
        let mut listener = redis.client().await;
        listener.subscribe(channel).await;
        raw.frame(true, TEXT, b"hi").await;
        let text = raw.next_text().await;
        assert!(text.starts_with(r#"{"sender":"a","text":"hi","id":"#), "{text}");
        // No message of the node reached the subscriber of that Redis channel.
        program.call(&["PUBLISH", channel, "marker"]).await;
        assert_eq!(listener.message().await, b"marker");
        let exists = program.call(&["EXISTS", &format!("fanfare:{{{channel}}}:events"), channel]).await;
        assert_eq!(exists.int(), 1, "only the key with the prefix");
    }
}

#[tokio::test]
async fn unused_channels_expire_soon_in_redis() {
    const SOON: i64 = 10 * 60 * 1000;
    let redis = Redis::start(&[]).await;
    let node = Node::on(&redis, &[]).await;
    let mut program = redis.client().await;
    // Waits for three probes, of which two start after this call, since probes set the expiry.
    let mut lifetime = async || {
        let probes = || node.metric("fanfare_bus_round_trip_seconds_count");
        let before = probes().await;
        until("two probes", || async { (probes().await >= before + 3.0).then_some(()) }).await;
        program.call(&["PTTL", "fanfare:{named}:meta"]).await.int()
    };
    let _stays = Client::plain(&node, "a", "named").await;
    let kept = lifetime().await;
    assert!((1..=SOON).contains(&kept), "anyone may name any number of channels: {kept} ms for one");
    node.publish_numbers("named", 0..1).await;
    assert!(lifetime().await > SOON, "ids of events must not be given again");
    // Nor ids from before a flush.
    redis.client().await.call(&["FLUSHALL"]).await;
    assert!(lifetime().await > SOON);
}
