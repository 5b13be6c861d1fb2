//! What is held in memory under a byte budget, oldest first.

use std::collections::VecDeque;

/// Keys of what is held, oldest first, with the bytes that each takes. The owner holds the values;
/// this queue says which of them goes next.
///
/// Values of an owner that goes away all at once (the entries of a dropped channel) would take a
/// search to remove. They stay in the queue as stale keys, which count no bytes: see
/// [`EvictionQueue::mark_stale`].
#[derive(Debug)]
pub struct EvictionQueue<K> {
    /// Keys and their bytes.
    queue: VecDeque<(K, usize)>,
    /// Bytes of all keys that are not stale.
    bytes: usize,
    stale: usize,
}

/// Stale keys up to this number are left in the queue: they take at most a few KiB.
const STALE_MIN: usize = 1024;

impl<K> EvictionQueue<K> {
    pub fn new() -> EvictionQueue<K> {
        EvictionQueue { queue: VecDeque::new(), bytes: 0, stale: 0 }
    }

    /// Bytes of everything that is held.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Adds the newest key, whose value takes this many bytes.
    pub fn push(&mut self, key: K, bytes: usize) {
        self.bytes += bytes;
        self.queue.push_back((key, bytes));
    }

    pub fn oldest(&self) -> Option<&K> {
        self.queue.front().map(|(key, _)| key)
    }

    /// The oldest key, if all values together take more than `budget` bytes.
    pub fn oldest_over(&self, budget: usize) -> Option<&K> {
        self.oldest().filter(|_| self.bytes > budget)
    }

    /// Removes the oldest key, which is not stale.
    pub fn pop(&mut self) -> Option<K> {
        let (key, bytes) = self.queue.pop_front()?;
        self.bytes -= bytes;
        Some(key)
    }

    /// Removes the oldest key for which `may_go` holds, if all values together take more than
    /// `budget` bytes.
    pub fn evict(&mut self, budget: usize, may_go: impl Fn(&K) -> bool) -> Option<K> {
        if self.bytes <= budget {
            return None;
        }
        let index = self.queue.iter().position(|(key, _)| may_go(key))?;
        self.remove_at(index)
    }

    /// Removes a key, by a linear search.
    pub fn remove(&mut self, key: &K)
    where
        K: PartialEq,
    {
        if let Some(index) = self.queue.iter().position(|(other, _)| other == key) {
            self.remove_at(index);
        }
    }

    fn remove_at(&mut self, index: usize) -> Option<K> {
        let (key, bytes) = self.queue.remove(index)?;
        self.bytes -= bytes;
        Some(key)
    }

    /// Notes that this many keys are stale: their values, which took `bytes` together, are gone.
    pub fn mark_stale(&mut self, keys: usize, bytes: usize) {
        self.bytes -= bytes;
        self.stale += keys;
    }

    /// Removes the oldest key, which is stale.
    pub fn skip_stale(&mut self) {
        self.queue.pop_front();
        self.stale = self.stale.saturating_sub(1);
    }

    /// Removes all stale keys, once they are more than half of the queue.
    pub fn compact(&mut self, is_held: impl Fn(&K) -> bool) {
        if self.stale > STALE_MIN + self.queue.len() / 2 {
            self.queue.retain(|(key, _)| is_held(key));
            self.stale = 0;
        }
    }
}

impl<K> Default for EvictionQueue<K> {
    fn default() -> EvictionQueue<K> {
        EvictionQueue::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn evicts_the_oldest_until_the_rest_fits() {
        let mut queue = EvictionQueue::new();
        (0..5).for_each(|key| queue.push(key, 10));
        assert_eq!(queue.oldest_over(50), None);
        assert_eq!(queue.oldest_over(49), Some(&0));
        assert_eq!(queue.evict(40, |key| *key > 1), Some(2));
        assert_eq!((queue.evict(40, |_| true), queue.bytes()), (None, 40));
        assert_eq!(queue.evict(30, |key| *key > 9), None);
        queue.remove(&3);
        assert_eq!((queue.pop(), queue.pop(), queue.pop()), (Some(0), Some(1), Some(4)));
        assert!(queue.is_empty() && queue.bytes() == 0);
    }

    #[test]
    fn stale_keys_count_no_bytes_and_go_in_bulk() {
        let mut queue = EvictionQueue::new();
        (0..3000).for_each(|key| queue.push(key, 1));
        queue.mark_stale(2000, 2000);
        queue.compact(|key| *key >= 2000);
        assert_eq!((queue.queue.len(), queue.bytes()), (3000, 1000), "fewer than half and 1024");
        queue.mark_stale(600, 600);
        queue.compact(|key| *key >= 2600);
        assert_eq!((queue.queue.len(), queue.bytes(), queue.oldest()), (400, 400, Some(&2600)));
    }
}
