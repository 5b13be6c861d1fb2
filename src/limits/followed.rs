//! Which channels a node follows. A client is charged for channels that are new to the node, not
//! for those that its next connection finds on another shard, and may hold only a part of
//! `--max-channels`.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::limits::rate::{Allowance, Held};
use crate::protocol::event::ChannelName;

/// The channels that the shards of a node follow. The lock is taken when a shard starts or stops
/// following a channel, and when a client names one that the shard does not follow.
#[derive(Debug, Default)]
pub struct FollowedChannels {
    counts: Mutex<HashMap<ChannelName, Followed>>,
}

#[derive(Debug, Default)]
struct Followed {
    /// How many times it is followed: by every shard, in each of its forms.
    count: u32,
    /// Counts it for the client that was first to subscribe to it, as long as the node follows it.
    /// Other connections of that client can't take it over uncounted.
    holder: Option<Held>,
}

impl FollowedChannels {
    /// Whether any shard follows this channel.
    pub fn contains(&self, channel: &ChannelName) -> bool {
        self.counts().contains_key(channel)
    }

    /// Whether it is followed and counts for a client that subscribed to it.
    pub fn is_held(&self, channel: &ChannelName) -> bool {
        self.counts().get(channel).is_some_and(|followed| followed.holder.is_some())
    }

    /// Notes that a shard follows this channel, in one more form. `holder` is the client for which
    /// it counts if it does for none.
    pub fn add(&self, channel: ChannelName, holder: Option<Arc<Allowance>>) {
        let mut counts = self.counts();
        let followed = counts.entry(channel).or_default();
        followed.count += 1;
        if followed.holder.is_none() {
            followed.holder = holder.map(Held::new);
        }
    }

    /// Notes that a shard stops following this channel, in one of its forms.
    pub fn remove(&self, channel: ChannelName) {
        let mut counts = self.counts();
        if let Entry::Occupied(mut followed) = counts.entry(channel) {
            followed.get_mut().count -= 1;
            if followed.get().count == 0 {
                followed.remove();
                let len = counts.len();
                if counts.capacity() > 4 * len {
                    counts.shrink_to(2 * len);
                }
            }
        }
    }

    fn counts(&self) -> MutexGuard<'_, HashMap<ChannelName, Followed>> {
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
        followed.add(name("a"), None);
        followed.add(name("a"), None);
        followed.remove(name("a"));
        assert!(followed.contains(&name("a")) && !followed.contains(&name("b")));
        followed.remove(name("a"));
        assert!(!followed.contains(&name("a")));
    }

    #[test]
    fn a_channel_counts_for_its_first_subscriber_until_nobody_follows_it() {
        let name = || ChannelName::parse("a").expect("a name");
        let followed = FollowedChannels::default();
        let (first, second) = (Arc::new(Allowance::new(0)), Arc::new(Allowance::new(0)));
        followed.add(name(), None);
        assert!(!followed.is_held(&name()));
        followed.add(name(), Some(first.clone()));
        followed.add(name(), Some(second.clone()));
        assert!(followed.is_held(&name()));
        for _ in 0..3 {
            assert_eq!((first.held(), second.held()), (1, 0));
            followed.remove(name());
        }
        assert_eq!((first.held(), second.held()), (0, 0));
        followed.add(name(), Some(second.clone()));
        drop(followed);
        assert_eq!((first.held(), second.held()), (0, 0));
    }
}
