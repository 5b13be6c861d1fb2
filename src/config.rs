//! Settings: flags and `FANFARE_*` environment variables, every error at once.

use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use crate::event::ChannelName;

/// Everything that can be set, checked.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Public addresses, for clients.
    pub listen: Vec<SocketAddr>,
    /// Where publish, metrics and stats are served.
    pub admin: AdminAddr,
    /// `None`: the local bus.
    pub redis: Option<RedisUrl>,
    /// Begins every key and Redis channel.
    pub redis_prefix: String,
    /// The operator's word that this Redis keeps every acknowledged write.
    pub redis_durable: bool,
    /// Channels that are also plain Redis channels of the same name.
    pub bare_channels: Vec<ChannelName>,
    /// Channels this node follows at once.
    pub max_channels: NonZeroUsize,
    /// Shard threads.
    pub shards: NonZeroUsize,
    /// Events of history the bus keeps for each channel.
    pub history: u64,
    /// How long history outlives a channel's last event.
    pub history_ttl: Duration,
    /// Recent events in memory, all channels together, in bytes.
    pub feed_memory: usize,
    /// Time between two heartbeats of a connection.
    pub heartbeat: Duration,
    /// Silence after a heartbeat that ends the connection.
    pub heartbeat_timeout: Duration,
    /// What a heartbeat is.
    pub heartbeat_format: HeartbeatFormat,
    /// Longest message a client may send, in bytes.
    pub max_message: usize,
    /// How long a publish may wait for the bus.
    pub publish_timeout: Duration,
    /// Log filter, in tracing's directive syntax.
    pub log: String,
    /// How log lines look.
    pub log_format: LogFormat,
}

/// Where the admin listener is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AdminAddr {
    /// A TCP address.
    Tcp(SocketAddr),
    /// A unix socket's path.
    Unix(PathBuf),
    /// There is none.
    Off,
}

/// What a heartbeat is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeartbeatFormat {
    /// A WebSocket ping (RFC 6455 section 5.5.2).
    Ping,
    /// A `{"type":"ping"}` frame.
    Json,
    /// Both.
    Both,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// A Redis URL. Its `Debug` and `Display` hide the password.
#[derive(Clone, PartialEq, Eq)]
pub struct RedisUrl(pub String);

impl std::fmt::Display for RedisUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Some((scheme, rest)) = self.0.split_once("://") else { return f.write_str(&self.0) };
        match rest.rsplit_once('@') {
            Some((_, place)) => write!(f, "{scheme}://***@{place}"),
            None => f.write_str(&self.0),
        }
    }
}

impl std::fmt::Debug for RedisUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}
