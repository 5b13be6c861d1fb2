//! A thousand clients that disconnect and resume during a stream of events, on two nodes: no event
//! is lost or duplicated.

use std::sync::Arc;
use std::time::Duration;

use serde_json::json;

use crate::common::client::position;
use crate::common::{Client, Node, Redis, Rng, until};

const CLIENTS: u64 = 1000;
const USERS: u64 = 50;
const EVENTS: u64 = 400;

/// The recipient of the event with this number: every tenth event is private.
fn addressee(n: u64) -> Option<String> {
    n.is_multiple_of(10).then(|| user(n / 10))
}

fn user(number: u64) -> String {
    format!("user{}", number % USERS)
}

/// Follows the stream from position `base` to its end over many connections, each of which resumes
/// after the last event seen. Returns the number of connections.
async fn come_and_go(nodes: Arc<[Node; 2]>, number: u64, base: u64) -> u64 {
    let user = user(number);
    let mut rng = Rng(number);
    let mut at = base;
    let mut connections = 0;
    loop {
        connections += 1;
        let node = &nodes[rng.below(2) as usize];
        let (mut client, welcome) = Client::resume(node, &user, "room", at).await;
        assert_eq!((&welcome["recovered"], &welcome["lastEventId"]), (&json!(true), &json!(at)));
        for _ in 0..1 + rng.below(100) {
            let (id, event) = client.next_event().await;
            let is_mine = |n: &u64| addressee(*n).is_none_or(|to| to == user);
            let expected = (at - base..).find(is_mine).map(|n| (base + 1 + n, json!(n)));
            assert_eq!(Some((id, event["n"].clone())), expected, "client {number} after {at}");
            at = id;
            if id == base + EVENTS {
                client.leave().await;
                return connections;
            }
        }
        match rng.below(2) {
            0 => client.leave().await,
            _ => drop(client), // without a close frame, perhaps in the middle of a frame
        }
    }
}

#[tokio::test]
async fn a_thousand_clients_resume_without_loss() {
    let _alone = crate::alone().await;
    let redis = Redis::start(&[]).await;
    let nodes = tokio::join!(Node::on(&redis, &[]), Node::on(&redis, &["--buffer-memory", "64KiB"]));
    let nodes = Arc::new([nodes.0, nodes.1]);
    let (first, welcome) = Client::resume(&nodes[0], "first", "room", "").await;
    let base = position(&welcome["head"]);
    drop(first);

    let clients: Vec<_> =
        (0..CLIENTS).map(|number| tokio::spawn(come_and_go(nodes.clone(), number, base))).collect();
    // Paced, so that the stream lasts while clients disconnect and resume. The last event is
    // public.
    let mut pace = tokio::time::interval(Duration::from_millis(20));
    for n in 0..EVENTS {
        pace.tick().await;
        let node = &nodes[n as usize % 2];
        let event = json!({ "n": n });
        let id = match addressee(n) {
            Some(to) => node.publish_to("room", &to, &event).await,
            None => node.publish("room", &event).await,
        };
        assert_eq!(id, base + 1 + n);
    }
    let mut connections = 0;
    for client in clients {
        connections += client.await.expect("a client that lost or doubled nothing");
    }
    assert!(connections > 3 * CLIENTS, "they did come and go: {connections} connections");
    for node in nodes.iter() {
        until("every place to be free again", || async {
            (node.metric("fanfare_connections").await == 0.0).then_some(())
        })
        .await;
    }
}
