//! How the memory of the cgroup or the machine is divided.

use std::path::Path;

use super::cgroup::{self, Groups};
use super::{Settings, rejection_slots, show_size};

/// Memory of a node before its first connection: 5.0 MiB measured, and 1 MiB that its threads keep
/// after they freed it.
const START: u64 = 6 << 20;
/// Recent events, the bus, incomplete messages, frames for full sockets and pages of history get a
/// sixteenth of memory each, so that two thirds of it remain for connections and the kernel.
const BUFFER_PART: u64 = 16;
const BUFFER_MIN: u64 = 1 << 20;
/// More does not help: clients that come back later read from history, and events that wait longer
/// for Redis are better rejected.
const BUFFER_MAX: u64 = 64 << 20;
/// Pages of history in each shard: more than clients that come back together need.
const PAGES_MAX: u64 = 4 << 20;
/// Most bytes kept free. They are a sixteenth of memory, for socket buffers of clients that stall
/// and for fragmentation.
const SPARE_MAX: u64 = 64 << 20;
/// Bytes that a cgroup is charged for an idle connection: 2,040 measured with 5,000 connections,
/// 1,880 with 15,000 and 1,760 with 18,000. 1,490 of them are the kernel's inode, file and epoll
/// entry. Not all kernels charge the socket.
const CONNECTION_IN_CGROUP: u64 = 1900;
/// Bytes of an idle connection in this process: below 200 measured (benches/idle), rounded up since
/// tables grow by doubling.
pub const CONNECTION_IN_PROCESS: u64 = 256;
/// Bytes of an idle connection in the kernel: socket, inode, file and epoll entry are 3.8 KB in
/// /proc/slabinfo.
pub const CONNECTION_IN_KERNEL: u64 = 4096;
/// Bytes of a followed channel without events: 2,400 measured on the local bus and 3,000 to 5,000
/// with Redis.
pub const CHANNEL: u64 = 5000;

/// Bytes that a cgroup is charged for a node with this number of connections and channels, and
/// empty buffers.
pub fn memory_held(connections: u64, channels: u64) -> u64 {
    START + connections * CONNECTION_IN_CGROUP + channels * CHANNEL
}

/// Available memory, in bytes; `None` where there is no limit or it can't be read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// The smallest limit of this process's cgroups.
    pub cgroup: Option<u64>,
    /// The machine's memory.
    pub machine: Option<u64>,
}

impl Memory {
    /// Reads both from the kernel.
    pub fn read() -> Memory {
        Memory { cgroup: Groups::read(Path::new("/")).limit(), machine: cgroup::machine_memory() }
    }

    /// The smaller of both.
    pub fn limit(self) -> Option<u64> {
        self.cgroup.into_iter().chain(self.machine).min()
    }

    /// Bytes that each buffer gets by default.
    fn buffer(self) -> u64 {
        self.limit().map_or(BUFFER_MAX, |limit| (limit / BUFFER_PART).clamp(BUFFER_MIN, BUFFER_MAX))
    }

    /// Bytes kept free.
    pub fn spare(self) -> u64 {
        self.limit().map_or(0, |limit| (limit / BUFFER_PART).min(SPARE_MAX))
    }
}

impl Settings {
    /// Bytes of recent events in memory, all channels together.
    pub fn buffer_memory(&self) -> usize {
        self.buffer_memory.unwrap_or_else(|| self.memory.buffer().max(self.max_message_size as u64) as usize)
    }

    /// Bytes that feeds may hold beyond that while fan-outs are under way. An event without id is
    /// in no history, so it stays until all members of its channel have got it. Each shard may hold
    /// its part, or one of the longest messages, once more.
    pub fn fanout_memory(&self) -> u64 {
        let shards = self.shards.get();
        let part = (self.buffer_memory() / shards).max(self.max_message_size);
        (2 * shards).saturating_mul(part).saturating_sub(self.buffer_memory()) as u64
    }

    /// Bytes kept free: for socket buffers of clients that stall, for fragmentation, and for feeds
    /// while fan-outs are under way.
    pub fn reserve(&self) -> u64 {
        self.memory.spare().max(self.fanout_memory())
    }

