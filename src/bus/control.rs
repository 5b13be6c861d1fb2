//! Commands of backends: the same on every bus, once they are in order.

use std::sync::Arc;

use super::{BusMessage, ShardSender};
use crate::limits::bans::{BANS_MAX, Bans};
use crate::metrics::BusMetrics;
use crate::protocol::close::CloseReason;
use crate::protocol::control::Command;

/// Why an order of a backend was not stored.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OrderError {
    /// Certainly not stored, for this reason. A retry is safe.
    #[error("not executed: {0}")]
    Rejected(Arc<str>),
    #[error("{} users are banned, the most at a time: unban some", BANS_MAX)]
    TooManyBans,
    /// It was sent to the bus, which did not reply in time.
    #[error("may or may not be executed: the bus did not reply in time")]
    Unknown,
}

/// Executes commands on this node.
#[derive(Debug)]
pub(super) struct Executor {
    bans: Arc<Bans>,
    shards: Arc<dyn ShardSender>,
    metrics: Arc<BusMetrics>,
}

impl Executor {
    pub fn new(bans: Arc<Bans>, shards: Arc<dyn ShardSender>, metrics: Arc<BusMetrics>) -> Executor {
        Executor { bans, shards, metrics }
    }

    /// Whether one more user may be banned, or this one is.
    pub fn may_ban(&self, user: &str) -> bool {
        self.bans.purge() < BANS_MAX || self.bans.time_left(user).is_some()
    }

    /// Has all shards execute a command. A ban is in force before they get it: a handshake that
    /// misses the ban has its connection in a shard before the command, which closes it.
    pub fn execute(&self, command: Command) {
        self.metrics.commands.add(1);
        let (user, channel, reason) = match command {
            Command::Disconnect { user, channel } => (user, channel, CloseReason::Disconnected),
            Command::Ban { user, until } => {
                self.metrics.bans.set(self.bans.insert(user.clone(), until) as u64);
                (user, None, CloseReason::Banned)
            }
            Command::Unban { user } => {
                return self.metrics.bans.set(self.bans.remove(&user) as u64);
            }
        };
        for shard in 0..self.shards.count() {
            let (user, channel) = (user.clone(), channel.clone());
            self.shards.send(shard, BusMessage::Disconnect { user, channel, reason });
        }
    }

    /// Replaces the bans by those of the bus, and closes the connections of users who are banned:
    /// they may have connected before this node knew.
    pub fn replace_bans(&self, now: u64, bans: Vec<(Arc<str>, u64)>) {
        self.metrics.bans.set(self.bans.replace(now, bans) as u64);
        if !self.bans.is_empty() {
            (0..self.shards.count()).for_each(|shard| self.shards.send(shard, BusMessage::DisconnectBanned));
        }
    }

    /// Removes expired bans.
    pub fn expire_bans(&self) {
        if !self.bans.is_empty() {
            self.metrics.bans.set(self.bans.purge() as u64);
        }
    }
}
