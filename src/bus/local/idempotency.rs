//! Idempotency keys of the local bus.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::protocol::event::{ChannelName, EventId};

/// How long an idempotency key is kept. run.lua has the same time.
const KEY_TTL: Duration = Duration::from_secs(600);
/// Most keys kept, some 200 bytes each. Beyond it the oldest are dropped.
const KEYS_MAX: usize = 100_000;

/// The ids of events that were published under an idempotency key, by channel and key.
#[derive(Debug, Default)]
pub(super) struct Keys {
    ids: HashMap<(ChannelName, Arc<str>), EventId>,
    /// The same keys, oldest first, each with the time of its publish.
    ages: VecDeque<(Instant, (ChannelName, Arc<str>))>,
}

impl Keys {
    /// The id of the event with this key.
    pub(super) fn find(&mut self, channel: &ChannelName, key: &Arc<str>, now: Instant) -> Option<EventId> {
        while let Some((since, known)) = self.ages.front() {
            if now.saturating_duration_since(*since) < KEY_TTL && self.ages.len() < KEYS_MAX {
                break;
            }
            self.ids.remove(known);
            self.ages.pop_front();
        }
        self.ids.get(&(channel.clone(), key.clone())).copied()
    }

    /// Keeps the id for a key that [`Keys::find`] did not find.
    pub(super) fn insert(&mut self, channel: ChannelName, key: Arc<str>, id: EventId, now: Instant) {
        self.ages.push_back((now, (channel.clone(), key.clone())));
        self.ids.insert((channel, key), id);
    }
}
