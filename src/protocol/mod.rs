//! What goes over the wire, without sockets: ids, names, events, client frames, backend JSON, close
//! codes.

pub mod client_frame;
pub mod close;
pub mod closest;
pub mod control;
pub mod event;
pub mod form;
pub mod frame;
pub mod inbox;
pub mod ingest;
pub mod json;
pub mod pattern;
