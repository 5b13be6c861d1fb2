//! What a node says when it can't start or can't use its Redis: an operator must find the cause.

use std::net::TcpListener;
use std::process::Command;

use futures_util::future::join_all;
use serde_json::json;

use crate::common::process::Directory;
use crate::common::{Node, Redis, free_port, until};

/// Fails if a text has what only Rust programmers read, or a password.
pub fn assert_plain(text: &str) {
    for part in ["Os {", "Custom {", "kind:", "code:", "Error {", "Kind(", "\\'", "secret"] {
        assert!(!text.contains(part), "{part} in: {text}");
    }
}

/// Waits until `/readyz` of the admin listener and a warning in the log have this text.
pub async fn assert_unready(node: &Node, part: &str) {
    until(&format!("a node that says: {part}"), || async {
        let has_warned = node.log().lines().any(|line| line.contains(" WARN ") && line.contains(part));
        (node.unready().await.contains(part) && has_warned).then_some(())
    })
    .await;
    assert_plain(&node.log());
}

/// Runs a node that must not start. Returns its exit code and errors.
fn failed_start(flags: &[&str], variables: &[(&str, &str)], files: Option<u32>) -> (Option<i32>, String) {
    let limit = files.map_or(String::new(), |files| format!("ulimit -n {files} && "));
    let mut command = Command::new("sh");
    command.args(["-c", &format!("{limit}exec \"$0\" \"$@\"")]).arg(env!("CARGO_BIN_EXE_fanfare"));
    // Without a port of its own a node that starts by mistake would not end.
    let output = command.args(flags).envs(variables.iter().copied()).output().expect("sh is there");
    assert!(output.stdout.is_empty(), "there is no ready line: {output:?}");
    (output.status.code(), String::from_utf8(output.stderr).expect("UTF-8"))
}

#[test]
fn failed_start_names_cause_and_remedy() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let taken = taken.local_addr().expect("it is bound");
    let (address, everywhere) = (taken.to_string(), format!("0.0.0.0:{}", taken.port()));
    let command = format!("`ss -ltnp 'sport = :{}'`", taken.port());
    let directory = Directory::new();
    let no_pem = directory.path().join("no.pem");
    std::fs::write(&no_pem, "no certificate").expect("the directory is ours");
    let no_pem = no_pem.to_str().expect("UTF-8");
    let tls = ["--redis", "rediss://127.0.0.1:1"];
    let listen = ["--listen", "127.0.0.1:0"];
    let in_use = |setting: &str| format!("{setting} can't be used: Address already in use (os error 98)");
    for (flags, variables, code, parts) in [
        (
            &["--admin", "off", "--listen", &address][..],
            &[][..],
            1,
            [&*in_use(&format!("--listen {address}")), &command],
        ),
        (
            &["--admin", "off", "--allow-anonymous", "--listen", &everywhere],
            &[],
            1,
            [&in_use(&format!("--listen {everywhere}")), &command],
        ),
        (
            &[&listen[..], &["--admin", &address]].concat(),
            &[],
            1,
            [&in_use(&format!("--admin {address}")), &command],
        ),
        (
            &["--allow-anonymous", "--listen", "203.0.113.1:8080"],
            &[],
            1,
            ["--listen 203.0.113.1:8080", "`ip addr` shows"],
        ),
        (
            &[&listen[..], &["--admin", "unix:/nowhere/a"]].concat(),
            &[],
            1,
            ["--admin unix:/nowhere/a", "directory must exist"],
        ),
        (
            &tls,
            &[("SSL_CERT_FILE", "/nowhere/ca.pem")],
            2,
            ["SSL_CERT_FILE: ", "No such file or directory (os error 2) at '/nowhere/ca.pem'"],
        ),
        (
            &tls,
            &[("SSL_CERT_FILE", no_pem), ("SSL_CERT_DIR", "")],
            2,
            ["SSL_CERT_FILE: no CA certificates found", "PEM"],
        ),
        (
            &["--redis", "127.0.0.1:6379"],
            &[],
            2,
            ["--redis: must start with redis://", "redis://127.0.0.1:6379"],
        ),
        (
            &["--redis", "redis://:a/secret@127.0.0.1"],
            &[],
            2,
            ["--redis: has a / ? or # where none belongs", "%2F"],
        ),
        (
            &[],
            &[("FANFARE_REDIS", "redis://:a#secret@127.0.0.1")],
            2,
            ["FANFARE_REDIS: has a / ? or #", "%23"],
        ),
    ] {
        let (found, text) = failed_start(flags, variables, None);
        assert_eq!(found, Some(code), "{flags:?}: {text}");
        assert!(parts.iter().all(|part| text.contains(part)), "{parts:?} in: {text}");
        assert_plain(&text);
    }
}

