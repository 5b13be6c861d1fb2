//! A shard: one loop that owns its connections, their channels and feeds. Its methods never wait.
//!
//! | file | content |
//! |---|---|
//! | [`mailbox`], `event_loop`, `runtime` | messages to a shard; the loop over messages, sockets, ticks |
//! | `connections`, `slots` | connections by slot, in chunks |
//! | `channel_table`, `channels` | channels by key, one channel |
//! | `members` | connections and subscriptions as members of channels |
//! | `read`, `publish` | from a socket: requests, frames, messages |
//! | `subscribe`, `renewal` | further channels of a connection, and its new tokens |
//! | `control`, `list` | commands of backends: disconnect a user; list its connections |
//! | `join` | from a request to a member of a channel |
//! | `fanout`, `private`, `write` | from the feed to the sockets |
//! | `history`, `pages` | pages of history for connections that the feed has left behind |
//! | `timers`, `deadlines`, `liveness`, `drain` | the tick: deadlines, pings, the drain |
//! | `unsent`, `partial_messages` | limits on unsent frames and incomplete messages |
//! | `presence` | which users have members in a channel |
//! | `close` | closing connections |

use std::sync::Arc;
use std::time::Instant;

use mio::net::TcpStream;
use mio::{Registry, Token};

use crate::bus::{BusMessage, Request, Requests, ShardId};
use crate::config::Settings;
use crate::limits::connections::ConnectionSlot;
use crate::metrics::{Metrics, ShardMetrics};
use crate::ws::connection::Connection;
use crate::ws::decoder;
use crate::ws::handshake::HandshakeContext;
use crate::ws::writer::Tally;

mod channel_table;
mod channels;
mod close;
mod connections;
mod control;
mod deadlines;
mod deferred;
mod drain;
mod event_loop;
mod fanout;
mod history;
mod join;
mod list;
mod liveness;
pub mod mailbox;
mod members;
mod partial_messages;
mod pages;
mod presence;
mod private;
mod publish;
mod read;
mod renewal;
mod subscribe;
pub(crate) mod runtime;
mod slots;
#[cfg(test)]
mod tests;
mod timers;
mod unsent;
mod write;

use channel_table::ChannelTable;
use channels::ChannelId;
use connections::ConnectionTable;
use control::Commands;
use deadlines::Deadlines;
use deferred::Deferred;
use drain::Drain;
pub use event_loop::run;
use history::ReplayQueue;
use liveness::Sweep;
use mailbox::{MailboxSenders, ShardMessage};
use partial_messages::PartialMessages;
use read::Input;
pub use unsent::NodeUnsent;
use unsent::Unsent;

/// What a shard gets from its node.
#[derive(Debug)]
pub struct ShardContext {
    pub id: ShardId,
    pub handshake: HandshakeContext,
    pub requests: Requests,
    /// The mailboxes of all shards.
    pub shards: MailboxSenders,
    pub metrics: Arc<Metrics>,
    /// What all shards keep for full sockets.
    pub unsent: Arc<NodeUnsent>,
    /// Whether binary messages are published as they are: for an echo server that tests the
    /// WebSocket alone.
    pub takes_binary: bool,
}

/// One shard.
#[derive(Debug)]
pub struct Shard {
    context: ShardContext,
    connections: ConnectionTable,
    channels: ChannelTable,
    replay: ReplayQueue,
    deferred: Deferred,
    commands: Commands,
    deadlines: Deadlines,
    sweep: Sweep,
    unsent: Unsent,
    partial_messages: PartialMessages,
    drain: Option<Drain>,
    /// Channels with members that missed updates of presence.
    presence_behind: Vec<ChannelId>,
    input: Input,
    /// What was read and written since the last report.
    tally: Tally,
    /// When this turn started.
    now: Instant,
    /// Until then the fan-outs under way leave the time to other work.
    next_fanout: Instant,
    /// Ticks since the shard started.
    tick: u32,
}

impl Shard {
    /// `registry` is for the sockets of its connections.
    fn new(context: ShardContext, registry: Registry) -> Shard {
        let settings = &context.handshake.settings;
        let limits =
            decoder::Limits { max_message_size: settings.max_message_size, binary: context.takes_binary };
        Shard {
            connections: ConnectionTable::new(context.id, registry),
            channels: ChannelTable::new(),
            replay: ReplayQueue::new(settings),
            deferred: Deferred::default(),
            commands: Commands::default(),
            deadlines: Deadlines::new(),
            sweep: Sweep::default(),
            unsent: Unsent::new(context.unsent.clone()),
            partial_messages: PartialMessages::new(settings),
            drain: None,
            presence_behind: Vec::new(),
            input: Input::new(limits),
            tally: Tally::default(),
            now: Instant::now(),
            next_fanout: Instant::now(),
            tick: 0,
            context,
        }
    }

