//! `fanfare doctor` as an operator runs it: with real limits, a real Redis with bad settings, or
//! without Redis.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::json;

use crate::common::process::Directory;
use crate::common::{Client, Node, Redis, RedisCluster, within};

/// Its output and exit code.
struct DoctorOutput {
    text: String,
    errors: String,
    code: Option<i32>,
}

impl DoctorOutput {
    /// The finding on this subject, with all its lines.
    fn on(&self, what: &str) -> String {
        let mut lines =
            self.text.lines().skip_while(|line| line.get(11..).is_none_or(|rest| !rest.starts_with(what)));
        let first = lines.next().unwrap_or_else(|| panic!("nothing on {what} in\n{}", self.text));
        let rest = lines.take_while(|line| line.starts_with("          "));
        std::iter::once(first).chain(rest).map(str::trim).collect::<Vec<_>>().join(" ")
    }
}

async fn run(mut command: Command) -> DoctorOutput {
    let output = tokio::task::spawn_blocking(move || command.output().expect("the binary can be run"));
    let output: Output = within("the doctor's end", async { output.await.expect("no panic") }).await;
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    DoctorOutput { text: text(output.stdout), errors: text(output.stderr), code: output.status.code() }
}

async fn doctor(args: &[&str], env: &[(&str, &str)]) -> DoctorOutput {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fanfare"));
    command.env_clear().env("PATH", "").envs(env.iter().copied()).arg("doctor").args(args);
    run(command).await
}

/// The same in a shell with this limit on open files.
async fn doctor_with_files(files: u32, args: &[&str]) -> DoctorOutput {
    let mut command = Command::new("/bin/sh");
    command
        .env_clear()
        .env("PATH", "") // without systemctl, which would show the limits of a service of this machine
        .args(["-c", &format!("ulimit -n {files} && exec \"$0\" doctor \"$@\"")]);
    command.arg(env!("CARGO_BIN_EXE_fanfare")).args(args);
    run(command).await
}

fn write_program(path: &Path, script: &str) {
    std::fs::write(path, script).expect("the directory is ours");
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o755)).expect("the file is ours");
}

#[tokio::test]
async fn low_file_limit_is_a_problem_with_advice() {
    let output = doctor_with_files(500, &["--connections", "1000"]).await;
    assert_eq!(output.code, Some(1), "{}", output.text);
    let finding = output.on("open files");
    assert!(finding.starts_with("PROBLEM") && finding.contains("but 500 allowed"), "{finding}");
    assert!(finding.contains("-> fanfare.service: LimitNOFILE="), "{finding}");
    assert!(output.text.contains("No Redis"), "{}", output.text);
    // Sufficient for a few connections. Without --connections it is what the limit allows.
    for args in [&["--connections=10"][..], &[]] {
        let output = doctor_with_files(500, args).await;
        assert!(output.on("open files").starts_with("ok"), "{}", output.text);
        assert_eq!(output.code, Some(0), "{}", output.text);
    }
}

#[tokio::test]
async fn limits_are_those_of_the_installed_unit() {
    let directory = Directory::new();
    let asked =
        "show fanfare.service fanfare@*.service --property=Id,LoadState,ActiveState,LimitNOFILE,MemoryMax";
    let shown = "Id=fanfare.service\nLoadState=not-found\n\n\
                 Id=fanfare@8081.service\nLoadState=loaded\nLimitNOFILE=5000\nMemoryMax=67108864\n";
    let script = format!("#!/bin/sh\n[ \"$*\" = '{asked}' ] && echo '{shown}'\n");
    write_program(&directory.path().join("systemctl"), &script);
    let path = directory.path().to_str().expect("UTF-8");
    let output = doctor(&["--connections", "1000"], &[("PATH", path)]).await;
    let finding = output.on("open files");
    assert!(finding.contains("5000 allowed (LimitNOFILE of fanfare@8081.service)"), "{finding}");
    assert_eq!(output.code, Some(0), "{}", output.text);
    let output = doctor(&["--connections", "50000"], &[("PATH", path)]).await;
    let finding = output.on("open files");
    assert!(finding.starts_with("PROBLEM") && !finding.contains("ulimit"), "{finding}");
    let finding = output.on("memory");
    assert!(finding.contains("64MiB allowed by MemoryMax of fanfare@8081.service"), "{finding}");
}

