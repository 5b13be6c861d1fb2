//! Memory, CPU time and descriptors of this process, from proc(5). A number that can't be read is
//! left out.

use std::fs;

use crate::config::open_file_limit;

/// `utime` and `stime` count in these, on every architecture (`USER_HZ`).
const TICKS_PER_SECOND: f64 = 100.0;

#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Process {
    pub resident_bytes: Option<u64>,
    /// User and system time of all threads.
    pub cpu_seconds: Option<f64>,
    pub open_fds: Option<u64>,
    /// The limit on open descriptors.
    pub max_fds: Option<u64>,
}

impl Process {
    /// Before Linux 6.2 open descriptors are counted one by one, about 1 ms per thousand: not for
    /// threads that deliver events.
    pub fn read() -> Process {
        Process {
            resident_bytes: read("status", resident_bytes),
            cpu_seconds: read("stat", cpu_seconds),
            open_fds: open_fds(),
            max_fds: open_file_limit(),
        }
    }
}

fn read<T>(file: &str, parse: impl Fn(&str) -> Option<T>) -> Option<T> {
    parse(&fs::read_to_string(format!("/proc/self/{file}")).ok()?)
}

fn resident_bytes(status: &str) -> Option<u64> {
    let kibibytes =
        status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?.trim().strip_suffix(" kB")?;
    Some(kibibytes.trim().parse::<u64>().ok()? * 1024)
}

fn cpu_seconds(stat: &str) -> Option<f64> {
    // The second field is the name in brackets, which may contain blanks and brackets.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some((user + system) as f64 / TICKS_PER_SECOND)
}

fn open_fds() -> Option<u64> {
    match fs::metadata("/proc/self/fd").ok()?.len() {
        0 => fs::read_dir("/proc/self/fd").ok().map(|entries| entries.count() as u64),
        count => Some(count), // Linux 6.2 and newer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_proc_files() {
        assert_eq!(resident_bytes("Name:\tx\nVmRSS:\t    5124 kB\n"), Some(5124 * 1024));
        let stat = "7 (a) b) S 1 7 7 0 -1 4194304 100 0 0 0 250 150 0 0 20 0 1 0 100 1 1";
        assert_eq!(cpu_seconds(stat), Some(4.0));
        assert_eq!((resident_bytes(""), cpu_seconds("")), (None, None));
    }

    #[test]
    fn reads_its_own_process() {
        let before = Process::read();
        let files: Vec<_> = (0..20).map(|_| fs::File::open("/dev/null").unwrap()).collect();
        let after = Process::read();
        assert!(before.resident_bytes.unwrap() > 100_000 && before.cpu_seconds.is_some());
        assert!(after.open_fds.unwrap() >= files.len() as u64);
        assert!(after.max_fds.unwrap() > 0);
    }
}
