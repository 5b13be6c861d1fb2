//! Whether this Redis can keep the promises of a node: facts in, findings out.

use std::time::Duration;

use super::finding::Finding;
use crate::bus::redis::inspect::{BATCH_BYTES, Facts, History, SAMPLE};
use crate::config::{HISTORY_MIN, RedisUrl, Settings, show_duration, show_rounded, show_size};

/// With a smaller soft limit Redis disconnects a node that lags for a moment, which must then read
/// history.
const PUBSUB_SOFT: u64 = 64 << 20;
/// Hard limit to configure.
const PUBSUB_HARD: u64 = 256 << 20;
/// A clock that is off by more is noticed in logs and in the expiry of tokens, in seconds.
const CLOCK_OFF: f64 = 2.0;
/// Time in which a client reconnects after it noticed a loss, with its random wait.
const RECONNECT: Duration = Duration::from_secs(15);

/// All checks of Redis.
pub fn check(facts: &Facts, settings: &Settings) -> Vec<Finding> {
    let mut findings = vec![connection(facts), role(facts), rights(facts), eviction(facts)];
    findings.extend([limit(facts), buffer(facts), persistence(facts, settings), replicas(facts)]);
    if settings.redis.as_ref().is_some_and(RedisUrl::is_cluster) {
        findings.extend([coverage(facts), backlog(facts)]);
    }
    findings.push(message_size(facts, settings));
    findings.extend([clock(facts), history(facts, settings), history_memory(facts, settings)]);
    findings
}

fn connection(facts: &Facts) -> Finding {
    let text = format!("{}, round trip {:.1} ms", facts.server, facts.round_trip.as_secs_f64() * 1e3);
    if facts.round_trip > Duration::from_millis(20) {
        return Finding::warning("connection", text + ": every event waits for two of them")
            .remedy("a Redis nearer to the nodes");
    }
    Finding::ok("connection", text)
}

fn role(facts: &Facts) -> Finding {
    match facts.role.as_str() {
        "master" => Finding::ok("role", "a primary"),
        _ => Finding::problem("role", "a replica, which rejects writes")
            .remedy("--redis: name the primary, or redis-sentinel://HOST?sentinelServiceName=NAME"),
    }
}

fn rights(facts: &Facts) -> Finding {
    if let Some(unavailable) = &facts.unavailable {
        return Finding::problem(
            "commands",
            format!("this Redis does not have {unavailable}; more rights don't help"),
        )
        .remedy("redis.conf: remove its rename-command")
        .remedy("or use another Redis, if this one is a managed service that can't be changed");
    }
    match &facts.missing_rights {
        None => Finding::ok("rights", "this user may run every command of a node"),
        Some(rights) => Finding::problem("rights", format!("Redis does not permit {}", rights.commands))
            .remedy(format!("redis-cli ACL SETUSER <user> {}", rights.grant)),
    }
}

fn eviction(facts: &Facts) -> Finding {
    const SUBJECT: &str = "eviction";
    let remedy = "redis.conf: maxmemory-policy noeviction";
    match facts.policy.as_str() {
        "" => Finding::unreadable(SUBJECT, "maxmemory-policy, which must be noeviction").remedy(remedy),
        "noeviction" => Finding::ok(SUBJECT, "maxmemory-policy is noeviction"),
        _ if facts.maxmemory > 0 => Finding::problem(SUBJECT, facts.eviction()).remedy(remedy),
        _ => Finding::warning(SUBJECT, facts.eviction()).remedy(remedy),
    }
}

fn limit(facts: &Facts) -> Finding {
    const SUBJECT: &str = "maxmemory";
    let used = redis_size(facts.used);
    if facts.maxmemory == 0 {
        let text = format!("no limit, {used} in use: the kernel kills a Redis that grows too large");
        let half =
            if facts.host > 0 { redis_size(facts.host / 2) } else { "below the memory of its host".into() };
        return Finding::warning(SUBJECT, text)
            .remedy(format!("redis.conf: maxmemory {}", half.to_lowercase()));
    }
    let text = format!("{} of {} in use", used, redis_size(facts.maxmemory));
    if facts.used > facts.maxmemory / 5 * 4 {
        return Finding::warning(SUBJECT, text + "; when it is full, events are rejected")
            .remedy(format!("redis.conf: maxmemory {}", redis_size(2 * facts.maxmemory).to_lowercase()));
    }
    Finding::ok(SUBJECT, text)
}

