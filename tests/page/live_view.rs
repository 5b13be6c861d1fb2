//! The live view of the admin listener.

use serde_json::{Value, json};

use super::common::process::Directory;
use super::common::{Client, Node, Redis, until};
use super::{Browser, ENTER};

/// The live view of one node.
struct LiveView(Browser);

impl LiveView {
    async fn open(node: &Node) -> LiveView {
        let view = LiveView(Browser::start().await);
        view.0.open(&format!("http://{}/", node.admin)).await;
        view
    }

    /// The value of this expression.
    async fn value(&self, script: &str) -> Value {
        self.0.run(&format!("return {script}")).await
    }

    async fn reaches(&self, state: &str) {
        self.0.becomes("document.body.dataset.state", json!(state)).await;
    }

    /// The text of the state.
    async fn state(&self) -> String {
        let text = self.value("document.querySelector('#state').textContent").await;
        text.as_str().expect("a text").trim().to_owned()
    }

    /// The script for the cells of a line: now, min, max.
    fn line(title: &str, line: &str) -> String {
        format!(
            "(() => {{
                const card = [...document.querySelectorAll('.plot')].find((card) => card.querySelector('h2').textContent === '{title}');
                const row = [...card.querySelectorAll('tbody tr')].find((row) => row.cells[0].textContent === '{line}');
                return [...row.cells].slice(1).map((cell) => cell.textContent);
            }})()"
        )
    }

    /// The script for the rows of a list of counts: name, since the page was opened, since the
    /// start. Without requests for `/readyz`, which come while a test starts its node.
    fn counts(title: &str) -> String {
        format!(
            "[...document.querySelectorAll('.count')]
                .filter((card) => card.querySelector('caption').textContent === '{title}')
                .flatMap((card) => [...card.querySelectorAll('tbody tr')])
                .map((row) => [...row.cells].map((cell) => cell.textContent))
                .filter(([name]) => !['http_response', '503'].includes(name))"
        )
    }

    async fn now(&self, title: &str, line: &str) -> Value {
        self.value(&LiveView::line(title, line)).await[0].take()
    }

    /// From now on the page asks only in `step`, and gets the answer that `step` is given. The
    /// request that its timer makes before gets this answer.
    async fn take_over(&self, answer: &Value) {
        let script = "
            window.polls = [];
            window.asked = 0;
            window.setTimeout = (poll) => polls.push(poll);
            window.clearTimeout = () => {};
            window.fetch = async () => { asked++; return new Response(JSON.stringify(window.answer)); };
            window.answer = ANSWER;";
        self.0.run(&script.replace("ANSWER", &answer.to_string())).await;
        self.0.becomes("polls.length", json!(1)).await;
    }

    async fn step(&self, answer: &Value) {
        let script = format!(
            "const done = arguments[0]; window.answer = {answer}; Promise.resolve(polls.pop()()).then(done);"
        );
        self.0.command("/execute/async", json!({ "script": script, "args": [] })).await;
    }
}

#[tokio::test]
async fn live_view_shows_the_node() {
    let redis = Redis::start(&[]).await;
    let node = Node::on(&redis, &["--max-connections", "50"]).await;
    let mut alice = Client::plain(&node, "alice", "room").await;
    let mut bob = Client::plain(&node, "bob", "room").await;
    let carol = Client::plain(&node, "carol", "room").await;
    let view = LiveView::open(&node).await;
    view.reaches("ready").await;
    assert_eq!(view.now("Connections", "open").await, "3");

    // Two requests that are rejected, one client that leaves, and one event.
    node.get("/nothing").await.expect_rejection(404);
    for _ in 0..2 {
        node.get("/ws/alice").await.expect_rejection(426);
    }
    let rejections = json!([["426", "2", "2"], ["404", "1", "1"]]);
    view.0.becomes(&LiveView::counts("HTTP rejections by status"), rejections).await;
    carol.leave().await;
    view.0.becomes(&LiveView::line("Connections", "open"), json!(["2", "2", "3"])).await;
    let closes = json!([["closed_by_peer", "1", "1"]]);
    view.0.becomes(&LiveView::counts("Closed connections"), closes).await;
    node.publish("room", &json!({ "text": "hi" })).await;
    alice.next_event().await;
    bob.next_event().await;
    for (title, line, unit) in [
        ("Deliveries", "events", "/s"),
        ("Delivery latency", "p50", "s"),
        ("Delivery latency", "p99", "s"),
        ("Bus round trip", "mean", "s"),
        ("Closes and rejections", "closes", "/s"),
        ("Memory", "resident", "iB"),
    ] {
        until(&format!("the maximum of {line}"), || async {
            let cells = view.value(&LiveView::line(title, line)).await;
            let max = cells[2].as_str().expect("a text");
            (max.ends_with(unit) && max.starts_with(|c: char| c.is_ascii_digit()) && max != "0/s")
                .then_some(())
        })
        .await;
    }
    let drawn = "[...document.querySelectorAll('.plot path')].every((path) => path.getTotalLength() >= 0 && path.getAttribute('d'))";
    assert_eq!(view.value(&format!("Boolean({drawn})")).await, true);

    // All requests are to this node, and one ends before the next starts.
    let requests = view.value("performance.getEntriesByType('resource').map((one) => [one.name, one.startTime, one.responseEnd])").await;
    let requests = requests.as_array().expect("a list");
    let stats = format!("http://{}/stats", node.admin);
    assert!(requests.len() > 1 && requests.iter().all(|request| request[0] == stats), "{requests:?}");
    let time = |value: &Value| value.as_f64().expect("a time");
    assert!(requests.windows(2).all(|pair| time(&pair[0][2]) <= time(&pair[1][1])), "{requests:?}");
    assert_eq!(view.0.complaints().await, [""; 0]);
}

