//! Checks every frame that clients get, under any order of events, pages, evictions, pings and
//! short writes. The shard is real and runs step by step; its sockets are Unix pairs with small
//! buffers, so that short writes need no waiting.

use std::collections::{BTreeMap, VecDeque};
use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use proptest::prelude::*;
use serde_json::Value;
use socket2::SockRef;
use tokio::sync::mpsc;

use super::connections::token;
use super::deferred::FANOUT_WRITES;
use super::*;
use crate::auth::keys::KeyRing;
use crate::bus::{Answer, PAGE, Page, PublishError, page_start};
use crate::config::Action;
use crate::limits::connections::ConnectionLimits;
use crate::metrics::{BusMetrics, Readiness};
use crate::protocol::event::{ChannelName, Entry, EventId};
use crate::ws::connection::State;
use crate::ws::handshake::HandshakeContext;

/// Events that history holds.
const HISTORY: usize = 60;

/// What happens next.
#[derive(Clone, Debug)]
enum Step {
    /// The bus takes events of this size for everybody.
    Publish { count: u64, size: usize },
    /// The bus takes events of this size for one user.
    PublishTo { user: usize, count: u64, size: usize },
    /// An event without id comes.
    Raw,
    /// The sequence starts again, further on.
    Anchor,
    /// A client sends this many pings.
    Ping { client: usize, count: usize },
    /// A client publishes this often.
    Send { client: usize, count: usize },
    /// A client reads this many bytes.
    Read { client: usize, bytes: usize },
    /// A client leaves and comes back.
    Rejoin { client: usize },
    /// The bus answers what it was asked.
    Answer,
    /// A turn of the shard's loop,
    Turn,
    /// or its first half: some of the sockets are ready.
    Ready { from: usize, count: usize },
    /// Fan-outs go on for this many writes.
    Fanout { writes: u64 },
    /// A tick.
    Tick,
}

fn step() -> impl Strategy<Value = Step> {
    let client = 0..CLIENTS.len();
    let size = prop_oneof![4 => 0..200_usize, 2 => 200..3000_usize];
    prop_oneof![
        6 => (1..5_u64, size.clone()).prop_map(|(count, size)| Step::Publish { count, size }),
        2 => (0..3_usize, 1..3_u64, size).prop_map(|(user, count, size)| Step::PublishTo { user, count, size }),
        1 => Just(Step::Raw),
        1 => Just(Step::Anchor),
        3 => (client.clone(), 1..120_usize).prop_map(|(client, count)| Step::Ping { client, count }),
        1 => (client.clone(), 1..40_usize).prop_map(|(client, count)| Step::Send { client, count }),
        5 => (client.clone(), 1..8000_usize).prop_map(|(client, bytes)| Step::Read { client, bytes }),
        2 => client.prop_map(|client| Step::Rejoin { client }),
        4 => Just(Step::Answer),
        6 => Just(Step::Turn),
        6 => (0..8_usize, 1..8_usize).prop_map(|(from, count)| Step::Ready { from, count }),
        6 => (1..3_u64).prop_map(|writes| Step::Fanout { writes }),
        2 => Just(Step::Tick),
    ]
}

/// How a client speaks.
#[derive(Clone, Copy, PartialEq)]
enum Mode {
    Json,
    Recovering,
    Plain,
}

/// The clients' users and modes.
const CLIENTS: [(&str, Mode); 5] = [
    ("alice", Mode::Json),
    ("bob", Mode::Json),
    ("alice", Mode::Recovering),
    ("bob", Mode::Plain),
    ("carol", Mode::Json),
];

/// One client's side.
struct Client {
    socket: UnixStream,
    unsent: Vec<u8>,
    unparsed: Vec<u8>,
    upgraded: bool,
    /// The position that it would resume from.
    at: Option<u64>,
}

