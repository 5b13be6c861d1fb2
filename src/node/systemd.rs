//! Notifications to systemd: ready, reloading, stopping, status and watchdog (sd_notify(3),
//! sd_watchdog_enabled(3)).
//!
//! The `sd-notify` crate formats the messages. They are sent here, because its own `notify`
//! supports no abstract sockets and blocks while systemd hangs, on the thread that runs the bus.

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::Arc;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::time::MissedTickBehavior;

use crate::metrics::Metrics;

/// Longest time between two checks of status and threads.
const CHECK_INTERVAL_MAX: Duration = Duration::from_secs(2);

/// Shortest time between two checks. The accept loop takes two turns a second, so a watchdog below
/// `WatchdogSec=1` would stop a healthy node anyway.
const CHECK_INTERVAL_MIN: Duration = Duration::from_millis(100);

/// Checks of the threads within `WatchdogSec=`. systemd recommends two; with four, a thread may be
/// late once without the process being killed.
const CHECKS_PER_WATCHDOG: u32 = 4;

/// systemd, if it started the process and wants notifications.
#[derive(Debug, Default)]
pub struct Manager {
    socket: Option<(UnixDatagram, SocketAddr)>,
    /// systemd kills the process after this time without a watchdog notification.
    watchdog: Option<Duration>,
}

impl Manager {
    /// Reads `NOTIFY_SOCKET`, `WATCHDOG_USEC` and `WATCHDOG_PID`.
    pub fn from_env() -> Manager {
        let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return Manager::default() };
        match open(&path) {
            Ok(socket) => {
                let watchdog = sd_notify::watchdog_enabled().filter(|time| !time.is_zero());
                Manager { socket: Some(socket), watchdog }
            }
            Err(error) => {
                tracing::warn!(%error, ?path, "NOTIFY_SOCKET unusable: systemd gets no notifications");
                Manager::default()
            }
        }
    }

    /// The node accepts connections.
    pub fn ready(&self) {
        self.notify(&[NotifyState::Ready]);
    }

    /// Keys are reloaded until [`Manager::ready`]. `Type=notify-reload` requires the time.
    pub fn reloading(&self) {
        match NotifyState::monotonic_usec_now() {
            Ok(now) => self.notify(&[NotifyState::Reloading, now]),
            Err(_) => self.notify(&[NotifyState::Reloading]),
        }
    }

    /// The node stops within this time.
    pub fn stopping(&self, time: Duration) {
        let micros = u32::try_from(time.as_micros()).unwrap_or(u32::MAX);
        self.notify(&[NotifyState::Stopping, NotifyState::ExtendTimeoutUsec(micros)]);
    }

    /// A line for `systemctl status`.
    pub fn status(&self, line: &str) {
        self.notify(&[NotifyState::Status(&line.replace(char::is_control, " "))]);
    }

    fn notify(&self, states: &[NotifyState<'_>]) {
        let Some((socket, addr)) = &self.socket else { return };
        let text: String = states.iter().map(|state| format!("{state}\n")).collect();
        // The socket is full or gone while systemd hangs or restarts. Status and watchdog are sent
        // again.
        if let Err(error) = socket.send_to_addr(text.as_bytes(), addr) {
            tracing::debug!(%error, ?text, "notification to systemd failed");
        }
    }
}

fn open(path: &OsStr) -> io::Result<(UnixDatagram, SocketAddr)> {
    let addr = match path.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(path)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    Ok((socket, addr))
}

/// Sends the status line when it changes, and a watchdog notification while every thread makes
/// progress.
pub async fn keep_notified(manager: Arc<Manager>, metrics: Arc<Metrics>) {
    if manager.socket.is_none() {
        return;
    }
    let time = manager.watchdog.map_or(CHECK_INTERVAL_MAX, |watchdog| {
        (watchdog / CHECKS_PER_WATCHDOG).clamp(CHECK_INTERVAL_MIN, CHECK_INTERVAL_MAX)
    });
    let mut checks = tokio::time::interval(time);
    checks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut progress = Progress::default();
    let mut stalled_checks = 0;
    let mut sent = String::new();
    loop {
        checks.tick().await;
        let line = status_line(&metrics);
        if line != sent {
            manager.status(&line);
            sent = line;
        }
        let Some(watchdog) = manager.watchdog else { continue };
        // Threads end one by one while the node stops. `TimeoutStopSec=` bounds how long that
        // takes.
        let stopping = metrics.readiness.is_draining();
        match progress.stalled(&metrics.turns()).filter(|_| !stopping) {
            None => {
                stalled_checks = 0;
                manager.notify(&[NotifyState::Watchdog]);
            }
            Some(thread) => {
                stalled_checks += 1;
                if stalled_checks == CHECKS_PER_WATCHDOG / 2 {
                    let thread = metrics.thread_name(thread);
                    tracing::warn!(thread, ?watchdog, "thread stalled: systemd will kill this node");
                }
            }
        }
    }
}

fn status_line(metrics: &Metrics) -> String {
    let connections = metrics.connections();
    let readiness =
        metrics.readiness.not_ready_reason().map_or("ready".into(), |reason| format!("not ready: {reason}"));
    format!("connections: {connections}; {readiness}")
}

/// Turn counters of the threads, as they were when all had last made progress.
#[derive(Debug, Default)]
struct Progress {
    seen: Vec<u64>,
}

impl Progress {
    /// The first thread whose counter has not changed since all had. `None`: all have changed.
    fn stalled(&mut self, turns: &[u64]) -> Option<usize> {
        let stalled = turns.iter().zip(&self.seen).position(|(turn, seen)| turn == seen);
        if stalled.is_none() {
            self.seen = turns.to_vec();
        }
        stalled
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_thread_must_make_progress() {
        let mut progress = Progress::default();
        for (turns, stalled) in [
            ([0, 0, 0], None), // nothing to compare with yet
            ([0, 0, 0], Some(0)),
            ([0, 5, 9], Some(0)),
            ([1, 5, 9], None), // one after the other, but all since the first check
            ([2, 6, 9], Some(2)),
            ([3, 6, 9], Some(2)),
            ([3, 6, 10], None),
            ([3, 7, 10], Some(0)),
        ] {
            assert_eq!(progress.stalled(&turns), stalled, "{turns:?}");
        }
    }
}
