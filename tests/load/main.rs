//! What takes the whole machine: thousands of clients, faults without end, memory that runs out.

#[path = "../checker/mod.rs"]
mod checker;
#[path = "../common/mod.rs"]
mod common;
#[path = "../workload/mod.rs"]
mod workload;

mod chaos;
mod churn;
mod memory;
mod soak;
mod storm;
