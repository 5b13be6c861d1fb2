//! Rate limit of what clients send: the generic cell rate algorithm (GCRA), which needs no timer.
//!
//! A message costs as much time as it takes at the allowed rates. Each accepted message moves a
//! point in time, the theoretical arrival time (TAT), forward by its cost. A message is over the
//! rate if that would put the TAT further ahead of the clock than the burst. So nothing has to be
//! refilled while a client is silent.
//!
//! Every connection has a TAT of its own. All connections of a client share an [`Allowance`], so
//! that reconnecting gains nothing.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU32, AtomicU64};

use crate::config::{BYTE_RATE_MIN, MESSAGE_PART, Settings, show_size};
use crate::limits::connections::{PER_ADDRESS, PER_USER};

/// A client that was silent may send this many seconds' worth at once.
const BURST_SECONDS: u64 = 10;

/// A new client may send a tenth of the burst at once: many addresses are easy to get.
const NEW_PART: u64 = 10;

/// Messages that every client may send at once, however low the rate.
const BURST_MIN: u64 = 10;

/// Rejected messages tolerated before the connection is closed: one second's worth, but at least
/// ten, since a client may have sent a few more before the first rejection arrives.
const TOLERATED_MIN: u32 = 10;

/// Most that can be tolerated: one less than a connection can count.
const TOLERATED_MAX: u32 = u16::MAX as u32 - 1;

/// Most frames of one message, and one more for every [`FRAGMENT_BYTES`] of `--max-message-size`.
/// No honest client needs more.
pub const FRAGMENTS_MAX: usize = 1024;

/// Bytes that each further frame of a message counts at the byte rate beside its payload, since
/// tiny fragments are work.
pub const FRAGMENT_BYTES: usize = 64;

// The longest message in the most fragments fits into the burst at the lowest byte rate.
const _: () =
    assert!(2 * MESSAGE_PART + (FRAGMENT_BYTES * FRAGMENTS_MAX) as u64 / BYTE_RATE_MIN < BURST_SECONDS);

/// An address has this many times the allowance of a user, since an office or a mobile network has
/// many users behind one address. The caps on connections are in the same proportion.
const USERS_PER_ADDRESS: u32 = 10;
const _: () = assert!(PER_USER * USERS_PER_ADDRESS <= PER_ADDRESS);

/// The time of [`channels_a_minute`], in nanoseconds.
const NAMING_TIME: u64 = 60 * SECOND;

/// New channels that a client may name in a minute: as many as it may have connections, since each
/// may reconnect to another channel, and at least all that two of a user's connections may follow.
/// Redis keeps an unused channel for ten minutes, so one client has at most eleven times as many
/// there.
pub fn channels_a_minute(owner: AllowanceOwner, connections: u32, channels_per_connection: u32) -> u32 {
    connections.max(channels_per_connection.saturating_mul(2 * owner.share()))
}

/// Bytes of history that may be read for one client in a second. Without this limit one address
/// with 100 connections, each closed and opened again, had 134 MB read from Redis in a second, and
/// a client beside it waited 20 s instead of 1.5.
const HISTORY_RATE: u64 = 32 << 20;

/// How far the TAT of history may be ahead of the clock, in nanoseconds: a thousand clients behind
/// one address may reconnect at once and read 64 KiB each.
const HISTORY_BURST: u64 = 2 * SECOND;

/// Least cost of work of one message, in nanoseconds: it takes time even where the number of
/// messages is not limited.
const WORK_MIN: u64 = SECOND / 1000;

const SECOND: u64 = 1_000_000_000;

/// Whose connections share an allowance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AllowanceOwner {
    /// The connections of a user, where tokens prove the user id.
    User,
    /// The connections of an address otherwise, since a client may use any user id.
    Address,
}

impl AllowanceOwner {
    /// Whose connections share an allowance on a node with these settings.
    pub fn of(settings: &Settings) -> AllowanceOwner {
        if settings.jwt_key.is_empty() { AllowanceOwner::Address } else { AllowanceOwner::User }
    }

    /// The allowance of the client, as a multiple of that of one connection.
    fn share(self) -> u32 {
        match self {
            AllowanceOwner::User => 1,
            AllowanceOwner::Address => USERS_PER_ADDRESS,
        }
    }
}

/// What one client may still send, join and read.
#[derive(Debug)]
pub struct Allowance {
    /// TAT of its messages.
    messages: AtomicU64,
    /// TAT of its new channels.
    channels: AtomicU64,
    /// TAT of the history read for it.
    history: AtomicU64,
    /// Messages rejected by its rate, less those accepted since.
    rejected: AtomicU32,
    /// Channels that count for it.
    held: AtomicU32,
}

/// A channel that counts for a client as long as this exists.
#[derive(Debug)]
pub struct Held(Arc<Allowance>);

impl Held {
    pub fn new(client: Arc<Allowance>) -> Held {
        client.held.fetch_add(1, Relaxed);
        Held(client)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.held.fetch_sub(1, Relaxed);
    }
}

impl Allowance {
    /// For a new client, with this TAT of its messages.
    pub fn new(tat: u64) -> Allowance {
        let (channels, history) = (AtomicU64::new(0), AtomicU64::new(0));
        let (rejected, held) = (AtomicU32::new(0), AtomicU32::new(0));
        Allowance { messages: AtomicU64::new(tat), channels, history, rejected, held }
    }

