//! Sessions, canaries and readiness: whether Redis works for this node, shown every second by a message that this
//! node sends itself through it.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::address::{LOOKUP_EVERY, MOVED_AFTER};
use super::functions::WriteMode;
use super::session::{self, CallError, ConnectError, Script, Session};
use super::settings::random;
use super::{Bus, Outcome, errors, scripts, wire};
use crate::bus::Unusable;

/// Time between two canaries.
const CANARY_EVERY: Duration = Duration::from_secs(1);

/// Channels that one canary compares: about 5 ms of Redis' time.
const CANARY_CHANNELS: usize = 1000;

/// Without a canary for so long the node is not ready.
const CANARY_LATE: Duration = Duration::from_secs(2);

/// Without a canary for so long the connections are given up.
const CANARY_LOST: Duration = Duration::from_secs(4);

/// Time between two checks that the function and settings for other programs are there.
const LOAD_EVERY: Duration = Duration::from_secs(2);

/// The first wait before a new attempt to connect; it doubles each time.
const BACKOFF_MIN: Duration = Duration::from_millis(100);

/// The longest wait before a new attempt to connect.
const BACKOFF_MAX: Duration = Duration::from_secs(3);

const _: () = assert!(CANARY_EVERY.as_millis() < CANARY_LATE.as_millis());
const _: () = assert!(CANARY_LATE.as_millis() < CANARY_LOST.as_millis());

