//! The settings of the Redis bus, and the names that it uses in Redis.

use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use crate::config::Settings;
use crate::protocol::event::ChannelName;

/// What scripts must know of a Redis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It may lose writes when it restarts.
    Volatile,
    /// `--redis-durable`: it keeps every acknowledged write.
    Durable,
    Cluster,
}

impl Kind {
    /// As `epoch.lua` knows it.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Volatile => "volatile",
            Kind::Durable => "durable",
            Kind::Cluster => "cluster",
        }
    }
}

#[derive(Debug)]
pub struct RedisSettings {
    /// First part of every key and Pub/Sub channel.
    pub prefix: String,
    pub kind: Kind,
    /// Events kept for each channel.
    pub history: u64,
    /// Bytes of events kept for each channel.
    pub history_bytes: usize,
    /// How long history outlives the last event of its channel.
    pub history_ttl_ms: u64,
    /// Messages that an inbox holds.
    pub inbox_max: u64,
    /// There are channels of `--presence`.
    pub tracks_presence: bool,
    /// Channels that are also Pub/Sub channels of the same name.
    pub pubsub_channels: HashSet<ChannelName>,
    /// Longest event of another program, in bytes.
    pub max_message_size: usize,
    /// How long an event may wait for Redis.
    pub publish_timeout: Duration,
    /// How long Redis remembers the last publish number of a node: many times the longest retry.
    pub publish_number_ttl_ms: u64,
    /// Channels followed at once.
    pub max_channels: usize,
    /// Most bytes of events that wait for Redis, all channels together.
    pub queue_bytes_max: usize,
    /// A random name of this process: no other process ever has it.
    pub node: String,
}

/// Two thousand years: Redis adds an expiry to its clock in 63 bits.
const MILLIS_MAX: u64 = 1 << 46;

/// One hour.
const PUBLISH_NUMBER_TTL_MIN_MS: u64 = 3_600_000;

/// Three days, so that the settings outlive a weekend without nodes.
const SETTINGS_TTL_MIN_MS: u64 = 3 * 24 * 3_600_000;

/// What a Pub/Sub channel of Redis carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Topic<'a> {
    /// Events for all subscribers of this channel.
    Events(&'a str),
    /// Events for one user of this channel.
    Private(&'a str),
    /// Messages that other programs publish to one of `--pubsub-channels`.
    External(&'a str),
    /// Probes of this node.
    Probe,
}

impl RedisSettings {
    pub fn new(settings: &Settings) -> RedisSettings {
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX).min(MILLIS_MAX);
        let retries = settings.publish_timeout.saturating_mul(10);
        RedisSettings {
            prefix: settings.redis_prefix.clone(),
            kind: match &settings.redis {
                Some(url) if url.is_cluster() => Kind::Cluster,
                _ if settings.redis_durable => Kind::Durable,
                _ => Kind::Volatile,
            },
            history: settings.history,
            history_bytes: settings.history_bytes,
            history_ttl_ms: millis(settings.history_ttl),
            inbox_max: settings.inbox_max,
            pubsub_channels: settings.pubsub_channels.iter().cloned().collect(),
            max_message_size: settings.max_message_size,
            publish_timeout: settings.publish_timeout,
            publish_number_ttl_ms: millis(retries).max(PUBLISH_NUMBER_TTL_MIN_MS),
            max_channels: settings.max_channels.get(),
            queue_bytes_max: settings.bus_memory(),
            tracks_presence: !settings.presence.is_empty(),
            node: format!("{:016x}{:016x}", random(), random()),
        }
    }

    /// The name from which a channel's keys derive. Its events are published under the same name.
    pub fn channel_key(&self, channel: &ChannelName) -> String {
        format!("{}:{{{channel}}}", self.prefix)
    }

    /// The Pub/Sub channel of the probes of a session. On a cluster all sessions get what any primary
    /// publishes, so the number of the session is part of the name.
    pub fn probe_topic(&self, generation: u64) -> String {
        match self.kind {
            Kind::Cluster => format!("{}:node:{}:{generation}", self.prefix, self.node),
            _ => format!("{}:node:{}", self.prefix, self.node),
        }
    }

    /// The hash with the FCALL settings of this prefix.
    pub fn settings_key(&self) -> String {
        format!("{}:settings", self.prefix)
    }

    /// How long the FCALL settings outlive the last node: at least as long as a channel's sequence.
    pub fn settings_ttl_ms(&self) -> u64 {
        SETTINGS_TTL_MIN_MS.max(2 * self.history_ttl_ms)
    }

    /// The Pub/Sub channels that a followed channel needs. Nothing is published to `:pubsub`: by its
    /// subscribers the scripts see how many of those of the `--pubsub-channels` are nodes.
    pub fn topics(&self, channel: &ChannelName) -> Vec<String> {
        let key = self.channel_key(channel);
        let mut topics = vec![format!("{key}:to"), key.clone()];
        if self.pubsub_channels.contains(channel) {
            topics.extend([channel.to_string(), format!("{key}:pubsub")]);
        }
        topics
    }

    /// What the Pub/Sub channel `name` carries. Names of `--pubsub-channels` have no braces, so the
    /// kinds can't be confused.
    pub fn topic<'a>(&self, name: &'a str) -> Topic<'a> {
        let Some(own) = name.strip_prefix(&self.prefix).and_then(|rest| rest.strip_prefix(':')) else {
            return Topic::External(name);
        };
        match own.strip_prefix('{').and_then(|rest| rest.split_once('}')) {
            Some((channel, "")) => Topic::Events(channel),
            Some((channel, ":to")) => Topic::Private(channel),
            _ if own.strip_prefix("node:").is_some_and(|node| node.starts_with(&self.node)) => Topic::Probe,
            _ => Topic::External(name),
        }
    }
}

/// 64 random bits from the operating system, by way of the keys of std's hasher.
pub fn random() -> u64 {
    RandomState::new().hash_one(0)
}
