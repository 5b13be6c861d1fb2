//! Every fault that happens to real deployments, done to real processes of fanfare and Redis in the middle of their
//! work: clients of every kind watch, publishers of every kind publish, and the judge (`tests/checker`) reads what
//! all of them noted. Each test also says what must hold beyond the promise: who must be told, who must not, and that
//! the fault really took place.

#![allow(dead_code)] // the crowd is shared with the other test of faults, and each uses its own part of it

mod checker;
mod common;
#[path = "faults/crowd.rs"]
mod crowd;
#[path = "faults/publishers.rs"]
mod publishers;
#[path = "faults/watchers.rs"]
mod watchers;

#[path = "faults/world.rs"]
mod world;

/// The harness itself: it sees what is broken.
#[path = "faults/broken.rs"]
mod broken;
/// How long a loss may stay unnoticed.
#[path = "faults/canary.rs"]
mod canary;
/// A replica takes over.
#[path = "faults/failover.rs"]
mod failover;
/// Connections that break, hang, lose or delay.
#[path = "faults/network.rs"]
mod network;
/// Redis refuses, or its clock is wrong.
#[path = "faults/refusals.rs"]
mod refusals;
/// Redis that dies, is wiped, or comes back with less; nodes that die.
#[path = "faults/restarts.rs"]
mod restarts;
