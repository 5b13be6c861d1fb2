//! What tests share: real processes of fanfare and Redis, and clients for both.
//! All of them use free ports, wait for events instead of sleeping, and end the processes that they
//! started, also in failing tests. A deadline only limits how long a failure takes.

#![allow(dead_code, unused_imports)] // each test binary uses its own part of this

pub mod cases;
pub mod cgroup;
pub mod client;
pub mod http;
pub mod nginx;
pub mod node;
pub mod process;
pub mod proxy;
pub mod raw;
pub mod recent_events;
pub mod redis;
pub mod redis_cluster;
pub mod rng;
pub mod single_shard;
pub mod sources;
pub mod stalled;
pub mod token_key;

use std::time::Duration;

pub use cgroup::Cgroup;
pub use client::{Client, Frame, Options};
pub use http::Response;
pub use nginx::Nginx;
pub use node::{Node, Nodes};
pub use proxy::{Proxy, Silence};
pub use raw::Raw;
pub use redis::{Redis, Resp, Value, free_port};
pub use redis_cluster::RedisCluster;
pub use rng::Rng;
pub use single_shard::SingleShard;
pub use token_key::{TokenKey, token};

/// How long a test waits for something that must happen. Long, since many tests share few cores.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// Waits for a future, and fails the test with `what` if it is not ready in time.
pub async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(DEADLINE, future).await {
        Ok(value) => value,
        Err(_) => panic!("waited {DEADLINE:?} for {what}"),
    }
}

/// Polls every 20 ms until there is a value: for the state of other processes.
pub async fn until<T, F: Future<Output = Option<T>>>(what: &str, mut ask: impl FnMut() -> F) -> T {
    within(what, async {
        loop {
            if let Some(value) = ask().await {
                return value;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await
}

/// A Redis and two nodes connected to it.
pub async fn cluster(flags: &[&str]) -> (Redis, Node, Node) {
    let redis = Redis::start(&[]).await;
    let (a, b) = tokio::join!(Node::on(&redis, flags), Node::on(&redis, flags));
    (redis, a, b)
}
