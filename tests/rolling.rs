//! Nodes behind a real nginx, set as README says.

mod common;

use common::{Client, Frame, Nginx, Options, cluster, until};
use serde_json::json;

fn recovering() -> Options {
    Options { query: "channel=room&lastEventId=".into(), ..Options::default() }
}

#[tokio::test]
async fn clients_come_through_nginx_also_when_a_node_is_gone() {
    let (_redis, a, b) = cluster(&["--trusted-proxy", "127.0.0.1"]).await;
    let nginx = Nginx::before(&[a.public, b.public]).await;
    let mut clients = Vec::new();
    for _ in 0..4 {
        let mut client = Client::try_open(nginx.addr, "alice", &recovering()).await.expect("a way in");
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
        let mut client = Client::try_open(nginx.addr, "alice", &recovering()).await.expect("a way in");
        client.welcome().await;
        clients.push(client);
    }
    assert!(nginx.errors().iter().any(|line| line.contains("Connection refused")), "{:?}", nginx.errors());
    drop(clients);
    // A connection's line is written when it is over.
    until("nginx to note what it did", || async { (nginx.requests().len() == 8).then_some(()) }).await;
    assert!(nginx.requests().iter().all(|line| line.starts_with("101 ")), "{:?}", nginx.requests());
}
