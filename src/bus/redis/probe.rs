//! The probe: every second this node sends itself a message through Redis, with the positions of
//! the followed channels. It shows whether commands and Pub/Sub work, and finds events that Pub/Sub
//! has lost.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::commands::Script;
use super::errors::{CLUSTER_DOWN, CallError, ELSEWHERE};
use super::primaries::SessionId;
use super::status::Status;
use super::{Bus, Outcome, advice, decode, scripts};
use crate::protocol::event::ChannelName;

/// Time between two probes.
const PROBE_INTERVAL: Duration = Duration::from_secs(1);

/// Channels that one probe compares: about 5 ms of Redis' time.
const PROBE_CHANNELS: usize = 1000;

/// Without a probe for this long, the node is not ready.
const PROBE_LATE: Duration = Duration::from_secs(2);

/// Without a probe for this long, the node reconnects.
const PROBE_LOST: Duration = Duration::from_secs(4);

/// Probes remembered to measure their round trip.
const IN_FLIGHT_MAX: usize = 32;

const _: () = assert!(PROBE_INTERVAL.as_millis() < PROBE_LATE.as_millis());
const _: () = assert!(PROBE_LATE.as_millis() < PROBE_LOST.as_millis());

/// The probes in flight, and the channels that the next ones compare.
#[derive(Debug, Default)]
pub(super) struct Probes {
    last_number: u64,
    /// Number and time of sending, oldest first.
    in_flight: VecDeque<(u64, Instant)>,
    /// When to send the next one; `None` before the first subscriptions are confirmed.
    next: Option<Instant>,
    /// When Redis last showed that it works.
    last_reply: Option<Instant>,
    /// Channels in the order in which probes compare them.
    rotation: VecDeque<ChannelName>,
}

impl Probes {
    pub(super) fn start_session(&mut self) {
        self.last_reply = Some(Instant::now());
    }

    pub(super) fn end_session(&mut self) {
        self.in_flight.clear();
    }

    /// Adds a channel, which is not in the rotation yet.
    pub(super) fn add(&mut self, channel: ChannelName) {
        self.rotation.push_back(channel);
    }

    /// Frees memory that the rotation took while thousands of channels were in it.
    pub(super) fn shrink(&mut self) {
        self.rotation.shrink_to(2 * self.rotation.len());
    }

    /// Removes channels for which `stays` is false.
    pub(super) fn retain(&mut self, stays: impl FnMut(&ChannelName) -> bool) {
        self.rotation.retain(stays);
    }

    /// The number of probes that compare all channels once.
    fn per_rotation(&self) -> usize {
        self.rotation.len().div_ceil(PROBE_CHANNELS).max(1)
    }

    /// Sends the next probe with the next tick, since events may be missing.
    pub(super) fn send_soon(&mut self) {
        self.next = self.next.map(|_| Instant::now());
    }

    fn start(&mut self) -> u64 {
        self.last_number += 1;
        self.in_flight.push_back((self.last_number, Instant::now()));
        if self.in_flight.len() > IN_FLIGHT_MAX {
            self.in_flight.pop_front();
        }
        self.last_number
    }

    /// Probe `number` came back. Returns its round trip if it was in flight.
    fn finish(&mut self, number: u64, now: Instant) -> Option<Duration> {
        let at = self.in_flight.iter().position(|(sent, _)| *sent == number)?;
        let round_trip = now.saturating_duration_since(self.in_flight[at].1);
        self.in_flight.drain(..=at);
        self.last_reply = Some(now);
        Some(round_trip)
    }

    fn silence(&self, now: Instant) -> Duration {
        self.last_reply.map_or(Duration::ZERO, |reply| now.saturating_duration_since(reply))
    }
}

impl Bus {
    /// Sends a probe if one is due. Reconnects if none has come back for too long.
    pub(super) fn check_probes(&mut self, primary: usize, now: Instant) {
        let silence = self.primaries[primary].probes.silence(now);
        if silence > PROBE_LOST {
            return self.close_session(primary, &format!("no reply for {} s", silence.as_secs()));
        } else if silence > PROBE_LATE {
            self.set_status(primary, Status::Unreachable(advice::SILENT), Some("no probe came back"));
        }
        let is_control = self.control_primary() == primary;
        let at = &mut self.primaries[primary];
        if !at.link.is_subscribed() {
            return;
        }
        match at.probes.next {
            Some(next) if next <= now => {
                at.probes.next = Some(now + PROBE_INTERVAL);
                self.send_probe(primary);
            }
            // The control channel was here, and has moved before its position was read.
            None if !is_control => self.probe_all(primary),
            _ => {}
        }
    }

