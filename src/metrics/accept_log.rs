//! Failures to accept a connection, logged at most once a minute.

use std::io::{Error, ErrorKind};
use std::time::{Duration, Instant};

/// Least time between two log lines.
const WARN_EVERY: Duration = Duration::from_secs(60);

/// Error numbers that std has no kind for (errno(3)).
const ENFILE: i32 = 23;
const EMFILE: i32 = 24;
const ENOBUFS: i32 = 105;

/// Logs the failures of one kind of listener.
#[derive(Debug)]
pub struct AcceptLog {
    listener: &'static str,
    /// Set while accepts fail: whether that was logged.
    failing: Option<bool>,
    /// When a failure was last logged.
    logged: Option<Instant>,
}

impl AcceptLog {
    /// `listener` is a field of each line: `public` or `admin`.
    pub fn new(listener: &'static str) -> AcceptLog {
        AcceptLog { listener, failing: None, logged: None }
    }

    /// Logs a failed accept; `effect` says what happens to the clients.
    pub fn failed(&mut self, error: &Error, effect: &str) {
        if self.failing.is_none() {
            let now = Instant::now();
            let log = self.logged.is_none_or(|last| now - last >= WARN_EVERY);
            if log {
                tracing::warn!(%error, listener = self.listener, "accept failed, {effect}: {}", remedy(error));
                self.logged = Some(now);
            }
            self.failing = Some(log);
        }
    }

    /// Logs that accepts succeed again.
    pub fn succeeded(&mut self) {
        if self.failing.take() == Some(true) {
            tracing::info!(listener = self.listener, "accepting connections again");
        }
    }
}

/// What to do about a failed accept (accept(2)).
fn remedy(error: &Error) -> &'static str {
    match error.raw_os_error() {
        Some(EMFILE) => "raise the limit on open files (LimitNOFILE)",
        Some(ENFILE) => "raise the host's limit on open files (fs.file-max)",
        Some(ENOBUFS) => "the kernel is out of memory for sockets: lower --max-connections or add memory",
        _ if error.kind() == ErrorKind::OutOfMemory => {
            "the kernel is out of memory for sockets: lower --max-connections or add memory"
        }
        _ => "see accept(2)",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remedy_follows_the_error_number() {
        for (number, part) in [(24, "LimitNOFILE"), (23, "fs.file-max"), (12, "memory"), (105, "memory")] {
            let remedy = remedy(&Error::from_raw_os_error(number));
            assert!(remedy.contains(part), "{number}: {remedy}");
        }
    }
}
