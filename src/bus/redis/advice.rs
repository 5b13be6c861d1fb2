//! What is wrong with Redis, in words that say what to do. Redis' own words stay in the log: they name what failed,
//! and often nothing that an operator could change.

use super::decode::FAULT;
use super::errors::CallError;

const NOT_PERMITTED: &str = "the ACL of this node's Redis user lacks rights: docs/redis.md lists them";

/// What Redis or the way to it says, by its beginning, and what that means.
const MEANINGS: [(&str, &str); 17] = [
    (
        "ERR unknown command",
        "this Redis lacks a command that a node needs, as the log says: remove its rename-command",
    ),
    (
        "ERR Protocol error: invalid bulk length",
        "the message is too long for Redis: raise its proto-max-bulk-len, or lower --max-message-size",
    ),
    (FAULT, "this channel's data in Redis is wrong, as the log says: the other channels work"),
    ("LOADING", "Redis is loading its data: wait until it has"),
    ("BUSY", "Redis is busy with another program's script: wait, or end it with SCRIPT KILL"),
    (
        "MASTERDOWN",
        "this Redis is a replica that has lost its primary: name the primary, or the Sentinels, in --redis",
    ),
    (
        "READONLY",
        "this Redis is a replica and takes no writes: name the primary, or the Sentinels, in --redis",
    ),
    ("OOM", "Redis is full: raise its maxmemory, or keep less with --history and --history-ttl"),
    (
        "MISCONF",
        "Redis takes no writes since it can't save to its disk: see its log, and whether the disk is full",
    ),
    (
        "NOREPLICAS",
        "Redis takes no writes since too few replicas are in touch (min-replicas-to-write): see to them",
    ),
    ("NOAUTH", "Redis wants a login: put USER:PASSWORD@ into --redis"),
    ("WRONGPASS", "Redis refuses the login: mend the user or the password in --redis"),
    ("NOPERM", NOT_PERMITTED),
    (
        "ERR The user executing the script can't", // NOPERM, met within a script
        NOT_PERMITTED,
    ),
    (
        "DENIED",
        "Redis takes connections from its own machine alone: set bind and a password there (protected-mode)",
    ),
    ("ERR max number of clients", "Redis has as many clients as it takes: raise its maxclients"),
    ("NOSCRIPT", "Redis has forgotten the scripts: they will be sent again"),
];

/// What stands for anything else where Redis answers, and where it doesn't.
const REFUSES: &str = "Redis refuses what a node asks of it: the log has its words";
const AWAY: &str =
    "Redis can't be reached: see whether it runs, and whether this node may connect to it (--redis)";

/// A call has no result.
pub fn of(error: &CallError) -> &'static str {
    match error {
        CallError::Lost(words) => away(words),
        CallError::Refused(words) => refused(words),
    }
}

/// Redis is there and says no.
pub fn refused(words: &str) -> &'static str {
    known(words).unwrap_or(REFUSES)
}

/// Redis does not have these commands or fields, so rights don't help.
pub fn lacking(what: &str) -> String {
    format!(
        "this Redis does not have {what}: remove its rename-command from redis.conf, or use another Redis"
    )
}

/// There is no connection, or it broke.
pub fn away(words: &str) -> &'static str {
    if let Some(known) = known(words) {
        return known;
    }
    let lower = words.to_ascii_lowercase();
    let has = |parts: &[&str]| parts.iter().any(|part| lower.contains(part));
    if has(&["decode error", "frame type"]) {
        "what answers at --redis is no Redis: see its host and port, and rediss:// where it speaks TLS"
    } else if has(&["certificate", "tls", "unknownissuer"]) {
        "the TLS connection to Redis fails: see its certificate, and that the name in --redis is in it"
    } else if has(&["failed to lookup", "name resolution", "nodename", "no addresses"]) {
        "the name of Redis in --redis can't be resolved: mend it, or DNS"
    } else if has(&["the name no longer points to"]) {
        "the name of Redis in --redis has another address now: the node connects to that"
    } else if has(&["no answer", "timeout", "timed out", "in time", "unresponsive"]) {
        "Redis does not answer: it hangs, is overloaded, or a firewall drops what is sent to it"
    } else {
        AWAY
    }
}

/// Redis has connections and does not answer on them.
pub const SILENT: &str = "Redis is silent: it hangs, is overloaded, or the network loses its answers";

fn known(words: &str) -> Option<&'static str> {
    // A script's error begins with that of the command which failed, too.
    MEANINGS.iter().find(|(begin, _)| words.starts_with(begin)).map(|(_, meaning)| *meaning)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_redis_says_becomes_what_to_do() {
        for (words, part) in [
            ("READONLY You can't write against a read only replica.", "name the primary"),
            ("OOM command not allowed when used memory > 'maxmemory'.", "raise its maxmemory"),
            ("LOADING Redis is loading the dataset in memory", "wait"),
            ("WRONGPASS invalid username-password pair or user is disabled.", "password in --redis"),
            ("NOPERM this user has no permissions to run the 'subscribe' command", "ACL"),
            ("ERR The user executing the script can't run this command or subcommand script: c6", "ACL"),
            ("WRONGTYPE Operation against a key", "the log has its words"),
        ] {
            assert!(refused(words).contains(part), "{words}");
        }
        for (words, part) in [
            ("Connection refused (os error 111)", "whether it runs"),
            ("LOADING Redis is loading the dataset in memory", "wait"),
            ("no answer to EVALSHA within 4s", "does not answer"),
            ("invalid peer certificate: UnknownIssuer", "certificate"),
            ("failed to lookup address information: Name or service not known", "can't be resolved"),
            ("the connection was closed", "whether it runs"),
        ] {
            assert!(away(words).contains(part), "{words}");
        }
    }

    #[test]
    fn nothing_that_is_shown_spans_lines() {
        let texts = MEANINGS.map(|(_, text)| text).into_iter().chain([REFUSES, AWAY, SILENT]);
        assert!(texts.into_iter().all(|text| !text.contains('\n') && text.len() < 120));
    }
}
