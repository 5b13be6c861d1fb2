//! Promotions that no node sees, and changes of Redis's replication id without a promotion.

use fanfare::bus::PublishError;
use fanfare::protocol::event::EventId;

use super::node::{Node, Reader, event, settings, until};
use super::redis_server::RedisServer;

/// `repl-backlog-ttl` in seconds: how soon Redis frees its backlog after losing its last replica.
const BACKLOG: [&str; 2] = ["--repl-backlog-ttl", "2"];

fn info(redis: &RedisServer, field: &str) -> String {
    let info = redis.raw().command(&["INFO", "everything"]).text().to_owned();
    let value = info.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    value.unwrap_or_else(|| panic!("no {field} in {info}")).trim().to_owned()
}

async fn replicate(replica: &RedisServer, primary: &RedisServer) {
    replica.raw().command(&["REPLICAOF", "127.0.0.1", &primary.port.to_string()]);
    until("the replica is in sync", || info(replica, "master_link_status") == "up").await;
}

fn promote(replica: &RedisServer) {
    replica.raw().command(&["REPLICAOF", "NO", "ONE"]);
}

/// Waits until this primary has freed its backlog. Then INFO no longer shows a promotion.
async fn backlog_is_freed(primary: &RedisServer) {
    until("the backlog is freed", || info(primary, "repl_backlog_active") == "0").await;
    assert!(info(primary, "master_replid2").bytes().all(|digit| digit == b'0'));
}

/// Two servers, and the ids of three events that only the first had before it was demoted,
/// resynchronized and promoted again, without a node in between.
async fn fail_back(durable: bool) -> (RedisServer, EventId) {
    let (first, mut second) = (RedisServer::start_with(&BACKLOG), RedisServer::start_with(&BACKLOG));
    replicate(&second, &first).await;
    let node = Node::ready(node_settings(&first, durable)).await;
    let kept = node.publish("room", &event(0)).await.unwrap();
    until("the replica has the first event", || second.head("room") == kept.0).await;
    promote(&second);
    let mut lost = kept;
    for n in 1..4 {
        lost = node.publish("room", &event(n)).await.unwrap();
    }
    node.task.abort();
    assert!(node.task.await.is_err(), "the node is gone");
    replicate(&first, &second).await;
    assert_eq!(first.head("room"), kept.0, "three acknowledged events are lost");
    second.kill();
    promote(&first);
    backlog_is_freed(&first).await;
    (first, lost)
}

fn node_settings(redis: &RedisServer, durable: bool) -> fanfare::config::Settings {
    fanfare::config::Settings { redis_durable: durable, ..settings(&redis.url()) }
}

fn assert_announced(reader: &Reader, lost: EventId) {
    assert!(reader.base > lost, "a client at {lost} must not be continuous with base {}", reader.base);
}

#[tokio::test]
async fn fail_back_without_a_node_is_announced() {
    let (redis, lost) = fail_back(false).await;
    let mut node = Node::ready(node_settings(&redis, false)).await;
    let reader = node.follow("room", 0).await;
    assert_announced(&reader, lost);
    assert!(node.publish("room", &event(4)).await.unwrap() > lost);
}

#[tokio::test]
async fn fail_back_is_announced_even_if_durable() {
    let (redis, lost) = fail_back(true).await;
    let mut node = Node::ready(node_settings(&redis, true)).await;
    assert_announced(&node.follow("room", 0).await, lost);
}

#[tokio::test]
async fn fcall_after_a_fail_back_reuses_no_id() {
    let (redis, lost) = fail_back(false).await;
    // The function was replicated with the data.
    let id = redis.raw().command(&["FCALL", "fanfare_publish", "1", "fanfare:{room}", "{}"]).number();
    assert!(id as u64 > lost.0);
}

#[tokio::test]
async fn promoted_replica_is_no_durable_restart() {
    let primary = RedisServer::start_with(&BACKLOG);
    let mut copy = RedisServer::start_with(&[&BACKLOG[..], &["--appendonly", "yes"]].concat());
    let node = Node::ready(node_settings(&primary, true)).await;
    replicate(&copy, &primary).await;
    let kept = node.publish("room", &event(0)).await.unwrap();
    until("the copy has the first event", || copy.head("room") == kept.0).await;
    promote(&copy);
    let lost = node.publish("room", &event(1)).await.unwrap();
    node.task.abort();
    until("the copy's data is on disk", || info(&copy, "aof_rewrite_in_progress") == "0").await;
    // A new process without a trace of the promotion, as after a restart of the primary.
    copy.restart();
    assert_eq!(copy.head("room"), kept.0);
    assert!(info(&copy, "master_replid2").bytes().all(|digit| digit == b'0'));
    let mut node = Node::ready(node_settings(&copy, true)).await;
    assert_announced(&node.follow("room", 0).await, lost);
}

#[tokio::test]
async fn attaching_replicas_cause_no_reset() {
    let (primary, mut replica) = (RedisServer::start_with(&BACKLOG), RedisServer::start());
    let mut node = Node::ready(settings(&primary.url())).await;
    let mut reader = node.follow("room", 0).await;
    let first = node.publish("room", &event(0)).await.unwrap();
    let alone = info(&primary, "master_replid");
    replicate(&replica, &primary).await;
    let replicated = info(&primary, "master_replid");
    assert_ne!(alone, replicated, "the first replica changes the replication id");
    let second = node.publish("room", &event(1)).await.unwrap();
    replica.kill();
    backlog_is_freed(&primary).await;
    assert_ne!(info(&primary, "master_replid"), replicated, "so does a freed backlog");
    let third = node.publish("room", &event(2)).await;
    assert_eq!(third, Ok::<_, PublishError>(EventId(first.0 + 2)));
    reader.until(&mut node, EventId(first.0 + 2)).await;
    assert_eq!((reader.resets.as_slice(), second.0), (&[][..], first.0 + 1));
    // Clients that resume later are continuous as well.
    node.unfollow(reader);
    let reader = node.follow("room", 1).await;
    assert!(reader.base < first);
}
