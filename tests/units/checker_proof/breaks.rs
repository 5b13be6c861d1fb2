//! The ways in which a bus can be broken, done to a history in which nothing is wrong.

use crate::checker::{Attempt, History, Outcome, Rule, Seen, Watcher};
use crate::common::Rng;

/// One way.
pub struct Break {
    /// Its name.
    pub name: &'static str,
    /// The rules by any of which it must be caught.
    pub rules: &'static [Rule],
    /// Whether it shows even where two primaries excuse much.
    pub always: bool,
    /// Does it somewhere; `None` when the history has no place for it. Else: where.
    pub apply: fn(&mut History, &mut Rng) -> Option<String>,
}

const fn way(
    name: &'static str,
    rules: &'static [Rule],
    always: bool,
    apply: fn(&mut History, &mut Rng) -> Option<String>,
) -> Break {
    Break { name, rules, always, apply }
}

use Rule::{Known, Missing, OneId, Order, Position, Private, Published, Time, Twice};

/// All of them.
pub static BREAKS: [Break; 22] = [
    way("an event is dropped on the way to one client", &[Missing], false, drop_one),
    way("an acknowledged event reaches nobody", &[Missing], false, vanish),
    way("events reach nobody, and nobody was told their fate", &[Known], true, vanish_unknown),
    way("the last events do not come", &[Missing], false, cut_end),
    way("an event comes twice in a row", &[Twice], true, double),
    way("an event comes again later", &[Twice, Order], true, again_later),
    way("an event comes again under a new id", &[OneId], true, again_as_new),
    way("two events come in the wrong order", &[Order], true, swap),
    way("an id is given to two events", &[OneId], true, reuse_id),
    way("an event has another id for one client", &[OneId], true, other_id),
    way("what nobody published comes", &[Published], true, unpublished),
    way("an event's text is changed", &[Published], true, alter),
    way("what was refused comes", &[Published], true, refused),
    way("an event reaches another user", &[Private], true, wrong_user),
    way("an event's addressee gets lost", &[Private, OneId], true, addressee_lost),
    way("a loss is not announced", &[Missing], true, reset_withheld),
    way("a welcome promises what was lost", &[Missing, Position], true, welcome_lies),
    way("an event comes again behind an announcement", &[Twice, Order], false, again_behind),
    way("a ping tells a position ahead of the client's", &[Missing, Order], true, stands_ahead),
    way("a welcome's head lies ahead", &[Position], false, head_ahead),
    way("an event gets a lower id than one acknowledged before it", &[Time], false, late),
    way("two events of one connection change places", &[Time], true, change_places),
];

/// An event in somebody's notes.
#[derive(Clone, Copy)]
struct Location {
    watcher: usize,
    note: usize,
}

fn places(history: &History, wanted: impl Fn(&Watcher, usize) -> bool) -> Vec<Location> {
    let mut places = Vec::new();
    for (at, watcher) in history.watchers.iter().enumerate() {
        let notes = (0..watcher.seen.len()).filter(|note| wanted(watcher, *note));
        places.extend(notes.map(|note| Location { watcher: at, note }));
    }
    places
}

fn pick<T: Copy>(from: &[T], rng: &mut Rng) -> Option<T> {
    (!from.is_empty()).then(|| from[rng.index(from.len())])
}

