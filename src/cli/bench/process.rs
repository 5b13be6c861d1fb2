//! The worker processes: how they are started, and what was sent to them.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command as Program, Stdio};
use std::sync::mpsc::Sender;

use anyhow::{Context, Result};

use super::plan::{Command, Plan};
use super::worker::Report;

/// A worker process, as the coordinator sees it.
pub struct Worker {
    child: Child,
    pub input: ChildStdin,
    /// Commands sent, apart from the setup.
    pub sent: u32,
    pub report: Report,
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill(); // it may have ended
        let _ = self.child.wait();
    }
}

/// Whether the last report was written after the last command.
pub fn is_current(worker: &Worker) -> bool {
    worker.report.commands == worker.sent
}

pub fn write_line(input: &mut ChildStdin, command: &Command) -> Result<()> {
    let mut line = serde_json::to_vec(command)?;
    line.push(b'\n');
    input.write_all(&line).context("a worker process ended")
}

pub fn start_worker(
    plan: &Plan,
    process: u32,
    (started, tag): (u64, u32),
    reports: Sender<(usize, Option<Report>)>,
) -> Result<Worker> {
    let program = std::env::current_exe().context("can't find this program")?;
    let mut command = Program::new(program);
    command.args(["bench", super::WORKER]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().context("can't start a worker process")?;
    let mut input = child.stdin.take().expect("it is piped");
    let output = child.stdout.take().expect("it is piped");
    write_line(&mut input, &Command::Setup { plan: Box::new(plan.clone()), process, started, tag })?;
    std::thread::spawn(move || {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            let Ok(report) = serde_json::from_str(&line) else { break };
            if reports.send((process as usize, Some(report))).is_err() {
                return;
            }
        }
        let _ = reports.send((process as usize, None));
    });
    Ok(Worker { child, input, sent: 0, report: Report::default() })
}
