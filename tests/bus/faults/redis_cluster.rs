//! Faults of a Redis Cluster under load.

use std::time::Duration;

use crate::common::{Client, Node, Nodes, Options, RedisCluster, until};
use crate::workload::report::{Report, control_frames};
use crate::workload::run::{Run, Workload};
use crate::workload::testbed::FLAGS;

/// Channels of the load at each primary. The main channel is the first one of the first primary.
const CHANNELS: usize = 2;

/// How many slots are moved by `redis-cli --cluster reshard`.
const LOW: u16 = 40;

/// A cluster, two nodes on it, and a load on channels of all primaries.
struct Testbed {
    cluster: RedisCluster,
    nodes: Nodes,
    /// Channels of each primary.
    channels: Vec<Vec<String>>,
    run: Run,
}

impl Testbed {
    async fn start(redis_flags: &[&str]) -> Testbed {
        Testbed::on(RedisCluster::start(redis_flags).await).await
    }

    async fn on(cluster: RedisCluster) -> Testbed {
        let channels = cluster.channels(CHANNELS).await;
        Testbed::with(cluster, channels).await
    }

    /// The slot of the main channel is among the first, which are moved first.
    async fn with_low_channel(cluster: RedisCluster) -> Testbed {
        let mut channels = cluster.channels(CHANNELS).await;
        channels[0][0] = cluster.channel_below(LOW).await;
        Testbed::with(cluster, channels).await
    }

    async fn with(cluster: RedisCluster, channels: Vec<Vec<String>>) -> Testbed {
        let url = cluster.url();
        let flags = [&["--redis", &url], &FLAGS[..]].concat();
        let (a, b) = tokio::join!(Node::start(&flags), Node::start(&flags));
        let nodes = Nodes::new([a, b]);
        // FCALL is available at every primary.
        for names in &channels {
            until("FCALL", || async {
                let answer = cluster.client_of(&names[0]).await.fcall(&names[0], b"[]", None).await;
                answer.error().contains("must be a JSON object").then_some(())
            })
            .await;
        }
        let run = Run::on_cluster(&nodes, 2, &cluster, &channels.concat(), Workload::default()).await;
        run.wait_for_acks(50).await;
        Testbed { cluster, nodes, channels, run }
    }

    /// Waits until all primaries work for both nodes.
    async fn ready(&self) {
        for node in self.nodes.all() {
            until("a node with all primaries", || async {
                (node.admin("GET", "/readyz", b"").await.body.trim() == "ready").then_some(())
            })
            .await;
        }
    }

    /// Waits until both nodes are ready, but without this node of the cluster. Returns what they say.
    async fn ready_without(&self, place: usize) {
        let address = format!("127.0.0.1:{}", self.cluster.nodes[place].port());
        for node in self.nodes.all() {
            until("a node without a primary", || async {
                let answer = node.admin("GET", "/readyz", b"").await;
                (answer.status == 200 && answer.body.contains(&address)).then_some(())
            })
            .await;
        }
    }

    /// Ends the run. The channels of the `lossy` primaries had a loss; those of the others had none.
    async fn end(self, lossy: &[usize]) -> Report {
        let channels: Vec<String> = lossy.iter().flat_map(|place| self.channels[*place].clone()).collect();
        self.end_with(|channel| usize::from(channels.contains(channel))).await
    }

    /// Ends the run. Each channel had at most this many losses, and at least one if it is not 0.
    async fn end_with(self, losses: impl Fn(&String) -> usize) -> Report {
        self.run.wait_for_delivery().await;
        let report = self.run.end().await;
        for history in report.histories() {
            let most = losses(&history.channel);
            for subscriber in history.subscribers.iter().filter(|subscriber| subscriber.recovers) {
                let (count, least) =
                    (subscriber.announcements(), usize::from(subscriber.home.is_some()).min(most));
                assert!(
                    (least..=most).contains(&count),
                    "{} in {}: {count} losses instead of {least} to {most}: {:?}",
                    subscriber.name,
                    history.channel,
                    control_frames(subscriber)
                );
            }
        }
        report
    }
}

#[tokio::test]
async fn primary_is_killed_and_its_replica_promoted() {
    let mut testbed = Testbed::start(&[]).await;
    testbed.cluster.nodes[0].kill();
    testbed.cluster.promoted(3).await;
    testbed.ready().await;
    testbed.run.wait_for_acks(50).await;
    testbed.end(&[0]).await;
}

#[tokio::test]
async fn promoted_replica_lacks_events() {
    let mut testbed = Testbed::start(&[]).await;
    let channel = testbed.channels[0][0].clone();
    testbed.cluster.stop_replication(0).await;
    let kept = testbed.cluster.head(3, &channel).await;
    testbed.run.wait_for_acks(50).await;
    let given = testbed.cluster.head(0, &channel).await;
    testbed.cluster.nodes[0].kill();
    testbed.cluster.promoted(3).await;
    assert!(given > kept + 30, "the replica has not got {} events", given - kept);
    testbed.ready().await;
    testbed.run.wait_for_acks(50).await;
    assert!(testbed.cluster.head(3, &channel).await > given + 1000, "ids are above those that were lost");
    testbed.end(&[0]).await;
}

