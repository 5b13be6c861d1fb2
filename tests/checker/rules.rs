//! The promise, rule by rule.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Bound;

use super::claims::{Claim, claims};
use super::history::{Attempt, History, Outcome, Seen, Subscriber};

/// What was broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rule {
    /// Notes that can't be: frames that such a client never gets, or in an order that can't be.
    Form,
    /// A welcome that does not go on where the client asked, or a position that is not the client's.
    Position,
    /// Ids rise for every client.
    Order,
    /// No client sees an event twice.
    Twice,
    /// What is meant for a client reaches it, or it is told that something may be missing.
    Missing,
    /// An id means one event, for everybody and for ever; and an event has one id.
    OneId,
    /// What arrives was published, just so, and not refused.
    Published,
    /// What is for one user reaches no other.
    Private,
    /// What was begun after another was acknowledged has the higher id; one connection's events keep their order.
    Time,
    /// Ids in which nobody may miss anything are ids of events that somebody knows.
    Known,
}

/// One thing that is wrong.
#[derive(Clone, Debug)]
pub struct Violation {
    /// The rule.
    pub rule: Rule,
    /// Who, what and where.
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

/// All that is wrong with this history; nothing when the promise was kept.
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
    checker.violations
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
            if attempts.insert(&*attempt.body, attempt).is_some() || attempt.ended <= attempt.begun {
                self.violated(Rule::Form, format!("not noted well: {attempt:?}"));
            }
        }
        attempts
    }

    /// What is known of every id, from acknowledgements and from what anyone saw.
    fn events(&mut self, attempts: &HashMap<&'a str, &'a Attempt>) -> BTreeMap<u64, Event<'a>> {
        let mut events: BTreeMap<u64, Event> = BTreeMap::new();
        let mut ids: HashMap<&str, u64> = HashMap::new();
        let mut note = |checker: &mut Checker, id: u64, event: Event<'a>, who: &str| {
            let known = *events.entry(id).or_insert(event);
            if (known.body, known.to) != (event.body, event.to) {
                let text = format!("{who}: id {id} is {} and was {}", event.body, known.body);
                checker.violated(Rule::OneId, text);
            }
            let first = *ids.entry(event.body).or_insert(id);
            if first != id {
                checker.violated(Rule::OneId, format!("{who}: {} has id {id} and {first}", event.body));
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
                    None => self
                        .violated(Rule::Published, format!("{}: nobody published {body}", subscriber.name)),
                    Some(attempt) if attempt.outcome == Outcome::Refused => {
                        self.violated(Rule::Published, format!("{}: {body} was refused", subscriber.name));
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
            // What nobody was told the fate of may have been taken when the run was over already.
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
        // What was begun when the client was there already must come, and so have an id that can still come.
        let before = match claim.after {
            _ if self.history.ids_may_fall => return,
            Some(after) => after,
            None if claim.open => u64::MAX, // it stayed, and saw nothing
            None => return,
        };
        for (id, event) in events.range(..=before) {
            if mine(event) && event.attempt.is_some_and(|attempt| attempt.begun > claim.since) {
                let rule = if claim.told { Rule::Time } else { Rule::Missing };
                let text = format!("{}: id {id}, {}, begun after it came", subscriber.name, event.body);
                self.violated(rule, text);
            }
        }
    }

    /// Every id that lies in somebody's claim belongs to an event that somebody knows. Only an event for one user,
    /// whose fate was never told to its publisher, may be known to nobody.
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

    /// A welcome's head is the last id of its moment: what was begun later has a higher one.
    fn heads(&mut self, events: &BTreeMap<u64, Event<'a>>) {
        if self.history.ids_may_fall {
            return;
        }
        let known = events.iter().filter_map(|(id, event)| Some((event.attempt?.begun, *id)));
        let mut begun: Vec<(u64, u64)> = known.collect();
        begun.sort_unstable();
        // To each the lowest id of what was begun then or later.
        for at in (1..begun.len()).rev() {
            begun[at - 1].1 = begun[at - 1].1.min(begun[at].1);
        }
        for subscriber in &self.history.subscribers {
            for (moment, seen) in &subscriber.seen {
                let Seen::Welcomed { head, .. } = seen else { continue };
                let later = begun.get(begun.partition_point(|(begun, _)| begun < moment));
                if let Some((_, id)) = later.filter(|(_, id)| id <= head) {
                    let text = format!("{}: {seen:?}, and {id} was begun later", subscriber.name);
                    self.violated(Rule::Position, text);
                }
            }
        }
    }

    fn time(&mut self, events: &BTreeMap<u64, Event<'a>>) {
        let mut known: Vec<(u64, &Attempt)> =
            events.iter().filter_map(|(id, event)| Some((*id, event.attempt?))).collect();
        known.sort_by_key(|(_, attempt)| attempt.begun);
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
            .map(|(id, attempt)| (attempt.ended, *id))
            .collect();
        acked.sort_unstable();
        let (mut acked, mut highest) = (acked.into_iter().peekable(), 0);
        for (id, attempt) in known {
            while let Some((_, earlier)) = acked.next_if(|(ended, _)| *ended < attempt.begun) {
                highest = highest.max(earlier);
            }
            if id <= highest {
                let text = format!("{} has id {id}, and {highest} was acknowledged before", attempt.body);
                self.violated(Rule::Time, text);
            }
        }
    }
}
