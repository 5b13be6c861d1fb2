//! What the benches share: servers as processes, a crowd of clients, the floor, and the report.
//!
//! A figure counts only beside another from the same run, since machines differ. So every bench starts the
//! server and the floor, pins both to one core and the clients to the others, and takes turns between them.
#![allow(dead_code, reason = "each bench uses its own part")]

pub mod args;
pub mod crowd;
pub mod files;
pub mod floor;
pub mod herd;
pub mod process;
pub mod redis;
pub mod report;
pub mod wire;
