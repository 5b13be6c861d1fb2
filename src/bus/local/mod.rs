//! The bus of a single node: ids, history and delivery in this process.
//!
//! The rules are those of the Redis bus, without the faults of a network. A channel's sequence
//! starts at the clock in microseconds, so ids from before a restart are recognized.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use self::channel::Channel;
use self::idempotency::IdempotencyKeys;
use self::presence::LocalPresence;
use super::control::{Executor, OrderError};
use super::{Answer, BusContext, BusError, BusMessage, Follower, Publish, Request, ShardSender};
use crate::config::Settings;
use crate::limits::bans::system_millis;
use crate::metrics::{BusMetrics, Readiness};
use crate::protocol::control::{Command, Order};
use crate::protocol::event::{ChannelName, Entry, EventId};
use crate::protocol::frame;

mod channel;
mod idempotency;
mod presence;

/// Requests handled together. Consecutive events among them share an entry.
const BATCH: usize = 512;

/// Most bytes of events in one entry, so that a frame for one client does not wait long.
const ENTRY_MAX: usize = 64 * 1024;

/// When the memory for histories is full, this part of it is freed: finding the largest histories
/// takes a look at every channel.
const FREED_PART: usize = 16;

/// Time between two searches for expired histories.
const EXPIRY_INTERVAL: Duration = Duration::from_secs(30);

/// Time between two searches for users whose linger time is over. Clients get changes of presence as often.
const PRESENCE_INTERVAL: Duration = Duration::from_secs(1);

/// Runs until all senders of requests are dropped.
pub async fn run(settings: &Settings, context: BusContext) {
    let BusContext { requests: mut receiver, shards, bans, metrics, readiness } = context;
    let executor = Executor::new(bans, shards.clone(), metrics.clone());
    readiness.set_bus(None);
    readiness.follow_commands();
    let mut requests = Vec::with_capacity(BATCH);
    let mut expiry = tokio::time::interval(EXPIRY_INTERVAL);
    let mut presence = tokio::time::interval(PRESENCE_INTERVAL);
    presence.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let tracks_presence = !settings.presence.is_empty();
    let mut bus = LocalBus::new(settings, shards, executor, metrics, readiness);
    loop {
        tokio::select! {
            received = receiver.recv_many(&mut requests, BATCH) => {
                if received == 0 {
                    return;
                }
                bus.now = Instant::now();
                let mut batch = Batch::default();
                for request in requests.drain(..) {
                    match request {
                        Request::Publish(publish) => bus.publish(publish, &mut batch),
                        other => {
                            bus.deliver(&mut batch);
                            bus.on_request(other);
                        }
                    }
                }
                bus.deliver(&mut batch);
                bus.update_metrics();
            }
            _ = expiry.tick() => {
                bus.expire(Instant::now());
                bus.executor.expire_bans();
            }
            _ = presence.tick(), if tracks_presence => {
                bus.presence.on_tick(Instant::now(), &*bus.shards);
                bus.update_metrics();
            }
        }
    }
}

/// Consecutive events of one channel for the same recipients, which share an entry.
#[derive(Debug, Default)]
struct Batch {
    channel: Option<ChannelName>,
    /// The only user they are for.
    to: Option<Arc<str>>,
    texts: Vec<Vec<u8>>,
    bytes: usize,
    /// Where the ids go after the shards have the events.
    answers: Vec<(Answer, EventId)>,
}

/// Limits of histories.
#[derive(Debug)]
struct HistoryLimits {
    /// Events of one channel.
    events: u64,
    /// Bytes of one channel.
    bytes: usize,
    ttl: Duration,
    /// Bytes of all histories and idempotency keys.
    total_bytes: usize,
}

#[derive(Debug)]
struct LocalBus {
    executor: Executor,
    /// The id of the last command.
    last_command: EventId,
    shards: Arc<dyn ShardSender>,
    metrics: Arc<BusMetrics>,
    readiness: Arc<Readiness>,
    channels: HashMap<ChannelName, Channel>,
    /// Number of followed channels.
    followed: usize,
    max_channels: usize,
    limits: HistoryLimits,
    /// Memory of all histories. Entries that are in a feed, too, share their bytes with it.
    bytes: usize,
    /// The highest id of all channels that were dropped or emptied: no id up to it is used again.
    highest: EventId,
    keys: IdempotencyKeys,
    presence: LocalPresence,
    /// When the current requests were received.
    now: Instant,
}

