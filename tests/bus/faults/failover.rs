//! Failovers to a replica that lacks acknowledged writes, and a primary that keeps accepting
//! writes.

use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tokio::net::{TcpListener, TcpStream};

use crate::common::process::Directory;
use crate::common::{Client, Node, Nodes, Options, Proxy, Redis, Silence, until};
use crate::workload::publishers;
use crate::workload::run::{Run, Workload};
use crate::workload::testbed::FLAGS;

/// A primary, its replica behind a link that can be cut, a Sentinel, and two nodes that use it.
struct Pair {
    primary: Redis,
    replica: Redis,
    link: Proxy,
    sentinel: Redis,
    nodes: Nodes,
}

impl Pair {
    async fn start(node_flags: &[&str]) -> Pair {
        let primary = Redis::start(&[]).await;
        let link = Proxy::to(primary.port()).await;
        let replica = Redis::replica_by(&link).await;
        let sentinel = Redis::sentinel_for(&primary).await;
        let (a, b) = tokio::join!(node(&sentinel, node_flags), node(&sentinel, node_flags));
        Pair { primary, replica, link, sentinel, nodes: Nodes::new([a, b]) }
    }

    /// Cuts the link, lets the primary acknowledge more events, and kills it. Returns the last id
    /// of the replica.
    async fn lose(&mut self, run: &Run) -> u64 {
        run.wait_for_acks(50).await;
        // Replication may start slowly; the replica must have some events and the function.
        until("the replica to follow", || async { (self.replica.head("room").await > 0).then_some(()) })
            .await;
        self.link.silence(Silence { up: true, down: true });
        run.wait_for_acks(50).await;
        let (kept, given) = (self.replica.head("room").await, self.primary.head("room").await);
        assert!(given >= kept + 30, "the replica has not got {} events", given - kept);
        kept
    }

    /// Fails over while the nodes are stopped, so that the test decides which client uses the new
    /// primary first.
    async fn fail_over_unseen(&mut self, kept: u64) {
        self.signal_nodes("STOP");
        self.primary.kill();
        self.promoted().await;
        assert_eq!(self.replica.head("room").await, kept, "nothing was published before");
    }

    fn signal_nodes(&self, signal: &str) {
        for place in 0..2 {
            self.nodes.get(place).signal(signal);
        }
    }

    async fn promoted(&self) {
        // Asks the Sentinel: the replica closes every connection when it is promoted.
        let port = self.replica.port().to_string();
        until("the replica to be promoted", || async {
            let ask = ["SENTINEL", "GET-MASTER-ADDR-BY-NAME", "main"];
            let address = self.sentinel.client().await.call(&ask).await;
            (address.list()[1].text() == port).then_some(())
        })
        .await;
    }
}

async fn node(sentinel: &Redis, flags: &[&str]) -> Node {
    let url = format!("redis-sentinel://127.0.0.1:{}?sentinelServiceName=main", sentinel.port());
    Node::start(&[&["--redis", &url], &FLAGS[..], flags].concat()).await
}

async fn go_on(pair: &Pair, run: Run, lost: u64) {
    for place in 0..2 {
        pair.nodes.get(place).ready().await;
    }
    run.wait_for_delivery().await;
    run.wait_for_acks(50).await;
    assert!(pair.replica.head("room").await > lost + 1000, "ids are above those that were lost");
    run.end().await.assert_loss_reported(1..=1);
}

#[tokio::test]
async fn lossy_failover_seen_first_by_a_node() {
    let mut pair = Pair::start(&[]).await;
    let run = Run::at(&pair.nodes, 2, &pair.primary, Workload { channels: 50, ..Workload::default() }).await;
    run.disconnect_programs();
    let kept = pair.lose(&run).await;
    pair.primary.kill();
    pair.promoted().await;
    run.connect_programs(&pair.replica);
    go_on(&pair, run, kept).await;
}

#[tokio::test]
async fn failover_is_announced_even_if_durable() {
    let mut pair = Pair::start(&["--redis-durable"]).await;
    let run = Run::at(&pair.nodes, 2, &pair.primary, Workload::default()).await;
    run.disconnect_programs();
    let kept = pair.lose(&run).await;
    // FCALL comes first, with no knowledge of the lost events: only the epoch shows the loss.
    pair.fail_over_unseen(kept).await;
    run.connect_programs(&pair.replica);
    publishers::one(&run.shared, "the first").await;
    pair.signal_nodes("CONT");
    go_on(&pair, run, kept).await;
}

#[tokio::test]
async fn lossy_failover_seen_first_by_a_new_node() {
    let mut pair = Pair::start(&[]).await;
    let run = Run::at(&pair.nodes, 2, &pair.primary, Workload { programs: 0, ..Workload::default() }).await;
    let kept = pair.lose(&run).await;
    let given = pair.primary.head("room").await;
    pair.fail_over_unseen(kept).await;
    let third = node(&pair.sentinel, &[]).await;
    let id = publishers::post_to(&run.shared, &third, "the first").await;
    assert!(id > given, "it has no id that was given before");
    pair.signal_nodes("CONT");
    run.connect_programs(&pair.replica);
    go_on(&pair, run, kept).await;
}

