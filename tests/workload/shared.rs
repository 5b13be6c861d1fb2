//! What all clients and publishers of a run share.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::time::Duration;

use serde_json::Value;
use tokio::sync::watch;

use crate::checker::{Attempt, History, Moment, Outcome};
use crate::common::{Nodes, TokenKey};

pub struct Shared {
    /// The channels: the main one, which every client follows, and those of clients that follow
    /// several.
    pub channels: Vec<Channel>,
    /// Where clients connect.
    pub nodes: Nodes,
    /// The key of the nodes, if clients need tokens.
    pub token_key: Option<TokenKey>,
    /// The port at which backends find Redis; 0 if they find none.
    pub redis: AtomicU16,
    /// The ports of the other nodes, if it is a cluster.
    pub other_redis: Vec<u16>,
    /// Set when publishers must stop.
    pub quiet: watch::Sender<bool>,
    /// Set when subscribers must stop.
    pub over: watch::Sender<bool>,
    moment: AtomicU64,
    waits: Mutex<Vec<(String, Duration)>>,
}

/// The records of a channel.
pub struct Channel {
    pub name: String,
    /// The highest acknowledged id.
    highest: AtomicU64,
    attempts: Mutex<Vec<Attempt>>,
    /// The position of each subscriber.
    positions: Mutex<BTreeMap<String, u64>>,
}

impl Shared {
    /// For this many channels, the main one with this name.
    pub fn new(main: &str, channels: usize, nodes: Nodes, redis: u16) -> Shared {
        let name = |n: usize| if n == 0 { main.to_owned() } else { format!("{main}.{n}") };
        Shared {
            channels: (0..channels).map(|n| Channel::new(name(n))).collect(),
            nodes,
            token_key: None,
            redis: AtomicU16::new(redis),
            other_redis: Vec::new(),
            quiet: watch::Sender::new(false),
            over: watch::Sender::new(false),
            moment: AtomicU64::new(1),
            waits: Mutex::default(),
        }
    }

    pub fn main(&self) -> &Channel {
        &self.channels[0]
    }

    /// The next moment.
    pub fn now(&self) -> Moment {
        self.moment.fetch_add(1, Ordering::SeqCst)
    }

    /// The part of a URL's query with a token for this user, if clients need tokens.
    pub fn token_query(&self, user: &str) -> String {
        self.token_key.as_ref().map(|key| format!("&token={}", key.token(user, &[]))).unwrap_or_default()
    }

    /// Records how long a publisher waited for an answer.
    pub fn waited(&self, line: &str, time: Duration) {
        self.waits.lock().expect("nothing panics while holding it").push((line.into(), time));
    }

    /// All waits, once the publishers have stopped.
    pub fn waits(&self) -> Vec<(String, Duration)> {
        std::mem::take(&mut *self.waits.lock().expect("all have ended"))
    }
}

impl Channel {
    fn new(name: String) -> Channel {
        Channel { name, highest: AtomicU64::new(0), attempts: Mutex::default(), positions: Mutex::default() }
    }

    /// Records the outcome of a publish.
    pub fn note(&self, attempt: Attempt) {
        if let Outcome::Acked(id) = attempt.outcome {
            self.highest.fetch_max(id, Ordering::SeqCst);
        }
        self.attempts.lock().expect("nothing panics while holding it").push(attempt);
    }

    /// The number of events with this outcome so far, of publishers whose line starts with this.
    pub fn count(&self, line: &str, outcome: Outcome) -> usize {
        let attempts = self.attempts.lock().expect("nothing panics while holding it");
        attempts.iter().filter(|a| a.outcome == outcome && a.line.starts_with(line)).count()
    }

    /// How many events the median subscriber is behind the highest acknowledged id.
    pub fn lag(&self) -> u64 {
        let positions = self.positions.lock().expect("nothing panics while holding it");
        let mut positions: Vec<u64> = positions.values().copied().collect();
        positions.sort_unstable();
        let most = positions.get(positions.len() / 2).copied().unwrap_or_default();
        self.highest.load(Ordering::SeqCst).saturating_sub(most)
    }

    /// The history without subscribers, once the publishers have stopped.
    pub fn history(&self) -> History {
        let attempts = std::mem::take(&mut *self.attempts.lock().expect("all have ended"));
        History { channel: self.name.clone(), attempts, ..History::default() }
    }

    /// Records the position of a subscriber. `None`: it does not follow the channel for now.
    pub fn stands(&self, name: &str, at: Option<u64>) {
        let mut positions = self.positions.lock().expect("nothing panics while holding it");
        match at {
            Some(at) => drop(positions.insert(name.into(), at)),
            None => drop(positions.remove(name)),
        }
    }

    /// The number of acknowledged events so far, and the highest id.
    pub fn acked(&self) -> (usize, u64) {
        let attempts = self.attempts.lock().expect("nothing panics while holding it");
        let ids = attempts.iter().filter_map(|attempt| match attempt.outcome {
            Outcome::Acked(id) => Some(id),
            _ => None,
        });
        ids.fold((0, 0), |(count, highest), id| (count + 1, highest.max(id)))
    }

    /// Subscribers that are behind this id.
    pub fn behind(&self, id: u64) -> Vec<String> {
        let positions = self.positions.lock().expect("nothing panics while holding it");
        let behind = positions.iter().filter(|(_, at)| **at < id);
        behind.map(|(name, at)| format!("{name} at {at} of {}", self.name)).collect()
    }
}

/// The event as subscribers see it, with its members in a fixed order.
pub fn canonical(event: &Value) -> String {
    let members: BTreeMap<&String, &Value> = event.as_object().expect("events are objects").iter().collect();
    serde_json::to_string(&members).expect("it was JSON")
}

/// A port of the loopback address.
pub fn local(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}
