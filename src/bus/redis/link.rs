//! The connection to Redis over time: attempts, sessions, waits between them, and the host name in
//! `--redis`.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::dns::{HostName, LOOKUP_INTERVAL, MOVED_AFTER};
use super::errors::ConnectError;
use super::session::{self, Session};
use super::settings::random;
use super::status::Status;
use super::{Bus, Outcome, advice};
use crate::bus::Unusable;

/// The first wait before a new attempt to connect. It doubles with each failure.
const BACKOFF_MIN: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(3);

/// The current session, or the next attempt to make one.
pub(super) struct Link {
    session: Option<Session>,
    /// Counts sessions and attempts, so that results of an earlier one are recognized.
    generation: u64,
    /// When to connect next, while there is no session and no attempt.
    next_attempt: Option<Instant>,
    /// Attempts since a probe last came back.
    failures: u32,
    status: Status,
    /// As last logged.
    eviction_warning: Option<String>,
    next_lookup: Instant,
    /// Lookups in a row without the connected address.
    lookups_elsewhere: u32,
    /// The ticket of the first subscriptions of this session, until Redis confirms them.
    subscribing: Option<u64>,
}

impl Link {
    /// `starting` is what [`Status::Starting`] shows.
    pub(super) fn new(starting: String) -> Link {
        Link {
            session: None,
            generation: 0,
            next_attempt: Some(Instant::now()),
            failures: 0,
            status: Status::Starting(starting),
            eviction_warning: None,
            next_lookup: Instant::now(),
            lookups_elsewhere: 0,
            subscribing: None,
        }
    }

    pub(super) fn session(&self) -> Option<&Session> {
        self.session.as_ref()
    }

    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    pub(super) fn is_current(&self, generation: u64) -> bool {
        self.generation == generation
    }

    pub(super) fn status(&self) -> &Status {
        &self.status
    }

    /// Returns the old status if it differs.
    pub(super) fn set_status(&mut self, status: Status) -> Option<Status> {
        (self.status != status).then(|| std::mem::replace(&mut self.status, status))
    }

    /// Whether Redis has confirmed the first subscriptions of this session.
    pub(super) fn is_subscribed(&self) -> bool {
        self.session.is_some() && self.subscribing.is_none()
    }

    /// Redis has confirmed all subscriptions up to `ticket`. True if the session's first ones were
    /// among them.
    pub(super) fn confirm(&mut self, ticket: u64) -> bool {
        self.subscribing.take_if(|first| *first <= ticket).is_some()
    }

    /// A probe came back.
    pub(super) fn reset_backoff(&mut self) {
        self.failures = 0;
    }

    /// Starts an attempt. Returns its generation.
    fn start_attempt(&mut self) -> u64 {
        self.next_attempt = None;
        self.generation += 1;
        self.generation
    }

    fn open(&mut self, session: Session, ticket: u64) {
        self.session = Some(session);
        self.subscribing = Some(ticket);
        (self.next_lookup, self.lookups_elsewhere) = (Instant::now() + LOOKUP_INTERVAL, 0);
    }

    /// Drops the session and invalidates its results. False if there is none.
    fn close(&mut self) -> bool {
        let closed = self.session.take().is_some();
        if closed {
            self.generation += 1;
            self.subscribing = None;
        }
        closed
    }

    fn back_off(&mut self) {
        let wait = BACKOFF_MIN.saturating_mul(1 << self.failures.min(10)).min(BACKOFF_MAX);
        self.failures += 1;
        // Between half of it and all, so that nodes don't connect at the same time.
        let jitter = (random() % 1000) as u32;
        self.next_attempt = Some(Instant::now() + wait / 2 + wait / 2 * jitter / 1000);
    }

    /// Logs that Redis may evict keys, unless that was so in the last session.
    fn warn_of_eviction(&mut self, warning: Option<String>) {
        if self.eviction_warning != warning {
            if let Some(advice) = &warning {
                tracing::warn!(advice, "redis may evict channels");
            }
            self.eviction_warning = warning;
        }
    }

    /// The host name to look up now, if the session is connected by name.
    fn due_lookup(&mut self, now: Instant) -> Option<HostName> {
        if now < self.next_lookup {
            return None;
        }
        self.next_lookup = now + LOOKUP_INTERVAL;
        Some(self.session.as_ref()?.peer.as_ref()?.name.clone())
    }

