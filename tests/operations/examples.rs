//! The backend and the Node client in examples/, run as their README says. tests/page has the page.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::common::process::{Process, installed};
use crate::common::{Client, Node, http};

pub fn example(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples").join(path)
}

/// Starts the backend on a free port, publishing to this node.
async fn start_backend(node: &Node) -> (Process, SocketAddr) {
    let mut command = Command::new(installed("python/bin/python"));
    command.args(["-m", "uvicorn", "publisher:app", "--port", "0"]).current_dir(example("fastapi"));
    command.env("ADMIN_URL", format!("http://{}", node.admin)).env("PYTHONDONTWRITEBYTECODE", "1");
    let process = Process::start("uvicorn", &mut command);
    let address = |line: &str| line.split_once("running on http://")?.1.split(' ').next()?.parse().ok();
    let address = process.line("the backend's address", address).await;
    (process, address.unwrap_or_else(|ended| panic!("{ended}")))
}

async fn order(backend: SocketAddr, item: &str) -> Value {
    let body = json!({ "item": item }).to_string();
    let headers = [("Content-Type", "application/json")];
    let response = http::request(backend, "POST", "/orders", &headers, body.as_bytes()).await;
    assert_eq!(response.status, 201, "{response:?}");
    response.json()["id"].take()
}

#[tokio::test]
async fn orders_reach_clients_through_fastapi() {
    let node = Node::start(&[]).await;
    let mut client = Client::plain(&node, "alice", "orders").await;
    let (_backend, address) = start_backend(&node).await;
    let id = order(address, "tea").await;
    let (event_id, event) = client.next_event().await;
    assert_eq!(event, json!({ "order": { "item": "tea", "quantity": 1 } }));
    assert_eq!(json!(event_id), id);
}

#[tokio::test]
async fn events_reach_a_node_client() {
    let node = Node::start(&[]).await;
    let directory = installed("node/node_modules").with_file_name("");
    std::fs::copy(example("node/client.mjs"), directory.join("client.mjs")).expect("target/ is writable");
    std::fs::write(directory.join("fanfare.mjs"), node.get("/fanfare.js").await.body)
        .expect("target/ is writable");
    let mut command = Command::new("node");
    let url = format!("ws://{}/ws/reporter", node.public);
    command.args(["client.mjs", &url, "orders"]).current_dir(&directory);
    let client = Process::start("node", &mut command);
    let prints = async |wanted: &str| {
        let found = client.line(wanted, |line| line.contains(wanted).then(|| line.to_owned())).await;
        found.unwrap_or_else(|ended| panic!("{ended}"))
    };
    prints("! live").await;
    let id = node.publish("orders", &json!({ "order": 1 })).await;
    assert_eq!(prints("\"order\":1").await, format!(r#"{{"order":1,"id":{id}}}"#));
    client.signal("INT");
    assert!(client.ended().await.success());
}
