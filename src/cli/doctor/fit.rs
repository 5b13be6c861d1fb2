//! Whether this host has what so many connections need. Numbers in, findings out.

use super::finding::Finding;
use super::host::Host;
use crate::config::{CONNECTION_IN_KERNEL, CONNECTION_IN_PROCESS};
use crate::node::accept::SEND_BUFFER;

/// What one takes that has stalled with a full send buffer; the kernel counts double (socket(7)).
const STALLED: u64 = 2 * SEND_BUFFER as u64;
/// One in so many may stall at once before the kernel is short of memory for all. Others who read slowly hold less.
const STALLING: u64 = 100;
/// The longest queue of connections to be accepted that a node asks for.
const QUEUE: u64 = 65_535;

/// What a node is to carry.
#[derive(Clone, Debug)]
pub struct Load {
    /// Clients at once.
    pub connections: u64,
    /// Descriptors for everything else, under the limit that holds now.
    pub own_files: u64,
    /// The same without a limit: the admin listener then serves more clients.
    pub own_files_unlimited: u64,
    /// Public addresses.
    pub addresses: u64,
    /// What the node takes without any client, at most, in bytes.
    pub own_memory: u64,
}

/// Everything about the host.
pub fn judge(host: &Host, load: &Load) -> Vec<Finding> {
    let mut findings =
        vec![open_files(host, load), files_of_host(host, load), watches(host, load), memory(host, load)];
    findings.extend([tcp_memory(host, load), accept_queue(host, load), handshakes(host, load)]);
    findings.extend([ports(host, load), conntrack(host, load)]);
    findings
}

fn sysctl(name: &str, value: impl std::fmt::Display) -> String {
    format!("/etc/sysctl.d/99-fanfare.conf: {name} = {value}")
}

fn open_files(host: &Host, load: &Load) -> Finding {
    const WHAT: &str = "open files";
    let needed = load.connections + load.own_files;
    let Some(most) = host.files else { return Finding::unread(WHAT, "ulimit -n") };
    let whose = "of this shell; a service has its own, LimitNOFILE";
    if most >= needed {
        return Finding::ok(WHAT, format!("{needed} needed, {} allowed (the limit {whose})", shown(most)));
    }
    let needed = load.connections + load.own_files_unlimited;
    let text = format!(
        "{needed} needed, one for each connection and {} for the node itself, but {most} allowed (the limit {whose}): \
         {} clients will be turned away",
        load.own_files_unlimited,
        needed - most,
    );
    let mut finding = Finding::problem(WHAT, text);
    if host.files_a_process.is_some_and(|most| most < needed) {
        finding = finding.remedy(sysctl("fs.nr_open", needed.next_power_of_two()));
    }
    finding
        .remedy(format!("fanfare.service: LimitNOFILE={needed}"))
        .remedy(format!("or as root, before fanfare is started: ulimit -n {needed}"))
}

fn shown(limit: u64) -> String {
    if limit == u64::MAX { "any number".into() } else { limit.to_string() }
}

fn files_of_host(host: &Host, load: &Load) -> Finding {
    const WHAT: &str = "files of the host";
    let needed = load.connections + load.own_files;
    let Some((used, most)) = host.files_of_host else { return Finding::unread(WHAT, "sysctl fs.file-max") };
    if most.saturating_sub(used) >= needed {
        let most = if most > 1 << 40 { "no limit".into() } else { format!("{most} at most") };
        return Finding::ok(WHAT, format!("{used} open now, {most}"));
    }
    let text = format!("{used} are open now and {most} allowed: too few for {needed} more");
    Finding::problem(WHAT, text).remedy(sysctl("fs.file-max", used + 2 * needed))
}

fn watches(host: &Host, load: &Load) -> Finding {
    const WHAT: &str = "epoll watches";
    let Some(most) = host.watches else { return Finding::unread(WHAT, "sysctl fs.epoll.max_user_watches") };
    // All processes of the user share them.
    if most >= load.connections {
        return Finding::ok(WHAT, format!("{most} allowed for each user"));
    }
    let text = format!("{most} allowed for each user, and every connection takes one");
    Finding::problem(WHAT, text).remedy(sysctl("fs.epoll.max_user_watches", 2 * load.connections))
}

fn memory(host: &Host, load: &Load) -> Finding {
    const WHAT: &str = "memory";
    let Some(free) = host.memory else { return Finding::unread(WHAT, "MemAvailable in /proc/meminfo") };
    let (have, whose) = match host.cgroup {
        Some(left) if left < free => (left, "left by the limit of this cgroup"),
        _ => (free, "to be had on this host"),
    };
    let each = CONNECTION_IN_PROCESS + CONNECTION_IN_KERNEL;
    let needed = load.own_memory.saturating_add(load.connections * each);
    let text = format!(
        "up to {} needed: {} for the node, its recent events and what waits for the bus, {} for {} idle connections \
         ({CONNECTION_IN_PROCESS} bytes of ours and {CONNECTION_IN_KERNEL} of the kernel's each); {} {whose}",
        about(needed),
        about(load.own_memory),
        about(load.connections * each),
        load.connections,
        about(have),
    );
    let fits = have.saturating_sub(load.own_memory) / each;
    if needed > have {
        let remedy =
            format!("more memory (MemoryMax= of the unit), a smaller --buffer-memory, or {fits} connections");
        Finding::problem(WHAT, text).remedy(remedy)
    } else if needed > have / 5 * 4 {
        Finding::warning(WHAT, text + ": that leaves little for clients that stall")
            .remedy(format!("more memory (MemoryMax= of the unit), or {} connections", fits / 5 * 4))
    } else {
        Finding::ok(WHAT, text)
    }
}

