//! Subcommands: `token`, `doctor`.

pub mod doctor;
pub mod token;