#[tokio::test]
async fn live_view_shows_outages() {
    let mut redis = Redis::start(&[]).await;
    let node = Node::on(&redis, &[]).await;
    let address = node.admin.to_string();
    let client = Client::plain(&node, "alice", "room").await;
    let view = LiveView::open(&node).await;
    view.reaches("ready").await;
    redis.kill();
    view.reaches("not-ready").await;
    let reason = node.unready().await;
    until("the reason", || async {
        let (state, reason) = (view.state().await, node.unready().await);
        (state == format!("Not ready {}", reason.trim())).then_some(())
    })
    .await;
    assert!(reason.contains("Redis"), "{reason}");

    node.kill();
    view.reaches("unreachable").await;
    assert!(
        view.state().await.ends_with("no connection. Below are the last numbers."),
        "{}",
        view.state().await
    );
    assert_eq!(view.now("Connections", "open").await, "1");
    let is_grey = "getComputedStyle(document.querySelector('main')).opacity < 1";
    assert_eq!(view.value(is_grey).await, true);
    drop(client);

    let node = Node::start(&["--admin", &address]).await;
    view.reaches("ready").await;
    assert_eq!(view.now("Connections", "open").await, "0");
    assert_eq!(view.value(&LiveView::counts("Closed connections")).await, json!([]));
    node.signal("STOP");
    view.reaches("unreachable").await;
    assert!(view.state().await.contains("no answer within"), "{}", view.state().await);
    node.signal("CONT");
    view.reaches("ready").await;
}

#[tokio::test]
async fn live_view_asks_for_the_admin_key() {
    let directory = Directory::new();
    let file = directory.path().join("admin.key");
    std::fs::write(&file, "correct horse battery".replace(' ', "-")).expect("it can be written");
    let node = Node::start(&["--admin-key", file.to_str().expect("UTF-8")]).await;
    let view = LiveView::open(&node).await;
    let stored = "sessionStorage.length + localStorage.length + document.cookie.length";
    view.reaches("locked").await;
    assert_eq!(view.state().await, "Admin key needed the node was started with --admin-key");
    let asked = "performance.getEntriesByType('resource').length";
    assert_eq!(view.value(asked).await, 0, "no request that would be rejected");

    for (given, answer) in [("no key", "only ASCII"), ("wrong-horse-battery", "the given key is wrong")] {
        view.0.type_into("#key", &format!("{given}{ENTER}")).await;
        until(answer, || async { view.state().await.contains(answer).then_some(()) }).await;
        assert_eq!(view.value(stored).await, 0);
        assert_eq!(view.value("document.body.dataset.state").await, "locked");
    }
    assert_eq!(view.value(asked).await, 1, "the wrong key was tried once");

    view.0.type_into("#key", &format!("correct-horse-battery{ENTER}")).await;
    view.reaches("ready").await;
    assert_eq!(view.value("location.href").await, format!("http://{}/", node.admin));
    assert_eq!(view.value("document.querySelector('#key').value").await, "");
    let rejected = json!([["rejected", "0", "1"]]);
    view.0.becomes(&LiveView::counts("Admin requests"), rejected).await;
    view.0.open(&format!("http://{}/", node.admin)).await; // again, in the same tab
    view.reaches("ready").await;
    view.0.click("#forget").await;
    view.reaches("locked").await;
    assert_eq!(view.value(stored).await, 0);
    assert_eq!(view.value("getComputedStyle(document.querySelector('main')).display").await, "none");
    let complaints = view.0.complaints().await;
    assert!(complaints.len() == 1 && complaints[0].contains("401"), "{complaints:?}");
}