#[tokio::test]
async fn systemctl_that_hangs_is_killed() {
    let directory = Directory::new();
    let script = "#!/bin/sh\necho LoadState=loaded && echo Id=fanfare.service && exec /bin/sleep 60\n";
    write_program(&directory.path().join("systemctl"), script);
    let path = directory.path().to_str().expect("UTF-8");
    let output = doctor(&["--connections", "10"], &[("PATH", path)]).await;
    assert_eq!(output.code, Some(0), "{}", output.text);
    assert!(!output.text.contains("fanfare.service"), "the limits of this shell count: {}", output.text);
}

#[tokio::test]
async fn more_clients_than_memory_is_a_problem() {
    let output = doctor(&["--connections", "4000000000"], &[]).await;
    assert_eq!(output.code, Some(1));
    assert!(output.on("memory").starts_with("PROBLEM"), "{}", output.text);
    assert!(output.on("TCP memory").starts_with("warning"), "{}", output.text);
    assert!(output.on("ports of a proxy").contains("--listen"), "{}", output.text);
}

#[tokio::test]
async fn unreachable_redis_is_a_problem_in_bounded_time() {
    let mut redis = Redis::away(&[]);
    let output = doctor(&["--connections", "10"], &[("FANFARE_REDIS", &redis.url())]).await;
    assert_eq!(output.code, Some(1), "{}", output.text);
    assert!(output.on("connection").contains("check that it runs"), "{}", output.text);
    redis.up().await;
    redis.freeze();
    let output = doctor(&["--connections", "10", "--redis", &redis.url()], &[]).await;
    redis.thaw();
    assert_eq!(output.code, Some(1), "{}", output.text);
    assert!(output.on("connection").contains("does not reply"), "{}", output.text);
}

#[tokio::test]
async fn bad_redis_settings_are_named_with_advice() {
    let flags = ["--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru", "--requirepass", "hunter2"];
    let redis = Redis::start(&flags).await;
    let url = redis.url().replace("//", "//:hunter2@");
    let output = doctor(&["--connections", "10", "--redis-durable"], &[("FANFARE_REDIS", &url)]).await;
    assert_eq!(output.code, Some(1), "{}", output.text);
    for (what, level, line) in [
        ("connection", "ok", ", round trip "),
        ("role", "ok", "primary"),
        ("rights", "ok", ""),
        ("eviction", "PROBLEM", "-> redis.conf: maxmemory-policy noeviction"),
        ("maxmemory", "ok", "of 100mb in use"),
        ("Pub/Sub buffer", "warning", "-> redis.conf: client-output-buffer-limit pubsub 256mb 64mb 60"),
        ("persistence", "PROBLEM", "-> redis.conf: appendfsync always"),
        ("replicas", "ok", "none"),
        ("clock", "ok", "agree"),
        ("history", "ok", "no channel has any yet"),
    ] {
        let finding = output.on(what);
        assert!(finding.starts_with(level) && finding.contains(line), "{what}: {finding}");
    }
    assert!(!output.text.contains("hunter2") && output.text.contains(":***@"), "{}", output.text);
    // It has changed nothing: only nodes load the function.
    let mut client = redis.client().await;
    client.call(&["AUTH", "hunter2"]).await;
    assert_eq!(client.call(&["FUNCTION", "LIST"]).await.list(), []);
    assert_eq!(client.call(&["DBSIZE"]).await.int(), 0);
}

