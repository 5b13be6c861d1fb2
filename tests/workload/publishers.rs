//! Publishers of every kind. Each records every event it tried to publish, and the answer.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use crate::checker::{Attempt, Moment, Outcome};
use crate::common::client::{JSON_MODE, position};
use crate::common::{Client, Frame, Node, Options, Rng, http};
use crate::workload::shared::{Shared, canonical, local};

/// Unanswered events of a client in JSON mode.
const IN_FLIGHT: usize = 4;

/// How long to wait for an answer. A node answers within its `--publish-timeout`; backends may give
/// up earlier.
const ANSWER: Duration = Duration::from_secs(15);

/// How long a plain client's own text may take while its connection lives: longer than any fault
/// here.
const SILENCE: Duration = Duration::from_secs(30);

/// When most subscribers are this many events behind, publishers slow down.
const LAG: u64 = 500;

/// Time between two attempts to connect.
const RETRY: Duration = Duration::from_millis(50);

/// What a publisher needs.
pub struct Plan {
    pub shared: Arc<Shared>,
    /// The channels in which it publishes, by number.
    pub channels: Range<usize>,
    /// Recipients of private events.
    pub users: Arc<[String]>,
    /// Time between two events.
    pub pace: Duration,
    pub rng: Rng,
    /// Distinguishes it from other publishers.
    pub seed: u64,
}

/// An event without an answer yet.
struct Sent {
    /// The number of its channel.
    channel: usize,
    text: String,
    to: Option<String>,
    started: Moment,
    at: Instant,
}

impl Plan {
    fn is_quiet(&self) -> bool {
        *self.shared.quiet.borrow()
    }

    /// The time until the next event. Longer when subscribers are behind, as on a slow machine:
    /// faults are tested here, not speed.
    fn pause(&self) -> Duration {
        self.pace * (1 + self.shared.main().lag() / LAG).min(10) as u32
    }

    /// The next event: a unique text, one in three for one user.
    fn event(&mut self, name: &str, n: &mut u64) -> Sent {
        *n += 1;
        let text = format!("{name} {} {n}", self.seed);
        let to = (self.rng.below(3) == 0)
            .then(|| self.users[self.rng.below(self.users.len() as u64) as usize].clone());
        let channel = self.channels.start + self.rng.index(self.channels.len());
        Sent { channel, text, to, started: self.shared.now(), at: Instant::now() }
    }

    fn note(&self, line: &str, event: &Value, sent: Sent, outcome: Outcome) {
        let body = canonical(event);
        let Sent { channel, to, started, at, .. } = sent;
        self.shared.waited(line, at.elapsed());
        let finished = self.shared.now();
        let attempt = Attempt { line: line.into(), body, to, started, finished, outcome };
        self.shared.channels[channel].note(attempt);
    }

    async fn join(&mut self, name: &str, subprotocol: Option<&'static str>) -> Option<Client> {
        // To publish in other channels it needs no channel of its own.
        let channel = if self.channels.start == 0 { &*self.shared.main().name } else { "" };
        while !self.is_quiet() {
            let node = self.shared.nodes.any(&mut self.rng);
            let options = Options {
                query: format!("channel={channel}{}", self.shared.token_query(name)),
                subprotocol,
                ..Options::default()
            };
            if let Ok(client) = Client::try_open(node.public, name, &options).await {
                return Some(client);
            }
            sleep(RETRY).await;
        }
        None
    }
}

/// What subscribers see of a client's text.
fn chat(name: &str, sent: &Sent) -> Value {
    match &sent.to {
        Some(to) => json!({"sender": name, "to": to, "text": sent.text}),
        None => json!({"sender": name, "text": sent.text}),
    }
}

/// What subscribers see of a backend's text.
fn posted(sent: &Sent) -> Value {
    match &sent.to {
        Some(to) => json!({"text": sent.text, "to": to}),
        None => json!({"text": sent.text}),
    }
}