    /// Bytes that the bus may hold: histories and idempotency keys of the local bus, or events that
    /// wait for Redis.
    pub fn bus_memory(&self) -> usize {
        self.memory.buffer().max(self.max_message_size as u64) as usize
    }

    /// Bytes of incomplete messages of all clients. One of the longest must fit.
    pub fn partial_memory(&self) -> usize {
        self.memory.buffer().max(2 * self.max_message_size as u64) as usize
    }

    /// Bytes that the node keeps for clients whose sockets are full; between two counts it may be
    /// an eighth more. Clients that stall in the same frame share its bytes.
    pub fn unsent_memory(&self) -> u64 {
        self.memory.buffer()
    }

    /// Bytes of pages of history in each shard.
    pub fn page_memory(&self) -> usize {
        (self.memory.buffer() / self.shards.get() as u64).min(PAGES_MAX) as usize
    }

    /// Bytes that all buffers together may grow to.
    pub fn total_buffer_memory(&self) -> u64 {
        let others = self.bus_memory() + self.partial_memory() + self.page_memory() * self.shards.get();
        (self.buffer_memory() as u64).saturating_add(others as u64 + self.unsent_memory())
    }

    /// Most bytes of a node without connections and channels.
    pub fn base_memory(&self) -> u64 {
        START.saturating_add(self.total_buffer_memory())
    }

    /// By how many bytes the node with full buffers and idle connections exceeds the cgroup or the
    /// machine, if it does.
    pub fn memory_excess(&self) -> Option<u64> {
        let excess = |limit: Option<u64>, each: u64| {
            let connections = u64::from(self.connection_limit()) * each;
            let needed = self.base_memory().saturating_add(self.fanout_memory()).saturating_add(connections);
            needed.checked_sub(limit?).filter(|excess| *excess > 0)
        };
        let in_cgroup = excess(self.memory.cgroup, CONNECTION_IN_CGROUP);
        in_cgroup.max(excess(self.memory.machine, CONNECTION_IN_PROCESS + CONNECTION_IN_KERNEL))
    }

    /// Idle connections that fit into memory beside full buffers, if they share a few channels.
    pub fn connections_by_memory(&self) -> u32 {
        self.connections_with_channels(0)
    }

    /// The same if each connection has a channel of its own, up to `--max-channels`.
    pub fn connections_with_own_channels(&self) -> u32 {
        self.connections_with_channels(self.max_channels.get() as u64)
    }

    /// Idle connections that fit into memory, the first `channels` of them with a channel of their
    /// own.
    fn connections_with_channels(&self, channels: u64) -> u32 {
        let fit = |limit: Option<u64>, each: u64| {
            let Some(limit) = limit else { return u64::MAX };
            let free = limit.saturating_sub(self.base_memory().saturating_add(self.reserve()));
            match free / (each + CHANNEL) {
                with_channel if with_channel < channels => with_channel,
                _ => (free - channels * CHANNEL) / each,
            }
        };
        let in_machine = fit(self.memory.machine, CONNECTION_IN_PROCESS + CONNECTION_IN_KERNEL);
        let fit = fit(self.memory.cgroup, CONNECTION_IN_CGROUP).min(in_machine);
        u32::try_from(fit).unwrap_or(u32::MAX).max(1)
    }

    /// How memory and open files are divided, as comments for an environment file.
    pub fn budget(&self) -> String {
        let files = self.open_files.map_or("no limit".into(), |limit| limit.to_string());
        let limit = self.memory.limit().map_or("no limit".into(), rounded);
        let source = if self.memory.limit() == self.memory.cgroup { "cgroup" } else { "machine" };
        format!(
            "# memory: {limit} ({source}): {} for recent events, {} for the bus, {} for incomplete messages, {} for full \
             sockets, {} for pages of history, {} for the node, {} kept free; {} idle connections fit into the rest\n\
             # channels: up to {CHANNEL} bytes each; if connections have channels of their own (up to {}), {} connections fit\n\
             # open files: {files}: {} for the node, {} for connections, {} for those above --max-connections\n",
            rounded(self.buffer_memory() as u64),
            rounded(self.bus_memory() as u64),
            rounded(self.partial_memory() as u64),
            rounded(self.unsent_memory()),
            rounded((self.page_memory() * self.shards.get()) as u64),
            rounded(START),
            rounded(self.reserve()),
            self.connections_by_memory(),
            self.max_channels,
            self.connections_with_own_channels(),
            self.reserved_files(),
            self.connection_limit(),
            rejection_slots(self.connection_limit()),
        )
    }
}

