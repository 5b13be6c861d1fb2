//! What the doctor says of one thing, and how a list of that is shown.

use std::fmt::Write;

/// How things stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// As it should be.
    Ok,
    /// It will do, until something happens that the text names.
    Warning,
    /// It will not do.
    Problem,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// How it stands.
    pub level: Level,
    /// What was looked at, in two or three words.
    pub what: &'static str,
    /// What was found, and what follows from it.
    pub found: String,
    /// What to change, as one would write it; each begins with where.
    pub remedy: Vec<String>,
}

impl Finding {
    /// All is well.
    pub fn ok(what: &'static str, found: impl Into<String>) -> Finding {
        Finding { level: Level::Ok, what, found: found.into(), remedy: Vec::new() }
    }

    /// It could be better.
    pub fn warning(what: &'static str, found: impl Into<String>) -> Finding {
        Finding { level: Level::Warning, ..Finding::ok(what, found) }
    }

    /// It must be mended.
    pub fn problem(what: &'static str, found: impl Into<String>) -> Finding {
        Finding { level: Level::Problem, ..Finding::ok(what, found) }
    }

    /// It can't be known from here: what to look at by hand.
    pub fn unread(what: &'static str, by_hand: &str) -> Finding {
        Finding::warning(what, format!("could not be read; see by hand {by_hand}"))
    }

    /// The same with a line to change.
    pub fn remedy(mut self, line: impl Into<String>) -> Finding {
        self.remedy.push(line.into());
        self
    }
}

/// Columns of text before it is broken.
const WIDTH: usize = 110;
/// Columns before a finding's text.
const INDENT: usize = 32;

/// A heading and what was found under it.
pub fn show(heading: &str, findings: &[Finding]) -> String {
    let mut out = format!("\n{heading}\n");
    for finding in findings {
        let level = match finding.level {
            Level::Ok => "ok",
            Level::Warning => "warning",
            Level::Problem => "PROBLEM",
        };
        let mut lines = broken(&finding.found, WIDTH - INDENT).into_iter();
        let _ = writeln!(out, "  {level:<9}{:<21}{}", finding.what, lines.next().unwrap_or_default());
        for line in lines {
            let _ = writeln!(out, "{:INDENT$}{line}", "");
        }
        // What is to be copied stays on one line.
        for line in &finding.remedy {
            let _ = writeln!(out, "{:INDENT$}-> {line}", "");
        }
    }
    out
}

/// The last line.
pub fn sum_up(findings: &[Finding]) -> String {
    let count = |level| findings.iter().filter(|finding| finding.level == level).count();
    let plural = |count, word| if count == 1 { format!("1 {word}") } else { format!("{count} {word}s") };
    let (problems, warnings) = (count(Level::Problem), count(Level::Warning));
    format!("\n{}, {}, {} ok\n", plural(problems, "problem"), plural(warnings, "warning"), count(Level::Ok))
}

/// Breaks text between words.
fn broken(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        let line = lines.last_mut().expect("it has one at least");
        if !line.is_empty() && line.chars().count() + 1 + word.chars().count() > width {
            lines.push(word.to_owned());
        } else {
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_broken_between_words_and_remedies_are_not() {
        let long = "sysctl ".repeat(30);
        let findings = [
            Finding::ok("a", "fine"),
            Finding::problem("open files", "word ".repeat(60).trim_end()).remedy(&*long),
        ];
        let shown = show("This host", &findings);
        assert!(
            shown.starts_with("\nThis host\n  ok       a                    fine\n  PROBLEM  open files")
        );
        let (text, remedies): (Vec<_>, Vec<_>) = shown.lines().partition(|line| !line.contains("->"));
        assert!(text.iter().all(|line| line.len() <= WIDTH), "{shown}");
        assert_eq!(remedies, [format!("{:INDENT$}-> {long}", "")]);
        assert_eq!(sum_up(&findings), "\n1 problem, 0 warnings, 1 ok\n");
    }
}
