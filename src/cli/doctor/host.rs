//! Facts about this host from `/proc` and `/sys`. Values that can't be read are `None`, never
//! guessed.

use std::fs;
use std::path::Path;

use crate::config::cgroup::{Groups, kibibytes};
use crate::config::parse_open_file_limit;

/// Facts about the host. Sizes in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Host {
    /// The installed unit if `files` and `cgroup` are its limits, not those of this process.
    pub unit: Option<String>,
    /// Open files that the process may have, after it raised its limit as far as allowed.
    pub files: Option<u64>,
    /// Most open files of any process (`fs.nr_open`).
    pub files_per_process: Option<u64>,
    /// Open files of the whole host: in use, and the limit (`fs.file-nr`).
    pub files_of_host: Option<(u64, u64)>,
    /// Sockets that the epolls of one user may watch (`fs.epoll.max_user_watches`).
    pub watches: Option<u64>,
    /// Connections that can wait to be accepted (`net.core.somaxconn`).
    pub somaxconn: Option<u64>,
    /// Handshakes that can be in progress (`net.ipv4.tcp_max_syn_backlog`).
    pub syn_backlog: Option<u64>,
    /// Whether more handshakes than that continue without memory (`net.ipv4.tcp_syncookies`).
    pub syn_cookies: Option<bool>,
    /// First and last port for outgoing connections (`net.ipv4.ip_local_port_range`).
    pub ports: Option<(u64, u64)>,
    /// Limit on the memory of all TCP buffers (`net.ipv4.tcp_mem`).
    pub tcp_memory: Option<u64>,
    /// Size of a page of memory.
    pub page: Option<u64>,
    /// Memory available without swapping (`MemAvailable`).
    pub memory: Option<u64>,
    /// Memory left by the limit of the process's cgroup; `None` also without a limit.
    pub cgroup: Option<u64>,
    /// Connections tracked, and the limit (`nf_conntrack`); `None` if the module is not loaded.
    pub tracked: Option<(u64, u64)>,
}

impl Host {
    /// Reads `/proc` and `/sys`, below this root.
    pub fn read(root: &Path) -> Host {
        let text = |path: &str| fs::read_to_string(root.join(path)).ok();
        let sysctl = |name: &str| text(&format!("proc/sys/{}", name.replace('.', "/")));
        let numbers = |name: &str| sysctl(name).map(|text| numbers(&text));
        let number = |name: &str| numbers(name)?.first().copied();
        let page = text("proc/self/smaps").and_then(|text| kibibytes(&text, "KernelPageSize:"));
        let conntrack = |name: &str| number(&format!("net.netfilter.nf_conntrack_{name}"));
        Host {
            unit: None,
            files: text("proc/self/limits").and_then(|text| parse_open_file_limit(&text)),
            files_per_process: number("fs.nr_open"),
            files_of_host: numbers("fs.file-nr").and_then(|found| Some((*found.first()?, *found.get(2)?))),
            watches: number("fs.epoll.max_user_watches"),
            somaxconn: number("net.core.somaxconn"),
            syn_backlog: number("net.ipv4.tcp_max_syn_backlog"),
            syn_cookies: number("net.ipv4.tcp_syncookies").map(|found| found > 0),
            ports: numbers("net.ipv4.ip_local_port_range")
                .and_then(|found| Some((*found.first()?, *found.get(1)?))),
            tcp_memory: numbers("net.ipv4.tcp_mem").and_then(|found| found.get(2)?.checked_mul(page?)),
            page,
            memory: text("proc/meminfo").and_then(|text| kibibytes(&text, "MemAvailable:")),
            cgroup: Groups::read(root).available(u64::MAX),
            tracked: conntrack("count").and_then(|count| Some((count, conntrack("max")?))),
        }
    }
}

#[cfg(test)]
impl Host {
    pub fn good() -> Host {
        Host {
            unit: None,
            files: Some(2_000_000),
            files_per_process: Some(2_000_000),
            files_of_host: Some((1000, u64::MAX)),
            watches: Some(10_000_000),
            somaxconn: Some(65_535),
            syn_backlog: Some(512),
            syn_cookies: Some(true),
            ports: Some((10_240, 65_535)),
            tcp_memory: Some(30 << 30),
            page: Some(4096),
            memory: Some(60 << 30),
            cgroup: None,
            tracked: None,
        }
    }
}