impl LocalBus {
    fn new(
        settings: &Settings,
        shards: Arc<dyn ShardSender>,
        executor: Executor,
        metrics: Arc<BusMetrics>,
        readiness: Arc<Readiness>,
    ) -> LocalBus {
        LocalBus {
            executor,
            last_command: EventId(clock()),
            shards,
            metrics,
            readiness,
            channels: HashMap::new(),
            followed: 0,
            max_channels: settings.max_channels.get(),
            limits: HistoryLimits {
                events: settings.history,
                bytes: settings.history_bytes,
                ttl: settings.history_ttl,
                total_bytes: settings.bus_memory(),
            },
            bytes: 0,
            highest: EventId(0),
            keys: IdempotencyKeys::new(settings.bus_memory()),
            presence: LocalPresence::new(settings),
            now: Instant::now(),
        }
    }

    fn update_metrics(&self) {
        self.metrics.channels.set(self.followed as u64);
        self.metrics.presence_users.set(self.presence.users() as u64);
        self.metrics.held_bytes.set((self.bytes + self.keys.bytes()) as u64);
    }

    /// The channel, created if it does not exist.
    fn channel(&mut self, name: &ChannelName) -> &mut Channel {
        if !self.channels.contains_key(name) {
            if self.channels.len() >= 2 * self.max_channels {
                self.drop_half();
            }
            let base = EventId(clock()).max(self.highest.next());
            self.channels.insert(name.clone(), Channel::new(base));
        }
        self.channels.get_mut(name).expect("it existed or was inserted")
    }

    /// Gives an event its id and adds it to the batch.
    fn publish(&mut self, publish: Publish, batch: &mut Batch) {
        let Publish { channel: name, to, key, event, answer, .. } = publish;
        if let Some(id) = key.as_ref().and_then(|key| self.keys.find(&name, key, self.now)) {
            return self.shards.answer(answer, Ok(id.into()));
        }
        let is_full = batch.bytes + event.len() > ENTRY_MAX;
        if batch.channel.as_ref() != Some(&name) || batch.to != to || is_full {
            self.deliver(batch);
        }
        let now = self.now;
        let id = self.channel(&name).next_id(now);
        if let Some(key) = key {
            self.keys.insert(name.clone(), key, id, now);
        }
        let text = frame::with_id(&event, id);
        batch.channel = Some(name);
        batch.to = to;
        batch.bytes += text.len();
        batch.texts.push(text);
        batch.answers.push((answer, id));
        self.metrics.published.add(1);
    }

    /// Sends the batch to the followers, adds it to the history, and answers those who published it.
    fn deliver(&mut self, batch: &mut Batch) {
        let Batch { channel: Some(name), to, texts, answers, .. } = std::mem::take(batch) else { return };
        self.append(&name, to, &texts);
        for (answer, id) in answers {
            self.shards.answer(answer, Ok(id.into()));
        }
    }

    /// Sends consecutive events to the followers and adds them to the history.
    fn append(&mut self, name: &ChannelName, to: Option<Arc<str>>, texts: &[Vec<u8>]) {
        let Some(channel) = self.channels.get_mut(name) else { return };
        let first = EventId(channel.head().0 + 1 - texts.len() as u64);
        let entry = Entry::addressed(first, to, texts.iter().map(Vec::as_slice));
        self.metrics.events.add(entry.ids());
        self.shards.send_entry(name, &entry, channel.followers(), self.now);
        let before = channel.bytes();
        channel.push(entry);
        channel.trim(self.limits.events, self.limits.bytes);
        self.bytes = self.bytes - before + channel.bytes();
        let budget = (self.limits.total_bytes - self.keys.bytes()) >> self.readiness.memory_pressure();
        if self.bytes > budget {
            self.evict_from_largest(budget - budget / FREED_PART);
        }
    }

    /// Evicts until all histories fit into `target` bytes. The largest are cut to one common size,
    /// so that a busy channel can't evict the history of quiet ones.
    fn evict_from_largest(&mut self, target: usize) {
        let size = common_size(self.channels.values().map(Channel::bytes).collect(), target);
        self.bytes = 0;
        for channel in self.channels.values_mut() {
            channel.shrink(size);
            self.bytes += channel.bytes();
        }
    }

