//! The log of channels whose data in Redis is wrong: they are found every second, so each is logged once in a while.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::wire::FAULT;

/// Least time between two lines about one fault.
const LOG_EVERY: Duration = Duration::from_secs(60);

/// Faults logged within that time. More would fill the log: they have one cause.
const LOGGED_MAX: usize = 20;

/// The faults that were logged lately.
#[derive(Debug, Default)]
pub(super) struct FaultLog(HashMap<String, Instant>);

impl FaultLog {
    /// Logs an error of a script that is a channel's fault, unless it was logged lately.
    pub(super) fn log(&mut self, error: &str) {
        if let Some(text) = self.take(error, Instant::now()) {
            tracing::warn!("a channel fails, the others work: {text}");
        }
    }

    fn take<'a>(&mut self, error: &'a str, now: Instant) -> Option<&'a str> {
        let text = error.strip_prefix(FAULT)?;
        self.0.retain(|_, logged| now.saturating_duration_since(*logged) < LOG_EVERY);
        if self.0.contains_key(text) || self.0.len() >= LOGGED_MAX {
            return None;
        }
        self.0.insert(text.to_owned(), now);
        Some(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_is_logged_once_a_minute_and_faults_are_bounded() {
        let mut log = FaultLog::default();
        let start = Instant::now();
        let fault = |n: usize| format!("{FAULT}p:{{{n}}}:meta: x");
        assert_eq!(log.take(&fault(0), start), Some("p:{0}:meta: x"));
        assert_eq!(log.take(&fault(0), start + LOG_EVERY / 2), None);
        assert_eq!(log.take(&fault(0), start + LOG_EVERY), Some("p:{0}:meta: x"));
        assert_eq!(log.take("READONLY You can't write", start), None);
        let logged = (1..1000).filter(|n| log.take(&fault(*n), start + LOG_EVERY).is_some()).count();
        assert_eq!(logged, LOGGED_MAX - 1);
    }
}
