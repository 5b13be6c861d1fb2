//! `fanfare doctor`: looks before a launch whether this host and its Redis have what the settings ask for, and says
//! what to change. It reads and changes nothing.

use std::ffi::OsString;
use std::num::NonZeroU32;
use std::path::Path;

use self::finding::{Finding, Level, show, sum_up};
use self::fit::Load;
use self::host::Host;
use crate::auth::keys::KeyRing;
use crate::bus::redis::inspect;
use crate::config::{self, Action, RedisUrl, SettingError, Settings};

mod finding;
mod fit;
mod host;
mod store;

const HELP: &str = "\
Usage: fanfare doctor [--connections N] [any setting of fanfare]...

Looks whether this host and its Redis have what the settings ask for, and says what to change and why. Reads the same
flags and variables as fanfare itself (fanfare --help), opens no listener and changes nothing. Give it the environment
and, where it can be had, the limits of the service:

  systemd-run --pty --property=EnvironmentFile=/etc/fanfare/fanfare.env --property=LimitNOFILE=100000 \\
      fanfare doctor --connections 90000

  --connections N   Clients to make room for. Without it: what --max-connections allows.

Exit code: 0 when nothing is a problem (there may be warnings), 1 when something is, 2 for wrong arguments.
";

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// For people.
    pub text: String,
    /// Whether something will not do.
    pub problems: bool,
}

/// Looks, as `args` (those after `doctor`) and the environment say; or gives the help text.
///
/// # Errors
/// What is wrong with them.
pub fn run(
    args: impl IntoIterator<Item = OsString>,
    env: impl IntoIterator<Item = (OsString, OsString)>,
) -> Result<Report, Vec<SettingError>> {
    let (connections, rest, mut errors) = take_connections(args);
    let settings = match Settings::from(rest, env) {
        Ok(Action::Help(_)) => return Ok(Report { text: HELP.into(), problems: false }),
        Ok(Action::Version(text)) => return Ok(Report { text, problems: false }),
        Ok(Action::Run(settings) | Action::Check(settings)) => settings,
        Err(more) => {
            errors.extend(more);
            return Err(errors);
        }
    };
    if !errors.is_empty() {
        return Err(errors);
    }
    KeyRing::load(&settings)?;
    Ok(examine(&settings, connections))
}

/// Takes `--connections` out of the arguments: the rest are settings.
fn take_connections(
    args: impl IntoIterator<Item = OsString>,
) -> (Option<u32>, Vec<OsString>, Vec<SettingError>) {
    let (mut connections, mut rest, mut errors) = (None, Vec::new(), Vec::new());
    let mut wrong = |problem| errors.push(SettingError { setting: "--connections".into(), problem });
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        let value = match arg.to_string_lossy().strip_prefix("--connections") {
            Some("") => args.next().map(|value| value.to_string_lossy().into_owned()),
            Some(attached) if attached.starts_with('=') => Some(attached[1..].to_owned()),
            _ => {
                rest.push(arg);
                continue;
            }
        };
        let count = value.as_ref().and_then(|value| value.parse().ok()).filter(|count| *count > 0);
        match (value, count) {
            (None, _) => wrong("needs a value: --connections N".into()),
            (Some(value), None) => wrong(format!("{value:?} is not a whole number from 1 to {}", u32::MAX)),
            (_, Some(count)) if connections.replace(count).is_some() => wrong("is given twice".into()),
            _ => {}
        }
    }
    (connections, rest, errors)
}

fn load(settings: &Settings, connections: Option<u32>) -> Load {
    let asked = connections.or(settings.max_connections.map(NonZeroU32::get));
    let connections = asked.unwrap_or_else(|| settings.most_connections());
    let unlimited = Settings { open_files: None, ..settings.clone() };
    let own_files =
        |settings: &Settings| u64::from(settings.own_files() + config::rejection_slots(connections));
    Load {
        connections: connections.into(),
        own_files: own_files(settings),
        own_files_unlimited: own_files(&unlimited),
        addresses: settings.listen.len() as u64,
        own_memory: settings.own_memory(),
    }
}

fn examine(settings: &Settings, connections: Option<u32>) -> Report {
    let load = load(settings, connections);
    let mut text = format!("fanfare {} for {} connections\n", env!("CARGO_PKG_VERSION"), load.connections);
    let mut findings = fit::judge(&Host::read(Path::new("/")), &load);
    text += &show("This host", &findings);
    match &settings.redis {
        None => text += "\nNo Redis (--redis): this node stands alone, and its history ends with it.\n",
        Some(url) => {
            let found = ask_redis(settings, url);
            text += &show(&format!("Redis, {url}"), &found);
            findings.extend(found);
        }
    }
    text += &sum_up(&findings);
    Report { text, problems: findings.iter().any(|finding| finding.level == Level::Problem) }
}

fn ask_redis(settings: &Settings, url: &RedisUrl) -> Vec<Finding> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.expect("a runtime needs an epoll and a pipe");
    match runtime.block_on(inspect::inspect(settings, url)) {
        Ok(facts) => store::judge(&facts, settings),
        Err(text) => vec![Finding::problem("connection", text)],
    }
}
