//! Every setting, once: name, placeholder, default, description, how it is parsed and shown.

use std::net::SocketAddr;
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;

use super::args::Flag;
use super::environment::Input;
use super::memory::Memory;
use super::open_files::open_file_limit;
use super::parse;
use super::redis_url::RedisUrl;
use super::rows::{Row, settings};
use super::units::{parse_size, show_duration, show_size};
use super::values::{AdminAddr, Cap, ClientPublish, LogFormat, PingFormat, Words};
use super::{HISTORY_MIN, MESSAGE_RATE_MAX, MESSAGE_SIZE_MAX, PRESENCE_LIST_MAX, SUBSCRIPTIONS_MAX};
use crate::http::origin::OriginRule;
use crate::protocol::event::ChannelName;
use crate::protocol::pattern::ChannelPattern;

settings! {
    "Addresses"

    /// Where clients connect. Port 0 takes a free port, which is shown at start.
    listen: Vec<SocketAddr> {
        name: "listen",
        value: "IP:PORT,...",
        default: "127.0.0.1:8080",
        parse: |text| parse::list(text, parse::address),
        show: |settings| join(&settings.listen),
    }

    /// Where publish, metrics and stats are served: `IP:PORT`, `unix:PATH` or `off`.
    admin: AdminAddr {
        name: "admin",
        value: "IP:PORT",
        default: "127.0.0.1:9080",
        parse: parse::admin,
        show: |settings| settings.admin.to_string(),
        see: "[Admin API](admin-api.md)",
    }

    "Access"

    /// Accept clients without a token from other hosts, too. Without it or `--jwt-key`, `--listen`
    /// takes loopback addresses only.
    allow_anonymous: bool {
        name: "allow-anonymous",
        value: "",
        default: "false",
        parse: parse::switch,
        show: |settings| settings.allow_anonymous.to_string(),
        old_name: "open",
    }

    /// Files with the keys of clients' tokens, one key in each: an HS256 secret of at least 32
    /// bytes, or the public key of RS256, ES256 or EdDSA in PEM. A token must be signed by one of
    /// them. Reread at SIGHUP. `fanfare help token` explains how to make a token for tests.
    jwt_key: Vec<PathBuf> {
        name: "jwt-key",
        value: "FILE,...",
        default: "",
        parse: |text| parse::optional_list(text, parse::path),
        show: |settings| join(settings.jwt_key.iter().map(|path| path.display())),
        see: "[Tokens](auth.md#tokens)",
    }

    /// File with the key that requests to `--admin` must carry (`Authorization: Bearer KEY`), at
    /// least 16 characters. Required if other hosts can reach `--admin`. Reread at SIGHUP.
    admin_key: Option<PathBuf> {
        name: "admin-key",
        value: "FILE",
        default: "",
        parse: |text| parse::optional(text, parse::path),
        show: |settings| join(settings.admin_key.iter().map(|path| path.display())),
    }

    /// What clients may publish: nothing, events for all subscribers of a channel, or also events
    /// for one user (`to`). A token can only narrow it.
    client_publish: ClientPublish {
        name: "client-publish",
        value: "off|channel|any",
        default: "any",
        parse: parse::word,
        show: |settings| settings.client_publish.word(),
    }

    /// Sites whose pages may connect: `https://example.com`, `https://*.example.com`; of apps
    /// `capacitor://localhost`, or with `--jwt-key` also `null`. Without it, pages of the same host
    /// and port; on loopback hosts of any port, and on loopback addresses of no other host unless a
    /// trusted proxy forwards it. Programs, which send no `Origin`, may always connect. Without
    /// `--admin-key`, requests to `--admin` may use the hosts of http and https sites, too.
    allow_origin: Vec<OriginRule> {
        name: "allow-origin",
        value: "ORIGIN,...",
        default: "",
        parse: |text| parse::optional_list(text, OriginRule::parse),
        show: |settings| join(&settings.allow_origin),
        see: "[Origins](auth.md#origins)",
    }

    /// Addresses or networks of proxies in front, such as `10.0.0.7` or `fd00::/8`. Only they may
    /// report a client's address: in a PROXY header (version 1 or 2), else in `X-Forwarded-For`.
    trusted_proxy: Vec<IpNet> {
        name: "trusted-proxy",
        value: "CIDR,...",
        default: "",
        parse: |text| parse::optional_list(text, parse::network),
        show: |settings| join(&settings.trusted_proxy),
        see: "[Proxies](proxies.md)",
    }

    "Bus"

    /// The Redis that joins nodes. Without it the node stands alone. One of:
    /// - `redis://[[USER:]PASSWORD@]HOST[:PORT][/DATABASE]`, or `rediss://...` for TLS
    /// - `redis-sentinel://[...@]HOST[:26379][/DATABASE]?sentinelServiceName=NAME`
    /// - `redis-cluster://[...@]HOST:PORT,HOST:PORT...`, or `rediss-cluster://...` for TLS
    /// - `redis+unix:///PATH` or `unix:PATH`
    ///
    /// Add `&node=HOST:PORT` for each further Sentinel. Give a password in the variable: every user
    /// of the machine can see a flag.
    redis: Option<RedisUrl> {
        name: "redis",
        value: "URL",
        default: "",
        parse: |text| parse::optional(text, RedisUrl::parse),
        show: |settings| join(&settings.redis),
    }

    /// Prefix of every key and Redis channel. Deployments that share a Redis need different ones.
    redis_prefix: String {
        name: "redis-prefix",
        value: "NAME",
        default: "fanfare",
        parse: parse::redis_prefix,
        show: |settings| settings.redis_prefix.clone(),
    }

    /// This Redis keeps every acknowledged write (`appendfsync always`) and is never replaced by a
    /// replica, so that its restart is not announced to clients as a possible loss.
    redis_durable: bool {
        name: "redis-durable",
        value: "",
        default: "false",
        parse: parse::switch,
        show: |settings| settings.redis_durable.to_string(),
        see: "[Redis configuration](redis.md#redis-configuration)",
    }

    /// Channels that are also plain Redis Pub/Sub channels of the same name, or `none`.
    pubsub_channels: Vec<ChannelName> {
        name: "pubsub-channels",
        value: "NAME,...",
        default: "ws_broadcast",
        parse: |text| match text {
            "none" => Ok(Vec::new()),
            names => parse::list(names, parse::channel),
        },
        show: |settings| match settings.pubsub_channels.as_slice() {
            [] => "none".into(),
            names => join(names),
        },
        old_name: "bare-channels",
    }

    /// Channels, or prefixes of channels, whose messages from clients are not broadcast: they go to a
    /// Redis stream that backends read. Needs `--redis`.
    inbox: Vec<ChannelPattern> {
        name: "inbox",
        value: "NAME|PREFIX*,...",
        default: "",
        parse: |text| parse::optional_list(text, parse::channel_pattern),
        show: |settings| join(&settings.inbox),
        see: "[Inboxes](redis.md#inboxes)",
    }

    /// Messages that an inbox holds; more are rejected until backends delete some.
    inbox_max: u64 {
        name: "inbox-max",
        value: "MESSAGES",
        default: "10000",
        parse: |text| parse::count(text, 1, u64::from(u32::MAX)),
        show: |settings| settings.inbox_max.to_string(),
    }

    /// Events kept for each channel, for clients that come back. At least 1000.
    history: u64 {
        name: "history",
        value: "EVENTS",
        default: "10000",
        parse: |text| parse::count(text, HISTORY_MIN, u64::from(u32::MAX)),
        show: |settings| settings.history.to_string(),
    }

    /// Bytes of events kept for each channel, so that fewer large events than `--history` are kept,
    /// and bytes of messages that an inbox holds, about.
    /// At least `--max-message-size`. Without `--redis` all channels together have a sixteenth of
    /// the memory of the cgroup or the machine, at most 64MiB; the largest histories are cut first.
    history_bytes: usize {
        name: "history-bytes",
        value: "SIZE",
        default: "64MiB",
        parse: parse::memory,
        show: |settings| show_size(settings.history_bytes as u64),
    }

    /// How long history is kept after the last event of a channel.
    history_ttl: Duration {
        name: "history-ttl",
        value: "TIME",
        default: "24h",
        parse: parse::positive_duration,
        show: |settings| show_duration(settings.history_ttl),
    }

    /// How long an event may wait for the bus.
    publish_timeout: Duration {
        name: "publish-timeout",
        value: "TIME",
        default: "5s",
        parse: parse::positive_duration,
        show: |settings| show_duration(settings.publish_timeout),
    }

    "Clients"

    /// Connections of this node; more get 503. `auto`: as many as fit into the limit on open files
    /// and the memory of the cgroup or the machine. A number above what open files allow is lowered
    /// with a warning; `--check` shows the result.
    max_connections: Option<NonZeroU32> {
        name: "max-connections",
        value: "CONNECTIONS",
        default: "auto",
        parse: |text| parse::or_auto(text, |text| parse::positive_count(text, u32::MAX)),
        show: |settings| settings.connection_limit().to_string(),
    }

    /// Connections of one client address (of IPv6 one /56); more get 429. `auto`: 1024, but no
    /// limit for loopback. `0`: no limit.
    max_connections_per_ip: Cap {
        name: "max-connections-per-ip",
        value: "CONNECTIONS",
        default: "auto",
        parse: parse::cap,
        show: |settings| settings.max_connections_per_ip.to_string(),
        old_name: "max-per-address",
    }

    /// Connections of one user on this node; more get 429. `auto`: 100 with `--jwt-key`, no limit
    /// without, since then a client can take any user id. `0`: no limit.
    max_connections_per_user: Cap {
        name: "max-connections-per-user",
        value: "CONNECTIONS",
        default: "auto",
        parse: parse::cap,
        show: |settings| settings.max_connections_per_user.to_string(),
        old_name: "max-per-user",
    }

    /// Channels that this node follows at once.
    max_channels: NonZeroUsize {
        name: "max-channels",
        value: "CHANNELS",
        default: "10000",
        parse: |text| parse::positive_count(text, u32::MAX).map(widen),
        show: |settings| settings.max_channels.to_string(),
    }

    /// Channels that a connection may follow beside its default channel, at most 1000. A
    /// subscription takes 110 bytes.
    max_subscriptions: usize {
        name: "max-subscriptions",
        value: "CHANNELS",
        default: "100",
        parse: |text| parse::count(text, 1, SUBSCRIPTIONS_MAX).map(|count| count as usize),
        show: |settings| settings.max_subscriptions.to_string(),
        see: "[Many channels](protocol.md#many-channels)",
    }

    /// Channels, or prefixes of channels, whose users are tracked over all nodes. Give all nodes the
    /// same ones.
    presence: Vec<ChannelPattern> {
        name: "presence",
        value: "NAME|PREFIX*,...",
        default: "",
        parse: |text| parse::optional_list(text, parse::channel_pattern),
        show: |settings| join(&settings.presence),
        see: "[Presence](admin-api.md#presence)",
    }

    /// Most users in a channel of whom clients get the names, at most 10000. With more they get only
    /// how many there are.
    presence_list: usize {
        name: "presence-list",
        value: "USERS",
        default: "1000",
        parse: |text| parse::count(text, 0, PRESENCE_LIST_MAX).map(|count| count as usize),
        show: |settings| settings.presence_list.to_string(),
        see: "[Presence](protocol.md#presence)",
    }

    /// Longest message from a client, at most 16MiB.
    max_message_size: usize {
        name: "max-message-size",
        value: "SIZE",
        default: "64KiB",
        parse: |text| match parse_size(text)? {
            size @ 1..=MESSAGE_SIZE_MAX => Ok(size as usize),
            _ => Err(format!("must be between 1 byte and {}", show_size(MESSAGE_SIZE_MAX))),
        },
        show: |settings| show_size(settings.max_message_size as u64),
        old_name: "max-message",
    }

    /// Messages a second that a connection may send, pings included, and ten times as many at once.
    /// All connections of a user share this rate; without `--jwt-key`, all connections of an
    /// address share ten times as much. Messages over the rate are not published; clients that
    /// continue are closed. `0`: no limit.
    max_message_rate: u32 {
        name: "max-message-rate",
        value: "MESSAGES",
        default: "100",
        parse: |text| parse::count(text, 0, u64::from(MESSAGE_RATE_MAX)).map(|rate| rate as u32),
        show: |settings| settings.max_message_rate.to_string(),
        see: "[Rate limits](protocol.md#rate-limits)",
        old_name: "message-rate",
    }

    /// Bytes of messages a second that a connection may send, with the same bursts and shares.
    /// `auto`: 1MiB, or `--max-message-size` if that is more. `0`: no limit.
    max_byte_rate: Option<u64> {
        name: "max-byte-rate",
        value: "SIZE",
        default: "auto",
        parse: |text| parse::or_auto(text, parse_size),
        show: |settings| show_size(settings.byte_rate()),
    }

    /// Time between two pings of a connection. Keep it below the idle timeout of every proxy.
    ping_interval: Duration {
        name: "ping-interval",
        value: "TIME",
        default: "25s",
        parse: parse::positive_duration,
        show: |settings| show_duration(settings.ping_interval),
        old_name: "heartbeat",
    }

    /// How long a connection may be idle after a ping before it is closed.
    ping_timeout: Duration {
        name: "ping-timeout",
        value: "TIME",
        default: "20s",
        parse: parse::positive_duration,
        show: |settings| show_duration(settings.ping_timeout),
        old_name: "heartbeat-timeout",
    }

    /// A WebSocket ping, a `{"type":"ping"}` message that scripts can see, or both.
    ping_format: PingFormat {
        name: "ping-format",
        value: "websocket|json|both",
        default: "websocket",
        parse: parse::word,
        show: |settings| settings.ping_format.word(),
        old_name: "heartbeat-format",
    }

    /// How long a stop takes at most. Closes are spread over it, so that clients don't all come
    /// back at once. `0s` closes all at once.
    drain_timeout: Duration {
        name: "drain-timeout",
        value: "TIME",
        default: "20s",
        parse: parse::drain,
        show: |settings| show_duration(settings.drain_timeout),
        old_name: "drain",
    }

    /// Before that, how long clients are still accepted while `/readyz` answers 503: the time that
    /// a load balancer needs to notice.
    drain_delay: Duration {
        name: "drain-delay",
        value: "TIME",
        default: "0s",
        parse: parse::drain,
        show: |settings| show_duration(settings.drain_delay),
        old_name: "drain-notice",
    }

    "Machine"

    /// Threads that serve connections. `auto`: one for each core.
    shards: NonZeroUsize {
        name: "shards",
        value: "THREADS",
        default: "auto",
        parse: parse::shards,
        show: |settings| settings.shards.to_string(),
    }

    /// Recent events in memory, all channels together. At least `--max-message-size`. `auto`: a
    /// sixteenth of the memory of the cgroup or the machine, at most 64MiB.
    buffer_memory: Option<usize> {
        name: "buffer-memory",
        value: "SIZE",
        default: "auto",
        parse: |text| parse::or_auto(text, parse::memory),
        show: |settings| show_size(settings.buffer_memory() as u64),
        old_name: "feed-memory",
    }

    "Log"

    /// `off`, `error`, `warn`, `info`, `debug` or `trace`; more for a part:
    /// `info,fanfare::bus=debug`.
    log: String {
        name: "log",
        value: "FILTER",
        default: "info",
        parse: parse::log,
        show: |settings| settings.log.clone(),
    }

    /// Lines for people, or one JSON object a line.
    log_format: LogFormat {
        name: "log-format",
        value: "text|json",
        default: "text",
        parse: parse::word,
        show: |settings| settings.log_format.word(),
    }
}

/// Values separated by commas.
fn join(values: impl IntoIterator<Item = impl ToString>) -> String {
    values.into_iter().map(|value| value.to_string()).collect::<Vec<_>>().join(",")
}

fn widen(count: NonZeroU32) -> NonZeroUsize {
    NonZeroUsize::try_from(count).expect("usize has at least 32 bits on Linux")
}
