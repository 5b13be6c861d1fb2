//! Clients and publishers of every kind, who note what they see and are told, for the judge.

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

/// How often to look whether something has happened in other processes.
const LOOK: Duration = Duration::from_millis(20);

/// The longest wait for everybody to have seen something. Only what is broken takes so long.
const PATIENCE: Duration = Duration::from_secs(40);

/// How a client takes part.
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
    /// What it asks for in the handshake.
    pub fn subprotocol(self) -> Option<&'static str> {
        (self == Kind::Json).then_some(JSON_MODE)
    }
}

/// Who takes part.
#[derive(Clone, Debug)]
pub struct Workload {
    /// Clients that stay on a node while they can: each kind once on every node, for each of these users.
    pub users: u64,
    /// Clients that leave and come back, to any node.
    pub roamers: u64,
    /// How many of those that leave and come back are slow besides.
    pub slow: u64,
    /// Publishers by JSON mode, by plain mode, by POST.
    pub clients: u64,
    /// Publishers by FCALL.
    pub programs: u64,
    /// Time between two events of one publisher.
    pub pace: Duration,
    /// What rng begin with.
    pub seed: u64,
    /// The channel.
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

/// What all who take part share.
pub struct Shared {
    /// The channel.
    pub channel: String,
    /// Where clients connect.
    pub nodes: Nodes,
    /// Where programs find Redis.
    pub redis: AtomicU16,
    /// Set when publishers are to stop.
    pub quiet: watch::Sender<bool>,
    /// Set when clients are to stop.
    pub over: watch::Sender<bool>,
    moment: AtomicU64,
    /// The highest id acknowledged.
    highest: AtomicU64,
    attempts: Mutex<Vec<Attempt>>,
    waits: Mutex<Vec<(String, Duration)>>,
    /// Where each client stands.
    positions: Mutex<BTreeMap<String, u64>>,
}

impl Shared {
    /// Nobody has noted anything yet.
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

    /// Notes what became of an event.
    pub fn note(&self, attempt: Attempt) {
        if let Outcome::Acked(id) = attempt.outcome {
            self.highest.fetch_max(id, Ordering::SeqCst);
        }
        self.attempts.lock().expect("nothing panics while holding it").push(attempt);
    }

    /// How many events had this outcome so far, of publishers whose line begins so.
    pub fn count(&self, line: &str, outcome: Outcome) -> usize {
        let attempts = self.attempts.lock().expect("nothing panics while holding it");
        attempts.iter().filter(|a| a.outcome == outcome && a.line.starts_with(line)).count()
    }

    /// How far most of those who watch are behind what was acknowledged, in events.
    pub fn lag(&self) -> u64 {
        let positions = self.positions.lock().expect("nothing panics while holding it");
        let mut positions: Vec<u64> = positions.values().copied().collect();
        positions.sort_unstable();
        let most = positions.get(positions.len() / 2).copied().unwrap_or_default();
        self.highest.load(Ordering::SeqCst).saturating_sub(most)
    }

    /// Notes how long a publisher waited for an answer.
    pub fn waited(&self, line: &str, time: Duration) {
        self.waits.lock().expect("nothing panics while holding it").push((line.into(), time));
    }

    /// Every attempt noted, once all have ended.
    pub fn attempts(&self) -> Vec<Attempt> {
        std::mem::take(&mut *self.attempts.lock().expect("all have ended"))
    }

    /// Notes where a client stands.
    pub fn stands(&self, name: &str, at: u64) {
        self.positions.lock().expect("nothing panics while holding it").insert(name.into(), at);
    }

    /// The highest id acknowledged so far.
    pub fn acked(&self) -> (usize, u64) {
        let attempts = self.attempts.lock().expect("nothing panics while holding it");
        let ids = attempts.iter().filter_map(|attempt| match attempt.outcome {
            Outcome::Acked(id) => Some(id),
            _ => None,
        });
        ids.fold((0, 0), |(count, highest), id| (count + 1, highest.max(id)))
    }

    /// Who does not stand there yet.
    pub fn behind(&self, id: u64) -> Vec<String> {
        let positions = self.positions.lock().expect("nothing panics while holding it");
        let behind = positions.iter().filter(|(_, at)| **at < id);
        behind.map(|(name, at)| format!("{name} at {at}")).collect()
    }
}

/// A workload at work.
pub struct Run {
    /// What all share.
    pub shared: Arc<Shared>,
    subscribers: Vec<JoinHandle<Subscriber>>,
    publishers: Vec<JoinHandle<()>>,
    history: History,
}

impl Run {
    /// Sends a workload to these nodes, and waits until everyone is there and events flow.
    pub async fn start(testbed: &Testbed, workload: Workload) -> Run {
        Run::at(&testbed.nodes, 2, &testbed.redis, workload).await
    }

    /// The same for nodes that are on more than one Redis.
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
                door: None,
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

    /// Ids may fall: see [`History::ids_may_fall`].
    pub fn ids_may_fall(&mut self) {
        self.history.ids_may_fall = true;
    }

    /// Programs find Redis at this port from now on.
    pub fn connect_programs(&self, redis: &Redis) {
        self.shared.redis.store(redis.port(), Ordering::SeqCst);
    }

    /// Programs find no Redis until told where.
    pub fn disconnect_programs(&self) {
        self.shared.redis.store(0, Ordering::SeqCst);
    }

    /// How many events were acknowledged so far.
    pub fn acked(&self) -> usize {
        self.shared.acked().0
    }

    /// Waits until so many more events are acknowledged.
    pub async fn wait_for_acks(&self, more: usize) {
        let enough = self.acked() + more;
        until("more events to be acknowledged", || async { (self.acked() >= enough).then_some(()) }).await;
    }

