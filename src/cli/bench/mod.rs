//! `fanfare bench`: loads a WebSocket server that broadcasts, and judges what it delivers.
//!
//! | file | contents |
//! |---|---|
//! | `arguments`, `phase`, `plan` | the command line, and the plan that all processes follow |
//! | `coordinator`, `process`, `progress` | starts the worker processes, runs the phases, collects reports |
//! | `worker` | a process with a part of the clients |
//! | `clients`, `client`, `shared` | the clients of a process; one client; their counts |
//! | `position` | which events a client has: the judgement of their order |
//! | `publisher` | publishing by HTTP or Redis |
//! | `mark`, `wire` | the mark in each event; frames and response heads |
//! | `server` | CPU and memory of the measured server |
//! | `result`, `plot` | table, JSON and SVG |
//!
//! `benches/` puts load on fanfare and on its baseline by [`load`].

use std::ffi::OsString;
use std::fs;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

use self::arguments::{HELP, Options};
use self::coordinator::{Coordinator, Outcome};
use self::plan::Plan;
use self::result::PhaseResult;
use self::server::Server;
use crate::config;

mod arguments;
mod client;
mod clients;
mod coordinator;
mod mark;
mod phase;
mod plan;
mod plot;
mod position;
mod process;
mod progress;
mod publisher;
pub mod result;
pub mod server;
pub mod shared;
pub mod wire;
mod worker;

/// First argument of a worker process.
const WORKER: &str = "--worker";

/// The query parameter by which fanfare resumes.
const RESUME: &str = "lastEventId";

/// How long a server may take to send its `welcome` before it counts as one that can't resume.
const WELCOME_TIMEOUT: Duration = Duration::from_secs(1);

const WRONG_ARGUMENTS: u8 = 2;
const VOID: u8 = 3;

/// Runs the bench with `args` (those after `bench`), or a worker process of it.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let mut args = args.into_iter().peekable();
    if args.next_if(|first| first == WORKER).is_some() {
        return worker::run();
    }
    let mut urls = Vec::new();
    while let Some(url) = args.next_if(|word| !word.to_string_lossy().starts_with('-')) {
        urls.push(url.to_string_lossy().into_owned());
    }
    if urls.is_empty() {
        let wants_help = args.peek().is_some_and(|first| first == "--help" || first == "-h");
        return match wants_help {
            true => print(HELP, ExitCode::SUCCESS),
            false => print_usage_error(
                "fanfare bench: the URLs come first, as in: fanfare bench ws://127.0.0.1:8080/ws/{i}\n",
            ),
        };
    }
    match arguments::read(&urls, args) {
        Ok(None) => print(HELP, ExitCode::SUCCESS),
        Ok(Some(options)) => measure(options),
        Err(errors) => print_usage_error(&config::error_report(&errors)),
    }
}

fn print(text: &str, code: ExitCode) -> ExitCode {
    match io::stdout().write_all(text.as_bytes()) {
        Ok(()) => code,
        Err(_) => ExitCode::FAILURE,
    }
}

fn print_usage_error(text: &str) -> ExitCode {
    let _ = io::stderr().write_all(text.as_bytes());
    WRONG_ARGUMENTS.into()
}

/// Puts load on a server, as `fanfare bench URL… FLAGS…` does, and returns the results of its phases.
/// The worker processes are this program with the arguments `bench --worker`, so it must call [`run`]
/// with what follows `bench`.
///
/// # Errors
/// Wrong flags, and a load that could not be put on the server. Lost events are not errors:
/// [`result::problems`] finds them.
pub fn load(urls: &[String], flags: &[&str]) -> Result<Vec<PhaseResult>> {
    let options = arguments::read(urls, flags.iter().map(OsString::from));
    let options = options.map_err(|errors| anyhow!(config::error_report(&errors)))?;
    let Options { mut plan, detects_resume, pids, .. } = options.ok_or(anyhow!(HELP))?;
    Ok(run_plan(&mut plan, detects_resume, &pids)?.1.phases)
}

