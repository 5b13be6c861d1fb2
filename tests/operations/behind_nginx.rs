//! Untrusted input through a real nginx: a thousand bad handshakes of every kind take no node out
//! and affect no client.

use std::cell::Cell;
use std::net::SocketAddr;
use std::time::Duration;

use futures_util::future::join_all;
use futures_util::stream::{self, StreamExt};
use serde_json::{Value, json};

use crate::common;
use crate::common::raw::opcode;
use crate::common::{Client, Nginx, Node, Options, Raw, Redis, TokenKey};

const BAD: usize = 1000;
/// An address with as many connections as one address may have.
const CROWDED: [u8; 4] = [127, 0, 0, 3];

/// A bad handshake: its source address and bytes, and the statuses that may answer it, from the
/// node or from nginx. None: the client does not wait for a response.
struct Bad {
    from: [u8; 4],
    bytes: Vec<u8>,
    statuses: &'static [u16],
}

fn upgrade(target: &str, headers: &str) -> String {
    format!(
        "GET {target} HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{headers}\r\n"
    )
}

/// One of every kind without a 503.
fn kinds(key: &TokenKey) -> Vec<Bad> {
    let target = format!("/ws/alice?token={}", key.token("alice", &[]));
    let greedy = format!("/ws/greedy?token={}", key.token("greedy", &[]));
    let good = upgrade(&target, "");
    let long = "x".repeat(9000);
    let part = "x".repeat(7000);
    let many: String = (0..70).map(|n| format!("X-{n}: 1\r\n")).collect();
    let kind = |bytes: String, statuses| Bad { from: [127, 0, 0, 1], bytes: bytes.into(), statuses };
    let with = |headers: &str, statuses| kind(upgrade(&target, headers), statuses);
    vec![
        // Methods and versions.
        kind(good.replace("GET", "POST"), &[405]),
        kind(good.replace("GET", "HEAD"), &[405]),
        kind(good.replace("GET", "PUT"), &[405]),
        kind(
            format!(
                "POST {target} HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n{}",
                "x".repeat(100_000)
            ),
            &[405],
        ),
        kind(good.replace("Upgrade: websocket\r\n", ""), &[426]),
        kind(good.replace("Version: 13", "Version: 8"), &[426]),
        kind(good.replace("Sec-WebSocket-Version: 13\r\n", ""), &[426]),
        // Keys, hosts, bodies, lines.
        kind(good.replace("dGhl", "dG="), &[400]),
        kind(good.replace("Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n", ""), &[400]),
        with("Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n", &[400]),
        kind(good.replace("Host: a\r\n", ""), &[400]),
        with("Host: a\r\n", &[400]),
        with("Content-Length: 5\r\n", &[400]).followed_by("hello"),
        with("Transfer-Encoding: chunked\r\n", &[400]).followed_by("5\r\nhello\r\n0\r\n\r\n"),
        with("Transfer-Encoding: gzip\r\n", &[400, 501]),
        kind(upgrade("/ws/alice", "").replace("\r\n", "\n"), &[401]), // nginx takes bare LF and sends CRLF
        // Sizes and counts.
        kind(upgrade(&format!("{target}&x={long}"), ""), &[414]),
        with(&format!("X-1: {part}\r\nX-2: {part}\r\nX-3: {part}\r\n"), &[431]),
        with(&format!("X-1: {long}\r\n"), &[400]),
        with(&many, &[431]),
        // Origin, user and token.
        with("Origin: https://example.com\r\n", &[403]),
        with("Origin: null\r\n", &[403]),
        kind(upgrade("/ws/alice", ""), &[401]),
        kind(upgrade("/ws/alice?token=a.b.c", ""), &[401]),
        kind(upgrade(&target.replace("/ws/alice", "/ws/bob"), ""), &[401]),
        with("X-Forwarded-For: unknown\r\n", &[400]),
        // Path and query.
        kind(upgrade("/ws/%0A", ""), &[400]),
        kind(upgrade("/ws/%00", ""), &[400]),
        kind(upgrade("/ws/%FF", ""), &[400]),
        kind(upgrade(&format!("/ws/{}", "u".repeat(129)), ""), &[400]),
        kind(upgrade(&format!("{target}&channel=a%20b"), ""), &[400]),
        kind(upgrade(&format!("{target}&channel="), ""), &[400]),
        kind(upgrade("/nowhere", ""), &[404]),
        // Too many connections.
        kind(upgrade(&greedy, ""), &[429]),
        Bad { from: CROWDED, ..with("", &[429]) },
        // Other protocols.
        kind("\x16\x03\x01\x02\0\x01\0\x01\u{fc}\x03\x03\r\n\r\n".into(), &[400]),
        kind("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".into(), &[400, 405, 505]),
        kind("PROXY TCP4 192.0.2.1 127.0.0.1 1 2\r\n".to_owned() + &good, &[400]),
        kind("nonsense\r\n\r\n".into(), &[400]),
        // Closed before the end of the request, or before the response.
        kind(good[..good.len() - 10].into(), &[]),
        kind(upgrade("/ws/alice", ""), &[]),
        kind(good.clone(), &[]),
    ]
}

