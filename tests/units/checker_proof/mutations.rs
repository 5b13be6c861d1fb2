//! Mutations of a correct history, one for each way in which a bus can be broken.

mod channels;

use crate::checker::{Attempt, History, Outcome, Rule, Seen, Subscriber};
use crate::common::Rng;
use channels::{after_the_end, again_resumed, before_welcome, drop_resumed, wrong_channel};

pub struct Mutation {
    pub name: &'static str,
    /// The rules of which one must be violated.
    pub rules: &'static [Rule],
    /// Whether it violates a rule even with [`History::ids_may_fall`].
    pub always: bool,
    /// Applies it at a random place and returns a description of that; `None` if the history has no
    /// place for it.
    pub apply: fn(&mut History, &mut Rng) -> Option<String>,
}

const fn mutation(
    name: &'static str,
    rules: &'static [Rule],
    always: bool,
    apply: fn(&mut History, &mut Rng) -> Option<String>,
) -> Mutation {
    Mutation { name, rules, always, apply }
}

use Rule::{Form, Known, Missing, OneId, Order, Position, Private, Published, Time, Twice};

pub static MUTATIONS: [Mutation; 27] = [
    mutation("an event is dropped on the way to one client", &[Missing], false, drop_one),
    mutation("an acknowledged event reaches no client", &[Missing], false, vanish),
    mutation("unacknowledged events reach no client", &[Known], true, vanish_unknown),
    mutation("the last events do not come", &[Missing], false, cut_end),
    mutation("an event comes twice in a row", &[Twice], true, double),
    mutation("an event comes again later", &[Twice, Order], true, again_later),
    mutation("an event comes again under a new id", &[OneId], true, again_as_new),
    mutation("two events come in the wrong order", &[Order], true, swap),
    mutation("an id is given to two events", &[OneId], true, reuse_id),
    mutation("an event has another id for one client", &[OneId], true, other_id),
    mutation("an event is invented", &[Published], true, unpublished),
    mutation("an event's text is changed", &[Published], true, alter),
    mutation("a rejected event is delivered", &[Published], true, rejected),
    mutation("an event reaches another user", &[Private], true, wrong_user),
    mutation("an event's addressee gets lost", &[Private, OneId], true, addressee_lost),
    mutation("a loss is not announced", &[Missing], true, reset_withheld),
    mutation("a welcome promises what was lost", &[Missing, Position], true, welcome_lies),
    mutation("an event comes again behind an announcement", &[Twice, Order], false, again_behind),
    mutation("a ping carries a position ahead of the client's", &[Missing, Order], true, stands_ahead),
    mutation("a welcome's head lies ahead", &[Position], false, head_ahead),
    mutation("an event gets a lower id than one acknowledged before it", &[Time], false, late),
    mutation("two events of one connection change places", &[Time], true, change_places),
    mutation("an event comes under another channel's name", &[Published], true, wrong_channel),
    mutation("an event comes before its channel's welcome", &[Form], true, before_welcome),
    mutation("an event comes after its channel was unsubscribed", &[Form], true, after_the_end),
    mutation("an event is missing after its channel is resumed", &[Missing], false, drop_resumed),
    mutation("an event comes again after its channel is resumed", &[Twice, Order], true, again_resumed),
];

/// An event in a subscriber's records.
#[derive(Clone, Copy)]
struct Location {
    subscriber: usize,
    note: usize,
}

fn places(history: &History, wanted: impl Fn(&Subscriber, usize) -> bool) -> Vec<Location> {
    let mut places = Vec::new();
    for (at, subscriber) in history.subscribers.iter().enumerate() {
        let notes = (0..subscriber.seen.len()).filter(|note| wanted(subscriber, *note));
        places.extend(notes.map(|note| Location { subscriber: at, note }));
    }
    places
}

fn pick<T: Copy>(from: &[T], rng: &mut Rng) -> Option<T> {
    (!from.is_empty()).then(|| from[rng.index(from.len())])
}

fn event(subscriber: &Subscriber, note: usize) -> Option<(u64, &str)> {
    match &subscriber.seen.get(note)?.1 {
        Seen::Event(id, body, _) => Some((*id, body)),
        _ => None,
    }
}