/// A client in JSON mode with several events in flight.
pub async fn json_client(mut plan: Plan) {
    let name = format!("json{}", plan.seed);
    let (mut n, mut connections) = (0, 0);
    while let Some(mut client) = plan.join(&name, Some(JSON_MODE)).await {
        connections += 1;
        let line = format!("{name} on connection {connections}");
        let mut waiting: VecDeque<(u64, Sent)> = VecDeque::new();
        let mut open = true;
        while open && !(plan.is_quiet() && waiting.is_empty()) {
            if waiting.len() < IN_FLIGHT && !plan.is_quiet() {
                let sent = plan.event("json", &mut n);
                let mut frame = json!({"text": sent.text, "ref": n});
                if let Some(to) = &sent.to {
                    frame["to"] = json!(to);
                }
                if sent.channel > 0 {
                    frame["channel"] = json!(plan.shared.channels[sent.channel].name);
                }
                waiting.push_back((n, sent));
                open = client.try_send(frame.to_string()).await;
                let pause = plan.pause();
                // Answers and events are read meanwhile.
                let _ = timeout(pause, async {
                    while open {
                        open = hear(&plan, &name, &line, &mut client, &mut waiting).await;
                    }
                })
                .await;
            } else {
                open = hear(&plan, &name, &line, &mut client, &mut waiting).await;
            }
        }
        for (_, sent) in waiting {
            let event = chat(&name, &sent);
            plan.note(&line, &event, sent, Outcome::Unknown);
        }
    }
}

/// Handles one frame. `false`: the connection has finished.
async fn hear(
    plan: &Plan,
    name: &str,
    line: &str,
    client: &mut Client,
    waiting: &mut VecDeque<(u64, Sent)>,
) -> bool {
    let text = match client.next_frame().await {
        Frame::Text(text) => text,
        Frame::Ping(_) | Frame::Pong(_) => return true,
        Frame::Close(..) | Frame::Lost(_) => return false,
    };
    let frame: Value = serde_json::from_str(&text).expect("JSON");
    let outcome = match frame["type"].as_str() {
        Some("ack") => Outcome::Acked(position(&frame["id"])),
        Some("error") if frame["code"] == "unknown" => Outcome::Unknown,
        Some("error") if frame["code"] == "unavailable" => Outcome::Rejected,
        Some("error") => panic!("{name}: {text}"),
        _ => return true,
    };
    let place = waiting.iter().position(|(n, _)| frame["ref"] == *n);
    let (_, sent) = place
        .and_then(|place| waiting.remove(place))
        .unwrap_or_else(|| panic!("{name}: an answer to nothing: {text}"));
    // Answers about a channel arrive in the order of its events, so that clients of one channel can
    // assign them without `ref`.
    let earlier = waiting.iter().take(place.unwrap_or_default());
    assert!(earlier.into_iter().all(|(_, other)| other.channel != sent.channel), "{name}: {text}");
    if let Some(channel) = frame.get("channel") {
        assert_eq!(*channel, plan.shared.channels[sent.channel].name, "{name}: {text}");
    }
    let event = chat(name, &sent);
    plan.note(line, &event, sent, outcome);
    true
}

/// A client in plain mode. It gets no answers but its own texts: each of them in order, or the
/// connection is closed.
pub async fn plain_client(mut plan: Plan) {
    let name = format!("plain{}", plan.seed);
    let (mut n, mut connections) = (0, 0);
    while let Some(mut client) = plan.join(&name, None).await {
        connections += 1;
        let line = format!("{name} on connection {connections}");
        let mut waiting: VecDeque<Sent> = VecDeque::new();
        let mut open = true;
        while open && !(plan.is_quiet() && waiting.is_empty()) {
            if !plan.is_quiet() {
                let mut sent = plan.event("plain", &mut n);
                sent.to = None;
                let text = sent.text.clone();
                waiting.push_back(sent);
                open = client.try_send(text).await;
            }
            let _ = timeout(plan.pause(), async {
                while open {
                    open = come_back(&plan, &name, &line, &mut client, &mut waiting).await;
                }
            })
            .await;
            if let Some(first) = waiting.front().filter(|first| open && first.at.elapsed() > SILENCE) {
                panic!("{name}: {:?} neither came nor was the connection closed", first.text);
            }
        }
        for sent in waiting {
            let event = chat(&name, &sent);
            plan.note(&line, &event, sent, Outcome::Unknown);
        }
    }
}

