//! How fast a client may send: a token bucket in a few bytes of the connection, without a timer.
//!
//! It is the generic cell rate algorithm. Every message moves a point in time on by what one may take at the rate; a
//! message is over the rate when that would bring the point further ahead of the clock than the burst allows. So
//! nothing has to be filled up while a client is silent.

use std::time::Duration;

/// A client that was silent may send this many seconds' worth at once.
const BURST_SECONDS: u64 = 10;

/// A client that goes on is let do so for as many refused messages as it may send in a second, at least so many:
/// a few are on their way already when the first refusal arrives.
const PATIENCE_MIN: u32 = 10;

/// As many as can be counted in the connection, less one.
const PATIENCE_MAX: u32 = u16::MAX as u32 - 1;

/// Highest rate: beyond it time between two messages is a matter of chance.
pub const RATE_MAX: u32 = 100_000;

/// The rate that holds for every connection of a node.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Nanoseconds for a message.
    each: u64,
    /// How far ahead of the clock a client may be, in nanoseconds.
    burst: u64,
    /// Refused messages before the connection is closed.
    patience: u16,
}

/// What becomes of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is taken.
    Taken,
    /// It is over the rate.
    Refused,
    /// It is one too many of those: the connection is to be closed.
    TooMany,
}

impl Pace {
    /// `rate` messages a second, at most [`RATE_MAX`]; `None` for 0: as many as they like.
    pub fn new(rate: u32) -> Option<Pace> {
        let each = 1_000_000_000u64.checked_div(u64::from(rate))?;
        let patience = rate.clamp(PATIENCE_MIN, PATIENCE_MAX) as u16;
        Some(Pace { each, burst: each * u64::from(rate) * BURST_SECONDS, patience })
    }

    /// Judges a message that comes at `now`, on a clock that begins with the shard. The connection keeps two numbers:
    /// until when its messages are paid for, in nanoseconds of that clock, and how many were refused, less those
    /// taken since. (They are no struct, which would have gaps.)
    pub fn judge(&self, paid_until: &mut u64, refused: &mut u16, now: Duration) -> Verdict {
        let now = now.as_nanos() as u64; // enough for five hundred years
        let until = (*paid_until).max(now) + self.each;
        if until - now <= self.burst {
            *paid_until = until;
            *refused = refused.saturating_sub(1);
            return Verdict::Taken;
        }
        *refused = refused.saturating_add(1);
        if *refused > self.patience { Verdict::TooMany } else { Verdict::Refused }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECOND: Duration = Duration::from_secs(1);

    type Used = (u64, u16);

    /// How many of these messages get which verdict.
    fn judge_many(pace: &Pace, used: &mut Used, now: Duration, messages: u32) -> [u32; 3] {
        let mut verdicts = [0; 3];
        (0..messages).for_each(|_| verdicts[pace.judge(&mut used.0, &mut used.1, now) as usize] += 1);
        verdicts
    }

    #[test]
    fn ten_seconds_worth_may_come_at_once_and_a_second_worth_is_refused_before_the_end() {
        let pace = Pace::new(100).unwrap();
        let mut used = Used::default();
        assert_eq!(judge_many(&pace, &mut used, SECOND, 1000), [1000, 0, 0]);
        assert_eq!(judge_many(&pace, &mut used, SECOND, 101), [0, 100, 1]);
    }

    #[test]
    fn whoever_waits_may_send_again() {
        let pace = Pace::new(100).unwrap();
        let mut used = Used::default();
        assert_eq!(judge_many(&pace, &mut used, SECOND, 1050), [1000, 50, 0]);
        assert_eq!(judge_many(&pace, &mut used, SECOND * 2, 100), [100, 0, 0]);
        // What was refused before is forgotten by what was taken since.
        assert_eq!(judge_many(&pace, &mut used, SECOND * 2, 101), [0, 100, 1]);
        let day = SECOND * 86_400;
        assert_eq!(judge_many(&pace, &mut used, day, 1001), [1000, 1, 0]);
    }

    #[test]
    fn a_slow_rate_lets_a_few_refused_ones_pass() {
        let pace = Pace::new(1).unwrap();
        assert_eq!(judge_many(&pace, &mut Used::default(), SECOND, 30), [10, 10, 10]);
    }

    #[test]
    fn no_rate_means_none() {
        assert!(Pace::new(0).is_none());
    }

    proptest! {
        /// Whatever a client does, it gets no more than burst and rate; and within the rate all it sends.
        #[test]
        fn what_is_taken_is_bounded(
            rate in 1..=RATE_MAX,
            steps in prop::collection::vec((0..3_000u64, 1..500u32), 1..20),
        ) {
            let pace = Pace::new(rate).unwrap();
            let (mut hasty, mut steady) = (Used::default(), Used::default());
            let (mut now, mut taken) = (0, 0);
            for (millis, messages) in steps {
                now += millis;
                let at = Duration::from_millis(now);
                taken += u64::from(judge_many(&pace, &mut hasty, at, messages)[0]);
                prop_assert!(taken <= u64::from(rate) * (now + 10_000) / 1000 + 1, "{taken} in {now} ms");
                let earned = (u64::from(rate) * millis / 1000).min(500) as u32;
                prop_assert_eq!(judge_many(&pace, &mut steady, at, earned), [earned, 0, 0]);
            }
        }
    }
}
