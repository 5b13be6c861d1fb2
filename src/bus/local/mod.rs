//! The bus of one node alone: ids, history and delivery in this process.
//!
//! The rules are those of the Redis bus, without what only a network can do to them: a channel's sequence begins at
//! the clock in microseconds, so that ids from before a restart are recognised as such.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use self::idempotency::Keys;
use super::{BusContext, BusError, BusMessage, PAGE, PART_SHARED, Page, Publish, Request, page_begin};
use crate::config::Settings;
use crate::protocol::event::{ChannelName, Entry, EventId};
use crate::protocol::frame;

mod idempotency;

/// Requests taken together: publishes among them that follow each other leave as one entry.
const BATCH: usize = 512;

/// Most bytes of events in one entry, so that a frame for one client does not wait long for its turn.
const ENTRY_MAX: usize = 64 * 1024;

/// This part of the memory for histories is freed when it is full, since finding the largest ones takes a look at every
/// channel.
const FREED_PART: usize = 16;

/// How often history is looked through for what is too old.
const SWEEP: Duration = Duration::from_secs(30);

/// Runs until every sender of requests is gone.
pub async fn run(settings: &Settings, mut wiring: BusContext) {
    wiring.readiness.set_bus(None);
    let mut requests = Vec::with_capacity(BATCH);
    let mut sweep = tokio::time::interval(SWEEP);
    let mut bus = Local::new(settings, wiring.shards.count());
    loop {
        tokio::select! {
            received = wiring.requests.recv_many(&mut requests, BATCH) => {
                if received == 0 {
                    return;
                }
                bus.now = Instant::now();
                let mut batch = Batch::default();
                for request in requests.drain(..) {
                    match request {
                        Request::Publish(publish) => bus.publish(publish, &mut batch, &wiring),
                        other => {
                            bus.send(&mut batch, &wiring);
                            bus.answer(other, &wiring);
                        }
                    }
                }
                bus.send(&mut batch, &wiring);
                wiring.metrics.channels.set(bus.followed as u64);
                wiring.metrics.held_bytes.set((bus.memory + bus.keys.bytes()) as u64);
            }
            _ = sweep.tick() => bus.sweep(Instant::now()),
        }
    }
}

/// Consecutive events of one channel for the same readers, to be stored in one entry.
#[derive(Debug, Default)]
struct Batch {
    channel: Option<ChannelName>,
    /// The only user they are for.
    to: Option<Arc<str>>,
    texts: Vec<Vec<u8>>,
    bytes: usize,
}

#[derive(Debug)]
struct Channel {
    base: EventId,
    head: EventId,
    /// What history holds, oldest first; the last one ends at `head`.
    history: VecDeque<Entry>,
    /// Number of events in history.
    events: u64,
    /// Bytes of its entries.
    bytes: usize,
    /// Which shards follow.
    followers: Vec<bool>,
    /// When it was last published to, or let go of.
    used: Instant,
}

impl Channel {
    fn is_followed(&self) -> bool {
        self.followers.contains(&true)
    }

    fn oldest(&self) -> EventId {
        EventId(self.head.0 - self.events).next()
    }

    /// The events of a page after `position`, about this many bytes, and those before it if they have at most
    /// [`PART_SHARED`] bytes.
    fn page(&self, position: EventId, mut bytes: usize) -> Page {
        let (begin, end) = (page_begin(position), EventId(page_begin(position).0 + PAGE));
        let at = self.history.partition_point(|entry| entry.last <= position);
        let first = self.history.partition_point(|entry| entry.last <= begin);
        let front: usize = self.history.range(first..at).map(Entry::memory).sum();
        let (after, first) = if front <= PART_SHARED { (begin, first) } else { (position, at) };
        let mut entries = Vec::new();
        for entry in self.history.range(first..) {
            let Some(entry) = entry.after(after).and_then(|entry| entry.until(end)) else { break };
            let is_shared = entry.last <= position;
            if !is_shared && bytes == 0 {
                break;
            }
            bytes = if is_shared { bytes } else { bytes.saturating_sub(entry.memory()) };
            entries.push(entry);
        }
        let after = entries.first().map_or(position, |entry| entry.before().min(position));
        Page { after, base: self.base, head: self.head, oldest: self.oldest(), entries }
    }

    fn push(&mut self, entry: Entry) {
        self.events += entry.ids();
        self.bytes += entry.memory();
        self.history.push_back(entry);
    }

    /// Evicts the oldest entry.
    fn pop(&mut self) {
        if let Some(entry) = self.history.pop_front() {
            self.events -= entry.ids();
            self.bytes -= entry.memory();
        }
    }

