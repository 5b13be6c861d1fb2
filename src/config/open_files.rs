//! How the limit on open files is divided between connections, the admin listener and the node
//! itself.

use std::fs;
use std::num::NonZeroU32;

use super::{AdminAddr, SettingError, Settings};

/// Descriptors of a node without shards and connections. 23 are always open: standard streams,
/// signals, three runtimes, accept loop, admin listener. The others are for two connections to
/// Redis beside two that are closing, name lookups, key files, and the files of `/proc` that
/// `/metrics` reads.
const NODE: u32 = 43;
/// Descriptors of a shard: its epoll set, a second handle to register sockets with, and its ticker;
/// the epoll set of its runtime, also twice, the runtime's waker, and the signals, which every
/// runtime watches.
const SHARD: u32 = 7;
/// Most connections to the admin listener. A backend keeps a few of them open, a scraper one.
const ADMIN_MAX: u32 = 256;
/// With few descriptors, connections to the admin listener get an eighth of them, but at least
/// four.
const ADMIN_PART: u32 = 8;
const ADMIN_MIN: u32 = 4;
/// Connections above `--max-connections` hold a descriptor until their 503 is sent. There is one
/// slot for this many connections, with a minimum and a maximum.
const REJECTION_PART: u32 = 8;
const REJECTION_MIN: u32 = 8;
const REJECTION_MAX: u32 = 256;

/// Below this many connections a node warns if open files are the limit. Most systems allow a
/// service 500,000 descriptors.
const FEW_CONNECTIONS: u32 = 10_000;

impl Settings {
    /// Most connections of this node: `--max-connections`, or as many as fit into open files and
    /// memory. Never more than fit into open files, or clients could take the descriptors that a
    /// new connection to Redis needs.
    pub fn connection_limit(&self) -> u32 {
        let by_files = self.connections_by_open_files();
        let auto = || self.connections_by_memory();
        self.max_connections.map_or_else(auto, NonZeroU32::get).min(by_files)
    }

    /// Connections that fit into the limit on open files.
    fn connections_by_open_files(&self) -> u32 {
        self.open_files.map_or(u32::MAX, |limit| connections_in(limit.saturating_sub(self.reserved_files())))
    }

    /// What is wrong with the limit on open files, if the node can't start with it. With a few
    /// less it starts, then runs out of descriptors while it serves.
    pub fn open_files_problem(&self) -> Option<SettingError> {
        let limit = self.open_files?;
        let others = self.reserved_files() - self.admin_connections() + 1 + REJECTION_MIN;
        let needed = (others..).find(|files| *files >= others + self.admin_connections_in(*files))?;
        (limit < needed).then(|| SettingError {
            setting: "limit on open files".into(),
            problem: format!(
                "is {limit}, and a node with --shards {} needs at least {needed}: raise it \
                 (LimitNOFILE= in a unit, ulimit -n in a shell)",
                self.shards
            ),
        })
    }

    /// Whether the limit on open files, and not memory or a setting, allows only few connections.
    pub fn has_few_open_files(&self) -> bool {
        let by_files = self.connections_by_open_files();
        self.max_connections.is_none() && by_files < FEW_CONNECTIONS.min(self.connections_by_memory())
    }

    /// Descriptors for everything but clients' connections.
    pub fn reserved_files(&self) -> u32 {
        NODE + SHARD * self.shards.get() as u32 + self.listen.len() as u32 + self.admin_connections()
    }

    /// Most connections to the admin listener.
    pub fn admin_connections(&self) -> u32 {
        self.admin_connections_in(self.open_files.unwrap_or(u32::MAX))
    }

    fn admin_connections_in(&self, files: u32) -> u32 {
        match self.admin {
            AdminAddr::Off => 0,
            _ => (files / ADMIN_PART).clamp(ADMIN_MIN, ADMIN_MAX),
        }
    }
}

/// Slots for connections above a limit of this many, until their 503 is sent.
pub fn rejection_slots(connections: u32) -> u32 {
    (connections / REJECTION_PART).clamp(REJECTION_MIN, REJECTION_MAX)
}

/// Most connections that fit into this many descriptors together with their rejection slots. At
/// least one.
fn connections_in(files: u32) -> u32 {
    let part = files / (REJECTION_PART + 1) * REJECTION_PART;
    let fit = if part >= REJECTION_MIN * REJECTION_PART {
        part.max(files.saturating_sub(REJECTION_MAX))
    } else {
        files.saturating_sub(REJECTION_MIN)
    };
    fit.max(1)
}

/// The limit on open files of this process; `None` if it can't be read.
pub fn open_file_limit() -> Option<u64> {
    parse_open_file_limit(&fs::read_to_string("/proc/self/limits").ok()?)
}

/// The soft limit on open files in `/proc/self/limits` (proc(5)).
pub fn parse_open_file_limit(limits: &str) -> Option<u64> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    match line.split_ascii_whitespace().next()? {
        "unlimited" => Some(u64::MAX),
        limit => limit.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_and_rejection_slots_fit() {
        for files in (0..5000).chain([19_000, 1 << 20]) {
            let connections = connections_in(files);
            let all = connections + rejection_slots(connections);
            assert!(all <= files.max(REJECTION_MIN + 1), "{connections} of {files}");
            let more = connections + 1 + rejection_slots(connections + 1);
            // A division by nine may leave a few unused.
            assert!(more + REJECTION_PART > files, "{connections} of {files}");
        }
    }
    #[test]
    fn reads_the_limit_as_the_kernel_writes_it() {
        let limits =
            "Limit   Soft Limit  Hard Limit  Units\nMax open files            1024     4096    files\n";
        assert_eq!(parse_open_file_limit(limits), Some(1024));
        assert_eq!(parse_open_file_limit("Max open files  unlimited  unlimited  files\n"), Some(u64::MAX));
        assert_eq!(parse_open_file_limit(""), None);
        assert!(open_file_limit().unwrap() > 0);
    }
}
