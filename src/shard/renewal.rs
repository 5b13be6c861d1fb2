//! New tokens of open connections.

use std::time::{SystemTime, UNIX_EPOCH};

use super::Shard;
use super::subscribe::FORBIDDEN;
use crate::auth::token;
use crate::protocol::close::CloseReason;
use crate::protocol::frame::{self, ErrorCode, Regarding};
use crate::ws::handshake::rejections;

/// Checking a token takes up to 90 µs, as much as twenty messages. In quarters of a message.
const TOKEN_WORK: usize = 20 * 4;

impl Shard {
    /// Replaces the token of a connection. Channels that the new one does not allow are
    /// unsubscribed; without its default channel a connection is closed.
    pub(super) fn on_token(
        &mut self,
        slot: u32,
        token: &str,
        reference: Option<Box<str>>,
    ) -> Result<(), CloseReason> {
        let keys = self.context.handshake.keys.clone();
        let Some(required) = keys.requires_token().then(|| keys.current()) else {
            self.acknowledge_token(slot, reference.as_deref()); // as at connect, it is ignored
            return Ok(());
        };
        if !self.accepts_work(slot, TOKEN_WORK, reference.as_deref())? {
            return Ok(());
        }
        let user = &self.connections[slot].client.user;
        if self.context.handshake.limits.bans.time_left(user).is_some() {
            return Err(CloseReason::Banned);
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(u64::MAX, |since| since.as_secs());
        let grant = match token::verify(&required.tokens, token, user, now) {
            Ok(grant) => grant,
            Err(reason) => {
                let rejection = rejections::invalid_token(user, &reason);
                self.context.metrics.reject_token(self.context.id, &rejection);
                let regarding = Regarding { channel: None, reference };
                let error = frame::error(ErrorCode::Unauthorized, &rejection.text, &regarding);
                self.connections[slot].enqueue(error);
                return Ok(());
            }
        };
        let default = self.default_channel(slot).cloned();
        if default.as_ref().is_some_and(|channel| !grant.may_join(channel)) {
            return Err(CloseReason::ChannelForbidden);
        }
        for number in self.connections.set(slot).map_or_else(Vec::new, |set| set.subscriptions.clone()) {
            match self.connections.awaited_channel(number) {
                Some(channel) if !grant.may_join(channel) => {
                    self.reject_subscription(number, ErrorCode::Forbidden, FORBIDDEN);
                }
                Some(_) => {}
                None => {
                    let key = self.connections.membership(number).channel;
                    let channel = self.channels[key].name.name.clone();
                    if !grant.may_join(&channel) {
                        self.end_subscription(number);
                        self.connections[slot].enqueue(frame::unsubscribed(&channel, "forbidden", None));
                    }
                }
            }
        }
        let settings = &self.context.handshake.settings;
        let kept = self.connections[slot].client.set_rights(Some(grant), default.as_ref(), settings);
        if kept.is_some() || self.connections.set(slot).is_some() {
            self.connections.set_mut(slot).grant = kept;
        }
        self.acknowledge_token(slot, reference.as_deref());
        Ok(())
    }

    fn acknowledge_token(&mut self, slot: u32, reference: Option<&str>) {
        if let Some(reference) = reference {
            self.connections[slot].enqueue(frame::token_ack(reference));
        }
    }
}
