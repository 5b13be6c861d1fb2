//! A real shard that runs step by step, and a bus that the test plays. The sockets are Unix pairs
//! with small buffers, so that short writes need no waiting.

#[allow(dead_code, reason = "the integration tests use more of it")]
#[path = "../../../tests/common/single_shard.rs"]
pub mod single_shard;

use std::collections::{BTreeMap, VecDeque};
use std::io::Write;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use mio::Poll;
use socket2::SockRef;
use tokio::sync::mpsc;

use self::single_shard::SingleShard;
use super::super::connections::token;
use super::super::*;
use crate::bus::{Answer, BLOCK, Page, PublishError, block_start};
use crate::limits::connections::ConnectionLimits;
use crate::protocol::event::{ChannelName, Entry, EventId};

/// Events that history holds.
const HISTORY: usize = 60;

/// What a client asks for: `fanfare.v1`, recovery frames, or neither.
#[derive(Clone, Copy, PartialEq)]
pub enum Mode {
    Json,
    Recovering,
    Plain,
}

/// The clients' users and modes.
pub const CLIENTS: [(&str, Mode); 5] = [
    ("alice", Mode::Json),
    ("bob", Mode::Json),
    ("alice", Mode::Recovering),
    ("bob", Mode::Plain),
    ("carol", Mode::Json),
];

/// The client's end of a connection.
pub struct Client {
    pub socket: UnixStream,
    unsent: Vec<u8>,
    pub unparsed: Vec<u8>,
    pub upgraded: bool,
    /// The position at which it would resume.
    pub position: Option<u64>,
    /// How many events it asked for as a newcomer.
    pub history: Option<u64>,
}

pub struct Testbed {
    pub shard: Shard,
    pub requests: mpsc::UnboundedReceiver<Request>,
    pub limits: Arc<ConnectionLimits>,
    /// Sockets that the shard got.
    pub accepted: u64,
    pub channel: ChannelName,
    pub clients: Vec<Client>,
    pub base: u64,
    pub head: u64,
    pub is_followed: bool,
    /// Id, receiver and text of the events that history holds.
    pub history: VecDeque<(u64, Option<String>, String)>,
    /// The receiver of every event; `None` for all subscribers.
    pub receivers: BTreeMap<u64, Option<String>>,
    _poll: Poll,
}

impl Testbed {
    pub fn new() -> Testbed {
        let flags = [
            "--shards=1",
            "--max-message-size=4KiB",
            "--buffer-memory=8KiB",
            "--max-message-rate=0",
            "--max-connections-per-user=1000",
            "--ping-interval=1s",
            "--ping-timeout=1h",
            "--ping-format=both",
        ];
        let (single, context, _inbox) = SingleShard::connect(&flags, false).expect("good settings");
        let poll = Poll::new().expect("a poll");
        let registry = poll.registry().try_clone().expect("a descriptor");
        let shard = Shard::new(context, registry);
        let mut testbed = Testbed {
            shard,
            requests: single.asked,
            limits: single.limits,
            accepted: 0,
            channel: ChannelName::parse("c").expect("a name"),
            clients: Vec::new(),
            base: 1000,
            head: 1000,
            is_followed: false,
            history: VecDeque::new(),
            receivers: BTreeMap::new(),
            _poll: poll,
        };
        for number in 0..CLIENTS.len() {
            let client = testbed.connect(number, None, None);
            testbed.clients.push(client);
        }
        testbed
    }

    /// Connects a client that was at this position, or is a newcomer that asks for events from
    /// before.
    pub fn connect(&mut self, number: usize, position: Option<u64>, history: Option<u64>) -> Client {
        let (ours, theirs) = UnixStream::pair().expect("two sockets");
        for socket in [&ours, &theirs] {
            socket.set_nonblocking(true).expect("a socket");
        }
        SockRef::from(&theirs).set_send_buffer_size(4 << 10).expect("a socket");
        let theirs = std::net::TcpStream::from(OwnedFd::from(theirs));
        let connection_slot = self.limits.acquire(Ipv4Addr::LOCALHOST.into()).expect("there is room");
        self.accepted += 1;
        self.shard
            .handle_message(ShardMessage::Sockets(vec![(TcpStream::from_std(theirs), connection_slot)]));
        let (user, mode) = CLIENTS[number];
        let mut query = match (mode, position) {
            (Mode::Plain, _) => String::new(),
            (_, None) => "&lastEventId=".to_owned(),
            (_, Some(position)) => format!("&lastEventId={position}"),
        };
        if let Some(count) = history {
            query += &format!("&history={count}");
        }
        let protocol = if mode == Mode::Json { "Sec-WebSocket-Protocol: fanfare.v1\r\n" } else { "" };
        let request = format!(
            "GET /ws/{user}?channel=c{query} HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{protocol}\r\n"
        );
        (&ours).write_all(request.as_bytes()).expect("there is room");
        let (unsent, unparsed) = (Vec::new(), Vec::new());
        Client { socket: ours, unsent, unparsed, upgraded: false, position, history }
    }

