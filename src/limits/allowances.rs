//! The [`crate::limits::rate::Allowance`]s of clients. All connections of a client share one, and
//! it outlives them.
//!
//! A connection looks up its client once, at its first message or new channel. After that a message
//! costs one atomic operation. An entry that no connection holds is dropped once its allowance is
//! full again: before that, a new entry would allow more. While the table is full, a new client
//! gets an allowance that its other connections don't share, so that no client can evict the
//! used-up allowances of others.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, RandomState};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use crate::config::Settings;
use crate::limits::rate::{Allowance, RateLimiter};

/// Entries beyond one per connection: for clients that disconnected with used-up allowances. An
/// entry takes some 100 bytes.
const LEFT_MAX: usize = 65_536;

/// Parts of the table, each with its own lock, so that shards rarely wait for each other and a
/// sweep is short.
const PARTS: usize = 64;

/// Entries in a part before it is swept.
const SWEEP_MIN: usize = 64;

/// Least time between two sweeps of a part, in nanoseconds: in a full part every new client would
/// start one.
const SWEEP_PAUSE: u64 = 1_000_000_000;

/// The allowances of all clients of a node.
#[derive(Debug)]
pub struct Allowances {
    limiter: Option<RateLimiter>,
    parts: Box<[Mutex<Part>]>,
    /// Most entries of a part.
    max_entries: usize,
    hasher: RandomState,
    started: Instant,
}

impl Allowances {
    pub fn new(settings: &Settings) -> Allowances {
        Allowances {
            limiter: RateLimiter::new(settings),
            parts: (0..PARTS).map(|_| Mutex::default()).collect(),
            max_entries: (settings.connection_limit() as usize).saturating_add(LEFT_MAX) / PARTS,
            hasher: RandomState::new(),
            started: Instant::now(),
        }
    }

    /// `None` if rates are not limited.
    pub fn limiter(&self) -> Option<&RateLimiter> {
        self.limiter.as_ref()
    }

    /// The clock of all allowances: nanoseconds since the node started.
    pub fn now(&self) -> u64 {
        self.started.elapsed().as_nanos() as u64 // enough for five hundred years
    }

    /// The allowance of a client.
    pub fn get(&self, client: impl Hash) -> Arc<Allowance> {
        let key = self.hasher.hash_one(client);
        let now = self.now();
        let tat = self.limiter.as_ref().map_or(0, |limiter| limiter.first_tat(now));
        let part = &self.parts[key as usize % PARTS];
        part.lock().expect("nothing panics while holding it").get(key, self.max_entries, now, tat)
    }
}

#[derive(Debug, Default)]
struct Part {
    /// Keyed by a hash of the client, since user ids are long. Clients with the same hash share an
    /// entry.
    entries: HashMap<u64, Arc<Allowance>>,
    /// Number of entries at which the part is swept.
    sweep_at: usize,
    /// Time of the last sweep, in nanoseconds.
    swept: u64,
}

impl Part {
    /// The entry of this client. A new one starts with this TAT.
    fn get(&mut self, key: u64, max_entries: usize, now: u64, tat: u64) -> Arc<Allowance> {
        if let Some(allowance) = self.entries.get(&key) {
            return allowance.clone();
        }
        let due = self.entries.len() >= self.sweep_at.min(max_entries);
        if due && now.saturating_sub(self.swept) >= SWEEP_PAUSE {
            self.swept = now;
            self.entries.retain(|_, allowance| Arc::strong_count(allowance) > 1 || !allowance.is_full(now));
            self.entries.shrink_to(2 * self.entries.len());
            self.sweep_at = SWEEP_MIN.max(2 * self.entries.len());
        }
        let allowance = Arc::new(Allowance::new(tat));
        if self.entries.len() < max_entries {
            self.entries.insert(key, allowance.clone());
        }
        allowance
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn only_full_allowances_are_dropped() {
        const LATER: u64 = 100 * SECOND;
        let mut part = Part::default();
        let held = part.get(0, 100, SECOND, SECOND);
        (1..90).for_each(|key| drop(part.get(key, 100, SECOND, 5 * SECOND)));
        (90..100).for_each(|key| drop(part.get(key, 100, SECOND, 2 * LATER)));
        // The part is full: a new client is not added, and the others stay.
        let first = part.get(100, 100, SECOND + 1, SECOND);
        assert!(!Arc::ptr_eq(&first, &part.get(100, 100, SECOND + 2, SECOND)));
        assert_eq!(part.entries.len(), 100);
        let next = part.get(101, 100, LATER, LATER);
        assert!(Arc::ptr_eq(&next, &part.get(101, 100, LATER, LATER)));
        assert!(Arc::ptr_eq(&held, &part.get(0, 100, LATER, LATER)));
        assert_eq!(part.entries.len(), 12, "one that is held, ten that are used up, and the new one");
    }
}
