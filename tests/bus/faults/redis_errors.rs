//! Redis returns errors, or its clock is wrong.

use std::time::Duration;

use crate::checker::Outcome;
use crate::common::{Redis, until};
use crate::workload::publishers;
use crate::workload::run::{Run, Workload};
use crate::workload::testbed::Testbed;

#[tokio::test]
async fn subscribe_refused_by_acl() {
    let testbed = Testbed::start(&[], &[]).await;
    let run = Run::start(&testbed, Workload::default()).await;
    let mut redis = testbed.redis.client().await;
    for _ in 0..2 {
        run.wait_for_acks(30).await;
        // Redis closes the connections of subscribers that lose their rights.
        redis.call(&["ACL", "SETUSER", "default", "resetchannels"]).await;
        for place in 0..2 {
            let node = testbed.nodes.get(place);
            let says = || async { node.unready().await.contains("SUBSCRIBE").then_some(()) };
            until("a reason that names the command", says).await;
        }
        redis.call(&["ACL", "SETUSER", "default", "allchannels"]).await;
        testbed.ready().await;
        run.wait_for_delivery().await;
    }
    // FCALL worked all the time, without messages to the nodes: the events come from history.
    run.end().await.assert_no_loss_reported();
    assert!(testbed.metric("fanfare_bus_gaps_filled_total").await > 0.0);
}

#[tokio::test]
async fn redis_out_of_memory() {
    let testbed = Testbed::start(&["--maxmemory-policy", "noeviction"], &[]).await;
    let run = Run::start(&testbed, Workload::default()).await;
    let mut redis = testbed.redis.client().await;
    let rejections = || async {
        let each = ["json", "post", "fcall"]
            .iter()
            .all(|kind| run.shared.main().count(kind, Outcome::Rejected) >= 3);
        each.then_some(())
    };
    run.wait_for_acks(30).await;
    redis.call(&["CONFIG", "SET", "maxmemory", "1"]).await;
    until("events to be rejected", rejections).await;
    redis.call(&["CONFIG", "SET", "maxmemory", "0"]).await;
    run.wait_for_delivery().await;
    let report = run.end().await;
    report.assert_no_loss_reported();
    for kind in ["json", "post", "fcall"] {
        let of_kind = report.history.attempts.iter().filter(|attempt| attempt.line.starts_with(kind));
        let (rejected, unknown) =
            of_kind.fold((0, 0), |(rejected, unknown), attempt| match attempt.outcome {
                Outcome::Rejected => (rejected + 1, unknown),
                Outcome::Unknown => (rejected, unknown + 1),
                Outcome::Acked(_) => (rejected, unknown),
            });
        assert!(
            rejected > 0 && unknown == 0,
            "{kind}: {rejected} rejected, {unknown} unknown: all answers are certain"
        );
    }
}

#[tokio::test]
async fn clock_set_back_and_redis_wiped() {
    let testbed = Testbed::on(Redis::with_clock().await, &[]).await;
    // Only nodes publish, which know the ids they have seen.
    let run = Run::start(&testbed, Workload { programs: 0, ..Workload::default() }).await;
    run.wait_for_acks(50).await;
    testbed.redis.set_clock_back().await;
    run.wait_for_acks(50).await;
    run.wait_for_delivery().await;
    let head = testbed.redis.head("room").await;
    testbed.redis.client().await.call(&["FLUSHALL"]).await;
    run.wait_for_delivery().await;
    run.wait_for_acks(50).await;
    assert!(testbed.redis.head("room").await > head + (1 << 20), "far above all that was given");
    run.end().await.assert_loss_reported(1..=1);
}

