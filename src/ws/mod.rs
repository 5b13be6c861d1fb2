//! One WebSocket connection: its handshake, its decoder, and the struct that a shard keeps for it.
//!
//! | file | contents |
//! |---|---|
//! | [`handshake`], [`client`] | from the bytes of a request to a client that may join |
//! | [`connection`] | the struct: its state, and the parts in the other files |
//! | [`decoder`], [`inbound`] | bytes of the client into messages, and their rate |
//! | [`outbox`], [`progress`] | frames queued for one client, and its position in a channel |
//! | [`subscription`] | further channels on the same socket |
//! | [`writer`], [`socket`] | vectored writes of both, and whether the socket is full |
//! | [`replay`] | how much history to read |
//! | [`liveness`] | pings, pongs and silence |

pub mod client;
pub mod connection;
pub mod decoder;
pub mod handshake;
pub mod inbound;
pub mod liveness;
pub mod outbox;
pub mod progress;
pub mod replay;
pub mod socket;
pub mod subscription;
pub mod writer;
