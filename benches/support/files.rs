//! Raises the limit on open files for thousands of connections.

use anyhow::{Result, ensure};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Raises the limit of this process and its children to the hard limit, and fails if `connections`
/// do not fit.
pub fn allow_files(connections: usize) -> Result<()> {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })?;
    let needed = connections as u64 + 200; // the servers' own files
    let maximum = limit.maximum.unwrap_or(u64::MAX);
    ensure!(
        needed <= maximum,
        "{connections} connections need {needed} open files, `ulimit -Hn` is {maximum}"
    );
    Ok(())
}