fn event(watcher: &Watcher, note: usize) -> Option<(u64, &str)> {
    match &watcher.seen.get(note)?.1 {
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

/// Whether someone else than this client proves that the event exists.
fn is_continuous(history: &History, watcher: &Watcher, body: &str) -> bool {
    let saw =
        |other: &Watcher| (0..other.seen.len()).any(|note| event(other, note).is_some_and(|e| e.1 == body));
    is_acked(history, body) || history.watchers.iter().any(|other| other.name != watcher.name && saw(other))
}

/// Whether the client was promised just this event: neither was it told right after that something may be missing,
/// nor, having no recovery, can it not know.
fn is_promised(history: &History, watcher: &Watcher, note: usize) -> bool {
    let Some((_, body)) = event(watcher, note) else { return false };
    let goes_on = note + 1 == watcher.seen.len() || event(watcher, note + 1).is_some();
    let begun = match &watcher.seen[note - 1] {
        (since, Seen::LetIn) => attempt(history, body).begun > *since,
        _ => true,
    };
    goes_on && begun && is_continuous(history, watcher, body)
}

fn describe(history: &History, place: Location) -> String {
    let watcher = &history.watchers[place.watcher];
    format!("{} at {:?}", watcher.name, watcher.seen[place.note])
}

fn drop_one(history: &mut History, rng: &mut Rng) -> Option<String> {
    let place = pick(&places(history, |watcher, note| is_promised(history, watcher, note)), rng)?;
    let what = describe(history, place);
    history.watchers[place.watcher].seen.remove(place.note);
    Some(what)
}

fn forget(history: &mut History, body: &str) {
    for watcher in &mut history.watchers {
        watcher.seen.retain(|(_, seen)| !matches!(seen, Seen::Event(_, other, _) if other == body));
    }
}

fn vanish(history: &mut History, rng: &mut Rng) -> Option<String> {
    let promised = places(history, |watcher, note| {
        is_promised(history, watcher, note)
            && event(watcher, note).is_some_and(|(_, body)| is_acked(history, body))
            // It must still be promised when the others don't see it: by what follows, or to one who stays.
            && (note + 1 == watcher.seen.len() || watcher.recovers)
    });
    let place = pick(&promised, rng)?;
    let what = describe(history, place);
    let body = event(&history.watchers[place.watcher], place.note)?.1.to_owned();
    forget(history, &body);
    Some(what)
}

fn vanish_unknown(history: &mut History, _: &mut Rng) -> Option<String> {
    let unknown = |body: &str| attempt(history, body).outcome == Outcome::Unknown;
    let inside = places(history, |watcher, note| {
        let next = event(watcher, note + 1).is_some_and(|(_, body)| is_acked(history, body));
        let (Some((_, body)), true, true) = (event(watcher, note), next, watcher.recovers) else {
            return false;
        };
        unknown(body) && attempt(history, body).to.is_none()
    });
    let bodies: std::collections::BTreeSet<String> = inside
        .iter()
        .filter_map(|place| Some(event(&history.watchers[place.watcher], place.note)?.1.to_owned()))
        .collect();
    // Events for one user may have gone the same way without anyone to tell: so many are excused.
    let unseen = |body: &str| {
        !history.watchers.iter().any(|watcher| {
            (0..watcher.seen.len()).any(|note| event(watcher, note).is_some_and(|seen| seen.1 == body))
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
    let at = rng.index(history.watchers.len());
    let watcher = &mut history.watchers[at];
    let events = (0..watcher.seen.len()).rev().take_while(|note| event(watcher, *note).is_some()).count();
    let keep = watcher.seen.len() - 1 - rng.index(events);
    // Without recovery, what was under way when it came need not be seen.
    let keep = if watcher.recovers { keep } else { watcher.seen.len() - 1 };
    let since = watcher.seen.iter().rev().find(|(_, seen)| *seen == Seen::LetIn).map(|(moment, _)| *moment);
    let last = event(watcher, watcher.seen.len() - 1)?.1.to_owned();
    watcher.seen.truncate(keep);
    let what = format!("{} has only {keep}", watcher.name);
    let promised = since.is_none_or(|since| attempt(history, &last).begun > since);
    promised.then_some(what)
}

fn any_event(history: &History, rng: &mut Rng) -> Option<Location> {
    pick(&places(history, |watcher, note| event(watcher, note).is_some()), rng)
}

fn double(history: &mut History, rng: &mut Rng) -> Option<String> {
    let place = any_event(history, rng)?;
    let what = describe(history, place);
    let seen = &mut history.watchers[place.watcher].seen;
    seen.insert(place.note + 1, seen[place.note].clone());
    Some(what)
}

fn again_later(history: &mut History, rng: &mut Rng) -> Option<String> {
    let place = any_event(history, rng)?;
    let seen = &mut history.watchers[place.watcher].seen;
    seen.push(seen[place.note].clone());
    Some(describe(history, place))
}

fn again_as_new(history: &mut History, rng: &mut Rng) -> Option<String> {
    let place = any_event(history, rng)?;
    let seen = &mut history.watchers[place.watcher].seen;
    let (moment, Seen::Event(_, body, to)) = seen[place.note].clone() else { return None };
    let (_, Seen::Event(last, ..)) = seen.last()? else { return None };
    let new = Seen::Event(last + 1, body, to);
    seen.push((moment, new));
    Some(describe(history, place))
}

fn swap(history: &mut History, rng: &mut Rng) -> Option<String> {
    let pairs =
        places(history, |watcher, note| event(watcher, note).is_some() && event(watcher, note + 1).is_some());
    let place = pick(&pairs, rng)?;
    let what = describe(history, place);
    history.watchers[place.watcher].seen.swap(place.note, place.note + 1);
    Some(what)
}

/// Gives an event another id in everybody's notes.
fn renumber(history: &mut History, from: u64, to: u64) {
    for watcher in &mut history.watchers {
        for (_, seen) in &mut watcher.seen {
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
    let known = places(history, |watcher, note| {
        event(watcher, note).is_some_and(|(_, body)| is_continuous(history, watcher, body))
    });
    let place = pick(&known, rng)?;
    let what = describe(history, place);
    if let Seen::Event(id, ..) = &mut history.watchers[place.watcher].seen[place.note].1 {
        *id = if rng.once_in(2) { *id + 1 } else { *id - 1 };
    }
    Some(what)
}

fn unpublished(history: &mut History, rng: &mut Rng) -> Option<String> {
    let place = any_event(history, rng)?;
    let seen = &mut history.watchers[place.watcher].seen;
    let (moment, Seen::Event(id, ..)) = seen[place.note] else { return None };
    seen.insert(place.note + 1, (moment, Seen::Event(id + 1, "nobody's".into(), None)));
    Some(describe(history, place))
}

fn alter(history: &mut History, rng: &mut Rng) -> Option<String> {
    let place = any_event(history, rng)?;
    if let Seen::Event(_, body, _) = &mut history.watchers[place.watcher].seen[place.note].1 {
        body.push('!');
    }
    Some(describe(history, place))
}

fn refused(history: &mut History, rng: &mut Rng) -> Option<String> {
    let place = any_event(history, rng)?;
    let body = event(&history.watchers[place.watcher], place.note)?.1.to_owned();
    let attempt = history.attempts.iter_mut().find(|attempt| attempt.body == body)?;
    attempt.outcome = Outcome::Refused;
    Some(body)
}

fn wrong_user(history: &mut History, rng: &mut Rng) -> Option<String> {
    let private: Vec<(usize, u64)> =
        acked(history).into_iter().filter(|(at, _)| history.attempts[*at].to.is_some()).collect();
    let (at, id) = pick(&private, rng)?;
    let Attempt { body, to, .. } = history.attempts[at].clone();
    let gaps = places(history, |watcher, note| {
        let around = event(watcher, note).zip(event(watcher, note + 1));
        Some(&watcher.user) != to.as_ref() && around.is_some_and(|(a, b)| a.0 < id && id < b.0)
    });
    let place = pick(&gaps, rng)?;
    let what = format!("{} {body}", describe(history, place));
    let moment = history.watchers[place.watcher].seen[place.note].0;
    history.watchers[place.watcher].seen.insert(place.note + 1, (moment, Seen::Event(id, body, to)));
    Some(what)
}

fn addressee_lost(history: &mut History, rng: &mut Rng) -> Option<String> {
    let private = places(history, |watcher, note| matches!(watcher.seen[note].1, Seen::Event(_, _, Some(_))));
    let place = pick(&private, rng)?;
    if let Seen::Event(_, _, to) = &mut history.watchers[place.watcher].seen[place.note].1 {
        *to = None;
    }
    Some(describe(history, place))
}

/// Whether an acknowledged event for this user lies behind this position, up to another.
fn lost(history: &History, watcher: &Watcher, after: u64, upto: u64) -> bool {
    let mine = |at: usize| history.attempts[at].to.as_ref().is_none_or(|to| *to == watcher.user);
    acked(history).iter().any(|(at, id)| after < *id && *id <= upto && mine(*at))
}

/// The position that the notes before this one lead to.
fn position(watcher: &Watcher, note: usize) -> Option<u64> {
    watcher.seen[..note].iter().rev().find_map(|(_, seen)| match seen {
        Seen::Event(id, ..) | Seen::Reset(id) | Seen::Stands(id) => Some(*id),
        Seen::Welcomed { at, .. } => Some(*at),
        Seen::LetIn | Seen::Ended(_) => None,
    })
}

fn reset_withheld(history: &mut History, rng: &mut Rng) -> Option<String> {
    let resets = places(history, |watcher, note| {
        let Seen::Reset(to) = watcher.seen[note].1 else { return false };
        let position = position(watcher, note).expect("it was connected");
        lost(history, watcher, position, to) && event(watcher, note + 1).is_some()
    });
    let place = pick(&resets, rng)?;
    let what = describe(history, place);
    history.watchers[place.watcher].seen.remove(place.note);
    Some(what)
}

fn welcome_lies(history: &mut History, rng: &mut Rng) -> Option<String> {
    let honest = places(history, |watcher, note| {
        let Seen::Welcomed { asked: Some(asked), at, recovered: false, .. } = watcher.seen[note].1 else {
            return false;
        };
        lost(history, watcher, asked, at) && event(watcher, note + 1).is_some()
    });
    let place = pick(&honest, rng)?;
    let what = describe(history, place);
    if let Seen::Welcomed { asked, at, recovered, .. } =
        &mut history.watchers[place.watcher].seen[place.note].1
    {
        *recovered = true;
        // Either it goes on where the client asked, or not even that.
        *at = if rng.once_in(4) { *at } else { asked.expect("it asked") };
    }
    Some(what)
}

/// What came before the announcement comes once more behind it.
fn again_behind(history: &mut History, rng: &mut Rng) -> Option<String> {
    let told = places(history, |watcher, note| {
        let (_, seen) = &watcher.seen[note];
        matches!(seen, Seen::Reset(_) | Seen::Welcomed { asked: Some(_), recovered: false, .. })
            && (0..note).any(|note| event(watcher, note).is_some())
    });
    let place = pick(&told, rng)?;
    let what = describe(history, place);
    let seen = &mut history.watchers[place.watcher].seen;
    let again = seen[..place.note].iter().rev().find(|(_, seen)| matches!(seen, Seen::Event(..)))?.clone();
    seen.insert(place.note + 1, again);
    Some(what)
}

fn stands_ahead(history: &mut History, rng: &mut Rng) -> Option<String> {
    let promised = places(history, |watcher, note| {
        watcher.recovers && event(watcher, note).is_some() && !matches!(watcher.seen[note - 1].1, Seen::LetIn)
    });
    let place = pick(&promised, rng)?;
    let what = describe(history, place);
    let watcher = &mut history.watchers[place.watcher];
    let id = event(watcher, place.note)?.0;
    let moment = watcher.seen[place.note].0;
    watcher.seen.insert(place.note, (moment, Seen::Stands(id)));
    Some(what)
}

fn head_ahead(history: &mut History, rng: &mut Rng) -> Option<String> {
    let acked = acked(history);
    let later = |moment: u64| acked.iter().find(|(at, _)| history.attempts[*at].begun > moment);
    let recovered = places(history, |watcher, note| {
        let (moment, seen) = &watcher.seen[note];
        matches!(seen, Seen::Welcomed { asked: Some(_), recovered: true, .. }) && later(*moment).is_some()
    });
    let place = pick(&recovered, rng)?;
    let what = describe(history, place);
    let (moment, _) = history.watchers[place.watcher].seen[place.note];
    let ahead = later(moment)?.1;
    if let Seen::Welcomed { head, .. } = &mut history.watchers[place.watcher].seen[place.note].1 {
        *head = ahead;
    }
    Some(what)
}

/// Two acknowledged events for everybody that come one after the other on these terms.
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

/// Gives each of two events the other's id, in everybody's notes.
fn exchange(history: &mut History, [(first, low), (second, high)]: [(usize, u64); 2]) -> String {
    let bodies = [history.attempts[first].body.clone(), history.attempts[second].body.clone()];
    for watcher in &mut history.watchers {
        for (_, seen) in &mut watcher.seen {
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
    let pair = two_in_order(history, rng, |first, second| first.ended < second.begun)?;
    Some(exchange(history, pair))
}

fn change_places(history: &mut History, rng: &mut Rng) -> Option<String> {
    let pair = two_in_order(history, rng, |first, second| first.line == second.line)?;
    // Both were sent before either was answered: only their sender knows which came first.
    history.attempts[pair[0].0].ended = history.attempts[pair[1].0].ended;
    Some(exchange(history, pair))
}
