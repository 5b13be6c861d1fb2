//! One event in, every socket out: a WebSocket fan-out server. This is the map of the house.
//!
//! ```text
//! in:   socket ─► accept ─► shard ─► handshake, then input ─► bus ─► Redis
//! out:  Redis ─► bus ─► sequence ─► shard: feed ─► each connection's cursor ─► socket
//! ```
//!
//! Data goes one way. One control thread runs the bus and the signals, another the admin listener (tokio,
//! single-threaded); one thread accepts; one thread for each core is a shard (mio, no runtime). They talk by messages: a
//! shard's inbox takes [`shard::mailbox::ShardMessage`], the bus takes [`bus::Request`]. The rooms, in the order in which they are best
//! read:
//!
//! | room | what is done there |
//! |---|---|
//! | [`protocol::event`] | ids, names, entries: events framed once for every socket of the node |
//! | [`protocol::close`] | why a connection ended: close code, log field and metric label in one |
//! | [`protocol::frame`] | the JSON that clients send and get |
//! | [`protocol::json`] | the JSON that an event may hold |
//! | [`protocol::ingest`] | what other programs send, made into events |
//! | [`config::cgroup`] | memory limits of the cgroup and the machine |
//! | [`config`] | settings: flags and variables, every error at once |
//! | [`http`] | request heads in, responses out, over bytes alone |
//! | [`http::page`] | the page and the browser client, embedded |
//! | [`http::origin`] | which pages may connect |
//! | [`http::proxy`] | what a proxy says about its client |
//! | [`auth::token`] | what a token allows its user; [`cli::token`] makes one to try |
//! | [`auth::keys`] | the keys in force: of tokens and of the admin listener |
//! | [`limits::connections`] | how many connections: of the node, an address, a user |
//! | [`ws::handshake`] | a request's bytes become a client who may join, or an answer |
//! | [`ws::decoder`] | a client's bytes become its messages |
//! | [`limits::rate`] | how fast a client may send, and name new channels |
//! | [`limits::allowances`] | the rate allowances of clients, shared by their connections |
//! | [`feed`] | a channel's recent events in memory, and cursors into them |
//! | [`ws::connection`] | one connection: its states, and the one function that writes |
//! | [`shard`] | the loop that owns connections and channels: joins, passes, history, ticks |
//! | [`node::accept`] | the accept loop, which gives each socket to the shard with the fewest |
//! | [`bus`] | what a bus is; [`bus::local`] and [`bus::redis`], which behave the same |
//! | [`bus::sequence`] | one channel's order: next, duplicate, hole, re-anchored |
//! | [`metrics::rejections`] | what is refused, told to the log a line a class |
//! | [`metrics`] | what is counted, and whether the node is ready |
//! | [`admin`] | publish, metrics and stats over HTTP |
//! | [`cli::doctor`] | looks before a launch whether host and Redis have what the settings ask for |
//! | [`node::listeners`] | what a node listens on: bound by it, or handed over by systemd |
//! | [`node::systemd`] | what systemd is told, and its watchdog |
//! | [`node`] | the wiring, and how it stops; `main.rs` tells the life of the process |
//!
//! # Invariants
//!
//! **What clients see.** In each channel ids rise, none comes twice, and where one may be missing the client is told:
//! by `recovered:false`, by `reset`, or by close 4008. Most rules below exist for that sentence.
//!
//! - An id is given once, and only by the bus. Only `sequence` decides what comes next on this node; a shard takes
//!   entries as they come. Continuity is never guessed: [`bus::is_continuous`] is the one rule, for joins, holes and pages.
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
//! - A connection ends once, with a [`protocol::close::CloseReason`].
//! - A slot's number is worth nothing without its generation: answers may come when the slot has a new owner.
//! - Everything that grows has a limit, a constant or a setting, with its reason beside it.
//!
//! **Who knows what.** Only [`bus::redis`] knows fred. Only [`ws::decoder`] and [`ws::handshake`] know tungstenite. Pure rooms
//! (`event`, `close`, `frame`, `json`, `foreign`, `config`, `http`, `web`, `origin`, `proxy`, `token`, `guard`, `input`, `pace`,
//! `allowance`, `feed`, `sequence`) know neither sockets nor runtimes: bytes are handed in, so each is tested alone.

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
