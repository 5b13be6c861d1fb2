//! The page as a newcomer meets it: tokens, links, the curl command, the badge, screen readers.

use std::process::Command;

use serde_json::{Value, json};

use crate::common::redis::free_port;
use crate::common::{Node, Redis, TokenKey};
use crate::{Browser, ENTER, Page};

const CONTROL: &str = "\u{E009}"; // WebDriver section 17.4.2

impl Browser {
    /// A command of the DevTools protocol.
    async fn devtools(&self, command: &str, params: Value) -> Value {
        self.command("/goog/cdp/execute", json!({ "cmd": command, "params": params })).await
    }

    async fn resize(&self, width: u32, height: u32) {
        let size = json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": false });
        self.devtools("Emulation.setDeviceMetricsOverride", size).await;
    }

    /// What a screen reader reads of an element.
    pub async fn read_aloud(&self, selector: &str) -> String {
        let root = self.devtools("DOM.getDocument", json!({})).await["root"]["nodeId"].take();
        let query = json!({ "nodeId": root, "selector": selector });
        let node = self.devtools("DOM.querySelector", query).await["nodeId"].take();
        let tree = self.devtools("Accessibility.queryAXTree", json!({ "nodeId": node })).await;
        let nodes = tree["nodes"].as_array().expect("a list").iter();
        let texts = nodes.filter(|node| node["ignored"] == false && node["role"]["value"] == "StaticText");
        texts.filter_map(|node| node["name"]["value"].as_str()).collect()
    }
}

impl Page {
    pub async fn load(node: &Node, query: &str) -> Page {
        let page = Page(Browser::start().await);
        page.0.open(&format!("http://{}/{query}", node.public)).await;
        page
    }

    /// Replaces the content of a field, like a user.
    pub async fn set(&self, selector: &str, text: &str) {
        self.0.type_into(selector, &format!("{CONTROL}a{CONTROL}{text}{ENTER}")).await;
    }

    /// The rows of a pane that are not events, and the texts of those that are.
    async fn texts(&self, pane: &str) -> Vec<String> {
        let rows = format!("document.querySelectorAll('#{pane} .notice, #{pane} .body')");
        let texts = self.0.run(&format!("return [...{rows}].map((row) => row.textContent)")).await;
        texts.as_array().expect("a list").iter().filter_map(Value::as_str).map(str::to_owned).collect()
    }
}

#[tokio::test]
async fn page_asks_for_a_token() {
    let key = TokenKey::new();
    let node = Node::start(&["--jwt-key", &key.path()]).await;
    let page = Page::load(&node, "?rightUser=bob's;id").await;

    let notice = page.notice("left", "This server needs a token").await;
    assert!(notice.contains("fanfare token --user alice --jwt-key FILE"), "{notice}");
    let notice = page.notice("right", "This server needs a token").await;
    assert!(notice.contains(r"--user 'bob'\''s;id' --jwt-key"), "quoted for the shell: {notice}");
    assert_eq!(page.state("left").await, "closed", "no attempts without a token");
    page.0.becomes("document.querySelector('#left .state').textContent", json!("not connected")).await;

    let alice = key.token("alice", &[]);
    page.set("#left .token", &alice).await;
    page.reaches("left", "live").await;
    page.say("left", "let in").await;
    page.shows("left", "let in").await;
    page.set("#right .token", &alice).await;
    page.notice("right", "This server does not accept this token").await;
    page.set("#right .token", &key.token("bob's;id", &[])).await;
    page.reaches("right", "live").await;

    let url = page.0.run("return location.href").await;
    assert_eq!(url, json!(format!("http://{}/?rightUser=bob%27s%3Bid", node.public)), "no tokens");
    page.expect_no_complaints().await;
}