impl Bad {
    fn followed_by(mut self, body: &str) -> Bad {
        self.bytes.extend_from_slice(body.as_bytes());
        self
    }

    async fn happens(&self, at: SocketAddr) {
        let mut raw = Raw::connect_from(self.from, at).await;
        raw.write_some(&self.bytes).await; // nginx may answer before it has read everything
        if !self.statuses.is_empty() {
            let status = raw.status().await;
            let start = String::from_utf8_lossy(&self.bytes[..self.bytes.len().min(300)]);
            assert!(self.statuses.contains(&status), "{status} instead of {:?} to {start}", self.statuses);
        }
    }
}

/// Two nodes behind nginx, and valid clients of both.
struct Scene {
    key: TokenKey,
    nodes: [Node; 2],
    nginx: Nginx,
    clients: Vec<Client>,
    /// Connections that exhaust the limits of a user, an address and the channels.
    _held: Vec<Raw>,
    _redis: Redis,
}

impl Scene {
    async fn set(start_nginx: impl AsyncFnOnce(&[SocketAddr]) -> Nginx) -> Scene {
        let key = TokenKey::new();
        let redis = Redis::start(&[]).await;
        let flags = [
            "--jwt-key",
            &key.path(),
            "--trusted-proxy",
            "127.0.0.1",
            "--max-connections-per-user",
            "2",
            "--max-connections-per-ip",
            "2",
            "--max-channels",
            "2",
        ];
        let (a, b) = tokio::join!(Node::on(&redis, &flags), Node::on(&redis, &flags));
        let nginx = start_nginx(&[a.public, b.public]).await;
        let mut held = Vec::new();
        for (from, user) in [(CROWDED, "a"), (CROWDED, "b"), ([127, 0, 0, 1], "greedy")] {
            // With the default channel these are all channels that the nodes may follow. nginx may
            // choose the fuller node, which rejects the client.
            while held.len() < if user == "greedy" { 8 } else { 4 } {
                let mut raw = Raw::connect_from(from, nginx.addr).await;
                if raw.upgrade(&format!("/ws/{user}?token={}", key.token(user, &[])), &[]).await.status != 101
                {
                    break;
                }
                held.push(raw);
            }
        }
        assert_eq!(held.len(), 8, "both nodes are full for them");
        let mut clients = Vec::new();
        for number in 0..6 {
            clients.push(client(&nginx, &key, &format!("user{number}")).await);
        }
        Scene { key, nodes: [a, b], nginx, clients, _held: held, _redis: redis }
    }

    /// Sends bad handshakes, twenty at a time, while clients publish and get every event.
    async fn plays(&mut self, kinds: &[Bad]) {
        let at = self.nginx.addr;
        let over = Cell::new(false);
        let bad = async {
            let all = stream::iter((0..BAD).map(|number| kinds[number % kinds.len()].happens(at)));
            all.buffer_unordered(20).collect::<Vec<()>>().await;
            over.set(true);
        };
        let events = async {
            let mut events = 0;
            while !over.get() {
                // The clients publish in turn through nginx, and all of them get the event.
                let sender = events % self.clients.len();
                let (answer, before) = self.clients[sender].send_for_ack(json!({ "data": events })).await;
                let id = answer.expect("it is published");
                let expected = json!({ "sender": format!("user{sender}"), "data": events });
                for (number, client) in self.clients.iter_mut().enumerate() {
                    if number == sender && !before.is_empty() {
                        assert_eq!((before.len(), &before[0]["data"]), (1, &expected["data"]));
                    } else {
                        client.expect_event(id, &expected).await;
                    }
                }
                events += 1;
            }
            events
        };
        let ((), events) = tokio::join!(bad, events);
        assert!(
            events >= self.clients.len(),
            "only {events} events came meanwhile: not every client had its turn"
        );
    }

