//! A Redis, nodes, and a proxy with faults between each node and Redis.

use crate::common::{Node, Nodes, Proxy, Redis};

/// Default flags of the nodes: frequent pings that carry positions, and a publish timeout
/// longer than most outages of the tests.
pub const FLAGS: [&str; 8] =
    ["--ping-interval", "2s", "--ping-timeout", "20s", "--ping-format", "both", "--publish-timeout", "10s"];

/// What the tests inject faults into.
pub struct Testbed {
    pub redis: Redis,
    /// One for each node.
    pub proxies: Vec<Proxy>,
    pub nodes: Nodes,
    flags: Vec<String>,
}

impl Testbed {
    /// A Redis and two nodes, with these flags in addition to the default ones.
    pub async fn start(redis_flags: &[&str], node_flags: &[&str]) -> Testbed {
        Testbed::on(Redis::start(redis_flags).await, node_flags).await
    }

    /// Two nodes on this Redis.
    pub async fn on(redis: Redis, node_flags: &[&str]) -> Testbed {
        let proxies = vec![Proxy::to(redis.port()).await, Proxy::to(redis.port()).await];
        // Flags given here override the default ones.
        let usual = FLAGS.chunks(2).filter(|pair| !node_flags.contains(&pair[0])).flatten();
        let flags: Vec<String> = usual.chain(node_flags).map(|flag| flag.to_string()).collect();
        let urls = [proxies[0].url(), proxies[1].url()];
        let (a, b) = tokio::join!(node(&urls[0], &flags), node(&urls[1], &flags));
        Testbed { redis, proxies, nodes: Nodes::new([a, b]), flags }
    }

    /// Replaces a node by a new one behind the same proxy.
    pub async fn replace(&self, place: usize) {
        self.nodes.replace(place, node(&self.proxies[place].url(), &self.flags).await);
    }

    /// Waits until both nodes are ready.
    pub async fn ready(&self) {
        for place in 0..2 {
            self.nodes.get(place).ready().await;
        }
    }

    /// Waits until neither node is ready.
    pub async fn unready(&self) {
        for place in 0..2 {
            self.nodes.get(place).unready().await;
        }
    }

    /// The sum of a metric over both nodes.
    pub async fn metric(&self, name: &str) -> f64 {
        self.nodes.get(0).metric(name).await + self.nodes.get(1).metric(name).await
    }
}

async fn node(url: &str, flags: &[String]) -> Node {
    let mut all = vec!["--redis", url];
    all.extend(flags.iter().map(String::as_str));
    Node::start(&all).await
}
