use proptest::prelude::*;

use super::*;
use crate::config::{Action, MESSAGE_RATE_MAX};

/// TAT and rejections of a connection.
type Used = (u64, u16);

fn limiter(flags: &[&str]) -> RateLimiter {
    match Settings::from(flags.iter().map(std::ffi::OsString::from), []) {
        Ok(Action::Run(settings)) => RateLimiter::new(&settings).unwrap(),
        other => panic!("{other:?}"),
    }
}

fn of_rate(rate: u32) -> RateLimiter {
    limiter(&["--max-message-rate", &rate.to_string()])
}

/// How many of these messages, of a few bytes each, are accepted, rejected, and close the
/// connection.
fn check_many(
    limiter: &RateLimiter,
    used: &mut Used,
    client: Option<&Allowance>,
    now: u64,
    messages: u32,
) -> [u32; 3] {
    let mut decisions = [0; 3];
    for _ in 0..messages {
        let decision = limiter.check(&mut used.0, &mut used.1, client, limiter.cost(1, 1), now);
        decisions[match decision {
            Decision::Accept => 0,
            Decision::Reject(_) => 1,
            Decision::Close(_) => 2,
        }] += 1;
    }
    decisions
}

#[test]
fn accepts_ten_seconds_worth_and_tolerates_one() {
    let limiter = of_rate(100);
    let mut used = Used::default();
    assert_eq!(check_many(&limiter, &mut used, None, SECOND, 1000), [1000, 0, 0]);
    assert_eq!(check_many(&limiter, &mut used, None, SECOND, 101), [0, 100, 1]);
}

#[test]
fn a_client_that_waits_may_send_again() {
    let limiter = of_rate(100);
    let mut used = Used::default();
    assert_eq!(check_many(&limiter, &mut used, None, SECOND, 1050), [1000, 50, 0]);
    assert_eq!(check_many(&limiter, &mut used, None, SECOND * 2, 100), [100, 0, 0]);
    // Rejections from before are forgiven by messages accepted since.
    assert_eq!(check_many(&limiter, &mut used, None, SECOND * 2, 101), [0, 100, 1]);
    let day = SECOND * 86_400;
    assert_eq!(check_many(&limiter, &mut used, None, day, 1001), [1000, 1, 0]);
}

#[test]
fn a_slow_rate_tolerates_ten_rejections() {
    let limiter = of_rate(1);
    assert_eq!(check_many(&limiter, &mut Used::default(), None, SECOND, 30), [10, 10, 10]);
    let client = Allowance::new(limiter.first_tat(SECOND));
    assert_eq!(check_many(&limiter, &mut Used::default(), Some(&client), SECOND, 30)[0], 10);
}

#[test]
fn no_rates_mean_no_limiter() {
    let flags = ["--max-message-rate", "0", "--max-byte-rate", "0"].map(std::ffi::OsString::from);
    match Settings::from(flags, []) {
        Ok(Action::Run(settings)) => assert!(RateLimiter::new(&settings).is_none()),
        other => panic!("{other:?}"),
    }
}

#[test]
fn connections_of_a_client_share_its_allowance() {
    let tokens = limiter(&["--max-message-rate", "100", "--jwt-key", "/some/file"]);
    let addresses = limiter(&["--max-message-rate", "100"]);
    for (limiter, times) in [(tokens, 1), (addresses, 10)] {
        let client = Allowance::new(limiter.first_tat(SECOND));
        let accepted = |now, connections| {
            let each = |_| check_many(&limiter, &mut Used::default(), Some(&client), now, 2000)[0];
            (0..connections).map(each).sum::<u32>()
        };
        assert_eq!(accepted(SECOND, 30), 100, "a tenth of the burst for a new client");
        assert_eq!(accepted(SECOND, 30), 0);
        assert_eq!(accepted(SECOND * 3 / 2, 30), 50 * times);
        // A new connection gets no new tolerance.
        let decisions = check_many(&limiter, &mut Used::default(), Some(&client), SECOND, 1);
        assert_eq!(decisions, [0, 0, 1]);
        assert_eq!(accepted(SECOND * 100, 30), 1000, "the whole burst after a pause");
    }
}

