//! A result of a check, and the report of all results.

use std::fmt::Write;

use crate::config::wrap;

/// The result in a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Nothing to change.
    Ok,
    /// It works until the case that the text names.
    Warning,
    /// It does not work.
    Problem,
}

/// The result of one check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The result in a word.
    pub level: Level,
    /// What was checked, in two or three words.
    pub subject: &'static str,
    /// What was found, and its consequence.
    pub text: String,
    /// What to change, ready to copy. Each line starts with the place.
    pub remedies: Vec<String>,
}

impl Finding {
    /// Nothing to change.
    pub fn ok(subject: &'static str, text: impl Into<String>) -> Finding {
        Finding { level: Level::Ok, subject, text: text.into(), remedies: Vec::new() }
    }

    /// It could be better.
    pub fn warning(subject: &'static str, text: impl Into<String>) -> Finding {
        Finding { level: Level::Warning, ..Finding::ok(subject, text) }
    }

    /// It must be changed.
    pub fn problem(subject: &'static str, text: impl Into<String>) -> Finding {
        Finding { level: Level::Problem, ..Finding::ok(subject, text) }
    }

    /// The value could not be read; `by_hand` says where to look.
    pub fn unreadable(subject: &'static str, by_hand: &str) -> Finding {
        Finding::warning(subject, format!("could not be read; check by hand: {by_hand}"))
    }

    /// Adds a line to change.
    pub fn remedy(mut self, line: impl Into<String>) -> Finding {
        self.remedies.push(line.into());
        self
    }
}

/// Columns of the report.
const WIDTH: usize = 80;
/// Columns before a finding's text.
const INDENT: usize = 32;

/// A heading and the findings below it.
pub fn section(heading: &str, findings: &[Finding]) -> String {
    let mut out = format!("\n{heading}\n");
    for finding in findings {
        let level = match finding.level {
            Level::Ok => "ok",
            Level::Warning => "warning",
            Level::Problem => "PROBLEM",
        };
        let mut lines = wrap(&finding.text, WIDTH - INDENT).into_iter();
        let _ = writeln!(out, "  {level:<9}{:<21}{}", finding.subject, lines.next().unwrap_or_default());
        for line in lines {
            let _ = writeln!(out, "{:INDENT$}{line}", "");
        }
        // Remedies are copied, so each stays on one line.
        for line in &finding.remedies {
            let _ = writeln!(out, "{:INDENT$}-> {line}", "");
        }
    }
    out
}

/// The number of problems and warnings.
pub fn summary(findings: &[Finding]) -> String {
    let count = |level| findings.iter().filter(|finding| finding.level == level).count();
    let plural = |count, word| if count == 1 { format!("1 {word}") } else { format!("{count} {word}s") };
    let (problems, warnings) = (count(Level::Problem), count(Level::Warning));
    format!("\n{}, {}, {} ok\n", plural(problems, "problem"), plural(warnings, "warning"), count(Level::Ok))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wraps_text_but_not_remedies() {
        let long = "sysctl ".repeat(30);
        let findings = [
            Finding::ok("a", "fine"),
            Finding::problem("open files", "word ".repeat(60).trim_end()).remedy(&*long),
        ];
        let shown = section("This host", &findings);
        assert!(
            shown.starts_with("\nThis host\n  ok       a                    fine\n  PROBLEM  open files")
        );
        let (text, remedies): (Vec<_>, Vec<_>) = shown.lines().partition(|line| !line.contains("->"));
        assert!(text.iter().all(|line| line.len() <= WIDTH), "{shown}");
        assert_eq!(remedies, [format!("{:INDENT$}-> {long}", "")]);
        assert_eq!(summary(&findings), "\n1 problem, 0 warnings, 1 ok\n");
    }
}
