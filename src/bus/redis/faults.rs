//! The log of channels whose data in Redis is damaged. Probes find each of them every second, so
//! repetitions are not logged.

use std::collections::HashMap;
use std::time::Instant;

use super::errors::FAULT;
use crate::metrics::WARN_INTERVAL;

/// Most faults logged within [`WARN_INTERVAL`]. More than that have one cause, and would only fill
/// the log.
const LOGGED_MAX: usize = 20;

/// The faults logged within the last minute.
#[derive(Debug, Default)]
pub(super) struct FaultLog(HashMap<String, Instant>);

impl FaultLog {
    /// Logs an error of a script if it is a channel's fault, at most once a minute.
    pub(super) fn log(&mut self, error: &str) {
        if let Some(fault) = self.due(error, Instant::now()) {
            tracing::warn!(fault, "channel unusable, its data in Redis is damaged");
        }
    }

    fn due<'a>(&mut self, error: &'a str, now: Instant) -> Option<&'a str> {
        let text = error.strip_prefix(FAULT)?;
        self.0.retain(|_, logged| now.saturating_duration_since(*logged) < WARN_INTERVAL);
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
    fn logs_few_faults_once_a_minute() {
        let mut log = FaultLog::default();
        let start = Instant::now();
        let fault = |n: usize| format!("{FAULT}p:{{{n}}}:meta: x");
        assert_eq!(log.due(&fault(0), start), Some("p:{0}:meta: x"));
        assert_eq!(log.due(&fault(0), start + WARN_INTERVAL / 2), None);
        assert_eq!(log.due(&fault(0), start + WARN_INTERVAL), Some("p:{0}:meta: x"));
        assert_eq!(log.due("READONLY You can't write", start), None);
        let logged = (1..1000).filter(|n| log.due(&fault(*n), start + WARN_INTERVAL).is_some()).count();
        assert_eq!(logged, LOGGED_MAX - 1);
    }
}
