//! How long a loss may stay unnoticed without further traffic.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::common::Client;
use crate::workload::testbed::Testbed;

/// The limit for delivering a lost last event.
const LOST_EVENT: Duration = Duration::from_secs(2);

/// The limit for replacing a connection that hangs.
const HALF_OPEN: Duration = Duration::from_secs(5);

/// No text frames but events.
const QUIET: [&str; 2] = ["--ping-format", "websocket"];

#[tokio::test]
async fn lost_last_event_arrives_within_2_s() {
    let testbed = Testbed::start(&[], &QUIET).await;
    let (a, b) = (testbed.nodes.get(0), testbed.nodes.get(1));
    let (mut client, _) = Client::resume(&b, "subscriber", "quiet", "").await;
    for n in 1..=5 {
        testbed.proxies[1].drop_message_with(&format!("lost {n}")).await;
        let event = json!({"text": format!("lost {n}")});
        let id = a.publish("quiet", &event).await;
        let start = Instant::now();
        client.expect_event(id, &event).await;
        let took = start.elapsed();
        assert_eq!(testbed.proxies[1].dropped(), n, "the message was lost");
        assert!(took < LOST_EVENT, "it came after {took:?}");
    }
    assert_eq!(b.metric("fanfare_bus_gaps_filled_total").await, 5.0);
}

#[tokio::test]
async fn half_open_subscription_is_replaced_within_5_s() {
    let testbed = Testbed::start(&[], &QUIET).await;
    let (a, b) = (testbed.nodes.get(0), testbed.nodes.get(1));
    let (mut client, _) = Client::resume(&b, "subscriber", "quiet", "").await;
    for n in 1..=3 {
        let (event, connections) = (json!({"text": format!("lost {n}")}), testbed.proxies[1].connections());
        testbed.proxies[1].strand_subscribers();
        let start = Instant::now();
        let id = a.publish("quiet", &event).await;
        client.expect_event(id, &event).await;
        let took = start.elapsed();
        assert!(took < HALF_OPEN, "it came after {took:?}");
        assert!(testbed.proxies[1].connections() > connections, "by new connections");
        b.ready().await;
        assert!(start.elapsed() < HALF_OPEN + LOST_EVENT, "ready after {:?}", start.elapsed());
    }
}

#[tokio::test]
async fn readiness_follows_redis_both_ways() {
    let mut testbed = Testbed::start(&[], &[]).await;
    let node = testbed.nodes.get(0);
    for _ in 0..2 {
        let start = Instant::now();
        testbed.redis.kill();
        node.unready().await;
        assert!(start.elapsed() < LOST_EVENT, "not ready {:?} after Redis died", start.elapsed());
        let start = Instant::now();
        testbed.redis.up().await;
        node.ready().await;
        assert!(start.elapsed() < HALF_OPEN, "ready {:?} after Redis came", start.elapsed());
    }
    for _ in 0..2 {
        let start = Instant::now();
        testbed.redis.freeze();
        node.unready().await;
        assert!(start.elapsed() < HALF_OPEN, "not ready {:?} after Redis hung", start.elapsed());
        let start = Instant::now();
        testbed.redis.thaw();
        node.ready().await;
        assert!(start.elapsed() < HALF_OPEN, "ready {:?} after Redis went on", start.elapsed());
    }
    let start = Instant::now();
    testbed.proxies[0].strand_subscribers();
    node.unready().await;
    assert!(start.elapsed() < HALF_OPEN, "not ready {:?} after the subscriptions hung", start.elapsed());
    node.ready().await;
    assert!(start.elapsed() < 2 * HALF_OPEN, "ready {:?} after that", start.elapsed());
}
