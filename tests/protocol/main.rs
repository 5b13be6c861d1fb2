//! One node on its local bus, over real sockets: the protocol, its limits, and what becomes of bad input.

#[path = "../common/mod.rs"]
mod common;

mod access;
mod connection_limits;
mod frames;
mod limits;
mod protocol;
mod rates;
mod slow_readers;
mod tokens;
mod untrusted_input;
mod web;
