//! Rate limit of what clients send: the generic cell rate algorithm (GCRA), which needs no timer.
//!
//! A message costs as much time as it takes at the allowed rates. Each accepted message moves a point in time, the
//! theoretical arrival time (TAT), on by its cost. A message is over the rate when that would bring the TAT further
//! ahead of the clock than the burst. So nothing has to be filled up while a client is silent.
//!
//! Every connection has a TAT of its own. All connections of a client share an [`Allowance`], so that reconnecting
//! gains nothing.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU32, AtomicU64};

use crate::config::{Settings, show_size};
use crate::guard::{PER_ADDRESS, PER_USER};

/// A client that was silent may send this many seconds' worth at once.
const BURST_SECONDS: u64 = 10;

/// A client that has just come may send one such part of the burst at once: addresses are easy to get in numbers.
const NEW_PART: u64 = 10;

/// Messages that every client may send at once, however low the rate.
const BURST_MIN: u64 = 10;

/// Rejected messages tolerated before the connection is closed: one second's worth, at least this many. A few are on
/// their way already when the first rejection arrives.
const TOLERATED_MIN: u32 = 10;

/// As many as can be counted in the connection, less one.
const TOLERATED_MAX: u32 = u16::MAX as u32 - 1;

/// Highest message rate: beyond it time between two messages is a matter of chance.
pub const RATE_MAX: u32 = 100_000;

/// Most frames of one message, and one more for every [`FRAGMENT_BYTES`] of `--max-message`: a client that sends its
/// message in more of them only wants to cost something.
pub const FRAGMENTS_MAX: usize = 1024;

/// Bytes that each further frame of a message costs at the byte rate beside its payload: tiny fragments are work, too.
pub const FRAGMENT_BYTES: usize = 64;

/// Byte rate a second where `--max-byte-rate` is `auto` and `--max-message` is not more: a hundred messages of 10 KiB,
/// so that an address fills no more than a tenth of a link of 1 Gbit/s to Redis.
pub const BYTE_RATE: u64 = 1 << 20;

/// Lowest byte rate a second; and it is at least `--max-message` divided by [`MESSAGE_PART`]. So the longest message in
/// the most fragments fits into the burst.
pub const BYTE_RATE_MIN: u64 = 64 * 1024;
/// See [`BYTE_RATE_MIN`].
pub const MESSAGE_PART: u64 = 4;
const _: () =
    assert!(2 * MESSAGE_PART + (FRAGMENT_BYTES * FRAGMENTS_MAX) as u64 / BYTE_RATE_MIN < BURST_SECONDS);

/// Times the allowance of a user that one address has: an office, or a mobile network, has many users behind one
/// address. The caps on connections are in the same proportion.
const USERS_PER_ADDRESS: u32 = 10;
const _: () = assert!(PER_USER * USERS_PER_ADDRESS <= PER_ADDRESS);

/// Time in which a client may name as many new channels as it may have connections, and all of them at once: each of
/// its connections can come back to a channel of its own. Redis remembers an unused channel for ten minutes, so there
/// are at most eleven times as many of one client.
const NAMING_TIME: u64 = 60 * SECOND;

const SECOND: u64 = 1_000_000_000;

/// Who shares an allowance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Client {
    /// A user: where tokens say who that is.
    User,
    /// An address: everywhere else, since anyone can take any name.
    Address,
}

impl Client {
    /// Who shares allowances on a node with these settings.
    pub fn of(settings: &Settings) -> Client {
        if settings.jwt_key.is_empty() { Client::Address } else { Client::User }
    }

    /// Times the allowance of a connection that it has.
    fn share(self) -> u32 {
        match self {
            Client::User => 1,
            Client::Address => USERS_PER_ADDRESS,
        }
    }
}

/// What one client may still do.
#[derive(Debug)]
pub struct Allowance {
    /// TAT of its messages.
    messages: AtomicU64,
    /// TAT of its new channels.
    channels: AtomicU64,
    /// Messages rejected by its rate, less those accepted since.
    rejected: AtomicU32,
}

impl Allowance {
    /// That of a client that has just come, with the TAT of its messages.
    pub fn new(tat: u64) -> Allowance {
        Allowance { messages: AtomicU64::new(tat), channels: AtomicU64::new(0), rejected: AtomicU32::new(0) }
    }

    /// Takes a new channel where so many connections are allowed; `false` when the client has named too many.
    pub fn take_channel(&self, connections: u32, now: u64) -> bool {
        let each = NAMING_TIME.checked_div(connections.into()).unwrap_or(0);
        take(&self.channels, each, NAMING_TIME, now)
    }

    /// Whether a new one would allow no more.
    pub fn is_full(&self, now: u64) -> bool {
        self.messages.load(Relaxed) <= now && self.channels.load(Relaxed) <= now
    }

    /// One rejection less, since a message was accepted. Nearly always there is none, and nothing is written.
    fn forgive(&self) {
        if self.rejected.load(Relaxed) > 0 {
            let _ = self.rejected.fetch_update(Relaxed, Relaxed, |count| count.checked_sub(1));
        }
    }
}

