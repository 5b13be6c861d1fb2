//! Further channels of a connection, beside its default one.

use std::collections::VecDeque;

use super::connection::{Membership, NONE};
use super::progress::Progress;
use super::replay::{Replay, TakenInTick};
use crate::auth::token::Grant;
use crate::protocol::event::ChannelName;
use crate::protocol::frame::Regarding;
use crate::ws::client::LastSeen;

/// A channel that a connection follows beside its default one.
#[derive(Debug)]
pub struct Subscription {
    /// Distinguishes it from earlier subscriptions with its number.
    pub generation: u32,
    /// The slot of its connection.
    pub owner: u32,
    pub membership: Membership,
    pub progress: Progress,
    /// `None`: it follows its channel in the feed.
    pub phase: Option<Box<Phase>>,
}

const _: () = assert!(size_of::<Subscription>() <= 64, "no subscription takes more than 64 bytes");

/// What a subscription does that does not follow the feed.
#[derive(Debug)]
pub enum Phase {
    /// It starts as soon as the bus has answered.
    Joining(Joining),
    /// The feed has left it behind: it reads history, page by page.
    Replay(Replay),
}

/// A request to follow a channel.
#[derive(Debug)]
pub struct Joining {
    pub channel: ChannelName,
    pub last_seen: LastSeen,
    /// Whether the client wants to know who is in the channel.
    pub presence: bool,
    /// The client's `ref`, as JSON text.
    pub reference: Option<Box<str>>,
}

impl Joining {
    /// What the answer repeats.
    pub fn regarding(&self) -> Regarding {
        Regarding { channel: Some(self.channel.clone()), reference: self.reference.clone() }
    }
}

impl Subscription {
    pub fn new(generation: u32, owner: u32, joining: Joining) -> Subscription {
        Subscription {
            generation,
            owner,
            membership: Membership { channel: NONE, index: NONE, previous: NONE, next: NONE },
            progress: Progress::default(),
            phase: Some(Box::new(Phase::Joining(joining))),
        }
    }

    pub fn joining(&self) -> Option<&Joining> {
        match self.phase.as_deref() {
            Some(Phase::Joining(joining)) => Some(joining),
            _ => None,
        }
    }
}

/// Channels that a connection published in and that are remembered: each counts once as a new
/// channel of its client.
const PUBLISHED_MAX: usize = 32;

/// What a connection has beside its default channel.
#[derive(Debug)]
pub struct ChannelSet {
    /// The numbers of its subscriptions, those that wait for the bus among them.
    pub subscriptions: Vec<u32>,
    /// The member to write first: the socket may have a part of a frame of its channel.
    pub current: u32,
    /// Bytes that this member has written in its turn.
    pub spent: usize,
    /// The member that waits for a page of history. Only one of them does at a time.
    pub reading: u32,
    /// Members that need a page after it.
    pub reading_next: VecDeque<u32>,
    /// History written to all members.
    pub taken: TakenInTick,
    /// What its token allows in other channels than the default one.
    pub grant: Option<Box<Grant>>,
    /// Channels that were new when it published in them, oldest first.
    published: VecDeque<ChannelName>,
}

impl Default for ChannelSet {
    fn default() -> ChannelSet {
        ChannelSet {
            subscriptions: Vec::new(),
            current: NONE,
            spent: 0,
            reading: NONE,
            reading_next: VecDeque::new(),
            taken: TakenInTick::default(),
            grant: None,
            published: VecDeque::new(),
        }
    }
}

impl ChannelSet {
    /// Whether the connection has published in this channel, as far as it is remembered.
    pub fn has_published(&self, channel: &ChannelName) -> bool {
        self.published.contains(channel)
    }

    pub fn note_published(&mut self, channel: ChannelName) {
        if self.published.len() == PUBLISHED_MAX {
            self.published.pop_front();
        }
        self.published.push_back(channel);
    }
}
