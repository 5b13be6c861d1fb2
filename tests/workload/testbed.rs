//! A Redis, nodes, and a way from each node to Redis that can be bent.

use crate::common::{Node, Nodes, Proxy, Redis};

/// Flags of every node: heartbeats often enough that silence means a fault, which tell clients where they stand, and a
/// wait for Redis that is longer than most outages here.
pub const FLAGS: [&str; 8] =
    ["--ping-interval", "2s", "--ping-timeout", "20s", "--ping-format", "both", "--publish-timeout", "10s"];

/// What the faults happen to.
pub struct Testbed {
    /// The Redis.
    pub redis: Redis,
    /// Each node's way to it.
    pub proxies: Vec<Proxy>,
    /// The nodes.
    pub nodes: Nodes,
    flags: Vec<String>,
}

impl Testbed {
    /// A Redis and two nodes, with these flags besides the usual ones.
    pub async fn start(redis_flags: &[&str], node_flags: &[&str]) -> Testbed {
        Testbed::on(Redis::start(redis_flags).await, node_flags).await
    }

    /// Two nodes on this Redis.
    pub async fn on(redis: Redis, node_flags: &[&str]) -> Testbed {
        let proxies = vec![Proxy::to(redis.port()).await, Proxy::to(redis.port()).await];
        // What is given here counts instead of the usual.
        let usual = FLAGS.chunks(2).filter(|pair| !node_flags.contains(&pair[0])).flatten();
        let flags: Vec<String> = usual.chain(node_flags).map(|flag| flag.to_string()).collect();
        let urls = [proxies[0].url(), proxies[1].url()];
        let (a, b) = tokio::join!(node(&urls[0], &flags), node(&urls[1], &flags));
        Testbed { redis, proxies, nodes: Nodes::new([a, b]), flags }
    }

    /// Another node in the place of one, by the same way.
    pub async fn replace(&self, place: usize) {
        self.nodes.replace(place, node(&self.proxies[place].url(), &self.flags).await);
    }

    /// Waits until both nodes say that they are ready.
    pub async fn ready(&self) {
        for place in 0..2 {
            self.nodes.get(place).ready().await;
        }
    }

    /// Waits until both nodes say that they are not.
    pub async fn unready(&self) {
        for place in 0..2 {
            self.nodes.get(place).unready().await;
        }
    }

    /// A number of both nodes' metrics, added up.
    pub async fn metric(&self, name: &str) -> f64 {
        self.nodes.get(0).metric(name).await + self.nodes.get(1).metric(name).await
    }
}

async fn node(url: &str, flags: &[String]) -> Node {
    let mut all = vec!["--redis", url];
    all.extend(flags.iter().map(String::as_str));
    Node::start(&all).await
}
