//! The connections of one shard, by slot, and their subscriptions.

use std::collections::HashMap;
use std::io;
use std::ops::{Index, IndexMut};

use super::deadlines::LISTED;
use super::members::is_subscription;
use super::slots::Slots;
use crate::bus::{ConnectionId, ShardId};
use crate::ws::connection::{Connection, State};
use crate::ws::subscription::{ChannelSet, Subscription};
use mio::{Interest, Registry, Token};

/// Connections by slot. Their sockets are registered with epoll.
///
/// A discarded connection keeps its slot until [`ConnectionTable::free_discarded`] at the end of
/// the turn. So a slot is valid for the whole turn, whatever is called meanwhile.
#[derive(Debug)]
pub struct ConnectionTable {
    shard: ShardId,
    pub(super) slots: Slots<Connection>,
    pub(super) subscriptions: Slots<Subscription>,
    /// By slot: what connections have beside their default channel.
    pub(super) sets: HashMap<u32, ChannelSet>,
    /// The generation of the latest connection or subscription.
    generation: u32,
    discarded: Vec<u32>,
    registry: Registry,
}

impl ConnectionTable {
    pub fn new(shard: ShardId, registry: Registry) -> ConnectionTable {
        ConnectionTable {
            shard,
            slots: Slots::new(),
            subscriptions: Slots::new(),
            sets: HashMap::new(),
            generation: 0,
            discarded: Vec::new(),
            registry,
        }
    }

    /// Adds the connection that `create` returns for a new generation. Returns its slot.
    pub fn insert(&mut self, create: impl FnOnce(u32) -> Connection) -> u32 {
        let generation = self.next_generation();
        self.slots.insert(|_| create(generation))
    }

    pub(super) fn next_generation(&mut self) -> u32 {
        self.generation = self.generation.wrapping_add(1);
        self.generation
    }

    /// Registers the socket with epoll. Fails when the kernel is out of memory, or at
    /// `fs.epoll.max_user_watches`.
    pub fn register(&mut self, slot: u32) -> io::Result<()> {
        let token = token(self.id(slot));
        self.registry.register(self.slots[slot].socket.stream_mut(), token, Interest::READABLE)
    }

    /// Has epoll report that the socket is writable again. From the start it would do so once for
    /// every new socket.
    pub fn register_writable(&mut self, slot: u32) -> io::Result<()> {
        let token = token(self.id(slot));
        let interest = Interest::READABLE | Interest::WRITABLE;
        self.registry.reregister(self.slots[slot].socket.stream_mut(), token, interest)
    }

    /// The id of a member: of a connection, or of a subscription.
    pub fn id(&self, number: u32) -> ConnectionId {
        let generation = match is_subscription(number) {
            true => self.subscription(number).generation,
            false => self[number].generation,
        };
        ConnectionId { shard: self.shard, slot: number, generation }
    }

    /// The id to which a token belongs.
    pub fn id_of(&self, token: Token) -> ConnectionId {
        ConnectionId { shard: self.shard, slot: token.0 as u32, generation: (token.0 >> 32) as u32 }
    }

    /// The number of a member, unless it was removed.
    pub fn find(&self, id: ConnectionId) -> Option<u32> {
        let generation = match is_subscription(id.slot) {
            true => self.find_subscription(id.slot)?.generation,
            false => self.get(id.slot)?.generation,
        };
        (generation == id.generation).then_some(id.slot)
    }

    /// The connection in a slot, unless it was discarded.
    pub fn get(&self, slot: u32) -> Option<&Connection> {
        self.slots.get(slot).filter(|connection| !matches!(connection.state, State::Discarded))
    }

    /// No slot has this number or a higher one.
    pub fn end(&self) -> u32 {
        self.slots.end()
    }

    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Slots of all connections, discarded ones among them.
    pub fn slots(&self) -> impl Iterator<Item = u32> {
        self.slots.iter()
    }

    /// Frees memory that the list of discarded connections took while thousands were in it.
    pub fn shrink(&mut self) {
        self.discarded.shrink_to(LISTED);
    }

    /// Marks a connection as discarded. Its slot is freed at the end of the turn.
    pub fn discard(&mut self, slot: u32) {
        if !matches!(std::mem::replace(&mut self[slot].state, State::Discarded), State::Discarded) {
            self.discarded.push(slot);
        }
    }

    /// Frees a slot that was discarded. Called until it returns `None`, at the end of a turn.
    pub fn free_discarded(&mut self) -> Option<Connection> {
        let slot = self.discarded.pop()?;
        Some(self.slots.remove(slot))
    }
}

impl Index<u32> for ConnectionTable {
    type Output = Connection;

    fn index(&self, slot: u32) -> &Connection {
        &self.slots[slot]
    }
}

impl IndexMut<u32> for ConnectionTable {
    fn index_mut(&mut self, slot: u32) -> &mut Connection {
        &mut self.slots[slot]
    }
}

/// What epoll returns for a connection.
pub fn token(id: ConnectionId) -> Token {
    Token((id.generation as usize) << 32 | id.slot as usize)
}
