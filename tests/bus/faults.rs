//! Every fault that happens to real deployments, done to real processes of fanfare and Redis in the middle of their
//! work: clients of every kind watch, publishers of every kind publish, and the judge (`tests/checker`) reads what
//! all of them noted. Each test also says what must hold beyond the promise: who must be told, who must not, and that
//! the fault really took place.

/// A replica takes over.
mod failover;
/// The harness itself: it sees what is broken.
mod mutations;
/// Connections that break, hang, lose or delay.
mod network;
/// How long a loss may stay unnoticed.
mod probe;
/// Redis refuses, or its clock is wrong.
mod redis_errors;
/// Redis that dies, is wiped, or comes back with less; nodes that die.
mod restarts;
