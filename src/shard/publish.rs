//! Messages of clients: what they publish, and the answers.

use std::sync::Arc;

use bytes::Bytes;

use super::Shard;
use super::subscribe::TOO_MANY_CHANNELS;
use crate::auth::token::Grant;
use crate::bus::{Answer, ConnectionId, Publish, PublishError, Request};
use crate::config::ClientPublish;
use crate::protocol::client_frame::{self, BadFrame, ClientFrame};
use crate::protocol::close::CloseReason;
use crate::protocol::event::ChannelName;
use crate::protocol::frame::{self, ErrorCode, Regarding};
use crate::protocol::inbox::PublishedId;
use crate::ws::client::OtherChannels;
use crate::ws::inbound::QUEUE_MAX;
use crate::ws::subscription::ChannelSet;

impl Shard {
    /// Handles a text message. An error closes the connection.
    pub(super) fn on_text(&mut self, slot: u32, text: &str) -> Result<(), CloseReason> {
        self.metrics().messages_received.add(1);
        let most = self.settings().max_subscriptions;
        let client = &self.connections[slot].client;
        if !client.is_json() {
            let event = frame::chat_event(&client.user, text);
            return self.publish_if_allowed(slot, event, None, None, Regarding::default());
        }
        match client_frame::parse(&client.user, text, most) {
            Ok(ClientFrame::Publish(publish)) => {
                let regarding = Regarding { channel: publish.channel, reference: publish.reference };
                self.publish_if_allowed(slot, publish.event, publish.to, publish.key, regarding)
            }
            Ok(ClientFrame::Subscribe { channels, reference }) => {
                self.on_subscribe(slot, channels, reference)
            }
            Ok(ClientFrame::Unsubscribe { channel, reference }) => {
                self.on_unsubscribe(slot, channel, reference);
                Ok(())
            }
            Ok(ClientFrame::Token { token, reference }) => self.on_token(slot, &token, reference),
            Ok(ClientFrame::Ping) => self.on_ping(slot),
            Err(BadFrame { message, reference }) => {
                let regarding = Regarding { channel: None, reference };
                self.reject_message(slot, ErrorCode::Invalid, &message, &regarding, CloseReason::Protocol)
            }
        }
    }

    /// Answers a ping of a client with its positions. Sixteen of them are as much work as a message.
    fn on_ping(&mut self, slot: u32) -> Result<(), CloseReason> {
        let positions = self.connections.set(slot).map_or(0, |set| set.subscriptions.len());
        if positions > 0 && !self.accepts_work(slot, positions / 4, None)? {
            return Ok(());
        }
        // As with pongs, a client that does not read such long answers gets no more of them.
        if positions == 0 || self.connections[slot].queued() < QUEUE_MAX / 2 {
            let ping = self.positions_ping(slot);
            self.connections[slot].enqueue(ping);
        }
        Ok(())
    }

