//! Users and channels that come, publish, go, and never come again: memory, descriptors,
//! subscriptions and keys return to where they were. `GROWTH_SECONDS` and `GROWTH_RATE` set how
//! long, and how many joins a second (10 and 500 by default). A longer run prints a line a minute.

use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::task::JoinSet;
use tokio::time::{Interval, MissedTickBehavior, interval, sleep};

use crate::common::client::position;
use crate::common::{Client, Node, Redis, Rng, until};

/// Visits until everything that is allocated once has been allocated.
const WARM_UP: u64 = 2000;
/// Memory by which a node may grow after its warm-up. It remembers a channel for up to 75 s after the
/// last subscriber has left, in up to 5 KB, and the allocator keeps some pages.
const SLACK: u64 = 8 << 20;
/// Longer than a visitor is away, short enough to wait until its keys have expired.
const HISTORY_TTL: &str = "5s";

/// Joins a channel that only this visitor has, and uses it in one of several ways.
async fn visit(nodes: Arc<[Node; 2]>, number: u64) {
    let mut rng = Rng(number);
    let (user, channel) = (format!("user{number}"), format!("channel{number}"));
    let [node, other] = match rng.below(2) {
        0 => [&nodes[0], &nodes[1]],
        _ => [&nodes[1], &nodes[0]],
    };
    let event = json!({ "text": number.to_string() });
    let (mut client, welcome) = Client::json(node, &user, &channel).await;
    sleep(Duration::from_millis(rng.below(2000))).await;
    match number % 8 {
        0 => {
            let (id, _) = client.send_for_ack(event).await;
            id.expect("the event is published");
        }
        1 => {
            let id = other.publish_to(&channel, &user, &event).await;
            assert_eq!(client.next_event().await.0, id);
        }
        2 => {
            drop(client);
            let id = other.publish(&channel, &event).await;
            let (mut again, welcome) =
                Client::resume(other, &user, &channel, position(&welcome["head"])).await;
            assert_eq!(welcome["recovered"], true, "{welcome}");
            assert_eq!(again.next_event().await.0, id);
            client = again;
        }
        3 => {
            let headers = [("Idempotency-Key", channel.as_str())];
            let path = format!("/publish?channel=unfollowed{number}");
            let response = node.admin_with("POST", &path, &headers, event.to_string().as_bytes()).await;
            assert_eq!(response.status, 200, "{}", response.body);
        }
        _ => {}
    }
    match rng.below(2) {
        0 => client.leave().await,
        _ => drop(client),
    }
}

/// Visitors who come at a rate.
struct Visits {
    nodes: Arc<[Node; 2]>,
    pace: Interval,
    number: u64,
    under_way: JoinSet<()>,
}

impl Visits {
    fn new(nodes: &Arc<[Node; 2]>, rate: u64) -> Visits {
        let mut pace = interval(Duration::from_secs(1) / rate as u32);
        pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Visits { nodes: nodes.clone(), pace, number: 0, under_way: JoinSet::new() }
    }

    /// Starts the next visit when it is due.
    async fn next(&mut self) {
        self.pace.tick().await;
        self.under_way.spawn(visit(self.nodes.clone(), self.number));
        self.number += 1;
        while let Some(visit) = self.under_way.try_join_next() {
            visit.expect("a visit that went well");
        }
    }

    async fn finish(&mut self) {
        while let Some(visit) = self.under_way.join_next().await {
            visit.expect("a visit that went well");
        }
    }
}

/// What must not grow.
#[derive(Debug)]
#[expect(dead_code, reason = "memory and number of keys of Redis are only printed")]
struct Usage {
    /// Private memory of each node, in bytes.
    memory: [u64; 2],
    descriptors: [u64; 2],
    redis_memory: u64,
    redis_clients: u64,
    subscriptions: usize,
    keys: i64,
}

async fn usage(redis: &Redis, nodes: &[Node; 2]) -> Usage {
    let mut client = redis.client().await;
    let field = async |name| redis.info(name).await.parse().expect("a number");
    Usage {
        memory: [nodes[0].anonymous(), nodes[1].anonymous()],
        descriptors: [nodes[0].descriptors(), nodes[1].descriptors()],
        redis_memory: field("used_memory").await,
        redis_clients: field("connected_clients").await,
        subscriptions: client.call(&["PUBSUB", "CHANNELS"]).await.list().len(),
        keys: client.call(&["DBSIZE"]).await.int(),
    }
}

/// The keys, in order, without those of `Idempotency-Key`, which stay for ten minutes.
async fn keys(redis: &Redis) -> Vec<String> {
    let all = redis.client().await.call(&["KEYS", "*"]).await;
    let all = all.list().iter().map(|key| key.text().to_owned());
    let mut keys: Vec<String> = all.filter(|key| !key.contains(":key:")).collect();
    keys.sort();
    keys
}

/// Waits until nobody is connected, no channel is followed, and these are all keys.
async fn quiet(redis: &Redis, nodes: &[Node; 2], subscriptions: usize, expected: &[String]) -> Usage {
    for node in nodes {
        for metric in ["fanfare_connections", "fanfare_bus_channels"] {
            until(metric, || async { (node.metric(metric).await == 0.0).then_some(()) }).await;
        }
    }
    until("the keys of the start", || async { (keys(redis).await == expected).then_some(()) }).await;
    until("the subscriptions of the start", || async {
        Some(usage(redis, nodes).await).filter(|usage| usage.subscriptions == subscriptions)
    })
    .await
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

/// Prints at once, although libtest captures the output of tests.
fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}"); // stderr may be closed
}

#[tokio::test]
async fn nothing_grows_with_users_and_channels() {
    let _alone = crate::alone().await;
    let length = Duration::from_secs(setting("GROWTH_SECONDS", 10));
    let redis = Redis::start(&[]).await;
    let flags = ["--history-ttl", HISTORY_TTL];
    let nodes = tokio::join!(Node::on(&redis, &flags), Node::on(&redis, &flags));
    let nodes = Arc::new([nodes.0, nodes.1]);
    let (first, first_keys) = (usage(&redis, &nodes).await, keys(&redis).await);
    say(&format!("growth: at the start {first:?}"));

    let mut visits = Visits::new(&nodes, setting("GROWTH_RATE", 500));
    while visits.number < WARM_UP {
        visits.next().await;
    }
    visits.finish().await;
    let warm = quiet(&redis, &nodes, first.subscriptions, &first_keys).await;
    say(&format!("growth: after {WARM_UP} visits {warm:?}"));

    let (start, mut minutes) = (Instant::now(), 0);
    while start.elapsed() < length {
        visits.next().await;
        if start.elapsed().as_secs() / 60 > minutes {
            minutes += 1;
            let usage = usage(&redis, &nodes).await;
            say(&format!("growth: {minutes} min, {} visits: {usage:?}", visits.number));
        }
    }
    visits.finish().await;
    let last = quiet(&redis, &nodes, first.subscriptions, &first_keys).await;
    say(&format!("growth: after {} visits {last:?}", visits.number));
    assert!(last.descriptors <= first.descriptors, "{first:?}");
    assert!(last.redis_clients <= first.redis_clients, "{first:?}");
    for (last, warm) in last.memory.into_iter().zip(warm.memory) {
        assert!(last < warm + SLACK, "memory grew from {warm} to {last} bytes");
    }
}
