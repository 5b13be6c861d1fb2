//! One loop that owns everything it touches: a slab of connections, and the channels they follow.
//!
//! It waits for sockets that are ready, for what the bus says and for the tick, then works. It runs on mio, tokio's
//! own poll layer, in a plain thread: epoll gives back slot and generation, so a connection needs no task, no
//! waker and none of a runtime's bookkeeping.

use std::collections::{HashMap, VecDeque};
use std::hash::RandomState;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mio::{Interest, Poll, Registry, Token};
use slab::Slab;

use crate::bus::{BusError, BusMessage, ConnectionId, Request, Requests, ShardId};
use crate::config::Settings;
use crate::http;
use crate::limits::connections::ConnectionSlot;
use crate::metrics::rejections::RejectionClass;
use crate::metrics::{Metrics, ShardMetrics};
use crate::protocol::close::CloseReason;
use crate::protocol::event::ChannelName;
use crate::ws::connection::{Connection, State, Tally};
use crate::ws::decoder;
use crate::ws::handshake;

mod channels;
mod event_loop;
mod fanout;
mod join;
pub mod mailbox;
mod partial_messages;
mod private;
mod read;
mod replay;
#[cfg(test)]
mod tests;
mod timers;
mod unsent;

use channels::Channel;
pub use event_loop::{poll, run};
use join::Asked;
use mailbox::{Inbox, Mailboxes, ShardMessage, ShardWaker};
use partial_messages::PartialMessages;
use replay::Pages;
use timers::Drain;

/// How long a request may take to be complete.
const REQUEST_TIME: Duration = Duration::from_secs(5);

/// How long the bus may take to say where a client comes in: longer than a call to Redis may, and far longer than
/// thousands that come at once need.
const JOIN_TIME: Duration = Duration::from_secs(10);

/// How long last words may take, and the peer to close after them.
const LINGER: Duration = Duration::from_secs(5);

/// One read takes this much; longer ones take turns.
const SCRATCH: usize = 16 * 1024;

/// Most writes of fan-outs before others get their turn. Writes are counted, not connections, since a connection with
/// many small entries ahead takes many writes.
const WRITES_A_TURN: u64 = 256;

/// Connections read from or brought up to date, before passes under way get their turn: in a storm each of thousands
/// has a handshake, a token and a page of history to be dealt with, and live events would wait behind all of them.
const OTHERS_A_TURN: usize = 32;

/// What a shard works with.
#[derive(Debug)]
pub struct ShardContext {
    /// Its number.
    pub id: ShardId,
    /// What decides over requests, with the node's settings.
    pub context: handshake::HandshakeContext,
    /// The way to the bus.
    pub requests: Requests,
    /// The way to the other shards.
    pub shards: Mailboxes,
    /// Its sockets; it and the waker come from [`poll`].
    pub poll: Poll,
    /// Its messages.
    pub inbox: Inbox,
    /// Wakes it for a message.
    pub waker: Arc<ShardWaker>,
    /// What the node counts; it writes its own part.
    pub metrics: Arc<Metrics>,
    /// Whether binary messages are published as they are: for an echo that tests the WebSocket alone.
    pub takes_binary: bool,
}

