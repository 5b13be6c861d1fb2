//! Everything at once: clients that roam, stall and come back, publishers, and faults of Redis, of the network and
//! of nodes, one after the other at random. The promise must hold all the time.
//!
//! `CHAOS_SEED=7 CHAOS_FAULTS=100 cargo test --test chaos` makes another and longer run of it.

mod common;

use std::time::Duration;

use common::stream::{self, CHANNEL, Dice, END, Nodes};
use common::{Client, Node, Proxy, Redis};
use serde_json::json;
use tokio::sync::watch;

const USERS: u64 = 20;
const FEED: [&str; 4] = ["--feed-memory", "256KiB", "--publish-timeout", "3s"];

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

/// A node whose way to Redis is this one.
async fn node(proxy: &Proxy) -> Node {
    Node::start(&[&["--redis", &proxy.url()], &FEED[..]].concat()).await
}

/// How many kinds of faults there are.
const FAULTS: u64 = 9;

/// Lets one thing go wrong, and right again.
async fn fault(
    kind: u64,
    dice: &mut Dice,
    redis: &mut Redis,
    proxies: &[Proxy; 3],
    nodes: &Nodes,
) -> &'static str {
    let place = dice.below(3) as usize;
    let proxy = &proxies[place];
    let time = Duration::from_millis(dice.below(3000)); // of the fault, so that is what is tested
    match kind {
        0 => {
            redis.client().await.call(&["FLUSHALL"]).await;
            "all is flushed"
        }
        1 => {
            redis.kill();
            tokio::time::sleep(time).await;
            redis.up().await;
            "Redis dies and comes back empty"
        }
        2 => {
            redis.freeze();
            tokio::time::sleep(time).await;
            redis.thaw();
            "Redis hangs"
        }
        3 => {
            proxy.cut();
            "a node's connections are cut"
        }
        4 => {
            proxy.hold_messages(true);
            tokio::time::sleep(time).await;
            proxy.hold_messages(false);
            "messages to a node come late"
        }
        5 => {
            proxy.hold_messages(true);
            tokio::time::sleep(time / 2).await;
            proxy.cut();
            proxy.hold_messages(false);
            "messages to a node are lost"
        }
        6 => {
            redis.client().await.call(&["CLIENT", "KILL", "TYPE", "pubsub"]).await;
            "Redis throws all subscribers out"
        }
        7 => {
            redis.client().await.call(&["SCRIPT", "FLUSH"]).await;
            "scripts are flushed"
        }
        _ => {
            nodes.get(place).kill();
            nodes.replace(place, node(proxy).await);
            "a node dies and another takes its place"
        }
    }
}

#[tokio::test]
async fn whatever_happens_everybody_sees_all_in_order_or_is_told() {
    let seed = number("CHAOS_SEED", 1);
    let mut dice = Dice(seed);
    let mut redis = Redis::start(&[]).await;
    let port = redis.port();
    let proxies = [Proxy::to(port).await, Proxy::to(port).await, Proxy::to(port).await];
    let started = tokio::join!(node(&proxies[0]), node(&proxies[1]), node(&proxies[2]));
    let nodes = Nodes::new([started.0, started.1, started.2]);

    let users: Vec<String> = (0..USERS).map(|n| format!("user{n}")).collect();
    let watchers: Vec<_> = (0..2 * USERS)
        .map(|n| tokio::spawn(stream::roam(nodes.clone(), users[(n % USERS) as usize].clone(), seed + n)))
        .collect();
    let stop = watch::Sender::new(false);
    let publishers: Vec<_> = (0..4)
        .map(|n| {
            let (nodes, users) = (nodes.clone(), users.clone());
            tokio::spawn(stream::publish(nodes, format!("p{n}"), seed + 100 + n, users, stop.subscribe()))
        })
        .collect();

    for round in 0..number("CHAOS_FAULTS", FAULTS) {
        // Every kind once, then any.
        let kind = if round < FAULTS { (seed + round) % FAULTS } else { dice.below(FAULTS) };
        let what = fault(kind, &mut dice, &mut redis, &proxies, &nodes).await;
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
    };
    tokio::select! {
        () = read => {}
        () = end => {}
    }
    stream::check(&told, &journals);
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