/// What is wrong, by kind, in words that say what to do. Redis comes back by itself; what it refuses needs someone.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Trouble {
    Starting,
    Away(&'static str),
    Refuses(Cow<'static, str>),
}

impl Trouble {
    fn text(&self) -> &str {
        match self {
            Trouble::Starting => "the bus has not answered yet",
            Trouble::Away(text) => text,
            Trouble::Refuses(text) => text,
        }
    }

    fn away(words: &str) -> Trouble {
        Trouble::Away(errors::away(words))
    }

    fn refuses(words: &str) -> Trouble {
        Trouble::Refuses(errors::refused(words).into())
    }
}

/// The way to Redis.
pub(super) struct Link {
    session: Option<Session>,
    /// Counts sessions and attempts, so that what comes late from an earlier one is known for it.
    generation: u64,
    /// When to try next, while there is no session and no attempt under way.
    next_attempt: Option<Instant>,
    failures: u32,
    trouble: Option<Trouble>,
    /// When to look up the name of Redis again.
    next_lookup: Instant,
    /// Lookups in a row without the connected address.
    moved: u32,
    /// The ticket of the subscriptions with which this session began, while they are not in force.
    pending: Option<u64>,
}

impl Link {
    pub(super) fn new() -> Link {
        Link {
            session: None,
            generation: 0,
            next_attempt: Some(Instant::now()),
            failures: 0,
            trouble: Some(Trouble::Starting),
            next_lookup: Instant::now(),
            moved: 0,
            pending: None,
        }
    }

    pub(super) fn session(&self) -> Option<&Session> {
        self.session.as_ref()
    }

    pub(super) fn is_up(&self) -> bool {
        self.session.is_some()
    }

    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    pub(super) fn is_current(&self, generation: u64) -> bool {
        self.generation == generation
    }

    pub(super) fn trouble(&self) -> Option<&str> {
        self.trouble.as_ref().map(Trouble::text)
    }
}

/// The canaries under way.
#[derive(Debug, Default)]
pub(super) struct Canaries {
    last: u64,
    sent: VecDeque<(u64, Instant)>,
    next: Option<Instant>,
    heard: Option<Instant>,
}

/// Canaries remembered for measuring; an older one counts as lost.
const SENT_MAX: usize = 32;

impl Bus {
    /// Looks whether it is time to connect, to send a canary, to give up.
    pub(super) fn watch_link(&mut self, now: Instant) {
        if self.link.next_attempt.is_some_and(|at| at <= now) {
            self.connect();
        }
        if self.link.session.is_none() {
            return;
        }
        let silence =
            self.canaries.heard.map_or(Duration::ZERO, |heard| now.saturating_duration_since(heard));
        if silence > CANARY_LOST {
            self.session_over(&format!("no answer for {} s", silence.as_secs()));
        } else if silence > CANARY_LATE {
            self.set_trouble(Some(Trouble::Away(errors::SILENT)), "no canary came back");
        }
        if now >= self.link.next_lookup {
            self.look_up(now);
        }
        if self.link.pending.is_none() && self.canaries.next.is_some_and(|at| at <= now) {
            self.canaries.next = Some(now + CANARY_EVERY);
            self.send_canary();
        }
    }

    fn connect(&mut self) {
        self.link.next_attempt = None;
        self.link.generation += 1;
        let generation = self.link.generation;
        let (config, terms, outcomes) = (self.config.clone(), self.terms.clone(), self.outcomes.clone());
        let write = self.library_write;
        let reports = {
            let outcomes = outcomes.clone();
            move |report| {
                let _ = outcomes.send(Outcome::Session(generation, report));
            }
        };
        tokio::spawn(async move {
            let made = tokio::time::timeout(
                session::SESSION_TIMEOUT,
                session::connect(config, &terms, write, reports),
            )
            .await;
            let outcome = match made {
                Ok(Ok(made)) => Outcome::Connected(generation, Box::new(made)),
                Ok(Err(error)) => Outcome::NotConnected(generation, error),
                Err(_) => Outcome::NotConnected(generation, ConnectError::Away("no session in time".into())),
            };
            let _ = outcomes.send(outcome);
        });
    }

    /// Starts a lookup of the name of Redis, which may no longer have the connected address.
    fn look_up(&mut self, now: Instant) {
        self.link.next_lookup = now + LOOKUP_EVERY;
        let Some(peer) = self.link.session.as_ref().and_then(|session| session.peer.as_ref()) else { return };
        let (name, outcomes, generation) = (peer.name.clone(), self.outcomes.clone(), self.link.generation);
        tokio::spawn(async move {
            let _ = outcomes.send(Outcome::LookedUp(generation, name.lookup().await));
        });
    }

    /// Disconnects if the name of Redis has moved to another address. A failed lookup proves nothing.
    pub(super) fn looked_up(&mut self, found: Result<Vec<SocketAddr>, String>) {
        let Some(peer) = self.link.session.as_ref().and_then(|session| session.peer.as_ref()) else { return };
        let address = peer.address;
        match found {
            Ok(found) if found.contains(&address) => self.link.moved = 0,
            Ok(found) if !found.is_empty() => self.link.moved += 1,
            _ => {}
        }
        if self.link.moved >= MOVED_AFTER {
            self.session_over(&format!("the name no longer points to {address}"));
        }
    }

    /// What came of loading the function for other programs: said when it changes.
    pub(super) fn tell_of_library(&mut self, refused: Option<Arc<str>>) {
        self.next_load = Instant::now() + LOAD_EVERY;
        if refused.is_none() {
            self.library_write = WriteMode::IfMissing;
        }
        if self.no_library == refused {
            return;
        }
        match &refused {
            None => tracing::info!("FCALL fanfare_publish is available"),
            Some(words) => {
                tracing::warn!("FCALL fanfare_publish is unavailable, all else works: Redis says {words}");
            }
        }
        self.no_library = refused;
    }

    /// While Redis works: writes the function and settings for other programs if they are missing, as after FUNCTION FLUSH,
    /// FLUSHALL, an eviction or a failover.
    fn load_again(&mut self, now: Instant) {
        let Some(session) = &self.link.session else { return };
        if now < self.next_load {
            return;
        }
        self.next_load = now + LOAD_EVERY;
        let (caller, terms, write) = (session.caller(), self.terms.clone(), self.library_write);
        let (outcomes, generation) = (self.outcomes.clone(), self.link.generation);
        tokio::spawn(async move {
            let result = caller.provide_library(&terms, write).await;
            let _ = outcomes.send(Outcome::Library(generation, result));
        });
    }

    /// A session is there: subscribe again to everything, from our own table.
    pub(super) fn connected(&mut self, session: Session) {
        if session.is_over() {
            let words = "the connection broke at once";
            self.set_trouble(Some(Trouble::away(words)), words);
            return self.back_off();
        }
        self.tell_of_library(session.no_library.clone());
        let mut names = vec![self.terms.canary()];
        let followed = self.channels.iter().filter(|(_, channel)| channel.follow.is_some());
        names.extend(followed.flat_map(|(name, _)| self.terms.lanes(name)));
        self.ticket += 1;
        session.subscribe(names, self.ticket);
        self.link.pending = Some(self.ticket);
        (self.link.next_lookup, self.link.moved) = (Instant::now() + LOOKUP_EVERY, 0);
        self.link.session = Some(session);
        self.canaries.heard = Some(Instant::now());
        self.touched.extend(self.busy.iter().cloned());
    }

    pub(super) fn not_connected(&mut self, error: ConnectError) -> Result<(), Unusable> {
        let (trouble, words) = match error {
            ConnectError::Unusable(text) => return Err(Unusable(text)),
            ConnectError::Away(words) => (Trouble::away(&words), words),
            ConnectError::Refused(words) => (Trouble::refuses(&words), words),
            ConnectError::Lacking(what) => (Trouble::Refuses(errors::lacking(&what).into()), String::new()),
            ConnectError::NotPermitted(text) => (Trouble::Refuses(text.into()), String::new()),
        };
        self.set_trouble(Some(trouble), &words);
        self.back_off();
        Ok(())
    }

    fn back_off(&mut self) {
        let wait = BACKOFF_MIN.saturating_mul(1 << self.link.failures.min(10)).min(BACKOFF_MAX);
        self.link.failures += 1;
        // Between half and the whole, so that many nodes don't come at once.
        let jitter = (random() % 1000) as u32;
        self.link.next_attempt = Some(Instant::now() + wait / 2 + wait / 2 * jitter / 1000);
    }

    pub(super) fn session_over(&mut self, why: &str) {
        if self.link.session.take().is_none() {
            return;
        }
        self.link.generation += 1; // so that nothing of it counts any more
        self.link.pending = None;
        self.canaries.sent.clear();
        let trouble = match ["NOPERM", "READONLY"].iter().any(|prefix| why.starts_with(prefix)) {
            true => Trouble::refuses(why),
            false => Trouble::away(why),
        };
        self.fail_joins(trouble.text());
        self.set_trouble(Some(trouble), why);
        self.back_off();
    }

    pub(super) fn subscribed(&mut self, ticket: u64) {
        if self.link.pending.is_some_and(|pending| pending <= ticket) {
            self.link.pending = None;
            self.sweep();
        }
        self.start_follows(ticket);
    }

    /// Compares every followed channel at once.
    fn sweep(&mut self) {
        for _ in 0..self.turns() {
            self.send_canary();
        }
        self.canaries.next = Some(Instant::now() + CANARY_EVERY);
    }

    /// Something was missed: the next tick compares positions.
    pub(super) fn canary_soon(&mut self) {
        self.canaries.next = self.canaries.next.map(|_| Instant::now());
    }

    fn turns(&self) -> usize {
        self.followed.div_ceil(CANARY_CHANNELS).max(1)
    }

    fn send_canary(&mut self) {
        let Some(session) = &self.link.session else { return };
        self.canaries.last += 1;
        let mut args = scripts::canary_args(&self.terms, self.canaries.last);
        for _ in 0..self.rounds.len().min(CANARY_CHANNELS) {
            let Some(name) = self.rounds.pop_front() else { break };
            let Some(channel) = self.channels.get_mut(&name) else { continue };
            let Some(follow) = &channel.follow else {
                channel.in_rounds = false;
                continue;
            };
            if follow.sequence.is_some() {
                scripts::canary_channel(&mut args, &name, channel.known);
            }
            self.rounds.push_back(name);
        }
        self.canaries.sent.push_back((self.canaries.last, Instant::now()));
        if self.canaries.sent.len() > SENT_MAX {
            self.canaries.sent.pop_front();
        }
        self.numbers.canary_seconds.set(self.turns() as u64 * CANARY_EVERY.as_secs());
        let (caller, outcomes, generation) = (session.caller(), self.outcomes.clone(), self.link.generation);
        let key = self.terms.canary();
        tokio::spawn(async move {
            let result = caller.call(Script::Canary, &[&key], args).await.map(|_| ());
            let _ = outcomes.send(Outcome::CanarySent(generation, result));
        });
    }

    pub(super) fn canary_sent(&mut self, result: Result<(), CallError>) {
        let Err(error) = result else { return };
        if let CallError::Refused(text) = &error {
            // The way there and back works, so a new connection would not help.
            self.canaries.heard = Some(Instant::now());
            self.set_trouble(Some(Trouble::refuses(text)), text);
        }
        let generation = self.link.generation;
        self.judge(generation, &error);
    }

    pub(super) fn canary_heard(&mut self, text: &[u8]) {
        let now = Instant::now();
        let text = String::from_utf8_lossy(text);
        let mut lines = text.lines();
        let Some(number) = lines.next().and_then(|line| line.parse::<u64>().ok()) else { return };
        let Some(at) = self.canaries.sent.iter().position(|(sent, _)| *sent == number) else { return };
        let took = now.saturating_duration_since(self.canaries.sent[at].1);
        self.canaries.sent.drain(..=at);
        self.canaries.heard = Some(now);
        self.numbers.round_trips.observe(took);
        self.link.failures = 0;
        self.set_trouble(None, "");
        self.load_again(now);
        for (name, position) in lines.filter_map(wire::canary_line) {
            let (base, head) = match position {
                Ok(position) => position,
                Err(fault) => {
                    self.faults.log(fault);
                    continue;
                }
            };
            let Some((name, _)) = self.channels.get_key_value(name) else { continue };
            let name = name.clone();
            let Some(channel) = self.channels.get_mut(&name) else { continue };
            channel.known.learn(base, head);
            if let Some(sequence) = channel.follow.as_mut().and_then(|follow| follow.sequence.as_mut()) {
                sequence.canary(base, head);
            }
            self.hand_on(&name, Vec::new());
        }
    }

    /// Says whether the bus works: to the balancer at once, to the log only when it changes, there with Redis' own
    /// words.
    fn set_trouble(&mut self, trouble: Option<Trouble>, words: &str) {
        if self.link.trouble == trouble {
            return;
        }
        match (&self.link.trouble, &trouble) {
            (_, None) => tracing::info!("the bus works"),
            (Some(Trouble::Away(_)), Some(Trouble::Away(text))) => {
                tracing::debug!(?words, "the bus is away still: {text}")
            }
            (_, Some(trouble)) => {
                tracing::warn!(?words, "the bus does not work, trying again for ever: {}", trouble.text())
            }
        }
        self.readiness.set_bus(trouble.as_ref().map(|trouble| trouble.text().to_owned()));
        self.link.trouble = trouble;
    }
}