/// The rates of a node.
#[derive(Clone, Debug)]
pub struct RateLimiter {
    /// Nanoseconds that a message costs at least; 0: messages are not limited.
    each: u64,
    /// Bytes a second; 0: bytes are not limited.
    byte_rate: u64,
    /// How far the TAT of a connection may be ahead of the clock, in nanoseconds.
    burst: u64,
    /// The same for a client that has just come.
    burst_when_new: u64,
    /// Rejected messages before a connection is closed.
    tolerated: u16,
    /// What rejected messages get: for the rate of the connection, and for that of its client.
    texts: [Arc<str>; 2],
    /// A client has so many times the allowance of a connection.
    share: u32,
}

/// What becomes of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It is accepted.
    Accept,
    /// It is over the rate, as the text says.
    Reject(Arc<str>),
    /// It is over the rate, and too many were: the connection is closed.
    Close(Arc<str>),
}

impl RateLimiter {
    /// The rates of these settings; `None` where there is no limit.
    pub fn new(settings: &Settings) -> Option<RateLimiter> {
        let (rate, byte_rate) = (u64::from(settings.message_rate), settings.byte_rate());
        if rate == 0 && byte_rate == 0 {
            return None;
        }
        let each = SECOND.checked_div(rate).unwrap_or(0);
        let burst = BURST_SECONDS * SECOND;
        let client = Client::of(settings);
        let share = client.share();
        let whose = match client {
            Client::User => " for all connections of a user",
            Client::Address => " for all connections of an address",
        };
        let text = |times: u64, whose: &str| {
            let messages = (rate > 0).then(|| format!("{} messages", rate * times));
            let bytes = (byte_rate > 0).then(|| show_size(byte_rate.saturating_mul(times)));
            let rates = messages.into_iter().chain(bytes).collect::<Vec<_>>().join(" or ");
            Arc::from(format!("not taken: the rate is {rates} a second{whose}"))
        };
        let mut limiter = RateLimiter {
            each,
            byte_rate,
            burst,
            burst_when_new: 0,
            tolerated: settings.message_rate.clamp(TOLERATED_MIN, TOLERATED_MAX) as u16,
            texts: [text(1, ""), text(share.into(), whose)],
            share,
        };
        let longest = limiter.cost(2 * settings.max_message, FRAGMENTS_MAX as u32);
        limiter.burst_when_new = (burst / NEW_PART).max(BURST_MIN * each).max(longest).min(burst);
        Some(limiter)
    }

    /// What a message of so many bytes in so many frames costs, in nanoseconds.
    pub fn cost(&self, bytes: usize, frames: u32) -> u64 {
        let bytes = (bytes + FRAGMENT_BYTES * frames.saturating_sub(1) as usize) as u64;
        // Of one message, so the product fits.
        (bytes * SECOND).checked_div(self.byte_rate).unwrap_or(0).max(self.each)
    }

    /// The TAT of the messages of a client that comes at `now`, in nanoseconds since the node started.
    pub fn first_tat(&self, now: u64) -> u64 {
        now + (self.burst - self.burst_when_new) / u64::from(self.share)
    }

    /// Checks a message that comes at `now`. The connection keeps its TAT, and how many messages were rejected by its
    /// own rate, less those accepted since. (They are no struct, which would have gaps.)
    pub fn check(
        &self,
        tat: &mut u64,
        rejected: &mut u16,
        client: Option<&Allowance>,
        cost: u64,
        now: u64,
    ) -> Decision {
        let [own_text, client_text] = &self.texts;
        let Some(next) = advance(*tat, cost, self.burst, now) else {
            *rejected = rejected.saturating_add(1);
            return rejection(*rejected > self.tolerated, own_text);
        };
        if let Some(client) = client {
            let share = u64::from(self.share);
            if !take(&client.messages, cost / share, self.burst / share, now) {
                let rejected = client.rejected.fetch_add(1, Relaxed).saturating_add(1);
                return rejection(rejected > u32::from(self.tolerated) * self.share, client_text);
            }
            client.forgive();
        }
        *tat = next;
        *rejected = rejected.saturating_sub(1);
        Decision::Accept
    }
}

fn rejection(close: bool, text: &Arc<str>) -> Decision {
    if close { Decision::Close(text.clone()) } else { Decision::Reject(text.clone()) }
}

/// The TAT after something of this cost; `None` when it is over the rate.
fn advance(tat: u64, cost: u64, burst: u64, now: u64) -> Option<u64> {
    let next = tat.max(now).saturating_add(cost);
    (next - now <= burst).then_some(next)
}

fn take(tat: &AtomicU64, cost: u64, burst: u64, now: u64) -> bool {
    tat.fetch_update(Relaxed, Relaxed, |tat| advance(tat, cost, burst, now)).is_ok()
}

#[cfg(test)]
mod tests;