/// A size for people: two digits at least, in the largest unit that allows it.
fn about(bytes: u64) -> String {
    let units = [(30, "GiB"), (20, "MiB"), (10, "KiB")];
    let (shift, unit) = units.into_iter().find(|(shift, _)| bytes >> shift >= 10).unwrap_or((0, " bytes"));
    format!("{}{unit}", bytes >> shift)
}

fn tcp_memory(host: &Host, load: &Load) -> Finding {
    const WHAT: &str = "TCP memory";
    let (Some(have), Some(page)) = (host.tcp_memory, host.page) else {
        return Finding::unread(WHAT, "sysctl net.ipv4.tcp_mem");
    };
    // A socket is charged a whole page while as much as one short event has not been acknowledged.
    let all = load.connections * page;
    let wanted = all + load.connections.div_ceil(STALLING) * STALLED;
    let text = format!(
        "{} for all sockets (net.ipv4.tcp_mem), of which an event to everybody takes {} until clients have it: then {} \
         clients may stall at once, each with {} in its send buffer",
        about(have),
        about(all),
        have.saturating_sub(all) / STALLED,
        about(STALLED),
    );
    if have >= wanted {
        return Finding::ok(WHAT, text);
    }
    let text = text + "; past that the kernel drops segments of all. One in a hundred should be able to";
    if host.memory.is_some_and(|memory| wanted > memory / 2) {
        let text = format!("{text}: with {} connections that takes {}", load.connections, about(wanted));
        return Finding::warning(WHAT, text).remedy("more memory, or fewer connections on more nodes");
    }
    let pages = wanted.div_ceil(page);
    let three = format!("{} {} {pages}", pages / 2, pages / 4 * 3);
    Finding::warning(WHAT, text).remedy(sysctl("net.ipv4.tcp_mem", three))
}

fn accept_queue(host: &Host, load: &Load) -> Finding {
    const WHAT: &str = "accept queue";
    let Some(most) = host.somaxconn else { return Finding::unread(WHAT, "sysctl net.core.somaxconn") };
    let wanted = load.connections.min(QUEUE);
    let text = format!("{} clients may wait to be accepted when all come back at once", most.min(QUEUE));
    if most >= wanted {
        return Finding::ok(WHAT, text);
    }
    let text = text + "; the others try again after a second, then after three";
    Finding::warning(WHAT, text).remedy(sysctl("net.core.somaxconn", QUEUE))
}

fn handshakes(host: &Host, load: &Load) -> Finding {
    const WHAT: &str = "TCP handshakes";
    let (Some(most), Some(cookies)) = (host.syn_backlog, host.syn_cookies) else {
        return Finding::unread(WHAT, "sysctl net.ipv4.tcp_max_syn_backlog net.ipv4.tcp_syncookies");
    };
    if cookies {
        return Finding::ok(WHAT, "any number may be under way (net.ipv4.tcp_syncookies is on)");
    }
    if most >= load.connections.min(QUEUE) {
        return Finding::ok(WHAT, format!("{most} may be under way"));
    }
    let text = format!(
        "{most} may be under way, and tcp_syncookies is off: a storm, or an attack, keeps others out"
    );
    Finding::warning(WHAT, text).remedy(sysctl("net.ipv4.tcp_syncookies", 1))
}

fn ports(host: &Host, load: &Load) -> Finding {
    const WHAT: &str = "ports of a proxy";
    // Above the ports that nodes listen on.
    const MOST: u64 = 65_535 - 10_240 + 1;
    let Some((first, last)) = host.ports else {
        return Finding::unread(WHAT, "sysctl net.ipv4.ip_local_port_range, on the proxy's host");
    };
    let each = (last + 1).saturating_sub(first);
    let (addresses, connections) = (load.addresses, load.connections);
    let text = format!(
        "a proxy with the port range of this host has {} connections at most, from one address of its own to the {} of \
         --listen",
        each * addresses,
        if addresses == 1 { "one".into() } else { addresses.to_string() },
    );
    if each * addresses >= connections {
        return Finding::ok(WHAT, text);
    }
    let mut finding = Finding::warning(WHAT, text + "; clients that come without a proxy are not concerned");
    if each < MOST {
        finding = finding.remedy(
            "on the proxy's host, ".to_owned() + &sysctl("net.ipv4.ip_local_port_range", "10240 65535"),
        );
    }
    let wanted = connections.div_ceil(MOST);
    if wanted > addresses {
        finding = finding
            .remedy(format!("{wanted} addresses of this node in --listen, each in the proxy's upstream"));
    }
    finding
}

