//! What a run does: the same for the coordinator and its worker processes.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::phase::Phase;
use super::position::Channel;

/// Connections that one process holds: a process has at most 20,000 descriptors on many systems.
pub const CONNECTIONS_PER_PROCESS: u32 = 16_000;

/// Handshakes under way at once in one process.
pub const HANDSHAKES: usize = 512;

/// Longest wait without progress, before what is missing is counted.
pub const STALL_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a handshake may take, until the client is ready.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(8);

/// Connections whose latencies are recorded, at least: of twice as many only each second is timed.
pub const TIMED_MIN: u32 = 500;

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Plan {
    /// At least one. Clients connect to them in turn.
    pub targets: Vec<Target>,
    pub subprotocol: Option<String>,
    /// Further header lines of each upgrade.
    pub headers: Vec<String>,
    pub connections: u32,
    /// Channels among which clients and events are divided.
    pub channels: u32,
    pub processes: u32,
    /// Source addresses, used in turn; empty: the system chooses.
    pub bind: Vec<IpAddr>,
    /// New connections a second; `None`: as fast as handshakes complete.
    pub connect_rate: Option<f64>,
    pub greeting: Greeting,
    pub publish: Publish,
    /// Bytes of an event's text.
    pub size: usize,
    /// Events a second while clients storm, stall or churn.
    pub rate: f64,
    /// The query parameter for the last event id; `None`: the server can't resume.
    pub resume: Option<String>,
    pub phases: Vec<Phase>,
}

/// A WebSocket that clients connect to.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Target {
    pub addr: SocketAddr,
    /// The `Host` header.
    pub host: String,
    /// Path and query, with `{i}` for the number of the client and `{channel}` for its channel.
    pub path: String,
}

/// What a client sends and expects, apart from events.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Greeting {
    /// Messages sent after the upgrade, with `{i}` for the number of the client.
    pub hello: Vec<String>,
    /// The client is ready when a message with this text arrives; `None`: after the upgrade.
    pub ready: Option<String>,
    /// Messages that start with the first text are answered with the second.
    pub answers: Vec<(String, String)>,
}

/// How events are published, with `{event}` for the text and `{channel}` for the channel.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Publish {
    /// By an additional client, as this message.
    Socket { message: String },
    /// By HTTP POST with this body.
    Http { addr: SocketAddr, host: String, path: String, headers: Vec<String>, body: String },
    /// By a Redis command, after those that log in and choose the database.
    Redis { addr: SocketAddr, setup: Vec<Vec<String>>, command: Vec<String> },
}

impl Plan {
    /// The numbers of the clients of a process: first and count.
    pub fn part(&self, process: u32) -> (u32, u32) {
        let start = |process: u32| {
            (u64::from(self.connections) * u64::from(process) / u64::from(self.processes)) as u32
        };
        (start(process), start(process + 1) - start(process))
    }

    /// Where the client with this number connects. The clients of each channel are divided among all
    /// targets.
    pub fn target(&self, number: u64) -> &Target {
        let turn = number / u64::from(self.channels);
        &self.targets[(turn % self.targets.len() as u64) as usize]
    }

    /// Whether latencies of this client are recorded.
    pub fn is_timed(&self, number: u64) -> bool {
        number.is_multiple_of(u64::from((self.connections / TIMED_MIN).max(1)))
    }

    /// The channel of a client.
    pub fn channel_of(&self, number: u64) -> Channel {
        Channel { number: (number % u64::from(self.channels)) as u32, count: self.channels }
    }

    /// The upgrade request of a client. `last`: the last event id that it has.
    pub fn request(&self, number: u64, last: u64) -> String {
        let target = self.target(number);
        let mut path = target.path.replace("{i}", &number.to_string());
        path = path.replace("{channel}", &self.channel_of(number).number.to_string());
        if let Some(resume) = &self.resume {
            let id = if last == 0 { String::new() } else { last.to_string() };
            path += &format!("{}{resume}={id}", if path.contains('?') { '&' } else { '?' });
        }
        let mut request = format!(
            "GET {path} HTTP/1.1\r\nHost: {}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {}\r\n",
            target.host,
            super::wire::KEY
        );
        if let Some(subprotocol) = &self.subprotocol {
            request += &format!("Sec-WebSocket-Protocol: {subprotocol}\r\n");
        }
        for header in &self.headers {
            request += &format!("{header}\r\n");
        }
        request + "\r\n"
    }
}

/// A command to a worker process, one line of JSON on its standard input.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Command {
    /// The first one. `started`: the start of the run on the monotonic clock, in nanoseconds; `tag`:
    /// of the run's marks.
    Setup {
        plan: Box<Plan>,
        process: u32,
        started: u64,
        tag: u32,
    },
    /// Clients that are not connected connect.
    Connect,
    /// The next event of every client is the one after this number.
    ExpectAfter(u32),
    /// To the first process alone.
    Publish(Load),
    /// Drops the connections of this share of the clients until [`Command::Connect`].
    Cut(f64),
    /// This share of the clients reads nothing; 0 ends it.
    Stall(f64),
    /// Replaces this many clients per second, of all processes together; 0 stops.
    Churn(f64),
    /// Reports from now on say how many clients lack events up to this number.
    Expect(u32),
    Leave,
}

/// What is published.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum Load {
    Nothing,
    /// Events a second, each due at a fixed time.
    Rate(f64),
    /// Events in flight.
    InFlight(u32),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_share_all_connections() {
        let target = |host: &str| Target {
            addr: "127.0.0.1:1".parse().unwrap(),
            host: host.into(),
            path: "/ws/{i}?a{channel}".into(),
        };
        let mut plan = Plan {
            targets: vec![target("g"), target("h")],
            subprotocol: Some("p".into()),
            headers: vec!["X: y".into()],
            connections: 10,
            channels: 3,
            processes: 3,
            bind: Vec::new(),
            connect_rate: None,
            greeting: Greeting::default(),
            publish: Publish::Socket { message: "{event}".into() },
            size: 16,
            rate: 1.0,
            resume: Some("lastEventId".into()),
            phases: Vec::new(),
        };
        assert_eq!([0, 1, 2].map(|process| plan.part(process)), [(0, 3), (3, 3), (6, 4)]);
        let request = plan.request(7, 12);
        assert!(request.starts_with("GET /ws/7?a1&lastEventId=12 HTTP/1.1\r\n"), "{request}");
        assert!(request.contains("\r\nSec-WebSocket-Protocol: p\r\nX: y\r\n\r\n"), "{request}");
        assert!(request.contains("\r\nHost: g\r\n"), "{request}");
        let host = |number| plan.target(number).host.clone();
        assert_eq!([0, 1, 2, 3, 4, 5].map(host), ["g", "g", "g", "h", "h", "h"]);
        plan.resume = None;
        assert!(plan.request(7, 12).starts_with("GET /ws/7?a1 HTTP"));
    }
}
