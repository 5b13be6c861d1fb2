//! Whether this host has what the connections need: facts in, findings out.

use super::finding::Finding;
use super::host::Host;
use crate::config::{CHANNEL, CONNECTION_IN_KERNEL, CONNECTION_IN_PROCESS};
use crate::node::accept::{BACKLOG, SEND_BUFFER};

/// Kernel memory of a stalled connection with a full send buffer, which the kernel counts twice
/// (socket(7)).
const STALLED: u64 = 2 * SEND_BUFFER as u64;
/// One in this many connections may stall at once before TCP memory runs out. Slow readers hold
/// less.
const STALLED_PART: u64 = 100;
/// The longest accept queue that a node asks for.
const QUEUE: u64 = BACKLOG as u64;
/// First port for outgoing connections in systemd/99-fanfare.conf: above the ports that nodes
/// listen on.
const FIRST_PORT: u64 = 10_240;
const LAST_PORT: u64 = 65_535;

/// What the node needs.
#[derive(Clone, Debug)]
pub struct Load {
    /// Connections at once.
    pub connections: u64,
    /// Most channels that these connections can be in.
    pub channels: u64,
    /// Descriptors for everything else, under the current limit.
    pub reserved_files: u64,
    /// The same without a limit: the admin listener then accepts more connections.
    pub reserved_files_unlimited: u64,
    /// Public addresses.
    pub addresses: u64,
    /// Most memory of the node without connections and channels, in bytes.
    pub base_memory: u64,
}

/// All checks of the host.
pub fn check(host: &Host, load: &Load) -> Vec<Finding> {
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
    const SUBJECT: &str = "open files";
    let needed = load.connections + load.reserved_files;
    let Some(most) = host.files else { return Finding::unreadable(SUBJECT, "ulimit -n") };
    let scope = match &host.unit {
        Some(name) => format!("LimitNOFILE of {name}"),
        None => "the limit of this shell; a service has its own, LimitNOFILE".into(),
    };
    if most >= needed {
        return Finding::ok(SUBJECT, format!("{needed} needed, {} allowed ({scope})", limit(most)));
    }
    let needed = load.connections + load.reserved_files_unlimited;
    let text = format!(
        "{needed} needed, one for each connection and {} for the node itself, but {most} allowed ({scope}): \
         {} connections will be rejected",
        load.reserved_files_unlimited,
        needed - most,
    );
    let mut finding = Finding::problem(SUBJECT, text);
    if host.files_per_process.is_some_and(|most| most < needed) {
        finding = finding.remedy(sysctl("fs.nr_open", needed.next_power_of_two()));
    }
    let name = host.unit.as_deref().unwrap_or("fanfare.service");
    finding = finding.remedy(format!("{name}: LimitNOFILE={needed}"));
    if host.unit.is_some() {
        return finding;
    }
    finding.remedy(format!("or as root, before fanfare starts: ulimit -n {needed}"))
}

fn limit(limit: u64) -> String {
    if limit == u64::MAX { "any number".into() } else { limit.to_string() }
}

fn files_of_host(host: &Host, load: &Load) -> Finding {
    const SUBJECT: &str = "files of the host";
    let needed = load.connections + load.reserved_files;
    let Some((used, most)) = host.files_of_host else {
        return Finding::unreadable(SUBJECT, "sysctl fs.file-max");
    };
    if most.saturating_sub(used) >= needed {
        let most = if most > 1 << 40 { "no limit".into() } else { format!("{most} at most") };
        return Finding::ok(SUBJECT, format!("{used} open now, {most}"));
    }
    let text = format!("{used} are open now and {most} allowed: the node needs {needed} more");
    Finding::problem(SUBJECT, text).remedy(sysctl("fs.file-max", used + 2 * needed))
}

fn watches(host: &Host, load: &Load) -> Finding {
    const SUBJECT: &str = "epoll watches";
    let Some(most) = host.watches else {
        return Finding::unreadable(SUBJECT, "sysctl fs.epoll.max_user_watches");
    };
    // All processes of the user share this limit.
    if most >= load.connections {
        return Finding::ok(SUBJECT, format!("{most} allowed for each user"));
    }
    let text = format!("{most} allowed for each user, and every connection needs one");
    Finding::problem(SUBJECT, text).remedy(sysctl("fs.epoll.max_user_watches", 2 * load.connections))
}

