//! The limit on open files, which thousands of connections need raised.

use anyhow::{Result, ensure};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Allows this process, and those it starts, as many open files as the system lets it, and makes sure that
/// `connections` fit.
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