/// Returns what the server's processes are called, and what the run showed.
fn run_plan(plan: &mut Plan, detects_resume: bool, pids: &[u32]) -> Result<(String, Outcome)> {
    if detects_resume && supports_resume(plan) {
        plan.resume = Some(RESUME.into());
    }
    let addrs: Vec<_> = plan.targets.iter().map(|target| target.addr).collect();
    let server = Server::find(pids, &addrs);
    let names = server.names();
    let outcome = Coordinator::start(plan, server).and_then(Coordinator::run)?;
    Ok((names, outcome))
}

fn measure(options: Options) -> ExitCode {
    let Options { mut plan, detects_resume, pids, json, svg } = options;
    let (names, outcome) = match run_plan(&mut plan, detects_resume, &pids) {
        Ok(found) => found,
        Err(error) => {
            let _ = writeln!(io::stderr(), "fanfare bench: {error:#}");
            return ExitCode::FAILURE;
        }
    };
    let found = describe(&plan, &names, &outcome);
    if let Some(file) = svg {
        let drawing = plot::draw(&found, &outcome.seconds, &outcome.starts, &outcome.latencies);
        if let Err(error) = fs::write(&file, drawing) {
            let _ = writeln!(io::stderr(), "fanfare bench: can't write {}: {error}", file.display());
            return ExitCode::FAILURE;
        }
    }
    let problems = result::problems(&outcome.phases);
    let is_void = outcome.phases.iter().any(PhaseResult::is_void);
    let code = match (problems.is_empty(), is_void) {
        (false, _) => ExitCode::FAILURE,
        (true, true) => VOID.into(),
        (true, false) => ExitCode::SUCCESS,
    };
    if json {
        let mut text = result::to_json(&found, plan.connections, &outcome.phases).to_string();
        text.push('\n');
        return print(&text, code);
    }
    let mut text = format!("{found}\n\n{}\n", result::table(&outcome.phases));
    for remark in result::remarks(&outcome.phases) {
        text += &format!("{remark}\n");
    }
    for problem in &problems {
        text += &format!("FAILED {problem}\n");
    }
    if problems.is_empty() {
        text += "Every client received every event once and in order, or was notified.\n";
    }
    print(&text, code)
}

/// One line on what was measured, and with which load.
fn describe(plan: &Plan, names: &str, outcome: &Outcome) -> String {
    let header = outcome.server.as_ref().map(|server| format!(", Server: {server}")).unwrap_or_default();
    let resume = match &plan.resume {
        Some(name) => format!("clients resume by {name}"),
        None => "clients can't resume".into(),
    };
    format!(
        "{names}{header}, {resume}; {} clients in {} process{}, events of {} bytes",
        result::grouped(plan.connections.into()),
        plan.processes,
        if plan.processes == 1 { "" } else { "es" },
        plan.size
    )
}

/// Whether the server sends a `welcome` to a client that can resume, as fanfare does.
fn supports_resume(plan: &Plan) -> bool {
    let asking = Plan { resume: Some(RESUME.into()), ..plan.clone() };
    let Ok(mut stream) = TcpStream::connect_timeout(&plan.targets[0].addr, WELCOME_TIMEOUT) else {
        return false;
    };
    if stream.write_all(asking.request(0, 0).as_bytes()).is_err() {
        return false;
    }
    let deadline = Instant::now() + WELCOME_TIMEOUT;
    let mut bytes = Vec::new();
    let mut buffer = [0; 1024];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || stream.set_read_timeout(Some(left)).is_err() {
            return false;
        }
        let Ok(len @ 1..) = stream.read(&mut buffer) else { return false };
        bytes.extend_from_slice(&buffer[..len]);
        if let Ok(Some(answer)) = wire::answer(&bytes)
            && let Ok(Some(head)) = wire::head(&bytes[answer.len..])
            && let Some(payload) = bytes[answer.len..].get(head.len..head.len + head.payload)
        {
            return payload.starts_with(br#"{"type":"welcome""#);
        }
    }
}
