//! What whole-server tests stand on: real processes of fanfare and Redis, and clients that speak to them.
//!
//! Everything takes free ports, waits for events instead of sleeping, and ends the processes it started, also
//! when the test fails. A deadline bounds only how long a failure takes; nothing that works waits for one.

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
pub mod redis;
pub mod rng;
pub mod single_shard;
pub mod sources;
pub mod stalled;

use std::time::Duration;

pub use cgroup::Cgroup;
pub use client::{Client, Frame, Options};
pub use http::Response;
pub use nginx::Nginx;
pub use node::{Node, Nodes};
pub use proxy::{Proxy, Silence};
pub use raw::Raw;
pub use redis::{Redis, Resp, Value, free_port};
pub use rng::Rng;
pub use single_shard::SingleShard;

/// How long a test waits for something that must come. Long, since many tests share few cores.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// Waits for what must come, and fails the test with `what` when it does not.
pub async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(DEADLINE, future).await {
        Ok(value) => value,
        Err(_) => panic!("waited {DEADLINE:?} for {what}"),
    }
}

/// Asks again and again, every 20 ms, until there is an answer. For what can't be waited on: other processes.
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

/// A Redis and two nodes on it.
pub async fn cluster(flags: &[&str]) -> (Redis, Node, Node) {
    let redis = Redis::start(&[]).await;
    let (a, b) = tokio::join!(Node::on(&redis, flags), Node::on(&redis, flags));
    (redis, a, b)
}
