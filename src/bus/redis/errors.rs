//! Errors of connections and of calls.

use std::sync::Arc;

/// The text of an error of fred. For errors of the system and of TLS it has the debug form:
/// `Os { code: 111, kind: ConnectionRefused, message: "Connection refused" }`, or
/// `Custom { kind: InvalidData, error: InvalidCertificate(UnknownIssuer) }`.
pub fn readable(details: &str) -> String {
    let after = |start: &str| details.split_once(start).map(|(_, rest)| rest);
    if details.starts_with("Os {") {
        let code = after("code: ").and_then(|rest| rest.split_once(',')).map_or("?", |(code, _)| code);
        let message = after("message: \"").and_then(|rest| rest.rsplit_once('"'));
        return format!("{} (os error {code})", message.map_or("unknown", |(message, _)| message));
    }
    let inner = after(", error: ").filter(|_| details.starts_with("Custom {"));
    let text = inner.map_or(details, |inner| inner.trim_end_matches(" }"));
    if let Some(quoted) = text.strip_prefix('"').and_then(|text| text.strip_suffix('"')) {
        return quoted.to_owned();
    }
    if is_debug(text) { words(text) } else { text.to_owned() }
}

/// Whether a text is the debug form of an enum: a name, alone or before its fields.
fn is_debug(text: &str) -> bool {
    let end = text.find(|c: char| !c.is_ascii_alphanumeric()).unwrap_or(text.len());
    let (name, rest) = text.split_at(end);
    let is_name = name.starts_with(|c: char| c.is_ascii_uppercase()) && name.contains(char::is_lowercase);
    is_name && (rest.is_empty() || rest.starts_with('(') || rest.starts_with(" {"))
}

/// `InvalidCertificate(UnknownIssuer)` as `invalid certificate: unknown issuer`.
fn words(names: &str) -> String {
    let mut words = String::new();
    for c in names.split(" {").next().unwrap_or_default().chars() {
        match c {
            '(' => words.push_str(": "),
            ')' => {}
            c if c.is_ascii_uppercase() && words.chars().last().is_some_and(char::is_alphanumeric) => {
                words.extend([' ', c.to_ascii_lowercase()]);
            }
            c => words.push(c.to_ascii_lowercase()),
        }
    }
    words
}

/// Why there is no session.
#[derive(Debug)]
pub enum ConnectError {
    /// Another attempt can't succeed.
    Unsupported(String),
    /// There is no connection, or Redis is not ready yet.
    Unreachable(String),
    /// Redis answered with this error.
    Rejected(String),
    /// The ACL of this user permits too little.
    NotPermitted(MissingRights),
    /// Redis lacks these commands or INFO fields.
    Unavailable(String),
}

/// Rights that a node needs and its Redis user does not have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MissingRights {
    /// The commands that Redis does not permit.
    pub commands: String,
    /// All rights that a node needs, as ACL SETUSER takes them.
    pub grant: String,
}

impl std::fmt::Display for MissingRights {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Redis does not permit {}: grant this user {}", self.commands, self.grant)
    }
}

/// Why a call has no result.
#[derive(Clone, Debug)]
pub enum CallError {
    /// No reply: Redis may or may not have executed the call.
    NoReply(Arc<str>),
    /// The same, of the primary to which a redirection led: the own session is not affected.
    NoReplyElsewhere(Arc<str>),
    /// Redis replied with this error.
    ErrorReply(Arc<str>),
}

impl CallError {
    /// A script or command has replied with something else than it does.
    pub fn unexpected_reply(of: &str) -> CallError {
        CallError::ErrorReply(format!("unexpected reply of {of}").into())
    }

    pub fn text(&self) -> Arc<str> {
        match self {
            CallError::NoReply(text) | CallError::NoReplyElsewhere(text) | CallError::ErrorReply(text) => {
                text.clone()
            }
        }
    }

    /// Whether Redis has replied.
    pub fn is_error_reply(&self) -> bool {
        matches!(self, CallError::ErrorReply(_))
    }

    /// Whether the data of one channel is wrong. See [`FAULT`].
    pub fn is_fault(&self) -> bool {
        matches!(self, CallError::ErrorReply(text) if text.starts_with(FAULT))
    }
}

/// Prefix of a script's error about wrong data in one channel, as `epoch.lua` writes it. The key
/// follows.
pub const FAULT: &str = "FAULT ";

/// How a script reports that the keys of its channel are at another primary of a cluster, as
/// `epoch.lua` writes it. Nothing was published.
pub const ELSEWHERE: &str = "TRYAGAIN the keys of this channel are at another primary, or move there";

/// The same for a cluster that serves no keys.
pub const CLUSTER_DOWN: &str = "TRYAGAIN the cluster is down";

/// Whether Redis will soon accept what it rejects now.
pub fn is_temporary(error: &str) -> bool {
    ["LOADING", "BUSY", "MASTERDOWN", "TRYAGAIN"].iter().any(|prefix| error.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_forms_become_readable() {
        for (details, text) in [
            (
                r#"Os { code: 111, kind: ConnectionRefused, message: "Connection refused" }"#,
                "Connection refused (os error 111)",
            ),
            (
                "Custom { kind: InvalidData, error: InvalidCertificate(UnknownIssuer) }",
                "invalid certificate: unknown issuer",
            ),
            (
                "Custom { kind: InvalidData, error: InvalidCertificate(NotValidForNameContext { expected: \
                 DnsName(\"a\"), presented: [\"DnsName(\\\"b\\\")\"] }) }",
                "invalid certificate: not valid for name context",
            ),
            (
                "Custom { kind: InvalidData, error: InvalidCertificate(Other(OtherError(CaUsedAsEndEntity))) }",
                "invalid certificate: other: other error: ca used as end entity",
            ),
            (r#"Custom { kind: UnexpectedEof, error: "tls handshake eof" }"#, "tls handshake eof"),
            ("Kind(UnexpectedEof)", "kind: unexpected eof"),
            ("ERR DB index is out of range", "ERR DB index is out of range"),
            ("NOAUTH Authentication required.", "NOAUTH Authentication required."),
            ("Request timed out.", "Request timed out."),
            ("Decode Error: Invalid frame type prefix.", "Decode Error: Invalid frame type prefix."),
            ("", ""),
        ] {
            assert_eq!(readable(details), text);
        }
    }

    proptest::proptest! {
        #[test]
        fn nothing_panics(details: String) {
            readable(&details);
            readable(&format!("Os {{ {details}"));
            readable(&format!("Custom {{ kind: A, error: {details} }}"));
        }
    }
}
