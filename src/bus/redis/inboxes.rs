//! The inboxes that this node stores messages in: their number has a limit, and some of them are
//! looked at every few seconds, for the metrics.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use fred::types::Resp3Frame;

use super::commands::Script;
use super::primaries::FIRST; // there is no --inbox on a cluster
use super::reply::{array, integer};
use super::{Bus, Outcome, scripts};
use crate::protocol::event::ChannelName;
use crate::protocol::pattern::ChannelPattern;

/// Time between two looks.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);

/// Inboxes in one look, one call after the other. More take turns.
const LOOK_MAX: usize = 200;

/// Expiry of an inbox of a `PREFIX*` that has no messages, in milliseconds: clients may name any
/// number of channels. Its consumer groups expire with it.
const EMPTY_TTL_MS: u64 = 10 * 60 * 1000;

/// How long an empty inbox is remembered after the last message to it.
const FORGET_AFTER: Duration = Duration::from_secs(60);

/// What was found in an inbox: messages, and the age of the oldest in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Look {
    messages: u64,
    oldest_ms: u64,
}

impl Look {
    fn parse(frame: &Resp3Frame) -> Option<Look> {
        let [messages, oldest_ms] = array(frame)? else { return None };
        Some(Look { messages: integer(messages)?, oldest_ms: integer(oldest_ms)? })
    }
}

#[derive(Debug)]
struct Inbox {
    look: Look,
    last_stored: Instant,
    /// It is in `--inbox` by its name, so it is kept.
    is_named: bool,
}

#[derive(Debug)]
pub(super) struct Inboxes {
    known: HashMap<ChannelName, Inbox>,
    /// In the order in which they are looked at.
    rotation: VecDeque<ChannelName>,
    /// Most of them.
    max: usize,
    next_look: Instant,
    /// A look is in flight.
    looking: bool,
}

impl Inboxes {
    pub(super) fn new(patterns: &[ChannelPattern], max_channels: usize) -> Inboxes {
        let now = Instant::now();
        let mut inboxes = Inboxes {
            known: HashMap::new(),
            rotation: VecDeque::new(),
            max: usize::MAX,
            next_look: now,
            looking: false,
        };
        for pattern in patterns {
            if let ChannelPattern::Name(name) = pattern {
                inboxes.note(name, now);
                inboxes.known.entry(name.clone()).and_modify(|inbox| inbox.is_named = true);
            }
        }
        inboxes.max = inboxes.known.len() + max_channels;
        inboxes
    }

    /// Notes that a message goes to an inbox. `false` if there are too many inboxes.
    pub(super) fn note(&mut self, name: &ChannelName, now: Instant) -> bool {
        if let Some(inbox) = self.known.get_mut(name) {
            inbox.last_stored = now;
            return true;
        }
        if self.known.len() >= self.max {
            return false;
        }
        let inbox = Inbox { look: Look::default(), last_stored: now, is_named: false };
        self.known.insert(name.clone(), inbox);
        self.rotation.push_back(name.clone());
        true
    }

    /// The inboxes to look at now, each with the expiry that it gets if it is empty.
    fn due(&mut self, now: Instant) -> Vec<(ChannelName, u64)> {
        if self.looking || now < self.next_look || self.known.is_empty() {
            return Vec::new();
        }
        self.next_look = now + LOOK_INTERVAL;
        let mut due = Vec::new();
        for _ in 0..self.rotation.len().min(LOOK_MAX) {
            let Some(name) = self.rotation.pop_front() else { break };
            let Some(inbox) = self.known.get(&name) else { continue };
            due.push((name.clone(), if inbox.is_named { 0 } else { EMPTY_TTL_MS }));
            self.rotation.push_back(name);
        }
        self.looking = !due.is_empty();
        due
    }

    fn on_looked(&mut self, found: Vec<(ChannelName, Look)>, now: Instant) {
        self.looking = false;
        for (name, look) in found {
            let Some(inbox) = self.known.get_mut(&name) else { continue };
            inbox.look = look;
            let is_unused = now.saturating_duration_since(inbox.last_stored) > FORGET_AFTER;
            if look.messages == 0 && is_unused && !inbox.is_named {
                self.known.remove(&name); // the rotation skips it
            }
        }
        self.known.shrink_to(2 * self.known.len());
        self.rotation.shrink_to(2 * self.rotation.len());
    }
}

impl Bus {
    /// Looks at some inboxes if that is due.
    pub(super) fn look_at_inboxes(&mut self, now: Instant) {
        let Some(session) = self.primaries[FIRST].link.session() else { return };
        let due = self.inboxes.due(now);
        if due.is_empty() {
            return;
        }
        let (commands, outcomes) = (session.commands(), self.handles.outcomes.clone());
        let settings = self.handles.settings.clone();
        tokio::spawn(async move {
            let mut found = Vec::new();
            for (name, ttl) in due {
                let key = settings.channel_key(&name);
                match commands.run(Script::InboxLook, &key, vec![scripts::number(ttl)]).await {
                    Ok(frame) => found.extend(Look::parse(&frame).map(|look| (name, look))),
                    Err(error) if error.is_error_reply() => {} // of another type: storing reports it
                    Err(_) => break,                           // the session reports that it has closed
                }
            }
            let _ = outcomes.send(Outcome::InboxesLooked(found));
        });
    }

    pub(super) fn on_inboxes_looked(&mut self, found: Vec<(ChannelName, Look)>) {
        self.inboxes.on_looked(found, Instant::now());
        let looks = || self.inboxes.known.values().map(|inbox| inbox.look);
        let metrics = &self.handles.metrics;
        metrics.inboxes.set(self.inboxes.known.len() as u64);
        metrics.inbox_messages.set(looks().map(|look| look.messages).sum());
        metrics.inbox_oldest_seconds.set(looks().map(|look| look.oldest_ms).max().unwrap_or(0) / 1000);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(name: &str) -> ChannelName {
        ChannelName::parse(name).expect("a name")
    }

    #[test]
    fn number_of_inboxes_is_limited_until_some_are_empty() {
        let patterns = ["desk", "desk.*"].map(|text| ChannelPattern::parse(text).expect("a pattern"));
        let (mut inboxes, start) = (Inboxes::new(&patterns, 2), Instant::now());
        assert!(inboxes.note(&name("desk.1"), start) && inboxes.note(&name("desk.2"), start));
        assert!(!inboxes.note(&name("desk.3"), start));
        assert!(inboxes.note(&name("desk"), start) && inboxes.note(&name("desk.1"), start));
        let later = start + 2 * FORGET_AFTER;
        let due = inboxes.due(later);
        assert_eq!(due, [(name("desk"), 0), (name("desk.1"), EMPTY_TTL_MS), (name("desk.2"), EMPTY_TTL_MS)]);
        assert!(inboxes.due(later + LOOK_INTERVAL).is_empty(), "one look at a time");
        let one = Look { messages: 1, oldest_ms: 5 };
        let found = [("desk", Look::default()), ("desk.1", one), ("desk.2", Look::default())];
        inboxes.on_looked(found.map(|(channel, look)| (name(channel), look)).into(), later);
        assert!(inboxes.note(&name("desk.3"), later) && !inboxes.note(&name("desk.4"), later));
        let names: Vec<_> = inboxes.due(later + LOOK_INTERVAL).into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["desk", "desk.1", "desk.3"].map(name));
    }
}