fn attempt<'a>(history: &'a History, body: &str) -> &'a Attempt {
    history.attempts.iter().find(|attempt| attempt.body == body).expect("everything was published")
}

fn is_acked(history: &History, body: &str) -> bool {
    matches!(attempt(history, body).outcome, Outcome::Acked(_))
}

/// Whether an acknowledgement or another client shows that the event exists.
fn is_known_elsewhere(history: &History, subscriber: &Subscriber, body: &str) -> bool {
    let saw = |other: &Subscriber| {
        (0..other.seen.len()).any(|note| event(other, note).is_some_and(|e| e.1 == body))
    };
    is_acked(history, body)
        || history.subscribers.iter().any(|other| other.name != subscriber.name && saw(other))
}

/// Whether the client must see this event: it was not notified of a loss right after it, and it
/// joined before the event was published if it has no recovery.
fn is_promised(history: &History, subscriber: &Subscriber, note: usize) -> bool {
    let Some((_, body)) = event(subscriber, note) else { return false };
    let no_loss_follows = note + 1 == subscriber.seen.len() || event(subscriber, note + 1).is_some();
    let started = match &subscriber.seen[note - 1] {
        (since, Seen::LetIn) => attempt(history, body).started > *since,
        _ => true,
    };
    no_loss_follows && started && is_known_elsewhere(history, subscriber, body)
}

fn describe(history: &History, place: Location) -> String {
    let subscriber = &history.subscribers[place.subscriber];
    format!("{} at {:?}", subscriber.name, subscriber.seen[place.note])
}

fn drop_one(history: &mut History, rng: &mut Rng) -> Option<String> {
    let place = pick(&places(history, |subscriber, note| is_promised(history, subscriber, note)), rng)?;
    let what = describe(history, place);
    history.subscribers[place.subscriber].seen.remove(place.note);
    Some(what)
}

fn forget(history: &mut History, body: &str) {
    for subscriber in &mut history.subscribers {
        subscriber.seen.retain(|(_, seen)| !matches!(seen, Seen::Event(_, other, _) if other == body));
    }
}

fn vanish(history: &mut History, rng: &mut Rng) -> Option<String> {
    let promised = places(history, |subscriber, note| {
        is_promised(history, subscriber, note)
            && event(subscriber, note).is_some_and(|(_, body)| is_acked(history, body))
            // The event must still be due when the others do not see it either.
            && (note + 1 == subscriber.seen.len() || subscriber.recovers)
    });
    let place = pick(&promised, rng)?;
    let what = describe(history, place);
    let body = event(&history.subscribers[place.subscriber], place.note)?.1.to_owned();
    forget(history, &body);
    Some(what)
}

fn vanish_unknown(history: &mut History, _: &mut Rng) -> Option<String> {
    let unknown = |body: &str| attempt(history, body).outcome == Outcome::Unknown;
    let inside = places(history, |subscriber, note| {
        let next = event(subscriber, note + 1).is_some_and(|(_, body)| is_acked(history, body));
        let (Some((_, body)), true, true) = (event(subscriber, note), next, subscriber.recovers) else {
            return false;
        };
        unknown(body) && attempt(history, body).to.is_none()
    });
    let bodies: std::collections::BTreeSet<String> = inside
        .iter()
        .filter_map(|place| Some(event(&history.subscribers[place.subscriber], place.note)?.1.to_owned()))
        .collect();
    // Private events with the same fate are excused: no client can know them.
    let unseen = |body: &str| {
        !history.subscribers.iter().any(|subscriber| {
            (0..subscriber.seen.len()).any(|note| event(subscriber, note).is_some_and(|seen| seen.1 == body))
        })
    };
    let open = history.attempts.iter().filter(|a| a.outcome == Outcome::Unknown && a.to.is_some());
    let open = open.filter(|attempt| unseen(&attempt.body)).count();
    if bodies.len() <= open {
        return None;
    }
    bodies.iter().for_each(|body| forget(history, body));
    Some(format!("{bodies:?}"))
}