    /// Counts a new channel of a client that may name this many in a minute, all at once if it
    /// likes. `false` if it has named too many.
    pub fn take_channel(&self, most: u32, now: u64) -> bool {
        take(&self.channels, NAMING_TIME / u64::from(most), NAMING_TIME, now)
    }

    /// Channels that count for it: see [`Held`].
    pub fn held(&self) -> u32 {
        self.held.load(Relaxed)
    }

    /// Counts bytes of history before they are read. `false` if the client has to wait.
    pub fn take_history(&self, bytes: usize, now: u64) -> bool {
        take(&self.history, (bytes as u64).saturating_mul(SECOND) / HISTORY_RATE, HISTORY_BURST, now)
    }

    /// Whether none of it is used up.
    pub fn is_full(&self, now: u64) -> bool {
        [&self.messages, &self.channels, &self.history].iter().all(|tat| tat.load(Relaxed) <= now)
    }

    /// Subtracts one rejection for an accepted message. Usually there is none, and nothing is
    /// written.
    fn forgive(&self) {
        if self.rejected.load(Relaxed) > 0 {
            let _ = self.rejected.fetch_update(Relaxed, Relaxed, |count| count.checked_sub(1));
        }
    }
}

/// The rates of a node.
#[derive(Clone, Debug)]
pub struct RateLimiter {
    /// Least cost of a message, in nanoseconds. 0 if the number of messages is not limited.
    each: u64,
    /// Bytes a second. 0 if they are not limited.
    byte_rate: u64,
    /// How far the TAT of a connection may be ahead of the clock, in nanoseconds.
    burst: u64,
    /// The same for a new client.
    burst_when_new: u64,
    /// Rejected messages before a connection is closed.
    tolerated: u16,
    /// Texts for messages over the rate of the connection, and over that of its client.
    texts: [Arc<str>; 2],
    /// The allowance of a client, as a multiple of that of a connection.
    share: u32,
}

/// The decision on a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    Accept,
    /// The message is over the rate. With the text for the client.
    Reject(Arc<str>),
    /// The message is over the rate, like too many before it: the connection is closed.
    Close(Arc<str>),
}

impl RateLimiter {
    /// `None` if the settings have no limit.
    pub fn new(settings: &Settings) -> Option<RateLimiter> {
        let (rate, byte_rate) = (u64::from(settings.max_message_rate), settings.byte_rate());
        if rate == 0 && byte_rate == 0 {
            return None;
        }
        let each = SECOND.checked_div(rate).unwrap_or(0);
        let burst = BURST_SECONDS * SECOND;
        let owner = AllowanceOwner::of(settings);
        let share = owner.share();
        let whose = match owner {
            AllowanceOwner::User => " for all connections of a user",
            AllowanceOwner::Address => " for all connections of an address",
        };
        let text = |times: u64, whose: &str| {
            let count = rate * times;
            let messages =
                (count > 0).then(|| format!("{count} message{}", if count == 1 { "" } else { "s" }));
            let bytes = (byte_rate > 0).then(|| show_size(byte_rate.saturating_mul(times)));
            let rates = messages.into_iter().chain(bytes).collect::<Vec<_>>().join(" or ");
            Arc::from(format!("rate limit exceeded: {rates} a second{whose}"))
        };
        let mut limiter = RateLimiter {
            each,
            byte_rate,
            burst,
            burst_when_new: 0,
            tolerated: settings.max_message_rate.clamp(TOLERATED_MIN, TOLERATED_MAX) as u16,
            texts: [text(1, ""), text(share.into(), whose)],
            share,
        };
        let longest = limiter.cost(2 * settings.max_message_size, FRAGMENTS_MAX as u32);
        limiter.burst_when_new = (burst / NEW_PART).max(BURST_MIN * each).max(longest).min(burst);
        Some(limiter)
    }

    /// The cost of a message with this many bytes and frames, in nanoseconds.
    pub fn cost(&self, bytes: usize, frames: u32) -> u64 {
        let bytes = (bytes + FRAGMENT_BYTES * frames.saturating_sub(1) as usize) as u64;
        // One message has less than 2^33 bytes, so the product fits.
        (bytes * SECOND).checked_div(self.byte_rate).unwrap_or(0).max(self.each)
    }

    /// What a frame costs beside its bytes if it is as much work as this many messages and quarters
    /// of one. At most half of what a new client may send at once, however low the rate.
    pub fn cost_of_quarters(&self, quarters: usize) -> u64 {
        let each = self.each.max(WORK_MIN);
        (each.saturating_mul(quarters as u64) / 4).min(self.burst_when_new / 2)
    }

    /// The first TAT of a client that connects at `now`, in nanoseconds since the node started.
    pub fn first_tat(&self, now: u64) -> u64 {
        now + (self.burst - self.burst_when_new) / u64::from(self.share)
    }

    /// Checks a message that arrives at `now`. `tat` and `rejected` belong to the connection: its
    /// TAT, and its messages rejected by its own rate, less those accepted since.
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

/// The TAT after a message of this cost. `None` if that is over the rate.
fn advance(tat: u64, cost: u64, burst: u64, now: u64) -> Option<u64> {
    let next = tat.max(now).saturating_add(cost);
    (next - now <= burst).then_some(next)
}

fn take(tat: &AtomicU64, cost: u64, burst: u64, now: u64) -> bool {
    tat.fetch_update(Relaxed, Relaxed, |tat| advance(tat, cost, burst, now)).is_ok()
}

#[cfg(test)]
mod tests;
