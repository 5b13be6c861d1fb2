//! A stream of events under faults: publishers who note what they were told, watchers who note what they saw, and
//! the check that both fit the promise.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::watch;

use super::client::{JSON_MODE, position};
use super::{Client, Frame, Node, Options, Resp, until};

/// The channel of the stream.
pub const CHANNEL: &str = "room";

/// The text of its last event.
pub const END: &str = "end";

/// Numbers that look random, the same in every run.
pub struct Dice(pub u64);

impl Dice {
    /// A number below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

/// Nodes that may be replaced while clients come to them.
#[derive(Clone, Default)]
pub struct Nodes(Arc<Mutex<Vec<Arc<Node>>>>);

impl Nodes {
    /// These.
    pub fn new(nodes: impl IntoIterator<Item = Node>) -> Nodes {
        Nodes(Arc::new(Mutex::new(nodes.into_iter().map(Arc::new).collect())))
    }

    /// One alone.
    pub fn of(node: Arc<Node>) -> Nodes {
        Nodes(Arc::new(Mutex::new(vec![node])))
    }

    /// The one with this number.
    pub fn get(&self, number: usize) -> Arc<Node> {
        self.0.lock().expect("nothing panics while holding it")[number].clone()
    }

    /// Every one.
    pub fn all(&self) -> Vec<Arc<Node>> {
        self.0.lock().expect("nothing panics while holding it").clone()
    }

    /// Any of them.
    pub fn any(&self, dice: &mut Dice) -> Arc<Node> {
        let nodes = self.0.lock().expect("nothing panics while holding it");
        nodes[dice.below(nodes.len() as u64) as usize].clone()
    }

    /// Puts another in the place of one.
    pub fn replace(&self, number: usize, node: Node) {
        self.0.lock().expect("nothing panics while holding it")[number] = Arc::new(node);
    }
}

/// What a watcher saw, in order.
#[derive(Clone, Debug, PartialEq)]
pub enum Seen {
    /// An event with id and text; true for one that only this user sees.
    Event(u64, String, bool),
    /// Events up to this position may be missing, and it was told: by a reset, or not recovered when it came back.
    Reset(u64),
}

/// What a user saw from a position on.
pub struct Journal {
    user: String,
    from: u64,
    /// What came.
    pub seen: Vec<Seen>,
}

impl Journal {
    fn position(&self) -> u64 {
        self.seen.last().map_or(self.from, |(Seen::Event(at, ..) | Seen::Reset(at))| *at)
    }

    fn note(&mut self, seen: Seen) {
        let (Seen::Event(at, ..) | Seen::Reset(at)) = seen;
        assert!(at > self.position(), "{}: {seen:?} goes back from {}", self.user, self.position());
        self.seen.push(seen);
    }