fn numbers(text: &str) -> Vec<u64> {
    text.split_ascii_whitespace().map_while(|number| number.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(test: &str, files: &[(&str, &str)]) -> Host {
        let root = std::env::temp_dir().join(format!("fanfare-{}-{test}", std::process::id()));
        for (path, text) in files {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let host = Host::read(&root);
        let _ = fs::remove_dir_all(root);
        host
    }

    #[test]
    fn reads_the_files_of_the_kernel() {
        let limits = "Limit   Soft Limit  Hard Limit  Units\nMax open files  1024  unlimited  files\n";
        let found = host(
            "kernel",
            &[
                ("proc/self/limits", limits),
                ("proc/sys/fs/nr_open", "1048576\n"),
                ("proc/sys/fs/file-nr", "1504\t0\t9223372036854775807\n"),
                ("proc/sys/net/ipv4/ip_local_port_range", "32768\t60999\n"),
                ("proc/sys/net/ipv4/tcp_mem", "287901\t383870\t575802\n"),
                ("proc/sys/net/ipv4/tcp_syncookies", "0\n"),
                ("proc/sys/net/netfilter/nf_conntrack_count", "7\n"),
                ("proc/sys/net/netfilter/nf_conntrack_max", "262144\n"),
                ("proc/self/smaps", "55-56 r--p\nSize: 4 kB\nKernelPageSize:        4 kB\n"),
                ("proc/meminfo", "MemTotal:  100 kB\nMemAvailable:     80 kB\n"),
                ("proc/self/cgroup", "0::/system.slice/fanfare.service\n"),
                ("proc/self/mountinfo", "31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"),
                ("sys/fs/cgroup/system.slice/memory.max", "1000\n"),
                ("sys/fs/cgroup/system.slice/memory.current", "400\n"),
                ("sys/fs/cgroup/system.slice/fanfare.service/memory.max", "max\n"),
                ("sys/fs/cgroup/system.slice/fanfare.service/memory.current", "300\n"),
            ],
        );
        let expected = Host {
            files: Some(1024),
            files_per_process: Some(1_048_576),
            files_of_host: Some((1504, i64::MAX as u64)),
            ports: Some((32_768, 60_999)),
            tcp_memory: Some(575_802 * 4096),
            syn_cookies: Some(false),
            page: Some(4096),
            memory: Some(80 * 1024),
            cgroup: Some(600),
            tracked: Some((7, 262_144)),
            ..Host::default()
        };
        assert_eq!(found, expected);
    }

    #[test]
    fn reads_cgroups_of_version_1() {
        let cgroups = "9:name=systemd:/\n4:cpu,memory:/a/b\n0::/\n";
        let limit = "sys/fs/cgroup/memory/a/b/memory.limit_in_bytes";
        let used = ("sys/fs/cgroup/memory/a/b/memory.usage_in_bytes", "1\n");
        let group = ("proc/self/cgroup", cgroups);
        let mount =
            |group: &str| format!("35 31 0:32 {group} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n");
        let mounts = mount("/");
        let mounts = ("proc/self/mountinfo", mounts.as_str());
        assert_eq!(host("one", &[group, mounts, used, (limit, "10\n")]).cgroup, Some(9));
        assert_eq!(host("none", &[group, mounts, used, (limit, "9223372036854771712\n")]).cgroup, None);
        // The page cache counts as available.
        let used = ("sys/fs/cgroup/memory/a/b/memory.usage_in_bytes", "8\n");
        let stat =
            ("sys/fs/cgroup/memory/a/b/memory.stat", "cache 5\ntotal_inactive_file 3\ntotal_active_file 1\n");
        assert_eq!(host("cache", &[group, mounts, used, stat, (limit, "10\n")]).cgroup, Some(6));
        // In a container the mount starts at its own group.
        let container = mount("/a/b");
        let container = ("proc/self/mountinfo", container.as_str());
        let limit = "sys/fs/cgroup/memory/memory.limit_in_bytes";
        let used = ("sys/fs/cgroup/memory/memory.usage_in_bytes", "1\n");
        assert_eq!(host("container", &[group, container, used, (limit, "10\n")]).cgroup, Some(9));
    }

    #[test]
    fn missing_files_are_none() {
        assert_eq!(host("nothing", &[]), Host::default());
        let this = Host::read(Path::new("/"));
        assert!(this.files.is_some() && this.memory.is_some() && this.tcp_memory.is_some(), "{this:?}");
    }
}