/// One shard.
#[derive(Debug)]
pub struct Shard {
    id: ShardId,
    settings: Arc<Settings>,
    context: handshake::HandshakeContext,
    requests: Requests,
    shards: Mailboxes,
    metrics: Arc<Metrics>,
    registry: Registry,
    connections: Slab<Connection>,
    generation: u32,
    channels: Slab<Channel>,
    names: HashMap<ChannelName, u32>,
    serial: u32,
    hasher: RandomState,
    /// Every entry of every feed, oldest first, by channel key and serial: the order in which they go.
    ages: VecDeque<(u32, u32)>,
    /// How many of `ages` belong to channels that are gone.
    stale_ages: usize,
    feed_bytes: usize,
    /// What the longest entry so far counts, in bytes.
    longest_entry: usize,
    pages: Pages,
    /// Those whom the bus has answered.
    answered: VecDeque<(ConnectionId, Asked)>,
    /// Channels without members by key and serial, oldest first; some have members again, or are gone.
    empty_channels: VecDeque<(Instant, u32, u32)>,
    /// A channel has lost its last member in this turn.
    channel_emptied: bool,
    /// Channels with a fan-out under way.
    passes: VecDeque<u32>,
    /// Fan-outs that were completed in this turn: when it started, if it was a public one, and when the first of its
    /// events arrived on this node.
    brought: Vec<(Option<Instant>, Instant)>,
    /// When this turn began.
    now: Instant,
    /// Connections that had more to write, or to read, than one turn allows.
    unflushed: Vec<ConnectionId>,
    unread: Vec<ConnectionId>,
    /// Requests and last words by deadline, all after the same time each.
    handshakes: VecDeque<(Instant, ConnectionId)>,
    lingering: VecDeque<(Instant, ConnectionId)>,
    /// Connections that wait for the bus, by deadline.
    joining: VecDeque<(Instant, ConnectionId)>,
    /// Connections whose part of history could not be read: tried again every second.
    parked: Vec<ConnectionId>,
    /// Connections that took as much history as one may in a tick.
    next_tick: Vec<ConnectionId>,
    /// Connections that missed events and are to be closed, some at every tick.
    missed: VecDeque<ConnectionId>,
    partial_messages: PartialMessages,
    /// Connections with bytes kept for full sockets, as far as the walk through the slab has come.
    unsent: Vec<u32>,
    /// More such bytes that may be kept before they are counted again.
    unsent_room: u64,
    drain: Option<Drain>,
    tick: u32,
    heartbeat_slot: usize,
    /// LimitReached sockets seen since the walk through the slab began.
    slow: u64,
    tally: Tally,
    scratch: Box<[u8]>,
    messages: Vec<decoder::Incoming>,
    pongs: Vec<u8>,
    limits: decoder::Limits,
}

/// A shard without connections, with its poll, its inbox and its waker.
fn assemble(wiring: ShardContext) -> io::Result<(Shard, Poll, Inbox, Arc<ShardWaker>)> {
    let ShardContext { poll, inbox, waker, .. } = wiring;
    let registry = poll.registry().try_clone()?;
    let settings = wiring.context.settings.clone();
    let shard = Shard {
        id: wiring.id,
        context: wiring.context,
        requests: wiring.requests,
        shards: wiring.shards,
        metrics: wiring.metrics,
        registry,
        connections: Slab::new(),
        generation: 0,
        channels: Slab::new(),
        names: HashMap::new(),
        serial: 0,
        hasher: RandomState::new(),
        ages: VecDeque::new(),
        stale_ages: 0,
        feed_bytes: 0,
        longest_entry: 0,
        pages: Pages::new(settings.page_memory(), settings.max_message_size),
        answered: VecDeque::new(),
        empty_channels: VecDeque::new(),
        channel_emptied: false,
        passes: VecDeque::new(),
        brought: Vec::new(),
        now: Instant::now(),
        unflushed: Vec::new(),
        unread: Vec::new(),
        handshakes: VecDeque::new(),
        lingering: VecDeque::new(),
        joining: VecDeque::new(),
        parked: Vec::new(),
        next_tick: Vec::new(),
        missed: VecDeque::new(),
        partial_messages: PartialMessages::new(&settings),
        unsent: Vec::new(),
        unsent_room: 0,
        drain: None,
        tick: 0,
        heartbeat_slot: 0,
        slow: 0,
        tally: Tally::default(),
        scratch: vec![0; SCRATCH].into(),
        messages: Vec::new(),
        pongs: Vec::new(),
        limits: decoder::Limits { max_message_size: settings.max_message_size, binary: wiring.takes_binary },
        settings,
    };
    Ok((shard, poll, inbox, waker))
}

