//! What the benches share: servers as processes, the baseline, and the report. The load is that of
//! `fanfare bench`.
//!
//! Machines differ, so figures are only compared within one run: every bench starts the server and
//! the baseline, pins both to one core and the clients to the others, and alternates between them.
#![allow(dead_code, reason = "each bench uses its own part")]

use std::process::exit;

use anyhow::{Result, ensure};
use fanfare::cli::bench;
use fanfare::cli::bench::result::{PhaseResult, problems};

pub mod args;
pub mod baseline;
pub mod process;
pub mod redis;
pub mod report;

/// Runs as the baseline or as a worker of `fanfare bench` if the command line says so, and raises the
/// limit on open files. Every bench calls this first.
pub fn start() -> Result<()> {
    rlimit::increase_nofile_limit(u64::MAX)?;
    baseline::run_if_asked()?;
    let mut words = std::env::args_os().skip(1);
    if words.next().is_some_and(|first| first == "bench") {
        let is_ended = bench::run(words) == std::process::ExitCode::SUCCESS;
        exit(if is_ended { 0 } else { 1 });
    }
    Ok(())
}

/// A time as phases have it: whole milliseconds.
pub fn duration(seconds: f64) -> String {
    format!("{:.0}ms", seconds * 1e3)
}

/// Puts the load of `fanfare bench URL… FLAGS…` on a server. Fails if an event or a client was lost.
pub fn load(urls: &[String], flags: &[&str], phases: &str) -> Result<Vec<PhaseResult>> {
    let results = bench::load(urls, &[flags, &["--phases", phases]].concat())?;
    let problems = problems(&results);
    ensure!(problems.is_empty(), "{}", problems.join("\n"));
    Ok(results)
}
