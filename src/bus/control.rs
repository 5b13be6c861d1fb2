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
    /// It was sent to the bus, which did not reply in time, or has lost commands.
    #[error("may or may not be executed: the bus did not confirm it in time")]
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
        if self.bans.len() >= BANS_MAX {
            self.bans.purge();
        }
        self.bans.len() < BANS_MAX || self.bans.time_left(user).is_some()
    }

    /// Has all shards execute a command. A ban is in force before they get it: a handshake that
    /// misses the ban has its connection in a shard before the command, which closes it. Returns
    /// `false` for a ban that has ended.
    pub fn execute(&self, command: Command) -> bool {
        self.metrics.commands.add(1);
        let (user, channel, reason, in_force) = match command {
            Command::Disconnect { user, channel } => (user, channel, CloseReason::Disconnected, true),
            Command::Ban { user, until } => {
                let in_force = self.bans.insert(user.clone(), until);
                self.count_bans();
                (user, None, CloseReason::Banned, in_force)
            }
            Command::Unban { user } => {
                self.bans.remove(&user);
                self.count_bans();
                return true;
            }
        };
        for shard in 0..self.shards.count() {
            let (user, channel) = (user.clone(), channel.clone());
            self.shards.send(shard, BusMessage::Disconnect { user, channel, reason });
        }
        in_force
    }

    fn count_bans(&self) {
        self.metrics.bans.set(self.bans.len() as u64);
    }

    /// Replaces the bans by those of the bus, and closes the connections of users who are banned:
    /// they may have connected before this node knew.
    pub fn replace_bans(&self, now: u64, bans: Vec<(Arc<str>, u64)>) {
        self.bans.replace(now, bans);
        self.count_bans();
        if self.bans.is_empty() {
            return;
        }
        let users = Arc::new(self.bans.users());
        for shard in 0..self.shards.count() {
            self.shards.send(shard, BusMessage::DisconnectBanned(users.clone()));
        }
    }

    /// Removes expired bans.
    pub fn expire_bans(&self) {
        if !self.bans.is_empty() {
            self.bans.purge();
            self.count_bans();
        }
    }
}
