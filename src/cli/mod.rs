//! Subcommands: `token`, `doctor`.

pub mod doctor;
pub mod token;

/// What a subcommand prints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// For people.
    pub text: String,
    /// Whether it found a problem: the exit code is 1 then.
    pub has_problems: bool,
}

impl Report {
    fn ok(text: impl Into<String>) -> Report {
        Report { text: text.into(), has_problems: false }
    }
}