fn memory(host: &Host, load: &Load) -> Finding {
    const SUBJECT: &str = "memory";
    let Some(free) = host.memory else {
        return Finding::unreadable(SUBJECT, "MemAvailable in /proc/meminfo");
    };
    let (have, source) = match (host.cgroup, &host.unit) {
        (Some(limit), Some(name)) if limit < free => (limit, format!("allowed by MemoryMax of {name}")),
        (Some(left), None) if left < free => (left, "left by the limit of this cgroup".into()),
        _ => (free, "available on this host".into()),
    };
    let each = CONNECTION_IN_PROCESS + CONNECTION_IN_KERNEL;
    let needed = load.base_memory.saturating_add(load.connections * each);
    let with_channels = needed.saturating_add(load.channels * CHANNEL);
    let text = format!(
        "up to {} needed: {} for the node, its recent events and events that wait for the bus, {} for {} idle connections \
         ({CONNECTION_IN_PROCESS} bytes of the process and {CONNECTION_IN_KERNEL} of the kernel each), {} for {} channels \
         ({CHANNEL} bytes each); {} {source}",
        about(with_channels),
        about(load.base_memory),
        about(load.connections * each),
        load.connections,
        about(load.channels * CHANNEL),
        load.channels,
        about(have),
    );
    let fits = have.saturating_sub(load.base_memory) / each;
    if needed > have {
        let remedy =
            format!("more memory (MemoryMax= of the unit), a smaller --buffer-memory, or {fits} connections");
        Finding::problem(SUBJECT, text).remedy(remedy)
    } else if with_channels > have {
        Finding::warning(SUBJECT, text + ": not every connection can have a channel of its own")
            .remedy("more memory (MemoryMax= of the unit), fewer connections, or a smaller --max-channels")
    } else if with_channels > have / 5 * 4 {
        Finding::warning(SUBJECT, text + ": that leaves little for clients that stall")
            .remedy(format!("more memory (MemoryMax= of the unit), or {} connections", fits / 5 * 4))
    } else {
        Finding::ok(SUBJECT, text)
    }
}

/// A size with at least two digits, in the largest unit that allows it.
fn about(bytes: u64) -> String {
    let units = [(30, "GiB"), (20, "MiB"), (10, "KiB")];
    let (shift, unit) = units.into_iter().find(|(shift, _)| bytes >> shift >= 10).unwrap_or((0, " bytes"));
    format!("{}{unit}", bytes >> shift)
}

fn tcp_memory(host: &Host, load: &Load) -> Finding {
    const SUBJECT: &str = "TCP memory";
    let (Some(have), Some(page)) = (host.tcp_memory, host.page) else {
        return Finding::unreadable(SUBJECT, "sysctl net.ipv4.tcp_mem");
    };
    // A socket is charged a whole page while even one short event is not acknowledged.
    let all = load.connections * page;
    let wanted = all + load.connections.div_ceil(STALLED_PART) * STALLED;
    let text = format!(
        "{} for all sockets (net.ipv4.tcp_mem). An event for all clients takes {} until they acknowledge it; beside it {} \
         clients can stall at once, each with {} in its send buffer",
        about(have),
        about(all),
        have.saturating_sub(all) / STALLED,
        about(STALLED),
    );
    if have >= wanted {
        return Finding::ok(SUBJECT, text);
    }
    let text = text
        + "; with more, the kernel drops segments of all connections. One client in a hundred should be able to stall";
    if host.memory.is_some_and(|memory| wanted > memory / 2) {
        let text = format!("{text}: {} connections need {} for that", load.connections, about(wanted));
        return Finding::warning(SUBJECT, text).remedy("more memory, or fewer connections on more nodes");
    }
    let pages = wanted.div_ceil(page);
    let three = format!("{} {} {pages}", pages / 2, pages / 4 * 3);
    Finding::warning(SUBJECT, text).remedy(sysctl("net.ipv4.tcp_mem", three))
}

