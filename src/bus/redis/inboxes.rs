//! The inboxes that this node stores messages in: their number has a limit, and some of them are
//! sampled every few seconds, for the metrics.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use fred::types::Resp3Frame;

use super::commands::Script;
use super::primaries::FIRST; // there is no --inbox on a cluster
use super::reply::{array, integer};
use super::{Bus, Outcome, scripts};
use crate::protocol::event::ChannelName;
use crate::protocol::pattern::ChannelPattern;

/// Time between two samples.
const SAMPLE_INTERVAL: Duration = Duration::from_secs(5);

/// Inboxes in one sample, one call after the other. More take turns.
const SAMPLE_MAX: usize = 200;

/// Expiry of an inbox of a `PREFIX*` that has no messages, in milliseconds: clients may name any
/// number of channels. Its consumer groups expire with it.
const EMPTY_TTL_MS: u64 = 10 * 60 * 1000;

/// How long an empty inbox is remembered after the last message to it.
const FORGET_AFTER: Duration = Duration::from_secs(60);

/// What was found in an inbox: messages, and the age of the oldest in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    messages: u64,
    oldest_ms: u64,
}

impl Sample {
    fn parse(frame: &Resp3Frame) -> Option<Sample> {
        let [messages, oldest_ms] = array(frame)? else { return None };
        Some(Sample { messages: integer(messages)?, oldest_ms: integer(oldest_ms)? })
    }
}

#[derive(Debug)]
struct Inbox {
    sample: Sample,
    last_stored: Instant,
    /// It is in `--inbox` by its name, so it is kept.
    is_named: bool,
}

#[derive(Debug)]
pub(super) struct Inboxes {
    known: HashMap<ChannelName, Inbox>,
    /// In the order in which they are sampled.
    rotation: VecDeque<ChannelName>,
    /// Most of them.
    max: usize,
    next_sample: Instant,
    /// A sample is in flight.
    sampling: bool,
}

impl Inboxes {
    pub(super) fn new(patterns: &[ChannelPattern], max_channels: usize) -> Inboxes {
        let now = Instant::now();
        let mut inboxes = Inboxes {
            known: HashMap::new(),
            rotation: VecDeque::new(),
            max: usize::MAX,
            next_sample: now,
            sampling: false,
        };
        for pattern in patterns {
            if let ChannelPattern::Name(name) = pattern {
                inboxes.admit(name, now);
                inboxes.known.entry(name.clone()).and_modify(|inbox| inbox.is_named = true);
            }
        }
        inboxes.max = inboxes.known.len() + max_channels;
        inboxes
    }

    /// Whether a message may go to an inbox: `false` if there are too many inboxes.
    pub(super) fn admit(&mut self, name: &ChannelName, now: Instant) -> bool {
        if let Some(inbox) = self.known.get_mut(name) {
            inbox.last_stored = now;
            return true;
        }
        if self.known.len() >= self.max {
            return false;
        }
        let inbox = Inbox { sample: Sample::default(), last_stored: now, is_named: false };
        self.known.insert(name.clone(), inbox);
        self.rotation.push_back(name.clone());
        true
    }

    /// The inboxes to sample now, each with the expiry that it gets if it is empty.
    fn due(&mut self, now: Instant) -> Vec<(ChannelName, u64)> {
        if self.sampling || now < self.next_sample || self.known.is_empty() {
            return Vec::new();
        }
        self.next_sample = now + SAMPLE_INTERVAL;
        let mut due = Vec::new();
        for _ in 0..self.rotation.len().min(SAMPLE_MAX) {
            let Some(name) = self.rotation.pop_front() else { break };
            let Some(inbox) = self.known.get(&name) else { continue };
            due.push((name, if inbox.is_named { 0 } else { EMPTY_TTL_MS }));
        }
        self.sampling = !due.is_empty();
        due
    }

