//! The server's processes: found by the port they listen on, measured in /proc.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use crate::config::cgroup::kibibytes;

/// CPU and memory of the server, at one moment.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// CPU time of all its threads, in nanoseconds.
    pub cpu: u64,
    /// Resident memory, and the private anonymous part of it, in bytes.
    pub resident: u64,
    pub anonymous: u64,
    /// Memory of the kernel for all TCP sockets of this machine, in bytes.
    pub sockets: u64,
}

/// The processes that are measured.
#[derive(Clone, Debug, Default)]
pub struct Server {
    pub pids: Vec<u32>,
}

impl Server {
    /// These processes, or those that listen on the addresses if they are of this machine.
    pub fn find(pids: &[u32], addrs: &[SocketAddr]) -> Server {
        if !pids.is_empty() {
            return Server { pids: pids.to_vec() };
        }
        let inodes = addrs.iter().flat_map(|addr| listening(*addr)).collect();
        // systemd holds the sockets of its units, too.
        let excluded = [1, std::process::id()];
        let mut pids: Vec<u32> =
            processes().filter(|pid| !excluded.contains(pid) && holds(*pid, &inodes)).collect();
        pids.sort_unstable();
        Server { pids }
    }

    /// Names and ids of the processes.
    pub fn names(&self) -> String {
        let name = |pid: &u32| {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            format!("{} (pid {pid})", name.trim())
        };
        match &self.pids[..] {
            [] => "no process on this machine: --pid measures one".into(),
            [first] => name(first),
            [first, rest @ ..] => format!("{} and {} more", name(first), rest.len()),
        }
    }

    /// What the processes use now. Those that have ended count nothing.
    pub fn usage(&self) -> Usage {
        let mut usage = Usage { sockets: socket_memory(), ..Usage::default() };
        for pid in &self.pids {
            usage.cpu += cpu(*pid);
            let memory = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
            usage.resident += kibibytes(&memory, "Rss:").unwrap_or(0);
            // Private anonymous pages; those that a child shares with its parent are not its own.
            usage.anonymous += kibibytes(&memory, "Anonymous:").unwrap_or(0);
        }
        usage
    }
}

/// CPU time of all threads, in nanoseconds: more exact than the ticks of /proc/PID/stat.
fn cpu(pid: u32) -> u64 {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return 0 };
    let spent = |path: &Path| {
        let text = fs::read_to_string(path.join("schedstat")).ok()?;
        text.split(' ').next()?.parse::<u64>().ok()
    };
    tasks.flatten().filter_map(|task| spent(&task.path())).sum()
}

/// Pages of 4 KiB in `mem` of the TCP line of /proc/net/sockstat, in bytes.
fn socket_memory() -> u64 {
    let text = fs::read_to_string("/proc/net/sockstat").unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with("TCP:")).unwrap_or_default();
    let mut words = line.split_whitespace().skip_while(|word| *word != "mem");
    let pages = words.nth(1).and_then(|pages| pages.parse::<u64>().ok());
    pages.unwrap_or_default() * rustix::param::page_size() as u64
}

fn processes() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// Inodes of the sockets that listen on this address, or on all addresses of its port.
fn listening(addr: SocketAddr) -> BTreeSet<String> {
    let mut inodes = BTreeSet::new();
    for file in ["/proc/net/tcp", "/proc/net/tcp6"] {
        let text = fs::read_to_string(file).unwrap_or_default();
        inodes.extend(text.lines().skip(1).filter_map(|line| listening_inode(line, addr)));
    }
    inodes
}

/// The inode of a line of /proc/net/tcp, if it is of a socket that listens on the address.
fn listening_inode(line: &str, addr: SocketAddr) -> Option<String> {
    const LISTEN: &str = "0A";
    let fields: Vec<&str> = line.split_whitespace().collect();
    let (ip, port) = fields.get(1)?.split_once(':')?;
    let is_port = u16::from_str_radix(port, 16).ok()? == addr.port();
    let is_any = ip.bytes().all(|byte| byte == b'0');
    let is_this = match addr.ip() {
        IpAddr::V4(ip_of) => ip == format!("{:08X}", u32::from_ne_bytes(ip_of.octets())),
        IpAddr::V6(_) => ip.len() == 32,
    };
    let found = *fields.get(3)? == LISTEN && is_port && (is_any || is_this);
    found.then(|| fields.get(9).map(|inode| format!("socket:[{inode}]"))).flatten()
}

fn holds(pid: u32, inodes: &BTreeSet<String>) -> bool {
    let Ok(files) = fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    let target = |path: &Path| fs::read_link(path).ok()?.to_str().map(str::to_owned);
    files.flatten().filter_map(|file| target(&file.path())).any(|target| inodes.contains(&target))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_its_own_listener() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let inodes = listening(listener.local_addr().unwrap());
        assert!(inodes.len() == 1 && holds(std::process::id(), &inodes), "{inodes:?}");
        let usage = Server { pids: vec![std::process::id()] }.usage();
        assert!(usage.cpu > 0 && usage.resident >= usage.anonymous && usage.anonymous > 0, "{usage:?}");
    }
}
