//! One node with its local bus, over real sockets: protocol, limits, and bad input.

#[path = "../common/mod.rs"]
mod common;

mod access;
mod bench;
mod channels;
mod connection_limits;
mod control;
mod frames;
mod limits;
mod protocol;
mod rates;
mod recent_events;
mod rejections;
mod slow_readers;
mod tokens;
mod untrusted_input;
mod web;
