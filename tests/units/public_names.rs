//! The complete lists of public names: users depend on them, so changing one must be deliberate.

use std::collections::BTreeSet;
use std::process::Command;
use std::sync::Arc;

use fanfare::metrics::{Metrics, Readiness};
use fanfare::protocol::close::{CloseReason, rejection_code};
use fanfare::protocol::frame::ErrorCode;

const SETTINGS: [(&str, &str); 37] = [
    ("--listen", "FANFARE_LISTEN"),
    ("--admin", "FANFARE_ADMIN"),
    ("--allow-anonymous", "FANFARE_ALLOW_ANONYMOUS"),
    ("--jwt-key", "FANFARE_JWT_KEY"),
    ("--admin-key", "FANFARE_ADMIN_KEY"),
    ("--client-publish", "FANFARE_CLIENT_PUBLISH"),
    ("--allow-origin", "FANFARE_ALLOW_ORIGIN"),
    ("--trusted-proxy", "FANFARE_TRUSTED_PROXY"),
    ("--redis", "FANFARE_REDIS"),
    ("--redis-prefix", "FANFARE_REDIS_PREFIX"),
    ("--redis-durable", "FANFARE_REDIS_DURABLE"),
    ("--pubsub-channels", "FANFARE_PUBSUB_CHANNELS"),
    ("--inbox", "FANFARE_INBOX"),
    ("--inbox-max", "FANFARE_INBOX_MAX"),
    ("--history", "FANFARE_HISTORY"),
    ("--history-bytes", "FANFARE_HISTORY_BYTES"),
    ("--history-ttl", "FANFARE_HISTORY_TTL"),
    ("--publish-timeout", "FANFARE_PUBLISH_TIMEOUT"),
    ("--max-connections", "FANFARE_MAX_CONNECTIONS"),
    ("--max-connections-per-ip", "FANFARE_MAX_CONNECTIONS_PER_IP"),
    ("--max-connections-per-user", "FANFARE_MAX_CONNECTIONS_PER_USER"),
    ("--max-channels", "FANFARE_MAX_CHANNELS"),
    ("--max-subscriptions", "FANFARE_MAX_SUBSCRIPTIONS"),
    ("--presence", "FANFARE_PRESENCE"),
    ("--presence-list", "FANFARE_PRESENCE_LIST"),
    ("--max-message-size", "FANFARE_MAX_MESSAGE_SIZE"),
    ("--max-message-rate", "FANFARE_MAX_MESSAGE_RATE"),
    ("--max-byte-rate", "FANFARE_MAX_BYTE_RATE"),
    ("--ping-interval", "FANFARE_PING_INTERVAL"),
    ("--ping-timeout", "FANFARE_PING_TIMEOUT"),
    ("--ping-format", "FANFARE_PING_FORMAT"),
    ("--drain-timeout", "FANFARE_DRAIN_TIMEOUT"),
    ("--drain-delay", "FANFARE_DRAIN_DELAY"),
    ("--shards", "FANFARE_SHARDS"),
    ("--buffer-memory", "FANFARE_BUFFER_MEMORY"),
    ("--log", "FANFARE_LOG"),
    ("--log-format", "FANFARE_LOG_FORMAT"),
];

const METRICS: [(&str, &str); 48] = [
    ("fanfare_build_info", "gauge"),
    ("fanfare_ready", "gauge"),
    ("fanfare_connections", "gauge"),
    ("fanfare_max_connections", "gauge"),
    ("fanfare_connections_upgraded_total", "counter"),
    ("fanfare_connections_closed_total", "counter"),
    ("fanfare_http_rejections_total", "counter"),
    ("fanfare_accept_failures_total", "counter"),
    ("fanfare_connections_rejected_total", "counter"),
    ("fanfare_messages_received_total", "counter"),
    ("fanfare_publish_errors_total", "counter"),
    ("fanfare_subscriptions", "gauge"),
    ("fanfare_subscription_errors_total", "counter"),
    ("fanfare_commands_total", "counter"),
    ("fanfare_bans", "gauge"),
    ("fanfare_received_bytes_total", "counter"),
    ("fanfare_events_delivered_total", "counter"),
    ("fanfare_sent_bytes_total", "counter"),
    ("fanfare_fanout_duration_seconds", "histogram"),
    ("fanfare_delivery_latency_seconds", "histogram"),
    ("fanfare_slow_connections", "gauge"),
    ("fanfare_resets_total", "counter"),
    ("fanfare_pubsub_misses_total", "counter"),
    ("fanfare_buffer_bytes", "gauge"),
    ("fanfare_history_page_bytes", "gauge"),
    ("fanfare_unsent_bytes", "gauge"),
    ("fanfare_bus_events_total", "counter"),
    ("fanfare_bus_published_total", "counter"),
    ("fanfare_bus_publish_rejected_total", "counter"),
    ("fanfare_bus_publish_unknown_total", "counter"),
    ("fanfare_inbox_stored_total", "counter"),
    ("fanfare_inboxes", "gauge"),
    ("fanfare_inbox_messages", "gauge"),
    ("fanfare_inbox_oldest_seconds", "gauge"),
    ("fanfare_bus_oversized_total", "counter"),
    ("fanfare_bus_gaps_filled_total", "counter"),
    ("fanfare_bus_resets_total", "counter"),
    ("fanfare_bus_reads_total", "counter"),
    ("fanfare_bus_channels", "gauge"),
    ("fanfare_presence_users", "gauge"),
    ("fanfare_bus_round_trip_seconds", "histogram"),
    ("fanfare_bus_probe_interval_seconds", "gauge"),
    ("fanfare_admin_rejections_total", "counter"),
    ("process_start_time_seconds", "gauge"),
    ("process_resident_memory_bytes", "gauge"),
    ("process_cpu_seconds_total", "counter"),
    ("process_open_fds", "gauge"),
    ("process_max_fds", "gauge"),
];

