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

use crate::checker::{Attempt, Breach, History, Moment, Outcome, Seen, Watcher, judge};
use crate::common::client::JSON_MODE;
use crate::common::{Nodes, Redis, Rng, until};
use crate::workload::publishers;
use crate::workload::watchers;
use crate::workload::world::World;

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
pub struct Crowd {
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

impl Default for Crowd {
    fn default() -> Crowd {
        Crowd {
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

/// A crowd at work.
pub struct Run {
    /// What all share.
    pub shared: Arc<Shared>,
    watchers: Vec<JoinHandle<Watcher>>,
    publishers: Vec<JoinHandle<()>>,
    history: History,
}

impl Run {
    /// Sends a crowd to these nodes, and waits until everyone is there and events flow.
    pub async fn start(world: &World, crowd: Crowd) -> Run {
        Run::at(&world.nodes, 2, &world.redis, crowd).await
    }

    /// The same for nodes that are on more than one Redis.
    pub async fn at(nodes: &Nodes, count: usize, redis: &Redis, crowd: Crowd) -> Run {
        let shared = Arc::new(Shared::new(&crowd.channel, nodes.clone(), redis.port()));
        let mut watchers = Vec::new();
        let mut watcher = |user: u64, kind: Kind, home: Option<usize>, stalls: Option<u64>| {
            let name = format!("{kind:?} {} of user{user}", watchers.len());
            shared.stands(&name, 0);
            let plan = watchers::Plan {
                name,
                user: format!("user{user}"),
                kind,
                home,
                door: None,
                stalls,
                narrow: false,
            };
            watchers.push(tokio::spawn(watchers::watch(
                shared.clone(),
                plan,
                crowd.seed + watchers.len() as u64,
            )));
        };
        for home in 0..count {
            for user in 0..crowd.users {
                for kind in [Kind::Recovering, Kind::Json, Kind::Plain] {
                    watcher(user, kind, Some(home), None);
                }
            }
        }
        for n in 0..crowd.roamers {
            let kind = [Kind::Recovering, Kind::Json, Kind::Plain][n as usize % 3];
            watcher(n % crowd.users, kind, None, (n < crowd.slow).then_some(400));
        }
        let mut publishers: Vec<JoinHandle<()>> = Vec::new();
        let users: Arc<[String]> = (0..crowd.users + 1).map(|user| format!("user{user}")).collect();
        let mut seed = crowd.seed * 1000;
        let mut plan = || {
            seed += 1;
            publishers::Plan {
                shared: shared.clone(),
                users: users.clone(),
                pace: crowd.pace,
                rng: Rng(seed),
                seed,
            }
        };
        for _ in 0..crowd.clients {
            publishers.push(tokio::spawn(publishers::json_client(plan())));
            publishers.push(tokio::spawn(publishers::plain_client(plan())));
            publishers.push(tokio::spawn(publishers::poster(plan())));
        }
        for _ in 0..crowd.programs {
            publishers.push(tokio::spawn(publishers::program(plan())));
        }
        let run = Run { shared, watchers, publishers, history: History::default() };
        run.flows().await;
        run
    }

    /// Ids may fall: see [`History::ids_may_fall`].
    pub fn ids_may_fall(&mut self) {
        self.history.ids_may_fall = true;
    }

    /// Programs find Redis at this port from now on.
    pub fn programs_go_to(&self, redis: &Redis) {
        self.shared.redis.store(redis.port(), Ordering::SeqCst);
    }

    /// Programs find no Redis until told where.
    pub fn programs_go_to_nobody(&self) {
        self.shared.redis.store(0, Ordering::SeqCst);
    }

    /// How many events were acknowledged so far.
    pub fn acked(&self) -> usize {
        self.shared.acked().0
    }

    /// Waits until so many more events are acknowledged.
    pub async fn goes_on(&self, more: usize) {
        let enough = self.acked() + more;
        until("more events to be acknowledged", || async { (self.acked() >= enough).then_some(()) }).await;
    }

    /// Waits until all works: an event acknowledged from now on, and everybody beyond it.
    pub async fn flows(&self) {
        self.goes_on(1).await;
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
    pub async fn end(self) -> Verdict {
        let ended = self.finish().await;
        let breaches = judge(&ended.verdict.history);
        let shown = &breaches[..breaches.len().min(20)];
        assert!(breaches.is_empty(), "the promise is broken {} times:\n{shown:#?}", breaches.len());
        assert!(ended.missing.is_none(), "{}", ended.missing.unwrap_or_default());
        for watcher in &ended.verdict.history.watchers {
            assert!(watcher.stayed || watcher.home.is_none(), "{} was not there at the end", watcher.name);
            assert!(watcher.events() > 20, "{} has seen next to nothing", watcher.name);
        }
        ended.verdict
    }

    /// The same for a run in which the judge must object: what he says.
    pub async fn breaches(self) -> Vec<Breach> {
        judge(&self.finish().await.verdict.history)
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
        for watcher in self.watchers {
            history.watchers.push(watcher.await.expect("a client that saw what it may"));
        }
        history.attempts = self.shared.attempts();
        let waits = std::mem::take(&mut *self.shared.waits.lock().expect("all have ended"));
        Ended { verdict: Verdict { history, waits }, missing }
    }
}

struct Ended {
    verdict: Verdict,
    /// Who did not come to the end.
    missing: Option<String>,
}

/// A run that kept the promise.
pub struct Verdict {
    /// What happened.
    pub history: History,
    /// How long each publisher waited for each answer, by its line.
    waits: Vec<(String, Duration)>,
}

impl Verdict {
    /// How many events had this outcome.
    pub fn count(&self, wanted: impl Fn(Outcome) -> bool) -> usize {
        self.history.attempts.iter().filter(|attempt| wanted(attempt.outcome)).count()
    }

    /// Whether anybody saw this event.
    pub fn came(&self, body: &str) -> bool {
        let is = |seen: &Seen| matches!(seen, Seen::Event(_, other, _) if other == body);
        self.history.watchers.iter().any(|watcher| watcher.seen.iter().any(|(_, seen)| is(seen)))
    }

    /// How many events were acknowledged.
    pub fn acked(&self) -> usize {
        self.count(|outcome| matches!(outcome, Outcome::Acked(_)))
    }

    /// Fails if anybody was told that something may be missing: nothing was, so every event reached everybody.
    pub fn nobody_was_told(&self) {
        for watcher in &self.history.watchers {
            assert_eq!(watcher.announcements(), 0, "{}: {:?}", watcher.name, told(watcher));
        }
    }

    /// Fails unless everybody who was there all the time was told, so often at least and at most.
    pub fn everybody_was_told(&self, often: std::ops::RangeInclusive<usize>) {
        for watcher in self.history.watchers.iter().filter(|watcher| watcher.recovers) {
            let count = watcher.announcements();
            assert!(often.contains(&count), "{} was told {count} times: {:?}", watcher.name, told(watcher));
        }
        let plain = self.history.watchers.iter().filter(|watcher| !watcher.recovers);
        assert!(
            plain.map(Watcher::announcements).sum::<usize>() > 0,
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
        self.history.watchers.iter().map(Watcher::announcements).sum()
    }
}

/// What a client was told, but for events.
fn told(watcher: &Watcher) -> Vec<String> {
    let seen = watcher.seen.iter().filter(|(_, seen)| !matches!(seen, Seen::Event(..)));
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
