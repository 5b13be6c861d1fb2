//! How a run goes, on the terminal.

use std::io::{self, IsTerminal, Write};

use super::result::{Second, grouped, rate, shown_latency};

/// The line on standard error that shows how a run goes, if that is a terminal.
pub struct Progress {
    pub phase: String,
    is_terminal: bool,
}

impl Progress {
    pub fn new() -> Progress {
        Progress { phase: String::new(), is_terminal: io::stderr().is_terminal() }
    }

    pub fn show(&self, second: Second) {
        if self.is_terminal {
            let clients = grouped(second.clients.into());
            let (deliveries, p99) = (rate(second.deliveries as f64), shown_latency(second.p99));
            let line = format!("{}: {clients} clients, {deliveries} deliveries/s, p99 {p99}", self.phase);
            let _ = write!(io::stderr(), "\r\x1b[K{line}");
        }
    }

    pub fn clear(&self) {
        if self.is_terminal {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}
