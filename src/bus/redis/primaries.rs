//! The primaries that channels are at. A Redis without cluster is the only one. In a cluster each
//! primary has a session of its own: if it is away, the channels of others are not affected, and
//! messages come from the primary that publishes them.

use std::collections::VecDeque;
use std::ops::{Index, IndexMut};
use std::sync::Arc;

use fred::types::config::Config;
use slab::Slab;
use tokio::sync::Semaphore;

use super::functions::FunctionLoader;
use super::link::Link;
use super::probe::Probes;
use super::slots::SlotMap;
use crate::bus::PageReader;
use crate::bus::reads::Reads;
use crate::protocol::event::ChannelName;

/// Reads in flight. Redis executes one after the other anyway, so more would only fill its queue.
const READS_MAX: usize = 64;

/// The primary of slots whose primary is unknown, and of every channel of a Redis without cluster.
pub const FIRST: usize = 0;

/// A session, or an attempt to make one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionId {
    pub primary: usize,
    /// No two sessions or attempts of a process have the same.
    pub generation: u64,
}

/// A primary and what this node has under way there.
pub struct Primary {
    /// `HOST:PORT` in a cluster. `None`: a Redis without cluster, or the primary that stands for
    /// slots whose primary is unknown.
    pub address: Option<Arc<str>>,
    pub config: Config,
    pub link: Link,
    pub probes: Probes,
    pub functions: FunctionLoader,
    /// Readers that wait for pages of history.
    pub pages: Reads<ChannelName, PageReader>,
    /// Channels whose subscription is not confirmed yet, by its ticket.
    pub starting: VecDeque<(u64, ChannelName)>,
    /// Limits the reads in flight.
    pub reads: Arc<Semaphore>,
    /// Memory of the events that wait for this primary.
    pub queued_bytes: usize,
}

impl Primary {
    pub fn new(address: Option<Arc<str>>, config: Config, link: Link, longest_event: usize) -> Primary {
        Primary {
            address,
            config,
            link,
            probes: Probes::default(),
            functions: FunctionLoader::new(),
            pages: Reads::new(longest_event),
            starting: VecDeque::new(),
            reads: Arc::new(Semaphore::new(READS_MAX)),
            queued_bytes: 0,
        }
    }

    /// Frees memory that lists took while thousands of channels were in them.
    pub fn shrink(&mut self) {
        self.probes.shrink();
        self.starting.shrink_to(2 * self.starting.len());
    }

    /// Removes the next channel whose subscription is confirmed by `ticket`.
    pub fn next_confirmed(&mut self, ticket: u64) -> Option<(u64, ChannelName)> {
        let is_confirmed = self.starting.front().is_some_and(|(own, _)| *own <= ticket);
        is_confirmed.then(|| self.starting.pop_front()).flatten()
    }
}

/// All primaries, and the slots of a cluster. [`FIRST`] always exists.
pub struct Primaries {
    all: Slab<Primary>,
    slots: Option<SlotMap>,
    last_generation: u64,
}

impl Primaries {
    pub fn new(first: Primary) -> Primaries {
        let mut all = Slab::with_capacity(1);
        all.insert(first);
        Primaries { all, slots: None, last_generation: 0 }
    }

    /// The primary of a channel.
    pub fn of(&self, channel: &ChannelName) -> usize {
        self.slots.as_ref().map_or(FIRST, |slots| slots.primary_of(channel))
    }

    pub fn add(&mut self, primary: Primary) -> usize {
        self.all.insert(primary)
    }

    pub fn remove(&mut self, primary: usize) -> Primary {
        self.all.remove(primary)
    }

    /// Replaces the slots. False if they are the same as before.
    pub fn set_slots(&mut self, slots: SlotMap) -> bool {
        let is_new = self.slots.as_ref() != Some(&slots);
        if is_new {
            self.slots = Some(slots);
        }
        is_new
    }

    pub fn is_cluster_known(&self) -> bool {
        self.slots.is_some()
    }

    pub fn contains(&self, primary: usize) -> bool {
        self.all.contains(primary)
    }

    pub fn find(&self, address: &str) -> Option<usize> {
        self.all.iter().find(|(_, primary)| primary.address.as_deref() == Some(address)).map(|(at, _)| at)
    }

    pub fn iter(&self) -> impl Iterator<Item = (usize, &Primary)> {
        self.all.iter()
    }

    pub fn numbers(&self) -> Vec<usize> {
        self.all.iter().map(|(at, _)| at).collect()
    }

    /// How many primaries share what is limited for all together.
    pub fn shares(&self) -> usize {
        self.all.len().saturating_sub(1).max(1)
    }

    pub fn next_generation(&mut self) -> u64 {
        self.last_generation += 1;
        self.last_generation
    }

    /// Whether this is the newest session or attempt of its primary.
    pub fn is_current(&self, session: SessionId) -> bool {
        self.all.get(session.primary).is_some_and(|primary| primary.link.generation() == session.generation)
    }

    /// Whether this session is open.
    pub fn is_open(&self, session: SessionId) -> bool {
        self.is_current(session) && self[session.primary].link.session().is_some()
    }

    pub fn session_id(&self, primary: usize) -> SessionId {
        SessionId { primary, generation: self[primary].link.generation() }
    }
}

impl Index<usize> for Primaries {
    type Output = Primary;

    fn index(&self, primary: usize) -> &Primary {
        &self.all[primary]
    }
}

impl IndexMut<usize> for Primaries {
    fn index_mut(&mut self, primary: usize) -> &mut Primary {
        &mut self.all[primary]
    }
}
