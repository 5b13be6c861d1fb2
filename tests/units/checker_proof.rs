//! The judge, judged: it has nothing to say against histories in which nothing is wrong, and it catches every way
//! in which a bus can be broken, each time, wherever it happens.

mod breaks;
mod model;

use crate::checker;
use crate::checker::{Outcome, Seen, judge};
use crate::common::Rng;
use breaks::BREAKS;
use model::history;

const HISTORIES: u64 = 300;

#[test]
fn nothing_is_said_against_a_history_without_fault() {
    let (mut events, mut announcements, mut unknown) = (0, 0, 0);
    for seed in 0..3 * HISTORIES {
        let history = history(seed, 400);
        let breaches = judge(&history);
        assert!(breaches.is_empty(), "seed {seed}: {breaches:#?}");
        events += history.watchers.iter().map(checker::Watcher::events).sum::<usize>();
        announcements += history.watchers.iter().map(checker::Watcher::announcements).sum::<usize>();
        unknown += history.attempts.iter().filter(|attempt| attempt.outcome == Outcome::Unknown).count();
    }
    // So these are no empty histories.
    assert!(
        events > 100_000 && announcements > 1_000 && unknown > 1_000,
        "{events} {announcements} {unknown}"
    );
}

#[test]
fn every_break_is_caught_every_time_by_the_rule_it_breaks() {
    for kind in &BREAKS {
        let mut done = 0;
        for seed in 0..HISTORIES {
            let mut rng = Rng(seed ^ 0x5eed);
            let mut broken = history(seed, 260);
            let Some(what) = (kind.apply)(&mut broken, &mut rng) else { continue };
            done += 1;
            let breaches = judge(&broken);
            let right = breaches.iter().any(|breach| kind.rules.contains(&breach.rule));
            assert!(right, "{}, seed {seed}: {what}: {breaches:#?}", kind.name);
        }
        // Where a history has no place for a break, it proves nothing; most must have one.
        assert!(done > HISTORIES / 2, "{} could be tried in {done} histories only", kind.name);
    }
}

#[test]
fn ids_may_fall_excuse_lower_ids_behind_an_announcement_and_nothing_else() {
    let mut history = history(1, 200);
    let mut led_back = false;
    for watcher in history.watchers.iter_mut().filter(|watcher| watcher.recovers) {
        let (moment, last) = watcher.seen.last().cloned().expect("it saw the end");
        let Seen::Event(id, ..) = last else { panic!("the end is an event: {last:?}") };
        watcher.stayed = false;
        watcher.seen.push((moment + 1, Seen::Ended(None)));
        let back = Seen::Welcomed { asked: Some(id), at: 500, head: 500, recovered: false };
        watcher.seen.push((moment + 2, back));
        led_back = true;
    }
    assert!(led_back && !judge(&history).is_empty());
    history.ids_may_fall = true;
    assert!(judge(&history).is_empty(), "{:#?}", judge(&history));
    for kind in BREAKS.iter().filter(|kind| kind.always) {
        for seed in 0..HISTORIES / 10 {
            let mut broken = model::history(seed, 200);
            broken.ids_may_fall = true;
            let Some(what) = (kind.apply)(&mut broken, &mut Rng(seed)) else { continue };
            let breaches = judge(&broken);
            let right = breaches.iter().any(|breach| kind.rules.contains(&breach.rule));
            assert!(right, "{}, seed {seed}: {what}: {breaches:#?}", kind.name);
        }
    }
}
