//! Sessions, canaries and readiness: whether Redis works for this node, shown every second by a message that this
//! node sends itself through it.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::commands::Script;
use super::errors::CallError;
use super::status::Trouble;
use super::{Bus, Outcome, advice, decode, scripts};

/// Time between two canaries.
const CANARY_EVERY: Duration = Duration::from_secs(1);

/// Channels that one canary compares: about 5 ms of Redis' time.
const CANARY_CHANNELS: usize = 1000;

/// Without a canary for so long the node is not ready.
const CANARY_LATE: Duration = Duration::from_secs(2);

/// Without a canary for so long the connections are given up.
const CANARY_LOST: Duration = Duration::from_secs(4);

const _: () = assert!(CANARY_EVERY.as_millis() < CANARY_LATE.as_millis());
const _: () = assert!(CANARY_LATE.as_millis() < CANARY_LOST.as_millis());

/// The canaries under way.
#[derive(Debug, Default)]
pub(super) struct Canaries {
    pub(super) last: u64,
    pub(super) sent: VecDeque<(u64, Instant)>,
    pub(super) next: Option<Instant>,
    pub(super) heard: Option<Instant>,
}

/// Canaries remembered for measuring; an older one counts as lost.
const SENT_MAX: usize = 32;

impl Bus {
    /// Looks whether it is time to connect, to send a canary, to give up.
    pub(super) fn watch_link(&mut self, now: Instant) {
        if self.link.next_attempt.is_some_and(|at| at <= now) {
            self.connect();
        }
        if self.link.session.is_none() {
            return;
        }
        let silence =
            self.canaries.heard.map_or(Duration::ZERO, |heard| now.saturating_duration_since(heard));
        if silence > CANARY_LOST {
            self.session_over(&format!("no answer for {} s", silence.as_secs()));
        } else if silence > CANARY_LATE {
            self.set_trouble(Some(Trouble::Away(advice::SILENT)), "no canary came back");
        }
        if now >= self.link.next_lookup {
            self.look_up(now);
        }
        if self.link.pending.is_none() && self.canaries.next.is_some_and(|at| at <= now) {
            self.canaries.next = Some(now + CANARY_EVERY);
            self.send_canary();
        }
    }

    pub(super) fn subscribed(&mut self, ticket: u64) {
        if self.link.pending.is_some_and(|pending| pending <= ticket) {
            self.link.pending = None;
            self.sweep();
        }
        self.start_follows(ticket);
    }

    /// Compares every followed channel at once.
    fn sweep(&mut self) {
        for _ in 0..self.turns() {
            self.send_canary();
        }
        self.canaries.next = Some(Instant::now() + CANARY_EVERY);
    }

    /// Something was missed: the next tick compares positions.
    pub(super) fn canary_soon(&mut self) {
        self.canaries.next = self.canaries.next.map(|_| Instant::now());
    }

    fn turns(&self) -> usize {
        self.followed.div_ceil(CANARY_CHANNELS).max(1)
    }

    fn send_canary(&mut self) {
        let Some(session) = &self.link.session else { return };
        self.canaries.last += 1;
        let mut args = scripts::canary_args(&self.terms, self.canaries.last);
        for _ in 0..self.rounds.len().min(CANARY_CHANNELS) {
            let Some(name) = self.rounds.pop_front() else { break };
            let Some(channel) = self.channels.get_mut(&name) else { continue };
            let Some(follow) = &channel.follow else {
                channel.in_rounds = false;
                continue;
            };
            if follow.sequence.is_some() {
                scripts::canary_channel(&mut args, &name, channel.known);
            }
            self.rounds.push_back(name);
        }
        self.canaries.sent.push_back((self.canaries.last, Instant::now()));
        if self.canaries.sent.len() > SENT_MAX {
            self.canaries.sent.pop_front();
        }
        self.numbers.probe_interval_seconds.set(self.turns() as u64 * CANARY_EVERY.as_secs());
        let (caller, outcomes, generation) = (session.caller(), self.outcomes.clone(), self.link.generation);
        let key = self.terms.canary();
        tokio::spawn(async move {
            let result = caller.call(Script::Canary, &[&key], args).await.map(|_| ());
            let _ = outcomes.send(Outcome::CanarySent(generation, result));
        });
    }

    pub(super) fn canary_sent(&mut self, result: Result<(), CallError>) {
        let Err(error) = result else { return };
        if let CallError::Refused(text) = &error {
            // The way there and back works, so a new connection would not help.
            self.canaries.heard = Some(Instant::now());
            self.set_trouble(Some(Trouble::refuses(text)), text);
        }
        let generation = self.link.generation;
        self.judge(generation, &error);
    }

    pub(super) fn canary_heard(&mut self, text: &[u8]) {
        let now = Instant::now();
        let text = String::from_utf8_lossy(text);
        let mut lines = text.lines();
        let Some(number) = lines.next().and_then(|line| line.parse::<u64>().ok()) else { return };
        let Some(at) = self.canaries.sent.iter().position(|(sent, _)| *sent == number) else { return };
        let took = now.saturating_duration_since(self.canaries.sent[at].1);
        self.canaries.sent.drain(..=at);
        self.canaries.heard = Some(now);
        self.numbers.round_trips.observe(took);
        self.link.failures = 0;
        self.set_trouble(None, "");
        self.load_again(now);
        for (name, position) in lines.filter_map(decode::canary_line) {
            let (base, head) = match position {
                Ok(position) => position,
                Err(fault) => {
                    self.faults.log(fault);
                    continue;
                }
            };
            let Some((name, _)) = self.channels.get_key_value(name) else { continue };
            let name = name.clone();
            let Some(channel) = self.channels.get_mut(&name) else { continue };
            channel.known.learn(base, head);
            if let Some(sequence) = channel.follow.as_mut().and_then(|follow| follow.sequence.as_mut()) {
                sequence.canary(base, head);
            }
            self.hand_on(&name, Vec::new());
        }
    }
}
