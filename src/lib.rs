//! One event in, every socket out.

pub mod close;
pub mod config;
pub mod event;
pub mod foreign;
pub mod frame;
pub mod http;
pub mod input;
pub mod web;

pub mod bus;
pub mod connection;
pub mod feed;
pub mod handshake;
pub mod metrics;
pub mod sequence;
pub mod shard;

pub mod accept;
pub mod server;

pub mod admin;
