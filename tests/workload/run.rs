//! Runs a workload: subscribers and publishers of every kind, whose records go to the checker.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::time::Duration;

use serde_json::Value;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::checker::{Attempt, History, Moment, Outcome, Seen, Subscriber, Violation, find_violations};
use crate::common::client::JSON_MODE;
use crate::common::{Nodes, Redis, Rng, until};
use crate::workload::publishers;
use crate::workload::subscribers;
use crate::workload::testbed::Testbed;

/// How often the state of other processes is polled.
const LOOK: Duration = Duration::from_millis(20);

/// How long to wait until every subscriber has received an event. Only failures take that long.
const TIMEOUT: Duration = Duration::from_secs(40);

/// How a client connects.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// Plain mode with `lastEventId`.
    Recovering,
    /// JSON mode.
    Json,
    /// Plain mode without recovery.
    Plain,
}

impl Kind {
    /// The subprotocol it requests.
    pub fn subprotocol(self) -> Option<&'static str> {
        (self == Kind::Json).then_some(JSON_MODE)
    }
}

/// How many clients and publishers of each kind take part.
#[derive(Clone, Debug)]
pub struct Workload {
    /// Users with clients that stay on their node while they can: one of each kind on every node.
    pub users: u64,
    /// Clients that disconnect and resume, on any node.
    pub roamers: u64,
    /// How many of those are slow as well.
    pub slow: u64,
    /// Publishers in JSON mode, in plain mode and by POST: this many of each.
    pub clients: u64,
    /// Publishers by FCALL.
    pub programs: u64,
    /// Time between two events of a publisher.
    pub pace: Duration,
    /// The seed of all random numbers.
    pub seed: u64,
    pub channel: String,
}

impl Default for Workload {
    fn default() -> Workload {
        Workload {
            users: 1,
            roamers: 3,
            slow: 0,
            clients: 1,
            programs: 1,
            pace: Duration::from_millis(15),
            seed: 1,
            channel: "room".into(),
        }
    }
}

/// What all clients and publishers share.
pub struct Shared {
    pub channel: String,
    /// Where clients connect.
    pub nodes: Nodes,
    /// The port at which backends find Redis; 0 if they find none.
    pub redis: AtomicU16,
    /// Set when publishers must stop.
    pub quiet: watch::Sender<bool>,
    /// Set when subscribers must stop.
    pub over: watch::Sender<bool>,
    moment: AtomicU64,
    /// The highest acknowledged id.
    highest: AtomicU64,
    attempts: Mutex<Vec<Attempt>>,
    waits: Mutex<Vec<(String, Duration)>>,
    /// The position of each subscriber.
    positions: Mutex<BTreeMap<String, u64>>,
}

impl Shared {
    pub fn new(channel: &str, nodes: Nodes, redis: u16) -> Shared {
        Shared {
            channel: channel.into(),
            nodes,
            redis: AtomicU16::new(redis),
            quiet: watch::Sender::new(false),
            over: watch::Sender::new(false),
            moment: AtomicU64::new(1),
            highest: AtomicU64::new(0),
            attempts: Mutex::default(),
            waits: Mutex::default(),
            positions: Mutex::default(),
        }
    }

    /// The next moment.
    pub fn now(&self) -> Moment {
        self.moment.fetch_add(1, Ordering::SeqCst)
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

    /// Records how long a publisher waited for an answer.
    pub fn waited(&self, line: &str, time: Duration) {
        self.waits.lock().expect("nothing panics while holding it").push((line.into(), time));
    }

    /// All attempts, once the publishers have stopped.
    pub fn attempts(&self) -> Vec<Attempt> {
        std::mem::take(&mut *self.attempts.lock().expect("all have ended"))
    }

    /// Records the position of a subscriber.
    pub fn stands(&self, name: &str, at: u64) {
        self.positions.lock().expect("nothing panics while holding it").insert(name.into(), at);
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
        behind.map(|(name, at)| format!("{name} at {at}")).collect()
    }
}

/// A running workload.
pub struct Run {
    pub shared: Arc<Shared>,
    subscribers: Vec<JoinHandle<Subscriber>>,
    publishers: Vec<JoinHandle<()>>,
    history: History,
}

impl Run {
    /// Starts a workload on a testbed, and waits until events are delivered to all subscribers.
    pub async fn start(testbed: &Testbed, workload: Workload) -> Run {
        Run::at(&testbed.nodes, 2, &testbed.redis, workload).await
    }

