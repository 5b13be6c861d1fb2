//! A shard alone, without its event loop.

mod fanout;
mod positions;
mod testbed;
