//! Two nodes and one real Redis: what a cluster of fanfare nodes promises.

mod common;

use common::Redis;

#[tokio::test]
async fn redis_harness() {
    let mut redis = Redis::start(&[]).await;
    let mut sub = redis.client().await;
    sub.subscribe("x").await;
    redis.subscribed("x", 1).await;
    assert_eq!(redis.client().await.call(&["PUBLISH", "x", "hi"]).await.int(), 1);
    assert_eq!(sub.message().await, b"hi");
    redis.freeze();
    redis.thaw();
    redis.kill();
    redis.wipe();
    redis.up().await;
}