#[tokio::test]
async fn token_goes_only_to_the_node_it_is_for() {
    let key = TokenKey::new();
    let path = key.path();
    let flags = ["--jwt-key", &path];
    let (this, other) = tokio::join!(Node::start(&flags), Node::start(&flags));
    let page = Page::load(&this, &format!("?right={}%40{}", this.public, other.public)).await;
    let other = other.public.to_string();

    let warning = format!("It will be sent to {other}, which is not this node.");
    let notice = page.notice("right", &format!("{other} needs a token")).await;
    assert!(notice.contains(&warning), "{notice}");
    let notice = page.notice("left", "This server needs a token").await;
    assert!(!notice.contains("will be sent"), "{notice}");

    page.set("#left .token", &key.token("alice", &[])).await;
    page.reaches("left", "live").await;
    page.set("#left .node", &other).await;
    page.notice("left", &format!("{other} needs a token")).await; // it accepts this key
    page.0.becomes("document.querySelector('#left .token').value", json!("")).await;

    // A reconnect may come while a user still types.
    page.set("#left .token", &key.token("alice", &[])).await;
    page.reaches("left", "live").await;
    page.0.type_into("#left .node", "1").await;
    page.0.becomes("document.querySelector('#left .token').value", json!("")).await;
    page.expect_no_complaints().await;
}

#[tokio::test]
async fn page_says_why_it_is_not_connected() {
    let node = Node::start(&[]).await;
    let closed = format!("127.0.0.1:{}", free_port());
    let page = Page::load(&node, &format!("?right={closed}")).await;
    page.reaches("left", "live").await;
    page.notice("right", &format!("Not connected to {closed} (1006): nothing answers there")).await;
    page.reaches("right", "waiting").await;
    page.set("#right .node", &node.public.to_string()).await;
    page.reaches("right", "live").await;
    page.expect_no_complaints().await;
}

#[tokio::test]
async fn link_and_reload_keep_the_fields() {
    let redis = Redis::start(&[]).await;
    let (a, b) = tokio::join!(Node::on(&redis, &[]), Node::on(&redis, &[]));
    let page = Page::load(&a, "?token=secret&channel=first").await;
    page.reaches("right", "live").await;
    assert_eq!(page.0.run("return location.search").await, json!("?channel=first"), "a token is dropped");
    page.set("#channel", "second").await;
    page.set("#left .user", "carol & co").await;
    page.set("#right .user", "dave").await;
    page.set("#right .node", &b.public.to_string()).await;
    page.0.command("/refresh", json!({})).await;
    page.reaches("left", "live").await;
    page.reaches("right", "live").await;
    let fields = "[...document.querySelectorAll('#channel, .user, .node')].map((field) => field.value)";
    let (a, b) = (a.public.to_string(), b.public.to_string());
    page.0.becomes(fields, json!(["second", "carol & co", a, "dave", b])).await;
    page.say("left", "still here").await;
    let row = page.shows("right", "still here").await;
    assert_eq!(row[0].sender, "carol & co");
    page.set("#left .user", "alice").await;
    page.0.becomes("location.search.includes('leftUser')", json!(false)).await; // as without a link
    page.expect_no_complaints().await;
}

#[tokio::test]
async fn copied_curl_line_publishes() {
    let node = Node::start(&[]).await;
    let page = Page::load(&node, "?channel=old").await;
    page.reaches("left", "live").await;
    page.set("#channel", "room.1").await;
    page.reaches("left", "live").await;
    page.0.click("#copy").await;
    page.0.becomes("document.querySelector('#copied').textContent", json!("Copied")).await;
    page.0.type_into("#left [name=text]", &format!("{CONTROL}v")).await;
    let line = page.0.run("return document.querySelector('#left [name=text]').value").await;
    let line = line.as_str().expect("a text");
    let default = "curl 'http://127.0.0.1:9080/publish?channel=room.1' -d '{\"text\":\"hello\"}'";
    assert_eq!(line, default);
    let line = line.replace("127.0.0.1:9080", &node.admin.to_string()); // not the default, in tests
    let output = Command::new("sh").args(["-c", &line]).output().expect("sh is there");
    assert!(output.status.success(), "{output:?}");
    let rows = page.shows("right", "hello").await;
    assert_eq!(rows[0].sender, "backend");
    page.expect_no_complaints().await;
}

#[tokio::test]
async fn link_puts_no_shell_code_into_curl() {
    let node = Node::start(&[]).await;
    let page = Page::load(&node, "?channel=a';id%20'").await;
    page.0.becomes("document.querySelector('#copy').disabled", json!(true)).await;
    page.0.becomes("document.querySelector('#curl').textContent", json!("")).await;
}