/// Handles one frame, which may be its own text. `false`: the connection has finished.
async fn come_back(
    plan: &Plan,
    name: &str,
    line: &str,
    client: &mut Client,
    waiting: &mut VecDeque<Sent>,
) -> bool {
    let text = match client.next_frame().await {
        Frame::Text(text) => text,
        Frame::Ping(_) | Frame::Pong(_) => return true,
        // The node restarts, or the client missed events, or publishing failed.
        Frame::Close(1012 | 1013 | 4008, _) | Frame::Lost(_) => return false,
        Frame::Close(code, reason) => panic!("{name} was closed with {code}: {reason}"),
    };
    let frame: Value = serde_json::from_str(&text).expect("JSON");
    if frame["sender"] != name || frame.get("id").is_none() {
        return true;
    }
    match waiting.front() {
        Some(first) if frame["text"] == first.text => {
            let sent = waiting.pop_front().expect("it has a front");
            plan.note(line, &chat(name, &sent), sent, Outcome::Acked(position(&frame["id"])));
        }
        // From an earlier connection.
        _ if waiting.iter().all(|sent| frame["text"] != sent.text) => {}
        first => panic!("{name}: {:?} got lost on the way, since {text} came", first.map(|sent| &sent.text)),
    }
    true
}

/// A backend that publishes by POST, and waits for each answer.
pub async fn poster(mut plan: Plan) {
    let (mut n, mut lines) = (0, 0);
    while !plan.is_quiet() {
        let node = plan.shared.nodes.any(&mut plan.rng);
        let sent = plan.event("post", &mut n);
        let (event, outcome) = (posted(&sent), post(&plan.shared, &node, &sent).await);
        // Each node keeps the order of its publishes. Two nodes may use two primaries.
        let line = format!("post {} {lines} by {}", plan.seed, node.public);
        plan.note(&line, &event, sent, outcome);
        if outcome == Outcome::Unknown {
            lines += 1; // it may be published after the next event, which goes to another node
        }
        sleep(plan.pause()).await;
    }
}

async fn post(shared: &Shared, node: &Node, sent: &Sent) -> Outcome {
    let channel = &shared.channels[sent.channel].name;
    let body = json!({"text": sent.text}).to_string();
    let to = sent.to.as_ref().map(|to| format!("&to={to}")).unwrap_or_default();
    let path = format!("/publish?channel={channel}{to}");
    let Ok(socket) = TcpStream::connect(node.admin).await else { return Outcome::Rejected };
    let answer = async {
        let mut socket = BufReader::new(socket);
        let bytes = http::request_bytes(node.admin, "POST", &path, &[], body.as_bytes());
        socket.get_mut().write_all(&bytes).await.ok()?;
        http::read_response(&mut socket, false).await.ok()
    };
    match timeout(ANSWER, answer).await.ok().flatten() {
        Some(response) if response.status == 200 => Outcome::Acked(position(&response.json()["id"])),
        Some(response) if response.status == 503 => Outcome::Rejected,
        Some(response) if response.status == 504 => Outcome::Unknown,
        Some(response) => panic!("no answer to a publish: {response:?}"),
        None => Outcome::Unknown,
    }
}

