//! Every setting once: its name, default and description. Flags, variables, `--help` and `--check` come from here.

use std::fmt::Write;

/// How a setting is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    /// One value.
    Value,
    /// Values by comma, or by repeating the flag.
    List,
    /// On when the flag is there; the variable says `true` or `false`.
    Switch,
}

/// One setting.
#[derive(Debug)]
pub(super) struct Spec {
    /// The flag without its dashes.
    pub name: &'static str,
    /// How it is written.
    pub shape: Shape,
    /// What stands for the value in `--help`.
    pub value: &'static str,
    /// As one would write it; empty when there is none.
    pub default: &'static str,
    /// What it does, one line each.
    pub help: &'static [&'static str],
}

impl Spec {
    /// `--max-message-size`
    pub fn flag(&self) -> String {
        format!("--{}", self.name)
    }

    /// `FANFARE_MAX_MESSAGE_SIZE`
    pub fn variable(&self) -> String {
        variable(self.name)
    }
}

/// The prefix of every environment variable.
pub(super) const PREFIX: &str = "FANFARE_";

/// The environment variable of the setting `name`.
pub(super) fn variable(name: &str) -> String {
    format!("{PREFIX}{}", name.to_ascii_uppercase().replace('-', "_"))
}

use Shape::{List, Switch, Value};

const fn spec(
    name: &'static str,
    shape: Shape,
    value: &'static str,
    default: &'static str,
    help: &'static [&'static str],
) -> Spec {
    Spec { name, shape, value, default, help }
}

/// All settings, in the order shown.
pub(super) static TABLE: [Spec; 32] = [
    spec(
        "listen",
        List,
        "IP:PORT,...",
        "127.0.0.1:8080",
        &["Where clients connect. Port 0 takes a free one, shown at start."],
    ),
    spec(
        "admin",
        Value,
        "IP:PORT",
        "127.0.0.1:9080",
        &["Where publish, metrics and stats are served: IP:PORT, unix:PATH, or off."],
    ),
    spec(
        "allow-anonymous",
        Switch,
        "",
        "false",
        &["Anyone may come in. Without it or --jwt-key, --listen takes loopback addresses only."],
    ),
    spec(
        "jwt-key",
        List,
        "FILE,...",
        "",
        &[
            "Keys of the tokens that clients must bring, one in each file: an HS256 secret of at least 32",
            "bytes, or the public key of RS256, ES256 or EdDSA in PEM. Any of them will do.",
            "Reread at SIGHUP. fanfare token --help tells how to make a token to try.",
        ],
    ),
    spec(
        "admin-key",
        Value,
        "FILE",
        "",
        &[
            "File with the key that requests to --admin must carry (Authorization: Bearer KEY), at least",
            "16 characters. Must be given when others can reach --admin. Reread at SIGHUP.",
        ],
    ),
    spec(
        "client-publish",
        Value,
        "off|channel|any",
        "any",
        &[
            "What clients may publish: nothing, to everybody in their own channel, or also to one user",
            "by name (\"to\").",
        ],
    ),
    spec(
        "allow-origin",
        List,
        "ORIGIN,...",
        "",
        &[
            "Sites whose pages may connect: https://example.com, https://*.example.com. Without it pages",
            "of the very host and port that they connect to; on loopback hosts any port, and on loopback",
            "addresses no other host unless a trusted proxy passes it on. Programs, which send no Origin,",
            "always may. Without --admin-key requests to --admin may use these hosts, too.",
        ],
    ),
    spec(
        "trusted-proxy",
        List,
        "CIDR,...",
        "",
        &[
            "Addresses or networks of proxies in front, such as 10.0.0.7 or fd00::/8. From them alone a",
            "client's address is taken: from a PROXY header (version 1 or 2), else X-Forwarded-For.",
        ],
    ),
    spec(
        "redis",
        Value,
        "URL",
        "",
        &[
            "Joins nodes through this Redis. Without it the node stands alone. One of",
            "  redis://[[USER:]PASSWORD@]HOST[:PORT][/DATABASE]       rediss:// the same over TLS",
            "  redis-sentinel://[...@]HOST[:26379][/DATABASE]?sentinelServiceName=NAME[&node=HOST:PORT]...",
            "  redis+unix:///PATH or unix:PATH",
            "Give a password in the variable: any user of the machine can see a flag.",
        ],
    ),
    spec(
        "redis-prefix",
        Value,
        "NAME",
        "fanfare",
        &["Begins every key and Redis channel. Deployments that share a Redis need different ones."],
    ),
    spec(
        "redis-durable",
        Switch,
        "",
        "false",
        &[
            "Your word that this Redis keeps every acknowledged write (appendfsync always) and is never",
            "replaced by a copy: then its restart is not announced to clients as a possible loss.",
        ],
    ),
    spec(
        "pubsub-channels",
        List,
        "NAME,...",
        "ws_broadcast",
        &["Channels that are plain Redis channels of the same name as well, or none."],
    ),
    spec(
        "history",
        Value,
        "EVENTS",
        "10000",
        &["Events kept for each channel, for clients that come back. At least 1000."],
    ),
    spec(
        "history-bytes",
        Value,
        "SIZE",
        "64MiB",
        &[
            "Bytes of events kept for each channel: of large events fewer than --history are kept. At least",
            "--max-message-size.",
        ],
    ),
    spec("history-ttl", Value, "TIME", "24h", &["How long history outlives a channel's last event."]),
    spec("publish-timeout", Value, "TIME", "5s", &["How long an event may wait for the bus."]),
    spec(
        "max-connections",
        Value,
        "CONNECTIONS",
        "auto",
        &[
            "Connections of this node; more get 503. auto: as many as fit into the limit on open files and",
            "the memory of the cgroup or the machine. Never more than the limit on open files allows.",
        ],
    ),
    spec(
        "max-connections-per-ip",
        Value,
        "CONNECTIONS",
        "auto",
        &[
            "Connections of one client address (of IPv6: one /56); more get 429. auto: 1024, but none for",
            "loopback. 0: no cap.",
        ],
    ),
    spec(
        "max-connections-per-user",
        Value,
        "CONNECTIONS",
        "auto",
        &[
            "Connections of one user on this node; more get 429. auto: 100 with --jwt-key, none without,",
            "since then anyone can take any name. 0: no cap.",
        ],
    ),
    spec("max-channels", Value, "CHANNELS", "10000", &["Channels this node follows at once."]),
    spec(
        "max-message-size",
        Value,
        "SIZE",
        "64KiB",
        &["Longest message taken from a client, at most 16MiB."],
    ),
    spec(
        "max-message-rate",
        Value,
        "MESSAGES",
        "100",
        &[
            "Messages that a connection may send in a second, pings among them; at once ten times as many.",
            "All connections of a user together may send no more; without --jwt-key, all of an address ten",
            "times as many. What is faster is not published; clients that go on are closed. 0: no limit.",
        ],
    ),
    spec(
        "max-byte-rate",
        Value,
        "SIZE",
        "auto",
        &[
            "Bytes of messages that a connection may send in a second, with the same bursts and shares.",
            "auto: 1MiB, or --max-message-size if that is more. 0: no limit.",
        ],
    ),
    spec(
        "ping-interval",
        Value,
        "TIME",
        "25s",
        &["Time between two heartbeats of a connection. Keep it below the idle timeout of any proxy."],
    ),
    spec(
        "ping-timeout",
        Value,
        "TIME",
        "20s",
        &["How long a connection may be silent after a heartbeat before it is closed."],
    ),
    spec(
        "ping-format",
        Value,
        "websocket|json|both",
        "websocket",
        &["A WebSocket ping, a {\"type\":\"ping\"} message that scripts can see, or both."],
    ),
    spec(
        "drain-timeout",
        Value,
        "TIME",
        "20s",
        &[
            "How long a stop takes at most: connections are closed spread over it, so that clients don't",
            "all come back at once. 0s closes all at once.",
        ],
    ),
    spec(
        "drain-delay",
        Value,
        "TIME",
        "0s",
        &[
            "How long before that /readyz says 503 while clients are still taken: for balancers that look",
            "at nothing else, as long as they need to notice.",
        ],
    ),
    spec("shards", Value, "THREADS", "auto", &["Threads that serve connections. auto: one for each core."]),
    spec(
        "buffer-memory",
        Value,
        "SIZE",
        "auto",
        &[
            "Recent events held in memory, all channels together. At least --max-message-size. auto: a sixteenth",
            "of the memory of the cgroup or the machine, at most 64MiB.",
        ],
    ),
    spec(
        "log",
        Value,
        "FILTER",
        "info",
        &["off, error, warn, info, debug or trace; more for a part: info,fanfare::bus=debug"],
    ),
    spec("log-format", Value, "text|json", "text", &["Lines for people, or one JSON object a line."]),
];