    /// How often it was told that something may be missing.
    pub fn resets(&self) -> usize {
        self.seen.iter().filter(|seen| matches!(seen, Seen::Reset(_))).count()
    }
}

/// Follows the stream to its end on one connection.
pub async fn watch(mut client: Client, user: &str, welcome: &Value) -> Journal {
    let mut journal =
        Journal { user: user.into(), from: position(&welcome["lastEventId"]), seen: Vec::new() };
    loop {
        let value = client.next_json().await;
        if note(&mut journal, &value) {
            return journal;
        }
    }
}

/// Follows the stream to its end over many connections: it leaves, stalls and is thrown out, and comes back to any
/// node with the last position it knows.
pub async fn roam(nodes: Nodes, user: String, seed: u64) -> Journal {
    let mut dice = Dice(seed);
    let mut journal: Option<Journal> = None;
    loop {
        let last = journal.as_ref().map_or(String::new(), |journal| journal.position().to_string());
        let query = format!("channel={CHANNEL}&lastEventId={last}");
        let options = Options { query, small_buffer: dice.below(2) == 0, ..Options::default() };
        let mut client = join(&nodes, &mut dice, &user, &options).await;
        // The node may be gone before its first word.
        let Frame::Text(text) = client.next_frame().await else { continue };
        let welcome: Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(welcome["type"], "welcome", "{welcome}");
        let at = position(&welcome["lastEventId"]);
        match &mut journal {
            None => journal = Some(Journal { user: user.clone(), from: at, seen: Vec::new() }),
            Some(journal) if welcome["recovered"] == true => assert_eq!(at, journal.position(), "{welcome}"),
            Some(journal) => journal.note(Seen::Reset(at)),
        }
        let journal = journal.as_mut().expect("it was made above");
        for _ in 0..dice.below(200) {
            stall(&mut dice).await;
            match client.next_frame().await {
                Frame::Text(text) => {
                    if note(journal, &serde_json::from_str(&text).expect("JSON")) {
                        return Journal { user, from: journal.from, seen: std::mem::take(&mut journal.seen) };
                    }
                }
                Frame::Ping(_) | Frame::Pong(_) => {}
                Frame::Close(..) | Frame::Lost(_) => break,
            }
        }
    }
}

/// Notes an event or a reset. True at the stream's end.
fn note(journal: &mut Journal, value: &Value) -> bool {
    if value.get("id").is_none() {
        assert_eq!(value["type"], "reset", "{value}");
        journal.note(Seen::Reset(position(&value["lastEventId"])));
        return false;
    }
    let text = value["text"].as_str().unwrap_or_else(|| panic!("{value}"));
    let text = text.split('|').next().expect("a text has a first part").to_string();
    let to = value.get("to");
    assert!(to.is_none_or(|to| *to == *journal.user), "{} sees {value}", journal.user);
    let end = text == END;
    journal.note(Seen::Event(position(&value["id"]), text, to.is_some()));
    end
}

/// Follows the stream like a client of a simple chat server: without a position, and told of what may be missing by
/// a close alone. Each connection is a journal of its own.
pub async fn roam_simply(nodes: Nodes, user: String, seed: u64) -> Vec<Journal> {
    let mut dice = Dice(seed);
    let mut journals = Vec::new();
    loop {
        let query = format!("channel={CHANNEL}");
        let options = Options { query, small_buffer: dice.below(2) == 0, ..Options::default() };
        let mut client = join(&nodes, &mut dice, &user, &options).await;
        let mut journal = Journal { user: user.clone(), from: 0, seen: Vec::new() };
        for _ in 0..dice.below(400) {
            stall(&mut dice).await;
            match client.next_frame().await {
                Frame::Text(text) => {
                    let event: Value = serde_json::from_str(&text).expect("JSON");
                    if journal.seen.is_empty() {
                        journal.from = position(&event["id"]) - 1;
                    }
                    assert!(event.get("id").is_some(), "it gets nothing but events: {text}");
                    if note(&mut journal, &event) {
                        journals.push(journal);
                        return journals;
                    }
                }
                Frame::Ping(_) | Frame::Pong(_) => {}
                Frame::Close(code, _) => {
                    assert!([4008, 1012, 1013].contains(&code), "{user} was closed with {code}");
                    break;
                }
                Frame::Lost(_) => break,
            }
        }
        journals.push(journal);
    }
}

/// A reader that stalls now and then; the stall itself is what is tested.
async fn stall(dice: &mut Dice) {
    if dice.below(100) == 0 {
        tokio::time::sleep(Duration::from_millis(dice.below(500))).await;
    }
}

/// Joins some node, however long that takes.
async fn join(nodes: &Nodes, dice: &mut Dice, user: &str, options: &Options) -> Client {
    let dice = Mutex::new(dice);
    until(&format!("{user}'s join with {options:?}"), || async {
        let node = nodes.any(&mut dice.lock().expect("nothing panics while holding it"));
        Client::try_open(node.public, user, options).await.ok()
    })
    .await
}

/// What a publisher was told of its messages: id, text and addressee of what was taken.
#[derive(Default)]
pub struct Told {
    /// Acknowledged, by id.
    pub acked: BTreeMap<u64, (String, Option<String>)>,
    /// Certainly not taken.
    pub refused: BTreeSet<String>,
    /// Taken or not.
    pub unknown: BTreeSet<String>,
}

impl Told {
    fn note_acked(&mut self, id: u64, message: Message) {
        let known = self.acked.insert(id, (message.text, message.to));
        assert_eq!(known, None, "id {id} is given once");
    }
}

/// A numbered message, some to one of the users alone.
struct Message {
    text: String,
    to: Option<String>,
    padding: String,
}

impl Message {
    fn make(name: &str, number: u64, dice: &mut Dice, users: &[String]) -> Message {
        Message {
            text: format!("{name} {number}"),
            to: users.get(dice.below(2 + 4 * users.len() as u64) as usize).cloned(),
            padding: "x".repeat(dice.below(2000) as usize),
        }
    }

