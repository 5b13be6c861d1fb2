//! `fanfare doctor`: checks whether this host and its Redis have what the settings need, and says
//! what to change. It changes nothing.

use std::ffi::OsString;
use std::num::NonZeroU32;
use std::path::Path;

use self::finding::{Finding, Level, section, summary};
use self::host::Host;
use self::host_checks::Load;
use self::unit::Unit;
use super::Report;
use crate::auth::keys::KeyRing;
use crate::bus::redis::inspect;
use crate::config::args::{Args, Flag};
use crate::config::{self, Action, RedisUrl, SettingError, Settings, rejection_slots};

mod finding;
mod host;
mod host_checks;
mod redis_checks;
mod unit;

const HELP: &str = "\
Usage: fanfare doctor [--connections N] [any setting of fanfare]...

Checks whether this host and its Redis have what the settings need, and says
what to change and why. Opens no listener and changes nothing. Limits on open
files and memory are those of fanfare.service where it is installed, else those
of this shell. The settings are flags and variables, as for fanfare itself. To
check those of the service:

  sudo systemd-run --pty --property=EnvironmentFile=/etc/fanfare/fanfare.env \\
      fanfare doctor --connections 90000

  --connections N   Connections to check for. Without it: as many as
                    --max-connections allows.

Exit code: 0 without problems (there may be warnings), 1 with problems, 2 for
wrong arguments.
";

const CONNECTIONS: Flag = Flag::new("connections", "N");

/// Checks what `args` (those after `doctor`) and the environment ask for, or returns the help text.
///
/// # Errors
/// Every wrong argument and setting.
pub fn run(
    args: impl IntoIterator<Item = OsString>,
    env: impl IntoIterator<Item = (OsString, OsString)>,
) -> Result<Report, Vec<SettingError>> {
    let flags = [vec![CONNECTIONS], config::flags()].concat();
    let mut args = Args::read(args, &flags);
    let connections = args.value(CONNECTIONS.name, parse_connections);
    let settings = match Settings::from_args(args, env)? {
        Action::Help(_) => return Ok(Report::ok(HELP)),
        Action::Version(text) => return Ok(Report::ok(text)),
        Action::Run(settings) | Action::Check(settings) => settings,
    };
    KeyRing::load(&settings)?;
    let mut host = Host::read(Path::new("/"));
    let settings = match Unit::read() {
        Some(unit) => apply_unit_limits(unit, &mut host, settings),
        None => settings,
    };
    Ok(examine(&settings, &host, connections))
}

fn parse_connections(text: &str) -> Result<NonZeroU32, String> {
    text.parse().map_err(|_| format!("{text:?} is not a whole number from 1 to {}", u32::MAX))
}

fn load(settings: &Settings, connections: Option<NonZeroU32>) -> Load {
    let asked = connections.or(settings.max_connections).map(NonZeroU32::get);
    let connections = asked.unwrap_or_else(|| settings.connection_limit());
    let unlimited = Settings { open_files: None, ..settings.clone() };
    let reserved_files =
        |settings: &Settings| u64::from(settings.reserved_files() + rejection_slots(connections));
    Load {
        connections: connections.into(),
        channels: u64::from(connections).min(settings.max_channels.get() as u64),
        reserved_files: reserved_files(settings),
        reserved_files_unlimited: reserved_files(&unlimited),
        addresses: settings.listen.len() as u64,
        base_memory: settings.base_memory(),
    }
}

/// Replaces the limits of this shell by those of the unit.
fn apply_unit_limits(unit: Unit, host: &mut Host, mut settings: Settings) -> Settings {
    settings.open_files = unit.files.and_then(|limit| u32::try_from(limit).ok());
    settings.memory.cgroup = unit.memory;
    (host.files, host.cgroup, host.unit) = (unit.files, unit.memory, Some(unit.name));
    settings
}

fn examine(settings: &Settings, host: &Host, connections: Option<NonZeroU32>) -> Report {
    let load = load(settings, connections);
    let mut text = format!("fanfare {} for {} connections\n", env!("CARGO_PKG_VERSION"), load.connections);
    let mut findings = host_checks::check(host, &load);
    text += &section("This host", &findings);
    match &settings.redis {
        None => {
            text += "\nNo Redis (--redis): this node stands alone, and its history is lost when it stops.\n"
        }
        Some(url) => {
            for (address, of_redis) in examine_redis(settings, url) {
                let title = address
                    .map_or_else(|| format!("Redis, {url}"), |address| format!("Redis, {address} of {url}"));
                text += &section(&title, &of_redis);
                findings.extend(of_redis);
            }
        }
    }
    text += &summary(&findings);
    Report { text, has_problems: findings.iter().any(|finding| finding.level == Level::Problem) }
}

/// The findings of a Redis, or of each primary of a cluster with its address.
fn examine_redis(settings: &Settings, url: &RedisUrl) -> Vec<(Option<String>, Vec<Finding>)> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.expect("a runtime needs an epoll and a pipe");
    match runtime.block_on(inspect::inspect(settings, url)) {
        Ok(servers) => {
            let check = |inspected| match inspected {
                Ok(facts) => redis_checks::check(&facts, settings),
                Err(text) => vec![Finding::problem("connection", text)],
            };
            servers.into_iter().map(|(address, inspected)| (address, check(inspected))).collect()
        }
        Err(text) => vec![(None, vec![Finding::problem("connection", text)])],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn docs_show_a_current_report() {
        let Ok(Action::Run(settings)) = Settings::from(["--shards", "4"].map(Into::into), []) else {
            panic!("good settings")
        };
        let mut host = Host { somaxconn: Some(4096), ..Host::good() };
        let unit = Unit { name: "fanfare.service".into(), files: Some(16_384), memory: None };
        let settings = apply_unit_limits(unit, &mut host, settings);
        let findings = host_checks::check(&host, &load(&settings, NonZeroU32::new(50_000)));
        let findings: Vec<_> = findings.into_iter().filter(|finding| finding.level != Level::Ok).collect();
        let shown = format!("```text\n{}```\n", section("", &findings).trim_start_matches('\n'));
        let docs = include_str!("../../../docs/deployment.md");
        assert!(docs.contains(&shown), "docs/deployment.md should show:\n{shown}");
    }
}
