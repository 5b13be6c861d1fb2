//! The browser client against fakes and real nodes.

use serde_json::{Value, json};

use crate::Browser;
use crate::common::cases::cases;
use crate::common::{Node, until};

const FAKES: &str = include_str!("client/fakes.js");
const CONNECTION: &str = include_str!("client/connection.js");
const MESSAGES: &str = include_str!("client/messages.js");

#[tokio::test]
async fn client_reacts_to_every_server_answer() {
    let node = Node::start(&[]).await;
    let browser = Browser::start().await;
    browser.open(&format!("http://{}/healthz", node.public)).await;
    for (tests, count) in [(CONNECTION, 13), (MESSAGES, 15)] {
        let result = browser.run_client(&format!("{FAKES}{tests}")).await;
        assert_eq!(result["failed"], json!([]), "{result}");
        assert_eq!(result["passed"], json!(count));
    }
}

#[tokio::test]
async fn browser_reads_every_accepted_event() {
    let node = Node::start(&[]).await;
    let browser = Browser::start().await;
    browser.open(&format!("http://{}/healthz", node.public)).await;
    let cases = cases().into_iter().filter(|case| case.error().is_none());
    let texts: Vec<String> = cases.map(|case| String::from_utf8(case.event()).expect("UTF-8")).collect();
    let script = "texts.filter((text) => { try { JSON.parse(text); } catch { return true; } })";
    assert_eq!(browser.run(&format!("const texts = {}; return {script};", json!(texts))).await, json!([]));
}

#[tokio::test]
async fn client_detects_a_silent_node() {
    let node = Node::start(&[]).await;
    let browser = Browser::start().await;
    browser.open(&format!("http://{}/healthz", node.public)).await;
    let start = "
        window.probes = 0;
        window.states = [];
        const send = WebSocket.prototype.send;
        WebSocket.prototype.send = function (text) { probes++; send.call(this, text); };
        window.fanfare = new Fanfare('/ws/alice', { pingInterval: 100, pongTimeout: 2000 });
        fanfare.on('state', ({ state, reason }) => states.push(reason ? `${state}: ${reason}` : state));";
    assert_eq!(browser.run_client(start).await, Value::Null);
    let becomes = async |script: &str| {
        until(script, || async {
            (browser.run(&format!("return {script}")).await == json!(true)).then_some(())
        })
        .await;
    };
    becomes("probes >= 2").await; // so the first ping was answered
    assert_eq!(
        browser.run("return states").await,
        json!(["connecting", "live"]),
        "the server answers, so it stays live"
    );
    node.signal("STOP");
    becomes("states.includes('waiting: no answer to a ping')").await;
    node.signal("CONT");
    becomes("fanfare.state === 'live'").await;
    let sent = "return await fanfare.send('hello again') > 0;";
    assert_eq!(browser.run_client(&format!("const fanfare = window.fanfare; {sent}")).await, json!(true));
}
