//! Nodes on a real Redis, and faults of both.

#[path = "../checker/mod.rs"]
mod checker;
#[path = "../common/mod.rs"]
mod common;
#[path = "../workload/mod.rs"]
mod workload;

mod channels;
mod cluster;
mod control;
mod external_publishers;
mod faults;
mod inbox;
mod limits;
mod model;
mod presence;
mod recent_events;
mod recovery;
mod redis;
mod redis_cluster;
mod slow_readers;
mod untrusted_input;
