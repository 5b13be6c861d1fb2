//! Errors of connections and of calls.

use std::sync::Arc;

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
    /// Redis replied with this error.
    ErrorReply(Arc<str>),
}

impl CallError {
    pub fn text(&self) -> Arc<str> {
        match self {
            CallError::NoReply(text) | CallError::ErrorReply(text) => text.clone(),
        }
    }

    /// Whether the data of one channel is wrong. See [`FAULT`].
    pub fn is_fault(&self) -> bool {
        matches!(self, CallError::ErrorReply(text) if text.starts_with(FAULT))
    }
}

/// Prefix of a script's error about wrong data in one channel, as `epoch.lua` writes it. The key
/// follows.
pub const FAULT: &str = "FAULT ";

/// Whether Redis will soon accept what it rejects now.
pub fn is_temporary(error: &str) -> bool {
    ["LOADING", "BUSY", "MASTERDOWN", "TRYAGAIN"].iter().any(|prefix| error.starts_with(prefix))
}
