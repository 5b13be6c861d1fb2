//! The argument lexer of `fanfare` and its subcommands: `--name value` or `--name=value`.

use std::ffi::OsString;

use super::{SettingError, parse};
use crate::protocol::closest::advice;

/// A flag that a command takes.
#[derive(Clone, Copy, Debug)]
pub struct Flag {
    /// The name without dashes.
    pub name: &'static str,
    /// Placeholder of the value in help texts. It is empty for a switch, ends in [`LIST`] for a list
    /// and in [`REPEATED`] for values that may have commas.
    pub value: &'static str,
    /// The name before 0.1.0; empty if it is the same.
    pub old_name: &'static str,
}

/// End of the placeholder of a flag that takes several values, separated by commas or by repeating
/// the flag.
const LIST: &str = ",...";

/// End of the placeholder of a flag that may be repeated.
const REPEATED: &str = "...";

impl Flag {
    /// A flag with this placeholder.
    pub const fn new(name: &'static str, value: &'static str) -> Flag {
        Flag { name, value, old_name: "" }
    }

    /// The name as on the command line.
    pub fn with_dashes(&self) -> String {
        format!("--{}", self.name)
    }

    /// Whether it is on when present, so that it needs no value.
    pub fn is_switch(&self) -> bool {
        self.value.is_empty()
    }

    /// Whether it takes several values.
    pub fn is_list(&self) -> bool {
        self.value.ends_with(LIST)
    }

    fn is_repeated(&self) -> bool {
        self.value.ends_with(REPEATED) && !self.is_list()
    }
}

/// A command line, split into flags and values.
#[derive(Debug)]
pub struct Args {
    flags: Vec<Flag>,
    given: Vec<(&'static str, String)>,
    /// Every error so far.
    pub errors: Vec<SettingError>,
}

impl Args {
    /// Splits the arguments of a command that takes these flags.
    pub fn read(args: impl IntoIterator<Item = OsString>, flags: &[Flag]) -> Args {
        let mut read = Args { flags: flags.to_vec(), given: Vec::new(), errors: Vec::new() };
        let is_value = |next: &OsString| !next.to_string_lossy().starts_with("--");
        let mut args = args.into_iter().peekable();
        while let Some(arg) = args.next() {
            let Ok(arg) = arg.into_string() else {
                read.error("command line", "an argument is not UTF-8");
                continue;
            };
            let (name, attached) = match arg.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (arg.as_str(), None),
            };
            let name = match name {
                "-h" => "--help",
                "-V" => "--version",
                name => name,
            };
            let Some(flag) = flags.iter().find(|flag| name.strip_prefix("--") == Some(flag.name)) else {
                if attached.is_none() && name.starts_with("--") {
                    args.next_if(is_value); // the value of a mistyped flag is not an error of its own
                }
                let problem = read.unknown(name);
                read.error(name, problem);
                continue;
            };
            let value = match attached {
                Some(value) => Ok(value),
                None if flag.is_switch() => Ok("true".into()),
                None => match args.next_if(is_value).map(OsString::into_string) {
                    Some(Ok(value)) => Ok(value),
                    Some(Err(_)) => Err("the value is not UTF-8".into()),
                    None => Err(format!("needs a value: {name} {}", flag.value)),
                },
            };
            match value {
                Ok(value) => read.add(flag, value),
                Err(problem) => read.error(name, problem),
            }
        }
        read
    }

    fn add(&mut self, flag: &Flag, value: String) {
        match self.given.iter_mut().find(|(name, _)| *name == flag.name) {
            Some(_) if flag.is_repeated() => self.given.push((flag.name, value)),
            None => self.given.push((flag.name, value)),
            Some((_, values)) if flag.is_list() => {
                values.push(',');
                values.push_str(&value);
            }
            Some(_) => self.error(&flag.with_dashes(), "is given twice"),
        }
    }

