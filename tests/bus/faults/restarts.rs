//! Redis dies, is wiped, or comes back with less than it had.

use std::time::Duration;

use crate::checker::Outcome;
use crate::common::Redis;
use crate::workload::crowd::{Crowd, Run};
use crate::workload::world::World;

const DURABLE: [&str; 4] = ["--appendonly", "yes", "--appendfsync", "always"];

/// Kills Redis in the middle of the crowd's work, starts it again, and waits until all works.
async fn kill(world: &mut World, run: &Run, between: impl FnOnce(&Redis)) {
    run.goes_on(50).await;
    world.redis.kill();
    world.unready().await;
    between(&world.redis);
    world.redis.up().await;
    world.ready().await;
    run.flows().await;
    run.goes_on(50).await;
}

#[tokio::test]
async fn redis_killed_with_appendfsync_always_and_the_word_for_it() {
    let mut world = World::start(&DURABLE, &["--redis-durable"]).await;
    let run = Run::start(&world, Crowd::default()).await;
    let before = world.redis.info("run_id").await;
    for _ in 0..2 {
        kill(&mut world, &run, |_| {}).await;
    }
    assert_ne!(world.redis.info("run_id").await, before, "it was another process");
    let verdict = run.end().await;
    verdict.nobody_was_told();
    assert_eq!(world.metric("fanfare_bus_resets_total").await, 0.0);
}

#[tokio::test]
async fn redis_killed_with_appendfsync_always_without_the_word_for_it() {
    let mut world = World::start(&DURABLE, &[]).await;
    let run = Run::start(&world, Crowd::default()).await;
    kill(&mut world, &run, |_| {}).await;
    let verdict = run.end().await;
    verdict.everybody_was_told(1..=1);
    assert_eq!(world.metric("fanfare_bus_resets_total").await, 2.0, "once for each node");
}

#[tokio::test]
async fn redis_loses_its_last_writes_with_appendfsync_everysec() {
    let mut world = World::start(&["--appendonly", "yes", "--appendfsync", "everysec"], &[]).await;
    let run = Run::start(&world, Crowd::default()).await;
    let mut lost = String::new();
    kill(&mut world, &run, |redis| {
        // As after a power failure: what was written and not yet synced is gone.
        let file = redis.directory().join("appendonlydir/appendonly.aof.1.incr.aof");
        let bytes = std::fs::read(&file).expect("the append-only file");
        let keep = bytes.len() - 4000;
        lost = String::from_utf8_lossy(&bytes[keep..]).into_owned();
        let file = std::fs::OpenOptions::new().write(true).open(&file).expect("the append-only file");
        file.set_len(keep as u64).expect("a file can be cut");
    })
    .await;
    let verdict = run.end().await;
    verdict.everybody_was_told(1..=1);
    let text = |body: &str| serde_json::from_str::<serde_json::Value>(body).expect("JSON")["text"].clone();
    let acked = |outcome| matches!(outcome, Outcome::Acked(_));
    let gone = verdict.history.attempts.iter().filter(|attempt| acked(attempt.outcome));
    let gone = gone.filter(|attempt| lost.contains(&format!("{}", text(&attempt.body)))).count();
    assert!(gone > 0, "events that had been acknowledged were lost");
}

#[tokio::test]
async fn redis_killed_that_keeps_nothing() {
    let mut world = World::start(&[], &[]).await;
    let run = Run::start(&world, Crowd::default()).await;
    for _ in 0..2 {
        kill(&mut world, &run, |_| {}).await;
    }
    run.end().await.everybody_was_told(2..=2);
}

#[tokio::test]
async fn flushall() {
    let world = World::start(&[], &[]).await;
    let run = Run::start(&world, Crowd::default()).await;
    for _ in 0..2 {
        run.goes_on(50).await;
        let head = world.redis.head("room").await;
        world.redis.client().await.call(&["FLUSHALL"]).await;
        // The functions are still there: FLUSHALL leaves them.
        run.flows().await;
        assert!(world.redis.head("room").await > head);
    }
    run.end().await.everybody_was_told(2..=2);
}

#[tokio::test]
async fn redis_comes_back_empty_while_nodes_hold_ids_ahead_of_its_clock() {
    let redis = Redis::start(&[]).await;
    // Years ahead: as if the clock had been wrong when the channel began.
    let far = (1_u64 << 52).to_string();
    let meta = ["HSET", "fanfare:{room}:meta", "head", &far, "base", &far, "run"];
    let epoch = redis.info("master_replid").await;
    redis.client().await.call(&[&meta[..], &[&epoch]].concat()).await;
    let mut world = World::on(redis, &[]).await;
    // Programs that come first know nothing of what nodes have seen: see the test of the clock.
    let run = Run::start(&world, Crowd { programs: 0, ..Crowd::default() }).await;
    kill(&mut world, &run, |_| {}).await;
    let verdict = run.end().await;
    verdict.everybody_was_told(1..=1);
    let ids = verdict.history.attempts.iter().filter_map(|attempt| match attempt.outcome {
        Outcome::Acked(id) => Some(id),
        _ => None,
    });
    assert!(ids.min() > Some(1 << 52), "the far id was in force from the beginning");
}

#[tokio::test]
async fn a_node_killed_and_its_clients_resume_on_another() {
    let world = World::start(&[], &[]).await;
    let run = Run::start(&world, Crowd::default()).await;
    run.goes_on(50).await;
    world.nodes.get(0).kill();
    run.flows().await;
    run.goes_on(50).await;
    let verdict = run.end().await;
    verdict.nobody_was_told();
    let moved = verdict.history.watchers.iter().filter(|watcher| watcher.connections() > 1).count();
    assert!(moved >= 3, "all that were there have gone elsewhere");
}

#[tokio::test]
async fn nodes_restarted_under_load() {
    let world = World::start(&[], &[]).await;
    let run = Run::start(&world, Crowd::default()).await;
    for place in [0, 1, 0] {
        run.goes_on(30).await;
        let old = world.nodes.get(place);
        old.signal("TERM");
        assert!(old.ended().await.success(), "it ends in order");
        world.replace(place).await;
        run.flows().await;
    }
    run.end().await.nobody_was_told();
}

#[tokio::test]
async fn publishers_race_on_new_channels() {
    let world = World::start(&[], &[]).await;
    for channel in ["new1", "new2", "new3", "new4", "new5", "new6"] {
        // Everybody begins at once: the first event, the first follow and the first join are whoever's they are.
        let crowd = Crowd {
            channel: channel.into(),
            pace: Duration::from_millis(2),
            clients: 2,
            programs: 2,
            ..Crowd::default()
        };
        let run = Run::start(&world, crowd).await;
        run.goes_on(50).await;
        run.end().await.nobody_was_told();
    }
}
