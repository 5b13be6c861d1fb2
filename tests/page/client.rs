//! The browser client against fakes and real nodes.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::Browser;
use crate::common::cases::cases;
use crate::common::process::{Directory, Process, installed};
use crate::common::{Node, Redis, TokenKey, free_port};

const FAKES: &str = include_str!("client/fakes.js");
const CONNECTION: &str = include_str!("client/connection.js");
const MESSAGES: &str = include_str!("client/messages.js");
const SUBSCRIPTIONS: &str = include_str!("client/subscriptions.js");

#[tokio::test]
async fn client_reacts_to_every_server_answer() {
    let node = Node::start(&[]).await;
    let browser = Browser::start().await;
    browser.open(&format!("http://{}/healthz", node.public)).await;
    for (tests, count) in [(CONNECTION, 14), (MESSAGES, 15), (SUBSCRIPTIONS, 20)] {
        let result = browser.run_client(&format!("{FAKES}{tests}")).await;
        assert_eq!(result["failed"], json!([]), "{result}");
        assert_eq!(result["passed"], json!(count));
    }
}

#[tokio::test]
async fn example_of_the_docs_runs() {
    let node = Node::start(&[]).await;
    let browser = Browser::start().await;
    browser.open(&format!("http://{}/healthz", node.public)).await;
    let block = include_str!("../../docs/client.md").split("```").nth(1).expect("an example");
    let (import, example) = block.trim_start_matches("js\n").split_once('\n').expect("lines");
    assert!(import.contains("/fanfare.js"), "run_client imports it instead: {import}");
    let example = example.replace("127.0.0.1:8080", &node.public.to_string());
    let script =
        format!("const show = () => {{}}, reload = show, badge = show; {example} return [id, chat.state];");
    let result = browser.run_client(&script).await;
    assert!(result[0].as_u64().is_some_and(|id| id > 0) && result[1] == json!("closed"), "{result}");
}

#[tokio::test]
async fn chat_of_the_docs_has_rooms() {
    let node = Node::start(&[]).await;
    let browser = Browser::start().await;
    browser.open(&format!("http://{}/healthz", node.public)).await;
    let docs = include_str!("../../docs/client.md");
    let block = docs.split("```js\n").find(|block| block.contains("subscribe(")).expect("an example");
    let (import, rest) = block.split_once('\n').expect("lines");
    assert!(import.contains("/fanfare.js"), "run_client imports it instead: {import}");
    let example =
        rest.split("```").next().expect("an end").replace("127.0.0.1:8080", &node.public.to_string());
    let script = format!(
        "const shown = [], reload = () => {{}};
        const show = (...message) => shown.push(message);
        {example}
        const later = await rooms.get('room.2').send('bye');
        while (shown.length < 2) await new Promise((resolve) => setTimeout(resolve, 10));
        const stored = Number(localStorage.getItem('room.2'));
        const result = [shown, [...rooms.keys()], id < later, stored === 0 || stored >= id - 1];
        chat.close();
        return result;"
    );
    let expected = json!([[["room.2", "alice", "hi"], ["room.2", "alice", "bye"]], ["room.2"], true, true]);
    assert_eq!(browser.run_client(&script).await, expected);
}

/// Subscriptions of two clients on two nodes: live, history, resumed after a restart, refused.
#[tokio::test]
async fn client_follows_rooms_across_nodes() {
    let redis = Redis::start(&[]).await;
    let flags = ["--max-subscriptions", "100"];
    let (a, b) = tokio::join!(Node::on(&redis, &flags), Node::on(&redis, &flags));
    let browser = Browser::start().await;
    browser.open(&format!("http://{}/healthz", a.public)).await;
    let start = format!(
        "window.client = new Fanfare('ws://{}/ws/alice', {{ channel: null, gapDelay: 0 }});
        window.rooms = Array.from({{ length: 101 }}, (_, n) => {{
            const room = client.subscribe(`room.${{n}}`, {{ history: 10 }});
            const said = [];
            for (const name of ['message', 'recovered', 'gap', 'error']) room.on(name, (event, info) =>
                said.push([name, event.n ?? event.code, info?.recovered].filter((value) => value !== undefined)));
            return {{ room, said }};
        }});
        client.on('message', () => rooms.push('an event of no room'));",
        b.public
    );
    for n in 0..3 {
        a.publish("room.7", &json!({ "n": n })).await;
    }
    assert_eq!(browser.run_client(&start).await, Value::Null);
    let states = "rooms.map(({ room }) => room.state).filter((state) => state !== 'live').join()";
    browser.becomes(states, json!("closed")).await;
    let refused = "rooms.filter(({ room }) => room.state === 'closed').map(({ said }) => said)";
    browser.becomes(refused, json!([[["error", "too_many"]]])).await;
    let said = "rooms[7].said";
    let recovered = |n: u64| json!(["message", n, true]);
    browser.becomes(said, json!([recovered(0), recovered(1), recovered(2)])).await;
    a.publish("room.7", &json!({ "n": 3 })).await;
    let live = json!(["message", 3, false]);
    browser.becomes(said, json!([recovered(0), recovered(1), recovered(2), live])).await;

    b.kill();
    browser.becomes("client.state", json!("waiting")).await;
    for n in 4..6 {
        a.publish("room.7", &json!({ "n": n })).await;
    }
    let address = b.public.to_string();
    let _b = Node::on(&redis, &[&flags[..], &["--listen", &address]].concat()).await;
    browser.becomes(states, json!("closed")).await;
    let resumed =
        [recovered(0), recovered(1), recovered(2), live, json!(["recovered"]), recovered(4), recovered(5)];
    browser.becomes(said, json!(resumed)).await;
    let others = "rooms.filter(({ room, said }, n) => n !== 7 && room.state === 'live' && said.join() !== 'recovered').length";
    browser.becomes(others, json!(0)).await;
    browser.becomes("rooms.length", json!(101)).await;
}

