//! The page and the browser client in headless Chromium, driven by chromedriver over WebDriver
//! (https://www.w3.org/TR/webdriver2/).

#[path = "../common/mod.rs"]
mod common;

mod channels;
mod client;
mod demo;
mod live_view;
mod rejections;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use common::process::{Directory, Process};
use common::redis::free_port;
use common::{Node, Redis, http, until};

/// A browser with one window. Dropping it ends it.
struct Browser {
    session: String,
    address: SocketAddr,
    _driver: Process,
    _profile: Directory,
}

impl Browser {
    /// Starts chromedriver and with it Chromium, with a new and empty profile.
    async fn start() -> Browser {
        let port = free_port(); // its own choice may be free on only one of IPv4 and IPv6
        let driver =
            Process::start("chromedriver", Command::new("chromedriver").arg(format!("--port={port}")));
        let ready = |line: &str| line.contains("started successfully").then_some(());
        driver.line("a chromedriver that is ready", ready).await.unwrap_or_else(|ended| panic!("{ended}"));
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let profile = Directory::new();
        let flags = [
            "--headless=new",
            "--no-sandbox", // containers have no sandbox
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--window-size=1280,900",
            &format!("--user-data-dir={}", profile.path().display()),
        ];
        let options = json!({ "args": flags });
        let wanted = json!({ "capabilities": { "alwaysMatch": {
            "browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": { "browser": "ALL" },
        } } });
        let answer = http::request(address, "POST", "/session", &[], wanted.to_string().as_bytes()).await;
        assert_eq!(answer.status, 200, "no browser: {}", answer.body);
        let id = answer.json()["value"]["sessionId"].as_str().expect("a session has an id").to_owned();
        Browser { session: format!("/session/{id}"), address, _driver: driver, _profile: profile }
    }

    async fn command(&self, path: &str, body: Value) -> Value {
        let path = format!("{}{path}", self.session);
        let answer = http::request(self.address, "POST", &path, &[], body.to_string().as_bytes()).await;
        assert_eq!(answer.status, 200, "{path} {body}: {}", answer.body);
        answer.json()["value"].take()
    }

    async fn open(&self, url: &str) {
        self.command("/url", json!({ "url": url })).await;
    }

    /// The return value of this function body.
    async fn run(&self, script: &str) -> Value {
        self.command("/execute/sync", json!({ "script": script, "args": [] })).await
    }

    /// Waits until this expression has this value.
    async fn becomes(&self, script: &str, wanted: Value) {
        until(&format!("{script} to be {wanted}"), || async {
            (self.run(&format!("return {script}")).await == wanted).then_some(())
        })
        .await;
    }

    /// The return value of this async function body, which can use the exports of fanfare.js.
    async fn run_client(&self, script: &str) -> Value {
        let script = format!(
            "const done = arguments[0]; import('/fanfare.js').then(async ({{ Fanfare }}) => {{ {script}\n }})
                .then(done, (error) => done(String(error.stack)));"
        );
        self.command("/execute/async", json!({ "script": script, "args": [] })).await
    }

    async fn element(&self, selector: &str) -> String {
        let found = self.command("/element", json!({ "using": "css selector", "value": selector })).await;
        let id = found.as_object().and_then(|reference| reference.values().next()).and_then(Value::as_str);
        format!("/element/{}", id.expect("a reference to an element"))
    }

    /// Clicks like a mouse: fails if something covers the element.
    async fn click(&self, selector: &str) {
        let element = self.element(selector).await;
        self.command(&format!("{element}/click"), json!({})).await;
    }

    /// Types like a keyboard.
    async fn type_into(&self, selector: &str, text: &str) {
        let element = self.element(selector).await;
        self.command(&format!("{element}/value"), json!({ "text": text })).await;
    }

    /// Errors that the browser reports: script errors, blocked resources.
    async fn complaints(&self) -> Vec<String> {
        let log = self.command("/se/log", json!({ "type": "browser" })).await;
        let lines = log.as_array().expect("a list").iter();
        lines.filter_map(|line| line["message"].as_str()).map(str::to_owned).collect()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // Killing chromedriver would leave Chromium behind. Chromium has exited when this is
        // answered.
        let Ok(mut socket) = TcpStream::connect(self.address) else { return };
        let _ = socket.set_read_timeout(Some(Duration::from_secs(10)));
        let request = format!("DELETE {} HTTP/1.1\r\nHost: {}\r\n\r\n", self.session, self.address);
        let _ = socket.write_all(request.as_bytes());
        let _ = socket.read(&mut [0; 64]);
    }
}

/// The page with its two panes.
struct Page(Browser);

