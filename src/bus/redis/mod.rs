//! The bus across nodes: ids and history in Redis, Pub/Sub as the hint, one sequence for each
//! followed channel.
//!
//! One task owns the `Bus`. Calls to Redis run in tasks of their own, which own nothing and send
//! back an `Outcome`.
//!
//! | file | what it does |
//! |---|---|
//! | `session`, `commands` | the two connections to one Redis, and commands over them |
//! | `link`, `dns`, `status` | connecting, reconnecting, and what `/readyz` and the log say about it |
//! | `primaries`, `slots`, `topology` | one primary for each part of a cluster, and which it is |
//! | `url` | from `--redis` to the configuration of fred |
//! | `requirements`, `advice`, `errors` | what a node needs of Redis; errors and what to do about them |
//! | `scripts`, `functions`, `settings` | the Lua in Redis, its arguments, and the names of keys |
//! | `reply`, `decode` | replies and messages into entries |
//! | `subscriptions`, `followed` | from Pub/Sub to the shards, gaps filled from the stream |
//! | `publishing`, `publish_queue` | from the shards to the stream, one call in flight per channel |
//! | `inboxes` | the inboxes of this node: their limit, and samples of them for the metrics |
//! | `history` | pages of history for clients that are behind |
//! | `control` | commands of backends, and bans |
//! | `presence` | which users are in a channel, over all nodes |
//! | `probe`, `faults` | the comparison of positions every second; channels whose data is damaged |
//! | `inspect` | what `fanfare doctor` reports about a Redis |

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use fred::types::{Message, Resp3Frame};
use tokio::sync::broadcast::error::{RecvError, TryRecvError};
use tokio::sync::{broadcast, mpsc};

use self::control::Control;
use self::errors::{CallError, ConnectError};
use self::faults::FaultLog;
use self::followed::FollowedChannel;
use self::history::History;
use self::inboxes::{Inboxes, Sample};
use self::link::Link;
use self::presence::Presence;
use self::primaries::{Primaries, Primary, SessionId};
use self::publish_queue::PublishQueue;
use self::publishing::Publishing;
use self::scripts::{KnownPosition, StoredBans};
use self::session::{Report, Session};
use self::settings::RedisSettings;
use self::subscriptions::{ReadPurpose, Subscriptions};
use self::topology::{Topology, View};
use super::control::Executor;
use super::{BusContext, Follower, OrderWaiter, Page, Request, ShardSender, Unusable};
use crate::config::{RedisUrl, Settings};
use crate::metrics::{BusMetrics, Readiness};
use crate::protocol::event::{ChannelName, EventId};

mod advice;
mod commands;
mod control;
pub mod decode;
mod dns;
mod errors;
mod faults;
mod followed;
mod functions;
mod history;
mod inboxes;
pub mod inspect;
mod link;
mod presence;
mod primaries;
mod probe;
mod publish_queue;
mod publishing;
mod reply;
mod requirements;
mod scripts;
mod server;
mod session;
mod settings;
mod slots;
mod status;
mod subscriptions;
mod topology;
pub mod url;

pub use self::errors::MissingRights;
pub use self::scripts::{PublishReply, parse_page, parse_publish}; // for the fuzz targets, as decode is

/// How often deadlines are checked. Timeouts of publishes and probes are accurate to this.
const TICK: Duration = Duration::from_millis(100);

/// Most messages or requests handled before the other inputs have their turn.
const TURN_MAX: usize = 256;

/// How long a channel that is neither followed nor published to is remembered.
const IDLE: Duration = Duration::from_secs(60);

/// The result of a call to Redis, and the session that made it: see [`Primaries::is_current`].
enum Outcome {
    Connected(SessionId, Box<(Session, broadcast::Receiver<Message>)>),
    NotConnected(SessionId, ConnectError),
    Session(SessionId, Report),
    Published(SessionId, ChannelName, Result<Resp3Frame, CallError>),
    Read(SessionId, ChannelName, ReadPurpose, Result<Page, CallError>),
    Page(SessionId, ChannelName, EventId, Result<Page, CallError>),
    Ordered(SessionId, OrderWaiter, Result<EventId, CallError>),
    BansRead(SessionId, Result<StoredBans, CallError>),
    ProbeSent(SessionId, Result<(), CallError>),
    FunctionLoaded(SessionId, Result<(), CallError>),
    InboxesSampled(Vec<(ChannelName, Option<Sample>)>),
    LookedUp(SessionId, Result<Vec<SocketAddr>, String>),
    PresenceUpdated(SessionId, Vec<ChannelName>, Result<Resp3Frame, CallError>),
    Topology(Result<View, ConnectError>),
}

/// The messages of a session.
type Messages = (SessionId, broadcast::Receiver<Message>);