fn cut_end(history: &mut History, rng: &mut Rng) -> Option<String> {
    let at = rng.index(history.subscribers.len());
    let subscriber = &mut history.subscribers[at];
    let events =
        (0..subscriber.seen.len()).rev().take_while(|note| event(subscriber, *note).is_some()).count();
    let keep = subscriber.seen.len() - 1 - rng.index(events);
    // Without recovery, an event in flight during the join need not be seen.
    let keep = if subscriber.recovers { keep } else { subscriber.seen.len() - 1 };
    let since =
        subscriber.seen.iter().rev().find(|(_, seen)| *seen == Seen::LetIn).map(|(moment, _)| *moment);
    let last = event(subscriber, subscriber.seen.len() - 1)?.1.to_owned();
    subscriber.seen.truncate(keep);
    let what = format!("{} has only {keep}", subscriber.name);
    let promised = since.is_none_or(|since| attempt(history, &last).started > since);
    promised.then_some(what)
}

fn any_event(history: &History, rng: &mut Rng) -> Option<Location> {
    pick(&places(history, |subscriber, note| event(subscriber, note).is_some()), rng)
}

fn double(history: &mut History, rng: &mut Rng) -> Option<String> {
    let place = any_event(history, rng)?;
    let what = describe(history, place);
    let seen = &mut history.subscribers[place.subscriber].seen;
    seen.insert(place.note + 1, seen[place.note].clone());
    Some(what)
}

fn again_later(history: &mut History, rng: &mut Rng) -> Option<String> {
    let place = any_event(history, rng)?;
    let seen = &mut history.subscribers[place.subscriber].seen;
    seen.push(seen[place.note].clone());
    Some(describe(history, place))
}

fn again_as_new(history: &mut History, rng: &mut Rng) -> Option<String> {
    let place = any_event(history, rng)?;
    let seen = &mut history.subscribers[place.subscriber].seen;
    let (moment, Seen::Event(_, body, to)) = seen[place.note].clone() else { return None };
    let (_, Seen::Event(last, ..)) = seen.last()? else { return None };
    let new = Seen::Event(last + 1, body, to);
    seen.push((moment, new));
    Some(describe(history, place))
}

fn swap(history: &mut History, rng: &mut Rng) -> Option<String> {
    let pairs = places(history, |subscriber, note| {
        event(subscriber, note).is_some() && event(subscriber, note + 1).is_some()
    });
    let place = pick(&pairs, rng)?;
    let what = describe(history, place);
    history.subscribers[place.subscriber].seen.swap(place.note, place.note + 1);
    Some(what)
}

/// Changes the id of an event in all records.
fn renumber(history: &mut History, from: u64, to: u64) {
    for subscriber in &mut history.subscribers {
        for (_, seen) in &mut subscriber.seen {
            if let Seen::Event(id, ..) = seen
                && *id == from
            {
                *id = to;
            }
        }
    }
    for attempt in &mut history.attempts {
        if attempt.outcome == Outcome::Acked(from) {
            attempt.outcome = Outcome::Acked(to);
        }
    }
}

fn acked(history: &History) -> Vec<(usize, u64)> {
    let attempts = history.attempts.iter().enumerate();
    attempts
        .filter_map(|(at, attempt)| match attempt.outcome {
            Outcome::Acked(id) => Some((at, id)),
            _ => None,
        })
        .collect()
}

fn reuse_id(history: &mut History, rng: &mut Rng) -> Option<String> {
    let acked = acked(history);
    let first = rng.index(acked.len() - 1);
    let second = first + 1 + rng.index(acked.len() - first - 1);
    renumber(history, acked[second].1, acked[first].1);
    Some(format!("{:?} as {:?}", acked[second], acked[first]))
}

fn other_id(history: &mut History, rng: &mut Rng) -> Option<String> {
    let known = places(history, |subscriber, note| {
        event(subscriber, note).is_some_and(|(_, body)| is_known_elsewhere(history, subscriber, body))
    });
    let place = pick(&known, rng)?;
    let what = describe(history, place);
    if let Seen::Event(id, ..) = &mut history.subscribers[place.subscriber].seen[place.note].1 {
        *id = if rng.once_in(2) { *id + 1 } else { *id - 1 };
    }
    Some(what)
}

fn unpublished(history: &mut History, rng: &mut Rng) -> Option<String> {
    let place = any_event(history, rng)?;
    let seen = &mut history.subscribers[place.subscriber].seen;
    let (moment, Seen::Event(id, ..)) = seen[place.note] else { return None };
    seen.insert(place.note + 1, (moment, Seen::Event(id + 1, "invented".into(), None)));
    Some(describe(history, place))
}