    /// Asserts that no node was taken out: new clients reach both, and nginx reports nothing about
    /// its upstreams.
    async fn stands(&self) {
        let joins = async || {
            join_all(self.nodes.iter().map(|node| node.metric("fanfare_connections_upgraded_total"))).await
        };
        let before = joins().await;
        let mut new = Vec::new();
        for number in 0..4 {
            new.push(client(&self.nginx, &self.key, &format!("new{number}")).await);
        }
        let after = joins().await;
        assert!(before[0] < after[0] && before[1] < after[1], "{before:?}, then {after:?}");
        let about: Vec<_> =
            self.nginx.errors().into_iter().filter(|line| line.contains("upstream")).collect();
        assert!(about.is_empty(), "{about:#?}");
        // Every request that nginx forwarded was answered, unless the client had closed (499).
        let silent = |line: &&String| {
            let mut words = line.split(' ').filter(|word| !word.is_empty());
            let status = words.next().unwrap_or_default();
            matches!(status, "502" | "504") || (status != "499" && line.contains(':') && line.ends_with('-'))
        };
        let requests = self.nginx.requests();
        let silent: Vec<_> = requests.iter().filter(silent).collect();
        assert!(silent.is_empty(), "{silent:#?}");
    }
}

async fn client(nginx: &Nginx, key: &TokenKey, user: &str) -> Client {
    let options = Options {
        query: format!("channel=room&token={}", key.token(user, &[])),
        subprotocol: Some(common::client::JSON_MODE),
        ..Options::default()
    };
    let mut client = Client::try_open(nginx.addr, user, &options).await.expect("a connection");
    client.welcome().await;
    client
}

/// With nginx's default rule, by which a single close without a response takes a node out for 10
/// seconds.
#[tokio::test]
async fn bad_handshakes_take_no_node_out() {
    let mut scene = Scene::set(Nginx::unforgiving_before).await;
    let kinds = kinds(&scene.key);
    scene.plays(&kinds).await;
    scene.stands().await;
}

/// With the documented configuration, rejections with 503, which nginx retries on the other node,
/// take no node out.
#[tokio::test]
async fn rejections_with_503_go_to_the_other_node() {
    let mut scene = Scene::set(Nginx::before).await;
    let full = |number: usize| {
        let user = format!("full{number}"); // one each, since connections that wait for the response count too
        let target = format!("/ws/{user}?token={}&channel=new{number}", scene.key.token(&user, &[]));
        Bad { from: [127, 0, 0, 1], bytes: upgrade(&target, "").into(), statuses: &[503] }
    };
    let kinds: Vec<_> = (0..20).map(full).chain(kinds(&scene.key)).collect();
    scene.plays(&kinds).await;
    scene.stands().await;
    let tried_twice = scene.nginx.requests().iter().filter(|line| line.contains("503, 503")).count();
    assert!(tried_twice > 0, "{:?}", scene.nginx.requests());
}

/// The node has written the event long before the client has read it: nginx and the kernels buffer
/// megabytes, and pings wait behind them.
#[tokio::test]
async fn slow_reader_gets_a_large_event() {
    const SIZE: usize = 6_000_000;
    let flags = ["--ping-interval", "1s", "--ping-timeout", "4s", "--max-message-size", "8MiB"];
    let node = Node::start(&[&flags[..], &["--trusted-proxy", "127.0.0.1"]].concat()).await;
    let nginx = Nginx::with_large_buffers_before(&[node.public]).await;
    let mut raw = Raw::upgraded(nginx.addr, "/ws/slow?channel=room").await;
    let first = node.publish("room", &json!({ "text": "x".repeat(SIZE) })).await;
    let frame = raw.next_slowly(60_000, Duration::from_millis(100)).await; // ten seconds: the slowness is what is tested
    let (opcode::TEXT, text) = frame else { panic!("{} instead of a text", frame.0) };
    let event: Value = serde_json::from_slice(&text).expect("JSON");
    assert_eq!((event["id"].as_u64(), event["text"].as_str().map(str::len)), (Some(first), Some(SIZE)));
    raw.frame(true, opcode::PONG, b"").await;
    let second = node.publish("room", &json!({})).await;
    assert_eq!(raw.next_text().await, json!({ "id": second }).to_string());
}
