//! The shards whose clients want to know who is in a channel.

use std::sync::Arc;

use super::{PresenceUpdate, Snapshot, Update, View};
use crate::bus::{BusMessage, Follower, ShardSender};
use crate::protocol::event::ChannelName;

/// The shards that follow the presence of one channel, and what they see.
#[derive(Debug, Default)]
pub struct Audience {
    followers: Vec<Follower>,
    view: View,
    latest: Option<Update>,
}

impl Audience {
    pub fn is_empty(&self) -> bool {
        self.followers.is_empty()
    }

    /// Adds a follower. If others know who is in the channel, it gets the same.
    pub fn add(&mut self, name: &ChannelName, follower: Follower, shards: &dyn ShardSender) {
        if self.followers.contains(&follower) {
            return;
        }
        self.followers.push(follower);
        if let Some(update) = &self.latest {
            let channel = follower.channel(name);
            let update = Arc::new(PresenceUpdate::new(update.clone(), channel.clone()));
            shards.send(follower.shard, BusMessage::Presence { channel, update });
        }
    }

    pub fn remove(&mut self, follower: Follower) {
        self.followers.retain(|other| *other != follower);
        if self.followers.is_empty() {
            *self = Audience::default();
        }
    }

    /// Most users of whom names are read. In a channel that had more than `most`, fewer: so that one
    /// user who comes and goes there does not cause a list each time.
    pub fn list_max(&self, most: usize) -> usize {
        if self.latest.is_some() && !self.view.has_list() { most - most / 10 } else { most }
    }

    /// Sends what has changed to the followers.
    pub fn update(&mut self, name: &ChannelName, read: Snapshot, settled: bool, shards: &dyn ShardSender) {
        let Some(update) = self.view.update(read, settled) else { return };
        let mut forms: Vec<Arc<PresenceUpdate>> = Vec::new();
        for follower in &self.followers {
            let channel = follower.channel(name);
            let made = forms.iter().find(|made| made.channel() == &channel).cloned();
            let update = made.unwrap_or_else(|| {
                let made = Arc::new(PresenceUpdate::new(update.clone(), channel.clone()));
                forms.push(made.clone());
                made
            });
            shards.send(follower.shard, BusMessage::Presence { channel, update });
        }
        self.latest = Some(update);
    }
}