fn accept_queue(host: &Host, load: &Load) -> Finding {
    const SUBJECT: &str = "accept queue";
    let Some(most) = host.somaxconn else { return Finding::unreadable(SUBJECT, "sysctl net.core.somaxconn") };
    let wanted = load.connections.min(QUEUE);
    let text =
        format!("{} connections can wait to be accepted when all clients come back at once", most.min(QUEUE));
    if most >= wanted {
        return Finding::ok(SUBJECT, text);
    }
    let text = text + "; others retry after a second, then after three";
    Finding::warning(SUBJECT, text).remedy(sysctl("net.core.somaxconn", QUEUE))
}

fn handshakes(host: &Host, load: &Load) -> Finding {
    const SUBJECT: &str = "TCP handshakes";
    let (Some(most), Some(cookies)) = (host.syn_backlog, host.syn_cookies) else {
        return Finding::unreadable(SUBJECT, "sysctl net.ipv4.tcp_max_syn_backlog net.ipv4.tcp_syncookies");
    };
    if cookies {
        return Finding::ok(SUBJECT, "no limit on handshakes in progress (net.ipv4.tcp_syncookies is on)");
    }
    if most >= load.connections.min(QUEUE) {
        return Finding::ok(SUBJECT, format!("{most} can be in progress"));
    }
    let text = format!(
        "{most} can be in progress, and tcp_syncookies is off: a reconnect storm or an attack blocks other clients"
    );
    Finding::warning(SUBJECT, text).remedy(sysctl("net.ipv4.tcp_syncookies", 1))
}

fn ports(host: &Host, load: &Load) -> Finding {
    const SUBJECT: &str = "ports of a proxy";
    const PORTS_MAX: u64 = LAST_PORT - FIRST_PORT + 1;
    let Some((first, last)) = host.ports else {
        return Finding::unreadable(SUBJECT, "sysctl net.ipv4.ip_local_port_range, on the proxy's host");
    };
    let each = (last + 1).saturating_sub(first);
    let (addresses, connections) = (load.addresses, load.connections);
    let text = format!(
        "a proxy with the port range of this host has at most {} connections from one of its addresses to the {} of --listen",
        each * addresses,
        if addresses == 1 { "one".into() } else { addresses.to_string() },
    );
    if each * addresses >= connections {
        return Finding::ok(SUBJECT, text);
    }
    let mut finding = Finding::warning(SUBJECT, text + "; clients without a proxy are not affected");
    if each < PORTS_MAX {
        finding = finding.remedy(
            "on the proxy's host, ".to_owned()
                + &sysctl("net.ipv4.ip_local_port_range", format!("{FIRST_PORT} {LAST_PORT}")),
        );
    }
    let wanted = connections.div_ceil(PORTS_MAX);
    if wanted > addresses {
        finding = finding
            .remedy(format!("{wanted} addresses of this node in --listen, each in the proxy's upstream"));
    }
    finding
}

