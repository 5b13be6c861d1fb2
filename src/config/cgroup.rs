//! The memory that this process may use, by its cgroups (version 1 and 2, cgroups(7)) and the
//! machine.

use std::fs;
use std::path::{Path, PathBuf};

/// Version 1 writes "no limit" as the largest number of whole pages.
const NO_LIMIT: u64 = 1 << 60;

/// Cgroups with a memory limit: that of this process and its ancestors.
#[derive(Clone, Debug, Default)]
pub struct Groups(Vec<Group>);

#[derive(Clone, Debug)]
struct Group {
    limit: u64,
    usage: PathBuf,
    stat: PathBuf,
    version: &'static Version,
}

#[derive(Debug, PartialEq, Eq)]
struct Version {
    limit: &'static str,
    usage: &'static str,
    /// Lines of `memory.stat` with the page cache of files, which the kernel frees before it kills
    /// a process.
    file_cache: [&'static str; 2],
}

static V1: Version = Version {
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    file_cache: ["total_inactive_file ", "total_active_file "],
};
static V2: Version =
    Version { limit: "memory.max", usage: "memory.current", file_cache: ["inactive_file ", "active_file "] };

impl Groups {
    /// Reads `/proc/self` and the mounted cgroups, below this root.
    pub fn read(root: &Path) -> Groups {
        let text = |path: &str| fs::read_to_string(root.join(path)).unwrap_or_default();
        let mounts = text("proc/self/mountinfo");
        let mut groups = Vec::new();
        for line in text("proc/self/cgroup").lines() {
            let Some((controllers, path)) = line.split_once(':').and_then(|(_, rest)| rest.split_once(':'))
            else {
                continue;
            };
            let version = match controllers {
                "" => &V2,
                _ if controllers.split(',').any(|name| name == "memory") => &V1,
                _ => continue,
            };
            let Some((top, below)) = mounts.lines().find_map(|line| mount(line, version)) else { continue };
            // In a container the path may be above the mount point. The mount is then the
            // container's own group.
            let path = Path::new(path).strip_prefix(below).unwrap_or(Path::new(""));
            let top = root.join(top.trim_start_matches('/'));
            groups.extend(path.ancestors().filter_map(|path| Group::read(&top.join(path), version)));
        }
        Groups(groups)
    }

    /// The smallest limit.
    pub fn limit(&self) -> Option<u64> {
        self.0.iter().map(|group| group.limit).min()
    }

    /// The least memory that any group has left. The page cache is read only if that seems to be
    /// less than `enough`.
    pub fn available(&self, enough: u64) -> Option<u64> {
        self.0.iter().filter_map(|group| group.available(enough)).min()
    }
}

impl Group {
    fn read(path: &Path, version: &'static Version) -> Option<Group> {
        let limit = number(&path.join(version.limit)).filter(|limit| *limit < NO_LIMIT)?;
        let (usage, stat) = (path.join(version.usage), path.join("memory.stat"));
        Some(Group { limit, usage, stat, version })
    }

    fn available(&self, enough: u64) -> Option<u64> {
        let used = number(&self.usage)?;
        let available = self.limit.saturating_sub(used);
        if available >= enough {
            return Some(available);
        }
        let stat = fs::read_to_string(&self.stat).unwrap_or_default();
        let value = |name| stat.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok());
        let cache: u64 = self.version.file_cache.into_iter().filter_map(value).sum();
        Some(self.limit.saturating_sub(used.saturating_sub(cache)))
    }
}

/// The mount point and root group of a line of mountinfo (proc(5)) that mounts the memory
/// controller of this version.
fn mount<'a>(line: &'a str, version: &Version) -> Option<(&'a str, &'a str)> {
    let (mount, filesystem) = line.split_once(" - ")?;
    let mut mount = mount.split(' ').skip(3);
    let (root, point) = (mount.next()?, mount.next()?);
    let mut filesystem = filesystem.split(' ');
    let has_memory = match filesystem.next()? {
        "cgroup2" => *version == V2,
        "cgroup" => *version == V1 && filesystem.nth(1)?.split(',').any(|name| name == "memory"),
        _ => false,
    };
    has_memory.then_some((point, root))
}

fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// The machine's memory (`/proc/meminfo`).
pub fn machine_memory() -> Option<u64> {
    kibibytes(&fs::read_to_string("/proc/meminfo").ok()?, "MemTotal:")
}

/// Memory of the machine that is free or can be freed without swapping (`/proc/meminfo`).
pub fn available_memory() -> Option<u64> {
    kibibytes(&fs::read_to_string("/proc/meminfo").ok()?, "MemAvailable:")
}

/// Parses the line `name  123 kB` of a file in /proc into bytes.
pub fn kibibytes(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}
