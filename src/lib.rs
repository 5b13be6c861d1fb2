//! One event in, every socket out.

pub mod config;
pub mod event;

pub mod bus;
pub mod metrics;
pub mod sequence;

pub mod admin;
pub mod http;
