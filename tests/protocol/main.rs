//! One node on its local bus, over real sockets: the protocol, its limits, and what becomes of bad input.

#[path = "../common/mod.rs"]
mod common;

mod access;
mod frames;
mod guard;
mod limits;
mod protocol;
mod rates;
mod slow;
mod strangers;
mod tokens;
mod web;
