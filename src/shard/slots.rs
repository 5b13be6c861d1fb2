//! Values by slot, in chunks. Growth copies nothing, and the memory of an empty chunk is freed.

use std::collections::BTreeSet;
use std::ops::{Index, IndexMut};

use slab::Slab;

/// Slots in a chunk. With connections a chunk takes 704 KiB, of which the kernel provides the pages
/// that are used. The allocator returns blocks of more than 512 KiB when they are freed; smaller
/// ones share its pages, which it keeps.
const CHUNK: usize = 4096;

/// A slab whose entries never move.
#[derive(Debug)]
pub struct Slots<T> {
    chunks: Vec<Slab<T>>,
    /// The indexes of chunks with a free slot. The first one gets the next value, so that the last
    /// ones become empty.
    vacant: BTreeSet<usize>,
    len: usize,
}

impl<T> Slots<T> {
    pub fn new() -> Slots<T> {
        Slots { chunks: Vec::new(), vacant: BTreeSet::new(), len: 0 }
    }

    /// Adds the value that `create` returns for its slot. Returns the slot.
    pub fn insert(&mut self, create: impl FnOnce(u32) -> T) -> u32 {
        let index = self.vacant.first().copied().unwrap_or_else(|| {
            self.chunks.push(Slab::new());
            self.vacant.insert(self.chunks.len() - 1);
            self.chunks.len() - 1
        });
        let chunk = &mut self.chunks[index];
        if chunk.is_empty() {
            chunk.reserve_exact(CHUNK);
        }
        let entry = chunk.vacant_entry();
        let slot = (index * CHUNK + entry.key()) as u32;
        entry.insert(create(slot));
        if chunk.len() == CHUNK {
            self.vacant.remove(&index);
        }
        self.len += 1;
        slot
    }

    /// Panics if the slot is free.
    pub fn remove(&mut self, slot: u32) -> T {
        let (index, key) = split(slot);
        let chunk = &mut self.chunks[index];
        let value = chunk.remove(key);
        if chunk.is_empty() {
            *chunk = Slab::new();
        }
        self.vacant.insert(index);
        self.len -= 1;
        value
    }

    pub fn get(&self, slot: u32) -> Option<&T> {
        let (index, key) = split(slot);
        self.chunks.get(index)?.get(key)
    }

    /// No slot has this number or a higher one.
    pub fn end(&self) -> u32 {
        (self.chunks.len() * CHUNK) as u32
    }

    pub fn len(&self) -> usize {
        self.len
    }

    /// Slots in use, in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = u32> {
        self.chunks
            .iter()
            .enumerate()
            .flat_map(|(index, chunk)| chunk.iter().map(move |(key, _)| (index * CHUNK + key) as u32))
    }
}

/// The index of the chunk, and the key in it.
fn split(slot: u32) -> (usize, usize) {
    (slot as usize / CHUNK, slot as usize % CHUNK)
}

impl<T> Index<u32> for Slots<T> {
    type Output = T;

    fn index(&self, slot: u32) -> &T {
        let (index, key) = split(slot);
        &self.chunks[index][key]
    }
}

impl<T> IndexMut<u32> for Slots<T> {
    fn index_mut(&mut self, slot: u32) -> &mut T {
        let (index, key) = split(slot);
        &mut self.chunks[index][key]
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    impl<T> Slots<T> {
        /// Slots for which there is memory.
        fn allocated(&self) -> usize {
            self.chunks.iter().map(Slab::capacity).sum()
        }
    }

    proptest! {
        #[test]
        fn slots_hold_what_was_put_into_them(steps in prop::collection::vec((any::<u8>(), 1..3000usize), 1..10)) {
            let (mut slots, mut model, mut next) = (Slots::new(), BTreeMap::new(), 0);
            for (what, count) in steps {
                for _ in 0..count {
                    if what % 2 == 0 {
                        next += 1;
                        prop_assert_eq!(model.insert(slots.insert(|_| next), next), None, "a slot in use");
                    } else if let Some(slot) = model.keys().nth(what as usize % model.len().max(1)).copied() {
                        prop_assert_eq!(Some(slots.remove(slot)), model.remove(&slot));
                    }
                }
                prop_assert_eq!(slots.len(), model.len());
                prop_assert!(slots.iter().eq(model.keys().copied()));
                prop_assert!((0..slots.end() + 1).all(|slot| slots.get(slot) == model.get(&slot)));
            }
        }
    }

    #[test]
    fn memory_follows_the_number_of_values() {
        let mut slots = Slots::new();
        let all: Vec<u32> = (0..10 * CHUNK as u32).map(|value| slots.insert(|_| value)).collect();
        assert_eq!(slots.allocated(), 10 * CHUNK);
        all[5..].iter().for_each(|slot| _ = slots.remove(*slot));
        assert_eq!(slots.allocated(), CHUNK);
        (0..CHUNK as u32).for_each(|value| _ = slots.insert(|_| value));
        assert_eq!(slots.allocated(), 2 * CHUNK, "the first chunks are filled first");
    }
}