/// A size in the units of redis.conf.
fn redis_size(bytes: u64) -> String {
    match bytes {
        0..10_240 => format!("{bytes}b"),
        10_240..10_485_760 => format!("{}kb", bytes >> 10),
        10_485_760..10_737_418_240 => format!("{}mb", bytes >> 20),
        _ => format!("{}gb", bytes >> 30),
    }
}

fn buffer(facts: &Facts) -> Finding {
    const SUBJECT: &str = "Pub/Sub buffer";
    let (hard, soft) = (redis_size(PUBSUB_HARD), redis_size(PUBSUB_SOFT));
    let remedy = format!("redis.conf: client-output-buffer-limit pubsub {hard} {soft} 60");
    let limits = facts.config.get("client-output-buffer-limit").and_then(|text| pubsub(text));
    let Some((hard, soft, seconds)) = limits else {
        return Finding::unreadable(SUBJECT, "client-output-buffer-limit").remedy(remedy);
    };
    let limit = |limit: u64| if limit == 0 { "no limit".into() } else { redis_size(limit) };
    let text = format!("{} at any time, {} for {seconds} s", limit(hard), limit(soft));
    if (hard == 0 || hard >= PUBSUB_SOFT) && (soft == 0 || soft >= PUBSUB_SOFT) {
        return Finding::ok(SUBJECT, text);
    }
    let text = text + ": Redis disconnects a node that lags by more, which must then read history";
    Finding::warning(SUBJECT, text).remedy(remedy)
}

/// Whether Redis accepts the longest message. A command contains one event of any size, or up to
/// [`BATCH_BYTES`] of smaller ones.
fn message_size(facts: &Facts, settings: &Settings) -> Finding {
    const SUBJECT: &str = "message size";
    let longest = settings.max_message_size as u64;
    for (name, needed) in
        [("proto-max-bulk-len", longest), ("client-query-buffer-limit", longest + 2 * BATCH_BYTES as u64)]
    {
        let limit = facts.config.get(name).and_then(|value| value.parse::<u64>().ok());
        if limit.is_some_and(|limit| limit < needed) {
            let text = format!(
                "{name} is {}, but --max-message-size allows {}: Redis closes the connection of a node that sends such a message",
                redis_size(limit.unwrap_or_default()),
                show_size(longest)
            );
            return Finding::problem(SUBJECT, text)
                .remedy(format!("redis.conf: {name} {}", redis_size(2 * needed)))
                .remedy("or a smaller --max-message-size");
        }
    }
    Finding::ok(SUBJECT, "Redis accepts messages of --max-message-size")
}

/// Hard limit, soft limit and its seconds, of `normal 0 0 0 slave … pubsub 33554432 8388608 60`.
fn pubsub(text: &str) -> Option<(u64, u64, u64)> {
    let mut words = text.split_ascii_whitespace().skip_while(|word| *word != "pubsub").skip(1);
    let mut next = || words.next()?.parse().ok();
    Some((next()?, next()?, next()?))
}

