//! A single shard with the test as its bus, and readers of every pace: fast and slow ones, readers
//! that disconnect and resume, readers in the middle of a frame when the feed evicts its entry or a
//! page of history ends. The feed holds hardly more than one event, so that every boundary is hit
//! often. The checker reads the records.
//!
//! `READERS_SEED=7 READERS_STEPS=20000 cargo test --test units readers` runs it longer and with
//! another seed.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fanfare::bus::{BLOCK, BusMessage, Page, Request, block_start};
use fanfare::protocol::event::{ChannelName, Entry, EventId};
use fanfare::shard::mailbox::{MailboxSenders, ShardMessage};
use serde_json::json;
use tokio::net::TcpSocket;
use tokio::sync::mpsc;

use crate::checker;
use crate::checker::{Attempt, History, Outcome, find_violations};
use crate::common::client::{JSON_MODE, position};
use crate::common::{Client, Nodes, Options, Rng, SingleShard};
use crate::workload::run::Kind;
use crate::workload::shared::{Shared, canonical};
use crate::workload::subscribers;

const CHANNEL: &str = "room";
const USERS: u64 = 3;

/// Events in history: sometimes fewer than a reader is behind.
const HISTORY: usize = 150;

/// The bus: assigns ids, keeps history, and answers the shard.
struct Bus {
    shared: Arc<Shared>,
    shards: MailboxSenders,
    asked: mpsc::UnboundedReceiver<Request>,
    /// Answers that are delayed.
    later: VecDeque<BusMessage>,
    name: ChannelName,
    base: u64,
    head: u64,
    /// The history. The last event has the id `head`.
    events: VecDeque<(String, Option<String>)>,
    published: u64,
    follows: bool,
    pages: u64,
    rng: Rng,
}

impl Bus {
    /// Publishes one to three events in one entry, public or private.
    fn publish(&mut self) {
        let to = (self.rng.below(4) == 0).then(|| format!("user{}", self.rng.below(USERS + 1)));
        let count = 1 + self.rng.below(4).saturating_sub(1);
        let first = self.head + 1;
        for _ in 0..count {
            // Some events are larger than the socket buffers, so that frames are partly written.
            let most = if self.rng.below(8) == 0 { 40_000 } else { 800 };
            let padding = self.rng.below(most) as usize;
            self.give(to.clone(), padding);
        }
        self.send_from(first);
    }

    /// Publishes one event with this much padding.
    fn publish_padded(&mut self, to: Option<String>, padding: usize) {
        self.give(to, padding);
        self.send_from(self.head);
    }

    /// Publishes an event with the next id.
    fn give(&mut self, to: Option<String>, padding: usize) {
        self.published += 1;
        self.head += 1;
        let mut event = json!({"text": format!("{} {}", self.published, "x".repeat(padding))});
        if let Some(to) = &to {
            event["to"] = json!(to);
        }
        let (started, finished) = (self.shared.now(), self.shared.now());
        let (body, outcome) = (canonical(&event), Outcome::Acked(self.head));
        self.shared.main().note(Attempt {
            line: "bus".into(),
            body,
            to: to.clone(),
            started,
            finished,
            outcome,
        });
        let text = event.to_string();
        let text = format!("{},\"id\":{}}}", text.strip_suffix('}').expect("an object"), self.head);
        self.events.push_back((text, to));
        while self.events.len() > HISTORY {
            self.events.pop_front();
        }
    }

    /// Sends the events from this id on to the shard.
    fn send_from(&self, first: u64) {
        if self.follows {
            self.entries(first, self.head).into_iter().for_each(|entry| self.send_entry(entry));
        }
    }

    /// Starts a new epoch, far ahead, and sends a reset.
    fn anchor(&mut self) {
        self.head += 1000 + self.rng.below(1000);
        self.base = self.head;
        self.events.clear();
        if self.follows {
            self.send_entry(Entry::reset(EventId(self.base)));
        }
    }

    fn send_entry(&self, entry: Entry) {
        self.shards
            .send(0, BusMessage::Entry { channel: self.name.clone().into(), entry, arrived: Instant::now() });
    }

    fn oldest(&self) -> u64 {
        self.head + 1 - self.events.len() as u64
    }