    /// The same for nodes on several Redis servers.
    pub async fn at(nodes: &Nodes, count: usize, redis: &Redis, workload: Workload) -> Run {
        let shared = Arc::new(Shared::new(&workload.channel, nodes.clone(), redis.port()));
        let mut subscribers = Vec::new();
        let mut subscriber = |user: u64, kind: Kind, home: Option<usize>, stalls: Option<u64>| {
            let name = format!("{kind:?} {} of user{user}", subscribers.len());
            shared.stands(&name, 0);
            let plan = subscribers::Plan {
                name,
                user: format!("user{user}"),
                kind,
                home,
                addr: None,
                stalls,
                narrow: false,
            };
            subscribers.push(tokio::spawn(subscribers::watch(
                shared.clone(),
                plan,
                workload.seed + subscribers.len() as u64,
            )));
        };
        for home in 0..count {
            for user in 0..workload.users {
                for kind in [Kind::Recovering, Kind::Json, Kind::Plain] {
                    subscriber(user, kind, Some(home), None);
                }
            }
        }
        for n in 0..workload.roamers {
            let kind = [Kind::Recovering, Kind::Json, Kind::Plain][n as usize % 3];
            subscriber(n % workload.users, kind, None, (n < workload.slow).then_some(400));
        }
        let mut publishers: Vec<JoinHandle<()>> = Vec::new();
        let users: Arc<[String]> = (0..workload.users + 1).map(|user| format!("user{user}")).collect();
        let mut seed = workload.seed * 1000;
        let mut plan = || {
            seed += 1;
            publishers::Plan {
                shared: shared.clone(),
                users: users.clone(),
                pace: workload.pace,
                rng: Rng(seed),
                seed,
            }
        };
        for _ in 0..workload.clients {
            publishers.push(tokio::spawn(publishers::json_client(plan())));
            publishers.push(tokio::spawn(publishers::plain_client(plan())));
            publishers.push(tokio::spawn(publishers::poster(plan())));
        }
        for _ in 0..workload.programs {
            publishers.push(tokio::spawn(publishers::program(plan())));
        }
        let run = Run { shared, subscribers, publishers, history: History::default() };
        run.wait_for_delivery().await;
        run
    }

    /// See [`History::ids_may_fall`].
    pub fn ids_may_fall(&mut self) {
        self.history.ids_may_fall = true;
    }

    /// Backends find Redis at this port from now on.
    pub fn connect_programs(&self, redis: &Redis) {
        self.shared.redis.store(redis.port(), Ordering::SeqCst);
    }

    /// Backends find no Redis until [`Run::connect_programs`].
    pub fn disconnect_programs(&self) {
        self.shared.redis.store(0, Ordering::SeqCst);
    }

    /// The number of acknowledged events so far.
    pub fn acked(&self) -> usize {
        self.shared.acked().0
    }

    /// Waits until this many more events are acknowledged.
    pub async fn wait_for_acks(&self, more: usize) {
        let enough = self.acked() + more;
        until("more events to be acknowledged", || async { (self.acked() >= enough).then_some(()) }).await;
    }

    /// Waits until an event is acknowledged from now on, and every subscriber has received it.
    pub async fn wait_for_delivery(&self) {
        self.wait_for_acks(1).await;
        let (_, highest) = self.shared.acked();
        self.reached(highest).await;
    }

    async fn reached(&self, id: u64) {
        let waited = tokio::time::timeout(TIMEOUT, async {
            while !self.shared.behind(id).is_empty() {
                tokio::time::sleep(LOOK).await;
            }
        });
        if waited.await.is_err() {
            panic!("{}", self.standing(id).await);
        }
    }

    /// Subscribers that are behind an id, and the statistics of the nodes.
    async fn standing(&self, id: u64) -> String {
        let mut text = format!("some subscribers did not reach {id}: {:#?}", self.shared.behind(id));
        for node in self.shared.nodes.all() {
            text += &format!("\n{}: {}", node.public, node.admin("GET", "/stats", b"").await.body);
        }
        text
    }

    /// Ends the run: publishers stop, subscribers read to the end, and the checker runs. Fails the
    /// test on violations.
    pub async fn end(self) -> Report {
        let ended = self.finish().await;
        let violations = find_violations(&ended.report.history);
        let shown = &violations[..violations.len().min(20)];
        assert!(violations.is_empty(), "the promise is broken {} times:\n{shown:#?}", violations.len());
        assert!(ended.missing.is_none(), "{}", ended.missing.unwrap_or_default());
        for subscriber in &ended.report.history.subscribers {
            assert!(
                subscriber.stayed || subscriber.home.is_none(),
                "{} was not connected at the end",
                subscriber.name
            );
            assert!(subscriber.events() > 20, "{} has seen hardly any event", subscriber.name);
        }
        ended.report
    }