/// Metric, label, and its values, if they are fixed.
const LABELS: [(&str, &str, &[&str]); 6] = [
    (
        "fanfare_connections_closed_total",
        "reason",
        &[
            "closed_by_peer",
            "connection_lost",
            "protocol",
            "binary",
            "invalid_text",
            "message_too_big",
            "message_timeout",
            "ping_timeout",
            "missed_events",
            "publish_failed",
            "draining",
            "http_response",
            "request_timeout",
            "origin_not_allowed",
            "forbidden",
            "unauthorized",
            "token_expired",
            "rate_limited",
            "channel_forbidden",
            "disconnected",
            "banned",
            "node_limit",
            "ip_limit",
            "user_limit",
            "proxy_not_trusted",
            "slow_reader",
        ],
    ),
    (
        "fanfare_http_rejections_total",
        "status",
        &["400", "401", "403", "404", "405", "408", "414", "426", "429", "431", "503", "505", "other"],
    ),
    ("fanfare_connections_rejected_total", "reason", &["node_limit", "ip_limit"]),
    ("fanfare_publish_errors_total", "code", &ERROR_CODES),
    ("fanfare_subscription_errors_total", "code", &ERROR_CODES),
    ("fanfare_build_info", "version", &[env!("CARGO_PKG_VERSION")]),
];

/// Metrics with a series per shard, labelled with its number.
const PER_SHARD: [&str; 13] = [
    "fanfare_connections",
    "fanfare_connections_upgraded_total",
    "fanfare_messages_received_total",
    "fanfare_subscriptions",
    "fanfare_received_bytes_total",
    "fanfare_events_delivered_total",
    "fanfare_sent_bytes_total",
    "fanfare_slow_connections",
    "fanfare_resets_total",
    "fanfare_pubsub_misses_total",
    "fanfare_buffer_bytes",
    "fanfare_history_page_bytes",
    "fanfare_unsent_bytes",
];

const ERROR_CODES: [&str; 10] = [
    "invalid",
    "forbidden",
    "rate_limited",
    "unavailable",
    "unknown",
    "full",
    "subscribed",
    "not_subscribed",
    "too_many",
    "unauthorized",
];

const CLOSE_CODES: [(CloseReason, u16, &str); 15] = [
    (CloseReason::Protocol, 1002, "protocol error"),
    (CloseReason::Binary, 1003, "binary messages not supported"),
    (CloseReason::InvalidText, 1007, "text must be UTF-8"),
    (CloseReason::MessageTimeout, 1008, "message not completed in time"),
    (CloseReason::MessageTooBig, 1009, "message too big"),
    (CloseReason::Draining, 1012, "the node is restarting: reconnect"),
    (CloseReason::PublishFailed, 1013, "not published: try again later"),
    (CloseReason::TokenExpired, 4001, "token expired"),
    (CloseReason::Forbidden, 4003, "this client may not publish here"),
    (CloseReason::MissedEvents, 4008, "events were missed: reconnect"),
    (CloseReason::PingTimeout, 4009, "ping timeout"),
    (CloseReason::Disconnected, 4010, "disconnected by the application"),
    (CloseReason::Banned, 4010, "banned by the application"),
    (CloseReason::RateLimited, 4029, "rate limit exceeded"),
    (CloseReason::ChannelForbidden, 4403, "the token does not allow this channel"),
];

