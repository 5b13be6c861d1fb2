//! The life of the process: settings, logging, listeners, runtime, signals, exit code.

use std::ffi::OsString;
use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use fanfare::auth::keys::KeyRing;
use fanfare::cli::{self, Command, Report, bench, doctor, token};
use fanfare::config::{self, Action, AdminAddr, LogFormat, Settings};
use fanfare::node;
use fanfare::node::listeners::{Inherited, Listeners};
use fanfare::node::systemd::Manager;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// Fast at many small allocations that one thread makes and another frees.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Exit code for wrong settings. Any other failure is 1.
const WRONG_SETTINGS: u8 = 2;

fn main() -> ExitCode {
    // Each connection is a descriptor, and shells start with a soft limit of 1024. If it stays,
    // --check shows it and --max-connections is lowered.
    let _ = rlimit::increase_nofile_limit(u64::MAX);
    let (command, args) = match cli::command(std::env::args_os().skip(1)) {
        Ok(command) => command,
        Err(text) => return reject(text),
    };
    match command {
        Command::Serve => run(args),
        Command::Bench => bench::run(args),
        Command::Token => match token::run(args, std::env::var_os("FANFARE_JWT_KEY"), std::io::stdin()) {
            Ok(report) => show(&report),
            Err(errors) => reject(errors.iter().map(|error| format!("fanfare token: {error}\n")).collect()),
        },
        Command::Doctor => match doctor::run(args, std::env::vars_os()) {
            Ok(report) => show(&report),
            Err(errors) => reject(config::error_report(&errors)),
        },
    }
}

/// `fanfare` without a command.
fn run(args: Vec<OsString>) -> ExitCode {
    let action = match Settings::from(args, std::env::vars_os()) {
        Ok(action) => action,
        Err(errors) => return reject(config::error_report(&errors)),
    };
    let (settings, check) = match action {
        Action::Help(text) | Action::Version(text) => return print(&text),
        Action::Check(settings) => (settings, true),
        Action::Run(settings) => (settings, false),
    };
    let keys = match KeyRing::load(&settings) {
        Ok(keys) => Arc::new(keys),
        Err(errors) => return reject(config::error_report(&errors)),
    };
    let unmet = node::unmet_requirements(&settings);
    if !unmet.is_empty() {
        return reject(config::error_report(&unmet));
    }
    if check {
        return print(&format!("{settings}{}", settings.budget()));
    }
    start_logging(&settings);
    keys.warn_of_exposed_files();
    let manager = Arc::new(Manager::from_env());
    // Before any thread starts, since it removes variables from the environment.
    let inherited = Inherited::from_env().and_then(|inherited| {
        let errors = inherited.check(&settings)?;
        Ok((inherited, errors))
    });
    let served = match inherited {
        Ok((inherited, errors)) if errors.is_empty() => serve(settings, keys, inherited, manager.clone()),
        Ok((_, errors)) => return reject(config::error_report(&errors)),
        Err(error) => Err(error),
    };
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            manager.status(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// Prints errors. If standard error is on a full disk, the text is lost but the exit code is not:
/// it tells systemd not to restart the node.
fn reject(text: String) -> ExitCode {
    let _ = std::io::stderr().write_all(text.as_bytes());
    WRONG_SETTINGS.into()
}

fn print(text: &str) -> ExitCode {
    match std::io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn show(report: &Report) -> ExitCode {
    let printed = print(&report.text);
    if report.has_problems { ExitCode::FAILURE } else { printed }
}

/// Logs go to standard error, which systemd keeps.
fn start_logging(settings: &Settings) {
    let filter = settings.log_targets();
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    let registry = tracing_subscriber::registry().with(filter);
    match settings.log_format {
        LogFormat::Text => registry.with(lines.with_target(false)).init(),
        LogFormat::Json => registry.with(lines.json().flatten_event(true)).init(),
    }
}

fn serve(
    settings: Settings,
    keys: Arc<KeyRing>,
    inherited: Inherited,
    manager: Arc<Manager>,
) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut hangup = signal(SignalKind::hangup())?;
        let listeners = Listeners::open(&settings, inherited)?;
        announce(&listeners).context("can't print the ready line")?;
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let mut stop = Some(stop);
        let served = node::run(settings, keys.clone(), listeners, manager.clone(), async {
            stopped.await.expect("the sender is kept until it is used")
        });
        let mut served = std::pin::pin!(served);
        loop {
            let why = tokio::select! {
                result = &mut served => return result,
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "SIGINT",
                _ = hangup.recv() => {
                    manager.reloading();
                    reload(&keys);
                    manager.ready();
                    continue;
                }
            };
            let Some(stop) = stop.take() else {
                tracing::warn!(why, "stopping at once");
                return Ok(());
            };
            let _ = stop.send(why); // fails only when the node stops by itself
        }
    })
}

fn reload(keys: &KeyRing) {
    match keys.reload() {
        Ok(()) if keys.has_files() => {
            tracing::info!("reloaded keys");
            keys.warn_of_exposed_files();
        }
        Ok(()) => tracing::info!("no key files to reload"),
        Err(errors) => {
            for error in errors {
                tracing::error!("key reload failed, keeping the current keys: {error}");
            }
        }
    }
}

/// Prints the ready line on standard output once clients can connect.
fn announce(listeners: &Listeners) -> anyhow::Result<()> {
    let public = listeners.public()?;
    let urls: Vec<String> = public.iter().map(|addr| format!("http://{addr}/")).collect();
    let admin = match listeners.admin()? {
        AdminAddr::Tcp(addr) => format!("admin http://{addr}/"),
        AdminAddr::Unix(path) => format!("admin unix:{}", path.display()),
        AdminAddr::Off => "admin off".into(),
    };
    let version = env!("CARGO_PKG_VERSION");
    let mut line = format!("fanfare {version} serving {} ({admin})", urls.join(" "));
    if let Some(first) = urls.first() {
        line += &format!(": open {first}");
    }
    writeln!(std::io::stdout(), "{line}")?;
    Ok(())
}