#[tokio::test]
async fn clock_set_back_and_fcall_first_after_wipe() {
    let testbed = Testbed::on(Redis::with_clock().await, &[]).await;
    let mut run = Run::start(&testbed, Workload { programs: 0, ..Workload::default() }).await;
    // Redis does not know that higher ids existed: FCALL gets a lower one, and the loss is
    // announced.
    run.ids_may_fall();
    testbed.redis.set_clock_back().await;
    run.wait_for_acks(50).await;
    for proxy in &testbed.proxies {
        proxy.silence(crate::common::Silence { up: true, down: true });
    }
    testbed.redis.flush_all_but_settings().await;
    let id = publishers::one(&run.shared, "the first").await;
    assert!(id < run.shared.main().acked().1, "it got a lower id");
    for proxy in &testbed.proxies {
        proxy.silence(crate::common::Silence::default());
    }
    run.wait_for_acks(50).await;
    run.wait_for_delivery().await;
    let head = testbed.redis.head("room").await;
    assert!(head > run.shared.main().acked().1 - 100_000_000 && head > id, "ids are above all again");
    run.end().await.assert_loss_reported(1..=2);
}

#[tokio::test]
async fn answers_later_than_the_publish_timeout() {
    let testbed = Testbed::start(&[], &["--publish-timeout", "1s"]).await;
    let run = Run::start(&testbed, Workload { clients: 2, ..Workload::default() }).await;
    let count = |outcome| run.shared.main().count("json", outcome) + run.shared.main().count("post", outcome);
    // The publishes in flight may happen to be of plain clients, which get no answer.
    for round in 0.. {
        assert!(round < 10, "no outcome was unknown");
        run.wait_for_acks(30).await;
        let rejected = count(Outcome::Rejected);
        for proxy in &testbed.proxies {
            proxy.silence(crate::common::Silence { down: true, up: false });
        }
        // Redis executes what was sent, and its answers are lost: the outcome is unknown. Waiting
        // publishes are rejected.
        until("rejections", || async { (count(Outcome::Rejected) >= rejected + 5).then_some(()) }).await;
        for proxy in &testbed.proxies {
            proxy.silence(crate::common::Silence::default());
        }
        testbed.ready().await;
        run.wait_for_delivery().await;
        if count(Outcome::Unknown) >= 4 {
            break;
        }
    }
    let report = run.end().await;
    report.assert_no_loss_reported();
    // The checker verifies that no rejected event was delivered. Here: some unknown ones were.
    let unknown = report
        .history
        .attempts
        .iter()
        .filter(|attempt| attempt.outcome == Outcome::Unknown && !attempt.line.starts_with("plain"));
    assert!(unknown.filter(|attempt| report.came(&attempt.body)).count() > 0, "Redis took none of them");
    let slowest = report.slowest(|line| line.starts_with("json") || line.starts_with("post"));
    assert!(slowest < Duration::from_secs(1) + Duration::from_millis(1500), "an answer after {slowest:?}");
}

#[tokio::test]
async fn publishes_in_an_outage_are_bounded_and_ordered() {
    let flags = ["--appendonly", "yes", "--appendfsync", "always"];
    let mut testbed = Testbed::start(&flags, &["--redis-durable", "--publish-timeout", "2s"]).await;
    let run = Run::start(&testbed, Workload { clients: 2, ..Workload::default() }).await;
    // Shorter than the publish timeout: everything is published, in order.
    run.wait_for_acks(30).await;
    testbed.redis.kill();
    testbed.unready().await;
    testbed.redis.up().await;
    testbed.ready().await;
    run.wait_for_delivery().await;
    // Longer: every publish is rejected in time.
    let rejected = testbed.metric("fanfare_bus_publish_rejected_total").await;
    testbed.redis.kill();
    until("rejections", || async {
        (testbed.metric("fanfare_bus_publish_rejected_total").await > rejected + 20.0).then_some(())
    })
    .await;
    testbed.redis.up().await;
    testbed.ready().await;
    run.wait_for_delivery().await;
    run.wait_for_acks(30).await;
    let report = run.end().await;
    report.assert_no_loss_reported();
    let slowest = report.slowest(|line| line.starts_with("json") || line.starts_with("post"));
    assert!(
        slowest < Duration::from_secs(2) + Duration::from_millis(1500),
        "an answer came after {slowest:?}"
    );
    assert!(slowest > Duration::from_secs(1), "some publish waited: {slowest:?}");
}