/// An event as a pane shows it.
#[derive(Debug, PartialEq)]
struct Row {
    id: Option<u64>,
    sender: String,
    text: String,
    marks: Vec<String>,
}

const ENTER: &str = "\u{E007}"; // WebDriver section 17.4.2, keyboard actions

impl Page {
    /// Opens the page of one node with the right pane on another, and waits until both are
    /// connected.
    async fn open(left: &Node, right: &Node, channel: &str) -> Page {
        let page = Page(Browser::start().await);
        page.0.open(&format!("http://{}/?right={}&channel={channel}", left.public, right.public)).await;
        page.reaches("left", "live").await;
        page.reaches("right", "live").await;
        page
    }

    async fn state(&self, pane: &str) -> String {
        let state = self.0.run(&format!("return document.querySelector('#{pane}')?.dataset.state")).await;
        state.as_str().unwrap_or_default().to_owned()
    }

    async fn reaches(&self, pane: &str, state: &str) {
        until(&format!("the {pane} pane to be {state}"), || async {
            (self.state(pane).await == state).then_some(())
        })
        .await;
    }

    /// Writes a message like a user.
    async fn say(&self, pane: &str, text: &str) {
        self.0.type_into(&format!("#{pane} [name=text]"), &format!("{text}{ENTER}")).await;
    }

    async fn rows(&self, pane: &str) -> Vec<Row> {
        let script = format!(
            "return [...document.querySelectorAll('#{pane} .event')].map((row) => {{
                const text = (part) => row.querySelector(part).textContent;
                const marks = [...row.querySelectorAll('.chip')].map((chip) => chip.textContent);
                return [text('.id'), text('.sender'), text('.body'), marks];
            }});"
        );
        let rows = self.0.run(&script).await;
        let text = |value: &Value| value.as_str().expect("a text").to_owned();
        let row = |row: &Value| Row {
            id: text(&row[0]).parse().ok(),
            sender: text(&row[1]),
            text: text(&row[2]),
            marks: row[3].as_array().expect("a list").iter().map(text).collect(),
        };
        rows.as_array().expect("a list").iter().map(row).collect()
    }

    /// Waits until a pane shows this text as its last event, and returns all its rows.
    async fn shows(&self, pane: &str, text: &str) -> Vec<Row> {
        until(&format!("{text:?} in the {pane} pane"), || async {
            let rows = self.rows(pane).await;
            rows.last().is_some_and(|row| row.text == text).then_some(rows)
        })
        .await
    }

    /// Waits for a notice that starts like this, and returns it.
    async fn notice(&self, pane: &str, start: &str) -> String {
        let script =
            format!("return [...document.querySelectorAll('#{pane} .notice')].map((row) => row.textContent)");
        until(&format!("a notice {start:?} in the {pane} pane"), || async {
            let notices = self.0.run(&script).await;
            let mut texts = notices.as_array().expect("a list").iter().filter_map(Value::as_str);
            texts.find(|text| text.starts_with(start)).map(str::to_owned)
        })
        .await
    }

    /// Fails if the browser reports errors other than failed connections.
    async fn expect_no_complaints(&self) {
        let mut complaints = self.0.complaints().await;
        complaints.retain(|line| !line.contains("WebSocket connection to"));
        assert_eq!(complaints, [""; 0]);
    }
}

/// Asserts that two panes show the same events in the same order, whatever their marks.
fn expect_equal(left: &[Row], right: &[Row]) {
    let plain = |rows: &[Row]| -> Vec<_> {
        rows.iter().map(|row| (row.id, row.sender.clone(), row.text.clone())).collect()
    };
    assert_eq!(plain(left), plain(right));
    let ids: Vec<_> = left.iter().map(|row| row.id.expect("an id")).collect();
    assert!(ids.windows(2).all(|pair| pair[1] == pair[0] + 1), "none missing, none twice: {ids:?}");
}