fn conntrack(host: &Host, load: &Load) -> Finding {
    const WHAT: &str = "conntrack";
    let Some((count, most)) = host.tracked else {
        return Finding::ok(WHAT, "not loaded, so that nothing is tracked");
    };
    let wanted = count + load.connections;
    let text = format!("{most} connections may be tracked, {count} are now");
    if most >= wanted + wanted / 4 {
        return Finding::ok(WHAT, text);
    }
    let text = text + ": when the table is full, the kernel drops new connections";
    let remedy = sysctl("net.netfilter.nf_conntrack_max", (2 * wanted).next_power_of_two());
    let finding = if most < wanted { Finding::problem(WHAT, text) } else { Finding::warning(WHAT, text) };
    finding.remedy(remedy).remedy("or take the ports of --listen out of tracking (nftables: notrack)")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::finding::Level;

    fn load(connections: u64) -> Load {
        Load { connections, own_files: 100, own_files_unlimited: 100, addresses: 1, own_memory: 100 << 20 }
    }

    fn good() -> Host {
        Host {
            files: Some(2_000_000),
            files_a_process: Some(2_000_000),
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

    fn levels(host: &Host, connections: u64) -> Vec<(&'static str, Level)> {
        let findings = judge(host, &load(connections));
        let bad = findings.iter().filter(|finding| finding.level != Level::Ok);
        assert!(bad.clone().all(|finding| !finding.remedy.is_empty()), "it says what to do: {findings:?}");
        bad.map(|finding| (finding.what, finding.level)).collect()
    }

    #[test]
    fn each_want_is_found_alone() {
        assert_eq!(levels(&good(), 50_000), []);
        for (host, found) in [
            (Host { files: Some(50_099), ..good() }, ("open files", Level::Problem)),
            (Host { files_of_host: Some((1000, 51_000)), ..good() }, ("files of the host", Level::Problem)),
            (Host { watches: Some(49_999), ..good() }, ("epoll watches", Level::Problem)),
            (Host { somaxconn: Some(4096), ..good() }, ("accept queue", Level::Warning)),
            (Host { syn_cookies: Some(false), ..good() }, ("TCP handshakes", Level::Warning)),
            (Host { ports: Some((32_768, 60_999)), ..good() }, ("ports of a proxy", Level::Warning)),
            (Host { tcp_memory: Some(300 << 20), ..good() }, ("TCP memory", Level::Warning)),
            (
                Host { memory: Some(300 << 20), tcp_memory: Some(2 << 30), ..good() },
                ("memory", Level::Problem),
            ),
            (Host { cgroup: Some(300 << 20), ..good() }, ("memory", Level::Problem)),
            (Host { cgroup: Some(330 << 20), ..good() }, ("memory", Level::Warning)),
            (Host { tracked: Some((100, 50_000)), ..good() }, ("conntrack", Level::Problem)),
            (Host { tracked: Some((100, 60_000)), ..good() }, ("conntrack", Level::Warning)),
        ] {
            assert_eq!(levels(&host, 50_000), [found], "{host:?}");
        }
    }

    #[test]
    fn what_cannot_be_read_is_said_with_what_to_look_at() {
        let findings = judge(&Host::default(), &load(1000));
        for finding in findings.iter().filter(|finding| finding.what != "conntrack") {
            assert_eq!(finding.level, Level::Warning);
            assert!(finding.found.contains("by hand"), "{finding:?}");
        }
    }

    #[test]
    fn the_limit_of_all_processes_comes_before_that_of_one() {
        let host = Host { files: Some(1024), files_a_process: Some(10_000), ..good() };
        let finding = open_files(&host, &load(20_000));
        assert_eq!(finding.remedy[0], "/etc/sysctl.d/99-fanfare.conf: fs.nr_open = 32768");
        assert_eq!(finding.remedy[1], "fanfare.service: LimitNOFILE=20100");
        assert!(finding.remedy[2].starts_with("or as root"), "{finding:?}");
    }

    #[test]
    fn a_million_behind_a_proxy_needs_many_addresses() {
        let finding = ports(&good(), &load(1_000_000));
        assert_eq!(finding.remedy, ["19 addresses of this node in --listen, each in the proxy's upstream"]);
        let small = ports(&Host { ports: Some((32_768, 60_999)), ..good() }, &load(28_232));
        assert_eq!(small.level, Level::Ok);
    }

    #[test]
    fn tcp_memory_that_would_take_half_of_all_is_not_advised() {
        let host = Host { tcp_memory: Some(1 << 20), memory: Some(1 << 30), ..good() };
        assert_eq!(
            tcp_memory(&host, &load(200_000)).remedy,
            ["more memory, or fewer connections on more nodes"]
        );
        let finding = tcp_memory(&host, &load(10_000));
        assert_eq!(finding.remedy, ["/etc/sysctl.d/99-fanfare.conf: net.ipv4.tcp_mem = 8200 12300 16400"]);
    }

    #[test]
    fn sizes_keep_two_digits() {
        assert_eq!(
            [about(999), about(10_240), about(25 << 30), about(9 << 30)],
            ["999 bytes", "10KiB", "25GiB", "9216MiB"]
        );
    }
}