    /// Takes the result of a sample: each inbox that was due, and what was found in it, if anything
    /// was.
    fn on_sampled(&mut self, found: Vec<(ChannelName, Option<Sample>)>, now: Instant) {
        self.sampling = false;
        for (name, sample) in found {
            let Some(inbox) = self.known.get_mut(&name) else { continue };
            inbox.sample = sample.unwrap_or(inbox.sample);
            let is_unused = now.saturating_duration_since(inbox.last_stored) > FORGET_AFTER;
            if inbox.sample.messages == 0 && is_unused && !inbox.is_named {
                self.known.remove(&name);
            } else {
                self.rotation.push_back(name);
            }
        }
        self.known.shrink_to(2 * self.known.len());
        self.rotation.shrink_to(2 * self.rotation.len());
    }
}

impl Bus {
    /// Samples some inboxes if that is due.
    pub(super) fn sample_inboxes(&mut self, now: Instant) {
        let Some(session) = self.primaries[FIRST].link.session() else { return };
        let due = self.inboxes.due(now);
        if due.is_empty() {
            return;
        }
        let (commands, outcomes) = (session.commands(), self.handles.outcomes.clone());
        let settings = self.handles.settings.clone();
        tokio::spawn(async move {
            let (mut found, mut is_open) = (Vec::new(), true);
            for (name, ttl) in due {
                let key = settings.channel_key(&name);
                let mut sample = None;
                if is_open {
                    // An error about a key of another type is reported when a message is stored.
                    match commands.run(Script::InboxStats, &key, vec![scripts::number(ttl)]).await {
                        Ok(frame) => sample = Sample::parse(&frame),
                        Err(error) => is_open = error.is_error_reply(),
                    }
                }
                found.push((name, sample));
            }
            let _ = outcomes.send(Outcome::InboxesSampled(found));
        });
    }

    pub(super) fn on_inboxes_sampled(&mut self, found: Vec<(ChannelName, Option<Sample>)>) {
        self.inboxes.on_sampled(found, Instant::now());
        let samples = || self.inboxes.known.values().map(|inbox| inbox.sample);
        let metrics = &self.handles.metrics;
        metrics.inboxes.set(self.inboxes.known.len() as u64);
        metrics.inbox_messages.set(samples().map(|sample| sample.messages).sum());
        metrics.inbox_oldest_seconds.set(samples().map(|sample| sample.oldest_ms).max().unwrap_or(0) / 1000);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(name: &str) -> ChannelName {
        ChannelName::parse(name).expect("a name")
    }

    #[test]
    fn inboxes_are_limited_until_some_are_empty() {
        let patterns = ["desk", "desk.*"].map(|text| ChannelPattern::parse(text).expect("a pattern"));
        let (mut inboxes, start) = (Inboxes::new(&patterns, 2), Instant::now());
        assert!(inboxes.admit(&name("desk.1"), start) && inboxes.admit(&name("desk.2"), start));
        assert!(!inboxes.admit(&name("desk.3"), start));
        assert!(inboxes.admit(&name("desk"), start) && inboxes.admit(&name("desk.1"), start));
        let later = start + 2 * FORGET_AFTER;
        let due = inboxes.due(later);
        assert_eq!(due, [(name("desk"), 0), (name("desk.1"), EMPTY_TTL_MS), (name("desk.2"), EMPTY_TTL_MS)]);
        assert!(inboxes.due(later + SAMPLE_INTERVAL).is_empty(), "one sample at a time");
        let one = Sample { messages: 1, oldest_ms: 5 };
        let found = [("desk", Sample::default()), ("desk.1", one), ("desk.2", Sample::default())];
        inboxes.on_sampled(found.map(|(channel, sample)| (name(channel), Some(sample))).into(), later);
        assert!(inboxes.admit(&name("desk.3"), later) && !inboxes.admit(&name("desk.4"), later));
        let names: Vec<_> = inboxes.due(later + SAMPLE_INTERVAL).into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["desk", "desk.1", "desk.3"].map(name));
        // An inbox that is forgotten and comes back has one place in the rotation.
        for _ in 0..2 {
            let found = names.iter().map(|name| (name.clone(), None)).collect();
            inboxes.on_sampled(found, later);
            assert_eq!(inboxes.rotation, ["desk", "desk.1", "desk.3"].map(name));
            inboxes.next_sample = later;
            inboxes.due(later);
        }
    }
}
