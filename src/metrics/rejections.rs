//! What is refused is told to the log, however much of it there is: for each class one line at once, and then one in
//! ten seconds, which counts. A stranger can't fill a disk with lines.

use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Least time between two lines of a class.
const QUIET: Duration = Duration::from_secs(10);

/// What was refused, and why: the named values of a closed set, never a stranger's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Class {
    /// `request`, `connection`, `message` or `admin request`.
    pub what: &'static str,
    /// The reason's label, or the error's code.
    pub why: &'static str,
    /// The HTTP status; 0 where there is none.
    pub status: u16,
}

/// A line that is due.
#[derive(Debug, PartialEq, Eq)]
struct Line {
    class: Class,
    text: String,
    /// How many refusals it tells of.
    count: u64,
}

#[derive(Debug)]
struct Told {
    class: Class,
    /// What the last one was told.
    text: String,
    at: Instant,
    untold: u64,
}

/// What was refused lately, all threads together. The lock is held for a few comparisons, and only by refusals.
#[derive(Debug, Default)]
pub struct RejectionLog(Mutex<Vec<Told>>);

impl RejectionLog {
    /// Counts one, and tells the log if its class has been quiet.
    pub fn note(&self, class: Class, text: &str) {
        if let Some(line) = self.take(class, text, Instant::now()) {
            line.write();
        }
    }

    /// Tells the log of those that were counted in silence, once it is time. To be called every second or so.
    pub fn tell_overdue(&self) {
        for line in self.overdue(Instant::now()) {
            line.write();
        }
    }

    fn take(&self, class: Class, text: &str, now: Instant) -> Option<Line> {
        let mut classes = self.0.lock().expect("nothing panics while holding it");
        let Some(told) = classes.iter_mut().find(|told| told.class == class) else {
            classes.push(Told { class, text: text.into(), at: now, untold: 0 });
            return Some(Line { class, text: text.into(), count: 1 });
        };
        told.untold += 1;
        if told.text != text {
            told.text = text.into();
        }
        told.due(now)
    }

    fn overdue(&self, now: Instant) -> Vec<Line> {
        let mut classes = self.0.lock().expect("nothing panics while holding it");
        classes.iter_mut().filter_map(|told| told.due(now)).collect()
    }
}

impl Told {
    fn due(&mut self, now: Instant) -> Option<Line> {
        if self.untold == 0 || now.saturating_duration_since(self.at) < QUIET {
            return None;
        }
        self.at = now;
        let count = std::mem::take(&mut self.untold);
        Some(Line { class: self.class, text: self.text.clone(), count })
    }
}

impl Line {
    fn write(&self) {
        let Line { class: Class { what, why, status }, text, count } = self;
        let status = Some(status).filter(|status| **status > 0);
        tracing::info!(why, status, count, "{what} refused: {}", text.trim_end().escape_debug());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Class = Class { what: "request", why: "http_response", status: 400 };
    const B: Class = Class { status: 503, ..A };

    #[test]
    fn one_line_a_class_at_once_and_then_one_in_ten_seconds_that_counts() {
        let refusals = RejectionLog::default();
        let start = Instant::now();
        let at = |seconds: f64| start + Duration::from_secs_f64(seconds);
        let count = |line: Option<Line>| line.map(|line| line.count);
        assert_eq!(count(refusals.take(A, "a", at(0.0))), Some(1));
        assert_eq!(count(refusals.take(B, "b", at(0.0))), Some(1));
        for n in 0..100 {
            assert_eq!(refusals.take(A, &format!("a {n}"), at(0.1)), None);
        }
        assert_eq!(refusals.overdue(at(9.9)), []);
        // The text of the last one stands for all.
        assert_eq!(refusals.overdue(at(10.0)), [Line { class: A, text: "a 99".into(), count: 100 }]);
        assert_eq!(refusals.overdue(at(30.0)), [], "nothing has come since");
        assert_eq!(count(refusals.take(A, "a", at(30.0))), Some(1), "and the next is told at once");
        assert_eq!(refusals.take(A, "a", at(31.0)), None);
        assert_eq!(count(refusals.take(A, "a", at(41.0))), Some(2));
    }
}
