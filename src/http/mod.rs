//! Requests read from a byte buffer, and responses written to one: as much of HTTP/1.1 (RFC 9110, RFC 9112) as
//! both listeners need. Knows no socket: whoever owns one hands in what it has read so far.

pub mod origin;
pub mod page;
pub mod proxy;
mod request;
mod response;

pub use request::{BodyLength, HEAD_MAX, HEADER_COUNT_MAX, HEADERS_MAX, Head, REQUEST_LINE_MAX};
pub use request::{parse, percent_decode, query_value};
pub use response::{Refusal, Response, body_of, reason, status_of};

#[cfg(test)]
mod tests;
