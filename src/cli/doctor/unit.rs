//! The limits of the installed service.

use std::io;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

/// Longest wait for `systemctl`, which answers in milliseconds. It waits longer for a systemd that
/// hangs.
const SYSTEMCTL_TIMEOUT: Duration = Duration::from_secs(5);

/// Limits that systemd sets for `fanfare.service`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unit {
    /// `LimitNOFILE=`
    pub files: Option<u64>,
    /// `MemoryMax=`; `None` without a limit.
    pub memory: Option<u64>,
}

impl Unit {
    /// Asks systemd. `None` if the unit is not installed, or systemd does not run or answer.
    pub fn read() -> Option<Unit> {
        let mut command = Command::new("systemctl");
        command.args(["show", "fanfare.service", "--property=LoadState,LimitNOFILE,MemoryMax"]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut systemctl = command.spawn().ok()?;
        let stdout = systemctl.stdout.take()?;
        let (send, shown) = mpsc::channel();
        thread::spawn(move || send.send(io::read_to_string(stdout)));
        let shown = shown.recv_timeout(SYSTEMCTL_TIMEOUT);
        let _ = systemctl.kill(); // fails only if it has exited
        let _ = systemctl.wait();
        Unit::parse(&shown.ok()?.ok()?)
    }

    fn parse(shown: &str) -> Option<Unit> {
        let value = |name| shown.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        let number = |name| match value(name)? {
            "infinity" => Some(u64::MAX),
            number => number.parse().ok(),
        };
        let memory = number("MemoryMax").filter(|limit| *limit < u64::MAX);
        (value("LoadState")? == "loaded").then(|| Unit { files: number("LimitNOFILE"), memory })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_limits_of_a_loaded_unit() {
        let unit = Unit::parse("LoadState=loaded\nMemoryMax=1073741824\nLimitNOFILE=1048576\n");
        assert_eq!(unit, Some(Unit { files: Some(1 << 20), memory: Some(1 << 30) }));
        let unit = Unit::parse("LimitNOFILE=infinity\nMemoryMax=infinity\nLoadState=loaded\n");
        assert_eq!(unit, Some(Unit { files: Some(u64::MAX), memory: None }));
        assert_eq!(Unit::parse("LoadState=not-found\nMemoryMax=infinity\nLimitNOFILE=524288\n"), None);
        assert_eq!(Unit::parse(""), None);
    }
}
