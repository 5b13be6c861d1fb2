//! What was given on the command line and in the environment, before anyone judges the values.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::ffi::{OsStr, OsString};

use super::SettingError;
use super::table::{PREFIX, RENAMED, Shape, Spec, TABLE, variable};

/// The texts given for each setting, and what was wrong so far.
pub(super) struct Input {
    /// By setting: where it was given (`--listen` or `FANFARE_LISTEN`) and what.
    given: HashMap<&'static str, (String, String)>,
    /// All errors, in the order found.
    pub errors: Vec<SettingError>,
    /// `--check` was given.
    pub check: bool,
    /// `--help` was given.
    pub help: bool,
    /// `--version` was given.
    pub version: bool,
}

impl Input {
    /// Sorts flags and variables by setting; a flag wins over its variable.
    pub fn read(
        args: impl IntoIterator<Item = OsString>,
        env: impl IntoIterator<Item = (OsString, OsString)>,
    ) -> Input {
        let mut input =
            Input { given: HashMap::new(), errors: Vec::new(), check: false, help: false, version: false };
        input.read_flags(args);
        input.read_environment(env);
        input
    }

    fn read_flags(&mut self, args: impl IntoIterator<Item = OsString>) {
        let is_value = |next: &OsString| !next.to_string_lossy().starts_with("--");
        let mut args = args.into_iter().peekable();
        while let Some(arg) = args.next() {
            let Ok(arg) = arg.into_string() else {
                self.wrong("command line", "an argument is not UTF-8".into());
                continue;
            };
            let (flag, attached) = match arg.split_once('=') {
                Some((flag, value)) => (flag, Some(value.to_owned())),
                None => (arg.as_str(), None),
            };
            match flag {
                "--check" if attached.is_none() => self.check = true,
                "--help" | "-h" if attached.is_none() => self.help = true,
                "--version" | "-V" if attached.is_none() => self.version = true,
                _ => match TABLE.iter().find(|spec| flag.strip_prefix("--") == Some(spec.name)) {
                    None => {
                        if attached.is_none() && flag.starts_with("--") {
                            args.next_if(is_value); // a mistyped flag's value is not a mistake of its own
                        }
                        self.unknown_flag(flag);
                    }
                    Some(spec) => {
                        let value = match attached {
                            Some(value) => value,
                            None if spec.shape == Shape::Switch => "true".into(),
                            None => match args.next_if(is_value).map(OsString::into_string) {
                                Some(Ok(value)) => value,
                                Some(Err(_)) => {
                                    self.wrong(flag, "the value is not UTF-8".into());
                                    continue;
                                }
                                None => {
                                    self.wrong(flag, format!("needs a value: {flag} {}", spec.value));
                                    continue;
                                }
                            },
                        };
                        self.add_flag(spec, flag, value);
                    }
                },
            }
        }
    }

    fn add_flag(&mut self, spec: &'static Spec, flag: &str, value: String) {
        match self.given.get_mut(spec.name) {
            _ if value.is_empty() => self.wrong(flag, "is empty".into()),
            None => {
                self.given.insert(spec.name, (flag.into(), value));
            }
            Some((_, values)) if spec.shape == Shape::List => {
                values.push(',');
                values.push_str(&value);
            }
            Some(_) => self.wrong(flag, "is given twice".into()),
        }
    }

    fn unknown_flag(&mut self, flag: &str) {
        if let Some((_, new)) = RENAMED.iter().find(|(old, _)| flag.strip_prefix("--") == Some(*old)) {
            return self.wrong(flag, format!("was renamed: use --{new}"));
        }
        let names = TABLE.iter().map(Spec::flag).chain(["--check", "--help", "--version"].map(String::from));
        let problem = match (flag.starts_with('-'), closest(flag, names)) {
            (true, Some(name)) => format!("there is no such flag; did you mean {name}?"),
            (true, None) => "there is no such flag".into(),
            (false, _) => "is not expected here: settings begin with --".into(),
        };
        self.wrong(flag, problem);
    }

    fn read_environment(&mut self, env: impl IntoIterator<Item = (OsString, OsString)>) {
        let ours = env.into_iter().filter_map(|(name, value)| Some((name.into_string().ok()?, value)));
        let mut ours: Vec<_> = ours.filter(|(name, _)| name.starts_with(PREFIX)).collect();
        ours.sort(); // errors come in the same order every time
        for (name, value) in ours {
            let Some(spec) = TABLE.iter().find(|spec| spec.variable() == name) else {
                if !is_service_link(&name, &value) {
                    self.wrong(&name, unknown_variable(&name));
                }
                continue;
            };
            match value.into_string() {
                Err(_) => self.wrong(&name, "the value is not UTF-8".into()),
                Ok(value) if value.is_empty() => {} // as good as not set, in env files and compose files
                Ok(value) => {
                    self.given.entry(spec.name).or_insert((name, value));
                }
            }
        }
    }

