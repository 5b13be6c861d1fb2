//! What is asked of a run after its end.

use std::ops::RangeInclusive;
use std::time::Duration;

use crate::checker::{History, Outcome, Seen, Subscriber};

/// The records of a run.
pub struct Report {
    /// Those of the main channel.
    pub history: History,
    /// Those of the other channels.
    others: Vec<History>,
    /// How long each publisher waited for each answer, with its line.
    waits: Vec<(String, Duration)>,
}

impl Report {
    /// From the histories of all channels, the main one first.
    pub fn new(mut histories: Vec<History>, waits: Vec<(String, Duration)>) -> Report {
        let history = histories.remove(0);
        Report { history, others: histories, waits }
    }

    /// The histories of all channels, the main one first.
    pub fn histories(&self) -> impl Iterator<Item = &History> {
        std::iter::once(&self.history).chain(&self.others)
    }

    /// All subscribers, in each of their channels.
    fn subscribers(&self) -> impl Iterator<Item = &Subscriber> {
        self.histories().flat_map(|history| &history.subscribers)
    }

    /// The number of events in the main channel with such an outcome.
    pub fn count(&self, wanted: impl Fn(Outcome) -> bool) -> usize {
        self.history.attempts.iter().filter(|attempt| wanted(attempt.outcome)).count()
    }

    /// Whether any subscriber saw this event.
    pub fn came(&self, body: &str) -> bool {
        let is = |seen: &Seen| matches!(seen, Seen::Event(_, other, _) if other == body);
        self.history.subscribers.iter().any(|subscriber| subscriber.seen.iter().any(|(_, seen)| is(seen)))
    }

    /// The number of acknowledged events in the main channel.
    pub fn acked(&self) -> usize {
        self.count(|outcome| matches!(outcome, Outcome::Acked(_)))
    }

    /// Fails if any subscriber was notified of a loss. None occurred, so every event reached every
    /// subscriber.
    pub fn assert_no_loss_reported(&self) {
        for subscriber in self.subscribers() {
            assert_eq!(
                subscriber.announcements(),
                0,
                "{}: {:?}",
                subscriber.name,
                control_frames(subscriber)
            );
        }
    }

    /// Fails unless every subscriber of the main channel with recovery was notified of a loss this
    /// many times, and a plain one was closed. In other channels, which may be quiet for a while, two
    /// losses can be one, and a client that changes its subscriptions may have come after them.
    pub fn assert_loss_reported(&self, often: RangeInclusive<usize>) {
        let check = |subscriber: &Subscriber, often: &RangeInclusive<usize>| {
            let count = subscriber.announcements();
            assert!(
                often.contains(&count),
                "{} was notified {count} times: {:?}",
                subscriber.name,
                control_frames(subscriber)
            );
        };
        for subscriber in self.history.subscribers.iter().filter(|subscriber| subscriber.recovers) {
            check(subscriber, &often);
        }
        for subscriber in self.others.iter().flat_map(|history| &history.subscribers) {
            check(subscriber, &(usize::from(subscriber.home.is_some())..=*often.end()));
        }
        let plain = self.subscribers().filter(|subscriber| !subscriber.recovers);
        assert!(
            plain.map(Subscriber::announcements).sum::<usize>() > 0,
            "clients without recovery are closed"
        );
    }

    /// The longest wait for an answer on these lines.
    pub fn slowest(&self, lines: impl Fn(&str) -> bool) -> Duration {
        let waits = self.waits.iter().filter(|(line, _)| lines(line)).map(|(_, wait)| *wait);
        waits.max().unwrap_or_default()
    }

    /// The number of notifications of a loss, for all subscribers together.
    pub fn losses_reported(&self) -> usize {
        self.subscribers().map(Subscriber::announcements).sum()
    }
}

/// What a subscriber saw besides events.
pub fn control_frames(subscriber: &Subscriber) -> Vec<String> {
    let seen = subscriber.seen.iter().filter(|(_, seen)| !matches!(seen, Seen::Event(..)));
    seen.map(|(_, seen)| format!("{seen:?}")).collect()
}
