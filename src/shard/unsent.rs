//! Bytes kept for clients whose sockets are full: the rest of a frame that has left the feed, and
//! frames for one client alone. A frame may be as long as a message, so all together have a limit.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use super::Shard;
use crate::protocol::close::CloseReason;
use crate::ws::connection::State;

/// The address and the length of a frame's bytes.
type FrameId = (usize, u64);

/// What all shards of the node keep for full sockets.
#[derive(Debug, Default)]
pub struct NodeUnsent(Mutex<NodeBytes>);

/// Shards share the bytes of a frame, so a frame counts once for the node.
#[derive(Debug, Default)]
struct NodeBytes {
    /// How many shards keep each frame.
    frames: HashMap<FrameId, u64>,
    total: u64,
}

/// What one shard keeps, as of its last count.
#[derive(Debug, Default)]
struct ShardBytes {
    frames: Vec<FrameId>,
    /// Bytes for single clients.
    own: u64,
}

impl NodeUnsent {
    /// Replaces what one shard keeps. Returns the bytes that the node keeps, and how many shards
    /// keep each of the new frames.
    fn replace(&self, old: &ShardBytes, new: &ShardBytes) -> (u64, Vec<u64>) {
        let mut node = self.0.lock().expect("nothing panics while holding it");
        node.total += new.own;
        for frame in &new.frames {
            let shards = node.frames.entry(*frame).or_default();
            *shards += 1;
            node.total += if *shards == 1 { frame.1 } else { 0 };
        }
        node.total -= old.own;
        for frame in &old.frames {
            let Some(shards) = node.frames.get_mut(frame) else { continue };
            *shards -= 1;
            if *shards == 0 {
                node.frames.remove(frame);
                node.total -= frame.1;
            }
        }
        (node.total, new.frames.iter().map(|frame| node.frames[frame]).collect())
    }
}

/// What one shard keeps for full sockets.
#[derive(Debug)]
pub struct Unsent {
    node: Arc<NodeUnsent>,
    /// What this shard added to `node`.
    counted: ShardBytes,
    /// Slots with bytes for full sockets, found so far by the sweep.
    pub listed: Vec<u32>,
    /// How many more bytes may be kept before they are counted again.
    free_bytes: u64,
}

impl Unsent {
    pub fn new(node: Arc<NodeUnsent>) -> Unsent {
        Unsent { node, counted: ShardBytes::default(), listed: Vec::new(), free_bytes: 0 }
    }
}

/// A frame that connections of this shard keep.
#[derive(Debug, Default)]
struct Frame {
    /// How many connections keep it.
    holders: u64,
    /// This shard's part of its bytes.
    part: u64,
}

/// A connection for which something is kept.
struct Holder {
    slot: u32,
    /// Bytes for this client alone.
    own: u64,
    /// The frame that it shares with others.
    frame: Option<FrameId>,
    /// Its part of the bytes, times the ticks since its socket last took any.
    cost: u64,
}

impl Shard {
    /// Counts what is kept for these connections. If the node keeps too much, closes the costliest
    /// of them.
    pub(super) fn limit_unsent(&mut self, slots: impl Iterator<Item = u32>) {
        let mut frames: HashMap<FrameId, Frame> = HashMap::new();
        let mut holders = Vec::new();
        for slot in slots {
            let Some(connection) = self.connections.get(slot) else { continue };
            let (own, frame) = connection.unsent();
            if let Some(frame) = frame {
                frames.entry(frame).or_default().holders += 1;
            }
            if own > 0 || frame.is_some() {
                holders.push(Holder { slot, own, frame, cost: 0 });
            }
        }
        let mut own = holders.iter().map(|holder| holder.own).sum();
        let (mut total, others) = self.count_for_node(own, &mut frames);
        let most = self.settings().unsent_memory();
        // What the other shards leave free, but at least this shard's part.
        let allowed = most.saturating_sub(others).max(most / self.context.metrics.shards.len() as u64);
        if total > allowed {
            for holder in &mut holders {
                let frame = holder.frame.map(|frame| &frames[&frame]);
                let part = frame.map_or(0, |frame| frame.part / frame.holders);
                let waited = self.connections[holder.slot].liveness.silence(self.tick);
                holder.cost = (holder.own + part) * (u64::from(waited) + 1);
            }
            holders.sort_unstable_by_key(|holder| holder.cost);
            while total > allowed / 4 * 3
                && let Some(holder) = holders.pop()
            {
                own -= holder.own;
                total -= holder.own;
                if let Some(frame) = holder.frame.and_then(|frame| frames.get_mut(&frame)) {
                    frame.holders -= 1;
                    total -= if frame.holders == 0 { frame.part } else { 0 };
                }
                match self.connections[holder.slot].state {
                    State::Closing { .. } => self.connections.discard(holder.slot),
                    _ => self.close(holder.slot, CloseReason::SlowReader),
                }
            }
            frames.retain(|_, frame| frame.holders > 0);
            self.count_for_node(own, &mut frames);
        }
        self.unsent.free_bytes = allowed.saturating_sub(total).max(allowed / 8);
        self.metrics().unsent_bytes.set(total);
    }

    /// Counts what this shard keeps towards the node's total, and sets its part of each frame.
    /// Returns the bytes of this shard by these parts, and those of the other shards.
    fn count_for_node(&mut self, own: u64, frames: &mut HashMap<FrameId, Frame>) -> (u64, u64) {
        let new = ShardBytes { frames: frames.keys().copied().collect(), own };
        let (all, shards) = self.unsent.node.replace(&self.unsent.counted, &new);
        let mut total = own;
        for (id, shards) in new.frames.iter().zip(shards) {
            let part = id.1 / shards;
            total += part;
            frames.entry(*id).or_default().part = part;
        }
        self.unsent.counted = new;
        (total, all - total)
    }

    /// Counts bytes of frames that have left the feed and are kept.
    pub(super) fn count_kept(&mut self, bytes: u64) {
        self.unsent.free_bytes = self.unsent.free_bytes.saturating_sub(bytes);
        if self.unsent.free_bytes == 0 {
            let all: Vec<u32> = self.connections.slots().collect();
            self.limit_unsent(all.into_iter());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_that_shards_share_counts_once() {
        let node = NodeUnsent::default();
        let shard = |frames: &[(usize, u64)], own| ShardBytes { frames: frames.to_vec(), own };
        let none = shard(&[], 0);
        let first = shard(&[(1, 100), (2, 10)], 5);
        assert_eq!(node.replace(&none, &first), (115, vec![1, 1]));
        let second = shard(&[(2, 10)], 1);
        assert_eq!(node.replace(&none, &second), (116, vec![2]));
        let third = shard(&[(2, 10), (3, 1000)], 0);
        assert_eq!(node.replace(&first, &third), (1011, vec![2, 1]));
        assert_eq!(node.replace(&second, &none), (1010, vec![]));
        assert_eq!(node.replace(&third, &third), (1010, vec![1, 1]));
    }
}