#[tokio::test]
async fn documented_redis_settings_pass() {
    let redis = Redis::start(&[
        "--maxmemory",
        "100mb",
        "--maxmemory-policy",
        "noeviction",
        "--appendonly",
        "yes",
        "--appendfsync",
        "always",
        "--client-output-buffer-limit",
        "pubsub 256mb 64mb 60",
    ])
    .await;
    let node = Node::on(&redis, &[]).await;
    let mut client = Client::plain(&node, "alice", "room").await;
    node.publish("room", &json!({"text": "hi"})).await;
    client.next_event().await;
    let args = ["--connections", "10", "--redis", &redis.url(), "--redis-durable"];
    let output = doctor(&args, &[]).await;
    assert_eq!(output.code, Some(0), "{}", output.text);
    let (_, of_redis) = output.text.split_once("\nRedis, ").expect("a part on Redis");
    assert!(!of_redis.contains("warning  ") && !of_redis.contains("PROBLEM"), "{of_redis}");
    let history = output.on("history");
    assert!(history.contains("channel room") && history.contains("holds 1 of 10000"), "{history}");
}

#[tokio::test]
async fn replicas_and_missing_rights_are_found() {
    let primary = Redis::start(&[]).await;
    let replica = Redis::replica_of(&primary).await;
    let output = doctor(&["--connections", "10", "--redis", &replica.url()], &[]).await;
    assert_eq!(output.code, Some(1));
    assert!(output.on("role").starts_with("PROBLEM"), "{}", output.text);
    let output = doctor(&["--connections", "10", "--redis", &primary.url()], &[]).await;
    assert!(output.on("replicas").contains("-> redis.conf: min-replicas-to-write 1"), "{}", output.text);

    // Information that a managed service hides, and rights that an administrator forgot.
    let mut client = primary.client().await;
    let rights =
        "~fanfare:* &fanfare:* &ws_broadcast +@read +@write +@pubsub +@scripting +@connection +info +time";
    for (rights, rejected) in
        [(rights.to_owned(), None), (rights.replace("+@pubsub", "-subscribe"), Some("SUBSCRIBE"))]
    {
        let set: Vec<_> = ["ACL", "SETUSER", "fanfare", "reset", "on", ">secret"]
            .into_iter()
            .chain(rights.split(' '))
            .collect();
        client.call(&set).await;
        let url = primary.url().replace("//", "//fanfare:secret@");
        let output = doctor(&["--connections", "10", "--redis", &url], &[]).await;
        assert!(
            output.on("Pub/Sub buffer").contains("check by hand: client-output-buffer-limit"),
            "{}",
            output.text
        );
        assert!(output.on("persistence").contains("check by hand: appendonly"), "{}", output.text);
        assert_eq!(output.code, Some(i32::from(rejected.is_some())), "{}", output.text);
        if let Some(rejected) = rejected {
            let finding = output.on("rights");
            assert!(finding.contains(rejected) && finding.contains("-> redis-cli ACL SETUSER"), "{finding}");
        }
    }
}

#[tokio::test]
async fn all_wrong_arguments_are_reported_with_code_2() {
    let output = doctor(&["--connections", "none", "--histroy", "5"], &[("FANFARE_SHARDS", "lots")]).await;
    assert_eq!((output.code, output.text.as_str()), (Some(2), ""));
    for part in
        ["3 settings are wrong", "--connections: \"none\"", "did you mean --history?", "FANFARE_SHARDS"]
    {
        assert!(output.errors.contains(part), "{part} is not in {}", output.errors);
    }
    let directory = Directory::new();
    let key = directory.path().join("missing");
    let output = doctor(&["--jwt-key", key.to_str().expect("UTF-8")], &[]).await;
    assert_eq!(output.code, Some(2), "{}", output.text);
}

#[tokio::test]
async fn every_primary_of_a_cluster_is_examined() {
    let cluster = RedisCluster::of(3, false, &["--repl-backlog-ttl", "0"]).await;
    let output = doctor(&["--redis", &cluster.url()], &[]).await;
    for redis in &cluster.nodes {
        let title = format!("Redis, 127.0.0.1:{} of redis-cluster://", redis.port());
        assert!(output.text.contains(&title), "{}{}", output.text, output.errors);
    }
    assert!(output.on("coverage").contains("cluster-require-full-coverage no"), "{}", output.text);
    assert_eq!(output.text.matches("a primary\n").count(), 3, "{}", output.text);
}
