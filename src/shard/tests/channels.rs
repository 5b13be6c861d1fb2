//! Checks every frame of sockets with several channels, in any order of subscribes, unsubscribes,
//! events, pages, evictions and short writes.

use mio::Poll;
use proptest::prelude::*;
use serde_json::Value;
use tokio::sync::mpsc;

use super::super::connections::token;
use super::super::*;
use super::peer::Peer;
use super::source::Source;
use super::testbed::masked;
use super::testbed::single_shard::SingleShard;
use crate::bus::{Answer, PageReader};
use crate::limits::connections::ConnectionLimits;
use crate::limits::connections::tests::counts;
use crate::protocol::event::{ChannelName, Entry, EventId};
use crate::protocol::form::{self, ChannelForm, Form};

const ROOMS: [&str; 3] = ["a", "b", "c"];

/// Users, and the rooms that are their default channels.
const CLIENTS: [(&str, Option<usize>); 3] = [("alice", Some(0)), ("bob", None), ("alice", Some(1))];

/// A channel of the bus.
struct Room {
    source: Source,
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
    peer: Peer,
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
            rooms: (1..=ROOMS.len() as u64)
                .map(|number| Room { source: Source::new(1000 * number), follows: [false; 2] })
                .collect(),
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
        let (user, default) = CLIENTS[number];
        let channel = default.map_or("", |room| ROOMS[room]);
        let path = format!("/ws/{user}?channel={channel}");
        let headers = "Sec-WebSocket-Protocol: fanfare.v1\r\n";
        let peer = Peer::connect(&mut self.shard, &self.limits, &path, headers);
        let mut rooms = [Following::No; ROOMS.len()];
        if let Some(room) = default {
            rooms[room] = Following::Asked(None);
        }
        let left = [None; ROOMS.len()];
        Client { peer, rooms, left }
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
                    let (base, position) = (EventId(room.source.base), EventId(room.source.head));
                    BusMessage::Followed { channel, base, position, recent: Vec::new() }
                }
                Request::Unfollow { channel, .. } => {
                    self.rooms[room_of(&channel.name)].follows[channel.form as usize] = false;
                    continue;
                }
                Request::Read { channel: name, position, reader, .. } => {
                    let PageReader::Shard(_, form) = reader else { panic!("the shard reads") };
                    let page = self.rooms[room_of(&name)].source.page(position);
                    let channel = ChannelForm { name, form };
                    BusMessage::Page { channel, position, result: Ok(Arc::new(page)) }
                }
                Request::Presence { .. } | Request::FollowPresence { .. } | Request::ReadPresence { .. } => {
                    continue;
                }
                Request::Refresh { channel, .. } => BusMessage::Refreshed { channel, result: Ok(()) },
                Request::Order { .. } => unreachable!("shards send none"),
                Request::Publish(publish) => {
                    let Answer::Connection(connection, regarding) = publish.answer else { continue };
                    BusMessage::Published { connection, regarding, result: Ok(EventId(1).into()) }
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
        self.clients.iter_mut().for_each(|client| client.peer.send(&[]));
        let all: Vec<u32> = self.shard.connections.slots().collect();
        for slot in all.into_iter().skip(from).take(count) {
            self.shard.on_ready(token(self.shard.connections.id(slot)), true, true, false);
        }
    }

    fn run(&mut self, step: &Step) -> Result<(), TestCaseError> {
        match *step {
            Step::Publish { room, to, count, size } => {
                let to = ["alice", "bob", "nobody"].get(to).map(|user| (*user).to_owned());
                let first = self.rooms[room].source.head + 1;
                (0..count).for_each(|_| self.rooms[room].source.publish(to.clone(), size));
                for entry in self.rooms[room].source.entries(first, u64::MAX) {
                    self.deliver(room, &entry);
                }
            }
            Step::PublishExternal { room } => {
                let entry = Entry::without_id(EventId(self.rooms[room].source.head), br#"{"raw":1}"#);
                self.deliver(room, &entry);
            }
            Step::NewEpoch { room } => {
                let mark = self.rooms[room].source.start_epoch();
                self.deliver(room, &mark);
            }
            Step::Subscribe { client, room, resumes } => {
                let client = &mut self.clients[client];
                if client.peer.upgraded && client.rooms[room] == Following::No {
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
            Step::Fanout { writes } => self.shard.visit_members(writes),
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
        self.clients[number].peer.read(bytes);
        while let Some((opcode, text)) = self.clients[number].peer.next_frame() {
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
        Ok(())
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
        let due = |at: u64| self.rooms[room].source.due(user, at);
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
        let due = self.rooms[room].source.due(CLIENTS[number].0, at);
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
                Following::Yes(at) => self.rooms[room].source.due(CLIENTS[number].0, at).is_none(),
                Following::Asked(_) | Following::Leaving(_) => false,
            };
            let all = (0..CLIENTS.len()).flat_map(|number| (0..ROOMS.len()).map(move |room| (number, room)));
            if all.into_iter().all(|(number, room)| is_settled(number, room)) && self.requests.is_empty() {
                return Ok(());
            }
        }
        let states: Vec<_> = self.clients.iter().map(|client| client.rooms).collect();
        let heads: Vec<_> = self.rooms.iter().map(|room| room.source.head).collect();
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
    fn send(&mut self, text: &str) {
        self.peer.send(&masked(1, text.as_bytes()));
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