#[tokio::test]
async fn primary_is_paused() {
    let testbed = Testbed::start(&[]).await;
    testbed.cluster.nodes[0].freeze();
    testbed.cluster.promoted(3).await;
    testbed.ready().await;
    testbed.run.wait_for_acks(50).await;
    testbed.cluster.nodes[0].thaw();
    testbed.cluster.healthy().await;
    testbed.ready().await;
    testbed.run.wait_for_acks(50).await;
    testbed.end(&[0]).await;
}

#[tokio::test]
async fn primary_and_replica_are_away() {
    let mut testbed = Testbed::start(&["--cluster-require-full-coverage", "no"]).await;
    testbed.cluster.nodes[3].kill();
    testbed.cluster.nodes[0].kill();
    testbed.ready_without(0).await;
    let others = &testbed.run.shared.channels[CHANNELS..];
    for channel in others {
        let before = channel.acked().0;
        until("events in channels of the other primaries", || async {
            (channel.acked().0 > before + 10).then_some(())
        })
        .await;
    }
    for node in testbed.nodes.all() {
        let options = Options { query: format!("channel={}", testbed.channels[0][0]), ..Options::default() };
        assert!(Client::try_open(node.public, "joiner", &options).await.is_ok(), "a client that has to wait");
    }
    testbed.cluster.nodes[0].up().await;
    testbed.cluster.nodes[3].up().await;
    testbed.ready().await;
    testbed.end(&[0]).await;
}

#[tokio::test]
async fn slot_moves_there_and_back() {
    let testbed = Testbed::start(&[]).await;
    let slot = testbed.cluster.slot(&testbed.channels[0][0]).await;
    for (from, to) in [(0, 1), (1, 0)] {
        testbed.cluster.move_slot(slot, from, to, Duration::from_millis(200)).await;
        testbed.run.wait_for_delivery().await;
        testbed.run.wait_for_acks(50).await;
    }
    let moved = testbed.channels[0][0].clone();
    testbed.end_with(|channel| if *channel == moved { 2 } else { 0 }).await;
}

#[tokio::test]
async fn slots_are_resharded_again_and_again() {
    let testbed = Testbed::with_low_channel(RedisCluster::start(&[]).await).await;
    for _ in 0..3 {
        testbed.cluster.reshard(0, 1, LOW.into()).await;
        testbed.cluster.reshard(1, 0, LOW.into()).await;
    }
    testbed.run.wait_for_acks(50).await;
    let moved = testbed.channels[0][0].clone();
    testbed.end_with(|channel| if *channel == moved { 6 } else { 0 }).await;
}

#[tokio::test]
async fn primary_is_added() {
    let mut testbed = Testbed::with_low_channel(RedisCluster::start(&[]).await).await;
    let place = testbed.cluster.add_node().await;
    testbed.cluster.wait_until_known().await;
    testbed.cluster.reshard(0, place, LOW.into()).await;
    testbed.ready().await;
    testbed.run.wait_for_acks(50).await;
    until("FCALL at the new primary", || async {
        let answer =
            testbed.cluster.nodes[place].client().await.fcall(&testbed.channels[0][0], b"[]", None).await;
        answer.error().contains("must be a JSON object").then_some(())
    })
    .await;
    let moved = testbed.channels[0][0].clone();
    testbed.end_with(|channel| usize::from(*channel == moved)).await;
}

#[tokio::test]
async fn subscriptions_to_one_primary_are_killed() {
    let testbed = Testbed::start(&[]).await;
    for _ in 0..3 {
        testbed.cluster.ok(0, &["CLIENT", "KILL", "TYPE", "pubsub"]).await;
        testbed.ready().await;
        testbed.run.wait_for_acks(30).await;
    }
    testbed.end(&[]).await;
}

#[tokio::test]
async fn replica_is_killed() {
    let mut testbed = Testbed::start(&[]).await;
    testbed.cluster.nodes[3].kill();
    testbed.run.wait_for_acks(100).await;
    testbed.cluster.nodes[3].up().await;
    testbed.cluster.healthy().await;
    testbed.run.wait_for_acks(50).await;
    testbed.end(&[]).await;
}

#[tokio::test]
async fn one_primary_is_flushed() {
    let testbed = Testbed::start(&[]).await;
    testbed.cluster.ok(0, &["FLUSHALL"]).await;
    testbed.run.wait_for_acks(50).await;
    testbed.end(&[0]).await;
}

#[tokio::test]
async fn primary_is_cut_off_from_the_others() {
    let mut testbed = Testbed::start(&[]).await;
    testbed.run.ids_may_fall(); // there are two primaries for a moment
    testbed.cluster.isolate(0);
    testbed.cluster.promoted(3).await;
    testbed.ready().await;
    testbed.run.wait_for_acks(50).await;
    testbed.cluster.reconnect();
    testbed.cluster.healthy().await;
    testbed.ready().await;
    testbed.run.wait_for_acks(50).await;
    testbed.end(&[0]).await;
}
