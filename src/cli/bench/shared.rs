//! What the clients of a process share: counts, latencies, a buffer and a clock.

use std::collections::BTreeMap;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use super::mark::Finder;
use super::plan::Plan;
use super::worker::monotonic;

/// Most different reasons that are counted.
const REASONS_MAX: usize = 100;

/// Most characters of a reason.
const REASON_CHARS_MAX: usize = 200;

/// Counts of one process since the run started.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Tally {
    pub deliveries: u64,
    pub bytes: u64,
    /// Events that a client should have received, and did not, without a notice.
    pub lost: u64,
    /// Events that came twice, or after a later one.
    pub repeated: u64,
    /// Events of another channel than the client's.
    pub misrouted: u64,
    /// Notices that events may be missing.
    pub notices: u64,
    /// Clients that resumed after their last event.
    pub resumed: u64,
    /// Pings received, and answered.
    pub pings: u64,
    /// Events that the server did not take, by reason.
    pub rejected: BTreeMap<String, u64>,
    /// Handshakes that failed, by reason.
    pub refused: BTreeMap<String, u64>,
    /// Connections that the server closed, by close code or error.
    pub closed: BTreeMap<String, u64>,
    /// The `Server` header of the last upgrade.
    pub server: Option<String>,
}

impl Tally {
    /// Counts events that were not published, by reason.
    pub fn not_published(&mut self, problems: Vec<String>) {
        problems.into_iter().for_each(|problem| count(&mut self.rejected, problem));
    }
}

/// Adds 1 for this reason, of which a server may make up many.
pub fn count(counts: &mut BTreeMap<String, u64>, reason: String) {
    let mut reason: String = reason.chars().take(REASON_CHARS_MAX).collect();
    if counts.len() >= REASONS_MAX && !counts.contains_key(&reason) {
        reason = "other".into();
    }
    *counts.entry(reason).or_default() += 1;
}

/// What all clients of a process share.
pub struct Shared<'p> {
    pub plan: &'p Plan,
    pub tally: Tally,
    /// Latencies in microseconds, since the last report.
    pub latencies: Histogram<u64>,
    pub scratch: Vec<u8>,
    /// The tag of the run's marks.
    pub tag: u32,
    pub finder: Finder,
    /// The start of the run on the monotonic clock, in nanoseconds.
    pub started: u64,
    /// Microseconds since then, as of the last read.
    pub now: u64,
}

impl Shared<'_> {
    pub fn read_clock(&mut self) {
        self.now = (monotonic() - self.started) / 1000;
    }
}
