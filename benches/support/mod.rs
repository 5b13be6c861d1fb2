//! What the benches share: servers as processes, clients, the baseline, and the report.
//!
//! Machines differ, so figures are only compared within one run: every bench starts the server and
//! the baseline, pins both to one core and the clients to the others, and alternates between them.
#![allow(dead_code, reason = "each bench uses its own part")]

pub mod args;
pub mod baseline;
pub mod files;
pub mod load_clients;
pub mod process;
pub mod reconnect_clients;
pub mod redis;
pub mod report;
pub mod wire;
