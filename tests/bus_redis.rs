//! The Redis bus against real Redis servers, and against what goes wrong with them.
#![allow(clippy::unwrap_used)] // clippy.toml excepts test functions, not those beside them

#[path = "common/cases.rs"]
mod cases;
#[path = "bus/damage.rs"]
mod damage;
#[path = "bus/history.rs"]
mod history;
#[path = "bus/node.rs"]
mod node;
#[path = "bus/order.rs"]
mod order;
#[path = "bus/outside.rs"]
mod outside;
#[path = "bus/promotions.rs"]
mod promotions;
#[path = "bus/publishing.rs"]
mod publishing;
#[path = "bus/redis_server.rs"]
mod redis_server;
#[path = "bus/runs.rs"]
mod runs;
