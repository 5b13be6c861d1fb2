//! Errors of connections and of calls.

use std::sync::Arc;

/// Why there is no session.
#[derive(Debug)]
pub enum ConnectError {
    /// It makes no sense to try again.
    Unusable(String),
    /// Redis is not there, or not now.
    Away(String),
    /// Redis is there and refuses, in these words.
    Refused(String),
    /// Redis permits too little, and what it should: in our words.
    NotPermitted(String),
    /// Redis does not have these commands or fields, which a node needs.
    Lacking(String),
}

/// Why a call has no result.
#[derive(Clone, Debug)]
pub enum CallError {
    /// No answer: it may or may not have been done.
    Lost(Arc<str>),
    /// Redis answered with this error.
    Refused(Arc<str>),
}

impl CallError {
    /// In words.
    pub fn text(&self) -> Arc<str> {
        match self {
            CallError::Lost(text) | CallError::Refused(text) => text.clone(),
        }
    }
}