/// Reasons without a close frame.
const NO_CLOSE_FRAME: [CloseReason; 11] = [
    CloseReason::ClosedByPeer,
    CloseReason::ConnectionLost,
    CloseReason::HttpResponse,
    CloseReason::RequestTimeout,
    CloseReason::OriginNotAllowed,
    CloseReason::Unauthorized,
    CloseReason::NodeLimit,
    CloseReason::IpLimit,
    CloseReason::UserLimit,
    CloseReason::ProxyNotTrusted,
    CloseReason::SlowReader,
];

const JS_OPTIONS: [&str; 6] = ["channel", "token", "pingInterval", "pongTimeout", "gapDelay", "WebSocket"];
/// Of `subscribe`, and of the client.
const JS_START_OPTIONS: [&str; 3] = ["lastEventId", "history", "presence"];

fn metrics() -> String {
    Metrics::new(1, Arc::default(), Arc::new(Readiness::default())).prometheus()
}

#[test]
fn settings_and_environment_variables() {
    let help = Command::new(env!("CARGO_BIN_EXE_fanfare")).arg("--help").output().expect("it runs");
    let help = String::from_utf8(help.stdout).expect("UTF-8");
    let lines = help.lines().filter(|line| line.starts_with("  --") && line.contains("FANFARE_"));
    let names: Vec<(&str, &str)> = lines
        .map(|line| {
            let variable = line.find("FANFARE_").expect("it contains one");
            let end = line[variable..].find(|c: char| !c.is_ascii_uppercase() && c != '_');
            let variable = &line[variable..end.map_or(line.len(), |end| variable + end)];
            (line.split_whitespace().next().expect("a flag"), variable)
        })
        .collect();
    assert_eq!(names, SETTINGS);
}

#[test]
fn metric_names_and_types() {
    let text = metrics();
    let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
    assert_eq!(types.collect::<Vec<_>>(), METRICS);
}

#[test]
fn labels_and_their_values() {
    let text = metrics();
    let mut expected = BTreeSet::new();
    for (name, label, values) in LABELS {
        expected.extend(values.iter().map(|value| (name, label, *value)));
    }
    expected.extend(PER_SHARD.map(|name| (name, "shard", "0")));
    let histograms: Vec<_> = METRICS.iter().filter(|(_, kind)| *kind == "histogram").collect();
    let mut found = BTreeSet::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let Some((name, labels)) = line.split_once('{') else { continue };
        let (label, value) = labels.split_once("=\"").expect("a label");
        let (value, rest) = value.split_once('"').expect("a value");
        assert!(rest.starts_with("} "), "one label: {line}");
        if let Some(family) = name.strip_suffix("_bucket") {
            assert!(label == "le" && histograms.iter().any(|(name, _)| *name == family), "{line}");
        } else {
            found.insert((name, label, value));
        }
    }
    let difference: Vec<_> = found.symmetric_difference(&expected).collect();
    assert!(difference.is_empty(), "{difference:?}");
}

#[test]
fn error_codes() {
    assert_eq!(ErrorCode::ALL.map(ErrorCode::text), ERROR_CODES);
}

#[test]
fn close_codes_and_reasons() {
    for (reason, code, text) in CLOSE_CODES {
        assert_eq!(reason.close(), Some((code, text)), "{reason:?}");
    }
    for reason in NO_CLOSE_FRAME {
        assert_eq!(reason.close(), None, "{reason:?}");
    }
    let rejections: Vec<_> = (100..600)
        .filter_map(|status| Some((status, rejection_code(status, CloseReason::HttpResponse)?)))
        .collect();
    assert_eq!(rejections, [(400, 4400), (401, 4401), (403, 4403)]);
    let all = CLOSE_CODES.iter().map(|(reason, ..)| *reason).chain(NO_CLOSE_FRAME);
    let labels: BTreeSet<_> = all.map(CloseReason::label).collect();
    assert_eq!(labels, LABELS[0].2.iter().copied().collect(), "every reason is listed");
}

#[test]
fn options_of_fanfare_js() {
    let types = include_str!("../../src/http/page/fanfare.d.ts");
    let names = |interface: &str| -> Vec<&str> {
        let (_, options) = types.split_once(&format!("interface {interface} {{\n")).expect("the options");
        let (options, _) = options.split_once("\n}\n").expect("their end");
        let names = options.lines().filter(|line| !line.trim_start().starts_with(['/', '*']));
        names.filter_map(|line| Some(line.trim().split_once("?: ")?.0)).collect()
    };
    assert_eq!(names("FanfareOptions extends FanfareStart"), JS_OPTIONS);
    assert_eq!(names("FanfareStart"), JS_START_OPTIONS);
}