#[tokio::test]
async fn users_on_two_nodes_chat_and_recover() {
    let redis = Redis::start(&[]).await;
    let (a, b) = tokio::join!(Node::on(&redis, &[]), Node::on(&redis, &[]));
    let page = Page::open(&a, &b, "cut").await;
    page.say("left", "hi from <b>node A</b> & co").await;
    page.shows("right", "hi from <b>node A</b> & co").await;
    page.say("right", "hi from node B").await;
    page.shows("left", "hi from node B").await;
    let before = page.shows("right", "hi from node B").await;
    assert_eq!(before.iter().map(|row| row.sender.as_str()).collect::<Vec<_>>(), ["alice", "bob"]);
    let position = before[1].id.expect("an id");

    page.0.click("#left .cut").await;
    page.reaches("left", "cut").await;
    page.say("right", "are you there?").await;
    page.shows("right", "are you there?").await;
    b.publish_numbers("cut", 0..100).await;
    page.say("right", "still not?").await;
    page.shows("right", "still not?").await;
    assert_eq!(page.rows("left").await, before, "a cut pane hears nothing");

    page.reaches("left", "live").await; // by itself
    page.say("left", "here again").await;
    let right = page.shows("right", "here again").await;
    let left = page.shows("left", "here again").await;
    expect_equal(&left, &right);
    let recovered: Vec<_> = left.iter().map(|row| row.marks == ["recovered"]).collect();
    assert_eq!(
        recovered,
        [&[false; 2][..], &[true; 102], &[false]].concat(),
        "what was said while it was cut"
    );
    assert_eq!(
        page.notice("left", "Resumed").await,
        format!("Resumed after {position}: 102 events recovered")
    );

    // Again, while events continue to arrive: no row shows the transition from replayed to live
    // events.
    page.0.click("#left .cut").await;
    tokio::join!(page.0.click("#left .cut"), b.publish_numbers("cut", 100..200));
    page.reaches("left", "live").await;
    page.say("left", "and again").await;
    let right = page.shows("right", "and again").await;
    let left = page.shows("left", "and again").await;
    expect_equal(&left, &right);
    assert_eq!(left.len(), 2 + 102 + 1 + 100 + 1);
    assert!(right.iter().all(|row| row.marks.is_empty()), "the other pane never lost anything");
    page.expect_no_complaints().await;
}

#[tokio::test]
async fn private_message_is_shown_to_its_user() {
    let redis = Redis::start(&[]).await;
    let (a, b) = tokio::join!(Node::on(&redis, &[]), Node::on(&redis, &[]));
    let page = Page::open(&a, &b, "private").await;
    page.0.type_into("#left [name=to]", "bob").await;
    page.say("left", "psst").await;
    let right = page.shows("right", "psst").await;
    assert_eq!((right[0].sender.as_str(), &right[0].marks[..]), ("alice", &["only you".to_owned()][..]));
    let left = page.shows("left", "psst").await;
    assert_eq!((left[0].id, &left[0].marks[..]), (right[0].id, &["only bob".to_owned()][..]));

    b.publish_to("private", "alice", &json!({"text": "from the backend"})).await;
    let left = page.shows("left", "from the backend").await;
    assert_eq!((left[1].sender.as_str(), &left[1].marks[..]), ("backend", &["only you".to_owned()][..]));
    page.say("right", "aloud").await;
    let right = page.shows("right", "aloud").await;
    assert_eq!(right.len(), 2, "what is for alice alone never came here: {right:?}");

    // Another user, in a pane that was alice's, sees no private events.
    page.0.run("document.querySelector('#left .user').value = ''").await;
    page.0.type_into("#left .user", &format!("carol / 50%\u{e4}{ENTER}")).await;
    page.reaches("left", "live").await;
    page.say("left", "psst again").await; // still only to bob
    let right = page.shows("right", "psst again").await;
    assert_eq!(right[2].sender, "carol / 50%\u{e4}");
    page.expect_no_complaints().await;
}

#[tokio::test]
async fn pane_recovers_from_a_node_restart() {
    let redis = Redis::start(&[]).await;
    let (a, b) = tokio::join!(Node::on(&redis, &[]), Node::on(&redis, &[]));
    let page = Page::open(&a, &b, "kill").await;
    page.say("right", "before").await;
    page.shows("left", "before").await;
    let before = page.shows("right", "before").await;

    b.kill();
    page.notice("right", "Connection lost (1006)").await;
    a.publish_numbers("kill", 0..50).await;
    page.say("left", "while it was away").await;
    page.shows("left", "while it was away").await;
    assert_eq!(page.rows("right").await, before);

    let address = b.public.to_string();
    let b = Node::on(&redis, &["--listen", &address]).await; // one address more, where the old one was
    page.reaches("right", "live").await;
    page.say("right", "back").await;
    let left = page.shows("left", "back").await;
    let right = page.shows("right", "back").await;
    expect_equal(&left, &right);
    let recovered: Vec<_> = right.iter().map(|row| row.marks == ["recovered"]).collect();
    assert_eq!(recovered, [&[false][..], &[true; 51], &[false]].concat());
    let notice = format!("Resumed after {}: 51 events recovered", before[0].id.expect("an id"));
    assert_eq!(page.notice("right", "Resumed").await, notice);
    assert!(page.state("left").await == "live" && left.iter().all(|row| row.marks.is_empty()));
    page.expect_no_complaints().await;
    drop(b);
}