#[tokio::test]
async fn badge_shows_readiness() {
    let node = Node::start(&["--drain-delay", "30m"]).await;
    let page = Page::load(&node, "").await;
    let badge = "document.querySelector('#ready').textContent";
    page.0.becomes(badge, json!("ready")).await;
    let asks = |hidden: bool| {
        format!(
            "const real = window.fetch;
            let asked = 0;
            window.fetch = (...request) => {{ asked += 1; return real(...request); }};
            Object.defineProperty(document, 'hidden', {{ value: {hidden}, configurable: true }});
            document.dispatchEvent(new Event('visibilitychange'));
            window.fetch = real;
            return asked;"
        )
    };
    assert_eq!(page.0.run(&asks(true)).await, json!(0), "a hidden page asks nothing");
    assert_eq!(page.0.run(&asks(false)).await, json!(1));
    page.expect_no_complaints().await;
    node.signal("TERM");
    page.0.becomes(badge, json!("not ready")).await;
    node.kill();
    page.0.becomes(badge, json!("unreachable")).await;
}

#[tokio::test]
async fn change_of_user_is_marked() {
    let node = Node::start(&[]).await;
    let page = Page::load(&node, "").await;
    page.reaches("left", "live").await;
    page.say("left", "as alice").await;
    page.shows("left", "as alice").await;
    page.0.click("#left .cut").await;
    page.0.click("#left .cut").await; // now reads "Reconnect now"
    page.notice("left", "Resumed").await;
    page.set("#left .user", "carol").await;
    page.notice("left", "Connected as carol").await;
    page.say("left", "as carol").await;
    page.shows("left", "as carol").await;
    let texts = page.texts("left").await;
    assert_eq!(texts.len(), 6, "the same user connects twice without a divider: {texts:?}");
    assert_eq!(texts[..2], ["Connected as alice", "as alice"]);
    assert_eq!(texts[4..], ["Connected as carol", "as carol"]);
    page.expect_no_complaints().await;
}

#[tokio::test]
async fn screen_readers_skip_ids() {
    let node = Node::start(&[]).await;
    let page = Page::load(&node, "").await;
    page.reaches("left", "live").await;
    page.reaches("right", "live").await;
    page.say("left", "hi").await;
    let id = page.shows("left", "hi").await[0].id.expect("an id").to_string();
    page.0.click("#left .cut").await;
    page.0.click("#left .cut").await;
    let notice = page.notice("left", "Resumed").await;
    assert!(notice.contains(&id), "{notice}");
    let read = page.0.read_aloud("#left .events").await;
    assert!(read.contains("hi") && read.contains("Resumed: nothing was missed"), "{read}");
    assert!(!read.contains(&id), "{read}");
}

#[tokio::test]
async fn states_move_nothing_at_any_width() {
    let node = Node::start(&[]).await;
    let page = Page::load(&node, "").await;
    let layout =
        "const boxes = [...document.querySelectorAll('.top *, .pane > header *, .events, .pane form')];
        const fixed = boxes.filter((box) => !box.closest('.badge'));
        return fixed.map((box) => JSON.stringify(box.getBoundingClientRect())).join('\\n');";
    for width in [1280, 1024, 800, 360] {
        page.0.resize(width, 800).await;
        page.reaches("left", "live").await;
        page.0.becomes("document.querySelector('#ready').textContent", json!("ready")).await;
        let live = page.0.run(layout).await;
        let words = "document.querySelector('#left .state').textContent = 'not connected';
            document.querySelector('#left .countdown').textContent = ', retry in 30 s';
            document.querySelector('#ready').textContent = 'unreachable';";
        page.0.run(words).await; // the longest
        assert_eq!(page.0.run(layout).await, live, "at {width} pixels");
        let fits = "[...document.querySelectorAll('body, .pane, .pane > header, .badge')]
            .filter((box) => box.scrollWidth > box.clientWidth).map((box) => box.className)";
        assert_eq!(page.0.run(&format!("return {fits}")).await, json!([]), "wider than {width} pixels");
        let covered = "[...document.querySelectorAll('.pane')].filter((pane) => {
            const [badge, token] = ['.badge', '.token'].map((part) => pane.querySelector(part).getBoundingClientRect());
            return badge.left < token.right && badge.top < token.bottom && badge.bottom > token.top;
        }).length";
        assert_eq!(page.0.run(&format!("return {covered}")).await, json!(0), "covered at {width} pixels");
        page.0.command("/refresh", json!({})).await;
    }
    page.expect_no_complaints().await;
}