    /// Compares all followed channels at once: a new session may have missed events of each.
    pub(super) fn probe_all(&mut self, primary: usize) {
        for _ in 0..self.primaries[primary].probes.per_rotation() {
            self.send_probe(primary);
        }
        self.primaries[primary].probes.next = Some(Instant::now() + PROBE_INTERVAL);
    }

    fn send_probe(&mut self, primary: usize) {
        let session = self.primaries.session_id(primary);
        let at = &mut self.primaries[primary];
        let Some(open) = at.link.session() else { return };
        let (commands, outcomes) = (open.commands(), self.handles.outcomes.clone());
        let mut args = scripts::probe_args(&self.handles.settings, at.probes.start());
        for _ in 0..at.probes.rotation.len().min(PROBE_CHANNELS) {
            let Some(name) = at.probes.rotation.pop_front() else { break };
            let Some(channel) = self.channels.get_mut(&name) else { continue };
            let Some(followed) = &channel.followed else {
                channel.in_rotation = false;
                continue;
            };
            if followed.sequence.is_some() {
                scripts::add_probe_channel(&mut args, &name, channel.known);
            }
            at.probes.rotation.push_back(name);
        }
        let rounds = self.primaries.iter().map(|(_, primary)| primary.probes.per_rotation()).max();
        let interval = rounds.unwrap_or(1) as u64 * PROBE_INTERVAL.as_secs();
        self.handles.metrics.probe_interval_seconds.set(interval);
        let topic = self.handles.settings.probe_topic(session.generation);
        tokio::spawn(async move {
            let result = commands.run(Script::Probe, &topic, args).await.map(|_| ());
            let _ = outcomes.send(Outcome::ProbeSent(session, result));
        });
    }

    pub(super) fn on_probe_sent(&mut self, session: SessionId, result: Result<(), CallError>) {
        let Err(error) = result else { return };
        if let CallError::ErrorReply(text) = &error {
            self.on_probe_rejected(session.primary, text);
        }
        self.on_call_error(session, &error);
    }

    /// Redis rejects a probe, or a call that the first one waits for.
    pub(super) fn on_probe_rejected(&mut self, primary: usize, error: &str) {
        // The connection works, so a new one would not help.
        self.primaries[primary].probes.last_reply = Some(Instant::now());
        self.set_status(primary, Status::rejecting(error), Some(error));
    }

    /// Reads a probe of this node: its number, then a line for each channel.
    pub(super) fn on_probe(&mut self, primary: usize, text: &[u8]) {
        let now = Instant::now();
        let text = String::from_utf8_lossy(text);
        let mut lines = text.lines();
        let Some(number) = lines.next().and_then(|line| line.parse::<u64>().ok()) else { return };
        let at = &mut self.primaries[primary];
        let Some(round_trip) = at.probes.finish(number, now) else { return };
        self.handles.metrics.round_trips.observe(round_trip);
        at.link.reset_backoff();
        let mut status = Status::Working;
        for (name, position) in lines.filter_map(decode::probe_line) {
            let (base, head) = match position {
                Ok(position) => position,
                Err(CLUSTER_DOWN) => {
                    status = Status::Unreachable(advice::CLUSTER_DOWN);
                    continue;
                }
                Err(ELSEWHERE) => {
                    self.look_for_slots();
                    continue;
                }
                Err(fault) => {
                    self.faults.log(fault);
                    continue;
                }
            };
            let Some((name, _)) = self.channels.get_key_value(name) else { continue };
            let name = name.clone();
            let Some(channel) = self.channels.get_mut(&name) else { continue };
            channel.known.update(base, head);
            if let Some(sequence) = channel.followed.as_mut().and_then(|followed| followed.sequence.as_mut())
            {
                sequence.on_probe(base, head);
            }
            self.deliver(&name, Vec::new());
        }
        self.set_status(primary, status, None);
        self.check_functions(primary, now);
    }
}
