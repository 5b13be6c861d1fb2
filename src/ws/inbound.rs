//! What a client sends: incomplete messages, rates, and when it is not read from.

use std::sync::Arc;

use super::decoder::Partial;
use crate::limits::rate::{Allowance, Decision, RateLimiter};

/// A client with this many unanswered publishes is not read from. At half of them reading resumes.
pub const UNANSWERED_MAX: u32 = 256;

/// A client that leaves this many bytes of acks, pongs and errors unread is not read from. At half
/// of them reading resumes.
pub const QUEUE_MAX: usize = 64 * 1024;

/// The reading side of a connection.
#[derive(Debug, Default)]
pub struct Inbound {
    /// What is kept between two reads.
    pub partial: Option<Box<Partial>>,
    /// The allowance of the client. Looked up when it is first needed.
    pub(super) allowance: Option<Arc<Allowance>>,
    /// TAT of the messages, see [`crate::limits::rate`].
    tat: u64,
    /// Publishes without an answer.
    unanswered: u32,
    /// Messages rejected by the connection's own rate, less those accepted since.
    rejected: u16,
    is_paused: bool,
    /// The connection is on the shard's list of those with more to read.
    is_queued: bool,
}

impl Inbound {
    /// Checks the rate of a message. [`Inbound::allowance`] is looked up already.
    pub(super) fn check_rate(&mut self, limiter: &RateLimiter, cost: u64, now: u64) -> Decision {
        limiter.check(&mut self.tat, &mut self.rejected, self.allowance.as_deref(), cost, now)
    }

    pub fn count_publish(&mut self) {
        self.unanswered += 1;
    }

    pub fn count_answer(&mut self) {
        self.unanswered -= 1;
    }

    /// Whether the client is not read from.
    pub fn is_paused(&self) -> bool {
        self.is_paused
    }

    /// Pauses reading if too much is unanswered, or queued for the client. Returns whether reading
    /// is paused.
    pub fn pause_if_due(&mut self, queued_bytes: usize) -> bool {
        self.is_paused = queued_bytes > QUEUE_MAX || self.unanswered >= UNANSWERED_MAX;
        self.is_paused
    }

    /// Resumes reading once at most half of the limits is left. Returns whether reading was paused
    /// until now.
    pub fn resume_if_due(&mut self, queued_bytes: usize) -> bool {
        let is_due = queued_bytes <= QUEUE_MAX / 2 && self.unanswered <= UNANSWERED_MAX / 2;
        is_due && self.resume()
    }

    /// Resumes reading. Returns whether it was paused until now.
    pub fn resume(&mut self) -> bool {
        std::mem::take(&mut self.is_paused)
    }

    pub fn is_queued(&self) -> bool {
        self.is_queued
    }

    /// Notes that the connection is on the shard's list. Returns whether it was not before.
    pub fn enter_queue(&mut self) -> bool {
        !std::mem::replace(&mut self.is_queued, true)
    }

    pub fn leave_queue(&mut self) {
        self.is_queued = false;
    }

    /// Keeps bytes for the next read.
    pub fn keep(&mut self, unread: &[u8]) {
        if !unread.is_empty() {
            self.partial.get_or_insert_default().unread = unread.to_vec();
        }
    }

    /// Removes the bytes that were kept for this read.
    pub(super) fn take_unread(&mut self) -> Vec<u8> {
        self.partial.as_mut().map(|partial| std::mem::take(&mut partial.unread)).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reading_pauses_at_a_limit_and_resumes_at_half_of_it() {
        let mut inbound = Inbound::default();
        assert!(!inbound.pause_if_due(QUEUE_MAX) && inbound.pause_if_due(QUEUE_MAX + 1));
        assert!(!inbound.resume_if_due(QUEUE_MAX / 2 + 1) && inbound.is_paused());
        assert!(inbound.resume_if_due(QUEUE_MAX / 2) && !inbound.is_paused());
        assert!(!inbound.resume_if_due(0), "it is not paused any more");
        (0..UNANSWERED_MAX).for_each(|_| inbound.count_publish());
        assert!(inbound.pause_if_due(0));
        (0..UNANSWERED_MAX / 2 - 1).for_each(|_| inbound.count_answer());
        assert!(!inbound.resume_if_due(0));
        inbound.count_answer();
        assert!(inbound.resume_if_due(0));
    }
}
