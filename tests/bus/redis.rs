//! The Redis bus against real Redis servers and their faults.
#![allow(clippy::unwrap_used)] // clippy.toml exempts test functions, not their helpers

mod damage;
mod external_publishers;
mod history;
mod inbox;
mod node;
mod order;
mod promotions;
mod publishing;
mod redis_server;
mod restarts;
