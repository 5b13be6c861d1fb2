//! One WebSocket connection: handshake, decoder, and the state that writes.

pub mod connection;
pub mod decoder;
pub mod handshake;
pub mod outbox;
pub mod replay;
pub mod session;
pub mod writer;
