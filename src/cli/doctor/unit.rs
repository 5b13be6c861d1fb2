//! The limits of the installed service.

use std::io;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

/// Longest wait for `systemctl`, which answers in milliseconds. It waits longer for a systemd that
/// hangs.
const SYSTEMCTL_TIMEOUT: Duration = Duration::from_secs(5);

/// A unit of fanfare, and the limits that systemd sets for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unit {
    pub name: String,
    /// `LimitNOFILE=`
    pub files: Option<u64>,
    /// `MemoryMax=`; `None` without a limit.
    pub memory: Option<u64>,
}

impl Unit {
    /// Asks systemd for `fanfare.service` and for instances like `fanfare@8081.service`. Of several
    /// units the one with the lowest limits, of those that run if any does. `None` if none is
    /// installed, or systemd does not run or answer.
    pub fn read() -> Option<Unit> {
        let mut command = Command::new("systemctl");
        command.args(["show", "fanfare.service", "fanfare@*.service"]);
        command.arg("--property=Id,LoadState,ActiveState,LimitNOFILE,MemoryMax");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut systemctl = command.spawn().ok()?;
        let stdout = systemctl.stdout.take()?;
        let (send, shown) = mpsc::channel();
        thread::spawn(move || send.send(io::read_to_string(stdout)));
        let shown = shown.recv_timeout(SYSTEMCTL_TIMEOUT);
        let _ = systemctl.kill(); // fails only if it has exited
        let _ = systemctl.wait();
        Unit::choose(&shown.ok()?.ok()?)
    }

    /// `shown` has a block of lines for each unit.
    fn choose(shown: &str) -> Option<Unit> {
        let units = shown.split("\n\n").filter_map(Unit::parse);
        let rank = |(runs, unit): &(bool, Unit)| {
            (!runs, unit.files.unwrap_or(u64::MAX), unit.memory.unwrap_or(u64::MAX))
        };
        units.min_by_key(rank).map(|(_, unit)| unit)
    }

    /// A loaded unit, and whether it runs.
    fn parse(shown: &str) -> Option<(bool, Unit)> {
        let value = |name| shown.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        let number = |name| match value(name)? {
            "infinity" => Some(u64::MAX),
            number => number.parse().ok(),
        };
        if value("LoadState")? != "loaded" {
            return None;
        }
        let memory = number("MemoryMax").filter(|limit| *limit < u64::MAX);
        let unit = Unit { name: value("Id")?.into(), files: number("LimitNOFILE"), memory };
        Some((value("ActiveState") == Some("active"), unit))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unit(name: &str, files: u64, memory: Option<u64>) -> Option<Unit> {
        Some(Unit { name: name.into(), files: Some(files), memory })
    }

    #[test]
    fn reads_the_limits_of_a_loaded_unit() {
        let found = Unit::choose("Id=a\nLoadState=loaded\nMemoryMax=1073741824\nLimitNOFILE=1048576\n");
        assert_eq!(found, unit("a", 1 << 20, Some(1 << 30)));
        let found = Unit::choose("LimitNOFILE=infinity\nMemoryMax=infinity\nLoadState=loaded\nId=a\n");
        assert_eq!(found, unit("a", u64::MAX, None));
        let absent = "Id=a\nLoadState=not-found\nMemoryMax=infinity\nLimitNOFILE=524288\n";
        assert_eq!(Unit::choose(absent), None);
        assert_eq!(Unit::choose(""), None);
    }

    #[test]
    fn lowest_limits_of_running_units_count() {
        let block = |name: &str, state: &str, files: u64, memory: &str| {
            format!(
                "Id={name}\nLoadState=loaded\nActiveState={state}\nLimitNOFILE={files}\nMemoryMax={memory}\n"
            )
        };
        let service = block("fanfare.service", "inactive", 10, "5");
        assert_eq!(Unit::choose(&service), unit("fanfare.service", 10, Some(5)));
        let a = block("fanfare@8081.service", "active", 1000, "infinity");
        let b = block("fanfare@8082.service", "active", 1000, "100");
        for shown in [[&service, &a, &b], [&b, &a, &service]] {
            let shown = shown.map(String::as_str).join("\n");
            assert_eq!(Unit::choose(&shown), unit("fanfare@8082.service", 1000, Some(100)));
        }
        assert_eq!(Unit::choose(&[service, a].join("\n")), unit("fanfare@8081.service", 1000, None));
    }
}
