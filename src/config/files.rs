//! How the limit on open files is divided between clients, clients of the admin listener, and the node itself.

use super::{AdminAddr, Settings};

/// Descriptors of a node without shards and clients. 20 are open all the time: standard streams, signals, two runtimes,
/// accept loop, admin listener. The others are for two connections to Redis beside two that are closing, name lookups,
/// key files, and the files of `/proc` that `/metrics` reads.
const NODE: u32 = 40;
/// Descriptors of a shard: its epoll, a second handle to register sockets with, and its waker.
const SHARD: u32 = 3;
/// Most clients of the admin listener at once. A backend keeps a few connections open, a scraper one.
const ADMIN_MAX: u32 = 256;
/// Where descriptors are few these clients may take an eighth of them, but at least four.
const ADMIN_PART: u32 = 8;
const ADMIN_MIN: u32 = 4;
/// Clients past `--max-connections` hold a descriptor until their 503 is sent. There is one slot for this many
/// connections, with a minimum and a maximum.
const REJECTION_PART: u32 = 8;
const REJECTION_MIN: u32 = 8;
const REJECTION_MAX: u32 = 256;

impl Settings {
    /// Most connections of this node: `--max-connections`, or as many as fit into descriptors and memory. Never more than
    /// fit into descriptors: clients would take those that a new connection to Redis needs.
    pub fn most_connections(&self) -> u32 {
        let fit = self.connections_that_fit();
        self.max_connections.map_or_else(|| fit.min(self.connections_in_memory()), |most| most.get().min(fit))
    }

    /// How many connections the limit on open files leaves room for.
    pub fn connections_that_fit(&self) -> u32 {
        self.open_files.map_or(u32::MAX, |limit| connections_in(limit.saturating_sub(self.own_files())))
    }

    /// Descriptors for everything but public clients.
    pub fn own_files(&self) -> u32 {
        NODE + SHARD * self.shards.get() as u32 + self.listen.len() as u32 + self.admin_connections()
    }

    /// Clients that the admin listener serves at once.
    pub fn admin_connections(&self) -> u32 {
        match (&self.admin, self.open_files) {
            (AdminAddr::Off, _) => 0,
            (_, None) => ADMIN_MAX,
            (_, Some(limit)) => (limit / ADMIN_PART).clamp(ADMIN_MIN, ADMIN_MAX),
        }
    }
}

/// Clients past `--max-connections` that a node of this many connections keeps until their 503 is sent.
pub fn rejection_slots(connections: u32) -> u32 {
    (connections / REJECTION_PART).clamp(REJECTION_MIN, REJECTION_MAX)
}

/// The most connections that fit into this many descriptors together with their rejection slots. At least one.
fn connections_in(files: u32) -> u32 {
    let part = files / (REJECTION_PART + 1) * REJECTION_PART;
    let fit = if part >= REJECTION_MIN * REJECTION_PART {
        part.max(files.saturating_sub(REJECTION_MAX))
    } else {
        files.saturating_sub(REJECTION_MIN)
    };
    fit.max(1)
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
}