fn persistence(facts: &Facts, settings: &Settings) -> Finding {
    const SUBJECT: &str = "persistence";
    let get = |name: &str| facts.config.get(name).map(String::as_str);
    let always = "redis.conf: appendonly yes";
    let fsync = "redis.conf: appendfsync always";
    let (Some(append), Some(sync)) = (get("appendonly"), get("appendfsync")) else {
        let by_hand =
            if settings.redis_durable { "appendonly yes and appendfsync always" } else { "appendonly" };
        return Finding::unreadable(SUBJECT, by_hand);
    };
    let kept = append == "yes" && sync == "always";
    if settings.redis_durable && !kept {
        let text = format!(
            "--redis-durable says that no acknowledged write is lost, but appendonly is {append} and appendfsync {sync}: \
             events would be lost without notice"
        );
        return Finding::problem(SUBJECT, text)
            .remedy(always)
            .remedy(fsync)
            .remedy("or leave out --redis-durable");
    }
    let sentinel = settings.redis.as_ref().is_some_and(|url| url.0.contains("-sentinel://"));
    if settings.redis_durable && (sentinel || facts.replicas > 0) {
        let text = "--redis-durable says that this Redis is never replaced by a replica, but it has replicas or \
                    Sentinels. It has no effect once a replica was attached: restarts are announced to clients";
        return Finding::warning(SUBJECT, text).remedy("leave out --redis-durable");
    }
    match (append, sync) {
        ("yes", "always") => Finding::ok(SUBJECT, "every write is on disk before it is acknowledged"),
        ("yes", "everysec") => Finding::ok(
            SUBJECT,
            "a crash loses at most a second of events, and clients get a reset (appendfsync everysec)",
        ),
        ("yes", _) => Finding::warning(
            SUBJECT,
            format!("a crash loses the writes that the kernel still holds (appendfsync {sync})"),
        )
        .remedy("redis.conf: appendfsync everysec, or always"),
        _ => {
            let rest = match get("save") {
                Some("") => "all history",
                _ => "the events since the last snapshot",
            };
            Finding::warning(
                SUBJECT,
                format!("a restart of Redis loses {rest}, and clients get a reset (appendonly is {append})"),
            )
            .remedy(always)
        }
    }
}

fn replicas(facts: &Facts) -> Finding {
    const SUBJECT: &str = "replicas";
    if facts.replicas == 0 {
        return Finding::ok(SUBJECT, "none");
    }
    let remedy = "redis.conf: min-replicas-to-write 1";
    if facts.config.get("repl-backlog-ttl").map(String::as_str) == Some("1") {
        let text = "repl-backlog-ttl is 1 s: a promotion can end before a node's probe sees it, and clients would not learn \
                    of lost events";
        return Finding::problem(SUBJECT, text).remedy("redis.conf: repl-backlog-ttl 3600");
    }
    match facts.config.get("min-replicas-to-write").map(String::as_str) {
        None => Finding::unreadable(SUBJECT, "min-replicas-to-write, which limits the loss of a failover")
            .remedy(remedy),
        Some("0") => {
            let text = format!(
                "{} connected. A primary that is cut off from them still accepts events, which a failover then loses",
                facts.replicas
            );
            Finding::warning(SUBJECT, text).remedy(remedy).remedy("redis.conf: min-replicas-max-lag 10")
        }
        Some(count) => Finding::ok(
            SUBJECT,
            format!("{} connected; writes need {count} (min-replicas-to-write)", facts.replicas),
        ),
    }
}

fn coverage(facts: &Facts) -> Finding {
    const SUBJECT: &str = "coverage";
    let remedy = "redis.conf: cluster-require-full-coverage no";
    match facts.config.get("cluster-require-full-coverage").map(String::as_str) {
        None => Finding::unreadable(SUBJECT, "cluster-require-full-coverage").remedy(remedy),
        Some("no") => Finding::ok(SUBJECT, "a slot without a primary concerns its own channels only"),
        Some(_) => {
            Finding::warning(SUBJECT, "one slot without a primary stops the channels of all primaries")
                .remedy(remedy)
        }
    }
}

fn backlog(facts: &Facts) -> Finding {
    const SUBJECT: &str = "backlog";
    let remedy = "redis.conf: repl-backlog-ttl 0";
    match facts.config.get("repl-backlog-ttl").map(String::as_str) {
        None => Finding::unreadable(SUBJECT, "repl-backlog-ttl").remedy(remedy),
        Some("0") => Finding::ok(SUBJECT, "kept while the replicas are away"),
        Some(seconds) => {
            let text = format!(
                "freed after {seconds} s without a replica: clients get a reset then, and when a replica is back"
            );
            Finding::warning(SUBJECT, text).remedy(remedy)
        }
    }
}

