//! Runs a workload: subscribers and publishers of every kind, whose records go to the checker.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::task::JoinHandle;

use crate::checker::{History, Subscriber, Violation, find_violations};
use crate::common::client::JSON_MODE;
use crate::common::{Nodes, Redis, RedisCluster, Rng, TokenKey, until};
use crate::workload::publishers;
use crate::workload::report::Report;
use crate::workload::shared::{Channel, Shared};
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
    /// Channels of clients that follow several on one socket: one that stays on every node, and one
    /// that disconnects and resumes, has no default channel and changes its subscriptions. Each
    /// channel but the main one has publishers that are half as fast. 1: no such clients.
    pub channels: usize,
    /// `--max-subscriptions` of the nodes.
    pub subscriptions_max: usize,
    /// The key of the nodes, if clients need tokens. Then the client that changes its subscriptions
    /// loses channels by its token, too.
    pub token_key: Option<TokenKey>,
    /// The ports of a Redis Cluster: its publishers by FCALL follow redirections.
    pub redis_cluster: Vec<u16>,
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
            channels: 5,
            subscriptions_max: 100,
            token_key: None,
            redis_cluster: Vec::new(),
        }
    }
}

/// A running workload.
pub struct Run {
    pub shared: Arc<Shared>,
    subscribers: Vec<JoinHandle<Vec<Subscriber>>>,
    publishers: Vec<JoinHandle<()>>,
    /// See [`History::ids_may_fall`].
    ids_may_fall: bool,
}

impl Run {
    /// Starts a workload on a testbed, and waits until events are delivered to all subscribers.
    pub async fn start(testbed: &Testbed, workload: Workload) -> Run {
        Run::at(&testbed.nodes, 2, &testbed.redis, workload).await
    }

    /// The same for nodes on several Redis servers.
    pub async fn at(nodes: &Nodes, count: usize, redis: &Redis, workload: Workload) -> Run {
        Run::with(nodes, count, redis, workload, |_| {}).await
    }

    /// The same on a Redis Cluster, with these channels.
    pub async fn on_cluster(
        nodes: &Nodes,
        count: usize,
        cluster: &RedisCluster,
        channels: &[String],
        workload: Workload,
    ) -> Run {
        let workload = Workload { redis_cluster: cluster.ports(), channels: channels.len(), ..workload };
        let name = |shared: &mut Shared| {
            for (channel, name) in shared.channels.iter_mut().zip(channels) {
                channel.name.clone_from(name);
            }
        };
        Run::with(nodes, count, &cluster.nodes[0], workload, name).await
    }

    async fn with(
        nodes: &Nodes,
        count: usize,
        redis: &Redis,
        workload: Workload,
        change: impl FnOnce(&mut Shared),
    ) -> Run {
        let mut shared = Shared::new(&workload.channel, workload.channels, nodes.clone(), redis.port());
        shared.token_key = workload.token_key;
        shared.other_redis = workload.redis_cluster;
        change(&mut shared);
        let shared = Arc::new(shared);
        let several = workload.channels;
        let mut subscribers = Vec::new();
        let mut subscriber =
            |user: u64, kind: Kind, home: Option<usize>, stalls: Option<u64>, subscriptions: Range<usize>| {
                let name = format!("{kind:?} {} of user{user}", subscribers.len());
                let plan = subscribers::Plan {
                    name,
                    user: format!("user{user}"),
                    kind,
                    home,
                    addr: None,
                    stalls,
                    narrow: false,
                    subscriptions,
                    subscriptions_max: workload.subscriptions_max,
                };
                let seed = workload.seed + subscribers.len() as u64;
                subscribers.push(subscribers::watch(shared.clone(), plan, seed));
            };
        for home in 0..count {
            for user in 0..workload.users {
                for kind in [Kind::Recovering, Kind::Json, Kind::Plain] {
                    subscriber(user, kind, Some(home), None, 0..0);
                }
            }
            if several > 1 {
                let most = workload.subscriptions_max + 1;
                subscriber(0, Kind::Json, Some(home), None, 1..several.min(most));
            }
        }
        for n in 0..workload.roamers {
            let kind = [Kind::Recovering, Kind::Json, Kind::Plain][n as usize % 3];
            subscriber(n % workload.users, kind, None, (n < workload.slow).then_some(400), 0..0);
        }
        if several > 1 {
            subscriber(0, Kind::Json, None, (workload.slow > 0).then_some(400), 0..several);
        }
        let subscribers = subscribers.into_iter().map(tokio::spawn).collect();
        let mut publishers: Vec<JoinHandle<()>> = Vec::new();
        let users: Arc<[String]> = (0..workload.users + 1).map(|user| format!("user{user}")).collect();
        let mut seed = workload.seed * 1000;
        let mut plan = |channels: Range<usize>| {
            seed += 1;
            publishers::Plan {
                shared: shared.clone(),
                pace: if channels.start == 0 { workload.pace } else { 2 * workload.pace },
                channels,
                users: users.clone(),
                rng: Rng(seed),
                seed,
            }
        };
        for _ in 0..workload.clients {
            publishers.push(tokio::spawn(publishers::json_client(plan(0..1))));
            publishers.push(tokio::spawn(publishers::plain_client(plan(0..1))));
            publishers.push(tokio::spawn(publishers::poster(plan(0..1))));
        }
        for _ in 0..workload.programs {
            publishers.push(tokio::spawn(publishers::program(plan(0..1))));
        }
        if several > 1 && workload.clients > 0 {
            publishers.push(tokio::spawn(publishers::json_client(plan(1..several))));
            publishers.push(tokio::spawn(publishers::poster(plan(1..several))));
        }
        if several > 1 && workload.programs > 0 {
            publishers.push(tokio::spawn(publishers::program(plan(1..several))));
        }
        let run = Run { shared, subscribers, publishers, ids_may_fall: false };
        let started = run.deliver_in_all("start").await;
        started.unwrap_or_else(|missing| panic!("{missing}"));
        run
    }

