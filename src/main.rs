//! The life of the process: settings, logging, listeners, runtime, signals, exit code.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use anyhow::Context;
use fanfare::config::{self, Action, AdminAddr, LogFormat, Settings};
use fanfare::server::{self, Listeners};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// Many small allocations of a few sizes, made in one thread and freed in another, are what it is best at.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Exit code for settings that are wrong; any other failure is 1.
const WRONG_SETTINGS: u8 = 2;

fn main() -> ExitCode {
    let action = match Settings::from(std::env::args_os().skip(1), std::env::vars_os()) {
        Ok(action) => action,
        Err(errors) => {
            eprint!("{}", config::report(&errors));
            return WRONG_SETTINGS.into();
        }
    };
    let settings = match action {
        Action::Help(text) | Action::Version(text) => return print(&text),
        Action::Check(settings) => return print(&settings.to_string()),
        Action::Run(settings) => settings,
    };
    start_logging(&settings);
    match serve(settings) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn print(text: &str) -> ExitCode {
    match std::io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
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

fn serve(settings: Settings) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let listeners = Listeners::bind(&settings)?;
        announce(&listeners).context("the ready line can't be printed")?;
        let mut stopping = false;
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let mut stop = Some(stop);
        let served = server::run(settings, listeners, async {
            let _ = stopped.await;
        });
        let mut served = std::pin::pin!(served);
        loop {
            tokio::select! {
                result = &mut served => return result,
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if std::mem::replace(&mut stopping, true) {
                tracing::warn!("stopping at once");
                return Ok(());
            }
            drop(stop.take());
        }
    })
}

/// One line on standard output, once connections are taken.
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