    fn on_request(&mut self, request: Request) {
        match request {
            Request::Follow { channel, shard } => {
                self.follow(channel.name, Follower { shard, form: channel.form });
            }
            Request::Unfollow { channel, shard } => {
                self.unfollow(&channel.name, Follower { shard, form: channel.form });
            }
            Request::Read { channel, position, bytes, reader } => {
                self.metrics.reads.add(1);
                let result = Ok(Arc::new(self.channel(&channel).page(position, bytes)));
                self.shards.send_page(reader, channel, position, result);
            }
            // No other node publishes, so there is nothing to read.
            Request::Refresh { channel, shard } => {
                self.shards.send(shard, BusMessage::Refreshed { channel, result: Ok(()) });
            }
            Request::Order { order, waiter } => {
                let _ = waiter.send(self.execute(order)); // fails if the task no longer waits
            }
            Request::Presence { channel, user, present } => {
                self.presence.on_user(channel, user, present, self.now);
            }
            Request::FollowPresence { channel, shard, follow } => {
                let follower = Follower { shard, form: channel.form };
                self.presence.follow(&channel.name, follower, follow, &*self.shards);
            }
            Request::ReadPresence { channel, from, limit, answer } => {
                let page = self.presence.page(&channel, from.as_deref(), limit);
                let _ = answer.send(Ok(page)); // fails if the task no longer waits
            }
            Request::Publish(_) => unreachable!("publishes go through the batch"),
        }
    }

    /// Executes a command. Bans end with the process.
    fn execute(&mut self, order: Order) -> Result<EventId, OrderError> {
        let command = match order {
            Order::Disconnect { user, channel } => Command::Disconnect { user, channel },
            Order::Ban { user, .. } if !self.executor.may_ban(&user) => return Err(OrderError::TooManyBans),
            Order::Ban { user, time } => {
                let until = system_millis().saturating_add(time.as_millis() as u64);
                Command::Ban { user, until }
            }
            Order::Unban { user } => Command::Unban { user },
        };
        self.last_command = self.last_command.next();
        self.executor.execute(command);
        Ok(self.last_command)
    }

    fn follow(&mut self, name: ChannelName, follower: Follower) {
        let is_new = !self.channels.get(&name).is_some_and(Channel::is_followed);
        if is_new && self.followed >= self.max_channels {
            let why = BusError::TooManyChannels;
            let channel = follower.channel(&name);
            return self.shards.send(follower.shard, BusMessage::NotFollowed { channel, why });
        }
        self.followed += usize::from(is_new);
        let shards = self.shards.clone();
        let channel = self.channel(&name);
        channel.follow(follower);
        shards.share(&name, channel.base(), channel.head(), channel.followers(), follower);
    }

    fn unfollow(&mut self, name: &ChannelName, follower: Follower) {
        let Some(channel) = self.channels.get_mut(name) else { return };
        let was_followed = channel.is_followed();
        channel.unfollow(follower);
        self.followed -= usize::from(was_followed && !channel.is_followed());
    }

    /// Empties histories whose last event is older than their TTL. After twice that time drops
    /// channels that are not followed.
    fn expire(&mut self, now: Instant) {
        let ttl = self.limits.ttl;
        let idle = |channel: &Channel| now - channel.last_used();
        let expired = self.channels.iter().filter(|(_, channel)| idle(channel) >= ttl);
        let expired: Vec<_> =
            expired.map(|(name, channel)| (name.clone(), idle(channel) >= 2 * ttl)).collect();
        for (name, unused) in expired {
            let followed = self.channels[&name].is_followed();
            self.empty(&name);
            if unused && !followed {
                self.channels.remove(&name);
            }
        }
    }

    /// Drops half of the channels that are not followed: first the ones without history, of which
    /// clients may have named any number, then the ones unused for longest.
    fn drop_half(&mut self) {
        let unfollowed = self.channels.iter().filter(|(_, channel)| !channel.is_followed());
        let mut unfollowed: Vec<_> = unfollowed
            .map(|(name, channel)| (channel.has_history(), channel.last_used(), name.clone()))
            .collect();
        unfollowed.sort_unstable();
        for (_, _, name) in &unfollowed[..unfollowed.len().div_ceil(2)] {
            self.empty(name);
            self.channels.remove(name);
        }
    }

    fn empty(&mut self, name: &ChannelName) {
        let Some(channel) = self.channels.get_mut(name) else { return };
        self.bytes -= channel.bytes();
        channel.empty();
        self.highest = self.highest.max(channel.head());
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
        fn largest_histories_are_cut_first(sizes in prop::collection::vec(0_usize..1000, 0..20), target in 0_usize..5000) {
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
