//! Checks every frame of sockets with several channels, in any order of subscribes, unsubscribes,
//! events, pages, evictions and short writes.

use std::collections::{BTreeMap, VecDeque};
use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use mio::Poll;
use proptest::prelude::*;
use serde_json::Value;
use socket2::SockRef;
use tokio::sync::mpsc;

use super::super::connections::token;
use super::super::*;
use super::testbed::single_shard::SingleShard;
use super::testbed::{masked, take_frame};
use crate::bus::{Answer, BLOCK, Page, PageReader, block_start};
use crate::limits::connections::ConnectionLimits;
use crate::limits::connections::tests::counts;
use crate::protocol::event::{ChannelName, Entry, EventId};
use crate::protocol::form::{self, ChannelForm, Form};

const ROOMS: [&str; 3] = ["a", "b", "c"];

/// Users, and the rooms that are their default channels.
const CLIENTS: [(&str, Option<usize>); 3] = [("alice", Some(0)), ("bob", None), ("alice", Some(1))];

/// Events that history holds.
const HISTORY: usize = 60;

/// A channel of the bus.
struct Room {
    base: u64,
    head: u64,
    /// Id, receiver and text.
    history: VecDeque<(u64, Option<String>, String)>,
    /// The receiver of every event; `None` for all subscribers.
    receivers: BTreeMap<u64, Option<String>>,
    /// Whether the shard follows it, by form.
    follows: [bool; 2],
}

/// What a client knows of a room.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Following {
    No,
    /// It has asked, as a newcomer or from this position.
    Asked(Option<u64>),
    /// It has everything up to here.
    Yes(u64),
    /// It has asked to stop, after this.
    Leaving(Option<u64>),
}

struct Client {
    socket: UnixStream,
    unsent: Vec<u8>,
    unparsed: Vec<u8>,
    upgraded: bool,
    rooms: [Following; ROOMS.len()],
    /// Its position in each room when it last followed it.
    left: [Option<u64>; ROOMS.len()],
}

struct Testbed {
    shard: Shard,
    requests: mpsc::UnboundedReceiver<Request>,
    limits: Arc<ConnectionLimits>,
    rooms: Vec<Room>,
    clients: Vec<Client>,
    _poll: Poll,
}

#[derive(Clone, Debug)]
enum Step {
    Publish { room: usize, to: usize, count: u64, size: usize },
    PublishExternal { room: usize },
    NewEpoch { room: usize },
    Subscribe { client: usize, room: usize, resumes: bool },
    Unsubscribe { client: usize, room: usize },
    Ping { client: usize, count: usize },
    Read { client: usize, bytes: usize },
    Reconnect { client: usize },
    Answer,
    Turn,
    Ready { from: usize, count: usize },
    Fanout { writes: u64 },
    Tick,
}

fn step() -> impl Strategy<Value = Step> {
    let (client, room) = (0..CLIENTS.len(), 0..ROOMS.len());
    let size = prop_oneof![4 => 0..200_usize, 2 => 200..3000_usize];
    prop_oneof![
        8 => (room.clone(), 0..6_usize, 1..5_u64, size)
            .prop_map(|(room, to, count, size)| Step::Publish { room, to, count, size }),
        1 => room.clone().prop_map(|room| Step::PublishExternal { room }),
        1 => room.clone().prop_map(|room| Step::NewEpoch { room }),
        6 => (client.clone(), room.clone(), any::<bool>())
            .prop_map(|(client, room, resumes)| Step::Subscribe { client, room, resumes }),
        3 => (client.clone(), room).prop_map(|(client, room)| Step::Unsubscribe { client, room }),
        3 => (client.clone(), 1..60_usize).prop_map(|(client, count)| Step::Ping { client, count }),
        6 => (client.clone(), 1..9000_usize).prop_map(|(client, bytes)| Step::Read { client, bytes }),
        1 => client.prop_map(|client| Step::Reconnect { client }),
        5 => Just(Step::Answer),
        6 => Just(Step::Turn),
        6 => (0..4_usize, 1..4_usize).prop_map(|(from, count)| Step::Ready { from, count }),
        6 => (1..3_u64).prop_map(|writes| Step::Fanout { writes }),
        2 => Just(Step::Tick),
    ]
}

