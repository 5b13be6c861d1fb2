//! Tests of the checker: it accepts correct histories, and finds every mutation of them with the
//! rule that it violates.

mod histories;
mod mutations;

use crate::checker;
use crate::checker::{Outcome, Seen, find_violations};
use crate::common::Rng;
use histories::history;
use mutations::MUTATIONS;

const HISTORIES: u64 = 300;

#[test]
fn accepts_correct_histories() {
    let (mut events, mut announcements, mut unknown) = (0, 0, 0);
    for seed in 0..3 * HISTORIES {
        let history = history(seed, 400);
        let violations = find_violations(&history);
        assert!(violations.is_empty(), "seed {seed}: {violations:#?}");
        events += history.subscribers.iter().map(checker::Subscriber::events).sum::<usize>();
        announcements += history.subscribers.iter().map(checker::Subscriber::announcements).sum::<usize>();
        unknown += history.attempts.iter().filter(|attempt| attempt.outcome == Outcome::Unknown).count();
    }
    // The histories are not empty.
    assert!(
        events > 100_000 && announcements > 1_000 && unknown > 1_000,
        "{events} {announcements} {unknown}"
    );
}

#[test]
fn every_mutation_is_found_by_its_rule() {
    for kind in &MUTATIONS {
        let mut done = 0;
        for seed in 0..HISTORIES {
            let mut rng = Rng(seed ^ 0x5eed);
            let mut broken = history(seed, 260);
            let Some(what) = (kind.apply)(&mut broken, &mut rng) else { continue };
            done += 1;
            let violations = find_violations(&broken);
            let right = violations.iter().any(|violation| kind.rules.contains(&violation.rule));
            assert!(right, "{}, seed {seed}: {what}: {violations:#?}", kind.name);
        }
        // Some histories have no place for a mutation. Most must have one.
        assert!(done > HISTORIES / 2, "{} could be tried in {done} histories only", kind.name);
    }
}

#[test]
fn ids_may_fall_excuses_only_announced_lower_ids() {
    let mut history = history(1, 200);
    let mut led_back = false;
    for subscriber in history.subscribers.iter_mut().filter(|subscriber| subscriber.recovers) {
        let (moment, last) = subscriber.seen.last().cloned().expect("it saw the end");
        let Seen::Event(id, ..) = last else { panic!("the end is an event: {last:?}") };
        subscriber.stayed = false;
        subscriber.seen.push((moment + 1, Seen::Ended(None)));
        let back = Seen::Welcomed { asked: Some(id), at: 500, head: 500, recovered: false };
        subscriber.seen.push((moment + 2, back));
        led_back = true;
    }
    assert!(led_back && !find_violations(&history).is_empty());
    history.ids_may_fall = true;
    assert!(find_violations(&history).is_empty(), "{:#?}", find_violations(&history));
    for kind in MUTATIONS.iter().filter(|kind| kind.always) {
        for seed in 0..HISTORIES / 10 {
            let mut broken = histories::history(seed, 200);
            broken.ids_may_fall = true;
            let Some(what) = (kind.apply)(&mut broken, &mut Rng(seed)) else { continue };
            let violations = find_violations(&broken);
            let right = violations.iter().any(|violation| kind.rules.contains(&violation.rule));
            assert!(right, "{}, seed {seed}: {what}: {violations:#?}", kind.name);
        }
    }
}
