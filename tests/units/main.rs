//! Tests without other processes than short runs of the binary: settings, documents, the checker, a
//! single shard.

#[path = "../checker/mod.rs"]
mod checker;
#[path = "../common/mod.rs"]
mod common;
#[path = "../workload/mod.rs"]
mod workload;

mod checker_proof;
mod docs;
mod fuzz_corpus;
mod imports;
mod public_names;
mod readers;
mod settings;
mod shard;
mod test_programs;
