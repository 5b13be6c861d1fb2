//! The limits of the installed service.

use std::process::{Command, Stdio};

/// Limits that systemd sets for `fanfare.service`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unit {
    /// `LimitNOFILE=`
    pub files: Option<u64>,
    /// `MemoryMax=`; `None` without a limit.
    pub memory: Option<u64>,
}

impl Unit {
    /// Asks systemd. `None` if the unit is not installed, or systemd does not run.
    pub fn read() -> Option<Unit> {
        let mut command = Command::new("systemctl");
        command.args(["show", "fanfare.service", "--property=LoadState,LimitNOFILE,MemoryMax"]);
        let output = command.stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
        Unit::parse(&String::from_utf8_lossy(&output.stdout))
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