    /// What is wrong with an argument that is none of the flags.
    fn unknown(&self, arg: &str) -> String {
        let mut flags = self.flags.iter();
        let renamed =
            |flag: &&Flag| !flag.old_name.is_empty() && arg.strip_prefix("--") == Some(flag.old_name);
        if let Some(flag) = flags.find(renamed) {
            return format!("was renamed: use {}", flag.with_dashes());
        }
        match advice(arg, self.flags.iter().map(Flag::with_dashes)) {
            _ if !arg.starts_with('-') => "is not expected here: flags start with --".into(),
            Some(advice) => format!("there is no such flag; {advice}"),
            None => "there is no such flag".into(),
        }
    }

    /// Takes the text of a flag. The values of a list are joined by commas.
    pub fn take(&mut self, name: &str) -> Option<String> {
        let at = self.given.iter().position(|(given, _)| *given == name)?;
        Some(self.given.remove(at).1)
    }

    /// Takes the texts of a flag that may be repeated.
    pub fn take_all(&mut self, name: &str) -> Vec<String> {
        std::iter::from_fn(|| self.take(name)).collect()
    }

    /// Takes the value of a flag; `None` also if it is wrong, which is noted.
    pub fn value<T>(&mut self, name: &str, parse: impl Fn(&str) -> Result<T, String>) -> Option<T> {
        let parsed = parse(&self.take(name)?);
        parsed.map_err(|problem| self.error(&format!("--{name}"), problem)).ok()
    }

    /// Takes the value of a flag that must be given.
    pub fn required<T>(&mut self, name: &str, parse: impl Fn(&str) -> Result<T, String>) -> Option<T> {
        let flag = format!("--{name}");
        if !self.is_given(name) && !self.errors.iter().any(|error| error.setting == flag) {
            self.error(&flag, "is required");
        }
        self.value(name, parse)
    }

    /// Whether the flag is given and not taken yet.
    pub fn is_given(&self, name: &str) -> bool {
        self.given.iter().any(|(given, _)| *given == name)
    }

    /// Takes the value of a switch.
    pub fn switch(&mut self, name: &str) -> bool {
        self.value(name, parse::switch).unwrap_or(false)
    }

    /// Notes what is wrong with a flag.
    pub fn error(&mut self, setting: &str, problem: impl Into<String>) {
        self.errors.push(SettingError { setting: setting.into(), problem: problem.into() });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLAGS: [Flag; 4] = [
        Flag::new("user", "NAME"),
        Flag::new("channel", "NAME,..."),
        Flag::new("hello", "TEXT..."),
        Flag::new("help", ""),
    ];

    fn read(args: &[&str]) -> Args {
        Args::read(args.iter().map(OsString::from), &FLAGS)
    }

    #[test]
    fn flags_are_split_from_values() {
        let mut args = read(&["--user=a=b", "--channel", "x", "-h", "--channel=y,z"]);
        assert!(args.errors.is_empty() && args.switch("help") && !args.switch("help"));
        assert_eq!(args.take("user").as_deref(), Some("a=b"));
        assert_eq!(args.take("channel").as_deref(), Some("x,y,z"));
        assert_eq!(args.take("channel"), None);
        assert_eq!(read(&["--hello", "a,b", "--hello=c"]).take_all("hello"), ["a,b", "c"]);
    }

    #[test]
    fn every_wrong_argument_is_an_error() {
        let args = read(&["--user", "a", "--user", "b", "--usr", "c", "x", "--channel", "--help=maybe"]);
        let errors: Vec<_> = args.errors.iter().map(SettingError::to_string).collect();
        assert_eq!(
            errors,
            [
                "--user: is given twice",
                "--usr: there is no such flag; did you mean --user?",
                "x: is not expected here: flags start with --",
                "--channel: needs a value: --channel NAME,...",
            ]
        );
        let mut args = args;
        assert!(!args.switch("help"));
        assert_eq!(args.errors.len(), 5);
    }
}