    /// The events with these ids that are in history; consecutive ones for the same recipients
    /// share an entry.
    fn entries(&self, first: u64, last: u64) -> Vec<Entry> {
        let oldest = self.oldest();
        let (first, last) = (first.max(oldest), last.min(self.head));
        let held: Vec<_> = (first..=last).map(|id| &self.events[(id - oldest) as usize]).collect();
        let mut next = first;
        let mut entries = Vec::new();
        for run in held.chunk_by(|(_, to), (_, other)| to == other) {
            let to = run[0].1.as_deref().map(Into::into);
            entries.push(Entry::addressed(EventId(next), to, run.iter().map(|(text, _)| text.as_bytes())));
            next += run.len() as u64;
        }
        entries
    }

    /// Handles the shard's requests, and answers them now or some steps later with the current
    /// history.
    fn answer(&mut self) {
        while let Ok(request) = self.asked.try_recv() {
            let answer = match request {
                Request::Follow { channel, .. } => {
                    self.follows = true;
                    let (base, position) = (EventId(self.base), EventId(self.head));
                    self.shards.send(0, BusMessage::Followed { channel, base, position, recent: Vec::new() });
                    continue;
                }
                Request::Unfollow { .. } => {
                    self.follows = false;
                    continue;
                }
                Request::Read { channel, position, .. } => {
                    self.pages += 1;
                    // Some answers are too large, and end before their page does.
                    let start = block_start(position);
                    let end = start.0 + BLOCK;
                    let end = if self.rng.below(4) == 0 {
                        end.min(position.0 + 1 + self.rng.below(60))
                    } else {
                        end
                    };
                    // And sometimes there is too much before the position to be shared.
                    let from = if self.rng.below(4) == 0 { position } else { start };
                    let entries = self.entries(from.0 + 1, end);
                    let page = Page {
                        named: Default::default(),
                        after: entries.first().map_or(position, |first| first.before().min(position)),
                        base: EventId(self.base),
                        head: EventId(self.head),
                        oldest: EventId(self.oldest()),
                        entries,
                    };
                    BusMessage::Page { channel: channel.into(), position, result: Ok(Arc::new(page)) }
                }
                Request::Refresh { channel, .. } => BusMessage::Refreshed { channel, result: Ok(()) },
                Request::Publish(publish) => panic!("no client publishes: {publish:?}"),
            };
            self.later.push_back(answer);
        }
        while !self.later.is_empty() && self.rng.below(4) > 0 {
            self.shards.send(0, self.later.pop_front().expect("it is not empty"));
        }
    }
}

/// Starts a listening shard, with socket buffers as small as possible.
fn start(shared: &Arc<Shared>, seed: u64, feed: &str) -> (Bus, SocketAddr) {
    let flags = [
        "--shards",
        "1",
        "--max-message-size",
        "4KiB",
        "--buffer-memory",
        feed,
        "--ping-interval",
        "1s",
        "--ping-format",
        "both",
    ];
    let SingleShard { shards, asked, limits, .. } = SingleShard::start(&flags, false).expect("a shard");

    let socket = TcpSocket::new_v4().expect("a socket");
    socket.set_send_buffer_size(4 << 10).expect("a TCP socket");
    socket.bind(([127, 0, 0, 1], 0).into()).expect("a free port");
    let listener = socket.listen(64).expect("a bound socket");
    let addr = listener.local_addr().expect("it is bound");
    let accepted = shards.clone();
    tokio::spawn(async move {
        while let Ok((socket, peer)) = listener.accept().await {
            let socket = socket.into_std().expect("a socket of tokio's");
            let connection_slot = limits.acquire(peer.ip()).expect("there is room");
            accepted.send(
                0,
                ShardMessage::Sockets(vec![(mio::net::TcpStream::from_std(socket), connection_slot)]),
            );
        }
    });
    let name = ChannelName::parse(CHANNEL).expect("a name");
    let bus = Bus {
        shared: shared.clone(),
        shards,
        asked,
        later: VecDeque::new(),
        name,
        base: 1000,
        head: 1000,
        events: VecDeque::new(),
        published: 0,
        follows: false,
        pages: 0,
        rng: Rng(seed),
    };
    (bus, addr)
}

