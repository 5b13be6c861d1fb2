//! Nodes behind a real nginx with the documented configuration.

use std::net::SocketAddr;

use serde_json::json;

use crate::common::redis::free_port;
use crate::common::{Client, Frame, Nginx, Node, Nodes, Options, Redis, cluster, until};
use crate::workload::run::{Run, Workload};

fn recovering() -> Options {
    Options { query: "channel=room&lastEventId=".into(), ..Options::default() }
}

#[tokio::test]
async fn nginx_routes_around_a_dead_node() {
    let (_redis, a, b) = cluster(&["--trusted-proxy", "127.0.0.1"]).await;
    let nginx = Nginx::before(&[a.public, b.public]).await;
    let mut clients = Vec::new();
    for _ in 0..4 {
        let mut client = Client::try_open(nginx.addr, "alice", &recovering()).await.expect("a connection");
        client.welcome().await;
        clients.push(client);
    }
    for node in [&a, &b] {
        assert_eq!(node.metric("fanfare_connections").await, 2.0, "least_conn shares them out");
    }
    let id = a.publish("room", &json!({"text": "hi"})).await;
    for client in &mut clients {
        assert_eq!(client.next_json().await["id"], id);
    }

    a.kill();
    let mut gone = 0;
    for client in &mut clients {
        b.publish("room", &json!({"text": "still here"})).await;
        gone += usize::from(matches!(client.next_frame().await, Frame::Lost(_)));
    }
    assert_eq!(gone, 2);
    for _ in 0..4 {
        let mut client = Client::try_open(nginx.addr, "alice", &recovering()).await.expect("a connection");
        client.welcome().await;
        clients.push(client);
    }
    until("nginx to log the dead node", || async {
        nginx.errors().iter().any(|line| line.contains("Connection refused")).then_some(())
    })
    .await;
    drop(clients);
    // The line of a connection is written when it ends.
    until("nginx to note what it did", || async { (nginx.requests().len() == 8).then_some(()) }).await;
    assert!(nginx.requests().iter().all(|line| line.starts_with("101 ")), "{:?}", nginx.requests());
}

/// Starts a node at this address, whose clients connect through nginx.
async fn node(redis: &Redis, at: SocketAddr, nginx: &Nginx) -> Node {
    let mut node = Node::on(
        redis,
        &["--listen", &at.to_string(), "--drain-timeout", "3s", "--trusted-proxy", "127.0.0.1"],
    )
    .await;
    node.public = nginx.addr;
    node
}

#[tokio::test]
async fn rolling_restart_behind_nginx_loses_nothing() {
    let redis = Redis::start(&[]).await;
    let places = [free_port(), free_port()].map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
    let nginx = Nginx::before(&places).await;
    let nodes = Nodes::new([node(&redis, places[0], &nginx).await, node(&redis, places[1], &nginx).await]);
    let run = Run::at(&nodes, 2, &redis, Workload { users: 2, ..Workload::default() }).await;
    for place in [0, 1, 0, 1] {
        run.wait_for_acks(50).await;
        let old = nodes.get(place);
        old.signal("TERM");
        assert!(old.ended().await.success(), "it ends in order");
        nodes.replace(place, node(&redis, places[place], &nginx).await);
        run.wait_for_delivery().await;
    }
    let report = run.end().await;
    report.assert_no_loss_reported();
    let moved = report.history.subscribers.iter().filter(|subscriber| subscriber.connections() > 2).count();
    assert!(moved >= 12, "every staying client moved, most of them twice");
    // No connection was rejected, although one node was always about to stop.
    let rejected: Vec<_> = nginx.requests().into_iter().filter(|line| !line.starts_with("101 ")).collect();
    assert!(rejected.is_empty(), "{rejected:#?}");
}