/// Names that settings had before 0.1.0, and what they are called now.
pub(super) const RENAMED: [(&str, &str); 12] = [
    ("open", "allow-anonymous"),
    ("max-per-address", "max-connections-per-ip"),
    ("max-per-user", "max-connections-per-user"),
    ("max-message", "max-message-size"),
    ("message-rate", "max-message-rate"),
    ("heartbeat", "ping-interval"),
    ("heartbeat-timeout", "ping-timeout"),
    ("heartbeat-format", "ping-format"),
    ("drain", "drain-timeout"),
    ("drain-notice", "drain-delay"),
    ("feed-memory", "buffer-memory"),
    ("bare-channels", "pubsub-channels"),
];

/// The heading before each setting that begins a group.
const GROUPS: [(&str, &str); 6] = [
    ("listen", "Addresses"),
    ("allow-anonymous", "Access"),
    ("redis", "Bus"),
    ("max-connections", "Clients"),
    ("shards", "Machine"),
    ("log", "Log"),
];

/// The text of `--help`, at most 100 columns wide.
pub(super) fn help() -> String {
    let mut text = format!(
        "fanfare {}: one event in, every socket out.\n\n\
         Usage: fanfare [--NAME VALUE | --NAME=VALUE]...\n       \
         fanfare doctor ...  looks whether this host and its Redis are ready (fanfare doctor --help)\n       \
         fanfare token ...   makes a token to try (fanfare token --help)\n\n\
         Each setting is a flag or an environment variable; the flag wins.\n\
         TIME is a whole number and ms, s, m, h or d. SIZE is a whole number of bytes, or with KiB, MiB,\n\
         GiB, KB, MB or GB.\n",
        env!("CARGO_PKG_VERSION")
    );
    for spec in &TABLE {
        if let Some((_, heading)) = GROUPS.iter().find(|(first, _)| *first == spec.name) {
            let _ = write!(text, "\n{heading}\n");
        }
        let flag = format!("{} {}", spec.flag(), spec.value);
        let default = if spec.default.is_empty() { "none" } else { spec.default };
        let _ = writeln!(text, "  {flag:<36}{:<29}default {default}", spec.variable());
        for line in spec.help {
            let _ = writeln!(text, "      {line}");
        }
    }
    text.push_str(
        "\nOther\n  \
         --check       Check every setting, print them all and exit.\n  \
         --version     Print the version and exit.\n  \
         --help        Print this and exit.\n\n\
         A wrong setting ends fanfare with exit code 2 before it opens anything.\n",
    );
    text
}
