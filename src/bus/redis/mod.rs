//! The bus across nodes: ids and history in Redis, Pub/Sub as the hint, one sequence for each followed channel.
//!
//! One task owns everything here. What waits for Redis is spawned, owns nothing, and comes back as an
//! `Outcome`. Rooms: `link` (the connections), `address` (the name they are made to), `library` (what other programs call), `scripts` (what runs in Redis), `wire` (messages to
//! entries), `publisher` and `follow` (one channel's two directions), `out` and `inward` (what the task does
//! with them), `pages` (history for those who are behind), `health` (canary, sessions, readiness), `reason` (what is
//! wrong, in plain words), `faults` (the log of channels whose data in Redis is wrong).

use std::collections::{HashMap, HashSet, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fred::types::config::Config;
use fred::types::{Message, Resp3Frame};
use tokio::sync::broadcast::error::{RecvError, TryRecvError};
use tokio::sync::{Semaphore, broadcast, mpsc};

use self::errors::{CallError, ConnectError};
use self::faults::FaultLog;
use self::followed::Follow;
use self::functions::WriteMode;
use self::history::Pages;
use self::link::Link;
use self::probe::Canaries;
use self::publish_queue::Publisher;
use self::scripts::Known;
use self::session::{Report, Session};
use self::settings::Terms;
use super::{BusContext, BusError, Page, Request, ShardSender, Unusable};
use crate::config::{RedisUrl, Settings};
use crate::metrics::{BusMetrics, Readiness};
use crate::protocol::event::{ChannelName, EventId};

mod advice;
mod commands;
pub mod decode;
mod dns;
mod errors;
mod faults;
mod followed;
mod functions;
mod history;
pub mod inspect;
mod link;
mod probe;
mod publish_queue;
mod publishing;
mod reply;
mod requirements;
mod scripts;
mod session;
mod settings;
mod status;
mod subscriptions;

pub use self::scripts::{Taken, page, taken}; // for the fuzz targets, as decode is

/// How often deadlines are looked at. Publish and canary times are met within this.
const TICK: Duration = Duration::from_millis(100);

/// Messages or requests taken in one go before the others have their turn.
const TURN_MAX: usize = 256;

/// Reads in flight. Redis answers one after the other anyway, so more would only fill its queue.
const READS_MAX: usize = 64;

/// How long a channel that nobody follows or publishes to is remembered.
const IDLE: Duration = Duration::from_secs(60);

/// What comes back from whatever waits for Redis.
enum Outcome {
    Connected(u64, Box<(Session, broadcast::Receiver<Message>)>),
    NotConnected(u64, ConnectError),
    Session(u64, Report),
    Published(u64, ChannelName, Result<Resp3Frame, CallError>),
    Read(u64, ChannelName, Purpose, Result<Page, CallError>),
    Page(u64, ChannelName, EventId, Result<Page, CallError>),
    CanarySent(u64, Result<(), CallError>),
    Library(u64, Result<(), CallError>),
    LookedUp(u64, Result<Vec<SocketAddr>, String>),
}

/// Why a channel is read.
#[derive(Clone, Copy, Debug)]
enum Purpose {
    /// To know its base before the first publish.
    Learn,
    /// To know its position when it is first followed; for this subscription.
    Start(u64),
    /// To learn what came after this position.
    Fill(EventId),
}

/// What is known of a channel, in both directions.
struct Channel {
    known: Known,
    learning: bool,
    publisher: Publisher,
    follow: Option<Follow>,
    /// It has its turn with the canaries.
    in_rounds: bool,
    used: Instant,
}

impl Default for Channel {
    fn default() -> Channel {
        Channel {
            known: Known::default(),
            learning: false,
            publisher: Publisher::default(),
            follow: None,
            in_rounds: false,
            used: Instant::now(),
        }
    }
}

struct Bus {
    terms: Arc<Terms>,
    config: Config,
    shards: Arc<dyn ShardSender>,
    numbers: Arc<BusMetrics>,
    readiness: Arc<Readiness>,
    outcomes: mpsc::UnboundedSender<Outcome>,
    reads: Arc<Semaphore>,
    link: Link,
    canaries: Canaries,
    channels: HashMap<ChannelName, Channel>,
    followed: usize,
    /// Channels with events to publish.
    busy: HashSet<ChannelName>,
    /// Those among them that changed in this turn.
    touched: Vec<ChannelName>,
    /// Bytes of events that wait or are in flight.
    waiting_bytes: usize,
    /// The last publish number given, of all channels: a channel that is forgotten must not begin anew.
    call_number: u64,
    /// Channels whose subscription is under way, by its ticket.
    starting: VecDeque<(u64, ChannelName)>,
    /// The last subscription ticket given.
    ticket: u64,
    pages: Pages,
    /// Channels in the order in which canaries visit them.
    rounds: VecDeque<ChannelName>,
    next_sweep: Instant,
    warned_of_size: Option<Instant>,
    faults: FaultLog,
    warned_of_json: Option<Instant>,
    /// Why other programs can't publish by FCALL, as far as was told to the log.
    no_library: Option<Arc<str>>,
    /// How the library is written: replaced once by this process, later only if it is missing.
    library_write: WriteMode,
    /// When to check next whether it is missing.
    next_load: Instant,
}

/// Runs until every sender of requests is gone.
pub async fn run(settings: &Settings, url: &RedisUrl, wiring: BusContext) -> Result<(), Unusable> {
    let config =
        Config::from_url(&url.0).map_err(|error| Unusable(format!("--redis {url}: {}", error.details())))?;
    if config.server.is_clustered() {
        return Err(Unusable(format!("--redis {url}: a cluster is not supported yet")));
    }
    let BusContext { mut requests, shards, numbers, readiness } = wiring;
    let (outcomes, mut outcomes_rx) = mpsc::unbounded_channel();
    let mut bus = Bus {
        terms: Arc::new(Terms::new(settings)),
        config,
        shards,
        numbers,
        readiness,
        outcomes,
        reads: Arc::new(Semaphore::new(READS_MAX)),
        link: Link::new(),
        canaries: Canaries::default(),
        channels: HashMap::new(),
        followed: 0,
        busy: HashSet::new(),
        touched: Vec::new(),
        waiting_bytes: 0,
        call_number: 0,
        starting: VecDeque::new(),
        ticket: 0,
        pages: Pages::new(settings.max_message_size),
        rounds: VecDeque::new(),
        next_sweep: Instant::now() + IDLE,
        warned_of_size: None,
        faults: FaultLog::default(),
        warned_of_json: None,
        no_library: None,
        library_write: WriteMode::Replace,
        next_load: Instant::now(),
    };
    let mut messages: Option<broadcast::Receiver<Message>> = None;
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            request = requests.recv() => {
                let Some(request) = request else { return Ok(()) };
                bus.request(request);
                for _ in 1..TURN_MAX {
                    let Ok(request) = requests.try_recv() else { break };
                    bus.request(request);
                }
            }
            message = next_message(&mut messages) => {
                bus.message(message);
                for _ in 1..TURN_MAX {
                    match messages.as_mut().map(|rx| rx.try_recv()) {
                        Some(Ok(message)) => bus.message(Ok(message)),
                        Some(Err(TryRecvError::Lagged(lost))) => bus.message(Err(RecvError::Lagged(lost))),
                        _ => break, // the next turn hears of an end
                    }
                }
            }
            outcome = outcomes_rx.recv() => {
                let outcome = outcome.expect("the bus itself holds a sender");
                bus.outcome(outcome, &mut messages)?;
            }
            _ = tick.tick() => bus.tick(Instant::now()),
        }
        if !bus.link.is_up() {
            messages = None;
        }
        bus.pump_touched();
    }
}

