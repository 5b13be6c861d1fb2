//! Faults of real deployments, injected into processes of fanfare and Redis under load: subscribers
//! and publishers of every kind record what they see, and the checker (`tests/checker`) verifies
//! the promise. Each test also asserts which losses are announced, and that the fault took place.

/// Clients of many channels: limits, and tokens that lose channels.
mod channels;
/// Failovers.
mod failover;
/// Messages to backends.
mod inbox;
/// The checker notices a broken bus.
mod mutations;
/// Connections that break, hang, lose or delay.
mod network;
/// How long a loss may stay unnoticed.
mod probe;
/// Redis returns errors, or its clock is wrong.
mod redis_errors;
/// Failovers, moved slots and partitions of a Redis Cluster.
mod redis_cluster;
/// Restarts, wipes and lost writes of Redis, and restarts of nodes.
mod restarts;