/// What this node knows of a channel, in both directions.
struct Channel {
    primary: usize,
    known: KnownPosition,
    /// A read for the base is in flight.
    loading_base: bool,
    queue: PublishQueue,
    followed: Option<FollowedChannel>,
    /// It is in the rotation of [`Probes`](probe::Probes).
    in_rotation: bool,
    last_used: Instant,
}

impl Channel {
    fn at(primary: usize) -> Channel {
        Channel {
            primary,
            known: KnownPosition::default(),
            loading_base: false,
            queue: PublishQueue::default(),
            followed: None,
            in_rotation: false,
            last_used: Instant::now(),
        }
    }

    fn is_idle(&self, now: Instant) -> bool {
        let unused = self.followed.is_none() && self.queue.is_idle();
        unused && !self.loading_base && !self.in_rotation && now.duration_since(self.last_used) > IDLE
    }
}

/// What all parts of the bus share and none changes.
struct Handles {
    settings: Arc<RedisSettings>,
    shards: Arc<dyn ShardSender>,
    metrics: Arc<BusMetrics>,
    readiness: Arc<Readiness>,
    outcomes: mpsc::UnboundedSender<Outcome>,
}

struct Bus {
    handles: Handles,
    primaries: Primaries,
    /// `None` for a Redis without cluster.
    topology: Option<Topology>,
    /// Boxed, since a table has up to twice as many places as entries.
    channels: HashMap<ChannelName, Box<Channel>>,
    subscriptions: Subscriptions,
    publishing: Publishing,
    inboxes: Inboxes,
    history: History,
    control: Control,
    presence: Presence,
    faults: FaultLog,
    next_cleanup: Instant,
}

/// What the status of a primary is before the first attempt to connect has finished.
fn connecting(address: &str) -> String {
    format!("connecting to Redis at {address}")
}

/// Runs until all senders of requests are dropped.
pub async fn run(settings: &Settings, url: &RedisUrl, context: BusContext) -> Result<(), Unusable> {
    let configs = url::configs(url).map_err(|error| Unusable(error.to_string()))?;
    let topology = url.is_cluster().then(|| Topology::new(&configs));
    let BusContext { mut requests, shards, bans, metrics, readiness } = context;
    let control = Control::new(Executor::new(bans, shards.clone(), metrics.clone()));
    let (outcomes, mut outcomes_rx) = mpsc::unbounded_channel();
    let handles =
        Handles { settings: Arc::new(RedisSettings::new(settings)), shards, metrics, readiness, outcomes };
    // Until the slots of a cluster are known, it stands for all of them and does not connect.
    let first_attempt = topology.is_none().then(Instant::now);
    let link = Link::new(super::starting(settings), first_attempt);
    let first = Primary::new(None, configs[0].clone(), link, settings.max_message_size);
    let mut bus = Bus {
        handles,
        primaries: Primaries::new(first),
        topology,
        channels: HashMap::new(),
        subscriptions: Subscriptions::default(),
        publishing: Publishing::default(),
        inboxes: Inboxes::new(&settings.inbox, settings.max_channels.get()),
        history: History::new(),
        control,
        presence: Presence::new(settings),
        faults: FaultLog::default(),
        next_cleanup: Instant::now() + IDLE,
    };
    let mut messages: Vec<Messages> = Vec::new();
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            request = requests.recv() => {
                let Some(request) = request else { return Ok(()) };
                bus.on_request(request);
                for _ in 1..TURN_MAX {
                    let Ok(request) = requests.try_recv() else { break };
                    bus.on_request(request);
                }
            }
            (at, message) = next_message(&mut messages) => {
                let (session, messages_rx) = &mut messages[at];
                bus.on_message(session.primary, message);
                for _ in 1..TURN_MAX {
                    match messages_rx.try_recv() {
                        Ok(message) => bus.on_message(session.primary, Ok(message)),
                        Err(TryRecvError::Lagged(lost)) => {
                            bus.on_message(session.primary, Err(RecvError::Lagged(lost)));
                        }
                        _ => break, // if it is closed, the next turn handles that
                    }
                }
                messages.rotate_left(1); // the others have their turn
            }
            outcome = outcomes_rx.recv() => {
                let outcome = outcome.expect("the bus itself holds a sender");
                bus.on_outcome(outcome, &mut messages)?;
            }
            _ = tick.tick() => bus.on_tick(Instant::now()),
        }
        messages.retain(|(session, _)| bus.primaries.is_open(*session));
        bus.send_changed();
    }
}

/// The next message, and the place of its receiver.
async fn next_message(messages: &mut [Messages]) -> (usize, Result<Message, RecvError>) {
    if let [(_, messages)] = messages {
        return (0, messages.recv().await);
    }
    let mut waits: Vec<_> = messages.iter_mut().map(|(_, messages)| Box::pin(messages.recv())).collect();
    std::future::poll_fn(|context| {
        for (at, wait) in waits.iter_mut().enumerate() {
            if let Poll::Ready(message) = wait.as_mut().poll(context) {
                return Poll::Ready((at, message));
            }
        }
        Poll::Pending
    })
    .await
}

