//! Events on their way to Redis, over all channels.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Instant;

use fred::types::Resp3Frame;

use super::commands::Script;
use super::errors::{CallError, FAULT, is_temporary};
use super::primaries::{Primaries, SessionId};
use super::publish_queue::{Completed, PublishQueue};
use super::scripts::KnownPosition;
use super::subscriptions::ReadPurpose;
use super::{Bus, Channel, Outcome, advice, scripts};
use crate::bus::{Publish, PublishError};
use crate::metrics::WarningLimit;
use crate::protocol::event::{ChannelName, EventId};
use crate::protocol::inbox::PublishedId;

/// Errors that Redis replies with before it runs a script, or a script before its first event:
/// certainly nothing was published.
const CERTAIN_ERRORS: [&str; 8] =
    ["OOM", "READONLY", "NOPERM", "MISCONF", "NOREPLICAS", "NOAUTH", "WRONGPASS", FAULT];

/// Whether nothing was published. An error from inside a script names the script.
pub(super) fn is_certain(error: &str) -> bool {
    CERTAIN_ERRORS.iter().any(|prefix| error.starts_with(prefix)) && !error.contains(" script: ")
}

/// Completes a call that a script replied to. `None` if the reply can't be parsed.
fn on_reply(
    queue: &mut PublishQueue,
    known: &mut KnownPosition,
    frame: &Resp3Frame,
) -> Option<Vec<Completed>> {
    if queue.sends_messages() {
        let reply = scripts::parse_inbox(frame)?;
        known.update(reply.base, reply.head);
        return Some(match reply.ids {
            _ if reply.rejected => queue.on_withdrawn(),
            Some(ids) => queue.on_stored(&ids),
            None => queue.on_published(None),
        });
    }
    let reply = scripts::parse_publish(frame)?;
    known.update(reply.base, reply.head);
    Some(if reply.rejected { queue.on_withdrawn() } else { queue.on_published(reply.first) })
}

/// What concerns the queues of all channels.
#[derive(Debug, Default)]
pub(super) struct Publishing {
    /// Channels with events in their queue.
    busy: HashSet<ChannelName>,
    /// Channels to check in [`Bus::send_changed`].
    changed: Vec<ChannelName>,
    /// The last publish number of all channels. Numbers are not per channel, since those of a
    /// forgotten channel would start again at 1.
    last_number: u64,
    /// Warnings that Redis rejects events.
    warnings: WarningLimit,
}

impl Publishing {
    /// Logs why Redis rejects events. Damaged channels have a log of their own.
    fn warn_of_rejection(&mut self, error: &str) {
        if !error.starts_with(FAULT) && self.warnings.is_due(Instant::now()) {
            tracing::warn!(error, advice = advice::for_error_reply(error), "events rejected by redis");
        }
    }

    /// Notes that the channel may have a call to make.
    pub(super) fn mark_changed(&mut self, channel: ChannelName) {
        self.changed.push(channel);
    }

    /// Marks all busy channels.
    pub(super) fn retry_all(&mut self) {
        self.changed.extend(self.busy.iter().cloned());
    }
}

/// Changes a channel's queue and updates the sum of its primary.
fn update<T>(
    primaries: &mut Primaries,
    channel: &mut Channel,
    change: impl FnOnce(&mut PublishQueue) -> T,
) -> T {
    let before = channel.queue.bytes();
    let result = change(&mut channel.queue);
    let queued = &mut primaries[channel.primary].queued_bytes;
    *queued = *queued - before + channel.queue.bytes();
    result
}

impl Bus {
    pub(super) fn publish(&mut self, publish: Publish) {
        let name = publish.channel.clone();
        let primary =
            self.channels.get(&name).map_or_else(|| self.primaries.of(&name), |channel| channel.primary);
        // Each primary has its share, so that one that is away does not use up that of the others.
        let limit = self.handles.settings.queue_bytes_max / self.primaries.shares();
        if self.primaries[primary].queued_bytes > limit {
            let full = PublishError::Rejected("too many events wait for the bus".into());
            self.complete(vec![(publish.answer, Err(full))]);
            return;
        }
        if publish.sender.is_some() && !self.inboxes.admit(&name, Instant::now()) {
            self.complete(vec![(publish.answer, Err(PublishError::Full))]);
            return;
        }
        let deadline = Instant::now() + self.handles.settings.publish_timeout;
        let channel = self.channels.entry(name.clone()).or_insert_with(|| Box::new(Channel::at(primary)));
        update(&mut self.primaries, channel, |queue| queue.push(publish, deadline));
        if self.publishing.busy.insert(name.clone()) || channel.queue.is_ready() {
            self.publishing.mark_changed(name);
        }
    }

    /// Makes the next calls of the channels that changed in this turn.
    pub(super) fn send_changed(&mut self) {
        for name in std::mem::take(&mut self.publishing.changed) {
            self.send_next(&name);
        }
    }

