//! One WebSocket connection: its handshake, its decoder, and the struct that a shard keeps for it.

pub mod connection;
pub mod decoder;
pub mod handshake;
pub mod inbound;
pub mod liveness;
pub mod outbox;
pub mod progress;
pub mod replay;
pub mod session;
pub mod socket;
pub mod writer;
