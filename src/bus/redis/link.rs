//! The connection to Redis over time: attempts, sessions, waits between them, and the host name in
//! `--redis`.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::commands::Routing;
use super::dns::{HostName, LOOKUP_INTERVAL, MOVED_AFTER};
use super::errors::ConnectError;
use super::primaries::SessionId;
use super::session::{self, Session};
use super::settings::random;
use super::status::Status;
use super::{Bus, Outcome, advice, topology};
use crate::bus::Unusable;

/// The first wait before a new attempt to connect. It doubles with each failure.
const BACKOFF_MIN: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(3);

/// The current session, or the next attempt to make one.
pub(super) struct Link {
    session: Option<Session>,
    /// The number of the session or attempt, so that results of an earlier one are recognized.
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
    pub(super) fn new(starting: String, next_attempt: Option<Instant>) -> Link {
        Link {
            session: None,
            generation: 0,
            next_attempt,
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

    fn start_attempt(&mut self, generation: u64) {
        self.next_attempt = None;
        self.generation = generation;
    }

    fn open(&mut self, session: Session, ticket: u64) {
        self.session = Some(session);
        self.subscribing = Some(ticket);
        (self.next_lookup, self.lookups_elsewhere) = (Instant::now() + LOOKUP_INTERVAL, 0);
    }

    /// Drops the session; with its new generation the results are invalid.
    fn close(&mut self, generation: u64) {
        self.session = None;
        self.generation = generation;
        self.subscribing = None;
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
    pub(super) fn check_link(&mut self, primary: usize, now: Instant) {
        let link = &mut self.primaries[primary].link;
        if link.next_attempt.is_some_and(|at| at <= now) {
            self.connect(primary);
        }
        if self.primaries[primary].link.session().is_none() {
            return;
        }
        self.check_probes(primary, now);
        if let Some(name) = self.primaries[primary].link.due_lookup(now) {
            let (outcomes, session) = (self.handles.outcomes.clone(), self.primaries.session_id(primary));
            tokio::spawn(async move {
                let _ = outcomes.send(Outcome::LookedUp(session, name.lookup().await));
            });
        }
    }

    fn connect(&mut self, primary: usize) {
        let generation = self.primaries.next_generation();
        let id = SessionId { primary, generation };
        let primary = &mut self.primaries[primary];
        primary.link.start_attempt(generation);
        let (config, settings) = (primary.config.clone(), self.handles.settings.clone());
        let (outcomes, mode) = (self.handles.outcomes.clone(), primary.functions.mode());
        let routing = match (&self.topology, &primary.address) {
            (Some(topology), Some(address)) => {
                Routing::Cluster(topology.peers.clone(), topology::host_of(address).into())
            }
            _ => Routing::Single,
        };
        let report = {
            let outcomes = outcomes.clone();
            move |report| {
                let _ = outcomes.send(Outcome::Session(id, report));
            }
        };
        tokio::spawn(async move {
            let session = session::connect(config, routing, &settings, mode, report);
            let outcome = match tokio::time::timeout(session::SESSION_TIMEOUT, session).await {
                Ok(Ok(session)) => Outcome::Connected(id, Box::new(session)),
                Ok(Err(error)) => Outcome::NotConnected(id, error),
                Err(_) => {
                    let error = ConnectError::Unreachable("no session in time".into());
                    Outcome::NotConnected(id, error)
                }
            };
            let _ = outcomes.send(outcome);
        });
    }

    /// Subscribes to all followed channels of this primary.
    pub(super) fn on_connected(&mut self, primary: usize, session: Session) {
        if session.is_closed() {
            let error = "the connection broke at once";
            self.set_status(primary, Status::unreachable(error), Some(error));
            return self.primaries[primary].link.back_off();
        }
        let ticket = self.subscriptions.next_ticket();
        self.follow_control(primary, ticket);
        let settings = &self.handles.settings;
        let mut topics = vec![settings.probe_topic(self.primaries[primary].link.generation())];
        let followed = self
            .channels
            .iter()
            .filter(|(_, channel)| channel.primary == primary && channel.followed.is_some());
        topics.extend(followed.flat_map(|(name, _)| settings.topics(name)));
        session.subscribe(topics, ticket);
        let at = &mut self.primaries[primary];
        at.link.warn_of_eviction(session.eviction_warning.clone());
        at.functions.on_loaded(session.fcall_error.clone());
        if let (Some(topology), Some(address)) = (&self.topology, &at.address) {
            topology.peers.add(address.clone(), session.commands());
        }
        at.link.open(session, ticket);
        at.probes.start_session();
        self.publishing.retry_all();
    }

    pub(super) fn on_not_connected(&mut self, primary: usize, error: ConnectError) -> Result<(), Unusable> {
        let (status, error) = match error {
            // In a cluster it may be a stranger at the address of a primary that is gone.
            ConnectError::Unsupported(text) if self.topology.is_some() => {
                (Status::Rejecting(text.into()), None)
            }
            ConnectError::Unsupported(text) => return Err(Unusable(text)),
            ConnectError::Unreachable(text) => (Status::unreachable(&text), Some(text)),
            ConnectError::Rejected(text) => (Status::rejecting(&text), Some(text)),
            ConnectError::Unavailable(what) => {
                (Status::Rejecting(advice::for_unavailable(&what).into()), None)
            }
            ConnectError::NotPermitted(rights) => (Status::Rejecting(rights.to_string().into()), None),
        };
        self.set_status(primary, status, error.as_deref());
        self.primaries[primary].link.back_off();
        Ok(())
    }

    /// Reconnects if the host name has moved to another Redis.
    pub(super) fn on_looked_up(&mut self, primary: usize, found: Result<Vec<SocketAddr>, String>) {
        if let Some(address) = self.primaries[primary].link.moved_from(found) {
            self.close_session(primary, &format!("the name no longer resolves to {address}"));
        }
    }

    pub(super) fn close_session(&mut self, primary: usize, error: &str) {
        if self.primaries[primary].link.session().is_none() {
            return;
        }
        let generation = self.primaries.next_generation();
        let at = &mut self.primaries[primary];
        at.link.close(generation);
        at.probes.end_session();
        if let (Some(topology), Some(address)) = (&mut self.topology, &at.address) {
            topology.peers.remove(address);
            topology.look_soon();
        }
        let status = match ["NOPERM", "READONLY"].iter().any(|prefix| error.starts_with(prefix)) {
            true => Status::rejecting(error),
            false => Status::unreachable(error),
        };
        self.fail_joins(primary, status.advice().unwrap_or_default());
        self.set_status(primary, status, Some(error));
        self.primaries[primary].link.back_off();
    }
}
