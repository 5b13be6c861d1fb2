//! A shard alone, without its event loop.

mod channels;
mod fanout;
mod newcomers;
mod positions;
mod subscriptions;
mod testbed;
