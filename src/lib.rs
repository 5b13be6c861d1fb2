//! fanfare is a WebSocket fan-out server: it sends each event of a channel to every socket that
//! follows the channel. This page is the architecture overview; `docs/architecture.md` follows an
//! event file by file.
//!
//! ```text
//! in:   socket ─► node::accept ─► shard ─► ws::handshake, then ws::decoder ─► bus ─► Redis
//! out:  Redis ─► bus ─► bus::sequence ─► shard::mailbox ─► shard ─► feed ─► ws::writer ─► socket
//! ```
//!
//! The control thread runs the bus and handles signals, another thread serves the admin API, one
//! thread accepts, and one thread per core is a shard. Threads exchange messages: requests to the
//! bus ([`bus::Request`]), and messages to the shards ([`shard::mailbox`]).
//!
//! Each folder imports only from folders above it in this table; a test checks it.
//!
//! | folder | contents |
//! |---|---|
//! | [`protocol`] | event ids, names, entries and their forms, client frames, JSON of backends, close codes |
//! | [`http`] | request heads, responses, origins, PROXY and `X-Forwarded-For`, the built-in page |
//! | [`config`] | settings: one row per setting, flags and environment, memory division |
//! | [`auth`] | JWT verification, key files |
//! | [`metrics`] | counters, readiness, rejection log, rendering |
//! | [`limits`] | connection limits (node, IP, user), bans, message and byte rates, new channels |
//! | [`feed`] | a channel's recent events in memory, and cursors into them |
//! | [`ws`] | one connection: handshake, decoder, outbox, subscriptions, progress, replay, writer |
//! | [`bus`] | ids, history, order of events, presence: [`bus::local`] for one node, [`bus::redis`] for many |
//! | [`shard`] | event loop, mailbox, channels, joins, fan-out, replay, timers |
//! | [`admin`] | the admin API: publish, disconnect, history, channels, presence, metrics, stats, health, live view |
//! | [`node`] | wiring, accept loop, listeners, systemd |
//! | [`cli`] | `fanfare bench`, `fanfare token`, `fanfare doctor` |
//!
//! # Invariants
//!
//! In each channel, every client receives the events that have an id in id order, none twice, and
//! is notified whenever one may be missing: by `recovered:false`, by a `reset` frame, or by close
//! code 4008. Events without id, from other programs' `PUBLISH`, are live only, outside of this.
//!
//! **Order and continuity**
//!
//! - Only the bus assigns ids. On this node only [`bus::sequence`] decides which event is next.
//! - [`bus::is_continuous`] is the one rule for joins, gaps and pages: continuity is never guessed.
//! - Pub/Sub may lose messages. A lost message is a gap, and gaps are read from the stream.
//! - A client's `lastEventId` is a claim. It never counts as an id that this node has seen.
//! - A client joins a channel in the turn of its shard in which the `welcome` reads the head.
//! - A publish is rejected only if it was certainly not stored; otherwise the answer is `unknown`.
//!   Calls to Redis have numbers, and a number is never used for other events.
//!
//! **Ownership**
//!
//! - A shard owns its connections, channels and feeds: it takes no lock to write an event, and has
//!   no task and no timer per connection. Its methods never wait, nor does sending to its mailbox.
//! - A connection, or a subscription of one, is a cursor into its channel's feed. Live, slow and
//!   resuming clients share one write path; pages of history are feeds too. Only frames for one
//!   client alone are queued.
//! - An event is framed once per node, and once for subscriptions. Shards share its bytes.
//! - A connection closes once, with a [`protocol::close::CloseReason`].
//! - A slot of the slab is valid only with its generation: an answer of the bus may arrive when the
//!   slot has a new owner.
//! - Everything that grows has a limit: a constant or a setting, with its reason.
//!
//! **Dependencies**: only [`bus::redis`] uses fred, only [`ws`] uses tungstenite. Parsers, `feed`
//! and [`bus::sequence`] know neither sockets nor a runtime: they take bytes, so each is tested
//! alone.

#[cfg(test)]
extern crate self as fanfare; // for the files that unit and integration tests share

pub mod protocol;
pub mod http;
pub mod config;
pub mod auth;
pub mod metrics;
pub mod limits;
pub mod feed;
pub mod ws;
pub mod bus;
pub mod shard;
pub mod admin;
pub mod node;
pub mod cli;
