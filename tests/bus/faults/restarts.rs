//! Restarts and wipes of Redis, with and without lost writes, and restarts of nodes.

use std::time::Duration;

use crate::checker::Outcome;
use crate::common::Redis;
use crate::workload::run::{Run, Workload};
use crate::workload::testbed::Testbed;

const DURABLE: [&str; 4] = ["--appendonly", "yes", "--appendfsync", "always"];

/// Kills and restarts Redis under load, and waits until events are delivered again.
async fn kill(testbed: &mut Testbed, run: &Run, between: impl FnOnce(&Redis)) {
    run.wait_for_acks(50).await;
    testbed.redis.kill();
    testbed.unready().await;
    between(&testbed.redis);
    testbed.redis.up().await;
    testbed.ready().await;
    run.wait_for_delivery().await;
    run.wait_for_acks(50).await;
}

#[tokio::test]
async fn durable_redis_restart_without_reset() {
    let mut testbed = Testbed::start(&DURABLE, &["--redis-durable"]).await;
    let run = Run::start(&testbed, Workload::default()).await;
    let before = testbed.redis.info("run_id").await;
    for _ in 0..2 {
        kill(&mut testbed, &run, |_| {}).await;
    }
    assert_ne!(testbed.redis.info("run_id").await, before, "it was another process");
    let report = run.end().await;
    report.assert_no_loss_reported();
    assert_eq!(testbed.metric("fanfare_bus_resets_total").await, 0.0);
}

#[tokio::test]
async fn fsynced_redis_restart_resets_unless_durable() {
    let mut testbed = Testbed::start(&DURABLE, &[]).await;
    let run = Run::start(&testbed, Workload::default()).await;
    kill(&mut testbed, &run, |_| {}).await;
    let report = run.end().await;
    report.assert_loss_reported(1..=1);
    assert_eq!(testbed.metric("fanfare_bus_resets_total").await, 10.0, "once for each channel and node");
}

#[tokio::test]
async fn redis_loses_last_writes_with_everysec() {
    let mut testbed = Testbed::start(&["--appendonly", "yes", "--appendfsync", "everysec"], &[]).await;
    let run = Run::start(&testbed, Workload::default()).await;
    let mut lost = String::new();
    kill(&mut testbed, &run, |redis| {
        // As after a power failure: writes that were not synced are lost.
        let file = redis.directory().join("appendonlydir/appendonly.aof.1.incr.aof");
        let bytes = std::fs::read(&file).expect("the append-only file");
        let keep = bytes.len() - 4000;
        lost = String::from_utf8_lossy(&bytes[keep..]).into_owned();
        let file = std::fs::OpenOptions::new().write(true).open(&file).expect("the append-only file");
        file.set_len(keep as u64).expect("a file can be cut");
    })
    .await;
    let report = run.end().await;
    report.assert_loss_reported(1..=1);
    let text = |body: &str| serde_json::from_str::<serde_json::Value>(body).expect("JSON")["text"].clone();
    let acked = |outcome| matches!(outcome, Outcome::Acked(_));
    let gone = report.history.attempts.iter().filter(|attempt| acked(attempt.outcome));
    let gone = gone.filter(|attempt| lost.contains(&format!("{}", text(&attempt.body)))).count();
    assert!(gone > 0, "events that had been acknowledged were lost");
}

#[tokio::test]
async fn redis_without_persistence_is_killed() {
    let mut testbed = Testbed::start(&[], &[]).await;
    let run = Run::start(&testbed, Workload { channels: 50, ..Workload::default() }).await;
    for _ in 0..2 {
        kill(&mut testbed, &run, |_| {}).await;
    }
    run.end().await.assert_loss_reported(2..=2);
}

#[tokio::test]
async fn flushall_resets_clients() {
    let testbed = Testbed::start(&[], &[]).await;
    let run = Run::start(&testbed, Workload { channels: 50, ..Workload::default() }).await;
    for _ in 0..2 {
        run.wait_for_acks(50).await;
        let head = testbed.redis.head("room").await;
        testbed.redis.client().await.call(&["FLUSHALL"]).await;
        // FLUSHALL keeps the functions.
        run.wait_for_delivery().await;
        assert!(testbed.redis.head("room").await > head);
    }
    run.end().await.assert_loss_reported(2..=2);
}

#[tokio::test]
async fn empty_redis_behind_ids_of_nodes() {
    let redis = Redis::start(&[]).await;
    // Years ahead, as if the clock had been wrong when the channel was created.
    let far = (1_u64 << 52).to_string();
    let meta = ["HSET", "fanfare:{room}:meta", "head", &far, "base", &far, "run"];
    let epoch = redis.info("master_replid").await;
    redis.client().await.call(&[&meta[..], &[&epoch]].concat()).await;
    let mut testbed = Testbed::on(redis, &[]).await;
    // Without FCALL, which does not know the ids that nodes have seen: see the test of the clock.
    let run = Run::start(&testbed, Workload { programs: 0, ..Workload::default() }).await;
    kill(&mut testbed, &run, |_| {}).await;
    let report = run.end().await;
    report.assert_loss_reported(1..=1);
    let ids = report.history.attempts.iter().filter_map(|attempt| match attempt.outcome {
        Outcome::Acked(id) => Some(id),
        _ => None,
    });
    assert!(ids.min() > Some(1 << 52), "the far id was in force from the beginning");
}

#[tokio::test]
async fn clients_of_a_killed_node_resume_elsewhere() {
    let testbed = Testbed::start(&[], &[]).await;
    let run = Run::start(&testbed, Workload { channels: 101, ..Workload::default() }).await;
    run.wait_for_acks(50).await;
    testbed.nodes.get(0).kill();
    run.wait_for_delivery().await;
    run.wait_for_acks(50).await;
    let report = run.end().await;
    report.assert_no_loss_reported();
    let moved = report.history.subscribers.iter().filter(|subscriber| subscriber.connections() > 1).count();
    assert!(moved >= 3, "all that were there have gone elsewhere");
}

#[tokio::test]
async fn nodes_restarted_under_load() {
    let testbed = Testbed::start(&[], &[]).await;
    let run = Run::start(&testbed, Workload { channels: 50, ..Workload::default() }).await;
    for place in [0, 1, 0] {
        run.wait_for_acks(30).await;
        let old = testbed.nodes.get(place);
        old.signal("TERM");
        assert!(old.ended().await.success(), "it ends in order");
        testbed.replace(place).await;
        run.wait_for_delivery().await;
    }
    run.end().await.assert_no_loss_reported();
}

#[tokio::test]
async fn publishers_race_on_new_channels() {
    let testbed = Testbed::start(&[], &[]).await;
    for channel in ["new1", "new2", "new3", "new4", "new5", "new6"] {
        // Everything starts at once, in any order: the first event, the first follow and the first
        // join.
        let workload = Workload {
            channel: channel.into(),
            pace: Duration::from_millis(2),
            clients: 2,
            programs: 2,
            ..Workload::default()
        };
        let run = Run::start(&testbed, workload).await;
        run.wait_for_acks(50).await;
        run.end().await.assert_no_loss_reported();
    }
}
