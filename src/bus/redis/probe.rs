//! The probe: every second this node sends itself a message through Redis, with the positions of
//! the followed channels. It shows whether commands and Pub/Sub work, and finds events that Pub/Sub
//! has lost.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::commands::Script;
use super::errors::CallError;
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
    pub(super) fn check_probes(&mut self, now: Instant) {
        let silence = self.probes.silence(now);
        if silence > PROBE_LOST {
            return self.close_session(&format!("no reply for {} s", silence.as_secs()));
        } else if silence > PROBE_LATE {
            self.set_status(Status::Unreachable(advice::SILENT), Some("no probe came back"));
        }
        if self.link.is_subscribed() && self.probes.next.is_some_and(|at| at <= now) {
            self.probes.next = Some(now + PROBE_INTERVAL);
            self.send_probe();
        }
    }

    /// Compares all followed channels at once: a new session may have missed events of each.
    pub(super) fn probe_all(&mut self) {
        for _ in 0..self.probes_per_rotation() {
            self.send_probe();
        }
        self.probes.next = Some(Instant::now() + PROBE_INTERVAL);
    }

    fn probes_per_rotation(&self) -> usize {
        (self.subscriptions.followed() + 1).div_ceil(PROBE_CHANNELS) // the control channel, too
    }

    fn send_probe(&mut self) {
        let Some(session) = self.link.session() else { return };
        let mut args = scripts::probe_args(&self.handles.settings, self.probes.start());
        for _ in 0..self.probes.rotation.len().min(PROBE_CHANNELS) {
            let Some(name) = self.probes.rotation.pop_front() else { break };
            let Some(channel) = self.channels.get_mut(&name) else { continue };
            let Some(followed) = &channel.followed else {
                channel.in_rotation = false;
                continue;
            };
            if followed.sequence.is_some() {
                scripts::add_probe_channel(&mut args, &name, channel.known);
            }
            self.probes.rotation.push_back(name);
        }
        let interval = self.probes_per_rotation() as u64 * PROBE_INTERVAL.as_secs();
        self.handles.metrics.probe_interval_seconds.set(interval);
        let (commands, outcomes) = (session.commands(), self.handles.outcomes.clone());
        let (topic, generation) = (self.handles.settings.probe_topic(), self.link.generation());
        tokio::spawn(async move {
            let result = commands.run(Script::Probe, &[&topic], args).await.map(|_| ());
            let _ = outcomes.send(Outcome::ProbeSent(generation, result));
        });
    }

    pub(super) fn on_probe_sent(&mut self, result: Result<(), CallError>) {
        let Err(error) = result else { return };
        if let CallError::ErrorReply(text) = &error {
            // The connection works, so a new one would not help.
            self.probes.last_reply = Some(Instant::now());
            self.set_status(Status::rejecting(text), Some(text));
        }
        self.on_call_error(self.link.generation(), &error);
    }

    /// Reads a probe of this node: its number, then a line for each channel.
    pub(super) fn on_probe(&mut self, text: &[u8]) {
        let now = Instant::now();
        let text = String::from_utf8_lossy(text);
        let mut lines = text.lines();
        let Some(number) = lines.next().and_then(|line| line.parse::<u64>().ok()) else { return };
        let Some(round_trip) = self.probes.finish(number, now) else { return };
        self.handles.metrics.round_trips.observe(round_trip);
        self.link.reset_backoff();
        self.set_status(Status::Working, None);
        self.check_functions(now);
        for (name, position) in lines.filter_map(decode::probe_line) {
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
            channel.known.update(base, head);
            if let Some(sequence) = channel.followed.as_mut().and_then(|followed| followed.sequence.as_mut())
            {
                sequence.on_probe(base, head);
            }
            self.deliver(&name, Vec::new());
        }
    }
}