/// Publishes an event in this channel, if that is possible now, and returns its id.
pub async fn mark(shared: &Arc<Shared>, channel: usize, name: &str, n: u64) -> Option<u64> {
    let node = shared.nodes.any(&mut Rng(n));
    let id = post_once(shared, &node, channel, &format!("{name} {n} of {channel}")).await;
    if id.is_none() {
        sleep(RETRY).await;
    }
    id
}

/// Publishes one event in the main channel by POST to this node, which must succeed, and returns its id.
pub async fn post_to(shared: &Arc<Shared>, node: &Node, name: &str) -> u64 {
    post_once(shared, node, 0, name).await.unwrap_or_else(|| panic!("{name}: not published"))
}

async fn post_once(shared: &Arc<Shared>, node: &Node, channel: usize, name: &str) -> Option<u64> {
    let sent = Sent { channel, text: name.into(), to: None, started: shared.now(), at: Instant::now() };
    let outcome = post(shared, node, &sent).await;
    let (body, started, finished) = (canonical(&posted(&sent)), sent.started, shared.now());
    shared.channels[channel].note(Attempt { line: name.into(), body, to: None, started, finished, outcome });
    match outcome {
        Outcome::Acked(id) => Some(id),
        _ => None,
    }
}

/// A backend that publishes by FCALL, and waits for each answer.
pub async fn program(mut plan: Plan) {
    let (mut n, mut lines) = (0, 0);
    let mut connection: Option<BufReader<TcpStream>> = None;
    while !plan.is_quiet() {
        let Some(redis) = &mut connection else {
            let others = &plan.shared.other_redis;
            let port = match plan.rng.index(others.len() + 1) {
                0 => plan.shared.redis.load(Ordering::SeqCst),
                n => others[n - 1],
            };
            match TcpStream::connect(local(port)).await {
                Ok(stream) => connection = Some(BufReader::new(stream)),
                Err(_) => sleep(RETRY).await,
            }
            continue;
        };
        let sent = plan.event("fcall", &mut n);
        let (event, outcome) =
            (posted(&sent), timeout(ANSWER, fcall(redis, &plan.shared, &sent)).await.ok().flatten());
        if outcome.is_none() {
            connection = None;
        }
        let outcome = outcome.unwrap_or(Outcome::Unknown);
        plan.note(&format!("fcall {} {lines}", plan.seed), &event, sent, outcome);
        if outcome == Outcome::Unknown {
            lines += 1;
        }
        sleep(plan.pause()).await;
    }
}

/// Errors with which Redis has certainly not run the function.
const REJECTIONS: [&str; 11] = [
    "ERR Function not found",
    "ERR fanfare_publish: no node has",
    "OOM",
    "READONLY",
    "LOADING",
    "BUSY",
    "MISCONF",
    "NOREPLICAS",
    "MASTERDOWN",
    "CLUSTERDOWN",
    "TRYAGAIN",
];

/// Most redirections that a publisher follows. After that its event is rejected.
const REDIRECTIONS: usize = 5;