fn clock(facts: &Facts) -> Finding {
    let (ahead, around) = facts.clock;
    let text = match ahead {
        _ if ahead.abs() <= around.max(0.001) => "the clocks of Redis and this host agree".to_owned(),
        0.0.. => format!("the clock of Redis is {ahead:.3} s ahead of this host"),
        _ => format!("the clock of Redis is {:.3} s behind this host", -ahead),
    };
    if ahead.abs() - around > CLOCK_OFF {
        let text = text + ": tokens expire early or late, and the times in the logs of both don't match";
        return Finding::warning("clock", text)
            .remedy("on both hosts: synchronize the clock (chrony, systemd-timesyncd)");
    }
    Finding::ok("clock", text)
}

/// The higher of the current rate and the average: history must last on a busy day.
fn rate(channel: &History) -> f64 {
    channel.now.max(channel.since_start.unwrap_or(0.0))
}

fn history(facts: &Facts, settings: &Settings) -> Finding {
    const SUBJECT: &str = "history";
    let rate_of = |channel: &&History| rate(channel);
    let Some(busiest) = facts.channels.iter().max_by(|a, b| rate_of(a).total_cmp(&rate_of(b))) else {
        let text = format!(
            "no channel has any yet. Check again under load: {} events are kept for each",
            settings.history
        );
        return Finding::ok(SUBJECT, text);
    };
    let fastest = rate(busiest);
    let (ttl, kept) = (settings.history_ttl, settings.history as f64);
    let away = settings.ping_interval + settings.ping_timeout + RECONNECT;
    let average = busiest.since_start.map_or("unknown".into(), |rate| format!("{rate:.2}"));
    let derived = format!(
        "channel {}, the busiest of {}{}, has {:.2} events/s ({:.2} in the last {} s, {average} on average since its \
         sequence started; it holds {} of {})",
        busiest.name,
        facts.channels.len(),
        if facts.more { " checked" } else { "" },
        fastest,
        busiest.now,
        SAMPLE.as_secs(),
        busiest.events,
        settings.history,
    );
    let lasts = if fastest > 0.0 { kept / fastest } else { f64::INFINITY };
    if lasts >= ttl.as_secs_f64() {
        return Finding::ok(
            SUBJECT,
            format!("--history lasts as long as --history-ttl ({}): {derived}", show_duration(ttl)),
        );
    }
    let text = format!("the last {} can be replayed: {derived}", show_rounded(lasts));
    if lasts >= away.as_secs_f64() {
        return Finding::ok(SUBJECT, text);
    }
    let wanted = (fastest * away.as_secs_f64() * 4.0).ceil() as u64;
    let text = format!(
        "{text}. A client without network needs up to {} to notice and come back, and would get a gap",
        show_rounded(away.as_secs_f64())
    );
    Finding::warning(SUBJECT, text).remedy(format!("--history {wanted}"))
}

