//! Advice for operators: what an error of Redis means and what to do. `/readyz`, the service status
//! and `doctor` show it. The log has Redis' own text as well, which names what failed but often
//! nothing that an operator could change.

use super::errors::{self, CallError, FAULT};

const NOT_PERMITTED: &str = "the ACL of this node's Redis user lacks rights: docs/redis.md lists them";

/// Prefixes of errors, and the advice for each.
const ADVICE: [(&str, &str); 21] = [
    (
        "ERR unknown command 'SENTINEL'",
        "the server at --redis is not a Sentinel: name the Sentinels (port 26379), or use redis:// for a Redis",
    ),
    (
        "ERR unknown command",
        "this Redis lacks a command that a node needs (see the log): remove its rename-command",
    ),
    (
        "ERR DB index is out of range",
        "this Redis has no database of the number in --redis: correct it, or raise `databases` in redis.conf",
    ),
    (
        "ERR Protocol error: invalid bulk length",
        "the message is too long for Redis: raise its proto-max-bulk-len, or lower --max-message-size",
    ),
    (FAULT, "this channel's data in Redis is damaged (see the log): other channels are not affected"),
    (errors::CLUSTER_DOWN, CLUSTER_DOWN),
    ("TRYAGAIN", "the slot of this channel moves to another primary: wait until CLUSTER SETSLOT ends that"),
    ("LOADING", "Redis is loading its data: wait until it has finished"),
    ("BUSY", "Redis is running a script of another program: wait, or stop it with SCRIPT KILL"),
    (
        "MASTERDOWN",
        "this Redis is a replica that has lost its primary: name the primary, or the Sentinels, in --redis",
    ),
    ("READONLY", "this Redis is a replica: name the primary, or the Sentinels, in --redis"),
    (
        "OOM",
        "Redis is out of memory: raise its maxmemory, lower --history or --history-ttl, or work off inboxes",
    ),
    ("MISCONF", "Redis rejects writes because it can't save to disk: check its log and free disk space"),
    (
        "NOREPLICAS",
        "Redis rejects writes because too few replicas are connected (min-replicas-to-write): check the replicas",
    ),
    ("NOAUTH", "Redis requires a login: put USER:PASSWORD@ into --redis"),
    ("WRONGPASS", "Redis rejects the login: correct the user or the password in --redis"),
    ("NOPERM", NOT_PERMITTED),
    (
        "ERR The user executing the script can't", // NOPERM, raised inside a script
        NOT_PERMITTED,
    ),
    (
        "DENIED",
        "Redis accepts local connections only (protected-mode): set bind and a password in redis.conf",
    ),
    ("ERR max number of clients", "Redis has reached its connection limit: raise its maxclients"),
    ("NOSCRIPT", "Redis has lost the scripts: they are sent again"),
];

/// Parts of errors of connections, in lower case, and the advice for them.
const CONNECTION_ADVICE: [(&[&str], &str); 17] = [
    (
        &[NO_TLS_ANSWER],
        "Redis does not answer over TLS: use redis:// if its port has no TLS, else it hangs, or a firewall \
         drops the traffic",
    ),
    (
        &[CLOSED_AT_ONCE],
        "the server at --redis closes the connection at once: check its port, and rediss:// for TLS",
    ),
    (
        &["decode error", "frame type"],
        "the server at --redis does not speak the Redis protocol: check host and port, and rediss:// for TLS",
    ),
    (
        &["unknown issuer"],
        "the certificate of Redis is from an unknown CA: name the CA's PEM file in SSL_CERT_FILE",
    ),
    (
        &["ca used as end entity"],
        "the certificate of Redis is that of a CA (CA:TRUE): use one with CA:FALSE, signed by it",
    ),
    (
        &["not valid for name"],
        "the certificate of Redis does not name the host in --redis: use a name that it has (subjectAltName)",
    ),
    (
        &["certificate: expired", "not valid yet"],
        "the certificate of Redis has expired or is not valid yet: renew it, and check this host's clock",
    ),
    (
        &["certificate required"],
        "Redis asks for a certificate of its clients, and fanfare has none: set tls-auth-clients no",
    ),
    (
        &["invalid content type"],
        "the server at --redis does not speak TLS: use redis://, or the TLS port of Redis",
    ),
    (
        &["certificate", "tls handshake", "alert received"],
        "the TLS connection to Redis fails (see the log): check its certificate, protocols and ciphers",
    ),
    (&["no such file"], "there is no unix socket at the path in --redis: check `unixsocket` in redis.conf"),
    (
        &["permission denied"],
        "this user may not open the unix socket in --redis: check `unixsocketperm` in redis.conf",
    ),
    (
        &["missing primary address"],
        "the Sentinels in --redis don't know that primary: correct sentinelServiceName",
    ),
    (
        &["all sentinel nodes"],
        "no Sentinel in --redis can be used: check hosts, ports, sentinelPassword, and rediss-sentinel:// for TLS",
    ),
    (
        &["failed to lookup", "name resolution", "nodename", "no addresses"],
        "the host name in --redis can't be resolved: correct it, or check DNS",
    ),
    (&["no longer resolves to"], "the host name in --redis has a new address: connecting to that"),
    (
        &["no reply", "timeout", "timed out", "in time", "unresponsive"],
        "Redis does not reply: it hangs or is overloaded, or a firewall drops the traffic",
    ),
];