async fn fcall(redis: &mut BufReader<TcpStream>, shared: &Shared, sent: &Sent) -> Option<Outcome> {
    let channel = &shared.channels[sent.channel].name;
    let (key, event) = (format!("fanfare:{{{channel}}}"), json!({"text": sent.text}).to_string());
    let mut parts = vec!["FCALL", "fanfare_publish", "1", &key, &event];
    parts.extend(sent.to.as_deref());
    let mut command = format!("*{}\r\n", parts.len());
    for part in parts {
        command += &format!("${}\r\n{part}\r\n", part.len());
    }
    let mut line = call(redis, &command).await?;
    for _ in 0..REDIRECTIONS {
        let mut words = line.split(' ');
        let kind = words.next().unwrap_or_default().to_owned();
        let port = words.nth(1).and_then(|address| address.rsplit_once(':')).map(|(_, port)| port.parse());
        let (true, Some(Ok(port))) = (matches!(&*kind, "-MOVED" | "-ASK"), port) else { break };
        let Ok(stream) = TcpStream::connect(local(port)).await else { return Some(Outcome::Rejected) };
        let mut other = BufReader::new(stream);
        if kind == "-ASK" {
            call(&mut other, "*1\r\n$6\r\nASKING\r\n").await?;
        }
        line = call(&mut other, &command).await?;
        if kind == "-MOVED" {
            *redis = other;
        }
    }
    if line.starts_with("-MOVED") || line.starts_with("-ASK") {
        return Some(Outcome::Rejected);
    }
    let answer = &*line;
    if let Some(id) = answer.strip_prefix(':') {
        return Some(Outcome::Acked(id.parse().expect("an id")));
    }
    let error = answer.strip_prefix('-').unwrap_or_else(|| panic!("neither id nor error: {answer}"));
    let rejected = REJECTIONS.iter().any(|prefix| error.starts_with(prefix));
    Some(if rejected { Outcome::Rejected } else { Outcome::Unknown })
}

/// Sends a command and reads a line.
async fn call(redis: &mut BufReader<TcpStream>, command: &str) -> Option<String> {
    redis.get_mut().write_all(command.as_bytes()).await.ok()?;
    let mut line = String::new();
    if redis.read_line(&mut line).await.ok()? == 0 {
        return None;
    }
    Some(line.trim_end().to_owned())
}

/// Publishes this many events of this size in the main channel by FCALL, pipelined.
pub async fn burst(shared: &Arc<Shared>, name: &str, count: usize, size: usize) {
    let port = shared.redis.load(Ordering::SeqCst);
    let mut redis = BufReader::new(TcpStream::connect(local(port)).await.expect("Redis runs"));
    let key = format!("fanfare:{{{}}}", shared.main().name);
    let padding = "x".repeat(size);
    for chunk in (0..count).collect::<Vec<_>>().chunks(500) {
        let (mut commands, mut sent) = (String::new(), Vec::new());
        for n in chunk {
            let event = Sent {
                channel: 0,
                text: format!("burst {name} {n} {padding}"),
                to: None,
                started: shared.now(),
                at: Instant::now(),
            };
            let text = json!({"text": event.text}).to_string();
            commands += "*5\r\n$5\r\nFCALL\r\n$15\r\nfanfare_publish\r\n$1\r\n1\r\n";
            commands += &format!("${}\r\n{key}\r\n${}\r\n{text}\r\n", key.len(), text.len());
            sent.push(event);
        }
        redis.get_mut().write_all(commands.as_bytes()).await.expect("Redis runs");
        for event in sent {
            let mut line = String::new();
            redis.read_line(&mut line).await.expect("Redis answers");
            let id =
                line.trim_end().strip_prefix(':').unwrap_or_else(|| panic!("{line}")).parse().expect("an id");
            let (body, finished) = (canonical(&posted(&event)), shared.now());
            let line = format!("burst {name}");
            let outcome = Outcome::Acked(id);
            shared.main().note(Attempt { line, body, to: None, started: event.started, finished, outcome });
        }
    }
}

/// Publishes one event in the main channel by FCALL, which must succeed, and returns its id.
pub async fn one(shared: &Arc<Shared>, name: &str) -> u64 {
    let port = shared.redis.load(Ordering::SeqCst);
    let sent = Sent { channel: 0, text: name.into(), to: None, started: shared.now(), at: Instant::now() };
    let mut redis = BufReader::new(TcpStream::connect(local(port)).await.expect("Redis runs"));
    let outcome = fcall(&mut redis, shared, &sent).await.expect("Redis answers");
    let Outcome::Acked(id) = outcome else { panic!("{name}: {outcome:?}") };
    let (body, started, finished) = (canonical(&posted(&sent)), sent.started, shared.now());
    shared.main().note(Attempt { line: name.into(), body, to: None, started, finished, outcome });
    id
}