    /// The same for a run that must have violations. Returns them.
    pub async fn violations(self) -> Vec<Violation> {
        find_violations(&self.finish().await.report.history)
    }

    async fn finish(mut self) -> Ended {
        self.shared.quiet.send_replace(true);
        for publisher in std::mem::take(&mut self.publishers) {
            publisher.await.expect("a publisher without errors");
        }
        // A subscriber that joins without recovery after the last event never sees it: then another
        // one is published.
        let ended = tokio::time::timeout(TIMEOUT, async {
            for n in 0.. {
                let Some(id) = publishers::end(&self.shared, n).await else { continue };
                for _ in 0..20 {
                    tokio::time::sleep(LOOK).await;
                    if self.shared.behind(id).is_empty() {
                        return;
                    }
                }
            }
        });
        let missing = match ended.await {
            Ok(()) => None,
            Err(_) => Some(self.standing(self.shared.acked().1).await),
        };
        self.shared.over.send_replace(true);
        let mut history = self.history;
        for subscriber in self.subscribers {
            history.subscribers.push(subscriber.await.expect("a subscriber without errors"));
        }
        history.attempts = self.shared.attempts();
        let waits = std::mem::take(&mut *self.shared.waits.lock().expect("all have ended"));
        Ended { report: Report { history, waits }, missing }
    }
}

struct Ended {
    report: Report,
    /// Subscribers that did not reach the end.
    missing: Option<String>,
}

/// A run without violations.
pub struct Report {
    pub history: History,
    /// How long each publisher waited for each answer, with its line.
    waits: Vec<(String, Duration)>,
}

impl Report {
    /// The number of events with such an outcome.
    pub fn count(&self, wanted: impl Fn(Outcome) -> bool) -> usize {
        self.history.attempts.iter().filter(|attempt| wanted(attempt.outcome)).count()
    }

    /// Whether any subscriber saw this event.
    pub fn came(&self, body: &str) -> bool {
        let is = |seen: &Seen| matches!(seen, Seen::Event(_, other, _) if other == body);
        self.history.subscribers.iter().any(|subscriber| subscriber.seen.iter().any(|(_, seen)| is(seen)))
    }

    /// The number of acknowledged events.
    pub fn acked(&self) -> usize {
        self.count(|outcome| matches!(outcome, Outcome::Acked(_)))
    }

    /// Fails if any subscriber was notified of a loss. None occurred, so every event reached every
    /// subscriber.
    pub fn assert_no_loss_reported(&self) {
        for subscriber in &self.history.subscribers {
            assert_eq!(
                subscriber.announcements(),
                0,
                "{}: {:?}",
                subscriber.name,
                control_frames(subscriber)
            );
        }
    }

    /// Fails unless every subscriber with recovery was notified of a loss this many times, and a
    /// plain one was closed.
    pub fn assert_loss_reported(&self, often: std::ops::RangeInclusive<usize>) {
        for subscriber in self.history.subscribers.iter().filter(|subscriber| subscriber.recovers) {
            let count = subscriber.announcements();
            assert!(
                often.contains(&count),
                "{} was notified {count} times: {:?}",
                subscriber.name,
                control_frames(subscriber)
            );
        }
        let plain = self.history.subscribers.iter().filter(|subscriber| !subscriber.recovers);
        assert!(
            plain.map(Subscriber::announcements).sum::<usize>() > 0,
            "clients without recovery are closed"
        );
    }

    /// The longest wait for an answer on these lines.
    pub fn slowest(&self, lines: impl Fn(&str) -> bool) -> Duration {
        let waits = self.waits.iter().filter(|(line, _)| lines(line)).map(|(_, wait)| *wait);
        waits.max().unwrap_or_default()
    }

    /// The number of notifications of a loss, for all subscribers together.
    pub fn losses_reported(&self) -> usize {
        self.history.subscribers.iter().map(Subscriber::announcements).sum()
    }
}

/// What a subscriber saw besides events.
fn control_frames(subscriber: &Subscriber) -> Vec<String> {
    let seen = subscriber.seen.iter().filter(|(_, seen)| !matches!(seen, Seen::Event(..)));
    seen.map(|(_, seen)| format!("{seen:?}")).collect()
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
