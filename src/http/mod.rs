//! HTTP/1.1 over byte buffers (RFC 9110, RFC 9112), as much of it as both listeners need. Sockets
//! are the callers' business.

pub mod origin;
pub mod page;
pub mod proxy;
mod query;
mod request;
mod response;

pub use query::{
    Mistyped, mistyped, parse_channel, percent_decode, query_channel, query_number, query_value,
};
pub use request::{BodyLength, HEAD_MAX, Head, parse};
pub use response::{Rejection, Response};

#[cfg(test)]
mod tests;
