//! Nodes in small memory cgroups, and memory that connections leave behind.

use std::process::Command;
use std::time::Duration;

use futures_util::future::join_all;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpSocket;

use crate::common::process::Process;
use crate::common::{Cgroup, Client, Node, Raw, until};

const MIB: u64 = 1 << 20;

#[tokio::test]
async fn small_cgroup_survives_heavy_traffic() {
    let _alone = crate::alone().await;
    let Some(cgroup) = Cgroup::new(64 * MIB) else { return };
    let node = Node::start_in(&cgroup, &["--max-message-rate", "0"]).await;
    let mut reader = Client::plain(&node, "reader", "room0").await;
    // They fill their sockets, and the channels' feeds and histories continue without them.
    let mut stalled = Vec::new();
    for number in 0..200 {
        stalled.push(
            Raw::upgraded(node.public, &format!("/ws/stalled{number}?channel=room{}", number % 8)).await,
        );
    }
    let event = json!({"text": "x".repeat(60_000)});
    let publishers = (1..8).map(|room| {
        let (node, event) = (&node, &event);
        async move {
            for _ in 0..300 {
                node.publish(&format!("room{room}"), event).await; // 144 MB of all rooms
            }
        }
    });
    let read = async {
        for _ in 0..300 {
            let id = node.publish("room0", &event).await;
            reader.expect_event(id, &event).await;
        }
    };
    tokio::join!(join_all(publishers), read);
    assert_eq!(cgroup.kills(), 0, "{}", node.log());
    let id = node.publish("room0", &json!({"n": 1})).await;
    reader.expect_event(id, &json!({"n": 1})).await;
}