fn history_memory(facts: &Facts, settings: &Settings) -> Finding {
    const SUBJECT: &str = "memory of history";
    let (events, bytes) =
        facts.channels.iter().fold((0, 0), |sum, channel| (sum.0 + channel.events, sum.1 + channel.bytes));
    if events == 0 || bytes == 0 {
        return Finding::ok(SUBJECT, "unknown until there is some history");
    }
    let each = bytes.div_ceil(events);
    let channels = facts.channels.len() as u64;
    let full = each * settings.history * channels;
    let text = format!(
        "up to {} if {channels} channel{} hold{} {} events each, at the current {each} bytes an event{}",
        show_size(full >> 20 << 20).replace("iB", "B"),
        if channels == 1 { "" } else { "s" },
        if channels == 1 { "s" } else { "" },
        settings.history,
        if facts.more { ", and there are more channels" } else { "" },
    );
    let available = match (facts.maxmemory, facts.host) {
        (0, 0) => return Finding::ok(SUBJECT, text),
        (0, host) => host / 2,
        (max, _) => max,
    };
    if facts.used.saturating_sub(bytes) + full <= available {
        return Finding::ok(SUBJECT, text);
    }
    let text = format!("{text}; with other data that is more than the available {}", redis_size(available));
    let fits = available.saturating_sub(facts.used.saturating_sub(bytes)) / (each * channels);
    Finding::warning(SUBJECT, text)
        .remedy(format!("redis.conf: maxmemory {}", redis_size(2 * full).to_lowercase()))
        .remedy(format!("or --history {}", fits.max(HISTORY_MIN)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::redis::MissingRights;
    use crate::bus::redis::inspect::Server;
    use crate::cli::doctor::finding::Level;
    use crate::config::Action;

    fn settings(flags: &[&str]) -> Settings {
        let flags = [&["--redis", "redis://127.0.0.1"], flags].concat();
        match Settings::from(flags.iter().map(std::ffi::OsString::from), []) {
            Ok(Action::Run(settings)) => settings,
            other => panic!("{other:?}"),
        }
    }

    fn config(pairs: &[(&str, &str)]) -> std::collections::HashMap<String, String> {
        let good = [
            ("client-output-buffer-limit", "normal 0 0 0 slave 1 1 1 pubsub 268435456 67108864 60"),
            ("appendonly", "yes"),
            ("appendfsync", "always"),
            ("save", ""),
            ("min-replicas-to-write", "1"),
        ];
        good.iter().chain(pairs).map(|(name, value)| (name.to_string(), value.to_string())).collect()
    }

    fn good() -> Facts {
        Facts {
            server: Server::of("redis_version:7.2.0"),
            round_trip: Duration::from_micros(300),
            role: "master".into(),
            maxmemory: 1 << 30,
            policy: "noeviction".into(),
            used: 100 << 20,
            config: config(&[]),
            ..Facts::default()
        }
    }

    fn with(pairs: &[(&str, &str)]) -> Facts {
        Facts { config: config(pairs), ..good() }
    }

    fn bad(facts: &Facts, flags: &[&str]) -> Vec<(&'static str, Level)> {
        let findings = check(facts, &settings(flags));
        let bad = findings.iter().filter(|finding| finding.level != Level::Ok);
        assert!(bad.clone().all(|finding| !finding.remedies.is_empty()), "each has a remedy: {findings:?}");
        bad.map(|finding| (finding.subject, finding.level)).collect()
    }

    #[test]
    fn finds_each_problem_alone() {
        use Level::{Problem, Warning};
        assert_eq!(bad(&good(), &[]), []);
        assert_eq!(bad(&good(), &["--redis-durable"]), []);
        let everysec = with(&[("appendfsync", "everysec")]);
        assert_eq!(bad(&everysec, &[]), [], "clients learn of a lost second");
        let durable = &["--redis-durable"][..];
        let small = with(&[("client-output-buffer-limit", "pubsub 33554432 8388608 60")]);
        for (facts, flags, found) in [
            (Facts { round_trip: Duration::from_millis(30), ..good() }, &[][..], ("connection", Warning)),
            (Facts { role: "slave".into(), ..good() }, &[], ("role", Problem)),
            (Facts { policy: "allkeys-lru".into(), ..good() }, &[], ("eviction", Problem)),
            (Facts { policy: "volatile-ttl".into(), ..good() }, &[], ("eviction", Problem)),
            (Facts { maxmemory: 0, ..good() }, &[], ("maxmemory", Warning)),
            (Facts { used: 900 << 20, ..good() }, &[], ("maxmemory", Warning)),
            (small, &[], ("Pub/Sub buffer", Warning)),
            (everysec, durable, ("persistence", Problem)),
            (with(&[("appendonly", "no")]), durable, ("persistence", Problem)),
            (Facts { replicas: 1, ..good() }, durable, ("persistence", Warning)),
            (with(&[("appendonly", "no")]), &[], ("persistence", Warning)),
            (with(&[("appendfsync", "no")]), &[], ("persistence", Warning)),
            (Facts { replicas: 1, ..with(&[("min-replicas-to-write", "0")]) }, &[], ("replicas", Warning)),
            (Facts { replicas: 1, ..with(&[("repl-backlog-ttl", "1")]) }, &[], ("replicas", Problem)),
            (Facts { clock: (-60.0, 0.01), ..good() }, &[], ("clock", Warning)),
        ] {
            assert_eq!(bad(&facts, flags), [found], "{facts:?} {flags:?}");
        }
    }

    #[test]
    fn cluster_has_settings_of_its_own() {
        let flags = ["--redis", "redis-cluster://127.0.0.1:7000"].map(Into::into);
        let Ok(Action::Run(settings)) = Settings::from(flags, []) else { panic!("good settings") };
        let levels = |pairs: &[(&str, &str)]| {
            let findings = check(&with(pairs), &settings);
            let of =
                |subject: &str| findings.iter().find(|finding| finding.subject == subject).unwrap().level;
            [of("coverage"), of("backlog")]
        };
        let name = "cluster-require-full-coverage";
        assert_eq!(levels(&[(name, "no"), ("repl-backlog-ttl", "0")]), [Level::Ok; 2]);
        assert_eq!(levels(&[(name, "yes"), ("repl-backlog-ttl", "3600")]), [Level::Warning; 2]);
    }

    #[test]
    fn missing_rights_become_a_command() {
        let missing = MissingRights { commands: "SUBSCRIBE a".into(), grant: "~a:* +@read".into() };
        let finding = rights(&Facts { missing_rights: Some(missing), ..good() });
        assert_eq!(finding.level, Level::Problem);
        assert_eq!(finding.remedies, ["redis-cli ACL SETUSER <user> ~a:* +@read"]);
    }

    #[test]
    fn hidden_settings_are_checked_by_hand() {
        let hidden = Facts { config: Default::default(), replicas: 1, ..good() };
        let mut findings = check(&hidden, &settings(&[]));
        findings.retain(|finding| finding.text.contains("by hand"));
        let unread: Vec<_> = findings.iter().map(|finding| finding.subject).collect();
        assert_eq!(unread, ["Pub/Sub buffer", "persistence", "replicas"]);
        assert!(findings.iter().all(|finding| finding.level == Level::Warning));
    }

    fn busy(now: f64, since_start: f64) -> Facts {
        let quiet =
            History { name: "quiet".into(), events: 10, bytes: 1500, since_start: Some(0.1), now: 0.0 };
        let name = "busy".to_owned();
        let busy = History { name, events: 10_000, bytes: 2_000_000, since_start: Some(since_start), now };
        Facts { channels: vec![quiet, busy], ..good() }
    }

    #[test]
    fn history_lasts_for_the_busiest_channel() {
        let found = |facts: &Facts, flags: &[&str]| history(facts, &settings(flags));
        let finding = found(&busy(5.0, 10.0), &[]);
        assert_eq!(finding.level, Level::Ok);
        assert!(finding.text.starts_with("the last 17 min can be replayed: channel busy"), "{finding:?}");
        // 45 s to notice with the default --ping-interval, and 15 to reconnect.
        let finding = found(&busy(500.0, 10.0), &[]);
        assert_eq!(finding.level, Level::Warning);
        assert_eq!(finding.remedies, ["--history 120000"]);
        assert_eq!(found(&busy(500.0, 10.0), &["--history", "120000"]).level, Level::Ok);
        let finding = found(&busy(0.0, 0.01), &["--history-ttl", "1h"]);
        assert!(finding.text.contains("as long as --history-ttl (1h)"), "{finding:?}");
    }

    #[test]
    fn full_histories_fit_into_memory() {
        let flags = settings(&["--history", "1000000"]);
        assert_eq!(history_memory(&busy(1.0, 1.0), &flags).level, Level::Ok);
        let small = Facts { maxmemory: 200 << 20, ..busy(1.0, 1.0) };
        let finding = history_memory(&small, &flags);
        assert_eq!(finding.level, Level::Warning);
        assert_eq!(finding.remedies.len(), 2, "{finding:?}");
    }

    #[test]
    fn finds_missing_commands_and_small_limits() {
        let lacking = Facts { unavailable: Some("the command XTRIM".into()), ..good() };
        assert_eq!(bad(&lacking, &[]), [("commands", Level::Problem)]);
        let short = with(&[("proto-max-bulk-len", "1048576")]);
        assert_eq!(bad(&short, &[]), []);
        assert_eq!(bad(&short, &["--max-message-size", "2MiB"]), [("message size", Level::Problem)]);
        let small = with(&[("client-query-buffer-limit", "1048576")]);
        assert_eq!(bad(&small, &[]), [("message size", Level::Problem)]);
    }
}