impl Room {
    fn new(number: usize) -> Room {
        let head = 1000 * (number as u64 + 1);
        Room { base: head, head, history: VecDeque::new(), receivers: BTreeMap::new(), follows: [false; 2] }
    }

    fn publish(&mut self, to: Option<String>, size: usize) {
        self.head += 1;
        let text = format!(r#"{{"text":"{}","id":{}}}"#, "x".repeat(size), self.head);
        self.receivers.insert(self.head, to.clone());
        self.history.push_back((self.head, to, text));
        if self.history.len() > HISTORY {
            self.history.pop_front();
        }
    }

    fn oldest(&self) -> u64 {
        self.history.front().map_or(self.head + 1, |(id, ..)| *id)
    }

    fn entries(&self, first: u64, last: u64) -> Vec<Entry> {
        let held: Vec<_> = self.history.iter().filter(|(id, ..)| (first..=last).contains(id)).collect();
        let entry = |some: &[&(u64, Option<String>, String)]| {
            let to = some[0].1.as_deref().map(Into::into);
            Entry::addressed(EventId(some[0].0), to, some.iter().map(|(_, _, text)| text.as_bytes()))
        };
        held.chunk_by(|a, b| a.1 == b.1).map(entry).collect()
    }

    fn page(&self, position: EventId) -> Page {
        let before = block_start(position);
        let after = if position.0.is_multiple_of(5) { position } else { before };
        let end = before.0 + BLOCK;
        let oldest = self.oldest();
        let end = if position.0.is_multiple_of(3) { end.min(oldest.max(position.0) + 7) } else { end };
        let entries = self.entries(after.0 + 1, end);
        Page {
            after: entries.first().map_or(position, |first| first.before().min(position)),
            base: EventId(self.base),
            head: EventId(self.head),
            oldest: EventId(oldest),
            entries,
            ..Page::default()
        }
    }
}

fn name(room: usize) -> ChannelName {
    ChannelName::parse(ROOMS[room]).expect("a name")
}

fn room_of(name: &ChannelName) -> usize {
    ROOMS.iter().position(|room| *room == name.as_str()).expect("a room")
}

impl Testbed {
    fn new() -> Testbed {
        let flags = [
            "--shards=1",
            "--max-message-size=4KiB",
            "--buffer-memory=8KiB",
            "--max-message-rate=0",
            "--ping-interval=1s",
            "--ping-timeout=1h",
            "--ping-format=both",
        ];
        let (single, context, _inbox) = SingleShard::connect(&flags, false).expect("good settings");
        let poll = Poll::new().expect("a poll");
        let registry = poll.registry().try_clone().expect("a descriptor");
        let mut testbed = Testbed {
            shard: Shard::new(context, registry),
            requests: single.asked,
            limits: single.limits,
            rooms: (0..ROOMS.len()).map(Room::new).collect(),
            clients: Vec::new(),
            _poll: poll,
        };
        for number in 0..CLIENTS.len() {
            let client = testbed.connect(number);
            testbed.clients.push(client);
        }
        testbed
    }

    fn connect(&mut self, number: usize) -> Client {
        let (ours, theirs) = UnixStream::pair().expect("two sockets");
        for socket in [&ours, &theirs] {
            socket.set_nonblocking(true).expect("a socket");
        }
        SockRef::from(&theirs).set_send_buffer_size(4 << 10).expect("a socket");
        let theirs = std::net::TcpStream::from(OwnedFd::from(theirs));
        let slot = self.limits.acquire(Ipv4Addr::LOCALHOST.into()).expect("there is room");
        self.shard.handle_message(ShardMessage::Sockets(vec![(TcpStream::from_std(theirs), slot)]));
        let (user, default) = CLIENTS[number];
        let channel = default.map_or("", |room| ROOMS[room]);
        let request = format!(
            "GET /ws/{user}?channel={channel} HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\n\
             Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
             Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: fanfare.v1\r\n\r\n"
        );
        (&ours).write_all(request.as_bytes()).expect("there is room");
        let mut rooms = [Following::No; ROOMS.len()];
        if let Some(room) = default {
            rooms[room] = Following::Asked(None);
        }
        let left = [None; ROOMS.len()];
        Client { socket: ours, unsent: Vec::new(), unparsed: Vec::new(), upgraded: false, rooms, left }
    }

