//! Nodes on a real Redis, and the faults that happen to both.

#[path = "../checker/mod.rs"]
mod checker;
#[path = "../common/mod.rs"]
mod common;
#[path = "../workload/mod.rs"]
mod workload;

mod cluster;
mod faults;
mod interface;
mod limits;
mod model;
mod recovery;
mod redis;
mod slow;
mod strangers;
