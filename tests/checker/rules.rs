//! The promise as rules.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Bound;

use super::claims::{Claim, claims};
use super::history::{Attempt, History, Outcome, Seen, Subscriber};

/// The rule that was violated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rule {
    /// Records are well formed: no frames that such a client never gets, none in an impossible
    /// order.
    Form,
    /// A welcome continues where the client resumed, and positions sent to a client are its own.
    Position,
    /// Ids rise for every client.
    Order,
    /// No client sees an event twice.
    Twice,
    /// Every event for a client reaches it, or it is notified of a possible loss.
    Missing,
    /// An id belongs to one event, and an event has one id.
    OneId,
    /// Every event received was published, unchanged, and not rejected.
    Published,
    /// Private events reach no other user.
    Private,
    /// An event published after another was acknowledged has a higher id. Events of one connection
    /// keep their order.
    Time,
    /// Ids in a range without announced loss belong to known events.
    Known,
}

/// A violation of the promise.
#[derive(Clone, Debug)]
pub struct Violation {
    pub rule: Rule,
    /// Client, event and position.
    pub text: String,
}

/// What is known of an id.
#[derive(Clone, Copy)]
struct Event<'a> {
    body: &'a str,
    to: Option<&'a str>,
    attempt: Option<&'a Attempt>,
}

impl Event<'_> {
    fn is_for(&self, user: &str) -> bool {
        self.to.is_none_or(|to| to == user)
    }
}

/// All violations in this history; none if the promise was kept.
pub fn find_violations(history: &History) -> Vec<Violation> {
    let mut checker = Checker { history, violations: Vec::new() };
    let attempts = checker.attempts();
    let events = checker.events(&attempts);
    let mut covered = Vec::new();
    for subscriber in &history.subscribers {
        for claim in claims(subscriber, history.ids_may_fall, &mut checker.violations) {
            checker.complete(subscriber, &claim, &events);
            covered.extend(claim.after.zip(claim.position));
        }
    }
    checker.known(covered, &events);
    checker.heads(&events);
    checker.time(&events);
    let mut violations = checker.violations;
    for violation in &mut violations {
        violation.text.insert_str(0, &format!("{}: ", history.channel));
    }
    violations
}

struct Checker<'a> {
    history: &'a History,
    violations: Vec<Violation>,
}

impl<'a> Checker<'a> {
    fn violated(&mut self, rule: Rule, text: String) {
        self.violations.push(Violation { rule, text });
    }

    fn attempts(&mut self) -> HashMap<&'a str, &'a Attempt> {
        let mut attempts = HashMap::new();
        for attempt in &self.history.attempts {
            if attempts.insert(&*attempt.body, attempt).is_some() || attempt.finished <= attempt.started {
                self.violated(Rule::Form, format!("not noted well: {attempt:?}"));
            }
        }
        attempts
    }