#[tokio::test]
async fn readers_of_every_pace_get_all_or_a_reset() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().expect("a number"));
    let (seed, steps) = (number("READERS_SEED").unwrap_or(1), number("READERS_STEPS").unwrap_or(4000));
    let shared = Arc::new(Shared::new(CHANNEL, 1, Nodes::default(), 0));
    let (mut bus, addr) = start(&shared, seed, "8KiB");
    let mut readers = Vec::new();
    for n in 0..18 {
        let kind = [Kind::Recovering, Kind::Json, Kind::Plain][n % 3];
        let (user, stalls) = (n as u64 / 3 % USERS, (n >= 6).then_some(40));
        let name = format!("{kind:?} {n} of user{user}");
        let home = (n % 2 == 0).then_some(0); // the others disconnect and resume
        let plan = subscribers::Plan {
            name,
            user: format!("user{user}"),
            kind,
            home,
            addr: Some(addr),
            stalls,
            narrow: stalls.is_some(),
            subscriptions: 0..0,
            subscriptions_max: 0,
        };
        readers.push(tokio::spawn(subscribers::watch(shared.clone(), plan, seed * 100 + n as u64)));
    }
    for step in 0..steps {
        if bus.rng.below(3) > 0 {
            bus.publish();
        }
        if bus.rng.below(400) == 0 {
            bus.anchor();
        }
        bus.answer();
        // A pause now and then, so that all readers reach the head. Otherwise only yields.
        let pause = if step % 500 == 499 { 300 } else { bus.rng.below(3) };
        tokio::time::sleep(Duration::from_millis(pause)).await;
    }
    // A reader that joins without recovery after the last event never sees it: then another one is
    // published.
    let started = Instant::now();
    loop {
        bus.publish();
        let looked = Instant::now();
        while looked.elapsed() < Duration::from_secs(1) {
            bus.answer();
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        // A private event does not reach other users. Their position moves with a ping.
        let behind = shared.main().behind(bus.head);
        if behind.is_empty() {
            break;
        }
        assert!(
            started.elapsed() < Duration::from_secs(60),
            "seed {seed}: not all readers reached the end: {behind:?}"
        );
    }
    shared.over.send_replace(true);
    let mut history = History::default();
    for reader in readers {
        history.subscribers.extend(reader.await.expect("a subscriber without errors"));
    }
    history.attempts = shared.main().attempts();
    let violations = find_violations(&history);
    assert!(
        violations.is_empty(),
        "seed {seed}: {} times: {:#?}",
        violations.len(),
        &violations[..violations.len().min(20)]
    );
    let announced: usize = history.subscribers.iter().map(checker::Subscriber::announcements).sum();
    eprintln!("{} events, {} pages, {announced} announced losses", bus.published, bus.pages);
    assert!(bus.pages > 20, "{} pages: no reader fell behind", bus.pages);
}

#[tokio::test]
async fn ping_carries_the_position_of_the_frame_before() {
    let shared = Arc::new(Shared::new(CHANNEL, 1, Nodes::default(), 0));
    let (mut bus, addr) = start(&shared, 1, "1MiB");
    let options =
        Options { query: format!("channel={CHANNEL}"), subprotocol: Some(JSON_MODE), small_buffer: true };
    let joining = tokio::spawn(async move { Client::try_open(addr, "user0", &options).await });
    while !joining.is_finished() {
        bus.answer();
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let mut client = joining.await.expect("it joins").expect("it is let in");
    let mut at = position(&client.welcome().await["lastEventId"]);
    let mut pings = 0;
    for round in 1..=60 {
        // The client does not read, so the shard soon stops in the middle of one of these.
        (0..12).for_each(|_| bus.publish_padded(None, 1000 + 37 * round));
        client.send(r#"{"type":"ping"}"#).await;
        while at < bus.head || pings < round {
            let frame = client.next_json().await;
            if frame["type"] == "ping" {
                let sent = position(&frame["lastEventId"]);
                assert!(sent >= at, "round {round}: the client is at {at}, and the ping carries {sent}");
                pings += 1;
                at = sent;
            } else {
                let id = position(&frame["id"]);
                assert_eq!(id, at + 1, "round {round}: the next id");
                at = id;
            }
            bus.answer();
        }
    }
}