impl Bus {
    fn on_request(&mut self, request: Request) {
        match request {
            Request::Publish(publish) => self.publish(publish),
            Request::Follow { channel, shard } => {
                self.follow(channel.name, Follower { shard, form: channel.form });
            }
            Request::Unfollow { channel, shard } => {
                self.unfollow(&channel.name, Follower { shard, form: channel.form });
            }
            Request::Read { channel, position, bytes, reader } => {
                self.read_page(channel, position, bytes, reader);
            }
            Request::Refresh { channel, shard } => {
                self.refresh(channel.name, Follower { shard, form: channel.form });
            }
            Request::Order { order, waiter } => self.order(&order, waiter),
            Request::Presence { channel, user, present } => self.presence.on_user(channel, user, present),
            Request::FollowPresence { channel, shard, follow } => {
                self.follow_presence(&channel.name, Follower { shard, form: channel.form }, follow);
            }
            Request::ReadPresence { channel, from, limit, answer } => {
                self.read_presence(&channel, from, limit, answer);
            }
        }
    }

    fn on_outcome(&mut self, outcome: Outcome, messages: &mut Vec<Messages>) -> Result<(), Unusable> {
        match outcome {
            Outcome::Connected(id, session) if self.primaries.is_current(id) => {
                let (session, receiver) = *session;
                messages.push((id, receiver));
                self.on_connected(id.primary, session);
            }
            Outcome::NotConnected(id, error) if self.primaries.is_current(id) => {
                self.on_not_connected(id.primary, error)?;
            }
            Outcome::Session(id, report) if self.primaries.is_current(id) => match report {
                Report::Subscribed(ticket) => self.on_subscribed(id.primary, ticket),
                Report::Closed(why) => self.close_session(id.primary, &why),
            },
            Outcome::ProbeSent(id, result) if self.primaries.is_current(id) => {
                self.on_probe_sent(id, result);
            }
            Outcome::FunctionLoaded(id, result) if self.primaries.is_current(id) => {
                let functions = &mut self.primaries[id.primary].functions;
                match result {
                    Ok(()) => functions.on_loaded(None),
                    Err(CallError::ErrorReply(text)) => functions.on_loaded(Some(text)),
                    Err(_) => {} // the session reports that it has closed
                }
            }
            Outcome::LookedUp(id, found) if self.primaries.is_current(id) => {
                self.on_looked_up(id.primary, found);
            }
            Outcome::Topology(found) => self.on_topology(found)?,
            // Results of calls count whichever session made the call: each call has exactly one.
            Outcome::Published(id, channel, result) => self.on_published(id, &channel, result),
            Outcome::Read(id, channel, purpose, result) => self.on_read(id, &channel, purpose, result),
            Outcome::Page(id, channel, position, result) => self.on_page(id, channel, position, result),
            Outcome::Ordered(id, waiter, result) => self.on_ordered(id, waiter, result),
            Outcome::BansRead(id, result) => self.on_bans_read(id, result),
            Outcome::PresenceUpdated(id, channels, result) => {
                self.on_presence_updated(id, &channels, result);
            }
            Outcome::InboxesSampled(found) => self.on_inboxes_sampled(found),
            _ => {} // of an earlier session
        }
        Ok(())
    }

    fn on_tick(&mut self, now: Instant) {
        self.check_topology(now);
        for primary in self.primaries.numbers() {
            self.check_link(primary, now);
        }
        self.history.expire(now);
        self.expire_publishes(now);
        self.check_control(now);
        self.update_presence(now);
        self.sample_inboxes(now);
        if now >= self.next_cleanup {
            self.next_cleanup = now + IDLE / 4;
            self.channels.retain(|_, channel| !channel.is_idle(now));
            self.channels.shrink_to(2 * self.channels.len());
            self.control.executor.expire_bans();
            for primary in self.primaries.numbers() {
                self.primaries[primary].shrink();
            }
            self.presence.shrink();
        }
    }

    /// Handles the error of a call for the session that made it.
    fn on_call_error(&mut self, session: SessionId, error: &CallError) {
        if !self.primaries.is_current(session) {
            return;
        }
        match error {
            CallError::NoReply(text) => self.close_session(session.primary, text),
            CallError::NoReplyElsewhere(_) => {} // the session there reports it
            // A demoted primary keeps its connections open. The next connection finds the new
            // primary.
            CallError::ErrorReply(text) if text.starts_with("READONLY") => {
                self.close_session(session.primary, text);
            }
            CallError::ErrorReply(text) => self.faults.log(text),
        }
    }
}