#[tokio::test]
async fn too_few_descriptors_are_reported_first() {
    for (files, shards, needed) in [(8, "1", 68), (67, "1", 68), (100, "8", 124)] {
        let flags = ["--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--shards", shards];
        let (code, text) = failed_start(&flags, &[], Some(files));
        let part = format!(
            "limit on open files: is {files}, and a node with --shards {shards} needs at least {needed}"
        );
        assert!(code == Some(2) && text.contains(&part) && text.contains("LimitNOFILE"), "{text}");
        // With as many it starts, and warns that they are few.
        let node = Node::start_with_files(needed, &["--shards", shards]).await;
        let log = node.log();
        let warning = log.lines().find(|line| line.contains("WARN the limit on open files allows few"));
        let advice = "advice=\"raise LimitNOFILE= in the unit, or ulimit -n in a shell\"";
        assert!(warning.is_some_and(|line| line.contains(advice)), "{log}");
    }
    let asked = Node::start_with_files(1000, &["--max-connections", "100"]).await;
    assert!(!asked.log().contains("WARN"), "as many as asked for: {}", asked.log());
}

#[tokio::test]
async fn unusable_redis_is_explained() {
    let redis = Redis::start(&[]).await;
    let replica = Redis::replica_of(&redis).await;
    let sentinel = Redis::sentinel_for(&redis).await;
    let frozen = Redis::start(&[]).await;
    frozen.freeze();
    let (port, sentinels) = (redis.port(), sentinel.port());
    let frozen_url = frozen.url();
    let starting = Node::start_unready(&["--redis", &frozen_url]).await;
    assert_eq!(
        starting.unready().await.trim(),
        format!("connecting to Redis at 127.0.0.1:{}", frozen.port())
    );
    let cases = [
        (format!("redis://127.0.0.1:{port}/99"), "no database of the number in --redis"),
        (format!("redis://localhost:{port}/99"), "no database of the number in --redis"),
        (replica.url(), "this Redis is a replica"),
        (
            format!("redis-sentinel://127.0.0.1:{sentinels}?sentinelServiceName=nope"),
            "the Sentinels in --redis don't know that primary: correct sentinelServiceName",
        ),
        (
            format!("redis-sentinel://127.0.0.1:{}?sentinelServiceName=main", free_port()),
            "no Sentinel in --redis can be used",
        ),
        (
            format!("redis-sentinel://127.0.0.1:{port}?sentinelServiceName=main"),
            "the server at --redis is not a Sentinel",
        ),
        (format!("redis://127.0.0.1:{}", free_port()), "Redis can't be reached"),
        ("unix:/nowhere/redis.sock".into(), "there is no unix socket at the path in --redis"),
        ("redis://nowhere.invalid".into(), "the host name in --redis can't be resolved"),
    ];
    join_all(cases.iter().map(|(url, part)| async move {
        let node = Node::start_unready(&["--redis", url]).await;
        assert_unready(&node, part).await;
    }))
    .await;
}

#[tokio::test]
async fn recognizes_non_redis_servers() {
    /// A server that reads a request, sends this answer, and closes.
    async fn server(answer: &'static [u8]) -> u16 {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let port = listener.local_addr().expect("it is bound").port();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                // The client may have gone.
                let _ = stream.read(&mut [0; 1024]).await;
                let _ = stream.write_all(answer).await;
            }
        });
        port
    }
    let closes = "the server at --redis closes the connection at once";
    for (url, answer, part) in [
        ("redis://127.0.0.1", &b""[..], closes),
        ("redis://:pass@127.0.0.1", b"", closes),
        ("rediss://127.0.0.1", b"", closes),
        ("redis://127.0.0.1", b"HTTP/1.1 400 Bad Request\r\n\r\n", "does not speak the Redis protocol"),
        ("redis://127.0.0.1", b"\x15\x03\x01\0\x02\x02\x46", "does not speak the Redis protocol"),
        ("rediss://127.0.0.1", b"-ERR unknown command\r\n", "does not speak TLS: use redis://"),
    ] {
        let url = format!("{url}:{}", server(answer).await);
        let node = Node::start_unready(&["--redis", &url]).await;
        assert_unready(&node, part).await;
    }
}

#[tokio::test]
async fn warns_of_full_or_evicting_redis() {
    let evicting = Redis::start(&["--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru"]).await;
    let node = Node::on(&evicting, &[]).await;
    let warning =
        "maxmemory-policy is allkeys-lru: when memory is full, channels lose their history and sequence";
    let log = node.log();
    assert!(log.lines().any(|line| line.contains(" WARN ") && line.contains(warning)), "{log}");

    let full = Redis::start(&[]).await;
    let node = Node::on(&full, &[]).await;
    assert!(!node.log().contains("WARN"), "{}", node.log());
    node.publish("room", &json!({"n": 1})).await;
    full.client().await.call(&["CONFIG", "SET", "maxmemory", "1"]).await;
    for _ in 0..3 {
        node.admin("POST", "/publish?channel=room", b"{}").await.expect_rejection(503);
    }
    let warnings = || node.log().lines().filter(|line| line.contains("events rejected by redis")).count();
    until("a warning", || async { (warnings() > 0).then_some(()) }).await;
    assert_eq!(warnings(), 1, "at most one a minute: {}", node.log());
    assert!(node.log().contains("raise its maxmemory"), "{}", node.log());
    // A node that starts now can't load the function.
    let late = Node::on(&full, &[]).await;
    let warning = "FCALL fanfare_publish unavailable, all events are rejected";
    until("the reason", || async { late.log().contains(warning).then_some(()) }).await;
}