/// What epoll gives back for a connection.
fn token_of(id: ConnectionId) -> Token {
    Token((id.generation as usize) << 32 | id.slot as usize)
}

impl Shard {
    fn numbers(&self) -> &ShardMetrics {
        &self.metrics.shards[self.id]
    }

    fn has_work(&self) -> bool {
        let undone = [self.passes.len(), self.unflushed.len(), self.unread.len(), self.answered.len()];
        undone.iter().any(|undone| *undone > 0)
    }

    /// Goes on with what earlier turns left undone.
    fn work(&mut self) {
        for (done, id) in std::mem::take(&mut self.unread).into_iter().enumerate() {
            if let Some(slot) = self.find(id) {
                self.connections[slot as usize].read_queued = false;
                self.on_readable(slot, true);
            }
            self.let_pass(done);
        }
        for (done, id) in std::mem::take(&mut self.unflushed).into_iter().enumerate() {
            if let Some(slot) = self.find(id) {
                self.connections[slot as usize].write_queued = false;
                self.flush(slot);
            }
            self.let_pass(done);
        }
        self.go_on(OTHERS_A_TURN);
        self.pass_on(WRITES_A_TURN);
        if std::mem::take(&mut self.channel_emptied) && self.excess_channels() > 0 {
            self.drop_empty_channels(self.now);
        }
    }

    /// Gives passes their turn between so many others.
    fn let_pass(&mut self, done: usize) {
        if (done + 1).is_multiple_of(OTHERS_A_TURN) {
            self.pass_on(WRITES_A_TURN);
        }
    }

    fn take(&mut self, message: ShardMessage) {
        match message {
            ShardMessage::Bus(message) => self.on_bus_message(message),
            ShardMessage::Socket(stream, connection_slot) => self.on_socket(stream, connection_slot),
            ShardMessage::Drain(time) => self.on_drain(time),
        }
    }

    fn on_bus_message(&mut self, message: BusMessage) {
        match message {
            BusMessage::Followed { channel, base, position, recent } => {
                self.on_followed(&channel, base, position, recent);
            }
            BusMessage::Share { channel, base, position, with } => {
                self.on_share(channel, base, position, with)
            }
            BusMessage::NotFollowed { channel, why } => self.on_not_followed(&channel, &why),
            BusMessage::Entry { channel, entry, arrived } => self.on_entry(&channel, entry, arrived),
            BusMessage::Page { channel, position, result } => self.on_page(&channel, position, result),
            BusMessage::Refreshed { channel, result } => self.on_looked(&channel, result),
            BusMessage::Published { connection, reference, result } => {
                self.on_published(connection, reference.as_deref(), result);
            }
        }
    }

    fn on_socket(&mut self, stream: mio::net::TcpStream, connection_slot: ConnectionSlot) {
        self.generation = self.generation.wrapping_add(1);
        let connection = Connection::new(stream, connection_slot, self.generation, self.tick);
        let slot = self.connections.insert(connection) as u32;
        let token = token_of(self.id_of(slot));
        let stream = self.connections[slot as usize].stream();
        if self.registry.register(stream, token, Interest::READABLE).is_err() {
            return self.remove(slot); // out of kernel memory, or of fs.epoll.max_user_watches
        }
        self.handshakes.push_back((Instant::now() + REQUEST_TIME, self.id_of(slot)));
    }

    fn on_ready(&mut self, token: Token, readable: bool, writable: bool, end: bool) {
        let id = ConnectionId { shard: self.id, slot: token.0 as u32, generation: (token.0 >> 32) as u32 };
        let Some(slot) = self.find(id) else { return };
        if writable && self.connections[slot as usize].blocked {
            self.retry_write(slot);
        }
        // Whoever has more to read has its turn anyway, to the end. It must not get one more for every word of epoll, or
        // a few who send without a pause would be read from ever more often in a turn, and all others wait.
        if readable && self.find(id).is_some() && !self.connections[slot as usize].read_queued {
            self.on_readable(slot, end);
        }
    }

