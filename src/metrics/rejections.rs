//! The rejection log: one line at once for each class of rejections, then at most one in ten
//! seconds with a count, so that no client can fill a disk with log lines.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::http::Rejection;

/// Least time between two lines of a class.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// What was rejected, and why: values of a closed set, never text from a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RejectionClass {
    /// `request`, `connection`, `message` or `admin request`.
    pub what: &'static str,
    /// The label of the close reason, or the error code.
    pub reason: &'static str,
    /// The HTTP status; 0 where there is none.
    pub status: u16,
    /// What the reason does not say; empty where it says all.
    cause: &'static str,
}

impl RejectionClass {
    pub const fn new(what: &'static str, reason: &'static str, status: u16) -> RejectionClass {
        RejectionClass { what, reason, status, cause: "" }
    }

    pub fn of(what: &'static str, rejection: &Rejection) -> RejectionClass {
        let cause = rejection.log_detail.as_ref().map_or("", |detail| detail.cause);
        RejectionClass { cause, ..RejectionClass::new(what, rejection.reason.label(), rejection.status) }
    }
}

/// A log line that is due.
#[derive(Debug, PartialEq, Eq)]
struct Line {
    class: RejectionClass,
    text: String,
    /// How many rejections it stands for.
    count: u64,
}

#[derive(Debug)]
struct ClassState {
    class: RejectionClass,
    /// The text of the last rejection.
    text: String,
    /// When a line was last written.
    written: Instant,
    /// Rejections since then.
    suppressed: u64,
}

/// The rejections of all threads. The lock is held for a few comparisons, and taken by rejections
/// alone.
#[derive(Debug, Default)]
pub struct RejectionLog(Mutex<Vec<ClassState>>);

impl RejectionLog {
    /// Counts a rejection, and logs it unless its class had a line in the last ten seconds.
    pub fn record(&self, class: RejectionClass, text: &str) {
        if let Some(line) = self.count(class, text, Instant::now()) {
            line.write();
        }
    }

    /// Logs suppressed rejections whose ten seconds are over. Called about once a second.
    pub fn write_overdue(&self) {
        for line in self.overdue(Instant::now()) {
            line.write();
        }
    }

    fn count(&self, class: RejectionClass, text: &str, now: Instant) -> Option<Line> {
        let mut classes = self.0.lock().expect("nothing panics while holding it");
        let Some(state) = classes.iter_mut().find(|state| state.class == class) else {
            classes.push(ClassState { class, text: text.into(), written: now, suppressed: 0 });
            return Some(Line { class, text: text.into(), count: 1 });
        };
        state.suppressed += 1;
        if state.text != text {
            state.text = text.into();
        }
        state.due(now)
    }

    fn overdue(&self, now: Instant) -> Vec<Line> {
        let mut classes = self.0.lock().expect("nothing panics while holding it");
        classes.iter_mut().filter_map(|state| state.due(now)).collect()
    }
}

impl ClassState {
    fn due(&mut self, now: Instant) -> Option<Line> {
        if self.suppressed == 0 || now.saturating_duration_since(self.written) < LINE_INTERVAL {
            return None;
        }
        self.written = now;
        let count = std::mem::take(&mut self.suppressed);
        Some(Line { class: self.class, text: self.text.clone(), count })
    }
}

impl Line {
    fn write(&self) {
        let Line { class: RejectionClass { what, reason, status, cause }, text, count } = self;
        let status = Some(status).filter(|status| **status > 0);
        let cause = Some(cause).filter(|cause| !cause.is_empty());
        tracing::info!(reason, status, cause, count, "{what} rejected: {}", printable(text.trim_end()));
    }
}

/// Escapes what a terminal or a reader of lines may misinterpret. Quotes stay as they are.
pub fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\'' | '"' => out.push(c),
            _ => out.extend(c.escape_debug()),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: RejectionClass = RejectionClass::new("request", "http_response", 400);
    const B: RejectionClass = RejectionClass { status: 503, ..A };

    #[test]
    fn logs_a_class_once_in_ten_seconds() {
        let rejections = RejectionLog::default();
        let start = Instant::now();
        let at = |seconds: f64| start + Duration::from_secs_f64(seconds);
        let count = |line: Option<Line>| line.map(|line| line.count);
        assert_eq!(count(rejections.count(A, "a", at(0.0))), Some(1));
        assert_eq!(count(rejections.count(B, "b", at(0.0))), Some(1));
        for n in 0..100 {
            assert_eq!(rejections.count(A, &format!("a {n}"), at(0.1)), None);
        }
        assert_eq!(rejections.overdue(at(9.9)), []);
        // The line has the text of the last one.
        assert_eq!(rejections.overdue(at(10.0)), [Line { class: A, text: "a 99".into(), count: 100 }]);
        assert_eq!(rejections.overdue(at(30.0)), [], "none was suppressed since");
        assert_eq!(count(rejections.count(A, "a", at(30.0))), Some(1), "the next is logged at once");
        assert_eq!(rejections.count(A, "a", at(31.0)), None);
        assert_eq!(count(rejections.count(A, "a", at(41.0))), Some(2));
    }

    #[test]
    fn text_of_clients_stays_on_its_line() {
        for (text, shown) in [
            ("can't be \"a\"", "can't be \"a\""),
            ("a\nWARN b\r\u{1b}[31m", "a\\nWARN b\\r\\u{1b}[31m"),
            ("\u{202e}\u{9b}", "\\u{202e}\\u{9b}"),
            ("žluťoučký", "žluťoučký"),
        ] {
            assert_eq!(printable(text), shown);
        }
    }
}
