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
//! | `url` | from `--redis` to the configuration of fred |
//! | `requirements`, `advice`, `errors` | what a node needs of Redis; errors and what to do about them |
//! | `scripts`, `functions`, `settings` | the Lua in Redis, its arguments, and the names of keys |
//! | `reply`, `decode` | replies and messages into entries |
//! | `subscriptions`, `followed` | from Pub/Sub to the shards, gaps filled from the stream |
//! | `publishing`, `publish_queue` | from the shards to the stream, one call in flight per channel |
//! | `inboxes` | the inboxes of this node: their limit, and looks at them for the metrics |
//! | `history` | pages of history for clients that are behind |
//! | `control` | commands of backends, and bans |
//! | `presence` | which users are in a channel, over all nodes |
//! | `probe`, `faults` | the comparison of positions every second; channels whose data is damaged |
//! | `inspect` | what `fanfare doctor` reports about a Redis |

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fred::types::config::Config;
use fred::types::{Message, Resp3Frame};
use tokio::sync::broadcast::error::{RecvError, TryRecvError};
use tokio::sync::{Semaphore, broadcast, mpsc};

use self::control::Control;
use self::errors::{CallError, ConnectError};
use self::faults::FaultLog;
use self::followed::FollowedChannel;
use self::functions::FunctionLoader;
use self::history::History;
use self::inboxes::{Inboxes, Look};
use self::link::Link;
use self::presence::Presence;
use self::probe::Probes;
use self::publish_queue::PublishQueue;
use self::publishing::Publishing;
use self::scripts::{KnownPosition, StoredBans};
use self::session::{Report, Session};
use self::settings::RedisSettings;
use self::subscriptions::{ReadPurpose, Subscriptions};
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
mod probe;
mod publish_queue;
mod publishing;
mod reply;
mod requirements;
mod scripts;
mod server;
mod session;
mod settings;
mod status;
mod subscriptions;
pub mod url;

pub use self::errors::MissingRights;
pub use self::scripts::{PublishReply, parse_page, parse_publish}; // for the fuzz targets, as decode is

/// How often deadlines are checked. Timeouts of publishes and probes are accurate to this.
const TICK: Duration = Duration::from_millis(100);

/// Most messages or requests handled before the other inputs have their turn.
const TURN_MAX: usize = 256;

/// Reads in flight. Redis executes one after the other anyway, so more would only fill its queue.
const READS_MAX: usize = 64;

/// How long a channel that is neither followed nor published to is remembered.
const IDLE: Duration = Duration::from_secs(60);

/// The result of a call to Redis. The first field is the generation of its session: see
/// [`Link::is_current`].
enum Outcome {
    Connected(u64, Box<(Session, broadcast::Receiver<Message>)>),
    NotConnected(u64, ConnectError),
    Session(u64, Report),
    Published(u64, ChannelName, Result<Resp3Frame, CallError>),
    Read(u64, ChannelName, ReadPurpose, Result<Page, CallError>),
    Page(u64, ChannelName, EventId, Result<Page, CallError>),
    Ordered(u64, OrderWaiter, Result<EventId, CallError>),
    BansRead(u64, Result<StoredBans, CallError>),
    ProbeSent(u64, Result<(), CallError>),
    FunctionLoaded(u64, Result<(), CallError>),
    InboxesLooked(Vec<(ChannelName, Look)>),
    LookedUp(u64, Result<Vec<SocketAddr>, String>),
    PresenceUpdated(u64, Vec<ChannelName>, Result<Resp3Frame, CallError>),
}

/// What this node knows of a channel, in both directions.
struct Channel {
    known: KnownPosition,
    /// A read for the base is in flight.
    loading_base: bool,
    queue: PublishQueue,
    followed: Option<FollowedChannel>,
    /// It is in the rotation of [`Probes`].
    in_rotation: bool,
    last_used: Instant,
}

impl Default for Channel {
    fn default() -> Channel {
        Channel {
            known: KnownPosition::default(),
            loading_base: false,
            queue: PublishQueue::default(),
            followed: None,
            in_rotation: false,
            last_used: Instant::now(),
        }
    }
}

impl Channel {
    fn is_idle(&self, now: Instant) -> bool {
        let unused = self.followed.is_none() && self.queue.is_idle();
        unused && !self.loading_base && !self.in_rotation && now.duration_since(self.last_used) > IDLE
    }
}

/// What all parts of the bus share and none changes.
struct Handles {
    settings: Arc<RedisSettings>,
    config: Config,
    shards: Arc<dyn ShardSender>,
    metrics: Arc<BusMetrics>,
    readiness: Arc<Readiness>,
    outcomes: mpsc::UnboundedSender<Outcome>,
    /// Limits the reads in flight.
    reads: Arc<Semaphore>,
}

struct Bus {
    handles: Handles,
    link: Link,
    /// Boxed, since a table has up to twice as many places as entries.
    channels: HashMap<ChannelName, Box<Channel>>,
    subscriptions: Subscriptions,
    publishing: Publishing,
    inboxes: Inboxes,
    history: History,
    control: Control,
    probes: Probes,
    functions: FunctionLoader,
    presence: Presence,
    faults: FaultLog,
    next_cleanup: Instant,
}