    /// Calls Redis if the channel has events and no call in flight.
    fn send_next(&mut self, name: &ChannelName) {
        let Some(channel) = self.channels.get_mut(name) else { return };
        if channel.queue.is_idle() {
            channel.last_used = Instant::now();
            self.publishing.busy.remove(name);
            return;
        }
        let primary = channel.primary;
        let Some(session) = self.primaries[primary].link.session() else { return };
        if !channel.queue.is_ready() {
            return;
        }
        if channel.known.base == EventId(0) {
            if !channel.loading_base {
                channel.loading_base = true;
                self.read(name, ReadPurpose::LoadBase);
            }
            return;
        }
        let known = channel.known;
        let Some(batch) = channel.queue.call(known.base, &mut self.publishing.last_number) else { return };
        // A retry carries the base of its first attempt: the script then sees whether the epoch has
        // changed since.
        let carried = KnownPosition { base: batch.base, ..known };
        let settings = &self.handles.settings;
        let (script, mut args) = match batch.is_inbox() {
            true => (Script::Inbox, scripts::inbox_args(settings, name, carried, batch)),
            false => (Script::Publish, scripts::publish_args(settings, name, carried, batch)),
        };
        match script {
            _ if batch.withdrawn.is_some() => {}
            Script::Inbox => scripts::add_messages(&mut args, &batch.items),
            _ => scripts::add_events(&mut args, &batch.items),
        }
        let (commands, outcomes) = (session.commands(), self.handles.outcomes.clone());
        let (key, id, name) = (settings.channel_key(name), self.primaries.session_id(primary), name.clone());
        tokio::spawn(async move {
            let result = commands.run(script, &key, args).await;
            let _ = outcomes.send(Outcome::Published(id, name, result));
        });
    }

    pub(super) fn on_published(
        &mut self,
        session: SessionId,
        name: &ChannelName,
        result: Result<Resp3Frame, CallError>,
    ) {
        let channel = self.channels.get_mut(name).expect("a channel with a call in flight is kept");
        let mut known = channel.known;
        let mut rejection = None;
        let completed = update(&mut self.primaries, channel, |queue| match &result {
            Ok(frame) => on_reply(queue, &mut known, frame).unwrap_or_else(|| queue.on_published(None)),
            Err(CallError::ErrorReply(text)) if is_temporary(text) => {
                queue.retry(false);
                Vec::new()
            }
            // Redis closes the connection with this reply, which may get lost. Then the retry gets
            // it.
            Err(CallError::ErrorReply(text)) if text.starts_with("ERR Protocol error") => {
                queue.withdraw(advice::for_error_reply(text).into())
            }
            Err(CallError::ErrorReply(text)) if is_certain(text) => {
                rejection = Some(text.clone());
                queue.on_rejected(advice::for_error_reply(text).into())
            }
            Err(CallError::ErrorReply(text)) => {
                tracing::error!(channel = %name, error = &**text, "publish script failed");
                queue.on_published(None)
            }
            Err(CallError::NoReply(_) | CallError::NoReplyElsewhere(_)) => {
                queue.retry(true);
                Vec::new()
            }
        });
        channel.known = known;
        self.complete(completed);
        if let Some(error) = rejection {
            self.publishing.warn_of_rejection(&error);
        }
        match result {
            Ok(_) => self.publishing.mark_changed(name.clone()),
            Err(error) => {
                self.on_call_error(session, &error);
                // A call that must be repeated waits for the next tick or the next session.
                if !self.channels[name].queue.is_ready() {
                    self.publishing.mark_changed(name.clone());
                }
            }
        }
    }

    /// Rejects the events of a channel that were not sent yet.
    pub(super) fn reject_unsent(&mut self, name: &ChannelName, why: &Arc<str>) {
        let Some(channel) = self.channels.get_mut(name) else { return };
        let completed = update(&mut self.primaries, channel, |queue| queue.reject_unsent(why));
        self.complete(completed);
        self.publishing.mark_changed(name.clone());
    }

    /// Completes events whose deadline has passed, and retries calls.
    pub(super) fn expire_publishes(&mut self, now: Instant) {
        let busy: Vec<ChannelName> = self.publishing.busy.iter().cloned().collect();
        for name in busy {
            if let Some(channel) = self.channels.get_mut(&name) {
                let completed = update(&mut self.primaries, channel, |queue| queue.expire(now));
                self.complete(completed);
            }
            self.publishing.mark_changed(name);
        }
    }

    fn complete(&mut self, completed: Vec<Completed>) {
        let metrics = &self.handles.metrics;
        for (answer, result) in completed {
            match &result {
                Ok(PublishedId::Event(_)) => metrics.published.add(1),
                Ok(PublishedId::Message(_)) => metrics.inbox_stored.add(1),
                Err(PublishError::Rejected(_)) => metrics.publish_rejected.add(1),
                Err(PublishError::Full) => {} // counted by its error code
                Err(PublishError::Unknown) => metrics.publish_unknown.add(1),
            }
            self.handles.shards.answer(answer, result);
        }
    }
}
