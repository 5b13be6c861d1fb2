//! A single shard with the test as its bus, and readers of every pace: fast and slow ones, readers
//! that disconnect and resume, readers in the middle of a frame when the feed evicts its entry or a
//! page of history ends. Some readers follow several channels, and change their subscriptions. The
//! feeds hold hardly more than one event, so that every boundary is hit often. The checker reads the
//! records.
//!
//! `READERS_SEED=7 READERS_STEPS=20000 cargo test --test units readers` runs it longer and with
//! another seed.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fanfare::bus::{BLOCK, BusMessage, Page, PageReader, Request, block_start};
use fanfare::protocol::event::{ChannelName, Entry, EventId};
use fanfare::protocol::form::{self, ChannelForm, Form};
use fanfare::shard::mailbox::{MailboxSenders, ShardMessage};
use serde_json::json;
use tokio::net::TcpSocket;
use tokio::sync::mpsc;

use crate::checker;
use crate::checker::{Attempt, History, Outcome, find_violations};
use crate::common::client::{JSON_MODE, position};
use crate::common::{Client, Nodes, Options, Rng, SingleShard};
use crate::workload::run::Kind;
use crate::workload::shared::{Channel, Shared, canonical};
use crate::workload::subscribers;

const CHANNEL: &str = "room";
const USERS: u64 = 3;

/// The main channel, and others that readers of several channels subscribe to.
const CHANNELS: usize = 4;

/// Events in history: sometimes fewer than a reader is behind.
const HISTORY: usize = 150;

/// The bus: assigns ids, keeps history, and answers the shard.
struct Bus {
    shared: Arc<Shared>,
    shards: MailboxSenders,
    asked: mpsc::UnboundedReceiver<Request>,
    /// Answers that are delayed.
    later: VecDeque<BusMessage>,
    channels: Vec<BusChannel>,
    published: u64,
    pages: u64,
    rng: Rng,
}

struct BusChannel {
    name: ChannelName,
    base: u64,
    head: u64,
    /// The history. The last event has the id `head`.
    events: VecDeque<(String, Option<String>)>,
    /// The forms in which the shard follows it.
    followed: Vec<ChannelForm>,
}

impl BusChannel {
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
}

impl Bus {
    /// Publishes one to three events in one entry, public or private.
    fn publish(&mut self, channel: usize) {
        let to = (self.rng.below(4) == 0).then(|| format!("user{}", self.rng.below(USERS + 1)));
        let count = 1 + self.rng.below(4).saturating_sub(1);
        let first = self.channels[channel].head + 1;
        for _ in 0..count {
            // Some events are larger than the socket buffers, so that frames are partly written.
            let most = if self.rng.below(8) == 0 { 40_000 } else { 800 };
            let padding = self.rng.below(most) as usize;
            self.give(channel, to.clone(), padding);
        }
        self.send_from(channel, first);
    }

    /// Publishes one event in the main channel with this much padding.
    fn publish_padded(&mut self, to: Option<String>, padding: usize) {
        self.give(0, to, padding);
        self.send_from(0, self.channels[0].head);
    }

    /// Publishes an event with the next id.
    fn give(&mut self, number: usize, to: Option<String>, padding: usize) {
        self.published += 1;
        let channel = &mut self.channels[number];
        channel.head += 1;
        let mut event = json!({"text": format!("{} {}", self.published, "x".repeat(padding))});
        if let Some(to) = &to {
            event["to"] = json!(to);
        }
        let (started, finished) = (self.shared.now(), self.shared.now());
        let (body, outcome) = (canonical(&event), Outcome::Acked(channel.head));
        let attempt = Attempt { line: "bus".into(), body, to: to.clone(), started, finished, outcome };
        self.shared.channels[number].note(attempt);
        let text = event.to_string();
        let text = format!("{},\"id\":{}}}", text.strip_suffix('}').expect("an object"), channel.head);
        channel.events.push_back((text, to));
        while channel.events.len() > HISTORY {
            channel.events.pop_front();
        }
    }

    /// Sends the events from this id on to the shard.
    fn send_from(&self, number: usize, first: u64) {
        let channel = &self.channels[number];
        channel.entries(first, channel.head).iter().for_each(|entry| self.send_entry(number, entry));
    }

    /// Starts a new epoch, far ahead, and sends a reset.
    fn anchor(&mut self, number: usize) {
        let channel = &mut self.channels[number];
        channel.head += 1000 + self.rng.below(1000);
        channel.base = channel.head;
        channel.events.clear();
        let reset = Entry::reset(EventId(channel.base));
        self.send_entry(number, &reset);
    }

    /// Sends an entry in each form that the shard follows.
    fn send_entry(&self, number: usize, entry: &Entry) {
        for channel in &self.channels[number].followed {
            let entry = match channel.form {
                Form::Unnamed => entry.clone(),
                Form::Named => form::named(entry, &channel.name),
            };
            let channel = channel.clone();
            self.shards.send(0, BusMessage::Entry { channel, entry, arrived: Instant::now() });
        }
    }

    fn number(&self, name: &ChannelName) -> usize {
        self.channels.iter().position(|channel| channel.name == *name).expect("a channel of the test")
    }

