//! The bus of one node alone: ids, history and delivery in this process.
//!
//! The rules are those of the Redis bus, without what only a network can do to them: a channel's sequence begins at
//! the clock in microseconds, so that ids from before a restart are recognised as such.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use super::{BusError, PAGE, Page, Publish, Request, ToShard, Wiring, page_begin};
use crate::config::Settings;
use crate::event::{ChannelName, Entry, EventId};
use crate::feed::Feed;
use crate::frame;

/// Requests taken together: publishes among them that follow each other leave as one entry.
const BATCH: usize = 512;

/// Most bytes of events in one entry, so that a frame for one client does not wait long for its turn.
const ENTRY_MAX: usize = 64 * 1024;

/// Most memory that all histories together take, in bytes. The feeds share what is in both.
const MEMORY_MAX: usize = 64 * 1024 * 1024;

/// How often history is looked through for what is too old.
const SWEEP: Duration = Duration::from_secs(30);

/// Runs until every sender of requests is gone.
pub async fn run(settings: &Settings, mut wiring: Wiring) {
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
                wiring.numbers.channels.set(bus.followed as u64);
            }
            _ = sweep.tick() => bus.sweep(Instant::now()),
        }
    }
}

/// Consecutive events of one channel on their way out.
#[derive(Debug, Default)]
struct Batch {
    channel: Option<ChannelName>,
    texts: Vec<Vec<u8>>,
    bytes: usize,
}

#[derive(Debug)]
struct Channel {
    base: EventId,
    head: EventId,
    /// What history holds, oldest first; the last one ends at `head`.
    history: VecDeque<Entry>,
    /// How many events that is.
    events: u64,
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

    /// Lets the oldest entry go; gives the memory that frees, in bytes.
    fn pop(&mut self) -> usize {
        let Some(entry) = self.history.pop_front() else { return 0 };
        self.events -= entry.ids();
        Feed::cost(&entry)
    }
}

#[derive(Debug)]
struct Local {
    channels: HashMap<ChannelName, Channel>,
    shards: usize,
    followed: usize,
    max_channels: usize,
    history: u64,
    history_ttl: Duration,
    /// Every entry of every history by its last id, oldest first: the order in which they go when memory is short.
    /// Those that went earlier may still be among them.
    ages: VecDeque<(ChannelName, EventId)>,
    /// What all histories hold, in entries and in bytes.
    entries: usize,
    memory: usize,
    /// No id at or below this is given any more.
    given: EventId,
    /// When the requests in hand were taken.
    now: Instant,
}

impl Local {
    fn new(settings: &Settings, shards: usize) -> Local {
        Local {
            channels: HashMap::new(),
            shards,
            followed: 0,
            max_channels: settings.max_channels.get(),
            history: settings.history,
            history_ttl: settings.history_ttl,
            ages: VecDeque::new(),
            memory: 0,
            given: EventId(0),
            entries: 0,
            now: Instant::now(),
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
                followers: vec![false; self.shards],
                used: Instant::now(),
            };
            self.channels.insert(name.clone(), channel);
        }
        self.channels.get_mut(name).expect("it was there or has been put there")
    }

    fn publish(&mut self, publish: Publish, batch: &mut Batch, wiring: &Wiring) {
        let Publish { channel: name, to, event, answer } = publish;
        let full = batch.bytes + event.len() > ENTRY_MAX;
        if batch.channel.as_ref() != Some(&name) || to.is_some() || full {
            self.send(batch, wiring);
        }
        let now = self.now;
        let channel = self.channel(&name);
        channel.head = channel.head.next();
        channel.used = now;
        let id = channel.head;
        let text = frame::with_id(&event, id);
        if let Some(user) = to {
            self.keep_and_tell(&name, Entry::private(id, user, &text), wiring);
        } else {
            batch.channel = Some(name);
            batch.bytes += text.len();
            batch.texts.push(text);
        }
        wiring.numbers.published.add(1);
        wiring.shards.answer(answer, Ok(id));
    }

    /// Hands on what has gathered.
    fn send(&mut self, batch: &mut Batch, wiring: &Wiring) {
        let Batch { channel, texts, .. } = std::mem::take(batch);
        let Some(name) = channel else { return };
        let head = self.channel(&name).head;
        let first = EventId(head.0 + 1 - texts.len() as u64);
        self.keep_and_tell(&name, Entry::events(first, texts.iter().map(Vec::as_slice)), wiring);
    }

    fn keep_and_tell(&mut self, name: &ChannelName, entry: Entry, wiring: &Wiring) {
        let Some(channel) = self.channels.get_mut(name) else { return };
        wiring.numbers.events.add(entry.ids());
        for (shard, _) in channel.followers.iter().enumerate().filter(|(_, follows)| **follows) {
            wiring.shards.tell(
                shard,
                ToShard::Entry { channel: name.clone(), entry: entry.clone(), arrived: self.now },
            );
        }
        self.ages.push_back((name.clone(), entry.last));
        self.entries += 1;
        self.memory += Feed::cost(&entry);
        channel.events += entry.ids();
        channel.history.push_back(entry);
        while channel.history.front().is_some_and(|first| channel.events - first.ids() >= self.history) {
            self.memory -= channel.pop();
            self.entries -= 1;
        }
        self.trim();
    }

    fn trim(&mut self) {
        let holds = |channels: &HashMap<ChannelName, Channel>, name: &ChannelName, last: EventId| {
            channels
                .get(name)
                .and_then(|channel| channel.history.front())
                .is_some_and(|first| first.last <= last)
        };
        while self.memory > MEMORY_MAX {
            let Some((name, last)) = self.ages.pop_front() else { return };
            if holds(&self.channels, &name, last) {
                let channel = self.channels.get_mut(&name).expect("it holds the entry");
                self.memory -= channel.pop();
                self.entries -= 1;
            }
        }
        if self.ages.len() > 1024 + 2 * self.entries {
            self.ages.retain(|(name, last)| holds(&self.channels, name, *last));
        }
    }

    fn answer(&mut self, request: Request, wiring: &Wiring) {
        match request {
            Request::Follow { channel: name, shard } => {
                let is_new = !self.channels.get(&name).is_some_and(Channel::is_followed);
                if is_new && self.followed >= self.max_channels {
                    let why = BusError::TooManyChannels;
                    return wiring.shards.tell(shard, ToShard::NotFollowed { channel: name, why });
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
            Request::Read { channel: name, after, shard } => {
                wiring.numbers.reads.add(1);
                let channel = self.channel(&name);
                let end = EventId(page_begin(after).0 + PAGE);
                let entries = channel.history.iter().skip_while(|entry| entry.last <= after);
                let entries = entries.take_while(|entry| entry.before() < end);
                let page = Page {
                    base: channel.base,
                    head: channel.head,
                    oldest: channel.oldest(),
                    entries: entries.filter_map(|entry| entry.after(after)?.until(end)).collect(),
                };
                wiring.shards.tell(shard, ToShard::Page { channel: name, after, result: Ok(Arc::new(page)) });
            }
            // There is nobody else who could have given ids.
            Request::Look { channel, shard } => {
                wiring.shards.tell(shard, ToShard::Looked { channel, result: Ok(()) });
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
        self.entries -= channel.history.len();
        while !channel.history.is_empty() {
            self.memory -= channel.pop();
        }
        self.given = self.given.max(channel.head);
        if whole {
            self.channels.remove(name);
        }
    }
}

/// Microseconds since 1970.
fn clock() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(1, |since| since.as_micros() as u64)
}