struct Testbed {
    shard: Shard,
    asked: mpsc::UnboundedReceiver<Request>,
    limits: Arc<ConnectionLimits>,
    name: ChannelName,
    clients: Vec<Client>,
    base: u64,
    head: u64,
    follows: bool,
    /// What history holds.
    history: VecDeque<(u64, Option<String>, String)>,
    /// Every event's receiver.
    given: BTreeMap<u64, Option<String>>,
    _poll: Poll,
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
        let Ok(Action::Run(settings)) = Settings::from(flags.iter().map(Into::into), []) else {
            panic!("these settings are good")
        };
        let (poll, waker) = poll().expect("a poll");
        let (inbox_tx, inbox) = mpsc::unbounded_channel();
        let (requests, asked) = mpsc::unbounded_channel();
        let metrics = Metrics::new(1, Arc::new(BusMetrics::default()), Arc::new(Readiness::default()));
        let metrics = Arc::new(metrics);
        let keys = Arc::new(KeyRing::load(&settings).expect("no keys are needed"));
        let limits = Arc::new(ConnectionLimits::new(&settings));
        let readiness = metrics.readiness.clone();
        let context = HandshakeContext {
            settings: Arc::new(settings),
            readiness,
            keys,
            limits: limits.clone(),
            loopback: Arc::default(),
        };
        let shards = Mailboxes::new(vec![inbox_tx]);
        let wiring = ShardContext {
            id: 0,
            context,
            requests,
            shards,
            poll,
            inbox,
            waker,
            metrics,
            unsent: Arc::default(),
            takes_binary: false,
        };
        let (shard, poll, ..) = assemble(wiring).expect("a shard");
        let mut testbed = Testbed {
            shard,
            asked,
            limits,
            name: ChannelName::parse("c").expect("a name"),
            clients: Vec::new(),
            base: 1000,
            head: 1000,
            follows: false,
            history: VecDeque::new(),
            given: BTreeMap::new(),
            _poll: poll,
        };
        for number in 0..CLIENTS.len() {
            let client = testbed.connect(number, None);
            testbed.clients.push(client);
        }
        testbed
    }

    fn connect(&mut self, number: usize, at: Option<u64>) -> Client {
        let (ours, theirs) = UnixStream::pair().expect("two sockets");
        for socket in [&ours, &theirs] {
            socket.set_nonblocking(true).expect("a socket");
        }
        SockRef::from(&theirs).set_send_buffer_size(4 << 10).expect("a socket");
        let theirs = std::net::TcpStream::from(OwnedFd::from(theirs));
        let connection_slot = self.limits.acquire(Ipv4Addr::LOCALHOST.into()).expect("there is room");
        self.shard.handle_message(ShardMessage::Socket(TcpStream::from_std(theirs), connection_slot));
        let (user, mode) = CLIENTS[number];
        let query = match (mode, at) {
            (Mode::Plain, _) => String::new(),
            (_, None) => "&lastEventId=".to_owned(),
            (_, Some(at)) => format!("&lastEventId={at}"),
        };
        let protocol = if mode == Mode::Json { "Sec-WebSocket-Protocol: fanfare.v1\r\n" } else { "" };
        let request = format!(
            "GET /ws/{user}?channel=c{query} HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{protocol}\r\n"
        );
        (&ours).write_all(request.as_bytes()).expect("there is room");
        let (unsent, unparsed) = (Vec::new(), Vec::new());
        Client { socket: ours, unsent, unparsed, upgraded: false, at }
    }

    fn run(&mut self, step: &Step) -> Result<(), TestCaseError> {
        match step {
            Step::Publish { count, size } => {
                let first = self.head + 1;
                (0..*count).for_each(|_| self.give(None, *size));
                self.tell(first);
            }
            Step::PublishTo { user, count, size } => {
                let first = self.head + 1;
                let user = ["alice", "bob", "nobody"][*user];
                (0..*count).for_each(|_| self.give(Some(user.to_owned()), *size));
                self.tell(first);
            }
            Step::Raw if self.follows => self.entry(Entry::plain(EventId(self.head), br#"{"raw":1}"#)),
            Step::Raw => {}
            Step::Anchor => {
                self.head += 1000;
                self.base = self.head;
                self.history.clear();
                if self.follows {
                    self.entry(Entry::reset(EventId(self.base)));
                }
            }
            Step::Ping { client, count } => {
                let ping = match CLIENTS[*client].1 {
                    Mode::Json => masked(1, br#"{"type":"ping"}"#),
                    Mode::Recovering | Mode::Plain => masked(9, b""),
                };
                self.clients[*client].sends(&ping.repeat(*count));
            }
            Step::Send { client, count } => {
                let text = match CLIENTS[*client].1 {
                    Mode::Json => r#"{"text":"a","ref":1}"#,
                    Mode::Recovering | Mode::Plain => "a",
                };
                self.clients[*client].sends(&masked(1, text.as_bytes()).repeat(*count));
            }
            Step::Read { client, bytes } => self.read(*client, *bytes)?,
            Step::Rejoin { client } => {
                let at = self.clients[*client].at.filter(|_| CLIENTS[*client].1 != Mode::Plain);
                self.clients[*client] = self.connect(*client, at);
            }
            Step::Answer => self.answer(),
            Step::Turn => self.turn(),
            Step::Ready { from, count } => self.ready(*from, *count),
            Step::Fanout { writes } => self.shard.run_fanout(*writes),
            Step::Tick => self.shard.on_tick(),
        }
        for slot in self.shard.connections.slots() {
            let connection = &self.shard.connections[slot];
            let (own, frame) = connection.unsent();
            prop_assert_eq!(connection.queued() > 0, own > 0 || frame.is_some(), "what waits is counted");
        }
        Ok(())
    }

    fn turn(&mut self) {
        self.ready(0, usize::MAX);
        self.shard.run_deferred();
        self.shard.free_discarded();
    }

    fn ready(&mut self, from: usize, count: usize) {
        self.clients.iter_mut().for_each(|client| client.sends(&[]));
        let all: Vec<u32> = self.shard.connections.slots().collect();
        for slot in all.into_iter().skip(from).take(count) {
            self.shard.on_ready(token(self.shard.connections.id(slot)), true, true, true);
        }
    }

    /// Gives the next id.
    fn give(&mut self, to: Option<String>, size: usize) {
        self.head += 1;
        let text = format!(r#"{{"text":"{}","id":{}}}"#, "x".repeat(size), self.head);
        self.given.insert(self.head, to.clone());
        self.history.push_back((self.head, to, text));
        if self.history.len() > HISTORY {
            self.history.pop_front();
        }
    }

    fn tell(&mut self, first: u64) {
        if self.follows {
            self.entries(first, self.head).into_iter().for_each(|entry| self.entry(entry));
        }
    }

    fn entry(&mut self, entry: Entry) {
        self.shard.on_bus_message(BusMessage::Entry {
            channel: self.name.clone(),
            entry,
            arrived: Instant::now(),
        });
    }

    fn entries(&self, first: u64, last: u64) -> Vec<Entry> {
        let held: Vec<_> = self.history.iter().filter(|(id, ..)| (first..=last).contains(id)).collect();
        let entry = |some: &[&(u64, Option<String>, String)]| {
            let to = some[0].1.as_deref().map(Into::into);
            Entry::addressed(EventId(some[0].0), to, some.iter().map(|(_, _, text)| text.as_bytes()))
        };
        held.chunk_by(|a, b| a.1 == b.1).map(entry).collect()
    }

    fn answer(&mut self) {
        while let Ok(request) = self.asked.try_recv() {
            let message = match request {
                Request::Follow { channel, .. } => {
                    self.follows = true;
                    let (base, position) = (EventId(self.base), EventId(self.head));
                    BusMessage::Followed { channel, base, position, recent: Vec::new() }
                }
                Request::Unfollow { .. } => {
                    self.follows = false;
                    continue;
                }
                Request::Read { channel, position, .. } => {
                    // Some answers begin before the position, and some end before their page does.
                    let begin = page_start(position);
                    let after = if position.0.is_multiple_of(5) { position } else { begin };
                    let end = begin.0 + PAGE;
                    let oldest = self.history.front().map_or(self.head + 1, |(id, ..)| *id);
                    let end =
                        if position.0.is_multiple_of(3) { end.min(oldest.max(position.0) + 7) } else { end };
                    let entries = self.entries(after.0 + 1, end);
                    let page = Page {
                        after: entries.first().map_or(position, |first| first.before().min(position)),
                        base: EventId(self.base),
                        head: EventId(self.head),
                        oldest: EventId(oldest),
                        entries,
                    };
                    BusMessage::Page { channel, position, result: Ok(Arc::new(page)) }
                }
                Request::Refresh { channel, .. } => BusMessage::Refreshed { channel, result: Ok(()) },
                Request::Publish(publish) => {
                    let Answer::Connection(connection, reference) = publish.answer else { continue };
                    let result = if self.head.is_multiple_of(4) {
                        Err(PublishError::Unknown)
                    } else {
                        self.give(None, 10);
                        self.tell(self.head);
                        Ok(EventId(self.head))
                    };
                    BusMessage::Published { connection, reference, result }
                }
            };
            self.shard.on_bus_message(message);
        }
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
                let head = b"\r\n\r\n";
                let Some(end) = client.unparsed.windows(4).position(|four| four == head) else {
                    return Ok(());
                };
                prop_assert!(client.unparsed.starts_with(b"HTTP/1.1 101"));
                client.unparsed.drain(..end + 4);
                client.upgraded = true;
            }
            let Some((opcode, text)) = take_frame(&mut client.unparsed) else { return Ok(()) };
            match opcode {
                1 => self.check_frame(number, &serde_json::from_slice(&text).expect("JSON"))?,
                8 => {
                    let code = u16::from_be_bytes([text[0], text[1]]);
                    prop_assert!(matches!(code, 4008 | 1013) && CLIENTS[number].1 == Mode::Plain, "{}", code);
                    client.at = None;
                }
                _ => {}
            }
        }
    }

    /// Checks one frame against what the client had before.
    fn check_frame(&mut self, number: usize, frame: &Value) -> Result<(), TestCaseError> {
        let user = CLIENTS[number].0;
        let mine = |to: &Option<String>| to.as_deref().is_none_or(|to| to == user);
        let at = self.clients[number].at;
        // The first event that it has not had.
        let due = at.and_then(|at| self.given.range(at + 1..).find(|(_, to)| mine(to))).map(|(id, _)| *id);
        let position = frame["lastEventId"].as_u64();
        let now = match frame["type"].as_str() {
            Some("welcome") if frame["recovered"] == true && at.is_some() => {
                prop_assert_eq!(position, at, "client {} resumes where it was", number);
                position
            }
            Some("welcome") => position,
            Some("reset") => {
                prop_assert!(position >= at, "client {}: a reset goes back from {:?}: {}", number, at, frame);
                position
            }
            Some("ping") => {
                let Some(position) = position else { return Ok(()) };
                prop_assert!(Some(position) >= at, "client {} had {:?}, then {}", number, at, frame);
                prop_assert!(
                    due.is_none_or(|due| due > position),
                    "client {} lacks {:?}: {}",
                    number,
                    due,
                    frame
                );
                Some(position)
            }
            Some(_) => return Ok(()),
            None => match frame["id"].as_u64() {
                None => return Ok(()),
                id if at.is_none() => id,
                id => {
                    prop_assert_eq!(id, due, "client {} had {:?}", number, at);
                    id
                }
            },
        };
        self.clients[number].at = now;
        Ok(())
    }

    /// Every client reads to the head.
    fn settle(&mut self) -> Result<(), TestCaseError> {
        for _ in 0..2000 {
            self.answer();
            self.turn();
            self.shard.on_tick();
            for number in 0..CLIENTS.len() {
                self.read(number, 4000)?;
            }
            let behind = |(number, client): (usize, &Client)| {
                let mine = |to: &Option<String>| to.as_deref().is_none_or(|to| to == CLIENTS[number].0);
                let at = client.at.unwrap_or(self.head);
                self.given.range(at + 1..).any(|(_, to)| mine(to))
            };
            let busy = !self.asked.is_empty() || self.shard.has_deferred();
            if !busy && !self.clients.iter().enumerate().any(behind) {
                return Ok(());
            }
        }
        let at: Vec<_> = self.clients.iter().map(|client| client.at).collect();
        prop_assert!(false, "at {:?} of {}", at, self.head);
        Ok(())
    }
}

impl Client {
    /// Sends as much as there is room for. Before the upgrade a client may not speak.
    fn sends(&mut self, bytes: &[u8]) {
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
fn masked(opcode: u8, payload: &[u8]) -> Vec<u8> {
    [&[0x80 | opcode, 0x80 | payload.len() as u8, 0, 0, 0, 0], payload].concat()
}

/// Takes a whole frame from the front.
fn take_frame(bytes: &mut Vec<u8>) -> Option<(u8, Vec<u8>)> {
    let (head, length) = match *bytes.get(1)? {
        126 => (4, usize::from(u16::from_be_bytes(bytes.get(2..4)?.try_into().ok()?))),
        short => (2, usize::from(short)),
    };
    let payload = bytes.get(head..head + length)?.to_vec();
    let opcode = bytes[0] & 15;
    bytes.drain(..head + length);
    Some((opcode, payload))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// A client gets its events in order and without a gap, unless a reset or a welcome comes
    /// before the gap. A ping shows a position up to which it has all of its events, and that no
    /// later ping goes behind.
    #[test]
    fn positions_hold_at_their_place_on_the_wire(steps in prop::collection::vec(step(), 1..400)) {
        let mut testbed = Testbed::new();
        for step in &steps {
            testbed.run(step)?;
        }
        testbed.settle()?;
    }
}

/// Whatever is sent to however many connections, a turn makes a bounded number of writes, and each
/// connection takes few.
#[test]
fn a_burst_is_written_in_turns() {
    const READERS: usize = 600;
    let _ = rlimit::increase_nofile_limit(u64::MAX);
    let mut testbed = Testbed::new();
    let mut readers: Vec<_> = (0..READERS).map(|_| testbed.connect(2, Some(1000))).collect();
    let mut buffer = [0; 64 * 1024];
    let mut drain = |readers: &mut Vec<Client>| {
        for reader in readers {
            while reader.socket.read(&mut buffer).is_ok_and(|read| read > 0) {}
        }
    };
    let live = |shard: &Shard| {
        let is_live = |slot: &u32| matches!(shard.connections[*slot].state, State::Live);
        shard.connections.slots().filter(is_live).count()
    };
    while live(&testbed.shard) < READERS + CLIENTS.len() {
        testbed.turn();
        testbed.answer();
    }
    for name in ["public", "private", "plain", "mixed"] {
        drain(&mut readers);
        for n in 0..30 {
            match (name, n % 3) {
                ("plain", _) | ("mixed", 0) => testbed.entry(Entry::plain(EventId(testbed.head), b"{}")),
                ("private", _) | ("mixed", 1) => {
                    testbed.give(Some("alice".to_owned()), 0);
                    testbed.tell(testbed.head);
                }
                _ => {
                    testbed.give(None, 0);
                    testbed.tell(testbed.head);
                }
            }
        }
        let (mut total, mut turns) = (0, 0);
        while testbed.shard.has_deferred() {
            let before = testbed.shard.tally.writes;
            testbed.shard.run_deferred();
            let writes = testbed.shard.tally.writes - before;
            assert!(writes <= FANOUT_WRITES, "{name}: {writes} writes in a turn");
            (total, turns) = (total + writes, turns + 1);
        }
        let most = READERS + CLIENTS.len();
        assert!(
            total >= READERS as u64 && total <= 2 * most as u64,
            "{name}: {total} writes in {turns} turns"
        );
    }
}

/// Events without id come in one turn, which together are longer than the shard's part of memory
/// for feeds. Gives how many of them each client got.
fn bare_events(sizes: &[usize], turns_first: bool) -> (Testbed, Vec<usize>) {
    let mut testbed = Testbed::new();
    let follows = |testbed: &Testbed| {
        let key = testbed.shard.channels.key(&testbed.name);
        key.is_some_and(|key| testbed.shard.channels[key].members.len() == CLIENTS.len())
    };
    while !follows(&testbed) || testbed.shard.has_deferred() {
        testbed.turn();
        testbed.answer();
    }
    for size in sizes {
        let text = format!(r#"{{"bare":"{}"}}"#, "x".repeat(*size));
        testbed.entry(Entry::plain(EventId(testbed.head), text.as_bytes()));
        if turns_first {
            testbed.turn();
        }
    }
    let mut counts = vec![0; CLIENTS.len()];
    let (mut buffer, mut still) = (vec![0; 64 * 1024], 0);
    while still < 3 {
        still += 1;
        testbed.turn();
        for (client, count) in testbed.clients.iter_mut().zip(&mut counts) {
            while let Ok(read) = client.socket.read(&mut buffer) {
                client.unparsed.extend(&buffer[..read]);
                still = 0;
            }
            if !client.upgraded
                && let Some(end) = client.unparsed.windows(4).position(|four| four == b"\r\n\r\n")
            {
                client.unparsed.drain(..end + 4);
                client.upgraded = true;
            }
            while let Some((_, text)) = take_frame(&mut client.unparsed) {
                *count += usize::from(text.starts_with(b"{\"bare\""));
            }
        }
    }
    (testbed, counts)
}

#[test]
fn bare_event_longer_than_the_feed_reaches_all() {
    let (mut testbed, counts) = bare_events(&[100, 40 * 1024], false);
    assert_eq!(counts, [2; CLIENTS.len()]);
    testbed.shard.on_tick();
    assert!(testbed.shard.channels.feed_bytes() <= 8 * 1024, "its memory is given back once everyone has it");
    testbed.shard.end_turn();
    assert_eq!(testbed.shard.metrics().pubsub_misses.get(), 0);
}

#[test]
fn bare_events_longer_than_the_feed_together_reach_all() {
    let (testbed, counts) = bare_events(&[1000; 13], false);
    assert_eq!(counts, [13; CLIENTS.len()]);
    assert!(testbed.shard.tally.pubsub_misses == 0 && testbed.shard.channels.feed_bytes() > 8 * 1024);
}

#[test]
fn bare_events_that_leave_memory_undelivered_are_counted_for_each_client() {
    // More than feeds may hold in one turn.
    let (mut testbed, counts) = bare_events(&[1000; 40], false);
    assert!(counts.iter().all(|count| (7..40).contains(count)), "{counts:?}");
    testbed.shard.end_turn();
    assert_eq!(testbed.shard.metrics().pubsub_misses.get(), CLIENTS.len() as u64);
    // Sockets that were full while events came and left.
    let (mut testbed, counts) = bare_events(&[1000; 60], true);
    assert!(counts.iter().all(|count| *count < 60), "{counts:?}");
    testbed.shard.end_turn();
    assert!(testbed.shard.metrics().pubsub_misses.get() >= CLIENTS.len() as u64);
}