/// What [`session`](super::session) adds to an error of a connection that was never usable.
pub const NO_TLS_ANSWER: &str = "no answer over tls";
pub const CLOSED_AT_ONCE: &str = "before the first reply";

/// For any other error that Redis replies with.
const REJECTED: &str = "Redis rejects what a node needs: the log has its error";
/// For any other error of a connection.
const UNREACHABLE: &str =
    "Redis can't be reached: check that it runs and that this node may connect to it (--redis)";
/// Redis keeps its connections open and does not reply.
pub const SILENT: &str = "Redis does not reply: it hangs or is overloaded, or the network loses its replies";

/// Of a cluster: no primary has the slot of a channel.
pub const NO_PRIMARY: &str =
    "no primary of the Redis Cluster has the slot of this channel: see redis-cli --cluster check";

/// Of a cluster: what its nodes mean by `cluster_state:fail`.
pub const CLUSTER_DOWN: &str = "the Redis Cluster is down, or this node of it is cut off from the others: see CLUSTER INFO and CLUSTER NODES";

pub fn for_call(error: &CallError) -> &'static str {
    match error {
        CallError::NoReply(text) | CallError::NoReplyElsewhere(text) => for_connection(text),
        CallError::ErrorReply(text) => for_error_reply(text),
    }
}

pub fn for_error_reply(text: &str) -> &'static str {
    find(text).unwrap_or(REJECTED)
}

/// Effect of an eviction policy. `maxmemory` is in bytes; 0 means no limit. Keys of channels expire,
/// so `volatile-*` policies evict them, too. An evicted key loses the channel's sequence.
pub fn for_eviction(policy: &str, maxmemory: u64) -> String {
    match maxmemory {
        0 => format!("maxmemory-policy is {policy}, which evicts keys once a maxmemory is set"),
        _ => format!(
            "maxmemory-policy is {policy}: when memory is full, channels lose their history and sequence"
        ),
    }
}

/// Commands or INFO fields are unavailable, so ACL rights don't help.
pub fn for_unavailable(what: &str) -> String {
    format!("this Redis lacks {what}: remove its rename-command from redis.conf, or use another Redis")
}

/// There is no connection, or it broke.
pub fn for_connection(text: &str) -> &'static str {
    if let Some(advice) = find(text) {
        return advice;
    }
    let lower = text.to_ascii_lowercase();
    let known = CONNECTION_ADVICE.iter().find(|(parts, _)| parts.iter().any(|part| lower.contains(part)));
    known.map_or(UNREACHABLE, |(_, advice)| advice)
}

/// Errors of scripts also start with the error of the command that failed.
fn find(text: &str) -> Option<&'static str> {
    ADVICE.iter().find(|(prefix, _)| text.starts_with(prefix)).map(|(_, advice)| *advice)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_have_advice() {
        for (text, part) in [
            ("READONLY You can't write against a read only replica.", "name the primary"),
            ("OOM command not allowed when used memory > 'maxmemory'.", "raise its maxmemory"),
            ("LOADING Redis is loading the dataset in memory", "wait"),
            ("WRONGPASS invalid username-password pair or user is disabled.", "password in --redis"),
            ("NOPERM this user has no permissions to run the 'subscribe' command", "ACL"),
            ("ERR The user executing the script can't run this command or subcommand script: c6", "ACL"),
            ("WRONGTYPE Operation against a key", "the log has its error"),
        ] {
            assert!(for_error_reply(text).contains(part), "{text}");
        }
        for (text, part) in [
            ("Connection refused (os error 111)", "check that it runs"),
            ("LOADING Redis is loading the dataset in memory", "wait"),
            ("no reply to EVALSHA within 4s", "does not reply"),
            ("invalid certificate: unknown issuer", "SSL_CERT_FILE"),
            ("invalid certificate: expired context", "renew it"),
            ("invalid certificate: bad signature", "TLS connection to Redis fails"),
            ("Connection reset by peer (os error 104)", "check that it runs"),
            ("failed to lookup address information: Name or service not known", "can't be resolved"),
            ("the connection was closed", "check that it runs"),
        ] {
            assert!(for_connection(text).contains(part), "{text}");
        }
    }

    #[test]
    fn advice_fits_on_one_line() {
        let texts = ADVICE.map(|(_, text)| text).into_iter().chain([REJECTED, UNREACHABLE, SILENT]);
        let texts = texts.chain(CONNECTION_ADVICE.map(|(_, text)| text));
        assert!(texts.into_iter().all(|text| !text.contains('\n') && text.len() < 120));
    }
}
