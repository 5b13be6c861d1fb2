//! What systemd is told, and when its watchdog is fed (sd_notify(3), sd_watchdog_enabled(3)).
//!
//! The words are the library's. They are sent from here, since its own sending takes no abstract sockets and would
//! wait for a manager that hangs, on the thread that carries every event.

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

/// Time between two looks at what the status says.
const STATUS: Duration = Duration::from_secs(2);

/// Least time between two looks. The accept loop makes two turns a second, so `WatchdogSec=1` is the shortest that a
/// node can live with; less only makes it look in vain.
const LEAST: Duration = Duration::from_millis(100);

/// Looks at the threads in a watchdog's time. Half of it is what systemd asks for; with more, a thread that is late
/// once does not cost the process its life.
const LOOKS: u32 = 4;

/// Whoever started the process and wants to know how it is: systemd, or nobody.
#[derive(Debug, Default)]
pub struct Manager {
    socket: Option<(UnixDatagram, SocketAddr)>,
    /// It ends the process after so long without a sign of life.
    watchdog: Option<Duration>,
}

impl Manager {
    /// As the environment says (`NOTIFY_SOCKET`, `WATCHDOG_USEC`, `WATCHDOG_PID`).
    pub fn from_env() -> Manager {
        let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return Manager::default() };
        match open(&path) {
            Ok(socket) => {
                let watchdog = sd_notify::watchdog_enabled().filter(|time| !time.is_zero());
                Manager { socket: Some(socket), watchdog }
            }
            Err(error) => {
                tracing::warn!(%error, ?path, "NOTIFY_SOCKET can't be used: systemd is told nothing");
                Manager::default()
            }
        }
    }

    /// The node takes connections.
    pub fn ready(&self) {
        self.tell(&[NotifyState::Ready]);
    }

    /// Keys are read again until [`Manager::ready`]. The time is asked for by `Type=notify-reload`.
    pub fn reloading(&self) {
        match NotifyState::monotonic_usec_now() {
            Ok(now) => self.tell(&[NotifyState::Reloading, now]),
            Err(_) => self.tell(&[NotifyState::Reloading]),
        }
    }

    /// The node stops, within this time.
    pub fn stopping(&self, time: Duration) {
        let micros = u32::try_from(time.as_micros()).unwrap_or(u32::MAX);
        self.tell(&[NotifyState::Stopping, NotifyState::ExtendTimeoutUsec(micros)]);
    }

    /// A line for `systemctl status`.
    pub fn status(&self, line: &str) {
        self.tell(&[NotifyState::Status(&line.replace(char::is_control, " "))]);
    }

    fn tell(&self, states: &[NotifyState<'_>]) {
        let Some((socket, addr)) = &self.socket else { return };
        let text: String = states.iter().map(|state| format!("{state}\n")).collect();
        // A manager that takes nothing hangs or restarts; what matters is said again.
        if let Err(error) = socket.send_to_addr(text.as_bytes(), addr) {
            tracing::debug!(%error, ?text, "systemd could not be told");
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

/// Keeps the manager's status line up to date and its watchdog fed, for as long as it is polled.
pub async fn attend(manager: Arc<Manager>, metrics: Arc<Metrics>) {
    if manager.socket.is_none() {
        return;
    }
    let time = manager.watchdog.map_or(STATUS, |watchdog| STATUS.min(watchdog / LOOKS));
    let mut looks = tokio::time::interval(time.max(LEAST));
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut watch = Watch::default();
    let mut stood = 0;
    let mut told = String::new();
    loop {
        looks.tick().await;
        let line = status_line(&metrics);
        if line != told {
            manager.status(&line);
            told = line;
        }
        let Some(watchdog) = manager.watchdog else { continue };
        // While it stops, threads end one by one; how long that may take is bounded elsewhere.
        let stopping = metrics.readiness.is_draining();
        match watch.standing(&metrics.turns()).filter(|_| !stopping) {
            None => {
                stood = 0;
                manager.tell(&[NotifyState::Watchdog]);
            }
            Some(thread) => {
                stood += 1;
                if stood == LOOKS / 2 {
                    let name = metrics.thread_name(thread);
                    tracing::warn!(
                        "the thread {name} stands still: systemd will end this node after {watchdog:?}"
                    );
                }
            }
        }
    }
}

fn status_line(metrics: &Metrics) -> String {
    let connections = metrics.connections();
    let trouble =
        metrics.readiness.trouble().map_or("ready".into(), |trouble| format!("not ready: {trouble}"));
    format!("connections: {connections}; {trouble}")
}

/// Watches counters that threads count up while they live.
#[derive(Debug, Default)]
struct Watch {
    seen: Vec<u64>,
}

impl Watch {
    /// The first thread that has not made a turn since every one had; `None`: every one has.
    fn standing(&mut self, turns: &[u64]) -> Option<usize> {
        let standing = turns.iter().zip(&self.seen).position(|(turn, seen)| turn == seen);
        if standing.is_none() {
            self.seen = turns.to_vec();
        }
        standing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_thread_must_have_moved_since_all_had() {
        let mut watch = Watch::default();
        for (turns, standing) in [
            ([0, 0, 0], None), // nothing is known yet
            ([0, 0, 0], Some(0)),
            ([0, 5, 9], Some(0)),
            ([1, 5, 9], None), // one after the other, but all since the first look
            ([2, 6, 9], Some(2)),
            ([3, 6, 9], Some(2)),
            ([3, 6, 10], None),
            ([3, 7, 10], Some(0)),
        ] {
            assert_eq!(watch.standing(&turns), standing, "{turns:?}");
        }
    }
}
