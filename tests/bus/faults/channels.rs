//! Clients that follow many channels on one socket, under faults: more channels than a connection
//! may have, and tokens that lose channels. All other tests of faults have such clients, too.

use crate::common::TokenKey;
use crate::workload::run::{Run, Workload};
use crate::workload::testbed::Testbed;

/// Less than a second of events in memory, so that subscriptions are resumed from history.
const SHORT: [&str; 2] = ["--buffer-memory", "64KiB"];

/// Cuts connections to Redis and kills a node under load, which loses nothing.
async fn survives(mut flags: Vec<&str>, workload: Workload, code: &str) {
    flags.extend(SHORT);
    let testbed = Testbed::start(&[], &flags).await;
    let run = Run::start(&testbed, workload).await;
    for proxy in &testbed.proxies {
        run.wait_for_acks(150).await;
        proxy.cut();
        run.wait_for_delivery().await;
    }
    testbed.nodes.get(0).kill();
    testbed.replace(0).await;
    run.wait_for_delivery().await;
    run.wait_for_acks(150).await;
    run.end().await.assert_no_loss_reported();
    let label = format!("code=\"{code}\"");
    let rejected = testbed.nodes.get(1).metric_of("fanfare_subscription_errors_total", &label).await;
    assert!(rejected > 0.0, "no subscription was rejected");
}

#[tokio::test]
async fn more_channels_than_a_connection_may_have() {
    let workload = Workload { channels: 6, subscriptions_max: 3, ..Workload::default() };
    survives(vec!["--max-subscriptions", "3"], workload, "too_many").await;
}

#[tokio::test]
async fn tokens_that_lose_channels() {
    let key = TokenKey::new();
    let path = key.path();
    let workload = Workload { channels: 5, token_key: Some(key), ..Workload::default() };
    // A user's clients send more pings and tokens than the default rate allows.
    survives(vec!["--jwt-key", &path, "--max-message-rate", "0"], workload, "forbidden").await;
}
