//! Clients and publishers that work while something happens to the nodes and the Redis they work with.

#![allow(dead_code)] // each test binary uses its own part of this

pub mod publishers;
pub mod run;
pub mod subscribers;
pub mod testbed;
