//! Mutations of a client's subscriptions: the label, the first and the last frames of a channel.

use super::super::histories::history_of;
use super::{any_event, describe, event, is_promised, pick, places};
use crate::checker::{History, Seen, Subscriber};
use crate::common::Rng;

pub fn wrong_channel(history: &mut History, rng: &mut Rng) -> Option<String> {
    let other = history_of("b", rng.below(1000), 50);
    let theirs = any_event(&other, rng)?;
    let (_, wrong) = other.subscribers[theirs.subscriber].seen[theirs.note].clone();
    let place = any_event(history, rng)?;
    let what = format!("{wrong:?} after {}", describe(history, place));
    let seen = &mut history.subscribers[place.subscriber].seen;
    seen.insert(place.note + 1, (seen[place.note].0, wrong));
    Some(what)
}

pub fn before_welcome(history: &mut History, rng: &mut Rng) -> Option<String> {
    let welcomes = places(history, |subscriber, note| {
        matches!(subscriber.seen[note].1, Seen::Welcomed { .. }) && event(subscriber, note + 1).is_some()
    });
    let place = pick(&welcomes, rng)?;
    let what = describe(history, place);
    history.subscribers[place.subscriber].seen.swap(place.note, place.note + 1);
    Some(what)
}

pub fn after_the_end(history: &mut History, rng: &mut Rng) -> Option<String> {
    let last = places(history, |subscriber, note| {
        let next = subscriber.seen.get(note + 1).map(|(_, seen)| seen);
        event(subscriber, note).is_some() && next == Some(&Seen::Ended(None))
    });
    let place = pick(&last, rng)?;
    let what = describe(history, place);
    history.subscribers[place.subscriber].seen.swap(place.note, place.note + 1);
    Some(what)
}

/// Whether the client has resumed here without a loss.
fn is_resumed(subscriber: &Subscriber, note: usize) -> bool {
    matches!(subscriber.seen[note].1, Seen::Welcomed { asked: Some(_), recovered: true, .. })
}

pub fn drop_resumed(history: &mut History, rng: &mut Rng) -> Option<String> {
    let first = places(history, |subscriber, note| {
        note > 0 && is_resumed(subscriber, note - 1) && is_promised(history, subscriber, note)
    });
    let place = pick(&first, rng)?;
    let what = describe(history, place);
    history.subscribers[place.subscriber].seen.remove(place.note);
    Some(what)
}

pub fn again_resumed(history: &mut History, rng: &mut Rng) -> Option<String> {
    let resumed = places(history, |subscriber, note| {
        is_resumed(subscriber, note) && (0..note).any(|note| event(subscriber, note).is_some())
    });
    let place = pick(&resumed, rng)?;
    let what = describe(history, place);
    let seen = &mut history.subscribers[place.subscriber].seen;
    let again = seen[..place.note].iter().rev().find(|(_, seen)| matches!(seen, Seen::Event(..)))?.clone();
    seen.insert(place.note + 1, again);
    Some(what)
}