    /// What is known of every id, from acknowledgements and subscribers.
    fn events(&mut self, attempts: &HashMap<&'a str, &'a Attempt>) -> BTreeMap<u64, Event<'a>> {
        let mut events: BTreeMap<u64, Event> = BTreeMap::new();
        let mut ids: HashMap<&str, u64> = HashMap::new();
        let mut note = |checker: &mut Checker, id: u64, event: Event<'a>, source: &str| {
            let known = *events.entry(id).or_insert(event);
            if (known.body, known.to) != (event.body, event.to) {
                let text = format!("{source}: id {id} is {} and was {}", event.body, known.body);
                checker.violated(Rule::OneId, text);
            }
            let first = *ids.entry(event.body).or_insert(id);
            if first != id {
                checker.violated(Rule::OneId, format!("{source}: {} has id {id} and {first}", event.body));
            }
        };
        for attempt in &self.history.attempts {
            if let Outcome::Acked(id) = attempt.outcome {
                let event = Event { body: &attempt.body, to: attempt.to.as_deref(), attempt: Some(attempt) };
                note(self, id, event, &attempt.line);
            }
        }
        for subscriber in &self.history.subscribers {
            for (_, seen) in &subscriber.seen {
                let Seen::Event(id, body, to) = seen else { continue };
                let attempt = attempts.get(&**body).copied();
                let event = Event { body, to: to.as_deref(), attempt };
                note(self, *id, event, &subscriber.name);
                match attempt {
                    None => self.violated(
                        Rule::Published,
                        format!("{}: {body} was never published", subscriber.name),
                    ),
                    Some(attempt) if attempt.outcome == Outcome::Rejected => {
                        self.violated(Rule::Published, format!("{}: {body} was rejected", subscriber.name));
                    }
                    Some(attempt) if attempt.to != *to => {
                        let text = format!("{}: {body} was for {:?}", subscriber.name, attempt.to);
                        self.violated(Rule::Private, text);
                    }
                    Some(_) => {}
                }
                if !event.is_for(&subscriber.user) {
                    self.violated(Rule::Private, format!("{}: {body} is for another", subscriber.name));
                }
            }
        }
        events
    }

    /// Nothing is missing in a claim.
    fn complete(&mut self, subscriber: &Subscriber, claim: &Claim, events: &BTreeMap<u64, Event<'a>>) {
        let mine = |event: &Event| event.is_for(&subscriber.user);
        let acked = |event: &Event| event.attempt.is_some_and(|a| matches!(a.outcome, Outcome::Acked(_)));
        let acked = events.iter().rev().find(|(_, event)| acked(event)).map_or(0, |(id, _)| *id);
        if let (Some(after), Some(position)) = (claim.after, claim.position) {
            let upto = if claim.open { u64::MAX } else { position };
            // An event whose publisher got no answer may have been published after the end of the
            // run.
            let after_the_end = |id: u64, event: &Event| {
                id > acked && event.attempt.is_some_and(|attempt| attempt.outcome == Outcome::Unknown)
            };
            for (id, event) in events.range((Bound::Excluded(after), Bound::Included(upto))) {
                if mine(event) && !claim.seen.contains(id) && !after_the_end(*id, event) {
                    let text = format!("{}: id {id}, {}, after {after}", subscriber.name, event.body);
                    self.violated(Rule::Missing, text);
                }
            }
        }
        // An event published after the client joined must arrive, so its id must be in the claim.
        let before = match claim.after {
            _ if self.history.ids_may_fall => return,
            Some(after) => after,
            None if claim.open => u64::MAX, // it stayed, and saw nothing
            None => return,
        };
        for (id, event) in events.range(..=before) {
            if mine(event) && event.attempt.is_some_and(|attempt| attempt.started > claim.since) {
                let rule = if claim.from_server { Rule::Time } else { Rule::Missing };
                let text = format!("{}: id {id}, {}, published after it joined", subscriber.name, event.body);
                self.violated(rule, text);
            }
        }
    }

    /// Every id in a claim belongs to a known event. Only a private event whose publisher got no
    /// answer may be unknown.
    fn known(&mut self, mut covered: Vec<(u64, u64)>, events: &BTreeMap<u64, Event<'a>>) {
        covered.sort_unstable();
        let (mut unknown, mut upto) = (0, 0);
        for (after, last) in covered {
            let after = after.max(upto);
            if last > after {
                unknown += (last - after) - events.range(after + 1..=last).count() as u64;
                upto = last;
            }
        }
        let seen: BTreeSet<&str> = events.values().map(|event| event.body).collect();
        let fate_unknown = |attempt: &&Attempt| attempt.outcome == Outcome::Unknown && attempt.to.is_some();
        let open = self.history.attempts.iter().filter(fate_unknown);
        let open = open.filter(|attempt| !seen.contains(&*attempt.body)).count() as u64;
        if unknown > open {
            let text = format!("{unknown} ids belong to nothing that anyone knows; at most {open} may");
            self.violated(Rule::Known, text);
        }
    }

    /// A welcome's head is the last id at that moment: events published later have higher ids.
    fn heads(&mut self, events: &BTreeMap<u64, Event<'a>>) {
        if self.history.ids_may_fall {
            return;
        }
        let known = events.iter().filter_map(|(id, event)| Some((event.attempt?.started, *id)));
        let mut started: Vec<(u64, u64)> = known.collect();
        started.sort_unstable();
        // For each event the lowest id of the events published at that moment or later.
        for at in (1..started.len()).rev() {
            started[at - 1].1 = started[at - 1].1.min(started[at].1);
        }
        for subscriber in &self.history.subscribers {
            for (moment, seen) in &subscriber.seen {
                let Seen::Welcomed { head, .. } = seen else { continue };
                let later = started.get(started.partition_point(|(started, _)| started < moment));
                if let Some((_, id)) = later.filter(|(_, id)| id <= head) {
                    let text = format!("{}: {seen:?}, and {id} was published later", subscriber.name);
                    self.violated(Rule::Position, text);
                }
            }
        }
    }

    fn time(&mut self, events: &BTreeMap<u64, Event<'a>>) {
        let mut known: Vec<(u64, &Attempt)> =
            events.iter().filter_map(|(id, event)| Some((*id, event.attempt?))).collect();
        known.sort_by_key(|(_, attempt)| attempt.started);
        let mut lines: HashMap<&str, u64> = HashMap::new();
        for (id, attempt) in &known {
            let last = lines.insert(&attempt.line, *id);
            if last.is_some_and(|last| last > *id) {
                let text =
                    format!("{}: {} has id {id}, the one before it {last:?}", attempt.line, attempt.body);
                self.violated(Rule::Time, text);
            }
        }
        if self.history.ids_may_fall {
            return;
        }
        let mut acked: Vec<(u64, u64)> = known
            .iter()
            .filter(|(_, attempt)| matches!(attempt.outcome, Outcome::Acked(_)))
            .map(|(id, attempt)| (attempt.finished, *id))
            .collect();
        acked.sort_unstable();
        let (mut acked, mut highest) = (acked.into_iter().peekable(), 0);
        for (id, attempt) in known {
            while let Some((_, earlier)) = acked.next_if(|(finished, _)| *finished < attempt.started) {
                highest = highest.max(earlier);
            }
            if id <= highest {
                let text = format!("{} has id {id}, and {highest} was acknowledged before", attempt.body);
                self.violated(Rule::Time, text);
            }
        }
    }
}
