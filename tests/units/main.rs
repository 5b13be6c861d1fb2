//! What needs no other process than fanfare itself, and hardly one of those: settings, documents, the checker, one shard.

#[path = "../checker/mod.rs"]
mod checker;
#[path = "../common/mod.rs"]
mod common;
#[path = "../workload/mod.rs"]
mod workload;

mod checker_proof;
mod fuzz_corpus;
mod readers;
mod readme;
mod settings;
mod shard;