    /// Reads from a connection in the next turn.
    fn read_later(&mut self, slot: u32) {
        if !std::mem::replace(&mut self.connections[slot as usize].read_queued, true) {
            self.unread.push(self.id_of(slot));
        }
    }

    /// Writes to a connection in the next turn.
    fn write_later(&mut self, slot: u32) {
        if !std::mem::replace(&mut self.connections[slot as usize].write_queued, true) {
            self.unflushed.push(self.id_of(slot));
        }
    }

    fn id_of(&self, slot: u32) -> ConnectionId {
        let generation = self.connections[slot as usize].generation;
        ConnectionId { shard: self.id, slot, generation }
    }

    /// Has epoll tell when a full socket has room again. Only now: asked for from the start, it would tell so once
    /// for every new socket.
    fn register_writable(&mut self, slot: u32) {
        let token = token_of(self.id_of(slot));
        let connection = &mut self.connections[slot as usize];
        if !std::mem::replace(&mut connection.write_interest, true) {
            let both = Interest::READABLE | Interest::WRITABLE;
            if self.registry.reregister(connection.stream(), token, both).is_err() {
                self.end(slot, CloseReason::ConnectionLost); // it would wait for ever
            }
        }
    }

    /// The slot of a connection that is still there.
    fn find(&self, id: ConnectionId) -> Option<u32> {
        let connection = self.connections.get(id.slot as usize)?;
        (connection.generation == id.generation).then_some(id.slot)
    }

    /// Begins a connection's end.
    fn end(&mut self, slot: u32, reason: CloseReason) {
        let feed = self.leave(slot);
        let id = self.id_of(slot);
        let connection = &mut self.connections[slot as usize];
        if matches!(connection.state, State::Closing { .. }) {
            return;
        }
        self.metrics.shards[self.id].closed_by_reason[reason as usize].add(1);
        let channel =
            feed.and_then(|key| self.channels.get(key as usize)).map(|channel| channel.name.as_str());
        tracing::debug!(
            reason = reason.label(),
            user = &*connection.user,
            client = connection.client().map(tracing::field::display),
            channel,
            "connection ends"
        );
        connection.close(reason);
        if std::mem::take(&mut connection.read_paused) {
            self.read_later(slot);
        }
        if reason == CloseReason::ConnectionLost {
            return self.remove(slot);
        }
        let feed = feed.and_then(|key| self.channels.get(key as usize)?.feed.as_ref());
        let connection = &mut self.connections[slot as usize];
        // Whoever had no seat is not waited for: its request has been read, so nothing can cut its answer short.
        let turned_away =
            connection.connection_slot.limit_reached().is_some_and(|limit| limit.reason() == reason);
        // Nor is whoever was silent for so long; the kernel goes on with what it has been given.
        let silent = matches!(reason, CloseReason::PingTimeout | CloseReason::SlowReader);
        if connection.finish(feed, &mut self.tally) && !silent && (connection.blocked || !turned_away) {
            if connection.blocked {
                self.register_writable(slot);
            }
            self.lingering.push_back((Instant::now() + LINGER, id));
        } else {
            self.remove(slot);
        }
    }

    /// Sends an HTTP answer to a client that may not join, and ends.
    fn refuse(&mut self, slot: u32, answer: bytes::Bytes, reason: CloseReason) {
        let class =
            RejectionClass { what: "request", reason: reason.label(), status: http::status_of(&answer) };
        let mut text = http::body_of(&answer);
        if reason == CloseReason::ProxyNotTrusted
            && let Some(peer) = self.connections[slot as usize].client()
        {
            text = format!("{} (it is {peer})", text.trim_end()).into(); // what the operator has to name
        }
        self.metrics.rejections.record(class, &text);
        self.answer(slot, answer, reason);
    }

