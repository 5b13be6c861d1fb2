//! One event in, every socket out: a WebSocket fan-out server. This is the map of the house.
//!
//! ```text
//! in:   socket ─► accept ─► shard ─► handshake, then input ─► bus ─► Redis
//! out:  Redis ─► bus ─► sequence ─► shard: feed ─► each connection's cursor ─► socket
//! ```
//!
//! Data goes one way. One control thread runs the bus and the signals, another the admin listener (tokio,
//! single-threaded); one thread accepts; one thread for each core is a shard (mio, no runtime). They talk by messages: a
//! shard's inbox takes [`bus::ToShard`], the bus takes [`bus::Request`]. The rooms, in the order in which they are best
//! read:
//!
//! | room | what is done there |
//! |---|---|
//! | [`event`] | ids, names, entries: events framed once for every socket of the node |
//! | [`close`] | why a connection ended: close code, log field and metric label in one |
//! | [`frame`] | the JSON that clients send and get |
//! | [`json`] | the JSON that an event may hold |
//! | [`foreign`] | what other programs send, made into events |
//! | [`cgroup`] | memory limits of the cgroup and the machine |
//! | [`config`] | settings: flags and variables, every error at once |
//! | [`http`] | request heads in, responses out, over bytes alone |
//! | [`web`] | the page and the browser client, embedded |
//! | [`origin`] | which pages may connect |
//! | [`proxy`] | what a proxy says about its client |
//! | [`token`] | what a token allows its user; [`mint`] makes one to try |
//! | [`keys`] | the keys in force: of tokens and of the admin listener |
//! | [`guard`] | how many connections: of the node, an address, a user |
//! | [`handshake`] | a request's bytes become a client who may join, or an answer |
//! | [`input`] | a client's bytes become its messages |
//! | [`pace`] | how fast a client may send, and name new channels |
//! | [`allowance`] | the rate allowances of clients, shared by their connections |
//! | [`feed`] | a channel's recent events in memory, and cursors into them |
//! | [`connection`] | one connection: its states, and the one function that writes |
//! | [`shard`] | the loop that owns connections and channels: joins, passes, history, ticks |
//! | [`accept`] | the accept loop, which gives each socket to the shard with the fewest |
//! | [`bus`] | what a bus is; [`bus::local`] and [`bus::redis`], which behave the same |
//! | [`sequence`] | one channel's order: next, duplicate, hole, re-anchored |
//! | [`refusals`] | what is refused, told to the log a line a class |
//! | [`metrics`] | what is counted, and whether the node is ready |
//! | [`admin`] | publish, metrics and stats over HTTP |
//! | [`doctor`] | looks before a launch whether host and Redis have what the settings ask for |
//! | [`listeners`] | what a node listens on: bound by it, or handed over by systemd |
//! | [`notify`] | what systemd is told, and its watchdog |
//! | [`server`] | the wiring, and how it stops; `main.rs` tells the life of the process |
//!
//! # Invariants
//!
//! **What clients see.** In each channel ids rise, none comes twice, and where one may be missing the client is told:
//! by `recovered:false`, by `reset`, or by close 4008. Most rules below exist for that sentence.
//!
//! - An id is given once, and only by the bus. Only `sequence` decides what comes next on this node; a shard takes
//!   entries as they come. Continuity is never guessed: [`bus::is_proven`] is the one rule, for joins, holes and pages.
//! - Pub/Sub is a hint, the stream is the truth. Whatever is lost on the way is a hole, and holes are read.
//! - A claim of a client (`lastEventId`) never counts as an id that the node has seen.
//! - A client takes its place in the feed in the same turn of the shard in which its welcome reads the head.
//! - A publish is refused only when it was certainly not taken; whatever else is `unknown`. Its number is never reused.
//!
//! **Who owns what.**
//!
//! - A shard owns its connections, channels and feeds, and nobody else touches them: no lock on the way out, no task,
//!   timer or channel for a connection. Its methods never wait; a message to it never waits either.
//! - A connection has no queue of events: it is a cursor into its channel's feed. Live, slow and resuming clients take
//!   the same path, `Connection::flush` (pages of history are feeds too). Only frames for it alone are queued.
//! - An event is serialized and framed once on the node. Shards share its bytes.
//! - A connection ends once, with a [`close::Reason`].
//! - A slot's number is worth nothing without its generation: answers may come when the slot has a new owner.
//! - Everything that grows has a limit, a constant or a setting, with its reason beside it.
//!
//! **Who knows what.** Only [`bus::redis`] knows fred. Only [`input`] and [`handshake`] know tungstenite. Pure rooms
//! (`event`, `close`, `frame`, `json`, `foreign`, `config`, `http`, `web`, `origin`, `proxy`, `token`, `guard`, `input`, `pace`,
//! `allowance`, `feed`, `sequence`) know neither sockets nor runtimes: bytes are handed in, so each is tested alone.

// In reading order.

pub mod event;

pub mod close;
pub mod frame;
pub mod json;

pub mod foreign;

pub mod cgroup;
pub mod config;

pub mod http;
pub mod origin;
pub mod proxy;
pub mod web;

pub mod token;

pub mod keys;

pub mod guard;

pub mod mint;

pub mod allowance;
pub mod handshake;
pub mod input;
pub mod pace;

pub mod feed;

pub mod connection;
pub mod shard;

pub mod accept;
pub mod memory_watch;

pub mod bus;
pub mod sequence;

pub mod refusals;

pub mod metrics;

pub mod admin;
pub mod doctor;

pub mod listeners;
pub mod notify;
pub mod server;
