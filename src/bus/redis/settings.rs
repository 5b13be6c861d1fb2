//! What the bus is set to, and the names it uses in Redis.

use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use crate::config::Settings;
use crate::protocol::event::ChannelName;

/// The settings that matter here, and this process's name.
#[derive(Debug)]
pub struct Terms {
    /// Begins every key and Pub/Sub channel.
    pub prefix: String,
    /// This Redis keeps every acknowledged write.
    pub durable: bool,
    /// Events kept for each channel.
    pub history: u64,
    /// Bytes of events kept for each channel.
    pub history_bytes: usize,
    /// How long history outlives a channel's last event, in milliseconds.
    pub ttl_ms: u64,
    /// Channels that are Redis channels too.
    pub bare: HashSet<ChannelName>,
    /// Longest event from outside, in bytes.
    pub max_message_size: usize,
    /// How long an event may wait for the bus.
    pub publish_timeout: Duration,
    /// How long Redis remembers a node's last publish number, in milliseconds: many times the longest retry.
    pub number_ttl_ms: u64,
    /// Channels followed at once.
    pub max_channels: usize,
    /// Most bytes of events that wait for Redis, all channels together.
    pub waiting_max: usize,
    /// This process, under a name that no other has or had.
    pub node: String,
}

/// Two thousand years: Redis adds times of expiry to its clock in 63 bits.
const MILLIS_MAX: u64 = 1 << 46;

/// At least an hour.
const NUMBER_TTL_MIN_MS: u64 = 3_600_000;

/// Three days, so that settings outlive a weekend without nodes.
const SETTINGS_TTL_MIN_MS: u64 = 3 * 24 * 3_600_000;

/// What a Pub/Sub channel of Redis carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane<'a> {
    /// Events for everybody in the channel.
    Events(&'a str),
    /// Events for one user of the channel.
    Private(&'a str),
    /// What other programs publish under the bare name.
    Bare(&'a str),
    /// This node's canary.
    Canary,
}

impl Terms {
    /// Takes what it needs from the settings, and a new random name.
    pub fn new(settings: &Settings) -> Terms {
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX).min(MILLIS_MAX);
        Terms {
            prefix: settings.redis_prefix.clone(),
            durable: settings.redis_durable,
            history: settings.history,
            history_bytes: settings.history_bytes,
            ttl_ms: millis(settings.history_ttl),
            number_ttl_ms: millis(settings.publish_timeout.saturating_mul(10)).max(NUMBER_TTL_MIN_MS),
            bare: settings.pubsub_channels.iter().cloned().collect(),
            max_message_size: settings.max_message_size,
            publish_timeout: settings.publish_timeout,
            max_channels: settings.max_channels.get(),
            waiting_max: settings.bus_memory(),
            node: format!("{:016x}{:016x}", random(), random()),
        }
    }

    /// The name from which a channel's keys derive, and where its events are told.
    pub fn key(&self, channel: &ChannelName) -> String {
        format!("{}:{{{channel}}}", self.prefix)
    }

    /// Where this node's canary goes.
    pub fn canary(&self) -> String {
        format!("{}:node:{}", self.prefix, self.node)
    }

    /// The hash with the settings of FCALL for this prefix.
    pub fn settings_key(&self) -> String {
        format!("{}:settings", self.prefix)
    }

    /// How long the settings outlive the last node, in milliseconds: at least as long as a channel's sequence.
    pub fn settings_ttl_ms(&self) -> u64 {
        SETTINGS_TTL_MIN_MS.max(2 * self.ttl_ms)
    }

    /// The Pub/Sub channels that a followed channel needs.
    pub fn lanes(&self, channel: &ChannelName) -> Vec<String> {
        let key = self.key(channel);
        let mut lanes = vec![format!("{key}:to"), key];
        if self.bare.contains(channel) {
            lanes.push(channel.to_string());
        }
        lanes
    }

    /// What comes on a Pub/Sub channel. A bare name that looks like one of ours can't be: it has no braces.
    pub fn lane<'a>(&self, name: &'a str) -> Lane<'a> {
        let Some(own) = name.strip_prefix(&self.prefix).and_then(|rest| rest.strip_prefix(':')) else {
            return Lane::Bare(name);
        };
        match own.strip_prefix('{').and_then(|rest| rest.split_once('}')) {
            Some((channel, "")) => Lane::Events(channel),
            Some((channel, ":to")) => Lane::Private(channel),
            _ if own.strip_prefix("node:") == Some(&self.node) => Lane::Canary,
            _ => Lane::Bare(name),
        }
    }
}

/// Sixty-four random bits, from the operating system by way of std's hash keys.
pub fn random() -> u64 {
    RandomState::new().hash_one(0)
}
