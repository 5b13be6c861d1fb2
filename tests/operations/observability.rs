//! Metrics, stats, the dashboard and the log.

use std::collections::BTreeSet;
use std::io::Write;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::common::raw::opcode;
use crate::common::{Client, Node, Raw, Redis, http, until};

const DASHBOARD: &str = include_str!("../../grafana/fanfare.json");

/// Words in this text that may be names of metrics.
fn names(text: &str) -> BTreeSet<&str> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words.filter(|word| word.starts_with("fanfare_") || word.starts_with("process_")).collect()
}

/// The families of these metrics.
fn families(metrics: &str) -> BTreeSet<&str> {
    let types = metrics.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    types.filter_map(|line| line.split(' ').next()).collect()
}

async fn metrics(node: &Node) -> String {
    node.admin("GET", "/metrics", b"").await.body
}

/// Checks metrics with Prometheus's promtool, which is in Debian's package prometheus; tests/run.sh
/// installs it.
fn promtool(metrics: &str) {
    let mut command = Command::new("promtool");
    command.args(["check", "metrics"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("promtool is there: apt install prometheus, or tests/run.sh");
    child.stdin.take().expect("it is piped").write_all(metrics.as_bytes()).expect("promtool reads");
    let output = child.wait_with_output().expect("it ends");
    let texts = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    let text = texts.concat();
    assert!(output.status.success() && text.trim().is_empty(), "promtool says:\n{text}");
}

#[tokio::test]
async fn metrics_pass_promtool() {
    let redis = Redis::start(&[]).await;
    for node in [Node::on(&redis, &[]).await, Node::start(&["--shards", "3"]).await] {
        let mut client = Client::plain(&node, "alice", "room").await;
        client.send("hi").await;
        client.next_event().await;
        let text = metrics(&node).await;
        promtool(&text);
        assert!(
            !text.contains("alice") && !text.contains("room"),
            "no user and no channel is a label: {text}"
        );
    }
}

#[tokio::test]
async fn activity_is_counted() {
    let redis = Redis::start(&[]).await;
    let node = Node::on(&redis, &["--shards", "1"]).await;
    let mut alice = Client::plain(&node, "alice", "room").await;
    let (mut bob, _) = Client::json(&node, "bob", "room").await;
    alice.send("hi").await;
    alice.next_event().await;
    bob.next_event().await;
    node.publish_to("room", "bob", &json!({"text": "psst"})).await;
    bob.next_event().await;
    bob.send("no JSON").await;
    bob.expect_error(None).await;
    // One fan-out for both, and one private event without a fan-out. They are counted at the end of
    // a turn.
    let count = |name: &'static str| node.metric(name);
    until("what was delivered to be counted", || async {
        let latencies = count("fanfare_delivery_latency_seconds_count").await;
        (latencies == 2.0 && count("fanfare_events_delivered_total").await == 3.0).then_some(())
    })
    .await;
    assert_eq!(count("fanfare_fanout_duration_seconds_count").await, 1.0);
    assert!(count("fanfare_delivery_latency_seconds_sum").await > 0.0);
    assert_eq!(count("fanfare_messages_received_total").await, 2.0);
    assert_eq!(count("fanfare_bus_events_total").await, 2.0);
    assert_eq!(count("fanfare_bus_published_total").await, 2.0);
    assert_eq!(node.metric_of("fanfare_publish_errors_total", r#"code="invalid""#).await, 1.0);
    assert!(count("fanfare_buffer_bytes").await > 0.0);
    // At least both requests; the responses are larger.
    assert!(count("fanfare_received_bytes_total").await > 300.0);
    assert!(count("fanfare_sent_bytes_total").await > 300.0);
    until("probes", || async { (count("fanfare_bus_round_trip_seconds_count").await > 1.0).then_some(()) })
        .await;

    for (path, origin, status) in [("/ws/a?channel=a%20b", "", 400), ("/ws/a", "https://evil.example", 403)] {
        let headers = [("Origin", origin)];
        let headers = if origin.is_empty() { &[][..] } else { &headers };
        Raw::connect(node.public).await.upgrade(path, headers).await.expect_rejection(status);
    }
    http::request(node.public, "GET", "/nothing", &[], b"").await.expect_rejection(404);
    for status in ["400", "403", "404"] {
        let label = format!("status=\"{status}\"");
        assert_eq!(node.metric_of("fanfare_http_rejections_total", &label).await, 1.0, "{status}");
    }

    // Stats show the same. That both have the same fields is tested beside the table.
    until("the rejected connections to be closed", || async {
        (count("fanfare_connections").await == 2.0).then_some(())
    })
    .await;
    let stats = node.admin("GET", "/stats", b"").await.json();
    assert_eq!(stats["version"], env!("CARGO_PKG_VERSION"));
    assert!(stats["uptime_seconds"].as_f64().is_some_and(|uptime| uptime > 0.0));
    assert_eq!((&stats["ready"], &stats["not_ready_reason"]), (&json!(true), &Value::Null));
    assert_eq!((&stats["connections"], &stats["shards"][0]["connections"]), (&json!(2), &json!(2)));
    assert_eq!((&stats["events_delivered"], &stats["http_rejections"]["403"]), (&json!(3), &json!(1)));
}

#[tokio::test]
async fn stalled_reader_is_counted_as_slow() {
    let node = Node::start(&["--ping-interval", "1s", "--shards", "1"]).await;
    let mut raw = Raw::connect_with_small_buffers(node.public).await;
    raw.upgrade("/ws/slow?channel=room", &[]).await;
    let event = json!({ "text": "x".repeat(60_000) });
    until("a full socket", || async {
        node.publish("room", &event).await;
        (node.metric("fanfare_slow_connections").await == 1.0).then_some(())
    })
    .await;
    raw.frame(true, opcode::CLOSE, b"").await;
}

#[tokio::test]
async fn dashboard_shows_every_metric() {
    let node = Node::start(&[]).await;
    let text = metrics(&node).await;
    let known = families(&text);
    let dashboard: Value = serde_json::from_str(DASHBOARD).expect("JSON");
    assert_eq!((&dashboard["uid"], &dashboard["title"]), (&json!("fanfare"), &json!("fanfare")));
    assert!(dashboard["schemaVersion"].as_u64().is_some_and(|version| version >= 36));
    let variables = dashboard["templating"]["list"].as_array().expect("variables");
    let datasource = variables.iter().find(|variable| variable["name"] == "datasource").expect("one");
    assert_eq!((&datasource["type"], &datasource["query"]), (&json!("datasource"), &json!("prometheus")));

    let panels = dashboard["panels"].as_array().expect("panels");
    let ids: BTreeSet<_> = panels.iter().map(|panel| panel["id"].as_u64().expect("a number")).collect();
    assert_eq!(ids.len(), panels.len(), "every panel has an id of its own");
    let targets = panels.iter().flat_map(|panel| panel["targets"].as_array().cloned().unwrap_or_default());
    let queries = targets.map(|target| (target["datasource"]["uid"].clone(), target["expr"].clone()));
    let mut queries: Vec<_> = queries.collect();
    for annotation in dashboard["annotations"]["list"].as_array().expect("annotations") {
        queries.push((annotation["datasource"]["uid"].clone(), annotation["expr"].clone()));
    }
    assert!(queries.len() > 20);
    let mut shown = BTreeSet::new();
    for (datasource, expr) in &queries {
        assert_eq!(datasource, "${datasource}", "{expr}");
        let expr = expr.as_str().expect("text");
        assert!(!names(expr).is_empty(), "{expr}");
        for name in names(expr) {
            let bucket = name.strip_suffix("_bucket").filter(|family| known.contains(family));
            let family = bucket.unwrap_or(name);
            assert!(known.contains(family), "{name} in {expr} is no metric");
            assert_eq!(bucket.is_some(), text.contains(&format!("# TYPE {family} histogram")), "{expr}");
            shown.insert(family);
        }
    }
    let hidden: Vec<_> = known.difference(&shown).collect();
    assert_eq!(hidden, [&"fanfare_build_info"], "every metric is on the dashboard");
}

/// Lines of a node's log that contain this.
fn lines(node: &Node, part: &str) -> Vec<String> {
    node.log().lines().filter(|line| line.contains(part)).map(String::from).collect()
}

/// Clients choose this text, so it must not start a line or end an escape sequence.
const HOSTILE: &str = "a%E2%80%A8b%22%5C%7B%7D%E2%80%AE";

#[tokio::test]
async fn log_has_start_stop_and_rejections() {
    let node = Node::start(&["--log", "debug", "--log-format", "json", "--shards", "2"]).await;
    let client = Client::open(&node, HOSTILE, "channel=room", None).await;
    for _ in 0..30 {
        let mut raw = Raw::connect(node.public).await;
        raw.upgrade(&format!("/ws/{HOSTILE}"), &[("Origin", "https://evil.example")])
            .await
            .expect_rejection(403);
        let mut raw = Raw::connect(node.public).await;
        raw.upgrade("/ws/a%0Ab", &[]).await.expect_rejection(400);
    }
    client.leave().await;
    let ended = || async { (lines(&node, "\"closed_by_peer\"").len() == 1).then_some(()) };
    until("the client's close in the log", ended).await;
    node.signal("TERM");
    assert!(node.ended().await.success());

    let log = node.log();
    let entries: Vec<_> = log.lines().filter_map(|line| line.strip_prefix("! ")).collect();
    let entries: Vec<Value> =
        entries.iter().map(|line| serde_json::from_str(line).expect("an object a line")).collect();
    let of = |message: &str| -> Vec<&Value> {
        let is = |line: &&Value| line["message"].as_str().is_some_and(|text| text.starts_with(message));
        entries.iter().filter(is).collect()
    };
    let [started] = of("started")[..] else { panic!("one line: {log}") };
    assert_eq!((&started["version"], &started["bus"]), (&json!(env!("CARGO_PKG_VERSION")), &json!("local")));
    assert_eq!((&started["listen"], &started["shards"]), (&json!(node.public.to_string()), &json!(2)));
    let [stopping] = of("stopping")[..] else { panic!("one line: {log}") };
    assert_eq!(stopping["why"], "SIGTERM");
    let [stopped] = of("stopped")[..] else { panic!("one line: {log}") };
    assert!(stopped["seconds"].is_number() && stopped["closed"].is_u64(), "{stopped}");
    // Thirty of each, but only a line per class. Suppressed ones are counted in a later line.
    let rejected = of("request rejected");
    assert!(
        rejected.iter().any(|line| line["status"] == 403 && line["reason"] == "origin_not_allowed"),
        "{rejected:?}"
    );
    assert!(rejected.iter().any(|line| line["status"] == 400 && line["count"] == 1), "{rejected:?}");
    assert!(rejected.len() <= 4, "rate-limited, also where this took more than ten seconds: {rejected:?}");
    let ends = of("closed connection");
    let end = ends.iter().find(|line| line["reason"] == "closed_by_peer").expect("it has left");
    assert_eq!((&end["channel"], &end["user"]), (&json!("room"), &json!("a\u{2028}b\"\\{}\u{202e}")));
}

#[tokio::test]
async fn readyz_gives_advice_and_the_log_the_error() {
    let mut redis = Redis::away(&["--requirepass", "secret"]);
    let wrong = redis.url().replace("//", "//:hunter2@");
    let node = Node::start_unready(&["--redis", &wrong]).await;
    let says = |part: &'static str| {
        let node = &node;
        let asked = move || async move { node.unready().await.contains(part).then_some(()) };
        async move { until(part, asked).await }
    };
    says("check that it runs").await;
    // The reason is there first, then its line in the log.
    let logged = async |part| until(part, || async { lines(&node, part).pop() }).await;
    logged("Connection refused").await;
    assert_eq!(lines(&node, "Connection refused").len(), 1, "{}", node.log());
    redis.up().await;
    says("correct the user or the password").await;
    let reason = node.unready().await;
    assert!(!reason.contains("WRONGPASS") && reason.lines().count() == 1, "{reason}");
    logged("WRONGPASS").await;
    assert_eq!(lines(&node, "WRONGPASS").len(), 1, "{}", node.log());
    assert!(!node.log().contains("hunter2"));
    // The public listener does not show it.
    assert_eq!(node.get("/readyz").await.body, "not ready\n");
    let mut raw = Raw::connect(node.public).await;
    let response = raw.upgrade("/ws/a", &[]).await;
    response.expect_rejection(503);
    assert_eq!(response.body, "no client can join now: try again, or another node\n");
}

#[tokio::test]
async fn replica_errors_are_logged_once_per_change() {
    let primary = Redis::start(&[]).await;
    let mut replica = Redis::replica_of(&primary).await;
    let node = Node::start_unready(&["--redis", &replica.url()]).await;
    let replica_is_it = || async { node.unready().await.contains("is a replica").then_some(()) };
    until("a node that says what is wrong", replica_is_it).await;
    let connections =
        || async { replica.info("total_connections_received").await.parse::<u64>().expect("a number") };
    // Each request of this test takes a connection as well.
    let (before, mut ours) = (connections().await, 0);
    until("the node to have tried again and again", || {
        ours += 1;
        let tried = connections();
        async move { (tried.await >= before + ours + 6).then_some(()) }
    })
    .await;
    assert_eq!(lines(&node, "FCALL").len(), 1, "{}", node.log());
    // On a slow machine Redis may be silent for seconds in between, which is a change.
    let warnings = lines(&node, "bus unavailable");
    let warnings: Vec<_> =
        warnings.iter().filter_map(|line| line.split_once("WARN")).map(|(_, what)| what).collect();
    assert!(!warnings.is_empty() && warnings.windows(2).all(|pair| pair[0] != pair[1]), "{}", node.log());
    replica.promote().await;
    node.ready().await;
    // The node also retries on existing connections.
    let available = || async { (lines(&node, "FCALL fanfare_publish available").len() == 1).then_some(()) };
    until("a line about FCALL", available).await;
    assert!(replica.client().await.fcall("room", b"{}", None).await.int() > 0);
}

#[tokio::test]
async fn channel_fault_is_logged_with_its_key() {
    let redis = Redis::start(&[]).await;
    let node = Node::on(&redis, &[]).await;
    let _client = Client::plain(&node, "alice", "room").await;
    let mut raw = redis.client().await;
    raw.call(&["DEL", "fanfare:{room}:meta"]).await;
    raw.call(&["SET", "fanfare:{room}:meta", "x"]).await;
    let faults = || node.log().lines().filter(|line| line.contains("fanfare:{room}:meta")).count();
    until("a line with the key", || async { (faults() > 0).then_some(()) }).await;
    for _ in 0..3 {
        let rejected = node.admin("POST", "/publish?channel=room", b"{}").await;
        assert_eq!(rejected.status, 503, "{}", rejected.body);
        assert!(rejected.body.contains("this channel's data"), "{}", rejected.body);
    }
    assert_eq!(faults(), 1, "{}", node.log());
    let mut other = Client::plain(&node, "bob", "other").await;
    node.publish("other", &json!({"text": "hi"})).await;
    other.next_event().await;
}
