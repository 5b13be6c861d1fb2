//! Conflicts between settings.

use std::net::SocketAddr;

use super::environment::Input;
use super::{AdminAddr, BYTE_RATE_MIN, MESSAGE_PART, RedisUrl, Settings, show_size};
use crate::http::origin::OriginRule;

impl Settings {
    /// Reports every conflict to `input`.
    pub(super) fn check(&self, input: &mut Input) {
        self.check_addresses(input);
        if self.admin == AdminAddr::Off && self.admin_key.is_some() {
            input.conflict("admin-key", "has no effect with --admin off: leave it out");
        }
        if self.redis_durable && self.redis.is_none() {
            input.conflict("redis-durable", "has no effect without --redis: leave it out");
        }
        if !self.inbox.is_empty() && self.redis.is_none() {
            input.conflict("inbox", "needs --redis URL: messages of an inbox are kept in Redis");
        }
        if self.redis_durable && self.redis.as_ref().is_some_and(RedisUrl::is_cluster) {
            input.conflict(
                "redis-durable",
                "has no effect on a Redis Cluster, where a replica replaces a primary: leave it out",
            );
        }
        if self.redis.as_ref().is_some_and(RedisUrl::is_cluster) {
            for (name, channels) in [("inbox", &self.inbox), ("presence", &self.presence)] {
                if !channels.is_empty() {
                    input.conflict(name, "does not work on a Redis Cluster yet: leave it out");
                }
            }
        }
        // Any site can open a page with this origin, in a sandboxed frame.
        if self.allow_origin.contains(&OriginRule::Null) && self.jwt_key.is_empty() {
            input.conflict(
                "allow-origin",
                "null needs --jwt-key FILE: pages of every site can have this origin",
            );
        }
        self.check_channels(input);
        self.check_sizes(input);
    }

    fn check_addresses(&self, input: &mut Input) {
        for (at, addr) in self.listen.iter().enumerate() {
            if addr.port() != 0 && self.listen[..at].contains(addr) {
                input.conflict("listen", format!("{addr} is given twice"));
            }
        }
        if let Some(problem) = self.listen.iter().find_map(|addr| self.public_problem(*addr)) {
            input.conflict("listen", problem);
        }
        if let AdminAddr::Tcp(addr) = self.admin {
            if let Some(problem) = self.admin_problem(addr) {
                input.conflict("admin", problem);
            }
            if addr.port() != 0 && self.listen.contains(&addr) {
                input.conflict("admin", format!("{addr} is also in --listen: use another port"));
            }
        }
    }

    fn check_channels(&self, input: &mut Input) {
        let own = format!("{}:", self.redis_prefix);
        let mut pubsub = self.pubsub_channels.iter();
        if let Some(channel) = pubsub.find(|channel| channel.as_str().starts_with(&own)) {
            let problem =
                format!("{channel} is one of the node's own Redis channels, which start with {own}");
            input.conflict("pubsub-channels", problem);
        }
        if self.pubsub_channels.len() > self.max_channels.get() {
            input.conflict("max-channels", "is fewer than --pubsub-channels names");
        }
    }

    fn check_sizes(&self, input: &mut Input) {
        let message = show_size(self.max_message_size as u64);
        for (name, size) in [("buffer-memory", self.buffer_memory()), ("history-bytes", self.history_bytes)] {
            if size < self.max_message_size {
                input.conflict(name, format!("must be at least --max-message-size ({message})"));
            }
        }
        // At a lower rate the longest message would never be accepted.
        let least = BYTE_RATE_MIN.max((self.max_message_size as u64).div_ceil(MESSAGE_PART));
        if (1..least).contains(&self.byte_rate()) {
            let least = show_size(least);
            let problem = format!("must be at least {least}, or 0, with --max-message-size {message}");
            input.conflict("max-byte-rate", problem);
        }
    }

    /// Why clients may not be accepted at this address.
    pub fn public_problem(&self, addr: SocketAddr) -> Option<String> {
        let remedy = "set --jwt-key FILE or --allow-anonymous";
        let is_open = is_reachable(&addr) && self.jwt_key.is_empty() && !self.allow_anonymous;
        is_open.then(|| format!("{addr} is reachable from other hosts without authentication: {remedy}"))
    }

    /// Why the admin listener may not be at this address.
    pub fn admin_problem(&self, addr: SocketAddr) -> Option<String> {
        let remedy = "set --admin-key FILE, or use a loopback address, unix:PATH or off";
        let is_open = is_reachable(&addr) && self.admin_key.is_none();
        is_open.then(|| format!("{addr} is reachable from other hosts without a key: {remedy}"))
    }
}

/// Whether other hosts can reach this address.
fn is_reachable(addr: &SocketAddr) -> bool {
    !addr.ip().to_canonical().is_loopback()
}
