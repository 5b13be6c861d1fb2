//! JWT verification, and the key files, which are reread at SIGHUP.

pub mod keys;
pub mod token;