/// A size in whole KiB or MiB.
fn rounded(bytes: u64) -> String {
    let shift = if bytes >= 10 << 20 { 20 } else { 10 };
    show_size(bytes >> shift << shift)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Action;

    fn settings(flags: &[&str], cgroup: Option<u64>, machine: Option<u64>) -> Settings {
        let Ok(Action::Run(settings)) = Settings::from(flags.iter().map(Into::into), []) else {
            panic!("good settings")
        };
        Settings { memory: Memory { cgroup, machine }, open_files: None, ..settings }
    }

    #[test]
    fn everything_fits_into_the_smaller_limit() {
        for (cgroup, machine) in
            [(Some(64 << 20), Some(1 << 40)), (Some(1 << 40), Some(128 << 20)), (None, Some(4 << 30))]
        {
            for shards in ["1", "2", "64"] {
                let settings = settings(&["--shards", shards], cgroup, machine);
                let limit = settings.memory.limit().unwrap();
                let connections = u64::from(settings.connection_limit()) * CONNECTION_IN_CGROUP;
                let all = settings.base_memory() + settings.memory.spare() + connections;
                assert!(all <= limit && settings.memory_excess().is_none(), "{all} of {limit}");
                assert!(connections > limit / 5, "{connections} of {limit}");
            }
        }
        assert!(settings(&["--shards", "2"], Some(64 << 20), None).connection_limit() >= 18_000);
        let explicit =
            settings(&["--buffer-memory", "60MiB", "--max-connections", "5000"], Some(64 << 20), None);
        assert_eq!(explicit.connection_limit(), 5000);
        assert!(explicit.memory_excess().is_some());
        assert_eq!(settings(&[], None, None).buffer_memory(), 64 << 20);
        // Feeds may hold as much again during a fan-out, and each shard twice the longest message.
        let large = settings(&["--buffer-memory", "8MiB", "--shards", "2"], Some(64 << 20), None);
        assert_eq!((large.fanout_memory(), large.reserve()), (8 << 20, 8 << 20));
        let long = ["--buffer-memory", "16MiB", "--shards", "4", "--max-message-size", "16MiB"];
        assert_eq!(settings(&long, Some(1 << 30), None).fanout_memory(), 112 << 20);
        assert_eq!(settings(&[], Some(1 << 20), None).connection_limit(), 1);
        // 500,000 connections take 2.1 GiB of a machine, and 0.9 GiB as a cgroup counts them.
        let most = ["--max-connections", "500000"];
        assert!(settings(&most, Some(2 << 30), None).memory_excess().is_none());
        assert!(settings(&most, None, Some(2 << 30)).memory_excess().is_some());
        let endless = settings(&["--buffer-memory", "18446744073709551615"], Some(1 << 30), Some(1 << 40));
        assert!(endless.memory_excess().is_some());
        assert_eq!(endless.connection_limit(), 1);
    }

    #[test]
    fn channels_leave_less_memory_for_connections() {
        let settings = |flags, cgroup| settings(flags, Some(cgroup), None);
        let small = settings(&["--shards", "2"], 64 << 20);
        let (shared, own) = (small.connections_by_memory(), small.connections_with_own_channels());
        assert!(shared > 18_000 && (5000..7487).contains(&own), "{shared} {own}");
        assert!(small.budget().contains(&format!("channels of their own (up to 10000), {own} connections")));
        // Beyond --max-channels connections share channels.
        let few = settings(&["--shards", "2", "--max-channels", "10"], 64 << 20);
        assert!((26..=27).contains(&(shared - few.connections_with_own_channels())), "{few:?}");
        let tiny = settings(&[], 1 << 20);
        assert_eq!(tiny.connections_with_own_channels(), 1);
    }
}