#[tokio::test]
async fn token_is_replaced_on_the_connection() {
    let key = TokenKey::new();
    let node = Node::start(&["--jwt-key", &key.path()]).await;
    let browser = Browser::start().await;
    browser.open(&format!("http://{}/healthz", node.public)).await;
    let token = |flags: &[&str]| key.token("a", flags);
    let tokens = json!({
        "first": token(&["--channel", "news", "--channel", "old", "--ttl", "12s"]),
        "second": token(&["--channel", "news", "--channel", "new"]),
        "bob": key.token("bob", &[]),
    });
    // Less than 60 s are left, so the function is called again soon.
    let start = format!(
        "const tokens = {tokens};
        let calls = 0;
        window.log = [];
        window.client = new Fanfare('/ws/a', {{ channel: 'news', token: () => calls++ ? tokens.second : tokens.first }});
        client.on('state', ({{ state }}) => log.push(state));
        client.on('error', ({{ code }}) => log.push(code));
        window.old = client.subscribe('old');
        old.on('state', ({{ state, code }}) => log.push(`old ${{code ?? state}}`));
        old.on('error', () => {{}});
        window.bob = () => client.setToken(tokens.bob);"
    );
    assert_eq!(browser.run_client(&start).await, Value::Null);
    let mut log = vec!["connecting", "live", "old live", "old forbidden"];
    browser.becomes("log", json!(log)).await;
    let new =
        "window.fresh = client.subscribe('new'); fresh.on('state', ({ state }) => log.push(`new ${state}`));";
    browser.run(new).await;
    log.push("new live");
    browser.becomes("log", json!(log)).await;
    browser.run("bob()").await;
    log.push("unauthorized");
    browser.becomes("log", json!(log)).await;
    let sent = "const fanfare = window.client; return await fanfare.send('still here') > 0;";
    assert_eq!(browser.run_client(sent).await, json!(true));
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
async fn client_ends_with_the_reason_of_a_rejection() {
    let key = TokenKey::new();
    let token = key.token("a", &["--channel", "news"]);
    let node = Node::start(&["--jwt-key", &key.path()]).await;
    let browser = Browser::start().await;
    browser.open(&format!("http://{}/healthz", node.public)).await;
    let script = format!(
        "const token = {}, channel = 'news';
        const outcome = (url, options) => new Promise((resolve) => {{
            const client = new Fanfare(url, options);
            const sent = client.send('hello').catch(({{ code }}) => code);
            client.on('error', async ({{ code }}) => resolve([code, client.state, await sent]));
            client.on('state', async ({{ state }}) => state === 'live' && resolve([await sent > 0]));
        }});
        const tokens = ['bad', 'expired', token];
        return Promise.all([
            outcome('/ws/a', {{ channel }}),
            outcome('/ws/a', {{ channel, token: () => 'bad' }}),
            outcome('/ws/a', {{ channel, token: () => tokens.shift() }}),
            outcome('/ws/a', {{ channel: 'other', token }}),
            outcome('/ws/a?chanel=news', {{ token }}),
        ]);",
        json!(token)
    );
    assert_eq!(
        browser.run_client(&script).await,
        json!([
            [4401, "closed", "offline"],
            [4401, "closed", "offline"],
            [true],
            [4403, "closed", "offline"],
            [4400, "closed", "offline"],
        ])
    );
}

#[tokio::test]
async fn client_stays_away_when_it_is_disconnected() {
    let node = Node::start(&[]).await;
    let browser = Browser::start().await;
    browser.open(&format!("http://{}/healthz", node.public)).await;
    let start = "
        window.states = [];
        window.errors = [];
        window.start = (user) => {
            const fanfare = new Fanfare('/ws/' + user);
            fanfare.on('state', ({ state, code, reason }) =>
                states.push([user, state, ...(code ? [code, reason] : [])].join(' ')));
            fanfare.on('error', ({ code, message }) => errors.push(`${user} ${code} ${message}`));
        };
        start('alice');
        start('bob');";
    assert_eq!(browser.run_client(start).await, Value::Null);
    browser.becomes("states.filter((state) => state.endsWith(' live')).length", json!(2)).await;
    for path in ["/disconnect?user=alice", "/disconnect?user=bob&ban=1h"] {
        assert_eq!(node.admin("POST", path, b"").await.status, 200);
    }
    browser.becomes("errors.length", json!(2)).await;
    // A new client of a banned user is closed in the same way.
    assert_eq!(browser.run("start('bob')").await, Value::Null);
    browser.becomes("errors.length", json!(3)).await;
    let mut errors = browser.run("return errors").await;
    errors.as_array_mut().expect("a list").sort_by_key(Value::to_string);
    let banned = "bob 4010 banned by the application";
    assert_eq!(errors, json!(["alice 4010 disconnected by the application", banned, banned]));
    let states = browser.run("return states.filter((state) => !state.endsWith('live'))").await;
    assert!(!states.to_string().contains("waiting"), "no attempt follows: {states}");
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
    browser.becomes("probes >= 2", json!(true)).await; // so the first ping was answered
    assert_eq!(
        browser.run("return states").await,
        json!(["connecting", "live"]),
        "the server answers, so it stays live"
    );
    node.signal("STOP");
    browser.becomes("states.includes('waiting: no answer to a ping')", json!(true)).await;
    node.signal("CONT");
    browser.becomes("fanfare.state === 'live'", json!(true)).await;
    let sent = "return await fanfare.send('hello again') > 0;";
    assert_eq!(browser.run_client(&format!("const fanfare = window.fanfare; {sent}")).await, json!(true));
}

/// A new directory with this file of tests/page/client, the client and its types as a node serves
/// them, and npm packages.
async fn node_project(node: &Node, file: &str) -> Directory {
    let directory = Directory::new();
    let write = |name: &str, content: &[u8]| {
        std::fs::write(directory.path().join(name), content).expect("the directory is writable");
    };
    write("fanfare.mjs", node.get("/fanfare.js").await.body.as_bytes());
    write("fanfare.d.mts", node.get("/fanfare.d.mts").await.body.as_bytes());
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/page/client").join(file);
    write(file, &std::fs::read(source).expect("it is there"));
    let packages: PathBuf = installed("client/node_modules");
    std::os::unix::fs::symlink(packages, directory.path().join("node_modules")).expect("it is new");
    directory
}

/// With the WebSocket of a package: sends at once, sends too much, and survives a restart of the node.
async fn run_in_node(package: &str) {
    let node = Node::start(&[]).await;
    let project = node_project(&node, "node.mjs").await;
    let nothing = format!("ws://127.0.0.1:{}/ws/alice", free_port());
    let url = format!("ws://{}/ws/alice", node.public);
    let mut command = Command::new("node");
    command.current_dir(project.path()).args(["node.mjs", package, &nothing, &url]);
    let client = Process::start("node", &mut command);
    let prints = async |wanted: &str| {
        let found = client.line(wanted, |line| line.contains(wanted).then(|| line.to_owned())).await;
        found.unwrap_or_else(|ended| panic!("{ended}"))
    };
    prints("sent").await;
    prints("message hello").await;
    prints("room.1 hello").await;
    let error = prints("error unreachable").await;
    assert!(!error.contains("no welcome in time"), "attempts stalled: {error}");

    prints("codes too_big offline").await;
    prints("connection 2").await;

    node.kill();
    let address = node.public.to_string();
    let _node = Node::start(&["--listen", &address]).await; // one address more, where the old one was
    prints("connection 3").await;
    prints("gaps").await; // the history was in the old process
    assert!(client.ended().await.success(), "nothing is left to do: {:?}", client.output());
}

#[tokio::test]
async fn client_runs_in_node_with_ws() {
    run_in_node("ws").await;
}

#[tokio::test]
async fn client_runs_with_the_websocket_of_node_22() {
    run_in_node("undici").await;
}

#[tokio::test]
async fn types_fit_the_client() {
    let node = Node::start(&[]).await;
    let project = node_project(&node, "types.mts").await;
    let mut command = Command::new("node");
    command.args(["node_modules/typescript/bin/tsc", "--noEmit", "--strict", "--target", "es2022"]);
    command.args(["--module", "nodenext", "--moduleResolution", "nodenext", "types.mts"]);
    let checked = command.current_dir(project.path()).output().expect("node is installed");
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stdout));
}
