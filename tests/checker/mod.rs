//! The checker: decides from the records of publishers and subscribers whether the promise was
//! kept. It is pure, so that it can be tested itself (`tests/units/checker_proof.rs`). Every test
//! that injects faults uses it.

#![allow(dead_code, unused_imports)] // each test binary uses its own part of this

mod claims;
mod history;
mod rules;

pub use history::{Attempt, History, Moment, Outcome, Seen, Subscriber};
pub use rules::{Rule, Violation, find_violations};
