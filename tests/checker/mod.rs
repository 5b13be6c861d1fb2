//! The judge: from what publishers were told and what clients saw, it says whether the promise was kept. It knows
//! neither sockets nor clocks, so it can be proven alone (`tests/units/checker_proof.rs`), and every whole-server test
//! that injects faults uses this one judge.

#![allow(dead_code, unused_imports)] // each test binary uses its own part of this

mod claims;
mod history;
mod rules;

pub use history::{Attempt, History, Moment, Outcome, Seen, Subscriber};
pub use rules::{Rule, Violation, find_violations};
