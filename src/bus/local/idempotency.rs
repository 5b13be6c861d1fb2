//! Idempotency keys of the local bus.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::protocol::event::{ChannelName, EventId};

/// How long an idempotency key is kept. epoch.lua has the same time.
const KEY_TTL: Duration = Duration::from_secs(600);
/// Keys may use this part of the memory of the bus. A third of 64 MiB holds about 90,000 keys of 36
/// bytes. Beyond it the oldest are dropped.
const MEMORY_PART: usize = 3;
/// Bytes of a key beside its text and that of its channel: two allocations, 48 bytes in the queue
/// and up to 80 in the table.
const KEY_OVERHEAD: usize = 160;

/// The ids of events that were published with an idempotency key, by channel and key.
#[derive(Debug)]
pub(super) struct IdempotencyKeys {
    ids: HashMap<(ChannelName, Arc<str>), EventId>,
    /// The same keys, oldest first, each with the time of its publish.
    queue: VecDeque<(Instant, (ChannelName, Arc<str>))>,
    /// Memory of all keys.
    bytes: usize,
    bytes_max: usize,
}

fn cost((channel, key): &(ChannelName, Arc<str>)) -> usize {
    KEY_OVERHEAD + channel.as_str().len() + key.len()
}

impl IdempotencyKeys {
    /// No keys yet, for a bus with this much memory.
    pub(super) fn new(memory: usize) -> IdempotencyKeys {
        IdempotencyKeys {
            ids: HashMap::new(),
            queue: VecDeque::new(),
            bytes: 0,
            bytes_max: memory / MEMORY_PART,
        }
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The id of the event with this key.
    pub(super) fn find(&mut self, channel: &ChannelName, key: &Arc<str>, now: Instant) -> Option<EventId> {
        while let Some((since, known)) = self.queue.front() {
            if now.saturating_duration_since(*since) < KEY_TTL && self.bytes < self.bytes_max {
                break;
            }
            self.bytes -= cost(known);
            self.ids.remove(known);
            self.queue.pop_front();
        }
        self.ids.get(&(channel.clone(), key.clone())).copied()
    }

    /// Keeps the id for a key that [`IdempotencyKeys::find`] did not find.
    pub(super) fn insert(&mut self, channel: ChannelName, key: Arc<str>, id: EventId, now: Instant) {
        let known = (channel, key);
        self.bytes += cost(&known);
        self.queue.push_back((now, known.clone()));
        self.ids.insert(known, id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_expire_and_stay_within_memory() {
        const MEMORY: usize = 60_000;
        let channel = ChannelName::parse("room").unwrap();
        let key = |number: u64| Arc::from(number.to_string());
        let mut keys = IdempotencyKeys::new(MEMORY);
        let start = Instant::now();
        for number in 0..1000 {
            assert_eq!(keys.find(&channel, &key(number), start), None);
            keys.insert(channel.clone(), key(number), EventId(number), start);
            assert!(keys.bytes() < MEMORY / MEMORY_PART + 200, "{}", keys.bytes());
        }
        assert_eq!(keys.find(&channel, &key(0), start), None);
        assert_eq!(keys.find(&channel, &key(999), start), Some(EventId(999)));
        assert_eq!(keys.find(&channel, &key(999), start + KEY_TTL), None);
        assert_eq!((keys.bytes(), keys.ids.len()), (0, 0));
    }
}
