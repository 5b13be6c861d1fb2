//! Bytes kept for clients whose sockets are full: the rest of a frame that has left the feed, and frames for one client
//! alone. A frame may be as long as a message, so all together have a limit.

use std::collections::HashMap;

use super::Shard;
use crate::protocol::close::CloseReason;
use crate::ws::connection::State;

/// A connection for which something is kept.
struct Holder {
    slot: u32,
    /// Bytes for this client alone.
    own: u64,
    /// The frame that it shares with others, by its address.
    frame: Option<usize>,
    /// Its part of the bytes, times the ticks since its socket last took any.
    cost: u64,
}

impl Shard {
    /// Counts what is kept for these connections. If the node keeps too much, closes the costliest of them.
    pub(super) fn bound_unsent(&mut self, slots: Vec<u32>) {
        let mut frames: HashMap<usize, (u64, u64)> = HashMap::new(); // length and holders
        let mut total = 0;
        let mut holders = Vec::new();
        for slot in slots {
            let Some(connection) = self.connections.get(slot as usize) else { continue };
            let (own, frame) = connection.unsent();
            if let Some((key, length)) = frame {
                let (_, sharers) = frames.entry(key).or_insert((length, 0));
                total += if *sharers == 0 { length } else { 0 };
                *sharers += 1;
            }
            total += own;
            if own > 0 || frame.is_some() {
                holders.push(Holder { slot, own, frame: frame.map(|(key, _)| key), cost: 0 });
            }
        }
        let others = self.metrics.shards.iter().map(|shard| shard.unsent_bytes.get()).sum::<u64>()
            - self.numbers().unsent_bytes.get();
        let most = self.settings.unsent_memory();
        // What the other shards leave free, but at least this shard's part.
        let allowed = most.saturating_sub(others).max(most / self.metrics.shards.len() as u64);
        if total > allowed {
            for holder in &mut holders {
                let share = holder.frame.map_or(0, |key| frames[&key].0 / frames[&key].1);
                let waited = self.tick.wrapping_sub(self.connections[holder.slot as usize].last_activity);
                holder.cost = (holder.own + share) * (u64::from(waited) + 1);
            }
            holders.sort_unstable_by_key(|holder| holder.cost);
            while total > allowed / 4 * 3
                && let Some(holder) = holders.pop()
            {
                total -= holder.own;
                if let Some((length, sharers)) = holder.frame.and_then(|key| frames.get_mut(&key)) {
                    *sharers -= 1;
                    total -= if *sharers == 0 { *length } else { 0 };
                }
                match self.connections.get(holder.slot as usize).map(|connection| &connection.state) {
                    None => {}
                    Some(State::Closing { .. }) => self.remove(holder.slot),
                    Some(_) => self.end(holder.slot, CloseReason::SlowReader),
                }
            }
        }
        self.unsent_room = allowed.saturating_sub(total).max(allowed / 8);
        self.numbers().unsent_bytes.set(total);
    }

    /// Counts bytes of frames that have left the feed and are kept.
    pub(super) fn add_kept(&mut self, bytes: u64) {
        self.unsent_room = self.unsent_room.saturating_sub(bytes);
        if self.unsent_room == 0 {
            let all = self.connections.iter().map(|(slot, _)| slot as u32).collect();
            self.bound_unsent(all);
        }
    }
}