    /// Evicts the oldest entries beyond this many events or bytes. The last entry stays, however large it is.
    fn trim(&mut self, events: u64, bytes: usize) {
        while self.history.len() > 1 && (self.bytes > bytes || self.events - self.history[0].ids() >= events)
        {
            self.pop();
        }
    }
}

#[derive(Debug)]
struct Local {
    channels: HashMap<ChannelName, Channel>,
    shards: usize,
    followed: usize,
    max_channels: usize,
    history: u64,
    history_bytes: usize,
    history_ttl: Duration,
    /// Bytes of all histories. Entries that are in a feed, too, share their bytes with it.
    memory: usize,
    /// Most bytes of all histories and idempotency keys.
    memory_max: usize,
    /// No id at or below this is given any more.
    given: EventId,
    /// When the requests in hand were taken.
    now: Instant,
    keys: Keys,
}

impl Local {
    fn new(settings: &Settings, shards: usize) -> Local {
        Local {
            channels: HashMap::new(),
            shards,
            followed: 0,
            max_channels: settings.max_channels.get(),
            history: settings.history,
            history_bytes: settings.history_bytes,
            history_ttl: settings.history_ttl,
            memory: 0,
            memory_max: settings.bus_memory(),
            given: EventId(0),
            now: Instant::now(),
            keys: Keys::new(settings.bus_memory()),
        }
    }

    /// The channel, which gets its sequence now if it has none.
    fn channel(&mut self, name: &ChannelName) -> &mut Channel {
        if !self.channels.contains_key(name) {
            if self.channels.len() >= 2 * self.max_channels {
                self.forget_half();
            }
            let anchor = EventId(clock()).max(self.given.next());
            let channel = Channel {
                base: anchor,
                head: anchor,
                history: VecDeque::new(),
                events: 0,
                bytes: 0,
                followers: vec![false; self.shards],
                used: Instant::now(),
            };
            self.channels.insert(name.clone(), channel);
        }
        self.channels.get_mut(name).expect("it was there or has been put there")
    }

    fn publish(&mut self, publish: Publish, batch: &mut Batch, wiring: &BusContext) {
        let Publish { channel: name, to, key, event, answer } = publish;
        if let Some(id) = key.as_ref().and_then(|key| self.keys.find(&name, key, self.now)) {
            return wiring.shards.answer(answer, Ok(id));
        }
        let full = batch.bytes + event.len() > ENTRY_MAX;
        if batch.channel.as_ref() != Some(&name) || batch.to != to || full {
            self.send(batch, wiring);
        }
        let now = self.now;
        let channel = self.channel(&name);
        channel.head = channel.head.next();
        channel.used = now;
        let id = channel.head;
        if let Some(key) = key {
            self.keys.insert(name.clone(), key, id, now);
        }
        let text = frame::with_id(&event, id);
        batch.channel = Some(name);
        batch.to = to;
        batch.bytes += text.len();
        batch.texts.push(text);
        wiring.metrics.published.add(1);
        wiring.shards.answer(answer, Ok(id));
    }

    /// Hands on what has gathered.
    fn send(&mut self, batch: &mut Batch, wiring: &BusContext) {
        let Batch { channel, to, texts, .. } = std::mem::take(batch);
        let Some(name) = channel else { return };
        let head = self.channel(&name).head;
        let first = EventId(head.0 + 1 - texts.len() as u64);
        self.keep_and_tell(&name, Entry::addressed(first, to, texts.iter().map(Vec::as_slice)), wiring);
    }

    fn keep_and_tell(&mut self, name: &ChannelName, entry: Entry, wiring: &BusContext) {
        let Some(channel) = self.channels.get_mut(name) else { return };
        wiring.metrics.events.add(entry.ids());
        for (shard, _) in channel.followers.iter().enumerate().filter(|(_, follows)| **follows) {
            wiring.shards.send(
                shard,
                BusMessage::Entry { channel: name.clone(), entry: entry.clone(), arrived: self.now },
            );
        }
        let before = channel.bytes;
        channel.push(entry);
        channel.trim(self.history, self.history_bytes);
        self.memory = self.memory - before + channel.bytes;
        let most = (self.memory_max - self.keys.bytes()) >> wiring.readiness.memory_pressure();
        if self.memory > most {
            self.evict_from_largest(most - most / FREED_PART);
        }
    }