fn conntrack(host: &Host, load: &Load) -> Finding {
    const SUBJECT: &str = "conntrack";
    let Some((count, most)) = host.tracked else {
        return Finding::ok(SUBJECT, "not loaded: connections are not tracked");
    };
    let wanted = count + load.connections;
    let text = format!("{most} connections can be tracked, {count} are tracked now");
    if most >= wanted + wanted / 4 {
        return Finding::ok(SUBJECT, text);
    }
    let text = text + ": if the table is full, the kernel drops new connections";
    let remedy = sysctl("net.netfilter.nf_conntrack_max", (2 * wanted).next_power_of_two());
    let finding =
        if most < wanted { Finding::problem(SUBJECT, text) } else { Finding::warning(SUBJECT, text) };
    finding.remedy(remedy).remedy("or exclude the ports of --listen from tracking (nftables: notrack)")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::finding::Level;

    fn load(connections: u64) -> Load {
        Load {
            connections,
            channels: 0,
            reserved_files: 100,
            reserved_files_unlimited: 100,
            addresses: 1,
            base_memory: 100 << 20,
        }
    }

    fn levels(host: &Host, connections: u64) -> Vec<(&'static str, Level)> {
        let findings = check(host, &load(connections));
        let bad = findings.iter().filter(|finding| finding.level != Level::Ok);
        assert!(bad.clone().all(|finding| !finding.remedies.is_empty()), "each has a remedy: {findings:?}");
        bad.map(|finding| (finding.subject, finding.level)).collect()
    }

    #[test]
    fn finds_each_shortage_alone() {
        assert_eq!(levels(&Host::good(), 50_000), []);
        for (host, found) in [
            (Host { files: Some(50_099), ..Host::good() }, ("open files", Level::Problem)),
            (
                Host { files_of_host: Some((1000, 51_000)), ..Host::good() },
                ("files of the host", Level::Problem),
            ),
            (Host { watches: Some(49_999), ..Host::good() }, ("epoll watches", Level::Problem)),
            (Host { somaxconn: Some(4096), ..Host::good() }, ("accept queue", Level::Warning)),
            (Host { syn_cookies: Some(false), ..Host::good() }, ("TCP handshakes", Level::Warning)),
            (Host { ports: Some((32_768, 60_999)), ..Host::good() }, ("ports of a proxy", Level::Warning)),
            (Host { tcp_memory: Some(300 << 20), ..Host::good() }, ("TCP memory", Level::Warning)),
            (
                Host { memory: Some(300 << 20), tcp_memory: Some(2 << 30), ..Host::good() },
                ("memory", Level::Problem),
            ),
            (Host { cgroup: Some(300 << 20), ..Host::good() }, ("memory", Level::Problem)),
            (Host { cgroup: Some(330 << 20), ..Host::good() }, ("memory", Level::Warning)),
            (Host { tracked: Some((100, 50_000)), ..Host::good() }, ("conntrack", Level::Problem)),
            (Host { tracked: Some((100, 60_000)), ..Host::good() }, ("conntrack", Level::Warning)),
        ] {
            assert_eq!(levels(&host, 50_000), [found], "{host:?}");
        }
    }

    #[test]
    fn warns_if_channels_do_not_fit() {
        let host = Host { memory: Some(330 << 20), ..Host::good() };
        let finding = memory(&host, &Load { channels: 10_000, ..load(50_000) });
        assert_eq!(finding.level, Level::Warning);
        assert!(finding.text.contains("47MiB for 10000 channels"), "{finding:?}");
        assert!(finding.text.ends_with("not every connection can have a channel of its own"), "{finding:?}");
    }

    #[test]
    fn unreadable_values_are_checked_by_hand() {
        let findings = check(&Host::default(), &load(1000));
        for finding in findings.iter().filter(|finding| finding.subject != "conntrack") {
            assert_eq!(finding.level, Level::Warning);
            assert!(finding.text.contains("by hand"), "{finding:?}");
        }
    }

    #[test]
    fn raises_the_limit_of_all_processes_first() {
        let host = Host { files: Some(1024), files_per_process: Some(10_000), ..Host::good() };
        let finding = open_files(&host, &load(20_000));
        assert_eq!(finding.remedies[0], "/etc/sysctl.d/99-fanfare.conf: fs.nr_open = 32768");
        assert_eq!(finding.remedies[1], "fanfare.service: LimitNOFILE=20100");
        assert!(finding.remedies[2].starts_with("or as root"), "{finding:?}");
    }

    #[test]
    fn a_million_behind_a_proxy_needs_addresses() {
        let finding = ports(&Host::good(), &load(1_000_000));
        assert_eq!(finding.remedies, ["19 addresses of this node in --listen, each in the proxy's upstream"]);
        let small = ports(&Host { ports: Some((32_768, 60_999)), ..Host::good() }, &load(28_232));
        assert_eq!(small.level, Level::Ok);
    }

    #[test]
    fn never_advises_tcp_memory_of_half_the_host() {
        let host = Host { tcp_memory: Some(1 << 20), memory: Some(1 << 30), ..Host::good() };
        assert_eq!(
            tcp_memory(&host, &load(200_000)).remedies,
            ["more memory, or fewer connections on more nodes"]
        );
        let finding = tcp_memory(&host, &load(10_000));
        assert_eq!(finding.remedies, ["/etc/sysctl.d/99-fanfare.conf: net.ipv4.tcp_mem = 8200 12300 16400"]);
    }

    #[test]
    fn sizes_keep_two_digits() {
        assert_eq!(
            [about(999), about(10_240), about(25 << 30), about(9 << 30)],
            ["999 bytes", "10KiB", "25GiB", "9216MiB"]
        );
    }
}
