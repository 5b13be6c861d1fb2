//! The life of sessions: connecting, waiting before the next attempt, following the name of Redis to another address.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::dns::{LOOKUP_EVERY, MOVED_AFTER};
use super::errors::ConnectError;
use super::session::{self, Session};
use super::settings::random;
use super::status::Trouble;
use super::{Bus, Outcome, advice};
use crate::bus::Unusable;

/// The first wait before a new attempt to connect; it doubles each time.
const BACKOFF_MIN: Duration = Duration::from_millis(100);

/// The longest wait before a new attempt to connect.
const BACKOFF_MAX: Duration = Duration::from_secs(3);

/// The way to Redis.
pub(super) struct Link {
    pub(super) session: Option<Session>,
    /// Counts sessions and attempts, so that what comes late from an earlier one is known for it.
    pub(super) generation: u64,
    /// When to try next, while there is no session and no attempt under way.
    pub(super) next_attempt: Option<Instant>,
    pub(super) failures: u32,
    pub(super) trouble: Option<Trouble>,
    /// When to look up the name of Redis again.
    pub(super) next_lookup: Instant,
    /// Lookups in a row without the connected address.
    pub(super) moved: u32,
    /// The ticket of the subscriptions with which this session began, while they are not in force.
    pub(super) pending: Option<u64>,
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

impl Bus {
    pub(super) fn connect(&mut self) {
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
    pub(super) fn look_up(&mut self, now: Instant) {
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
            ConnectError::Lacking(what) => (Trouble::Refuses(advice::lacking(&what).into()), String::new()),
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
}