    /// Handles the shard's requests, and answers them now or some steps later with the current
    /// history.
    fn answer(&mut self) {
        while let Ok(request) = self.asked.try_recv() {
            let answer = match request {
                Request::Follow { channel, .. } => {
                    let number = self.number(&channel.name);
                    let followed = &mut self.channels[number];
                    followed.followed.push(channel.clone());
                    let (base, position) = (EventId(followed.base), EventId(followed.head));
                    self.shards.send(0, BusMessage::Followed { channel, base, position, recent: Vec::new() });
                    continue;
                }
                Request::Order { .. } => unreachable!("shards send none"),
                Request::Unfollow { channel, .. } => {
                    let number = self.number(&channel.name);
                    self.channels[number].followed.retain(|followed| *followed != channel);
                    continue;
                }
                Request::Read { channel: name, position, reader, .. } => {
                    let PageReader::Shard(_, form) = reader else { panic!("a reader of no shard") };
                    self.pages += 1;
                    let channel = &self.channels[self.number(&name)];
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
                    let entries = channel.entries(from.0 + 1, end);
                    let page = Page {
                        named: Default::default(),
                        after: entries.first().map_or(position, |first| first.before().min(position)),
                        base: EventId(channel.base),
                        head: EventId(channel.head),
                        oldest: EventId(channel.oldest()),
                        entries,
                    };
                    let channel = ChannelForm { name, form };
                    BusMessage::Page { channel, position, result: Ok(Arc::new(page)) }
                }
                Request::Presence { .. } | Request::FollowPresence { .. } | Request::ReadPresence { .. } => {
                    continue;
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
    let channel = |channel: &Channel| BusChannel {
        name: ChannelName::parse(&channel.name).expect("a name"),
        base: 1000,
        head: 1000,
        events: VecDeque::new(),
        followed: Vec::new(),
    };
    let bus = Bus {
        shared: shared.clone(),
        shards,
        asked,
        later: VecDeque::new(),
        channels: shared.channels.iter().map(channel).collect(),
        published: 0,
        pages: 0,
        rng: Rng(seed),
    };
    (bus, addr)
}

#[tokio::test]
async fn readers_of_every_pace_get_all_or_a_reset() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().expect("a number"));
    let (seed, steps) = (number("READERS_SEED").unwrap_or(1), number("READERS_STEPS").unwrap_or(4000));
    let shared = Arc::new(Shared::new(CHANNEL, CHANNELS, Nodes::default(), 0));
    let (mut bus, addr) = start(&shared, seed, "8KiB");
    let mut readers = Vec::new();
    for n in 0..26 {
        let kind = if n < 18 { [Kind::Recovering, Kind::Json, Kind::Plain][n % 3] } else { Kind::Json };
        let (user, stalls) = (n as u64 / 3 % USERS, (n >= 6 && n != 18 && n != 19).then_some(40));
        let home = (n % 2 == 0).then_some(0); // the others disconnect and resume
        let subscriptions = match home {
            _ if n < 18 => 0..0,
            Some(_) => 1..CHANNELS,
            None => 0..CHANNELS,
        };
        let plan = subscribers::Plan {
            name: format!("{kind:?} {n} of user{user}"),
            user: format!("user{user}"),
            kind,
            home,
            addr: Some(addr),
            stalls,
            narrow: stalls.is_some(),
            subscriptions,
            subscriptions_max: 100,
        };
        readers.push(tokio::spawn(subscribers::watch(shared.clone(), plan, seed * 100 + n as u64)));
    }
    for step in 0..steps {
        let channel = if bus.rng.below(3) == 0 { bus.rng.index(CHANNELS) } else { 0 };
        if bus.rng.below(3) > 0 {
            bus.publish(channel);
        }
        if bus.rng.below(400) == 0 {
            bus.anchor(channel);
        }
        bus.answer();
        // A pause now and then, so that all readers reach the head. Otherwise only yields.
        let pause = if step % 500 == 499 { 300 } else { bus.rng.below(3) };
        tokio::time::sleep(Duration::from_millis(pause)).await;
    }
    // A reader that joins without recovery after the last event never sees it: then another one is
    // published.
    shared.quiet.send_replace(true);
    let started = Instant::now();
    let mut open: Vec<usize> = (0..CHANNELS).collect();
    while !open.is_empty() {
        open.iter().for_each(|channel| bus.publish(*channel));
        let looked = Instant::now();
        while looked.elapsed() < Duration::from_secs(1) {
            bus.answer();
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        // A private event does not reach other users. Their position moves with a ping.
        let behind = |channel: &usize| shared.channels[*channel].behind(bus.channels[*channel].head);
        open.retain(|channel| !behind(channel).is_empty());
        assert!(
            started.elapsed() < Duration::from_secs(60),
            "seed {seed}: not all readers reached the end: {:?}",
            open.iter().map(behind).collect::<Vec<_>>()
        );
    }
    shared.over.send_replace(true);
    let mut histories: Vec<History> = shared.channels.iter().map(Channel::history).collect();
    for reader in readers {
        let records = reader.await.expect("a subscriber without errors");
        histories.iter_mut().zip(records).for_each(|(history, records)| history.subscribers.push(records));
    }
    let violations: Vec<_> = histories.iter().flat_map(find_violations).collect();
    assert!(
        violations.is_empty(),
        "seed {seed}: {} times: {:#?}",
        violations.len(),
        &violations[..violations.len().min(20)]
    );
    let subscribers = histories.iter().flat_map(|history| &history.subscribers);
    let announced: usize = subscribers.map(checker::Subscriber::announcements).sum();
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
        while at < bus.channels[0].head || pings < round {
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