    /// The connected address, if the host name has moved to others. A failed lookup proves nothing.
    fn moved_from(&mut self, found: Result<Vec<SocketAddr>, String>) -> Option<SocketAddr> {
        let address = self.session.as_ref()?.peer.as_ref()?.address;
        match found {
            Ok(found) if found.contains(&address) => self.lookups_elsewhere = 0,
            Ok(found) if !found.is_empty() => self.lookups_elsewhere += 1,
            _ => {}
        }
        (self.lookups_elsewhere >= MOVED_AFTER).then_some(address)
    }
}

impl Bus {
    pub(super) fn check_link(&mut self, now: Instant) {
        if self.link.next_attempt.is_some_and(|at| at <= now) {
            self.connect();
        }
        if self.link.session().is_none() {
            return;
        }
        self.check_probes(now);
        if let Some(name) = self.link.due_lookup(now) {
            let (outcomes, generation) = (self.handles.outcomes.clone(), self.link.generation());
            tokio::spawn(async move {
                let _ = outcomes.send(Outcome::LookedUp(generation, name.lookup().await));
            });
        }
    }

    fn connect(&mut self) {
        let generation = self.link.start_attempt();
        let (config, settings) = (self.handles.config.clone(), self.handles.settings.clone());
        let (outcomes, mode) = (self.handles.outcomes.clone(), self.functions.mode());
        let report = {
            let outcomes = outcomes.clone();
            move |report| {
                let _ = outcomes.send(Outcome::Session(generation, report));
            }
        };
        tokio::spawn(async move {
            let session = session::connect(config, &settings, mode, report);
            let outcome = match tokio::time::timeout(session::SESSION_TIMEOUT, session).await {
                Ok(Ok(session)) => Outcome::Connected(generation, Box::new(session)),
                Ok(Err(error)) => Outcome::NotConnected(generation, error),
                Err(_) => {
                    let error = ConnectError::Unreachable("no session in time".into());
                    Outcome::NotConnected(generation, error)
                }
            };
            let _ = outcomes.send(outcome);
        });
    }

    /// Subscribes to all followed channels.
    pub(super) fn on_connected(&mut self, session: Session) {
        if session.is_closed() {
            let error = "the connection broke at once";
            self.set_status(Status::unreachable(error), Some(error));
            return self.link.back_off();
        }
        self.link.warn_of_eviction(session.eviction_warning.clone());
        self.functions.on_loaded(session.fcall_error.clone());
        let ticket = self.subscriptions.next_ticket();
        self.follow_control(ticket);
        let settings = &self.handles.settings;
        let mut topics = vec![settings.probe_topic()];
        let followed = self.channels.iter().filter(|(_, channel)| channel.followed.is_some());
        topics.extend(followed.flat_map(|(name, _)| settings.topics(name)));
        session.subscribe(topics, ticket);
        self.link.open(session, ticket);
        self.probes.start_session();
        self.publishing.retry_all();
    }

    pub(super) fn on_not_connected(&mut self, error: ConnectError) -> Result<(), Unusable> {
        let (status, error) = match error {
            ConnectError::Unsupported(text) => return Err(Unusable(text)),
            ConnectError::Unreachable(text) => (Status::unreachable(&text), Some(text)),
            ConnectError::Rejected(text) => (Status::rejecting(&text), Some(text)),
            ConnectError::Unavailable(what) => {
                (Status::Rejecting(advice::for_unavailable(&what).into()), None)
            }
            ConnectError::NotPermitted(rights) => (Status::Rejecting(rights.to_string().into()), None),
        };
        self.set_status(status, error.as_deref());
        self.link.back_off();
        Ok(())
    }

    /// Reconnects if the host name has moved to another Redis.
    pub(super) fn on_looked_up(&mut self, found: Result<Vec<SocketAddr>, String>) {
        if let Some(address) = self.link.moved_from(found) {
            self.close_session(&format!("the name no longer resolves to {address}"));
        }
    }

    pub(super) fn close_session(&mut self, error: &str) {
        if !self.link.close() {
            return;
        }
        self.probes.end_session();
        self.control.end_session();
        let status = match ["NOPERM", "READONLY"].iter().any(|prefix| error.starts_with(prefix)) {
            true => Status::rejecting(error),
            false => Status::unreachable(error),
        };
        self.fail_joins(status.advice().unwrap_or_default());
        self.set_status(status, Some(error));
        self.link.back_off();
    }
}
