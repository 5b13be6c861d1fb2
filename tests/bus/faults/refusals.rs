//! Redis is there and refuses, or its clock is wrong.

use std::time::Duration;

use crate::checker::Outcome;
use crate::common::{Redis, until};
use crate::workload::crowd::{Crowd, Run};
use crate::workload::publishers;
use crate::workload::world::World;

#[tokio::test]
async fn subscribe_refused_by_acl() {
    let world = World::start(&[], &[]).await;
    let run = Run::start(&world, Crowd::default()).await;
    let mut redis = world.redis.client().await;
    for _ in 0..2 {
        run.goes_on(30).await;
        // Redis ends the connections of those who are subscribed to what they may not have.
        redis.call(&["ACL", "SETUSER", "default", "resetchannels"]).await;
        for place in 0..2 {
            let node = world.nodes.get(place);
            let says = || async { node.unready().await.contains("SUBSCRIBE").then_some(()) };
            until("a node that says what Redis refuses", says).await;
        }
        redis.call(&["ACL", "SETUSER", "default", "allchannels"]).await;
        world.ready().await;
        run.flows().await;
    }
    // Programs could go on all the time, though nobody could be told: history has it.
    run.end().await.nobody_was_told();
    assert!(world.metric("fanfare_bus_gaps_filled_total").await > 0.0);
}

#[tokio::test]
async fn redis_out_of_memory() {
    let world = World::start(&["--maxmemory-policy", "noeviction"], &[]).await;
    let run = Run::start(&world, Crowd::default()).await;
    let mut redis = world.redis.client().await;
    let refusals = || async {
        let each = ["json", "post", "fcall"].iter().all(|way| run.shared.count(way, Outcome::Refused) >= 3);
        each.then_some(())
    };
    run.goes_on(30).await;
    redis.call(&["CONFIG", "SET", "maxmemory", "1"]).await;
    until("events to be refused", refusals).await;
    redis.call(&["CONFIG", "SET", "maxmemory", "0"]).await;
    run.flows().await;
    let verdict = run.end().await;
    verdict.nobody_was_told();
    for way in ["json", "post", "fcall"] {
        let of_way = verdict.history.attempts.iter().filter(|attempt| attempt.line.starts_with(way));
        let (refused, unknown) = of_way.fold((0, 0), |(refused, unknown), attempt| match attempt.outcome {
            Outcome::Refused => (refused + 1, unknown),
            Outcome::Unknown => (refused, unknown + 1),
            Outcome::Acked(_) => (refused, unknown),
        });
        assert!(
            refused > 0 && unknown == 0,
            "{way}: {refused} refused, {unknown} unknown: all are told for certain"
        );
    }
}

#[tokio::test]
async fn the_clock_is_set_back_and_redis_wiped() {
    let world = World::on(Redis::with_clock().await, &[]).await;
    // Only those publish who know what was seen.
    let run = Run::start(&world, Crowd { programs: 0, ..Crowd::default() }).await;
    run.goes_on(50).await;
    world.redis.set_clock_back().await;
    run.goes_on(50).await;
    run.flows().await;
    let head = world.redis.head("room").await;
    world.redis.client().await.call(&["FLUSHALL"]).await;
    run.flows().await;
    run.goes_on(50).await;
    assert!(world.redis.head("room").await > head + (1 << 20), "far above all that was given");
    run.end().await.everybody_was_told(1..=1);
}

#[tokio::test]
async fn the_clock_is_set_back_and_a_program_comes_first_after_the_wipe() {
    let world = World::on(Redis::with_clock().await, &[]).await;
    let mut run = Run::start(&world, Crowd { programs: 0, ..Crowd::default() }).await;
    // Nobody at Redis knows that higher ids were given: the program's event gets a lower one, and everybody is told.
    run.ids_may_fall();
    world.redis.set_clock_back().await;
    run.goes_on(50).await;
    for way in &world.ways {
        way.silence(crate::common::Silence { up: true, down: true });
    }
    world.redis.flush_all_but_settings().await;
    let id = publishers::one(&run.shared, "the first").await;
    assert!(id < run.shared.acked().1, "it got a lower id");
    for way in &world.ways {
        way.silence(crate::common::Silence::default());
    }
    run.goes_on(50).await;
    run.flows().await;
    let head = world.redis.head("room").await;
    assert!(head > run.shared.acked().1 - 100_000_000 && head > id, "ids are above all again");
    run.end().await.everybody_was_told(1..=2);
}

#[tokio::test]
async fn answers_stay_away_for_longer_than_anyone_waits() {
    let world = World::start(&[], &["--publish-timeout", "1s"]).await;
    let run = Run::start(&world, Crowd { clients: 2, ..Crowd::default() }).await;
    let count = |outcome| run.shared.count("json", outcome) + run.shared.count("post", outcome);
    // What is in flight may happen to be of those who are never told.
    for round in 0.. {
        assert!(round < 10, "nobody was told that it may or may not have been published");
        run.goes_on(30).await;
        let refused = count(Outcome::Refused);
        for way in &world.ways {
            way.silence(crate::common::Silence { down: true, up: false });
        }
        // Redis takes what was sent, and nobody hears of it: that is neither taken nor refused. What waits is refused.
        until("refusals", || async { (count(Outcome::Refused) >= refused + 5).then_some(()) }).await;
        for way in &world.ways {
            way.silence(crate::common::Silence::default());
        }
        world.ready().await;
        run.flows().await;
        if count(Outcome::Unknown) >= 4 {
            break;
        }
    }
    let verdict = run.end().await;
    verdict.nobody_was_told();
    // The judge looks that nothing refused came; and what was taken is not what was refused.
    let unknown = verdict
        .history
        .attempts
        .iter()
        .filter(|attempt| attempt.outcome == Outcome::Unknown && !attempt.line.starts_with("plain"));
    assert!(unknown.filter(|attempt| verdict.came(&attempt.body)).count() > 0, "Redis took none of them");
    let slowest = verdict.slowest(|line| line.starts_with("json") || line.starts_with("post"));
    assert!(slowest < Duration::from_secs(1) + Duration::from_millis(1500), "an answer after {slowest:?}");
}

#[tokio::test]
async fn a_publish_under_outage_is_bounded_and_keeps_its_order() {
    let flags = ["--appendonly", "yes", "--appendfsync", "always"];
    let mut world = World::start(&flags, &["--redis-durable", "--publish-timeout", "2s"]).await;
    let run = Run::start(&world, Crowd { clients: 2, ..Crowd::default() }).await;
    // Shorter than the wait: everything is taken, in order.
    run.goes_on(30).await;
    world.redis.kill();
    world.unready().await;
    world.redis.up().await;
    world.ready().await;
    run.flows().await;
    // Longer: everybody is told in time, again and again.
    let refused = world.metric("fanfare_bus_publish_rejected_total").await;
    world.redis.kill();
    until("refusals", || async {
        (world.metric("fanfare_bus_publish_rejected_total").await > refused + 20.0).then_some(())
    })
    .await;
    world.redis.up().await;
    world.ready().await;
    run.flows().await;
    run.goes_on(30).await;
    let verdict = run.end().await;
    verdict.nobody_was_told();
    let slowest = verdict.slowest(|line| line.starts_with("json") || line.starts_with("post"));
    assert!(
        slowest < Duration::from_secs(2) + Duration::from_millis(1500),
        "an answer came after {slowest:?}"
    );
    assert!(slowest > Duration::from_secs(1), "somebody waited: {slowest:?}");
}