    /// What is sent: the padding is not part of what is noted.
    fn padded(&self) -> String {
        format!("{}|{}", self.text, self.padding)
    }
}

/// Publishes messages, one after the other's answer, until told to stop.
pub async fn publish(
    nodes: Nodes,
    name: String,
    seed: u64,
    users: Vec<String>,
    mut stop: watch::Receiver<bool>,
) -> Told {
    let mut dice = Dice(seed);
    let mut told = Told::default();
    let mut n = 0;
    'connections: loop {
        let query = format!("channel={CHANNEL}");
        let options = Options { query, subprotocol: Some(JSON_MODE), ..Options::default() };
        let mut client = join(&nodes, &mut dice, &name, &options).await;
        while !*stop.borrow_and_update() {
            n += 1;
            let message = Message::make(&name, n, &mut dice, &users);
            let mut frame = json!({"text": message.padded(), "ref": n});
            if let Some(to) = &message.to {
                frame["to"] = json!(to);
            }
            if !client.try_send(frame.to_string()).await {
                told.unknown.insert(message.text);
                continue 'connections;
            }
            loop {
                let value: Value = match client.next_frame().await {
                    Frame::Text(text) => serde_json::from_str(&text).expect("JSON"),
                    Frame::Ping(_) | Frame::Pong(_) => continue,
                    Frame::Close(..) | Frame::Lost(_) => {
                        told.unknown.insert(message.text);
                        continue 'connections;
                    }
                };
                match value["type"].as_str() {
                    Some("ack") => {
                        assert_eq!(value["ref"], n);
                        told.note_acked(position(&value["id"]), message);
                        break;
                    }
                    Some("error") => {
                        assert_eq!(value["ref"], n);
                        let unknown = value["code"] == "unknown";
                        let list = if unknown { &mut told.unknown } else { &mut told.refused };
                        list.insert(message.text);
                        break;
                    }
                    _ => {} // the stream itself
                }
            }
        }
        return told;
    }
}

/// Publishes messages like [`publish`], but by FCALL on a Redis port, as a program beside the nodes does.
pub async fn publish_by_fcall(
    port: u16,
    name: String,
    seed: u64,
    users: Vec<String>,
    mut stop: watch::Receiver<bool>,
) -> Told {
    let mut dice = Dice(seed);
    let mut told = Told::default();
    let mut n = 0;
    let mut redis = None;
    while !*stop.borrow_and_update() {
        let Some(connection) = &mut redis else {
            redis = Some(Resp::connect(([127, 0, 0, 1], port).into()).await);
            continue;
        };
        n += 1;
        let message = Message::make(&name, n, &mut dice, &users);
        let event = json!({"text": message.padded()}).to_string();
        match connection.try_fcall(CHANNEL, event.as_bytes(), message.to.as_deref()).await {
            Ok(super::Value::Error(_)) => {
                told.refused.insert(message.text);
                tokio::time::sleep(Duration::from_millis(20)).await; // Redis is loading, full, or has no function yet
            }
            Ok(id) => told.note_acked(id.int() as u64, message),
            Err(_) => {
                told.unknown.insert(message.text);
                redis = None;
                tokio::time::sleep(Duration::from_millis(20)).await; // Redis is away
            }
        }
    }
    told
}

/// What every fault must leave true, from what publishers were told and watchers saw.
pub fn check(told: &[Told], journals: &[Journal]) {
    // What there was: what was acknowledged, and what anyone saw.
    let mut there: BTreeMap<u64, (&str, Option<&str>)> = BTreeMap::new();
    for (id, (text, to)) in told.iter().flat_map(|told| &told.acked) {
        assert_eq!(there.insert(*id, (text, to.as_deref())), None, "id {id} was given to two publishers");
    }
    for journal in journals {
        for seen in &journal.seen {
            let Seen::Event(id, text, private) = seen else { continue };
            let event = (text.as_str(), private.then_some(journal.user.as_str()));
            assert_eq!(*there.entry(*id).or_insert(event), event, "id {id} is one event for everybody");
        }
    }
    for journal in journals {
        journal.check(told, &there);
    }
}

impl Journal {
    fn check(&self, told: &[Told], there: &BTreeMap<u64, (&str, Option<&str>)>) {
        let (mut ids, mut texts, mut announced) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
        let mut before = self.from;
        for seen in &self.seen {
            match seen {
                Seen::Event(id, text, _) => {
                    assert!(texts.insert(text), "{}: {text:?} came twice", self.user);
                    ids.insert(*id);
                    before = *id;
                }
                Seen::Reset(to) => {
                    announced.extend(there.range(before + 1..=*to).map(|(id, _)| *id));
                    before = *to;
                }
            }
        }
        for text in told.iter().flat_map(|told| &told.refused) {
            assert!(!texts.contains(text), "{}: {text:?} was refused and came", self.user);
        }
        if self.seen.is_empty() {
            return;
        }
        for (id, (text, to)) in there.range(self.from + 1..=self.position()) {
            let is_for_others = to.is_some_and(|to| to != self.user);
            let known = ids.contains(id) || announced.contains(id) || is_for_others;
            assert!(known, "{}: {text:?} with id {id} is missing", self.user);
        }
    }
}
