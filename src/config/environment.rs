//! `FANFARE_*` variables, and what was given for each setting on the command line or in the
//! environment.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::ffi::{OsStr, OsString};

use super::SettingError;
use super::args::Args;
use super::rows::{PREFIX, ROWS, Row, variable};
use crate::protocol::closest::advice;

/// The texts given for each setting, and every error so far.
pub(super) struct Input {
    /// By setting: where it was given (`--listen` or `FANFARE_LISTEN`), and the text.
    given: HashMap<&'static str, (String, String)>,
    /// All errors, in the order found.
    pub errors: Vec<SettingError>,
}

impl Input {
    /// Collects flags and variables by setting. A flag wins over its variable.
    pub fn read(mut args: Args, env: impl IntoIterator<Item = (OsString, OsString)>) -> Input {
        let flags: Vec<_> = ROWS
            .iter()
            .filter_map(|row| Some((row.flag.name, (row.flag.with_dashes(), args.take(row.flag.name)?))))
            .collect();
        let mut input = Input { given: HashMap::new(), errors: args.errors };
        for (name, (flag, text)) in flags {
            match text.is_empty() {
                true => input.error(&flag, "is empty"),
                false => _ = input.given.insert(name, (flag, text)),
            }
        }
        input.read_environment(env);
        input
    }

    fn read_environment(&mut self, env: impl IntoIterator<Item = (OsString, OsString)>) {
        let ours = env.into_iter().filter_map(|(name, value)| Some((name.into_string().ok()?, value)));
        let mut ours: Vec<_> = ours.filter(|(name, _)| name.starts_with(PREFIX)).collect();
        ours.sort(); // errors come in the same order every time
        for (name, value) in ours {
            let Some(row) = ROWS.iter().find(|row| row.variable() == name) else {
                if !is_service_link(&name, &value) {
                    self.error(&name, unknown_variable(&name));
                }
                continue;
            };
            match value.into_string() {
                Err(_) => self.error(&name, "the value is not UTF-8"),
                Ok(value) if value.is_empty() => {} // env files and compose files set empty variables
                Ok(value) => {
                    self.given.entry(row.flag.name).or_insert((name, value));
                }
            }
        }
    }

    /// The value of a setting: what was given, else its default. A wrong one is noted and replaced
    /// by the default, so that the relations to other settings can be checked, too.
    pub fn value<T>(&mut self, name: &str, default: &str, parse: fn(&str) -> Result<T, String>) -> T {
        if let Some((origin, text)) = self.given.get(name) {
            match parse(text.trim()) {
                Ok(value) => return value,
                Err(problem) => self.error(&origin.clone(), problem),
            }
        }
        parse(default).unwrap_or_else(|problem| panic!("the default of --{name} is wrong: {problem}"))
    }

    /// Notes what is wrong with the combination of settings, under the name by which `name` was
    /// given.
    pub fn conflict(&mut self, name: &str, problem: impl Into<String>) {
        let origin = self.given.get(name).map_or_else(|| format!("--{name}"), |(origin, _)| origin.clone());
        self.error(&origin, problem);
    }

    fn error(&mut self, setting: &str, problem: impl Into<String>) {
        self.errors.push(SettingError { setting: setting.into(), problem: problem.into() });
    }
}

/// The error for a `FANFARE_` variable that is no setting. A warning would not do: with a mistyped
/// `FANFARE_JWT_KEY` the node would start without authentication.
fn unknown_variable(name: &str) -> String {
    let renamed = |row: &&Row| !row.flag.old_name.is_empty() && variable(row.flag.old_name) == name;
    if let Some(row) = ROWS.iter().find(renamed) {
        return format!("was renamed: use {}", row.variable());
    }
    let known = || ROWS.iter().map(Row::variable);
    if let Some(advice) = advice(name, known()) {
        return format!("there is no such setting; {advice}");
    }
    let shared = |known: &String| name.bytes().zip(known.bytes()).take_while(|(a, b)| a == b).count();
    match known().max_by_key(|known| (shared(known), Reverse(known.len()))) {
        Some(known) if shared(&known) > PREFIX.len() => {
            format!("there is no such setting; the nearest is {known}")
        }
        _ => "there is no such setting: fanfare --help shows all".into(),
    }
}

/// Whether Kubernetes sets this variable for a service whose name starts with `fanfare`:
/// `…_SERVICE_HOST`, `…_SERVICE_PORT`, `…_SERVICE_PORT_NAME`, `…_PORT=tcp://…` and `…_PORT_80_TCP`,
/// `…_PORT_80_TCP_ADDR` and so on.
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
