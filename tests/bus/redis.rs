//! The Redis bus against real Redis servers, and against what goes wrong with them.
#![allow(clippy::unwrap_used)] // clippy.toml excepts test functions, not those beside them

mod damage;
mod history;
mod node;
mod order;
mod outside;
mod promotions;
mod publishing;
mod redis_server;
mod runs;
