//! Requests read from a byte buffer, and responses written to one.