    /// Sends an HTTP answer and ends.
    fn answer(&mut self, slot: u32, answer: bytes::Bytes, reason: CloseReason) {
        let status = http::status_of(&answer);
        if status >= 400 {
            self.numbers().count_rejection(status);
        }
        self.connections[slot as usize].enqueue(answer);
        self.end(slot, reason);
    }

    /// Takes a connection out of its channel; gives the channel's key if it was in one.
    fn leave(&mut self, slot: u32) -> Option<u32> {
        let connection = &self.connections[slot as usize];
        if !connection.is_open() {
            return None;
        }
        let key = connection.channel;
        let channel = &mut self.channels[key as usize];
        channel.remove(slot, &mut self.connections, &self.hasher);
        if let Some(since) = channel.empty_since {
            self.empty_channels.push_back((since, key, channel.serial));
            self.channel_emptied = true;
        }
        Some(key)
    }

    /// Closes the socket and gives back what the connection held. Every connection ends here, once.
    fn remove(&mut self, slot: u32) {
        let connection = self.connections.remove(slot as usize);
        self.context.limits.release(connection.connection_slot, &connection.user);
        self.numbers().closed.add(1);
    }

    /// The key of a channel, which the bus is asked to follow if it is new.
    fn channel_key(&mut self, name: &ChannelName) -> u32 {
        if let Some(key) = self.names.get(name) {
            return *key;
        }
        self.serial = self.serial.wrapping_add(1);
        let now = Instant::now();
        let key = self.channels.insert(Channel::new(name.clone(), self.serial, now)) as u32;
        self.names.insert(name.clone(), key);
        self.empty_channels.push_back((now, key, self.serial));
        self.ask(Request::Follow { channel: name.clone(), shard: self.id });
        key
    }

    fn drop_channel(&mut self, key: u32) {
        let channel = self.channels.remove(key as usize);
        self.names.remove(&channel.name);
        self.passes.retain(|other| *other != key);
        if let Some(mut feed) = channel.feed {
            while let Some(entry) = feed.evict() {
                self.feed_bytes -= entry.memory();
                self.stale_ages += 1;
            }
        }
        self.pages.forget((key, channel.serial));
        if self.stale_ages > 1024 + self.ages.len() / 2 {
            let channels = &self.channels;
            let lives = |&(key, serial): &(u32, u32)| {
                channels.get(key as usize).is_some_and(|channel| channel.serial == serial)
            };
            self.ages.retain(lives);
            self.stale_ages = 0;
        }
    }

    fn ask(&self, request: Request) {
        let _ = self.requests.send(request); // fails only when the node is gone
    }

    fn report(&mut self) {
        let tally = std::mem::take(&mut self.tally);
        if tally.kept > 0 {
            self.add_kept(tally.kept);
        }
        let numbers = self.numbers();
        if tally.bytes > 0 || tally.resets > 0 {
            numbers.events_delivered.add(tally.deliveries);
            numbers.bytes_sent.add(tally.bytes);
            numbers.resets.add(tally.resets);
        }
        if tally.pubsub_misses > 0 {
            numbers.pubsub_misses.add(tally.pubsub_misses);
        }
        if tally.received > 0 {
            numbers.bytes_received.add(tally.received);
        }
        numbers.feed_bytes.set(self.feed_bytes as u64);
        numbers.page_bytes.set(self.pages.bytes() as u64);
    }

    /// Answers a client that can't join. Why the bus is away is for operators, so the answer does not say it.
    fn refuse_join(&mut self, id: ConnectionId, why: &BusError) {
        if let Some(slot) = self.find(id).filter(|slot| self.is_joining(*slot)) {
            let answer = match why {
                BusError::Away(_) => {
                    handshake::unavailable("no client can join now: try again, or another node")
                }
                BusError::TooManyChannels => handshake::unavailable(&why.to_string()),
            };
            self.refuse(slot, answer, CloseReason::HttpResponse);
        }
    }

    fn is_joining(&self, slot: u32) -> bool {
        matches!(self.connections[slot as usize].state, State::Joining(_))
    }
}
