//! Limits on channels, history and descriptors.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::common::client::position;
use crate::common::{Client, Node, Raw, http, until, within};

#[tokio::test]
async fn new_channels_of_a_client_are_limited() {
    const MOST: u64 = 100;
    let limits = ["--max-connections-per-ip", "100", "--max-subscriptions", "1"];
    let node = Node::start(&[&["--trusted-proxy", "127.0.0.2"], &limits[..]].concat()).await;
    let _stays = Client::plain(&node, "a", "used").await;
    let empty = async || {
        let alone = async || node.metric("fanfare_connections").await == 1.0;
        until("the others to be gone", || async { alone().await.then_some(()) }).await;
    };
    let join = async |address: &str, channel: &str| {
        let mut raw = Raw::connect_from([127, 0, 0, 2], node.public).await;
        raw.write(format!("PROXY TCP4 {address} 127.0.0.1 1 2\r\n").as_bytes()).await;
        raw.upgrade(&format!("/ws/a?channel={channel}"), &[]).await
    };
    let started = Instant::now();
    for named in 0..MOST {
        assert_eq!(join("192.0.2.7", &format!("new{named}")).await.status, 101);
    }
    let mut named = MOST;
    let rejection = loop {
        empty().await; // so that the limit on connections is not reached
        let response = join("192.0.2.7", &format!("new{named}")).await;
        if response.status != 101 {
            break response;
        }
        named += 1;
        let most = MOST + started.elapsed().as_secs() * MOST / 60 + 1;
        assert!(named <= most, "{named} new channels, {most} are allowed");
    };
    rejection.expect_rejection(429);
    assert!(rejection.body.contains("too many new channels"), "{rejection:?}");
    assert_eq!(rejection.header("retry-after"), Some("5"));
    // Channels in use are not new, and other addresses have their own allowance.
    assert_eq!(join("192.0.2.7", "used").await.status, 101);
    assert_eq!(join("192.0.2.8", "new").await.status, 101);
}

#[tokio::test]
async fn local_history_is_limited_in_bytes() {
    let flags = ["--history-bytes", "64KiB", "--buffer-memory", "64KiB"];
    let node = Node::start(&flags).await;
    let event = json!({"text": "x".repeat(10_000)});
    let mut ids = Vec::new();
    for _ in 0..20 {
        ids.push(node.publish("room", &event).await);
    }
    let small = node.publish_numbers("other", 0..20).await;
    let recovers = async |channel: &str, last: u64| {
        let (_client, welcome) = Client::resume(&node, "a", channel, last).await;
        welcome["recovered"] == true
    };
    assert!(!recovers("room", ids[10]).await);
    assert!(recovers("room", ids[15]).await);
    assert!(recovers("other", small[0]).await);
}

#[tokio::test]
async fn busy_channels_evict_no_history_of_others() {
    let node = Node::start(&["--max-message-size", "1MiB", "--buffer-memory", "1MiB"]).await;
    let quiet = node.publish_numbers("quiet", 0..20).await;
    let large = json!({"text": "x".repeat(1_000_000)});
    let mut noise = Vec::new();
    for _ in 0..100 {
        noise.push(node.publish("noise", &large).await); // more than all histories may take together
    }
    let (mut back, welcome) = Client::resume(&node, "back", "quiet", quiet[0]).await;
    assert_eq!(welcome["recovered"], true, "{welcome}");
    back.expect_numbers(&quiet[1..], 1).await;
    let (_late, welcome) = Client::resume(&node, "late", "noise", noise[10]).await;
    assert_eq!(welcome["recovered"], false, "{welcome}");
    let (_soon, welcome) = Client::resume(&node, "soon", "noise", noise[70]).await;
    assert_eq!(welcome["recovered"], true, "{welcome}");
}

#[tokio::test]
async fn restarted_local_bus_recovers_no_old_id() {
    let node = Node::start(&[]).await;
    let ids = node.publish_numbers("room", 0..100).await;
    drop(node);
    let node = Node::start(&[]).await;
    for last in [ids[0], ids[99]] {
        let (_, welcome) = Client::resume(&node, "a", "room", last).await;
        assert_eq!(welcome["recovered"], false, "{welcome}");
        assert!(position(&welcome["head"]) > ids[99]);
    }
    assert!(node.publish("room", &json!({"n": 0})).await > ids[99]);
}

#[tokio::test]
async fn admin_logs_missing_descriptors_once() {
    let node = Node::start(&["--shards", "1"]).await;
    let stats = http::request_bytes(node.admin, "GET", "/stats", &[], b"");
    let mut accepted = Raw::connect(node.admin).await;
    accepted.write(&stats).await;
    accepted.response().await;
    node.limit_files(node.descriptors());
    // More than one, in case a file that the node had just opened was counted.
    let mut waiting = Vec::new();
    for _ in 0..6 {
        waiting.push(Raw::connect(node.admin).await);
    }
    // Accepting is retried, without a line for each failure.
    within("failed accepts", async {
        loop {
            accepted.write(&stats).await;
            let stats = accepted.response().await.json();
            if stats["accept_failures"].as_u64().expect("a counter") > 3 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
    let log = node.log();
    assert_eq!(log.matches("accept failed").count(), 1, "{log}");
    assert!(log.contains("LimitNOFILE") && log.contains("listener=\"admin\""), "{log}");
    drop(accepted);
    until("connections to be accepted again", || async {
        node.log().contains("accepting connections again").then_some(())
    })
    .await;
    drop(waiting);
}
