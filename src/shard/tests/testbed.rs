//! A real shard that runs step by step, and a bus that the test plays.

#[allow(dead_code, reason = "the integration tests use more of it")]
#[path = "../../../tests/common/single_shard.rs"]
pub mod single_shard;

use mio::Poll;
use tokio::sync::mpsc;

use self::single_shard::SingleShard;
use super::super::connections::token;
use super::super::*;
use super::peer::Peer;
use super::source::Source;
use crate::bus::{Answer, PublishError};
use crate::limits::connections::ConnectionLimits;
use crate::protocol::event::{ChannelName, Entry, EventId};

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

/// A client of the channel.
pub struct Client {
    pub peer: Peer,
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
    pub source: Source,
    pub is_followed: bool,
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
            source: Source::new(1000),
            is_followed: false,
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
        self.accepted += 1;
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
        let path = format!("/ws/{user}?channel=c{query}");
        let peer = Peer::connect(&mut self.shard, &self.limits, &path, protocol);
        Client { peer, position, history }
    }

    pub fn turn(&mut self) {
        self.ready(0, usize::MAX);
        self.shard.run_deferred();
        self.shard.end_turn();
    }

    /// Some of the sockets are ready.
    pub fn ready(&mut self, from: usize, count: usize) {
        self.clients.iter_mut().for_each(|client| client.peer.send(&[]));
        let all: Vec<u32> = self.shard.connections.slots().collect();
        for slot in all.into_iter().skip(from).take(count) {
            self.shard.on_ready(token(self.shard.connections.id(slot)), true, true, false);
        }
    }

    /// Sends the events from `first` on to the shard.
    pub fn deliver_from(&mut self, first: u64) {
        if self.is_followed {
            self.source.entries(first, self.source.head).into_iter().for_each(|entry| self.deliver(entry));
        }
    }

    pub fn deliver(&mut self, entry: Entry) {
        self.shard.on_bus_message(BusMessage::Entry {
            channel: self.channel.clone().into(),
            entry,
            arrived: Instant::now(),
        });
    }

    /// Answers the requests of the shard.
    pub fn answer(&mut self) {
        while let Ok(request) = self.requests.try_recv() {
            let message = match request {
                Request::Follow { channel, .. } => {
                    self.is_followed = true;
                    let (base, position) = (EventId(self.source.base), EventId(self.source.head));
                    BusMessage::Followed { channel, base, position, recent: Vec::new() }
                }
                Request::Unfollow { .. } => {
                    self.is_followed = false;
                    continue;
                }
                Request::Read { channel, position, .. } => {
                    let page = self.source.page(position);
                    BusMessage::Page { channel: channel.into(), position, result: Ok(Arc::new(page)) }
                }
                Request::Presence { .. } | Request::FollowPresence { .. } | Request::ReadPresence { .. } => {
                    continue;
                }
                Request::Refresh { channel, .. } => BusMessage::Refreshed { channel, result: Ok(()) },
                Request::Order { .. } => unreachable!("shards send none"),
                Request::Publish(publish) => {
                    let Answer::Connection(connection, regarding) = publish.answer else { continue };
                    let result = if self.source.head.is_multiple_of(4) {
                        Err(PublishError::Unknown)
                    } else {
                        self.source.publish(None, 10);
                        self.deliver_from(self.source.head);
                        Ok(EventId(self.source.head).into())
                    };
                    BusMessage::Published { connection, regarding, result }
                }
            };
            self.shard.on_bus_message(message);
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
