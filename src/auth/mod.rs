//! JWT verification and the key files, which are read again on SIGHUP.

pub mod keys;
pub mod token;
