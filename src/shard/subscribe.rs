//! Further channels of a connection: `subscribe` and `unsubscribe` frames.

use super::Shard;
use super::deferred::Pending;
use super::members::is_subscription;
use crate::limits::rate::Decision;
use crate::protocol::client_frame::Subscribe;
use crate::protocol::close::CloseReason;
use crate::protocol::event::ChannelName;
use crate::protocol::form::ChannelForm;
use crate::protocol::frame::{self, ErrorCode, Regarding};
use crate::ws::client::{LastSeen, NOT_TRACKED};
use crate::ws::outbox::SharedTails;
use crate::ws::subscription::{Joining, Subscription};

/// The client has named too many channels that this node does not follow.
pub(super) const TOO_MANY_CHANNELS: &str =
    "too many new channels in a minute: name a channel that has clients, or try later";

/// Too many channels count for the client.
pub(super) const HOLDS_TOO_MANY: &str =
    "your connections were the first in too many channels: unsubscribe from some";

/// The token does not allow the channel.
pub(super) const FORBIDDEN: &str = "you may not follow this channel";

/// A backend has disconnected the client from the channel before it followed it.
pub(super) const DISCONNECTED: &str = "disconnected from this channel by the application";

impl Shard {
    /// Follows channels for a client. Each is answered by itself.
    pub(super) fn on_subscribe(
        &mut self,
        slot: u32,
        channels: Vec<Subscribe>,
        reference: Option<Box<str>>,
    ) -> Result<(), CloseReason> {
        // Each channel is as much work as a quarter of a message, and a list of users as one message.
        let lists = channels.iter().filter(|subscribe| subscribe.presence).count();
        if !self.accepts_work(slot, channels.len() + 4 * lists, reference.as_deref())? {
            return Ok(());
        }
        for Subscribe { channel, last, history, presence } in channels {
            if let Err((code, text)) = self.check_subscribe(slot, &channel, presence) {
                let regarding = Regarding { channel: Some(channel), reference: reference.clone() };
                self.reject_frame(slot, code, &text, &regarding);
                continue;
            }
            let last_seen = last.map_or(LastSeen::Newcomer { history }, LastSeen::Event);
            let joining = Joining { channel, last_seen, presence, reference: reference.clone() };
            let number = self.connections.subscribe(slot, joining);
            let id = self.connections.id(number);
            self.join(number, Pending::Nothing);
            if self.connections.find(id).is_some_and(|number| self.connections.is_joining(number)) {
                self.deadlines.joins.push(id, self.tick, &self.connections);
            }
        }
        // One write for all channels that have started.
        self.write_later(slot);
        Ok(())
    }

    fn check_subscribe(
        &self,
        slot: u32,
        channel: &ChannelName,
        presence: bool,
    ) -> Result<(), (ErrorCode, String)> {
        let is_default = self.default_channel(slot) == Some(channel);
        if is_default || self.find_subscription(slot, channel).is_some() {
            return Err((ErrorCode::Subscribed, "you follow this channel already".into()));
        }
        let most = self.settings().max_subscriptions;
        if self.connections.set(slot).is_some_and(|set| set.subscriptions.len() >= most) {
            return Err((ErrorCode::TooMany, format!("a connection may have {most} subscriptions")));
        }
        if !self.may_use_others(slot, |grant| grant.may_join(channel)) {
            return Err((ErrorCode::Forbidden, FORBIDDEN.into()));
        }
        if presence && !self.settings().tracks_presence(channel) {
            return Err((ErrorCode::Invalid, NOT_TRACKED.into()));
        }
        if self.context.handshake.readiness.is_memory_short() {
            let text = "this node is short of memory: try again later".into();
            return Err((ErrorCode::Unavailable, text));
        }
        Ok(())
    }

    /// The subscription of a connection to this channel, which may wait for the bus.
    pub(super) fn find_subscription(&self, slot: u32, channel: &ChannelName) -> Option<u32> {
        let key = self.channels.key(&ChannelForm::named(channel.clone()));
        let is_it = |number: &&u32| match self.connections.awaited_channel(**number) {
            Some(awaited) => awaited == channel,
            None => Some(self.connections.membership(**number).channel) == key,
        };
        self.connections.set(slot)?.subscriptions.iter().find(is_it).copied()
    }

    /// Stops following a channel for a client.
    pub(super) fn on_unsubscribe(&mut self, slot: u32, channel: ChannelName, reference: Option<Box<str>>) {
        let error = if self.default_channel(slot) == Some(&channel) {
            (ErrorCode::Invalid, "the default channel can't be unsubscribed")
        } else if let Some(number) = self.find_subscription(slot, &channel) {
            self.end_subscription(number);
            let frame = frame::unsubscribed(&channel, "requested", reference.as_deref());
            return self.connections[slot].enqueue(frame);
        } else {
            (ErrorCode::NotSubscribed, "you do not follow this channel")
        };
        self.reject_frame(slot, error.0, error.1, &Regarding { channel: Some(channel), reference });
    }

    /// Removes a subscription. Of a partly written frame of its channel the rest stays queued.
    pub(super) fn end_subscription(&mut self, number: u32) -> Subscription {
        debug_assert!(is_subscription(number), "{number} is a connection");
        if !self.connections.is_joining(number) {
            let key = self.connections.membership(number).channel;
            self.remove_member(key, number);
            if self.connections.is_live(number) {
                let (mut sink, progress) = self.connections.writer(number);
                let feed = self.channels[key].feed();
                sink.keep_frame(progress, feed, &mut SharedTails::default(), &mut self.tally);
            }
        }
        let subscription = self.connections.remove_subscription(number);
        self.resume_next_reader(subscription.owner);
        subscription
    }

    /// Rejects a subscription that waits for the bus.
    pub(super) fn reject_subscription(&mut self, number: u32, code: ErrorCode, text: &str) {
        let Some(joining) = self.connections.subscription(number).joining() else { return };
        let regarding = joining.regarding();
        let owner = self.end_subscription(number).owner;
        self.reject_frame(owner, code, text, &regarding);
        self.write_later(owner);
    }

    /// Answers a frame about subscriptions or tokens with an error.
    pub(super) fn reject_frame(&mut self, slot: u32, code: ErrorCode, text: &str, regarding: &Regarding) {
        self.context.metrics.reject_subscription(self.context.id, code, text);
        self.connections[slot].enqueue(frame::error(code, text, regarding));
    }

    /// Whether a frame that is as much work as this many quarters of a message is within the rate of
    /// its client. Otherwise it is rejected.
    pub(super) fn accepts_work(
        &mut self,
        slot: u32,
        quarters: usize,
        reference: Option<&str>,
    ) -> Result<bool, CloseReason> {
        let limits = &self.context.handshake.limits;
        let now = limits.allowances.now();
        let (text, is_last) = match self.connections[slot].check_work(limits, quarters, now) {
            Decision::Accept => return Ok(true),
            Decision::Reject(text) => (text, false),
            Decision::Close(text) => (text, true),
        };
        let regarding = Regarding { channel: None, reference: reference.map(Into::into) };
        self.reject_frame(slot, ErrorCode::RateLimited, &text, &regarding);
        if is_last { Err(CloseReason::RateLimited) } else { Ok(false) }
    }
}