    fn settings(&self) -> &Settings {
        &self.context.handshake.settings
    }

    /// The metrics of this shard.
    fn metrics(&self) -> &ShardMetrics {
        &self.context.metrics.shards[self.context.id]
    }

    fn handle_message(&mut self, message: ShardMessage) {
        // What comes after a command finds it executed: an event must not reach the user, and a list
        // must not have what it closes.
        let is_command = matches!(
            message,
            ShardMessage::Bus(BusMessage::Disconnect { .. } | BusMessage::DisconnectBanned(_))
        );
        if !is_command {
            self.run_commands();
        }
        match message {
            ShardMessage::Bus(message) => self.on_bus_message(message),
            ShardMessage::Sockets(sockets) => {
                for (stream, connection_slot) in sockets {
                    self.on_socket(stream, connection_slot);
                }
            }
            ShardMessage::ListChannels(request) => {
                let list = self.channels.list(&request);
                let _ = request.answer.send(list); // fails if the task no longer waits
            }
            ShardMessage::ListConnections(request) => {
                let list = self.list_connections(&request);
                let _ = request.answer.send(list); // fails if the task no longer waits
            }
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
            BusMessage::Refreshed { channel, result } => self.on_refreshed(&channel, result),
            BusMessage::Presence { channel, update } => self.on_presence(&channel, update),
            BusMessage::Published { connection, regarding, result } => {
                self.on_published(connection, &regarding, result);
            }
            BusMessage::Disconnect { user, channel, reason } => self.on_disconnect(user, channel, reason),
            BusMessage::DisconnectBanned(users) => self.commands.banned = Some(users),
        }
    }

    fn on_socket(&mut self, stream: TcpStream, connection_slot: ConnectionSlot) {
        let tick = self.tick;
        let slot =
            self.connections.insert(|generation| Connection::new(stream, connection_slot, generation, tick));
        if self.connections.register(slot).is_err() {
            return self.connections.discard(slot);
        }
        self.deadlines.requests.push(self.connections.id(slot), tick, &self.connections);
    }

    /// Handles an event of a socket. `ended`: the peer has closed its side.
    ///
    /// Only messages of open connections are read at once. Handshakes, ends and full sockets come
    /// by the thousands, and each is as much work as dozens of messages.
    fn on_ready(&mut self, token: Token, readable: bool, writable: bool, ended: bool) {
        let Some(slot) = self.connections.find(self.connections.id_of(token)) else { return };
        let connection = &self.connections[slot];
        let is_put_off = ended || !connection.is_open();
        // Skip connections already queued for reading: one read per turn, not one per event, or
        // busy senders starve the rest.
        let is_readable = readable && !connection.inbound.is_queued();
        if writable && connection.socket.is_blocked() {
            self.write_later(slot);
        }
        if is_readable {
            match is_put_off {
                true => self.read_later(slot),
                false => self.on_readable(slot, false),
            }
        }
    }

    fn request_bus(&self, request: Request) {
        let _ = self.context.requests.send(request); // fails only when the node has stopped
    }

    /// Ends a turn: updates the metrics, and frees the slots of discarded connections.
    fn end_turn(&mut self) {
        let tally = std::mem::take(&mut self.tally);
        if tally.kept > 0 {
            self.count_kept(tally.kept);
        }
        let metrics = self.metrics();
        if tally.bytes > 0 || tally.resets > 0 {
            metrics.events_delivered.add(tally.deliveries);
            metrics.bytes_sent.add(tally.bytes);
            metrics.resets.add(tally.resets);
        }
        if tally.pubsub_misses > 0 {
            metrics.pubsub_misses.add(tally.pubsub_misses);
        }
        if tally.received > 0 {
            metrics.bytes_received.add(tally.received);
        }
        metrics.subscriptions.set(self.connections.subscriptions() as u64);
        metrics.feed_bytes.set(self.channels.feed_bytes() as u64);
        metrics.page_bytes.set(self.replay.pages.bytes() as u64);
        self.free_discarded();
    }
}
