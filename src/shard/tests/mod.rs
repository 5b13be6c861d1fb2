//! A shard alone, without its event loop.

mod channels;
mod fanout;
mod newcomers;
mod peer;
mod positions;
mod source;
mod subscriptions;
mod testbed;