    /// Sends an entry to the shard in the forms that it follows.
    fn deliver(&mut self, room: usize, entry: &Entry) {
        for (form, follows) in [Form::Unnamed, Form::Named].into_iter().zip(self.rooms[room].follows) {
            let entry = match form {
                Form::Unnamed => entry.clone(),
                Form::Named => form::named(entry, &name(room)),
            };
            if follows {
                let channel = ChannelForm { name: name(room), form };
                let arrived = Instant::now();
                self.shard.on_bus_message(BusMessage::Entry { channel, entry, arrived });
            }
        }
    }

    fn answer(&mut self) {
        while let Ok(request) = self.requests.try_recv() {
            let message = match request {
                Request::Follow { channel, .. } => {
                    let room = &mut self.rooms[room_of(&channel.name)];
                    room.follows[channel.form as usize] = true;
                    let (base, position) = (EventId(room.base), EventId(room.head));
                    BusMessage::Followed { channel, base, position, recent: Vec::new() }
                }
                Request::Unfollow { channel, .. } => {
                    self.rooms[room_of(&channel.name)].follows[channel.form as usize] = false;
                    continue;
                }
                Request::Read { channel: name, position, reader, .. } => {
                    let PageReader::Shard(_, form) = reader else { panic!("the shard reads") };
                    let page = self.rooms[room_of(&name)].page(position);
                    let channel = ChannelForm { name, form };
                    BusMessage::Page { channel, position, result: Ok(Arc::new(page)) }
                }
                Request::Refresh { channel, .. } => BusMessage::Refreshed { channel, result: Ok(()) },
                Request::Publish(publish) => {
                    let Answer::Connection(connection, regarding) = publish.answer else { continue };
                    BusMessage::Published { connection, regarding, result: Ok(EventId(1)) }
                }
            };
            self.shard.on_bus_message(message);
        }
    }

    fn turn(&mut self) {
        self.ready(0, usize::MAX);
        self.shard.run_deferred();
        self.shard.end_turn();
    }

    fn ready(&mut self, from: usize, count: usize) {
        self.clients.iter_mut().for_each(|client| client.send(""));
        let all: Vec<u32> = self.shard.connections.slots().collect();
        for slot in all.into_iter().skip(from).take(count) {
            self.shard.on_ready(token(self.shard.connections.id(slot)), true, true, true);
        }
    }

