//! What an operator sees of a node: metrics, stats, the dashboard over them, the log.

mod common;

use std::collections::BTreeSet;
use std::io::Write;
use std::process::{Command, Stdio};

use common::raw::opcode;
use common::{Client, Node, Raw, Redis, http, until};
use serde_json::{Value, json};

const DASHBOARD: &str = include_str!("../grafana/fanfare.json");

/// The names in this text that could be metrics'.
fn names(text: &str) -> BTreeSet<&str> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words.filter(|word| word.starts_with("fanfare_") || word.starts_with("process_")).collect()
}

/// The families that these metrics consist of.
fn families(metrics: &str) -> BTreeSet<&str> {
    let types = metrics.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    types.filter_map(|line| line.split(' ').next()).collect()
}

async fn metrics(node: &Node) -> String {
    node.admin("GET", "/metrics", b"").await.body
}

/// Prometheus' own judgement. It is in Debian's package prometheus; tests/run.sh installs it.
fn promtool(metrics: &str) {
    let mut command = Command::new("promtool");
    command.args(["check", "metrics"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("promtool is there: apt install prometheus, or tests/run.sh");
    child.stdin.take().expect("it is piped").write_all(metrics.as_bytes()).expect("promtool reads");
    let output = child.wait_with_output().expect("it ends");
    let said = [output.stdout, output.stderr].map(|said| String::from_utf8_lossy(&said).into_owned());
    assert!(output.status.success() && said.concat().trim().is_empty(), "promtool says:\n{}", said.concat());
}

#[tokio::test]
async fn prometheus_finds_nothing_to_complain_of() {
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
async fn what_happens_is_counted() {
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
    // One pass for both, and one event brought to bob without a pass. They are counted when a turn is over.
    let count = |name: &'static str| node.metric(name);
    until("what was delivered to be counted", || async {
        let latencies = count("fanfare_delivery_latency_seconds_count").await;
        (latencies == 2.0 && count("fanfare_delivered_total").await == 3.0).then_some(())
    })
    .await;
    assert_eq!(count("fanfare_pass_duration_seconds_count").await, 1.0);
    assert!(count("fanfare_delivery_latency_seconds_sum").await > 0.0);
    assert_eq!(count("fanfare_messages_total").await, 2.0);
    assert_eq!(count("fanfare_bus_events_total").await, 2.0);
    assert_eq!(count("fanfare_bus_published_total").await, 2.0);
    assert_eq!(node.metric_of("fanfare_publishes_refused_total", r#"code="invalid""#).await, 1.0);
    assert!(count("fanfare_feed_bytes").await > 0.0);
    // At least both requests; and what was sent is more than both answers.
    assert!(count("fanfare_received_bytes_total").await > 300.0);
    assert!(count("fanfare_sent_bytes_total").await > 300.0);
    until("canaries", || async { (count("fanfare_bus_round_trip_seconds_count").await > 1.0).then_some(()) })
        .await;

    for (path, origin, status) in [("/ws/a?channel=a%20b", "", 400), ("/ws/a", "https://evil.example", 403)] {
        let headers = [("Origin", origin)];
        let headers = if origin.is_empty() { &[][..] } else { &headers };
        Raw::connect(node.public).await.upgrade(path, headers).await.expect_refusal(status);
    }
    http::request(node.public, "GET", "/nothing", &[], b"").await.expect_refusal(404);
    for status in ["400", "403", "404"] {
        let label = format!("status=\"{status}\"");
        assert_eq!(node.metric_of("fanfare_refused_total", &label).await, 1.0, "{status}");
    }

    // Stats show the same; that nothing is in one alone is tested beside the table.
    until("the refused to be gone", || async { (count("fanfare_connections").await == 2.0).then_some(()) })
        .await;
    let stats = node.admin("GET", "/stats", b"").await.json();
    assert_eq!(stats["version"], env!("CARGO_PKG_VERSION"));
    assert!(stats["uptime_seconds"].is_u64());
    assert_eq!((&stats["ready"], &stats["trouble"]), (&json!(true), &Value::Null));
    assert_eq!((&stats["connections"], &stats["shards"][0]["connections"]), (&json!(2), &json!(2)));
    assert_eq!((&stats["delivered"], &stats["refused"]["403"]), (&json!(3), &json!(1)));
}

#[tokio::test]
async fn a_reader_that_stalls_is_counted_as_slow() {
    let node = Node::start(&["--heartbeat", "1s", "--shards", "1"]).await;
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
async fn the_dashboard_shows_what_there_is() {
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
    let mut shown = BTreeSet::new();
    let targets = panels.iter().flat_map(|panel| panel["targets"].as_array().cloned().unwrap_or_default());
    let queries = targets.map(|target| (target["datasource"]["uid"].clone(), target["expr"].clone()));
    let mut queries: Vec<_> = queries.collect();
    for annotation in dashboard["annotations"]["list"].as_array().expect("annotations") {
        queries.push((annotation["datasource"]["uid"].clone(), annotation["expr"].clone()));
    }
    assert!(queries.len() > 20);
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
    assert_eq!(hidden, [&"fanfare_build_info"], "what is counted and not shown helps nobody");
}