/// Clients of a bench that fit into 64 MiB, some of which stall while others come.
#[tokio::test]
async fn small_cgroup_holds_18000_connections() {
    let _alone = crate::alone().await;
    const CLIENTS: u32 = 18_000;
    const NEWCOMERS: usize = 2500;
    rlimit::increase_nofile_limit(u64::MAX).expect("a limit can be read");
    let Some(cgroup) = Cgroup::new(64 * MIB) else { return };
    let node = Node::start_in(&cgroup, &[]).await;
    let mut command = Command::new(env!("CARGO_BIN_EXE_fanfare"));
    command.args(["bench", &format!("ws://{}/ws/{{i}}", node.public), "--rate", "1/s", "--json"]);
    command.args(["--connections", &CLIENTS.to_string(), "--connect-rate", "4000/s", "--phases"]);
    command.arg("connect, idle 2s, rate 1/s 5s, saturate 16 3s, stall 10% 15s, rate 1/s 3s");
    let bench = Process::start("fanfare bench", &mut command);
    let delivered = f64::from(CLIENTS) * 20.0;
    while node.metric("fanfare_events_delivered_total").await < delivered {
        assert_eq!(bench.exit_status(), None, "{}", bench.output().join("\n"));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let (inside, rejected) = join_or_503(&node, [127, 0, 0, 9], "/ws/newcomer", NEWCOMERS).await;
    assert!(rejected > NEWCOMERS / 4, "{} fit, {rejected} were rejected", inside.len());
    let ended = async {
        while bench.exit_status().is_none() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(120), ended).await.expect("the bench ends");
    let output = bench.output();
    let results: Value = output.iter().find_map(|line| serde_json::from_str(line).ok()).expect("JSON");
    assert_eq!(results["problems"], json!([]), "{}", node.log());
    assert_eq!(results["phases"][5]["clients"], CLIENTS + 1, "{results:#}");
    assert_eq!(cgroup.kills(), 0, "{}", node.log());
}

/// This many clients from an address ask for an upgrade. Returns those that got it, and how many got
/// 503.
async fn join_or_503(node: &Node, from: [u8; 4], path: &str, clients: usize) -> (Vec<Raw>, usize) {
    let (mut inside, mut rejected) = (Vec::new(), 0);
    while inside.len() + rejected < clients {
        let batch = (0..100).map(|_| async {
            let mut raw = Raw::connect_from(from, node.public).await;
            let status = raw.upgrade(path, &[]).await.status;
            (raw, status)
        });
        for (raw, status) in join_all(batch).await {
            match status {
                101 => inside.push(raw),
                503 => rejected += 1,
                other => panic!("{other}"),
            }
        }
    }
    (inside, rejected)
}

#[tokio::test]
async fn clients_beyond_the_cgroup_get_503() {
    let _alone = crate::alone().await;
    const CLIENTS: usize = 8000;
    rlimit::increase_nofile_limit(u64::MAX).expect("a limit can be read");
    let Some(cgroup) = Cgroup::new(12 * MIB) else { return };
    // An explicit number overrides the computed one, so that only the kernel's accounting limits
    // connections.
    let node = Node::start_in(&cgroup, &["--max-connections", "15000"]).await;
    let warning = "the settings need more memory than available";
    until("the warning", || async { node.log().contains(warning).then_some(()) }).await;
    let mut first = Client::plain(&node, "first", "room").await;
    let (inside, rejected) = join_or_503(&node, [127, 0, 0, 1], "/ws/a?channel=room", CLIENTS).await;
    assert!(inside.len() > 1000 && rejected > 1000, "{} inside, {rejected} rejected", inside.len());
    assert!(node.log().contains("memory is short"), "{}", node.log());
    let id = node.publish("room", &json!({"n": 1})).await;
    first.expect_event(id, &json!({"n": 1})).await;
    assert_eq!(cgroup.kills(), 0, "{}", node.log());
    drop(inside);
    until("a place for a new client", || async {
        let mut raw = Raw::connect(node.public).await;
        (raw.upgrade("/ws/a?channel=room", &[]).await.status == 101).then_some(())
    })
    .await;
}

#[tokio::test]
async fn joins_work_after_a_flood_of_channel_names() {
    let _alone = crate::alone().await;
    const NAMES: usize = 20_000; // fewer than there are local ports
    let Some(cgroup) = Cgroup::new(24 * MIB) else { return };
    let node = Node::start_in(&cgroup, &["--trusted-proxy", "127.0.0.2"]).await;
    let join = async |address: String, channel: String| {
        let socket = TcpSocket::new_v4().expect("a socket");
        socket.bind(([127, 0, 0, 2], 0).into()).expect("a free port");
        let mut stream = socket.connect(node.public).await.expect("the node listens");
        let request = format!(
            "PROXY TCP4 {address} 127.0.0.1 1 2\r\nGET /ws/a?channel={channel} HTTP/1.1\r\nHost: a\r\n\
             Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
             Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        );
        // A node without memory answers before it reads, and may have closed the connection.
        let mut answer = Vec::new();
        let _ = stream.write_all(request.as_bytes()).await;
        let _ = stream.read_buf(&mut answer).await;
        String::from_utf8_lossy(&answer).split(' ').nth(1).map_or(0, |status| status.parse().unwrap_or(0))
    };
    let (mut named, mut rejected) = (0, 0);
    while named < NAMES {
        // Sixteen at a time from changing addresses, each closed at once. Long names take more
        // memory.
        let batch = (0..16).map(|n| {
            let address = format!("10.{}.{}.1", n, (named / 16) % 250);
            join(address, format!("{named}-{n}-{}", "x".repeat(100)))
        });
        for status in join_all(batch).await {
            named += 1;
            rejected += usize::from(status == 503);
        }
    }
    assert!(rejected > 0, "{named} channels fit");
    until("a place for a new client", || async {
        (join("192.0.2.1".into(), "room".into()).await == 101).then_some(())
    })
    .await;
    assert_eq!(cgroup.kills(), 0, "{}", node.log());
}

#[tokio::test]
async fn memory_returns_when_connections_have_gone() {
    let _alone = crate::alone().await;
    const CLIENTS: usize = 10_000;
    rlimit::increase_nofile_limit(u64::MAX).expect("a limit can be read");
    let node = Node::start(&[]).await;
    drop(Raw::upgraded(node.public, "/ws/first").await);
    let before = node.anonymous();
    for round in 1..=5 {
        let mut clients = Vec::new();
        while clients.len() < CLIENTS {
            clients.extend(join_all((0..100).map(|_| Raw::upgraded(node.public, "/ws/a"))).await);
        }
        let growth = node.anonymous() - before;
        assert!(growth > 150 * CLIENTS as u64, "{growth} bytes in round {round}");
        drop(clients);
        let what = format!("the memory of {CLIENTS} connections, {growth} bytes, in round {round}");
        until(&what, || async { (node.anonymous() < before + growth / 2).then_some(()) }).await;
    }
}