#[tokio::test]
async fn lossy_failover_seen_first_by_fcall() {
    let mut pair = Pair::start(&[]).await;
    let run = Run::at(&pair.nodes, 2, &pair.primary, Workload::default()).await;
    run.disconnect_programs();
    let kept = pair.lose(&run).await;
    let given = pair.primary.head("room").await;
    pair.fail_over_unseen(kept).await;
    run.connect_programs(&pair.replica);
    let id = publishers::one(&run.shared, "the first").await;
    assert!(id > given, "it has no id that was given before");
    pair.signal_nodes("CONT");
    go_on(&pair, run, kept).await;
}

#[tokio::test]
async fn lossy_failover_seen_first_by_a_join() {
    let mut pair = Pair::start(&[]).await;
    let run = Run::at(&pair.nodes, 2, &pair.primary, Workload { programs: 0, ..Workload::default() }).await;
    let kept = pair.lose(&run).await;
    let given = pair.primary.head("room").await;
    pair.fail_over_unseen(kept).await;
    // A new node that has seen nothing, and a client that resumes there with a lost id.
    let third = Arc::new(node(&pair.sentinel, &[]).await);
    let options = Options { query: format!("channel=room&lastEventId={given}"), ..Options::default() };
    let mut joiner = Client::try_open(third.public, "joiner", &options).await.expect("the node is ready");
    let welcome = joiner.welcome().await;
    assert!(welcome["recovered"] == false && welcome["head"].as_u64() > Some(given), "{welcome}");
    pair.signal_nodes("CONT");
    run.connect_programs(&pair.replica);
    go_on(&pair, run, kept).await;
}

#[tokio::test]
async fn old_primary_still_accepts_writes() {
    let primary = Redis::start(&[]).await;
    let mut replica = Redis::replica_of(&primary).await;
    let proxies = [Proxy::to(primary.port()).await, Proxy::to(primary.port()).await];
    let urls = [proxies[0].url(), proxies[1].url()];
    let start = |url| async move { Node::start(&[&["--redis", url], &FLAGS[..]].concat()).await };
    let (a, b) = tokio::join!(start(&urls[0]), start(&urls[1]));
    let nodes = Nodes::new([a, b]);
    let mut run = Run::at(&nodes, 2, &primary, Workload::default()).await;
    run.ids_may_fall();
    run.wait_for_acks(50).await;
    // One node and the backends stay with the old primary. The other node moves to the new one.
    replica.promote().await;
    proxies[1].lead_to(replica.port());
    let heads = || async { (primary.head("room").await, replica.head("room").await) };
    let before = heads().await;
    until("both to give ids", || async {
        let now = heads().await;
        (now.0 > before.0 + 30 && now.1 > before.1 + 30).then_some(())
    })
    .await;
    proxies[0].lead_to(replica.port());
    run.connect_programs(&replica);
    run.wait_for_acks(30).await;
    run.wait_for_delivery().await;
    run.end().await.assert_loss_reported(1..=20);
}

/// A DNS name that moves to another Redis while the old one still answers, as in failovers of
/// managed services.
#[tokio::test]
async fn dns_change_is_followed() {
    let (old, new) = (Redis::start(&[]).await, Redis::start(&[]).await);
    // Names have addresses without ports: the new server is at another address with the same port.
    let listener = TcpListener::bind(("127.0.0.2", old.port())).await.expect("the port is free there");
    let target = new.port();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut server = TcpStream::connect(("127.0.0.1", target)).await.expect("it runs");
                let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
            });
        }
    });
    let directory = Directory::new();
    let (library, file) = (directory.path().join("name.so"), directory.path().join("address"));
    let built = Command::new("cc")
        .args(["-shared", "-fPIC", &format!("-DADDRESS_FILE=\"{}\"", file.display()), "-o"])
        .arg(&library)
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/common/name.c"))
        .status();
    assert!(built.expect("cc is there").success());
    std::fs::write(&file, "127.0.0.1").expect("the directory is ours");
    let url = format!("redis://redis.test:{}", old.port());
    let node = Node::start_unready_with("LD_PRELOAD", &library, &["--redis", &url]).await;
    node.ready().await;
    let (mut client, _) = Client::resume(&node, "a", "room", "").await;
    let event = json!({"n": 1});
    let one = node.publish("room", &event).await;
    client.expect_event(one, &event).await;
    assert_eq!(old.head("room").await, one);

    // A DNS outage changes nothing.
    std::fs::remove_file(&file).expect("it is there");
    tokio::time::sleep(Duration::from_secs(4)).await;
    node.ready().await;
    let moved = directory.path().join("moved");
    std::fs::write(&moved, "127.0.0.2").expect("the directory is ours");
    std::fs::rename(&moved, &file).expect("the directory is ours");
    let reset = client.next_control("reset").await;
    assert!(reset["lastEventId"].as_u64().expect("an id") > one);
    let event = json!({"n": 2});
    let two = node.publish("room", &event).await;
    client.expect_event(two, &event).await;
    assert_eq!((old.head("room").await, new.head("room").await), (one, two));
}
