//! Connections between nodes and Redis that break, hang, lose or delay; a Redis that hangs or is slow.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::sleep;

use crate::checker::{Outcome, Watcher};
use crate::common::{Client, Silence, until};
use crate::workload::crowd::{Crowd, Run, local};
use crate::workload::publishers;
use crate::workload::world::World;

/// Longer than a node waits for a lost Redis before it gives the connections up.
const LONG: Duration = Duration::from_secs(6);

/// Hardly a second of events in memory: whoever stalls or stays away reads history.
const SHORT: [&str; 2] = ["--buffer-memory", "64KiB"];

#[tokio::test]
async fn answers_to_publishes_are_lost_and_publishes_retried() {
    let world = World::start(&[], &[]).await;
    let run = Run::start(&world, Crowd { clients: 2, ..Crowd::default() }).await;
    for round in 1..=5 {
        for way in &world.ways {
            way.lose_answer_to(r#""text":"#).await;
        }
        run.goes_on(30).await;
        for way in &world.ways {
            until("a lost answer", || async { (way.lost() >= round).then_some(()) }).await;
        }
        run.flows().await;
    }
    let verdict = run.end().await;
    verdict.nobody_was_told();
    let settled = |line: &str| line.starts_with("json") || line.starts_with("post");
    for attempt in verdict.history.attempts.iter().filter(|attempt| settled(&attempt.line)) {
        assert!(
            matches!(attempt.outcome, Outcome::Acked(_)),
            "its retry got the first one's answer: {attempt:?}"
        );
    }
}

#[tokio::test]
async fn answers_to_publishes_come_late() {
    let world = World::start(&[], &[]).await;
    let run = Run::start(&world, Crowd::default()).await;
    for _ in 0..3 {
        run.goes_on(30).await;
        let acked = run.acked();
        for way in &world.ways {
            way.silence(Silence { down: true, up: false });
        }
        let head = world.redis.head("room").await;
        // What is sent is done; only its answers wait.
        until("an event without an answer", || async {
            (world.redis.head("room").await > head + 2).then_some(())
        })
        .await;
        sleep(Duration::from_secs(1)).await; // the length of the fault
        for way in &world.ways {
            way.silence(Silence::default());
        }
        run.goes_on(20).await;
        assert!(run.acked() > acked);
    }
    let verdict = run.end().await;
    verdict.nobody_was_told();
    // A plain client is never told; everybody else was.
    let unknown = verdict.history.attempts.iter().filter(|a| a.outcome == Outcome::Unknown);
    assert_eq!(unknown.filter(|attempt| !attempt.line.starts_with("plain")).count(), 0);
}

#[tokio::test]
async fn redis_stopped_for_seconds() {
    let world = World::start(&[], &SHORT).await;
    let run = Run::start(&world, Crowd { roamers: 6, slow: 3, ..Crowd::default() }).await;
    run.goes_on(50).await;
    world.redis.freeze();
    world.unready().await;
    sleep(LONG).await; // the length of the fault
    world.redis.thaw();
    world.ready().await;
    run.flows().await;
    run.goes_on(50).await;
    run.end().await.nobody_was_told();
}

#[tokio::test]
async fn client_kill_in_a_loop() {
    let world = World::start(&[], &SHORT).await;
    let run = Run::start(&world, Crowd { programs: 0, roamers: 6, slow: 3, ..Crowd::default() }).await;
    let mut redis = world.redis.client().await;
    let mut killed = 0;
    for round in 0..12 {
        run.goes_on(20).await;
        let kind = ["pubsub", "normal"][round % 2];
        killed += redis.call(&["CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes"]).await.int();
        world.ready().await;
    }
    run.flows().await;
    assert!(killed >= 12 * 2, "both nodes, each time: {killed}");
    run.end().await.nobody_was_told();
    assert!(
        world.metric("fanfare_bus_gaps_filled_total").await > 0.0,
        "messages were lost, and read from history"
    );
}

#[tokio::test]
async fn the_network_of_one_node_drops_everything_and_heals() {
    cut(Silence { up: true, down: true }).await;
}

#[tokio::test]
async fn the_network_of_one_node_carries_nothing_from_redis() {
    cut(Silence { up: false, down: true }).await;
}

#[tokio::test]
async fn the_network_of_one_node_carries_nothing_to_redis() {
    cut(Silence { up: true, down: false }).await;
}

async fn cut(silence: Silence) {
    let world = World::start(&[], &[]).await;
    let run = Run::start(&world, Crowd::default()).await;
    run.goes_on(30).await;
    let connections = world.ways[1].connections();
    world.ways[1].silence(silence);
    world.nodes.get(1).unready().await;
    assert_eq!(world.nodes.get(0).get("/readyz").await.status, 200, "the other works");
    sleep(LONG).await; // the length of the fault
    world.ways[1].silence(Silence::default());
    world.ready().await;
    assert!(world.ways[1].connections() > connections, "connections were given up and made anew");
    run.flows().await;
    run.end().await.nobody_was_told();
    assert!(world.nodes.get(1).metric("fanfare_bus_gaps_filled_total").await > 0.0);
}

#[tokio::test]
async fn one_connection_of_two_hangs() {
    let world = World::start(&[], &[]).await;
    let run = Run::start(&world, Crowd::default()).await;
    for _ in 0..2 {
        run.goes_on(30).await;
        world.ways[1].strand();
        world.nodes.get(1).unready().await;
        world.ready().await;
        run.flows().await;
    }
    run.end().await.nobody_was_told();
}

#[tokio::test]
async fn redis_is_fifty_milliseconds_away() {
    let world = World::start(&[], &[]).await;
    let run = Run::start(&world, Crowd::default()).await;
    for way in &world.ways {
        way.delay(Duration::from_millis(50));
    }
    run.goes_on(200).await;
    run.flows().await;
    for place in 0..2 {
        let node = world.nodes.get(place);
        until("canaries that are as late as the delay is long", || async {
            let below = node.metric_of("fanfare_bus_round_trip_seconds_bucket", r#"le="0.1""#).await;
            (node.metric("fanfare_bus_round_trip_seconds_count").await > below).then_some(())
        })
        .await;
        assert_eq!(world.nodes.get(place).get("/readyz").await.status, 200, "slow is not away");
    }
    let verdict = run.end().await;
    verdict.nobody_was_told();
    assert_eq!(verdict.count(|outcome| outcome == Outcome::Refused), 0);
}

#[tokio::test]
async fn a_subscriber_runs_into_its_output_buffer_limit() {
    let world = World::start(&[], &[]).await;
    let mut redis = world.redis.client().await;
    redis.call(&["CONFIG", "SET", "client-output-buffer-limit", "pubsub 256kb 0 0"]).await;
    let run = Run::start(&world, Crowd::default()).await;
    world.ways[1].hold_messages(true);
    publishers::burst(&run.shared, "large", 150, 60_000).await;
    until("Redis to throw the subscriber out", || async {
        world.redis.log().contains("overcoming of output buffer limits").then_some(())
    })
    .await;
    world.ways[1].hold_messages(false);
    run.flows().await;
    run.end().await.nobody_was_told();
    assert!(world.nodes.get(1).metric("fanfare_bus_gaps_filled_total").await > 0.0);
}

#[tokio::test]
async fn more_messages_at_once_than_the_client_library_holds() {
    let flags = ["--log", "info,fanfare::bus=debug", "--history", "200000", "--pubsub-channels", "b"];
    let world = World::start(&[], &flags).await;
    let run = Run::start(&world, Crowd { roamers: 0, ..Crowd::default() }).await;
    let node = world.nodes.get(1);
    let _follows = Client::plain(&node, "follower", "b").await;
    let lagged = || node.log().contains("messages came faster than they were taken");
    // They wait in the node's socket, and then come all at once: events, among many messages as small as can be, that
    // nobody sees for the TAB they begin with. Whether that is too fast depends on how the node's tasks get their
    // turns, so it is done until it was.
    for round in 0.. {
        assert!(round < 20, "no lag: {}", node.log());
        node.signal("STOP");
        let name = format!("small {round}");
        tokio::join!(flood(&world, 40_000), publishers::burst(&run.shared, &name, 1_000, 1));
        node.signal("CONT");
        run.flows().await;
        if lagged() {
            break;
        }
    }
    run.end().await.nobody_was_told();
}

async fn flood(world: &World, count: usize) {
    let mut redis = TcpStream::connect(local(world.redis.port())).await.expect("Redis runs");
    let command = "*3\r\n$7\r\nPUBLISH\r\n$1\r\nb\r\n$1\r\n\t\r\n";
    for _ in 0..count / 500 {
        redis.write_all(command.repeat(500).as_bytes()).await.expect("Redis runs");
        let mut answers = 0;
        while answers < 500 {
            let mut buffer = [0; 4096];
            let length = redis.read(&mut buffer).await.expect("Redis answers");
            answers += buffer[..length].iter().filter(|byte| **byte == b':').count();
        }
    }
}

#[tokio::test]
async fn single_messages_are_lost_under_traffic() {
    let world = World::start(&[], &[]).await;
    let run = Run::start(&world, Crowd::default()).await;
    for n in 1..=30 {
        for way in &world.ways {
            way.drop_message_with(r#""text":"#).await;
        }
        for way in &world.ways {
            until("a message to be lost", || async { (way.dropped() >= n).then_some(()) }).await;
        }
        run.goes_on(5).await;
    }
    run.flows().await;
    run.end().await.nobody_was_told();
    assert!(world.metric("fanfare_bus_gaps_filled_total").await >= 30.0, "and were read from history");
}

#[tokio::test]
async fn messages_are_lost_while_history_is_deleted() {
    let world = World::start(&[], &[]).await;
    let run = Run::start(&world, Crowd::default()).await;
    let mut redis = world.redis.client().await;
    let events = "fanfare:{room}:events";
    let mut gone = 0;
    for round in 0..4 {
        run.goes_on(20).await;
        // Under live traffic that gets through, nobody on a node needs history.
        let trim: &[&str] = if round % 2 == 0 { &["DEL", events] } else { &["XTRIM", events, "MAXLEN", "0"] };
        gone += redis.call(trim).await.int();
        run.goes_on(20).await;
        // What one node misses is not there any more when it looks for it.
        world.ways[1].hold_messages(true);
        run.goes_on(20).await;
        gone += redis.call(trim).await.int();
        world.ways[1].cut();
        world.ways[1].hold_messages(false);
        run.flows().await;
    }
    assert!(gone >= 8, "it was there, and was deleted each time: {gone}");
    let verdict = run.end().await;
    let at = |place: usize| move |watcher: &&Watcher| watcher.recovers && watcher.home == Some(place);
    for watcher in verdict.history.watchers.iter().filter(at(1)) {
        assert!((1..=4).contains(&watcher.announcements()), "{}: {}", watcher.name, watcher.announcements());
    }
    for watcher in verdict.history.watchers.iter().filter(at(0)) {
        assert_eq!(watcher.announcements(), 0, "{}: it missed nothing", watcher.name);
    }
}