/// Runs until all senders of requests are dropped.
pub async fn run(settings: &Settings, url: &RedisUrl, context: BusContext) -> Result<(), Unusable> {
    let config = url::config(url).map_err(|error| Unusable(error.to_string()))?;
    if config.server.is_clustered() {
        return Err(Unusable(format!(
            "--redis {url}: cluster mode is not supported yet: name a stand-alone Redis or Sentinels"
        )));
    }
    let BusContext { mut requests, shards, bans, metrics, readiness } = context;
    let control = Control::new(Executor::new(bans, shards.clone(), metrics.clone()));
    let (outcomes, mut outcomes_rx) = mpsc::unbounded_channel();
    let handles = Handles {
        settings: Arc::new(RedisSettings::new(settings)),
        config,
        shards,
        metrics,
        readiness,
        outcomes,
        reads: Arc::new(Semaphore::new(READS_MAX)),
    };
    let mut bus = Bus {
        handles,
        link: Link::new(super::starting(settings)),
        channels: HashMap::new(),
        subscriptions: Subscriptions::default(),
        publishing: Publishing::default(),
        inboxes: Inboxes::new(&settings.inbox, settings.max_channels.get()),
        history: History::new(settings.max_message_size),
        control,
        probes: Probes::default(),
        functions: FunctionLoader::new(),
        presence: Presence::new(settings),
        faults: FaultLog::default(),
        next_cleanup: Instant::now() + IDLE,
    };
    let mut messages: Option<broadcast::Receiver<Message>> = None;
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
            message = next_message(&mut messages) => {
                bus.on_message(message);
                for _ in 1..TURN_MAX {
                    match messages.as_mut().map(|rx| rx.try_recv()) {
                        Some(Ok(message)) => bus.on_message(Ok(message)),
                        Some(Err(TryRecvError::Lagged(lost))) => bus.on_message(Err(RecvError::Lagged(lost))),
                        _ => break, // if it is closed, the next turn handles that
                    }
                }
            }
            outcome = outcomes_rx.recv() => {
                let outcome = outcome.expect("the bus itself holds a sender");
                bus.on_outcome(outcome, &mut messages)?;
            }
            _ = tick.tick() => bus.on_tick(Instant::now()),
        }
        if bus.link.session().is_none() {
            messages = None;
        }
        bus.send_changed();
    }
}

async fn next_message(messages: &mut Option<broadcast::Receiver<Message>>) -> Result<Message, RecvError> {
    match messages {
        Some(messages) => messages.recv().await,
        None => std::future::pending().await,
    }
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
            Request::ReadPresence { channel, from, limit, answer } => {
                self.read_presence(&channel, from, limit, answer);
            }
        }
    }

    fn on_outcome(
        &mut self,
        outcome: Outcome,
        messages: &mut Option<broadcast::Receiver<Message>>,
    ) -> Result<(), Unusable> {
        match outcome {
            Outcome::Connected(generation, session) if self.link.is_current(generation) => {
                let (session, receiver) = *session;
                *messages = Some(receiver);
                self.on_connected(session);
            }
            Outcome::NotConnected(generation, error) if self.link.is_current(generation) => {
                self.on_not_connected(error)?;
            }
            Outcome::Session(generation, report) if self.link.is_current(generation) => match report {
                Report::Subscribed(ticket) => self.on_subscribed(ticket),
                Report::Closed(why) => self.close_session(&why),
            },
            Outcome::ProbeSent(generation, result) if self.link.is_current(generation) => {
                self.on_probe_sent(result);
            }
            Outcome::FunctionLoaded(generation, result) if self.link.is_current(generation) => match result {
                Ok(()) => self.functions.on_loaded(None),
                Err(CallError::ErrorReply(text)) => self.functions.on_loaded(Some(text)),
                Err(CallError::NoReply(_)) => {} // the session reports that it has closed
            },
            Outcome::LookedUp(generation, found) if self.link.is_current(generation) => {
                self.on_looked_up(found);
            }
            // Results of calls count whichever session made the call: each call has exactly one.
            Outcome::Published(generation, channel, result) => {
                self.on_published(generation, &channel, result);
            }
            Outcome::Read(generation, channel, purpose, result) => {
                self.on_read(generation, &channel, purpose, result);
            }
            Outcome::Page(generation, channel, position, result) => {
                self.on_page(generation, channel, position, result);
            }
            Outcome::Ordered(generation, waiter, result) => self.on_ordered(generation, waiter, result),
            Outcome::BansRead(generation, result) => self.on_bans_read(generation, result),
            Outcome::PresenceUpdated(generation, channels, result) => {
                self.on_presence_updated(generation, &channels, result);
            }
            Outcome::InboxesLooked(found) => self.on_inboxes_looked(found),
            _ => {} // of an earlier session
        }
        Ok(())
    }

    fn on_tick(&mut self, now: Instant) {
        self.check_link(now);
        self.history.expire(now);
        self.expire_publishes(now);
        self.check_control(now);
        self.update_presence(now);
        self.look_at_inboxes(now);
        if now >= self.next_cleanup {
            self.next_cleanup = now + IDLE / 4;
            self.channels.retain(|_, channel| !channel.is_idle(now));
            self.channels.shrink_to(2 * self.channels.len());
            self.control.expire_bans();
            self.probes.shrink();
            self.subscriptions.shrink();
            self.presence.shrink();
        }
    }

    /// Handles the error of a call for the session that made it.
    fn on_call_error(&mut self, generation: u64, error: &CallError) {
        if !self.link.is_current(generation) {
            return;
        }
        match error {
            CallError::NoReply(text) => self.close_session(text),
            // A demoted primary keeps its connections open. The next connection finds the new
            // primary.
            CallError::ErrorReply(text) if text.starts_with("READONLY") => self.close_session(text),
            CallError::ErrorReply(text) => self.faults.log(text),
        }
    }
}