#[tokio::test]
async fn late_answer_does_not_drop_a_new_key() {
    let directory = Directory::new();
    let file = directory.path().join("admin.key");
    std::fs::write(&file, "correct-horse-battery").expect("it can be written");
    let node = Node::start(&["--admin-key", file.to_str().expect("UTF-8")]).await;
    let view = LiveView::open(&node).await;
    view.reaches("locked").await;
    // The answer to the wrong key waits for `release`.
    let script = "
        const real = window.fetch;
        window.fetch = async (...request) => {
            const response = await real(...request);
            window.fetch = real;
            await new Promise((resolve) => { window.release = resolve; });
            return response;
        };";
    view.0.run(script).await;
    view.0.type_into("#key", &format!("wrong-horse-battery{ENTER}")).await;
    view.0.becomes("typeof window.release", json!("function")).await;
    view.0.type_into("#key", &format!("correct-horse-battery{ENTER}")).await;
    view.0.run("window.release()").await;
    view.reaches("ready").await;
}

#[tokio::test]
async fn live_view_computes_rates_and_quantiles() {
    let node = Node::start(&[]).await;
    let view = LiveView::open(&node).await;
    view.reaches("ready").await;
    let mut stats = node.admin("GET", "/stats", b"").await.json();
    view.take_over(&stats).await;
    stats["process_start_time_seconds"] = json!(1); // another process
    stats["uptime_seconds"] = json!(100.0);
    stats["connections_closed"]["protocol"] = json!(5);
    view.step(&stats).await;
    for (title, line) in
        [("Deliveries", "events"), ("Delivery latency", "p99"), ("Closes and rejections", "closes")]
    {
        assert_eq!(view.now(title, line).await, "–", "{line} is unknown after a restart");
    }
    let closes = LiveView::counts("Closed connections");
    assert_eq!(view.value(&closes).await, json!([["protocol", "0", "5"]]));

    stats["uptime_seconds"] = json!(102.0);
    stats["events_delivered"] = json!(3_000);
    stats["connections_closed"]["protocol"] = json!(6);
    stats["connections_closed"]["slow_reader"] = json!(3);
    stats["http_rejections"]["401"] = json!(1);
    stats["bus_round_trip_seconds"]["count"] = json!(2);
    stats["bus_round_trip_seconds"]["sum"] = json!(0.003);
    // 60 durations up to 1 ms, 39 up to 2.5 ms, one above 10 s.
    let buckets = stats["delivery_latency_seconds"]["buckets"].as_object_mut().expect("buckets");
    for (bound, count) in buckets {
        let seconds: f64 = bound.replace("+Inf", "inf").parse().expect("a number");
        *count = json!(if seconds < 0.001 {
            0
        } else if seconds < 0.0025 {
            60
        } else if seconds <= 10.0 {
            99
        } else {
            100
        });
    }
    view.step(&stats).await;
    for (title, line, expected) in [
        ("Deliveries", "events", "1,500/s"),
        ("Delivery latency", "p50", "917 µs"), // 0.5 ms and 50 of 60 parts of the next 0.5 ms
        ("Delivery latency", "p99", "2.5 ms"),
        ("Closes and rejections", "closes", "2/s"),
        ("Closes and rejections", "rejections", "0.5/s"),
        ("Bus round trip", "mean", "1.5 ms"),
    ] {
        assert_eq!(view.now(title, line).await, expected, "{line}");
    }
    assert_eq!(view.value(&closes).await, json!([["slow_reader", "3", "3"], ["protocol", "1", "6"]]));
    stats["uptime_seconds"] = json!(103.0);
    view.step(&stats).await;
    assert_eq!(view.now("Delivery latency", "p50").await, "–", "nothing was delivered");
    assert_eq!(view.now("Deliveries", "events").await, "0/s");

    // Text from the node is never markup.
    let markup = "<img src=x onerror=alert(1)>";
    stats["uptime_seconds"] = json!(104.0);
    stats["ready"] = json!(false);
    stats["not_ready_reason"] = json!(markup);
    stats["connections_closed"] = json!({ markup: 1 });
    view.step(&stats).await;
    assert_eq!(view.state().await, format!("Not ready {markup}"));
    assert_eq!(view.value(&format!("{closes}.map(([name]) => name)")).await, json!([markup]));
    assert_eq!(view.value("document.querySelectorAll('img').length").await, 0);
    assert_eq!(view.0.complaints().await, [""; 0]);
}

#[tokio::test]
async fn hidden_live_view_asks_nothing() {
    let node = Node::start(&[]).await;
    let view = LiveView::open(&node).await;
    view.reaches("ready").await;
    let stats = node.admin("GET", "/stats", b"").await.json();
    view.take_over(&stats).await;
    view.step(&stats).await;
    let asked = view.value("asked").await;
    let turn = async |is_hidden: bool| {
        let script = "Object.defineProperty(document, 'hidden', { configurable: true, value: HIDDEN });
            document.dispatchEvent(new Event('visibilitychange'));";
        view.0.run(&script.replace("HIDDEN", &is_hidden.to_string())).await;
    };
    turn(true).await;
    view.step(&stats).await; // a timer that was already due
    assert_eq!(view.value("[asked, polls.length]").await, json!([asked, 0]), "no request, and no timer");
    turn(false).await;
    view.0.becomes("[asked, polls.length]", json!([asked.as_u64().expect("a number") + 1, 1])).await;
}
