//! Tests that use the whole machine: thousands of clients, minutes of faults, exhausted memory.
//! They run one at a time.

#[path = "../checker/mod.rs"]
mod checker;
#[path = "../common/mod.rs"]
mod common;
#[path = "../workload/mod.rs"]
mod workload;

mod churn;
mod growth;
mod memory;
mod rates;
mod reconnect_clients;
mod soak;
mod storm;

use tokio::sync::{Mutex, MutexGuard};

/// Every test of this binary holds this lock: two at once would starve each other and run out of
/// descriptors.
async fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::const_new(());
    ALONE.lock().await
}
