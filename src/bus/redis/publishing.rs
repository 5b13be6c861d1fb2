//! What the bus does with events on their way to Redis.

use std::sync::Arc;
use std::time::Instant;

use fred::types::{Resp3Frame, Value};

use super::commands::{Script, is_passing};
use super::decode::FAULT;
use super::errors::CallError;
use super::publish_queue::Due;
use super::{Bus, Outcome, Purpose, advice, scripts};
use crate::bus::{Publish, PublishError};
use crate::protocol::event::{ChannelName, EventId};

/// Errors of Redis before it runs a script, and of a script before its first event: certainly nothing was published.
const REFUSALS: [&str; 8] =
    ["OOM", "READONLY", "NOPERM", "MISCONF", "NOREPLICAS", "NOAUTH", "WRONGPASS", FAULT];

/// Whether this error came before the script ran. One from inside names the script.
fn is_certain(error: &str) -> bool {
    REFUSALS.iter().any(|prefix| error.starts_with(prefix)) && !error.contains(" script: ")
}

impl Bus {
    pub(super) fn publish(&mut self, publish: Publish) {
        if self.waiting_bytes > self.terms.waiting_max {
            let full = PublishError::Refused("too many events wait for the bus".into());
            self.settle(vec![(publish.answer, Err(full))]);
            return;
        }
        let name = publish.channel.clone();
        let channel = self.channels.entry(name.clone()).or_default();
        let before = channel.publisher.bytes();
        channel.publisher.push(publish, Instant::now() + self.terms.publish_timeout);
        self.waiting_bytes += channel.publisher.bytes() - before;
        if self.busy.insert(name.clone()) || channel.publisher.is_ready() {
            self.touched.push(name);
        }
    }

    pub(super) fn pump_touched(&mut self) {
        for name in std::mem::take(&mut self.touched) {
            self.pump(&name);
        }
    }

    /// Calls Redis if the channel has something to say and nothing in flight.
    fn pump(&mut self, name: &ChannelName) {
        let Some(channel) = self.channels.get_mut(name) else { return };
        if channel.publisher.is_idle() {
            channel.used = Instant::now();
            self.busy.remove(name);
            return;
        }
        let Some(session) = self.link.session() else { return };
        if !channel.publisher.is_ready() {
            return;
        }
        if channel.known.base == EventId(0) {
            if !channel.learning {
                channel.learning = true;
                self.read(name, Purpose::Learn);
            }
            return;
        }
        let known = channel.known;
        let Some(batch) = channel.publisher.call(known.base, &mut self.call_number) else { return };
        // A retry shows the base of its first attempt, so that the script sees whether the run has changed since.
        let shown = scripts::Known { base: batch.base, ..known };
        let mut args = scripts::publish_args(&self.terms, name, shown, batch);
        for (item, to) in batch.items.iter().filter(|_| batch.withdrawn.is_none()) {
            args.push(Value::Bytes(item.clone()));
            args.push(Value::from(to.as_deref().unwrap_or_default()));
        }
        let (caller, outcomes, name) = (session.caller(), self.outcomes.clone(), name.clone());
        let (key, generation) = (self.terms.key(&name), self.link.generation());
        tokio::spawn(async move {
            let result = caller.call(Script::Publish, &[&key], args).await;
            let _ = outcomes.send(Outcome::Published(generation, name, result));
        });
    }

    pub(super) fn published(
        &mut self,
        generation: u64,
        name: &ChannelName,
        result: Result<Resp3Frame, CallError>,
    ) {
        let channel = self.channels.get_mut(name).expect("a channel with a call in flight is kept");
        let publisher = &mut channel.publisher;
        let before = publisher.bytes();
        let due = match &result {
            Ok(frame) => match scripts::taken(frame) {
                Some(taken) => {
                    channel.known.learn(taken.base, taken.head);
                    if taken.refused { publisher.withdrew() } else { publisher.taken(taken.first) }
                }
                None => publisher.taken(None),
            },
            Err(CallError::Refused(text)) if is_passing(text) => {
                publisher.lost(false);
                Vec::new()
            }
            // Redis closes the connection with this answer, which may get lost. Then the retry gets it.
            Err(CallError::Refused(text)) if text.starts_with("ERR Protocol error") => {
                publisher.withdraw(advice::refused(text).into())
            }
            Err(CallError::Refused(text)) if is_certain(text) => {
                publisher.refused(advice::refused(text).into())
            }
            Err(CallError::Refused(text)) => {
                tracing::error!(channel = %name, "publish failed inside Redis: {text}");
                publisher.taken(None)
            }
            Err(CallError::Lost(_)) => {
                publisher.lost(true);
                Vec::new()
            }
        };
        self.waiting_bytes -= before - channel.publisher.bytes();
        self.settle(due);
        match result {
            Ok(_) => self.touched.push(name.clone()),
            Err(error) => {
                self.judge(generation, &error);
                // What is tried again waits for the next tick or the next session.
                if !self.channels[name].publisher.is_ready() {
                    self.touched.push(name.clone());
                }
            }
        }
    }

    /// Refuses the events of a channel that were not sent yet.
    pub(super) fn refuse_unsent(&mut self, name: &ChannelName, why: &Arc<str>) {
        let Some(channel) = self.channels.get_mut(name) else { return };
        let before = channel.publisher.bytes();
        let due = channel.publisher.refuse_unsent(why);
        self.waiting_bytes -= before - channel.publisher.bytes();
        self.settle(due);
        self.touched.push(name.clone());
    }

    pub(super) fn expire(&mut self, name: &ChannelName, now: Instant) {
        let Some(channel) = self.channels.get_mut(name) else { return };
        let before = channel.publisher.bytes();
        let due = channel.publisher.expire(now);
        self.waiting_bytes -= before - channel.publisher.bytes();
        self.settle(due);
    }

    fn settle(&mut self, due: Vec<Due>) {
        for (answer, result) in due {
            match &result {
                Ok(_) => self.numbers.published.add(1),
                Err(PublishError::Refused(_)) => self.numbers.publish_rejected.add(1),
                Err(PublishError::Unknown) => self.numbers.publish_unknown.add(1),
            }
            self.shards.answer(answer, result);
        }
    }
}
