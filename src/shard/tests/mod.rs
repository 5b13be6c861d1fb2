//! A shard alone, without its event loop.

mod fanout;
mod newcomers;
mod positions;
mod subscriptions;
mod testbed;
