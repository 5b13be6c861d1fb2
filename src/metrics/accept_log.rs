//! Failures to accept a connection, logged at most once a minute.

use std::io::Error;
use std::time::Instant;

use rustix::io::Errno;

use crate::metrics::WarningLimit;

/// Logs the failures of one kind of listener.
#[derive(Debug)]
pub struct AcceptLog {
    listener: &'static str,
    /// Set while accepts fail: whether that was logged.
    failing: Option<bool>,
    warnings: WarningLimit,
}

impl AcceptLog {
    /// `listener` is a field of each line: `public` or `admin`.
    pub fn new(listener: &'static str) -> AcceptLog {
        AcceptLog { listener, failing: None, warnings: WarningLimit::default() }
    }

    /// Logs a failed accept; `effect` says what happens to the clients.
    pub fn failed(&mut self, error: &Error, effect: &str) {
        if self.failing.is_none() {
            let log = self.warnings.is_due(Instant::now());
            if log {
                let advice = remedy(error);
                tracing::warn!(%error, listener = self.listener, advice, "accept failed, {effect}");
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
    match Errno::from_io_error(error) {
        Some(Errno::MFILE) => "raise the limit on open files (LimitNOFILE)",
        Some(Errno::NFILE) => "raise the host's limit on open files (fs.file-max)",
        Some(Errno::NOBUFS | Errno::NOMEM) => {
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