    /// Evicts until all histories fit into `target` bytes. The largest are cut to one common size, so that a busy channel
    /// can't evict the history of quiet ones.
    fn evict_from_largest(&mut self, target: usize) {
        let size = common_size(self.channels.values().map(|channel| channel.bytes).collect(), target);
        self.memory = 0;
        for channel in self.channels.values_mut() {
            while channel.bytes > size {
                channel.pop();
            }
            self.memory += channel.bytes;
        }
    }

    fn answer(&mut self, request: Request, wiring: &BusContext) {
        match request {
            Request::Follow { channel: name, shard } => {
                let is_new = !self.channels.get(&name).is_some_and(Channel::is_followed);
                if is_new && self.followed >= self.max_channels {
                    let why = BusError::TooManyChannels;
                    return wiring.shards.send(shard, BusMessage::NotFollowed { channel: name, why });
                }
                self.followed += usize::from(is_new);
                let channel = self.channel(&name);
                let first = channel.followers.iter().position(|follows| *follows);
                wiring.shards.share(name.clone(), channel.base, channel.head, first.as_ref(), shard);
                channel.followers[shard] = true;
            }
            Request::Unfollow { channel: name, shard } => {
                let Some(channel) = self.channels.get_mut(&name) else { return };
                let was_followed = channel.is_followed();
                channel.followers[shard] = false;
                channel.used = Instant::now();
                self.followed -= usize::from(was_followed && !channel.is_followed());
            }
            Request::Read { channel: name, position, bytes, shard } => {
                wiring.metrics.reads.add(1);
                let result = Ok(Arc::new(self.channel(&name).page(position, bytes)));
                wiring.shards.send(shard, BusMessage::Page { channel: name, position, result });
            }
            // There is nobody else who could have given ids.
            Request::Refresh { channel, shard } => {
                wiring.shards.send(shard, BusMessage::Refreshed { channel, result: Ok(()) });
            }
            Request::Publish(_) => unreachable!("publishes go through the batch"),
        }
    }

    /// Empties histories whose last event is too old, and forgets channels that nobody follows after as long again.
    fn sweep(&mut self, now: Instant) {
        let (old, gone) = (self.history_ttl, 2 * self.history_ttl);
        let idle = |channel: &Channel| now - channel.used;
        let expired = self.channels.iter().filter(|(_, channel)| idle(channel) >= old);
        let expired: Vec<_> = expired.map(|(name, channel)| (name.clone(), idle(channel) >= gone)).collect();
        for (name, gone) in expired {
            let followed = self.channels[&name].is_followed();
            self.forget(&name, gone && !followed);
        }
    }

    /// Makes room for new channels: of those that nobody follows, the half that was not used for longest goes. First
    /// those without history, of which anyone may have named any number.
    fn forget_half(&mut self) {
        let unfollowed = self.channels.iter().filter(|(_, channel)| !channel.is_followed());
        let mut unfollowed: Vec<_> =
            unfollowed.map(|(name, channel)| (channel.events > 0, channel.used, name.clone())).collect();
        unfollowed.sort_unstable();
        for (_, _, name) in &unfollowed[..unfollowed.len().div_ceil(2)] {
            self.forget(name, true);
        }
    }

    /// Forgets a channel's history, and the channel with it where nobody needs it.
    fn forget(&mut self, name: &ChannelName, whole: bool) {
        let Some(channel) = self.channels.get_mut(name) else { return };
        self.memory -= channel.bytes;
        (channel.events, channel.bytes) = (0, 0);
        channel.history.clear();
        self.given = self.given.max(channel.head);
        if whole {
            self.channels.remove(name);
        }
    }
}

/// The largest size for which the sum is at most `target` after all sizes above it are cut to it.
fn common_size(mut sizes: Vec<usize>, target: usize) -> usize {
    sizes.sort_unstable();
    let (mut left, mut count) = (target, sizes.len());
    for size in &sizes {
        let share = left / count;
        if *size > share {
            return share;
        }
        left -= size;
        count -= 1;
    }
    usize::MAX
}

/// Microseconds since 1970.
fn clock() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(1, |since| since.as_micros() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_largest_histories_are_cut_first(sizes in prop::collection::vec(0_usize..1000, 0..20), target in 0_usize..5000) {
            let size = common_size(sizes.clone(), target);
            let cut = |size: usize| sizes.iter().map(|own| (*own).min(size)).sum::<usize>();
            prop_assert!(cut(size) <= target);
            if size == usize::MAX {
                prop_assert!(sizes.iter().sum::<usize>() <= target);
            } else {
                prop_assert!(cut(size + 1) > target, "no more is evicted than needed");
            }
        }
    }
}