async fn next_message(messages: &mut Option<broadcast::Receiver<Message>>) -> Result<Message, RecvError> {
    match messages {
        Some(messages) => messages.recv().await,
        None => std::future::pending().await,
    }
}

impl Bus {
    fn request(&mut self, request: Request) {
        match request {
            Request::Publish(publish) => self.publish(publish),
            Request::Follow { channel, shard } => self.follow(channel, shard),
            Request::Unfollow { channel, shard } => self.unfollow(&channel, shard),
            Request::Read { channel, position, bytes, shard } => {
                self.read_page(channel, position, bytes, shard);
            }
            Request::Look { channel, shard } => self.look(channel, shard),
        }
    }

    fn outcome(
        &mut self,
        outcome: Outcome,
        messages: &mut Option<broadcast::Receiver<Message>>,
    ) -> Result<(), Unusable> {
        match outcome {
            Outcome::Connected(generation, made) if self.link.is_current(generation) => {
                let (session, receiver) = *made;
                *messages = Some(receiver);
                self.connected(session);
            }
            Outcome::NotConnected(generation, error) if self.link.is_current(generation) => {
                self.not_connected(error)?;
            }
            Outcome::Session(generation, report) if self.link.is_current(generation) => match report {
                Report::Subscribed(ticket) => self.subscribed(ticket),
                Report::Ended(why) => self.session_over(&why),
            },
            Outcome::CanarySent(generation, result) if self.link.is_current(generation) => {
                self.canary_sent(result);
            }
            Outcome::Library(generation, result) if self.link.is_current(generation) => match result {
                Ok(()) => self.tell_of_library(None),
                Err(CallError::Refused(words)) => self.tell_of_library(Some(words)),
                Err(CallError::Lost(_)) => {} // the session tells of its end itself
            },
            Outcome::LookedUp(generation, found) if self.link.is_current(generation) => self.looked_up(found),
            // These come once for each call, whichever session made it.
            Outcome::Published(generation, channel, result) => self.published(generation, &channel, result),
            Outcome::Read(generation, channel, purpose, result) => {
                self.was_read(generation, &channel, purpose, result);
            }
            Outcome::Page(generation, channel, position, result) => {
                self.page_was_read(generation, channel, position, result);
            }
            _ => {} // of a session that is gone
        }
        Ok(())
    }

    fn tick(&mut self, now: Instant) {
        self.watch_link(now);
        self.pages.expire(now);
        let busy: Vec<ChannelName> = self.busy.iter().cloned().collect();
        for channel in busy {
            self.expire(&channel, now);
            self.touched.push(channel);
        }
        if now >= self.next_sweep {
            self.next_sweep = now + IDLE / 4;
            self.channels.retain(|_, channel| {
                let idle = channel.follow.is_none() && channel.publisher.is_idle() && !channel.learning;
                !(idle && !channel.in_rounds && now.duration_since(channel.used) > IDLE)
            });
        }
    }

    /// Why Redis can't be asked now, if it can't.
    fn away(&self) -> Option<BusError> {
        self.link.trouble().map(|text| BusError::Away(text.into()))
    }

    /// A call's error as what it says about the session that made it.
    fn judge(&mut self, generation: u64, error: &CallError) {
        if !self.link.is_current(generation) {
            return;
        }
        match error {
            CallError::Lost(text) => self.session_over(text),
            // A primary that was demoted, its connections still open: the next connection finds the new one.
            CallError::Refused(text) if text.starts_with("READONLY") => self.session_over(text),
            CallError::Refused(text) => self.faults.log(text),
        }
    }
}