#[test]
fn bytes_and_fragments_cost_at_the_byte_rate() {
    let limiter = limiter(&["--max-message-rate", "100", "--max-byte-rate", "1MiB"]);
    let each = SECOND / 100;
    assert_eq!(limiter.cost(0, 1), each);
    assert_eq!(limiter.cost(10_000, 1), each, "a message of 10 KB costs no more than an empty one");
    assert_eq!(limiter.cost(1 << 20, 1), SECOND);
    assert_eq!(limiter.cost(0, 1 + (1 << 20) / FRAGMENT_BYTES as u32), SECOND);
    // At every allowed byte rate the most expensive message fits into the burst, also of a new
    // client.
    for max_message_size in [1, 1 << 10, 64 << 10, 1 << 20, 16 << 20_usize] {
        let byte_rate = BYTE_RATE_MIN.max((max_message_size as u64).div_ceil(MESSAGE_PART)).to_string();
        let message = max_message_size.to_string();
        let flags = ["--max-message-size", &message, "--max-byte-rate", &byte_rate];
        let limiter = tests::limiter(&flags);
        let frames = (FRAGMENTS_MAX + max_message_size / FRAGMENT_BYTES) as u32;
        let cost = limiter.cost(max_message_size, frames);
        let client = Allowance::new(limiter.first_tat(SECOND));
        let (mut tat, mut rejected) = Used::default();
        let decision = limiter.check(&mut tat, &mut rejected, Some(&client), cost, SECOND);
        assert_eq!(decision, Decision::Accept, "{flags:?}");
    }
}

#[test]
fn new_channels_are_limited_like_connections_and_what_they_follow() {
    let (user, address) = (AllowanceOwner::User, AllowanceOwner::Address);
    for (owner, connections, each, most) in [
        (user, 1, 101, 202),
        (user, PER_USER, 1, PER_USER),
        (user, 500, 101, 500),
        (address, PER_ADDRESS, 1, PER_ADDRESS),
        (address, PER_ADDRESS, 101, 2020),
    ] {
        let client = Allowance::new(0);
        assert_eq!(channels_a_minute(owner, connections, each), most);
        let named = |now| (0..4000).filter(|_| client.take_channel(most, now)).count() as u32;
        assert_eq!(named(SECOND), most);
        assert_eq!(named(SECOND + 61 * SECOND / u64::from(most)), 1);
        assert_eq!(named(1000 * SECOND), most);
    }
}

proptest! {
    /// Whatever a client does, it gets no more than burst and rate; and within the rate all it
    /// sends.
    #[test]
    fn accepted_messages_are_bounded(
        rate in 1..=MESSAGE_RATE_MAX,
        steps in prop::collection::vec((0..3_000u64, 1..500u32), 1..20),
    ) {
        let limiter = limiter(&["--max-message-rate", &rate.to_string(), "--max-byte-rate", "0"]);
        let (mut hasty, mut steady) = (Used::default(), Used::default());
        let (mut now, mut accepted) = (0, 0);
        for (millis, messages) in steps {
            now += millis;
            let at = now * 1_000_000;
            accepted += u64::from(check_many(&limiter, &mut hasty, None, at, messages)[0]);
            prop_assert!(accepted <= u64::from(rate) * (now + 10_000) / 1000 + 1, "{accepted} in {now} ms");
            let earned = (u64::from(rate) * millis / 1000).min(500) as u32;
            prop_assert_eq!(check_many(&limiter, &mut steady, None, at, earned), [earned, 0, 0]);
        }
    }
}

#[test]
fn history_has_a_burst_and_a_rate() {
    const PART: usize = 256 << 10;
    let client = Allowance::new(0);
    let read = |now| (0..10_000).filter(|_| client.take_history(PART, now)).count();
    assert_eq!(read(SECOND), (64 << 20) / PART);
    assert!(!client.is_full(SECOND));
    assert_eq!(read(2 * SECOND), (32 << 20) / PART);
    assert!(client.is_full(5 * SECOND));
}
