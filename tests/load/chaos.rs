//! Everything at once: clients that roam, stall and come back, publishers, and faults of Redis, of the network and
//! of nodes, one after the other at random. The promise must hold all the time.
//!
//! `CHAOS_SEED=7 CHAOS_FAULTS=100 cargo test --test load chaos` makes another and longer run of it.

use std::time::Duration;

use serde_json::json;
use tokio::sync::watch;

use crate::common::stream::{self, CHANNEL, Dice, END, Nodes};
use crate::common::{Client, Node, Proxy, Redis};

const USERS: u64 = 20;
const FEED: [&str; 4] = ["--buffer-memory", "256KiB", "--publish-timeout", "3s"];

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

/// A node whose way to Redis is this one.
async fn node(proxy: &Proxy) -> Node {
    Node::start(&[&["--redis", &proxy.url()], &FEED[..]].concat()).await
}

/// How many kinds of faults there are.
const FAULTS: u64 = 11;

/// What can break: a Redis, three nodes, their ways to it, and one more for a program beside them.
struct Cluster {
    redis: Redis,
    nodes: Nodes,
    ways: [Proxy; 4],
}

impl Cluster {
    /// Lets one thing go wrong, and right again.
    async fn fault(&mut self, kind: u64, dice: &mut Dice) -> &'static str {
        let place = dice.below(3) as usize;
        let way = &self.ways[place];
        let time = Duration::from_millis(dice.below(3000)); // of the fault, so that is what is tested
        let mut redis = self.redis.client().await;
        match kind {
            0 => {
                redis.call(&["FLUSHALL"]).await;
                "all is flushed"
            }
            1 => {
                self.redis.kill();
                tokio::time::sleep(time).await;
                self.redis.up().await;
                "Redis dies and comes back empty"
            }
            2 => {
                self.redis.freeze();
                tokio::time::sleep(time).await;
                self.redis.thaw();
                "Redis hangs"
            }
            3 => {
                way.cut();
                "a node's connections are cut"
            }
            4 => {
                way.hold_messages(true);
                tokio::time::sleep(time).await;
                way.hold_messages(false);
                "messages to a node come late"
            }
            5 => {
                way.hold_messages(true);
                tokio::time::sleep(time / 2).await;
                way.cut();
                way.hold_messages(false);
                "messages to a node are lost"
            }
            6 => {
                redis.call(&["CLIENT", "KILL", "TYPE", "pubsub"]).await;
                "Redis throws all subscribers out"
            }
            7 => {
                redis.call(&["SCRIPT", "FLUSH"]).await;
                "scripts are flushed"
            }
            8 => {
                redis.call(&["CONFIG", "SET", "maxmemory", "1"]).await;
                tokio::time::sleep(time / 2).await;
                redis.call(&["CONFIG", "SET", "maxmemory", "0"]).await;
                "Redis is full"
            }
            9 => {
                let mut replica = Redis::replica_of(&self.redis).await;
                replica.promote().await;
                tokio::time::sleep(time).await;
                for way in &self.ways {
                    way.lead_to(replica.port());
                }
                self.redis = replica;
                "a replica takes over that misses the last events"
            }
            _ => {
                self.nodes.get(place).kill();
                self.nodes.replace(place, node(way).await);
                "a node dies and another takes its place"
            }
        }
    }
}

#[tokio::test]
async fn whatever_happens_everybody_sees_all_in_order_or_is_told() {
    let _alone = crate::alone().await;
    let seed = number("CHAOS_SEED", 1);
    let mut dice = Dice(seed);
    let redis = Redis::start(&[]).await;
    let port = redis.port();
    let ways = tokio::join!(Proxy::to(port), Proxy::to(port), Proxy::to(port), Proxy::to(port));
    let ways = [ways.0, ways.1, ways.2, ways.3];
    let nodes = tokio::join!(node(&ways[0]), node(&ways[1]), node(&ways[2]));
    let nodes = Nodes::new([nodes.0, nodes.1, nodes.2]);
    let mut cluster = Cluster { redis, nodes: nodes.clone(), ways };

    let users: Vec<String> = (0..USERS).map(|n| format!("user{n}")).collect();
    let mut watchers = Vec::new();
    let mut simple = Vec::new();
    for (user, seed) in users.iter().zip(seed..) {
        watchers.push(tokio::spawn(stream::roam(nodes.clone(), user.clone(), seed)));
        watchers.push(tokio::spawn(stream::roam(nodes.clone(), user.clone(), seed + 1000)));
        simple.push(tokio::spawn(stream::roam_simply(nodes.clone(), user.clone(), seed + 2000)));
    }
    let stop = watch::Sender::new(false);
    let mut publishers = Vec::new();
    for n in 0..4 {
        let (nodes, users) = (nodes.clone(), users.clone());
        let told = stream::publish(nodes, format!("p{n}"), seed + n, users, stop.subscribe());
        publishers.push(tokio::spawn(told));
    }
    let beside = cluster.ways[3].port();
    let told = stream::publish_by_fcall(beside, "f".into(), seed, users, stop.subscribe());
    publishers.push(tokio::spawn(told));

    for round in 0..number("CHAOS_FAULTS", FAULTS) {
        // Every kind once, then any.
        let kind = if round < FAULTS { (seed + round) % FAULTS } else { dice.below(FAULTS) };
        let what = cluster.fault(kind, &mut dice).await;
        eprintln!("fault {round}: {what}");
        tokio::time::sleep(Duration::from_millis(dice.below(1000))).await; // some peace between them
    }
    stop.send_replace(true);
    let mut told = Vec::new();
    for publisher in publishers {
        told.push(publisher.await.expect("a publisher that was told what it must"));
    }
    for number in 0..3 {
        nodes.get(number).ready().await;
    }
    // Again and again, since one who comes back after a flush and is told so starts behind what came before.
    let end = async {
        loop {
            nodes.get(0).publish(CHANNEL, &json!({ "text": END })).await;
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    let mut journals = Vec::new();
    let read = async {
        for watcher in watchers {
            journals.push(watcher.await.expect("a watcher that saw what it must"));
        }
        for watcher in simple {
            journals.extend(watcher.await.expect("a watcher that saw what it must"));
        }
    };
    tokio::select! {
        () = read => {}
        () = end => {}
    }
    // In a thread of its own: the ways to Redis need this one.
    let checked = tokio::task::spawn_blocking(move || {
        stream::check(&told, &journals);
        (told, journals)
    });
    let (told, journals) = checked.await.expect("told and seen fit together");
    let acked: usize = told.iter().map(|told| told.acked.len()).sum();
    let unknown: usize = told.iter().map(|told| told.unknown.len()).sum();
    let refused: usize = told.iter().map(|told| told.refused.len()).sum();
    let resets: usize = journals.iter().map(stream::Journal::resets).sum();
    eprintln!("{acked} acknowledged, {unknown} unknown, {refused} refused; {resets} resets told");
    assert!(acked > 100);
    // And all is as it was: a simple client sees a simple event.
    let mut client = Client::plain(&nodes.get(1), "last", CHANNEL).await;
    let id = nodes.get(2).publish(CHANNEL, &json!({"n": 1})).await;
    client.expect_event(id, &json!({"n": 1})).await;
}
