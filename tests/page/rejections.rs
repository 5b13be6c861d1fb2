//! What a script sees of rejections and subprotocols, in Chromium's own WebSocket.

use serde_json::{Value, json};

use super::Browser;
use crate::common::{Node, TokenKey};

/// Connects to a URL with a list of subprotocols. Results in `[protocol]` for a connection that stays
/// open, else in `[protocol, code, reason, wasClean]`; the protocol is null without `open`.
const ATTEMPT: &str = r#"([url, protocols]) => new Promise((resolve) => {
    const socket = new WebSocket(url, protocols);
    let protocol = null;
    socket.onopen = () => {
        protocol = socket.protocol;
        socket.send('{"type":"ping"}'); // answered unless the server has closed
    };
    socket.onmessage = () => resolve([protocol]);
    socket.onclose = ({ code, reason, wasClean }) => resolve([protocol, code, reason, wasClean]);
})"#;

/// The results of attempts that this function body sends to `done`.
async fn results(browser: &Browser, script: &str) -> Vec<Value> {
    let script = format!("const done = arguments[0]; {script}");
    let results = browser.command("/execute/async", json!({ "script": script, "args": [] })).await;
    results.as_array().expect("a list").clone()
}

#[tokio::test]
async fn scripts_learn_why_they_are_rejected() {
    let key = TokenKey::new();
    let bearer = format!("bearer.{}", key.token("a", &["--channel", "news"]));
    let ended = format!("bearer.{}", key.token("a", &["--ttl", "0s"]));
    let node = Node::start(&["--jwt-key", &key.path()]).await;
    let browser = Browser::start().await;
    browser.open(&format!("http://{}/healthz", node.public)).await;
    let url = |path: &str| format!("ws://{}{path}", node.public);
    let json_mode = "fanfare.v1";
    let cases = [
        (json!([url("/ws/a?channel=news"), [json_mode, bearer]]), json!([json_mode])),
        (json!([url("/ws/a?channel=news"), [bearer]]), json!([bearer])),
        (json!([url("/ws/a"), [json_mode]]), json!([json_mode, 4401, "token required: as ?token=", true])),
        (json!([url("/ws/a?lastEventId="), []]), json!(["", 4401, "token required: as ?token=", true])),
        (json!([url("/ws/a"), [ended]]), json!([ended, 4401, "token invalid or expired", true])),
        (
            json!(["/ws/a?channel=no", [bearer, json_mode]]),
            json!([json_mode, 4403, "the token does not", true]),
        ),
        (
            json!(["/ws/a?chanel=news", [json_mode]]),
            json!([json_mode, 4400, "unknown query parameter", true]),
        ),
        (
            json!(["/ws/a?channel=a%20b", [json_mode, bearer]]),
            json!([json_mode, 4400, "channel must be", true]),
        ),
        (json!([url("/ws/%0A"), [json_mode]]), json!([json_mode, 4400, "the user id in", true])),
        (
            json!(["/ws/a", ["graphql-ws", "mqtt"]]),
            json!(["graphql-ws", 4400, "subprotocol not supported", true]),
        ),
        // A script that is not written for fanfare learns nothing.
        (json!([url("/ws/a"), []]), json!([null, 1006, "", false])),
    ];
    let (asked, expected): (Vec<_>, Vec<_>) = cases.into_iter().unzip();
    let script = format!("Promise.all({}.map({ATTEMPT})).then(done);", json!(asked));
    let mut results = results(&browser, &script).await;
    for (result, expected) in results.iter_mut().zip(&expected) {
        // The start of the reason is enough.
        if let (Some(reason), Some(start)) = (result[2].as_str(), expected[2].as_str())
            && reason.starts_with(start)
        {
            result[2] = json!(start);
        }
    }
    assert_eq!(results, expected);
}

/// A sandboxed frame has the origin `null`.
#[tokio::test]
async fn null_origin_is_rejected_or_allowed() {
    let key = TokenKey::new();
    let path = key.path();
    let flags = ["--jwt-key", &path];
    let refusing = Node::start(&flags).await;
    let allowing = Node::start(&[&flags[..], &["--allow-origin", "null"]].concat()).await;
    let browser = Browser::start().await;
    browser.open(&format!("http://{}/healthz", refusing.public)).await;
    for (node, code, start) in [(&refusing, 4403, "origin not allowed"), (&allowing, 4401, "token required")]
    {
        let attempt = json!([format!("ws://{}/ws/a", node.public), ["fanfare.v1"]]);
        let inside = format!("({ATTEMPT})({attempt}).then((result) => parent.postMessage(result, '*'));");
        let script = format!(
            "addEventListener('message', ({{ data }}) => done(data), {{ once: true }});
            const frame = Object.assign(document.createElement('iframe'), {{
                sandbox: 'allow-scripts', srcdoc: '<script>' + {} + '</' + 'script>',
            }});
            document.body.append(frame);",
            json!(inside)
        );
        let result = results(&browser, &script).await;
        assert_eq!((&result[0], &result[1]), (&json!("fanfare.v1"), &json!(code)), "{result:?}");
        assert!(result[2].as_str().is_some_and(|reason| reason.starts_with(start)), "{result:?}");
    }
}