    /// Publishes an event of a client in the channel that its frame names, or else in the default
    /// one.
    fn publish_if_allowed(
        &mut self,
        slot: u32,
        event: Bytes,
        to: Option<String>,
        key: Option<Box<str>>,
        regarding: Regarding,
    ) -> Result<(), CloseReason> {
        let channel = regarding.channel.as_ref().or(self.default_channel(slot)).cloned();
        let may_address = self.settings().client_publish == ClientPublish::Any;
        let (code, reason) = match channel {
            None => (ErrorCode::Invalid, r#"give "channel": this connection has no default channel"#),
            _ if to.is_some() && !may_address => {
                (ErrorCode::Forbidden, "clients may not address one user here")
            }
            Some(channel) if !self.may_publish(slot, &channel) => {
                (ErrorCode::Forbidden, "you may not publish here")
            }
            Some(channel) if key.is_some() && !self.settings().is_inbox(&channel) => {
                (ErrorCode::Invalid, r#"leave out "key": this channel is no inbox"#)
            }
            Some(channel) if !self.may_publish_anew(slot, &channel) => {
                (ErrorCode::RateLimited, TOO_MANY_CHANNELS)
            }
            Some(channel) => {
                self.publish(slot, channel, event, to, key, regarding);
                return Ok(());
            }
        };
        self.reject_message(slot, code, reason, &regarding, CloseReason::Forbidden)
    }

    /// Whether a client may publish in a channel.
    fn may_publish(&self, slot: u32, channel: &ChannelName) -> bool {
        if self.default_channel(slot) == Some(channel) {
            return self.connections[slot].client.may_publish;
        }
        let by_grant = |grant: &Grant| grant.may_publish(channel);
        self.settings().client_publish != ClientPublish::Off && self.may_use_others(slot, by_grant)
    }

    /// Whether a client may do something in a channel other than its default one. `by_grant` says
    /// whether a token allows it.
    pub(super) fn may_use_others(&self, slot: u32, by_grant: impl Fn(&Grant) -> bool) -> bool {
        match self.connections[slot].client.other_channels {
            OtherChannels::All => true,
            OtherChannels::Nothing => false,
            OtherChannels::ByGrant => {
                self.connections.set(slot).and_then(|set| set.grant.as_deref()).is_some_and(by_grant)
            }
        }
    }

    /// Whether a client may publish in this channel now. One that the node does not follow counts as
    /// new, unless the connection has published there just before.
    fn may_publish_anew(&mut self, slot: u32, channel: &ChannelName) -> bool {
        let is_published = |set: &ChannelSet| set.has_published(channel);
        if self.default_channel(slot) == Some(channel)
            || self.connections.set(slot).is_some_and(is_published)
            || self.context.handshake.limits.followed.contains(channel)
        {
            return true;
        }
        let may_add = self.take_new_channel(slot);
        if may_add {
            self.connections.set_mut(slot).note_published(channel.clone());
        }
        may_add
    }

    /// The default channel of a connection.
    pub(super) fn default_channel(&self, slot: u32) -> Option<&ChannelName> {
        let connection = &self.connections[slot];
        connection.is_member().then(|| &self.channels[connection.membership.channel].name.name)
    }

    /// Rejects a message. A client without recovery frames gets no error frame: it is closed.
    pub(super) fn reject_message(
        &mut self,
        slot: u32,
        code: ErrorCode,
        text: &str,
        regarding: &Regarding,
        reason: CloseReason,
    ) -> Result<(), CloseReason> {
        self.context.metrics.reject_message(self.context.id, code, text);
        let connection = &mut self.connections[slot];
        if !connection.client.wants_recovery() {
            return Err(reason);
        }
        connection.enqueue(frame::error(code, text, regarding));
        Ok(())
    }

    pub(super) fn publish(
        &mut self,
        slot: u32,
        channel: ChannelName,
        event: Bytes,
        to: Option<String>,
        key: Option<Box<str>>,
        regarding: Regarding,
    ) {
        let answer = Answer::Connection(self.connections.id(slot), regarding);
        let is_inbox = self.settings().is_inbox(&channel);
        let connection = &mut self.connections[slot];
        connection.inbound.count_publish();
        let user = &connection.client.user;
        let (event, sender) = match is_inbox {
            true => (frame::without_recipient(event, user, to.as_deref()), Some(Arc::from(&**user))),
            false => (event, None),
        };
        let (to, key) = (to.map(Into::into), key.map(Into::into));
        let publish = Publish { channel, sender, to, key, event, answer };
        self.request_bus(Request::Publish(publish));
    }

    pub(super) fn on_published(
        &mut self,
        id: ConnectionId,
        regarding: &Regarding,
        result: Result<PublishedId, PublishError>,
    ) {
        let Some(slot) = self.connections.find(id) else { return };
        let connection = &mut self.connections[slot];
        if !connection.is_open() {
            return;
        }
        connection.inbound.count_answer();
        match result {
            Ok(id) => {
                if let Some(reference) = &regarding.reference {
                    connection.enqueue(frame::ack(reference, id));
                }
            }
            Err(error) => {
                let code = match error {
                    PublishError::Rejected(_) => ErrorCode::Unavailable,
                    PublishError::Unknown => ErrorCode::Unknown,
                    PublishError::Full => ErrorCode::Full,
                };
                let text = error.to_string();
                self.context.metrics.reject_message(self.context.id, code, &text);
                if !connection.client.wants_recovery() {
                    return self.close(slot, CloseReason::PublishFailed);
                }
                // What is wrong with the bus is for operators.
                let text = if code == ErrorCode::Unavailable { frame::NOT_PUBLISHED } else { &text };
                connection.enqueue(frame::error(code, text, regarding));
            }
        }
        // A sender that is live gets its event now, not when the fan-out comes to it: it may wait for
        // its event before it sends more.
        let (is_blocked, has_queued) = (connection.socket.is_blocked(), connection.queued() > 0);
        let subscription =
            regarding.channel.as_ref().and_then(|channel| self.find_subscription(slot, channel));
        let member = subscription.filter(|number| self.connections.is_live(*number)).unwrap_or(slot);
        if has_queued || (!is_blocked && self.connections.is_live(member)) {
            self.flush(member);
        }
        self.resume_reading(slot);
    }

    /// Resumes reading from a client that has taken most of its frames and answers.
    pub(super) fn resume_reading(&mut self, slot: u32) {
        let connection = &mut self.connections[slot];
        if connection.inbound.resume_if_due(connection.queued()) {
            self.read_later(slot);
        }
    }
}