    fn run(&mut self, step: &Step) -> Result<(), TestCaseError> {
        match *step {
            Step::Publish { room, to, count, size } => {
                let to = ["alice", "bob", "nobody"].get(to).map(|user| (*user).to_owned());
                let first = self.rooms[room].head + 1;
                (0..count).for_each(|_| self.rooms[room].publish(to.clone(), size));
                for entry in self.rooms[room].entries(first, u64::MAX) {
                    self.deliver(room, &entry);
                }
            }
            Step::PublishExternal { room } => {
                let entry = Entry::without_id(EventId(self.rooms[room].head), br#"{"raw":1}"#);
                self.deliver(room, &entry);
            }
            Step::NewEpoch { room } => {
                self.rooms[room].head += 1000;
                self.rooms[room].base = self.rooms[room].head;
                self.rooms[room].history.clear();
                self.deliver(room, &Entry::reset(EventId(self.rooms[room].base)));
            }
            Step::Subscribe { client, room, resumes } => {
                let client = &mut self.clients[client];
                if client.upgraded && client.rooms[room] == Following::No {
                    let last = client.left[room].filter(|_| resumes);
                    let shown = last.map_or("null".into(), |last| last.to_string());
                    let channel = ROOMS[room];
                    client.rooms[room] = Following::Asked(last);
                    client.send(&format!(
                        r#"{{"type":"subscribe","channel":"{channel}","lastEventId":{shown}}}"#
                    ));
                }
            }
            Step::Unsubscribe { client, room } if CLIENTS[client].1 != Some(room) => {
                let client = &mut self.clients[client];
                let at = match client.rooms[room] {
                    Following::Yes(at) => Some(at),
                    Following::Asked(at) => at,
                    Following::No | Following::Leaving(_) => return Ok(()),
                };
                client.rooms[room] = Following::Leaving(at);
                client.send(&format!(r#"{{"type":"unsubscribe","channel":"{}"}}"#, ROOMS[room]));
            }
            Step::Unsubscribe { .. } => {}
            Step::Ping { client, count } => {
                (0..count).for_each(|_| self.clients[client].send(r#"{"type":"ping"}"#));
            }
            Step::Read { client, bytes } => self.read(client, bytes)?,
            Step::Reconnect { client } => self.clients[client] = self.connect(client),
            Step::Answer => self.answer(),
            Step::Turn => self.turn(),
            Step::Ready { from, count } => self.ready(from, count),
            Step::Fanout { writes } => self.shard.run_fanout(writes),
            Step::Tick => self.shard.on_tick(),
        }
        for room in 0..ROOMS.len() {
            for form in [Form::Unnamed, Form::Named] {
                if let Some(key) = self.shard.channels.key(&ChannelForm { name: name(room), form }) {
                    self.shard.channels[key].assert_consistent(&self.shard.connections);
                }
            }
        }
        Ok(())
    }

    fn read(&mut self, number: usize, bytes: usize) -> Result<(), TestCaseError> {
        let client = &mut self.clients[number];
        let mut buffer = vec![0; bytes];
        match client.socket.read(&mut buffer) {
            Ok(read) => client.unparsed.extend(&buffer[..read]),
            Err(_) => return Ok(()),
        }
        loop {
            let client = &mut self.clients[number];
            if !client.upgraded {
                let Some(end) = client.unparsed.windows(4).position(|four| four == b"\r\n\r\n") else {
                    return Ok(());
                };
                prop_assert!(client.unparsed.starts_with(b"HTTP/1.1 101"));
                client.unparsed.drain(..end + 4);
                client.upgraded = true;
            }
            let Some((opcode, text)) = take_frame(&mut client.unparsed) else { return Ok(()) };
            match opcode {
                1 => {
                    let frame = serde_json::from_slice(&text);
                    prop_assert!(frame.is_ok(), "frames are mixed: {}", text.escape_ascii());
                    self.check_frame(number, &frame.expect("it is"))?;
                }
                9 => prop_assert!(text.is_empty()),
                _ => prop_assert!(false, "opcode {opcode}"),
            }
        }
    }

    fn check_frame(&mut self, number: usize, frame: &Value) -> Result<(), TestCaseError> {
        let (user, default) = CLIENTS[number];
        let kind = frame["type"].as_str();
        if kind == Some("ping") {
            if let (Some(room), Some(position)) = (default, frame["lastEventId"].as_u64()) {
                self.check_position(number, room, position, frame)?;
            }
            for (channel, position) in frame["channels"].as_object().into_iter().flatten() {
                let room = room_of(&ChannelName::parse(channel).expect("a name"));
                self.check_position(number, room, position.as_u64().expect("a position"), frame)?;
            }
            return Ok(());
        }
        let room = match frame["channel"].as_str() {
            Some(channel) => room_of(&ChannelName::parse(channel).expect("a name")),
            None if kind == Some("welcome") && default.is_none() => return Ok(()),
            None => default.expect("only a default channel has no name"),
        };
        prop_assert_eq!(frame["channel"].is_null(), default == Some(room), "{}", frame);
        let due = |at: u64| self.rooms[room].due(user, at);
        let state = self.clients[number].rooms[room];
        let last = frame["lastEventId"].as_u64();
        let next = match (kind, state) {
            (Some("welcome"), Following::Asked(asked)) => {
                let last = last.expect("a position");
                if let (Some(asked), Some(true)) = (asked, frame["recovered"].as_bool()) {
                    prop_assert_eq!(last, asked, "it resumes where it was: {}", frame);
                }
                Following::Yes(last)
            }
            (Some("welcome"), Following::Leaving(_)) => Following::Leaving(last),
            (Some("reset"), Following::Yes(at) | Following::Leaving(Some(at))) => {
                prop_assert!(last >= Some(at), "a reset goes back from {}: {}", at, frame);
                state.moved(last.expect("a position"))
            }
            (Some("unsubscribed"), Following::Leaving(at)) => {
                self.clients[number].left[room] = at;
                Following::No
            }
            (Some(_), _) => {
                prop_assert!(false, "{:?}: {}", state, frame);
                state
            }
            (None, Following::Yes(at) | Following::Leaving(Some(at))) => match frame["id"].as_u64() {
                None => state,
                id => {
                    prop_assert_eq!(id, due(at), "client {} room {} had {}", number, room, at);
                    state.moved(id.expect("an id"))
                }
            },
            (None, _) => {
                prop_assert!(false, "an event without a welcome, or after unsubscribed: {}", frame);
                state
            }
        };
        self.clients[number].rooms[room] = next;
        Ok(())
    }

    /// Checks a position that a ping shows.
    fn check_position(
        &mut self,
        number: usize,
        room: usize,
        position: u64,
        ping: &Value,
    ) -> Result<(), TestCaseError> {
        let state = self.clients[number].rooms[room];
        let (Following::Yes(at) | Following::Leaving(Some(at))) = state else {
            prop_assert!(false, "{:?}: {}", state, ping);
            return Ok(());
        };
        let due = self.rooms[room].due(CLIENTS[number].0, at);
        prop_assert!(position >= at, "client {} had {} in {}: {}", number, at, room, ping);
        prop_assert!(due.is_none_or(|due| due > position), "client {} lacks {:?}: {}", number, due, ping);
        self.clients[number].rooms[room] = state.moved(position);
        Ok(())
    }

    /// Runs until every client has read to the head of every room that it follows.
    fn settle(&mut self) -> Result<(), TestCaseError> {
        for _ in 0..3000 {
            self.answer();
            self.turn();
            self.shard.on_tick();
            for number in 0..CLIENTS.len() {
                self.read(number, 4000)?;
            }
            let is_settled = |number: usize, room: usize| match self.clients[number].rooms[room] {
                Following::No => true,
                Following::Yes(at) => self.rooms[room].due(CLIENTS[number].0, at).is_none(),
                Following::Asked(_) | Following::Leaving(_) => false,
            };
            let all = (0..CLIENTS.len()).flat_map(|number| (0..ROOMS.len()).map(move |room| (number, room)));
            if all.into_iter().all(|(number, room)| is_settled(number, room)) && self.requests.is_empty() {
                return Ok(());
            }
        }
        let states: Vec<_> = self.clients.iter().map(|client| client.rooms).collect();
        let heads: Vec<_> = self.rooms.iter().map(|room| room.head).collect();
        prop_assert!(false, "{:?} of {:?}", states, heads);
        Ok(())
    }

    /// Closes all connections, which frees everything that they held.
    fn end(mut self) -> Result<(), TestCaseError> {
        self.clients.clear();
        for slot in self.shard.connections.slots().collect::<Vec<_>>() {
            self.shard.on_ready(token(self.shard.connections.id(slot)), true, true, true);
        }
        for _ in 0..20 {
            self.answer();
            self.turn();
            self.shard.on_tick();
        }
        prop_assert_eq!(self.shard.connections.len(), 0);
        prop_assert_eq!(self.shard.connections.subscriptions(), 0);
        prop_assert_eq!(counts(&self.limits), [0; 4], "connections, rejections, addresses, users");
        prop_assert!(!self.shard.has_deferred() && self.requests.is_empty());
        Ok(())
    }
}

impl Room {
    /// The first event for this user after a position.
    fn due(&self, user: &str, at: u64) -> Option<u64> {
        let mine = |to: &Option<String>| to.as_deref().is_none_or(|to| to == user);
        self.receivers.range(at + 1..).find(|(_, to)| mine(to)).map(|(id, _)| *id)
    }
}

impl Following {
    /// The same at another position.
    fn moved(self, to: u64) -> Following {
        match self {
            Following::Leaving(_) => Following::Leaving(Some(to)),
            _ => Following::Yes(to),
        }
    }
}

impl Client {
    /// Sends a text, as far as there is room. Before the upgrade nothing is sent.
    fn send(&mut self, text: &str) {
        if !self.upgraded {
            return;
        }
        if !text.is_empty() {
            self.unsent.extend(masked(1, text.as_bytes()));
        }
        if let Ok(written) = self.socket.write(&self.unsent) {
            self.unsent.drain(..written);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// In each channel a client gets its events in order and without a gap, unless a reset or a
    /// welcome precedes the gap; between its welcome and `unsubscribed`. Frames are never mixed.
    #[test]
    fn every_channel_of_a_socket_keeps_its_order(steps in prop::collection::vec(step(), 1..400)) {
        let mut testbed = Testbed::new();
        for step in &steps {
            testbed.run(step)?;
        }
        testbed.settle()?;
        testbed.end()?;
    }
}
