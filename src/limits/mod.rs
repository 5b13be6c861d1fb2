//! Limits on connections of the node, an address and a user; message and byte rates.

pub mod allowances;
pub mod connections;
pub mod rate;