fn alter(history: &mut History, rng: &mut Rng) -> Option<String> {
    let place = any_event(history, rng)?;
    if let Seen::Event(_, body, _) = &mut history.subscribers[place.subscriber].seen[place.note].1 {
        body.push('!');
    }
    Some(describe(history, place))
}

fn rejected(history: &mut History, rng: &mut Rng) -> Option<String> {
    let place = any_event(history, rng)?;
    let body = event(&history.subscribers[place.subscriber], place.note)?.1.to_owned();
    let attempt = history.attempts.iter_mut().find(|attempt| attempt.body == body)?;
    attempt.outcome = Outcome::Rejected;
    Some(body)
}

fn wrong_user(history: &mut History, rng: &mut Rng) -> Option<String> {
    let private: Vec<(usize, u64)> =
        acked(history).into_iter().filter(|(at, _)| history.attempts[*at].to.is_some()).collect();
    let (at, id) = pick(&private, rng)?;
    let Attempt { body, to, .. } = history.attempts[at].clone();
    let gaps = places(history, |subscriber, note| {
        let around = event(subscriber, note).zip(event(subscriber, note + 1));
        Some(&subscriber.user) != to.as_ref() && around.is_some_and(|(a, b)| a.0 < id && id < b.0)
    });
    let place = pick(&gaps, rng)?;
    let what = format!("{} {body}", describe(history, place));
    let moment = history.subscribers[place.subscriber].seen[place.note].0;
    history.subscribers[place.subscriber].seen.insert(place.note + 1, (moment, Seen::Event(id, body, to)));
    Some(what)
}

fn addressee_lost(history: &mut History, rng: &mut Rng) -> Option<String> {
    let private =
        places(history, |subscriber, note| matches!(subscriber.seen[note].1, Seen::Event(_, _, Some(_))));
    let place = pick(&private, rng)?;
    if let Seen::Event(_, _, to) = &mut history.subscribers[place.subscriber].seen[place.note].1 {
        *to = None;
    }
    Some(describe(history, place))
}

/// Whether an acknowledged event for this user is after one position and not after another.
fn lost(history: &History, subscriber: &Subscriber, after: u64, upto: u64) -> bool {
    let mine = |at: usize| history.attempts[at].to.as_ref().is_none_or(|to| *to == subscriber.user);
    acked(history).iter().any(|(at, id)| after < *id && *id <= upto && mine(*at))
}

/// The position after the records before this one.
fn position(subscriber: &Subscriber, note: usize) -> Option<u64> {
    subscriber.seen[..note].iter().rev().find_map(|(_, seen)| match seen {
        Seen::Event(id, ..) | Seen::Reset(id) | Seen::Stands(id) => Some(*id),
        Seen::Welcomed { at, .. } => Some(*at),
        Seen::LetIn | Seen::Ended(_) => None,
    })
}

fn reset_withheld(history: &mut History, rng: &mut Rng) -> Option<String> {
    let resets = places(history, |subscriber, note| {
        let Seen::Reset(to) = subscriber.seen[note].1 else { return false };
        let position = position(subscriber, note).expect("it was connected");
        lost(history, subscriber, position, to) && event(subscriber, note + 1).is_some()
    });
    let place = pick(&resets, rng)?;
    let what = describe(history, place);
    history.subscribers[place.subscriber].seen.remove(place.note);
    Some(what)
}

fn welcome_lies(history: &mut History, rng: &mut Rng) -> Option<String> {
    let honest = places(history, |subscriber, note| {
        let Seen::Welcomed { asked: Some(asked), at, recovered: false, .. } = subscriber.seen[note].1 else {
            return false;
        };
        lost(history, subscriber, asked, at) && event(subscriber, note + 1).is_some()
    });
    let place = pick(&honest, rng)?;
    let what = describe(history, place);
    if let Seen::Welcomed { asked, at, recovered, .. } =
        &mut history.subscribers[place.subscriber].seen[place.note].1
    {
        *recovered = true;
        // It resumes where the client asked, or at the wrong position.
        *at = if rng.once_in(4) { *at } else { asked.expect("it asked") };
    }
    Some(what)
}