#[tokio::test]
async fn lost_history_is_shown() {
    let redis = Redis::start(&[]).await;
    let (a, b) = tokio::join!(Node::on(&redis, &[]), Node::on(&redis, &[]));
    let page = Page::open(&a, &b, "wiped").await;
    page.say("left", "soon lost").await;
    page.shows("right", "soon lost").await;
    page.0.click("#left .cut").await;
    page.reaches("left", "cut").await;
    redis.client().await.call(&["FLUSHALL"]).await;
    page.notice("right", "Reset: events may be missing").await;
    // Until its own probe, the left node considers its state current, and would send the reset
    // after a welcome.
    let known = || async { (a.metric("fanfare_bus_resets_total").await >= 1.0).then_some(()) };
    until("the left node to know", known).await;
    page.0.click("#left .cut").await; // now reads "Reconnect now"
    page.notice("left", "Not recovered: events may be missing").await;
    page.say("left", "on we go").await;
    page.shows("right", "on we go").await;
    let left = page.shows("left", "on we go").await;
    assert!(left.iter().all(|row| row.marks.is_empty()), "{left:?}");
    page.expect_no_complaints().await;
}

/// A page in examples/, served from another origin as its README says.
async fn open_example(node: &Node, page: &str) -> (Browser, Process) {
    let port = free_port().to_string();
    let mut command = Command::new("python3");
    command.args(["-u", "-m", "http.server", &port, "--bind", "127.0.0.1", "--directory", "examples/page"]);
    let server = Process::start("http.server", command.current_dir(env!("CARGO_MANIFEST_DIR")));
    let ready = |line: &str| line.contains("Serving HTTP on").then_some(());
    server.line("a web server that is ready", ready).await.unwrap_or_else(|ended| panic!("{ended}"));
    let browser = Browser::start().await;
    browser.open(&format!("http://127.0.0.1:{port}/{page}?node={}", node.public)).await;
    browser.becomes("document.querySelector('#state').value", json!("live")).await;
    (browser, server)
}

async fn expect_no_complaints_of_example(browser: &Browser) {
    let complaints = browser.complaints().await;
    let complaints: Vec<_> = complaints.iter().filter(|line| !line.contains("favicon.ico")).collect();
    assert!(complaints.is_empty(), "{complaints:?}");
}

#[tokio::test]
async fn example_page_shows_events() {
    let node = Node::start(&[]).await;
    let (browser, _server) = open_example(&node, "").await;
    let id = node.publish("orders", &json!({ "order": "<b>tea</b>" })).await;
    let events = "[...document.querySelectorAll('#events li')].map((row) => row.textContent)";
    let first = format!(r#"{{"order":"<b>tea</b>","id":{id}}}"#);
    browser.becomes(events, json!([first])).await;
    browser.type_into("[name=text]", &format!("hello{ENTER}")).await;
    browser.becomes("document.querySelectorAll('#events li').length", json!(2)).await;
    let events = browser.run(&format!("return {events}")).await;
    assert!(events[1].as_str().is_some_and(|row| row.contains("\"text\":\"hello\"")), "{events}");
    expect_no_complaints_of_example(&browser).await;
}

#[tokio::test]
async fn example_page_has_rooms() {
    let node = Node::start(&[]).await;
    let (browser, _server) = open_example(&node, "rooms.html").await;
    node.publish("room.1", &json!({ "sender": "bob", "text": "<b>before</b>" })).await;
    for room in ["room.1", "room.2"] {
        browser.type_into("[name=room]", &format!("{room}{ENTER}")).await;
    }
    let rooms = "[...document.querySelectorAll('section')].map((room) =>
        [room, ...room.querySelectorAll('li')].map((row) => row.querySelector('h2')?.textContent ?? row.textContent.replace(/visitor-[a-z0-9]+/, 'me')))";
    browser.becomes(rooms, json!([["room.1", "bob: <b>before</b>"], ["room.2"]])).await;
    browser.type_into("section:last-child [name=text]", &format!("hello{ENTER}")).await;
    browser.becomes(rooms, json!([["room.1", "bob: <b>before</b>"], ["room.2", "me: hello"]])).await;
    browser.click("section:first-child [type=button]").await;
    node.publish("room.1", &json!({ "sender": "bob", "text": "to nobody" })).await;
    node.publish("room.2", &json!({ "sender": "bob", "text": "bye" })).await;
    browser.becomes(rooms, json!([["room.2", "me: hello", "bob: bye"]])).await;
    expect_no_complaints_of_example(&browser).await;
}
