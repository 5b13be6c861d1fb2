//! Which channels a node follows. A client is charged for channels that are new to the node, not
//! for those that its next connection finds on another shard.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Mutex, MutexGuard};

use crate::protocol::event::ChannelName;

/// The channels that the shards of a node follow. The lock is taken when a shard starts or stops
/// following a channel, and when a client names one that the shard does not follow.
#[derive(Debug, Default)]
pub struct FollowedChannels {
    /// How many times each is followed: by every shard, in each of its forms.
    counts: Mutex<HashMap<ChannelName, u32>>,
}

impl FollowedChannels {
    /// Whether any shard follows this channel.
    pub fn contains(&self, channel: &ChannelName) -> bool {
        self.counts().contains_key(channel)
    }

    /// Notes that a shard follows this channel, in one more form.
    pub fn add(&self, channel: ChannelName) {
        *self.counts().entry(channel).or_default() += 1;
    }

    /// Notes that a shard stops following this channel, in one of its forms.
    pub fn remove(&self, channel: ChannelName) {
        let mut counts = self.counts();
        if let Entry::Occupied(mut count) = counts.entry(channel) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
                let len = counts.len();
                if counts.capacity() > 4 * len {
                    counts.shrink_to(2 * len);
                }
            }
        }
    }

    fn counts(&self) -> MutexGuard<'_, HashMap<ChannelName, u32>> {
        self.counts.lock().expect("nothing panics while holding it")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_channel_is_followed_until_the_last_shard_leaves() {
        let name = |name| ChannelName::parse(name).expect("a name");
        let followed = FollowedChannels::default();
        followed.add(name("a"));
        followed.add(name("a"));
        followed.remove(name("a"));
        assert!(followed.contains(&name("a")) && !followed.contains(&name("b")));
        followed.remove(name("a"));
        assert!(!followed.contains(&name("a")));
    }
}