/// An event from before an announced loss is delivered again after it.
fn again_behind(history: &mut History, rng: &mut Rng) -> Option<String> {
    let announced = places(history, |subscriber, note| {
        let (_, seen) = &subscriber.seen[note];
        matches!(seen, Seen::Reset(_) | Seen::Welcomed { asked: Some(_), recovered: false, .. })
            && (0..note).any(|note| event(subscriber, note).is_some())
    });
    let place = pick(&announced, rng)?;
    let what = describe(history, place);
    let seen = &mut history.subscribers[place.subscriber].seen;
    let again = seen[..place.note].iter().rev().find(|(_, seen)| matches!(seen, Seen::Event(..)))?.clone();
    seen.insert(place.note + 1, again);
    Some(what)
}

fn stands_ahead(history: &mut History, rng: &mut Rng) -> Option<String> {
    let promised = places(history, |subscriber, note| {
        subscriber.recovers
            && event(subscriber, note).is_some()
            && !matches!(subscriber.seen[note - 1].1, Seen::LetIn)
    });
    let place = pick(&promised, rng)?;
    let what = describe(history, place);
    let subscriber = &mut history.subscribers[place.subscriber];
    let id = event(subscriber, place.note)?.0;
    let moment = subscriber.seen[place.note].0;
    subscriber.seen.insert(place.note, (moment, Seen::Stands(id)));
    Some(what)
}

fn head_ahead(history: &mut History, rng: &mut Rng) -> Option<String> {
    let acked = acked(history);
    let later = |moment: u64| acked.iter().find(|(at, _)| history.attempts[*at].started > moment);
    let recovered = places(history, |subscriber, note| {
        let (moment, seen) = &subscriber.seen[note];
        matches!(seen, Seen::Welcomed { asked: Some(_), recovered: true, .. }) && later(*moment).is_some()
    });
    let place = pick(&recovered, rng)?;
    let what = describe(history, place);
    let (moment, _) = history.subscribers[place.subscriber].seen[place.note];
    let ahead = later(moment)?.1;
    if let Seen::Welcomed { head, .. } = &mut history.subscribers[place.subscriber].seen[place.note].1 {
        *head = ahead;
    }
    Some(what)
}

/// Two consecutive acknowledged public events that fulfil this condition.
fn two_in_order(
    history: &History,
    rng: &mut Rng,
    wanted: impl Fn(&Attempt, &Attempt) -> bool,
) -> Option<[(usize, u64); 2]> {
    let open = acked(history).into_iter().filter(|(at, _)| history.attempts[*at].to.is_none());
    let open: Vec<(usize, u64)> = open.collect();
    let pairs: Vec<[(usize, u64); 2]> = open
        .windows(2)
        .filter(|pair| wanted(&history.attempts[pair[0].0], &history.attempts[pair[1].0]))
        .map(|pair| [pair[0], pair[1]])
        .collect();
    pick(&pairs, rng)
}

/// Exchanges the ids of two events in all records.
fn exchange(history: &mut History, [(first, low), (second, high)]: [(usize, u64); 2]) -> String {
    let bodies = [history.attempts[first].body.clone(), history.attempts[second].body.clone()];
    for subscriber in &mut history.subscribers {
        for (_, seen) in &mut subscriber.seen {
            match seen {
                Seen::Event(id, body, _) if *id == low => *body = bodies[1].clone(),
                Seen::Event(id, body, _) if *id == high => *body = bodies[0].clone(),
                _ => {}
            }
        }
    }
    history.attempts[first].outcome = Outcome::Acked(high);
    history.attempts[second].outcome = Outcome::Acked(low);
    format!("{bodies:?}")
}

fn late(history: &mut History, rng: &mut Rng) -> Option<String> {
    let pair = two_in_order(history, rng, |first, second| first.finished < second.started)?;
    Some(exchange(history, pair))
}

fn change_places(history: &mut History, rng: &mut Rng) -> Option<String> {
    let pair = two_in_order(history, rng, |first, second| first.line == second.line)?;
    // Both were sent before either was answered, so only their publisher knows the order.
    history.attempts[pair[0].0].finished = history.attempts[pair[1].0].finished;
    Some(exchange(history, pair))
}