    /// See [`History::ids_may_fall`].
    pub fn ids_may_fall(&mut self) {
        self.ids_may_fall = true;
    }

    /// Backends find Redis at this port from now on.
    pub fn connect_programs(&self, redis: &Redis) {
        self.shared.redis.store(redis.port(), Ordering::SeqCst);
    }

    /// Backends find no Redis until [`Run::connect_programs`].
    pub fn disconnect_programs(&self) {
        self.shared.redis.store(0, Ordering::SeqCst);
    }

    /// The number of events acknowledged in the main channel so far.
    pub fn acked(&self) -> usize {
        self.shared.main().acked().0
    }

    /// Waits until this many more events are acknowledged in the main channel.
    pub async fn wait_for_acks(&self, more: usize) {
        let enough = self.acked() + more;
        until("more events to be acknowledged", || async { (self.acked() >= enough).then_some(()) }).await;
    }

    /// Waits until an event is acknowledged from now on in the main channel, and every subscriber
    /// has received it.
    pub async fn wait_for_delivery(&self) {
        self.wait_for_acks(1).await;
        let (_, highest) = self.shared.main().acked();
        self.reached(highest).await;
    }

    async fn reached(&self, id: u64) {
        let waited = tokio::time::timeout(TIMEOUT, async {
            while !self.shared.main().behind(id).is_empty() {
                tokio::time::sleep(LOOK).await;
            }
        });
        if waited.await.is_err() {
            panic!("{}", self.standing(&[(0, id)]).await);
        }
    }

    /// Publishes an event in each channel, and waits until all its subscribers have received it. An
    /// error names those that have not.
    async fn deliver_in_all(&self, name: &str) -> Result<(), String> {
        let mut open: Vec<usize> = (0..self.shared.channels.len()).collect();
        let mut sent: Vec<(usize, u64)> = Vec::new();
        let delivered = tokio::time::timeout(TIMEOUT, async {
            // A subscriber that joins without recovery after the event never sees it: then another one
            // is published. The same for channels in which it could not be published.
            for n in 0.. {
                let publish = |channel: &usize| publishers::mark(&self.shared, *channel, name, n);
                let ids = join_all(open.iter().map(publish)).await;
                sent =
                    open.iter().copied().zip(ids).filter_map(|(channel, id)| Some((channel, id?))).collect();
                for _ in 0..20 {
                    tokio::time::sleep(LOOK).await;
                    sent.retain(|(channel, id)| {
                        let is_delivered = self.shared.channels[*channel].behind(*id).is_empty();
                        open.retain(|other| !is_delivered || other != channel);
                        !is_delivered
                    });
                    if open.is_empty() {
                        return;
                    }
                }
            }
        });
        match delivered.await {
            Ok(()) => Ok(()),
            Err(_) => Err(self.standing(&sent).await),
        }
    }

    /// Subscribers that are behind these ids of channels, and the statistics of the nodes.
    async fn standing(&self, ends: &[(usize, u64)]) -> String {
        let behind = ends.iter().map(|(channel, id)| (id, self.shared.channels[*channel].behind(*id)));
        let behind: Vec<_> = behind.filter(|(_, behind)| !behind.is_empty()).collect();
        let mut text = format!("some subscribers did not reach the end: {behind:#?}");
        for node in self.shared.nodes.all() {
            text += &format!("\n{}: {}", node.public, node.admin("GET", "/stats", b"").await.body);
        }
        text
    }

    /// Ends the run: publishers stop, subscribers read to the end, and the checker runs. Fails the
    /// test on violations.
    pub async fn end(self) -> Report {
        let ended = self.finish().await;
        let violations: Vec<Violation> = ended.report.histories().flat_map(find_violations).collect();
        let shown = &violations[..violations.len().min(20)];
        assert!(violations.is_empty(), "the promise is broken {} times:\n{shown:#?}", violations.len());
        assert!(ended.missing.is_none(), "{}", ended.missing.unwrap_or_default());
        for history in ended.report.histories() {
            for subscriber in &history.subscribers {
                assert!(
                    subscriber.stayed || subscriber.home.is_none(),
                    "{} was not connected at the end of {}",
                    subscriber.name,
                    history.channel
                );
            }
        }
        for subscriber in &ended.report.history.subscribers {
            assert!(subscriber.events() > 20, "{} has seen hardly any event", subscriber.name);
        }
        ended.report
    }

    /// The same for a run that must have violations. Returns them.
    pub async fn violations(self) -> Vec<Violation> {
        self.finish().await.report.histories().flat_map(find_violations).collect()
    }

    async fn finish(mut self) -> Ended {
        self.shared.quiet.send_replace(true);
        for publisher in std::mem::take(&mut self.publishers) {
            publisher.await.expect("a publisher without errors");
        }
        let missing = self.deliver_in_all("end").await.err();
        self.shared.over.send_replace(true);
        let mut histories: Vec<History> = self.shared.channels.iter().map(Channel::history).collect();
        histories.iter_mut().for_each(|history| history.ids_may_fall = self.ids_may_fall);
        for subscriber in self.subscribers {
            let records = subscriber.await.expect("a subscriber without errors");
            for (history, records) in histories.iter_mut().zip(records) {
                history.subscribers.push(records);
            }
        }
        Ended { report: Report::new(histories, self.shared.waits()), missing }
    }
}

struct Ended {
    report: Report,
    /// Subscribers that did not reach the end.
    missing: Option<String>,
}