    /// The value of a setting: what was given, else its default. A wrong one is noted, and the default stands in
    /// so that the rest can be judged too.
    pub fn get<T>(&mut self, name: &str, parse: impl Fn(&str) -> Result<T, String>) -> T {
        if let Some((origin, text)) = self.given.get(name) {
            match parse(text.trim()) {
                Ok(value) => return value,
                Err(problem) => {
                    let setting = origin.clone();
                    self.errors.push(SettingError { setting, problem });
                }
            }
        }
        let spec =
            TABLE.iter().find(|spec| spec.name == name).expect("only settings of the table are asked for");
        parse(spec.default).unwrap_or_else(|problem| panic!("the default of --{name} is wrong: {problem}"))
    }

    /// Notes what is wrong with the combination of settings, under the name by which `name` was given.
    pub fn conflict(&mut self, name: &str, problem: String) {
        let origin = self.given.get(name).map_or_else(|| format!("--{name}"), |(origin, _)| origin.clone());
        self.errors.push(SettingError { setting: origin, problem });
    }

    fn wrong(&mut self, setting: &str, problem: String) {
        self.errors.push(SettingError { setting: setting.into(), problem });
    }
}

/// The error for a `FANFARE_` variable that is no setting. A warning would not do: with a mistyped `FANFARE_JWT_KEY`
/// the node would start without authentication.
fn unknown_variable(name: &str) -> String {
    if let Some((_, new)) = RENAMED.iter().find(|(old, _)| variable(old) == name) {
        return format!("was renamed: use {}", variable(new));
    }
    let known = || TABLE.iter().map(Spec::variable);
    if let Some(known) = closest(name, known()) {
        return format!("there is no such setting; did you mean {known}?");
    }
    let shared = |known: &String| name.bytes().zip(known.bytes()).take_while(|(a, b)| a == b).count();
    match known().max_by_key(|known| (shared(known), Reverse(known.len()))) {
        Some(known) if shared(&known) > PREFIX.len() => {
            format!("there is no such setting; the nearest is {known}")
        }
        _ => "there is no such setting: fanfare --help shows all".into(),
    }
}

/// Whether Kubernetes sets this variable for a service whose name begins with `fanfare`: `…_SERVICE_HOST`,
/// `…_SERVICE_PORT`, `…_SERVICE_PORT_NAME`, `…_PORT=tcp://…` and `…_PORT_80_TCP`, `…_PORT_80_TCP_ADDR` and so on.
/// <https://kubernetes.io/docs/tutorials/services/connect-applications-service/#environment-variables>
fn is_service_link(name: &str, value: &OsStr) -> bool {
    const TRANSPORTS: [&str; 3] = ["TCP", "UDP", "SCTP"];
    if name.ends_with("_SERVICE_HOST") || name.ends_with("_SERVICE_PORT") || name.contains("_SERVICE_PORT_") {
        return true;
    }
    let is_url = |transport: &str| {
        let scheme = format!("{}://", transport.to_ascii_lowercase());
        value.as_encoded_bytes().starts_with(scheme.as_bytes())
    };
    if name.ends_with("_PORT") && TRANSPORTS.into_iter().any(is_url) {
        return true;
    }
    let Some((_, rest)) = name.rsplit_once("_PORT_") else { return false };
    let mut parts = rest.split('_');
    let is_port = parts.next().is_some_and(|port| port.parse::<u16>().is_ok());
    let is_transport = parts.next().is_some_and(|transport| TRANSPORTS.contains(&transport));
    is_port && is_transport && matches!(parts.next(), None | Some("PROTO" | "PORT" | "ADDR"))
}

/// The known name that differs by the fewest letters, if that is few enough to be a typing error.
pub(super) fn closest(given: &str, known: impl IntoIterator<Item = String>) -> Option<String> {
    let near = known.into_iter().map(|name| (distance(given, &name), name));
    near.filter(|(distance, _)| *distance <= 2).min().map(|(_, name)| name)
}

/// How many letters to add, drop or change (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, to) in b.iter().enumerate() {
            let changed = diagonal + usize::from(from != *to);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_the_letters_that_differ() {
        for (a, b, apart) in [("", "", 0), ("", "abc", 3), ("listn", "listen", 1), ("kitten", "sitting", 3)] {
            assert_eq!((distance(a, b), distance(b, a)), (apart, apart), "{a} {b}");
        }
        assert_eq!(closest("--listn", ["--admin".into(), "--listen".into()]).as_deref(), Some("--listen"));
        assert_eq!(closest("--port", ["--admin".into(), "--listen".into()]), None);
    }
}
