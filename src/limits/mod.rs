//! Limits on connections of the node, an address and a user; bans; message and byte rates; new
//! channels.

pub mod allowances;
pub mod bans;
pub mod connections;
pub mod followed;
pub mod rate;