    pub fn turn(&mut self) {
        self.ready(0, usize::MAX);
        self.shard.run_deferred();
        self.shard.end_turn();
    }

    /// Some of the sockets are ready.
    pub fn ready(&mut self, from: usize, count: usize) {
        self.clients.iter_mut().for_each(|client| client.send(&[]));
        let all: Vec<u32> = self.shard.connections.slots().collect();
        for slot in all.into_iter().skip(from).take(count) {
            self.shard.on_ready(token(self.shard.connections.id(slot)), true, true, true);
        }
    }

    /// Gives the next id to an event.
    pub fn publish(&mut self, to: Option<String>, size: usize) {
        self.head += 1;
        let text = format!(r#"{{"text":"{}","id":{}}}"#, "x".repeat(size), self.head);
        self.receivers.insert(self.head, to.clone());
        self.history.push_back((self.head, to, text));
        if self.history.len() > HISTORY {
            self.history.pop_front();
        }
    }

    /// Sends the events from `first` on to the shard.
    pub fn deliver_from(&mut self, first: u64) {
        if self.is_followed {
            self.entries(first, self.head).into_iter().for_each(|entry| self.deliver(entry));
        }
    }

    pub fn deliver(&mut self, entry: Entry) {
        self.shard.on_bus_message(BusMessage::Entry {
            channel: self.channel.clone().into(),
            entry,
            arrived: Instant::now(),
        });
    }

    /// The oldest id in history, or the next one.
    pub fn oldest(&self) -> u64 {
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

    /// Answers the requests of the shard.
    pub fn answer(&mut self) {
        while let Ok(request) = self.requests.try_recv() {
            let message = match request {
                Request::Follow { channel, .. } => {
                    self.is_followed = true;
                    let (base, position) = (EventId(self.base), EventId(self.head));
                    BusMessage::Followed { channel, base, position, recent: Vec::new() }
                }
                Request::Unfollow { .. } => {
                    self.is_followed = false;
                    continue;
                }
                Request::Read { channel, position, .. } => {
                    // Some answers start before the position, and some end before their page.
                    let before = block_start(position);
                    let after = if position.0.is_multiple_of(5) { position } else { before };
                    let end = before.0 + BLOCK;
                    let oldest = self.oldest();
                    let end =
                        if position.0.is_multiple_of(3) { end.min(oldest.max(position.0) + 7) } else { end };
                    let entries = self.entries(after.0 + 1, end);
                    let page = Page {
                        named: Default::default(),
                        after: entries.first().map_or(position, |first| first.before().min(position)),
                        base: EventId(self.base),
                        head: EventId(self.head),
                        oldest: EventId(oldest),
                        entries,
                    };
                    BusMessage::Page { channel: channel.into(), position, result: Ok(Arc::new(page)) }
                }
                Request::Refresh { channel, .. } => BusMessage::Refreshed { channel, result: Ok(()) },
                Request::Publish(publish) => {
                    let Answer::Connection(connection, regarding) = publish.answer else { continue };
                    let result = if self.head.is_multiple_of(4) {
                        Err(PublishError::Unknown)
                    } else {
                        self.publish(None, 10);
                        self.deliver_from(self.head);
                        Ok(EventId(self.head))
                    };
                    BusMessage::Published { connection, regarding, result }
                }
            };
            self.shard.on_bus_message(message);
        }
    }
}

impl Client {
    /// Sends as much as there is room for. Before the upgrade a client may not send anything.
    pub fn send(&mut self, bytes: &[u8]) {
        if !self.upgraded {
            return;
        }
        self.unsent.extend(bytes);
        if let Ok(written) = self.socket.write(&self.unsent) {
            self.unsent.drain(..written);
        }
    }
}

/// A client's frame with up to 125 bytes, masked with zeros.
pub fn masked(opcode: u8, payload: &[u8]) -> Vec<u8> {
    [&[0x80 | opcode, 0x80 | payload.len() as u8, 0, 0, 0, 0], payload].concat()
}

/// Removes a whole frame from the front.
pub fn take_frame(bytes: &mut Vec<u8>) -> Option<(u8, Vec<u8>)> {
    let (head, length) = match *bytes.get(1)? {
        126 => (4, usize::from(u16::from_be_bytes(bytes.get(2..4)?.try_into().ok()?))),
        short => (2, usize::from(short)),
    };
    let payload = bytes.get(head..head + length)?.to_vec();
    let opcode = bytes[0] & 15;
    bytes.drain(..head + length);
    Some((opcode, payload))
}
