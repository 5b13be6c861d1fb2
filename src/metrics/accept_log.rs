//! Log lines about failed accepts.

use std::io;
use std::time::{Duration, Instant};

/// Least time between two log lines about failures.
const WARN_EVERY: Duration = Duration::from_secs(60);

/// Logs failures to accept, at most once a minute.
#[derive(Debug, Default)]
pub struct AcceptLog {
    /// Set while accepts fail: whether that was logged.
    failing: Option<bool>,
    /// When a failure was last logged.
    logged: Option<Instant>,
}

impl AcceptLog {
    /// Logs a failed accept; the line starts with `what`.
    pub fn failed(&mut self, what: &str, error: &io::Error) {
        if self.failing.is_none() {
            let now = Instant::now();
            let log = self.logged.is_none_or(|last| now - last >= WARN_EVERY);
            if log {
                tracing::warn!(%error, "{what}: raise the limit on open files (LimitNOFILE)");
                self.logged = Some(now);
            }
            self.failing = Some(log);
        }
    }

    /// Logs that accepts succeed again.
    pub fn succeeded(&mut self, what: &str) {
        if self.failing.take() == Some(true) {
            tracing::info!("{what} can be accepted again");
        }
    }
}
