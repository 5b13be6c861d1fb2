//! Subcommands: `bench`, `token`, `doctor`.

use std::ffi::OsString;

use crate::protocol::closest::advice;

pub mod bench;
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

/// What the program does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Serves, checks settings, or prints help or version.
    Serve,
    /// See [`bench`].
    Bench,
    /// See [`token`].
    Token,
    /// See [`doctor`].
    Doctor,
}

const COMMANDS: [(&str, Command); 5] = [
    ("bench", Command::Bench),
    ("token", Command::Token),
    ("doctor", Command::Doctor),
    ("help", Command::Serve),
    ("version", Command::Serve),
];

/// The command that the program's arguments name, and the arguments for it. `help COMMAND` is
/// `COMMAND --help`, `version` is `--version`.
///
/// # Errors
/// There is no such command.
pub fn command(args: impl IntoIterator<Item = OsString>) -> Result<(Command, Vec<OsString>), String> {
    let mut args = args.into_iter().peekable();
    let mut word = || args.next_if(|arg| !arg.to_string_lossy().starts_with('-'));
    let (mut name, mut given) = (word(), Vec::new());
    if name.as_ref().is_some_and(|name| name == "help") {
        given.push("--help".into());
        name = word();
    }
    let Some(name) = name else {
        given.extend(args);
        return Ok((Command::Serve, given));
    };
    if name == "version" {
        given.push("--version".into());
    }
    let known = COMMANDS.iter().find(|(known, _)| name == *known);
    let (_, command) = known.ok_or_else(|| unknown(&name.to_string_lossy()))?;
    given.extend(args);
    Ok((*command, given))
}

fn unknown(name: &str) -> String {
    let advice = advice(name, COMMANDS.map(|(name, _)| name));
    let hint = advice.map_or(String::new(), |advice| format!("; {advice}"));
    format!(
        "fanfare: there is no command {name:?}{hint}\n\
         fanfare help lists the commands; without a command fanfare serves\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Result<(Command, Vec<OsString>), String> {
        command(args.iter().map(OsString::from))
    }

    #[test]
    fn help_and_version_are_commands_too() {
        for (given, command, args) in [
            (&[] as &[_], Command::Serve, &[] as &[&str]),
            (&["--listen", "token"], Command::Serve, &["--listen", "token"]),
            (&["token", "--user", "a"], Command::Token, &["--user", "a"]),
            (&["help"], Command::Serve, &["--help"]),
            (&["help", "help"], Command::Serve, &["--help"]),
            (&["help", "doctor"], Command::Doctor, &["--help"]),
            (&["help", "--check"], Command::Serve, &["--help", "--check"]),
            (&["version"], Command::Serve, &["--version"]),
        ] {
            assert_eq!(parse(given), Ok((command, args.iter().map(OsString::from).collect())), "{given:?}");
        }
    }

    #[test]
    fn unknown_commands_name_the_known_ones() {
        let text = parse(&["tokn"]).unwrap_err();
        assert!(text.starts_with("fanfare: there is no command \"tokn\"; did you mean token?\n"), "{text}");
        let text = parse(&["help", "serve"]).unwrap_err();
        assert!(text.starts_with("fanfare: there is no command \"serve\"\n"), "{text}");
        assert!(text.contains("without a command fanfare serves"), "{text}");
    }
}
