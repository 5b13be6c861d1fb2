//! The Redis bus against real Redis servers, and against what goes wrong with them.
#![allow(clippy::unwrap_used)] // clippy.toml excepts test functions, not those beside them

mod damage;
mod external_publishers;
mod history;
mod node;
mod order;
mod promotions;
mod publishing;
mod redis_server;
mod restarts;
