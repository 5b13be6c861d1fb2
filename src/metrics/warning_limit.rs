//! Limits how often a warning is logged.

use std::time::{Duration, Instant};

/// Least time between two warnings of one kind.
pub const WARN_INTERVAL: Duration = Duration::from_secs(60);

/// Limits the warnings of one kind to one per [`WARN_INTERVAL`].
#[derive(Debug, Default)]
pub struct WarningLimit(Option<Instant>);

impl WarningLimit {
    /// Whether a warning is due. If so, the next one is due after [`WARN_INTERVAL`].
    pub fn is_due(&mut self, now: Instant) -> bool {
        let is_due = self.0.is_none_or(|last| now.saturating_duration_since(last) >= WARN_INTERVAL);
        if is_due {
            self.0 = Some(now);
        }
        is_due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_warning_is_due_per_interval() {
        let mut limit = WarningLimit::default();
        let start = Instant::now();
        assert!(limit.is_due(start));
        assert!(!limit.is_due(start + WARN_INTERVAL / 2));
        assert!(limit.is_due(start + WARN_INTERVAL), "half an interval is not counted twice");
        assert!(!limit.is_due(start + WARN_INTERVAL));
    }
}
