//! Clients and publishers that work on a testbed while faults happen, and record what they see for
//! the checker.

#![allow(dead_code)] // each test binary uses its own part of this

pub mod followed;
pub mod publishers;
pub mod report;
pub mod run;
pub mod shared;
pub mod subscribers;
pub mod testbed;