    /// Waits until all works: an event acknowledged from now on, and everybody beyond it.
    pub async fn wait_for_delivery(&self) {
        self.wait_for_acks(1).await;
        let (_, highest) = self.shared.acked();
        self.reached(highest).await;
    }

    async fn reached(&self, id: u64) {
        let waited = tokio::time::timeout(PATIENCE, async {
            while !self.shared.behind(id).is_empty() {
                tokio::time::sleep(LOOK).await;
            }
        });
        if waited.await.is_err() {
            panic!("{}", self.standing(id).await);
        }
    }

    /// Who is behind an id, and what the nodes say.
    async fn standing(&self, id: u64) -> String {
        let mut text = format!("they don't come to {id}: {:#?}", self.shared.behind(id));
        for node in self.shared.nodes.all() {
            text += &format!("\n{}: {}", node.public, node.admin("GET", "/stats", b"").await.body);
        }
        text
    }

    /// Ends the run: publishers stop, everybody reads to the end, and the judge speaks. Fails the test if he objects.
    pub async fn end(self) -> Report {
        let ended = self.finish().await;
        let violations = find_violations(&ended.report.history);
        let shown = &violations[..violations.len().min(20)];
        assert!(violations.is_empty(), "the promise is broken {} times:\n{shown:#?}", violations.len());
        assert!(ended.missing.is_none(), "{}", ended.missing.unwrap_or_default());
        for subscriber in &ended.report.history.subscribers {
            assert!(
                subscriber.stayed || subscriber.home.is_none(),
                "{} was not there at the end",
                subscriber.name
            );
            assert!(subscriber.events() > 20, "{} has seen next to nothing", subscriber.name);
        }
        ended.report
    }

    /// The same for a run in which the judge must object: what he says.
    pub async fn violations(self) -> Vec<Violation> {
        find_violations(&self.finish().await.report.history)
    }

    async fn finish(mut self) -> Ended {
        self.shared.quiet.send_replace(true);
        for publisher in std::mem::take(&mut self.publishers) {
            publisher.await.expect("a publisher that was told what it must");
        }
        // Somebody may come back without recovery after the last event, and never see it: then there is another.
        let ended = tokio::time::timeout(PATIENCE, async {
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
            history.subscribers.push(subscriber.await.expect("a client that saw what it may"));
        }
        history.attempts = self.shared.attempts();
        let waits = std::mem::take(&mut *self.shared.waits.lock().expect("all have ended"));
        Ended { report: Report { history, waits }, missing }
    }
}

struct Ended {
    report: Report,
    /// Who did not come to the end.
    missing: Option<String>,
}

/// A run that kept the promise.
pub struct Report {
    /// What happened.
    pub history: History,
    /// How long each publisher waited for each answer, by its line.
    waits: Vec<(String, Duration)>,
}

impl Report {
    /// How many events had this outcome.
    pub fn count(&self, wanted: impl Fn(Outcome) -> bool) -> usize {
        self.history.attempts.iter().filter(|attempt| wanted(attempt.outcome)).count()
    }

    /// Whether anybody saw this event.
    pub fn came(&self, body: &str) -> bool {
        let is = |seen: &Seen| matches!(seen, Seen::Event(_, other, _) if other == body);
        self.history.subscribers.iter().any(|subscriber| subscriber.seen.iter().any(|(_, seen)| is(seen)))
    }

    /// How many events were acknowledged.
    pub fn acked(&self) -> usize {
        self.count(|outcome| matches!(outcome, Outcome::Acked(_)))
    }

    /// Fails if anybody was told that something may be missing: nothing was, so every event reached everybody.
    pub fn assert_no_loss_reported(&self) {
        for subscriber in &self.history.subscribers {
            assert_eq!(subscriber.announcements(), 0, "{}: {:?}", subscriber.name, told(subscriber));
        }
    }

    /// Fails unless everybody who was there all the time was told, so often at least and at most.
    pub fn assert_loss_reported(&self, often: std::ops::RangeInclusive<usize>) {
        for subscriber in self.history.subscribers.iter().filter(|subscriber| subscriber.recovers) {
            let count = subscriber.announcements();
            assert!(
                often.contains(&count),
                "{} was told {count} times: {:?}",
                subscriber.name,
                told(subscriber)
            );
        }
        let plain = self.history.subscribers.iter().filter(|subscriber| !subscriber.recovers);
        assert!(
            plain.map(Subscriber::announcements).sum::<usize>() > 0,
            "those without recovery are told by a close"
        );
    }

    /// The longest time that anybody on these lines waited for an answer.
    pub fn slowest(&self, lines: impl Fn(&str) -> bool) -> Duration {
        let waits = self.waits.iter().filter(|(line, _)| lines(line)).map(|(_, wait)| *wait);
        waits.max().unwrap_or_default()
    }

    /// How often anybody was told.
    pub fn told(&self) -> usize {
        self.history.subscribers.iter().map(Subscriber::announcements).sum()
    }
}

/// What a client was told, but for events.
fn told(subscriber: &Subscriber) -> Vec<String> {
    let seen = subscriber.seen.iter().filter(|(_, seen)| !matches!(seen, Seen::Event(..)));
    seen.map(|(_, seen)| format!("{seen:?}")).collect()
}

/// An event as clients must see it, whatever the order of its members.
pub fn canonical(event: &Value) -> String {
    let members: BTreeMap<&String, &Value> = event.as_object().expect("events are objects").iter().collect();
    serde_json::to_string(&members).expect("it was JSON")
}

/// The address of a port of ours.
pub fn local(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}
