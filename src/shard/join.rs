//! From an accepted request to a member of a channel.

use std::borrow::Cow;
use std::time::Instant;

use bytes::{Bytes, BytesMut};

use super::Shard;
use super::deferred::Pending;
use super::members::is_subscription;
use super::subscribe::{HOLDS_TOO_MANY, TOO_MANY_CHANNELS};
use crate::bus::{BusError, BusMessage, Request, ShardId};
use crate::feed::{Cursor, Feed, Lookup};
use crate::http::Rejection;
use crate::protocol::event::{ChannelName, Entry, EventId};
use crate::protocol::form::ChannelForm;
use crate::protocol::frame::{self, ErrorCode};
use crate::ws::client::LastSeen;
use crate::ws::connection::State;
use crate::ws::handshake::rejections;

/// Where a member joins the channel.
#[derive(Clone, Copy, Debug)]
enum JoinPosition {
    /// After this event, in the feed.
    Feed(EventId, Cursor),
    /// After this event, which history continues.
    History(EventId),
    /// At the head. It may have missed events.
    NotContinuous,
}

impl Shard {
    /// Makes a connection or a subscription a member of its channel once its position is known.
    /// `pending` has just been answered.
    pub(super) fn join(&mut self, number: u32, pending: Pending) {
        let Some((name, last_seen)) = self.connections.joining(number) else { return };
        let key = match self.channels.key(&name) {
            Some(key) => key,
            None if !self.may_hold(number, &name.name) => {
                return self.reject_subscription(number, ErrorCode::TooMany, HOLDS_TOO_MANY);
            }
            None if self.may_name(self.connections.owner(number), &name.name) => self.follow(number, name),
            None => return self.reject_new_channel(number),
        };
        let id = self.connections.id(number);
        self.connections.membership_mut(number).channel = key;
        let channel = &mut self.channels[key];
        let Some(feed) = &channel.feed else { return channel.joining.push(id) };
        let position = match last_seen {
            LastSeen::Newcomer { history } => {
                let from = EventId(feed.position().0.saturating_sub(history.into()));
                return self.join_newcomer(number, key, from, pending);
            }
            LastSeen::NewcomerAfter(from) => return self.join_newcomer(number, key, from, pending),
            LastSeen::Unknown => JoinPosition::NotContinuous,
            LastSeen::Event(seen) => match feed.find(seen) {
                Lookup::Found(cursor) => JoinPosition::Feed(seen, cursor),
                Lookup::Discontinuous => JoinPosition::NotContinuous,
                Lookup::Ahead if pending == Pending::Refresh => JoinPosition::NotContinuous,
                Lookup::Ahead => {
                    channel.refresh.wait(id);
                    return self.refresh_next(key);
                }
                Lookup::Evicted => match self.replay.pages.find(channel.id, seen, self.tick) {
                    Some(page) if page.proves(seen) => JoinPosition::History(seen),
                    Some(_) => JoinPosition::NotContinuous,
                    // The page read does not cover `seen`, and rereading would not help.
                    None if matches!(pending, Pending::Page(_)) => JoinPosition::NotContinuous,
                    None => {
                        let bytes = self.connections.next_page_bytes(number);
                        return self.request_page(number, seen, bytes);
                    }
                },
            },
        };
        self.admit(number, key, position);
    }

    /// Makes a newcomer a member, with the events after `from` or as many of them as history holds.
    fn join_newcomer(&mut self, number: u32, key: u32, from: EventId, pending: Pending) {
        let (channel, feed) = (self.channels[key].id, self.channels[key].feed());
        // The page read was for `from`; it proves nothing after `from` moves.
        let mut was_read = matches!(pending, Pending::Page(_)) && from >= feed.base();
        let mut from = from.max(feed.base());
        let position = loop {
            if let Lookup::Found(cursor) = feed.find(from) {
                break JoinPosition::Feed(from, cursor);
            }
            match self.replay.pages.find(channel, from, self.tick) {
                Some(page) if page.proves(from) => break JoinPosition::History(from),
                // History starts later. If that is in another page, it is read, too.
                Some(page) => (from, was_read) = (page.start().min(feed.position()), false),
                // The page read does not cover `from`, and rereading would not help: start at the
                // feed's oldest event.
                None if was_read => from = feed.before(),
                None => {
                    self.connections.set_last_seen(number, LastSeen::NewcomerAfter(from));
                    let bytes = self.connections.next_page_bytes(number);
                    return self.request_page(number, from, bytes);
                }
            }
        };
        self.admit(number, key, position);
    }

    /// Whether the client of this connection may name this channel. One that the node does not
    /// follow counts as new.
    pub(super) fn may_name(&mut self, slot: u32, channel: &ChannelName) -> bool {
        self.context.handshake.limits.followed.contains(channel) || self.take_new_channel(slot)
    }

    /// Counts a new channel for the client of this connection. `false` if it has named too many.
    pub(super) fn take_new_channel(&mut self, slot: u32) -> bool {
        let limits = &self.context.handshake.limits;
        let connection = &mut self.connections[slot];
        connection.allowance(limits).is_none_or(|client| limits.take_channel(client))
    }

    /// Whether the client of a subscription may be the one for which this channel counts, if it
    /// counts for none. Default channels are limited like connections.
    fn may_hold(&mut self, number: u32, channel: &ChannelName) -> bool {
        if !is_subscription(number) {
            return true;
        }
        let limits = &self.context.handshake.limits;
        let owner = self.connections.owner(number);
        let connection = &mut self.connections[owner];
        limits.followed.is_held(channel)
            || connection.allowance(limits).is_none_or(|client| limits.may_hold(client))
    }

    /// Adds a channel for a member, which the bus is asked to follow. Returns its key.
    fn follow(&mut self, number: u32, name: ChannelForm) -> u32 {
        let limits = &self.context.handshake.limits;
        let owner = self.connections.owner(number);
        let holder =
            is_subscription(number).then(|| self.connections[owner].shared_allowance(limits)).flatten();
        limits.followed.add(name.name.clone(), holder);
        self.request_bus(Request::Follow { channel: name.clone(), shard: self.context.id });
        let tracks_presence = self.settings().tracks_presence(&name.name);
        let key = self.channels.insert(name, Instant::now());
        self.channels[key].tracks_presence = tracks_presence;
        key
    }

    /// Makes a connection or a subscription a member. Its welcome reads the head in the same turn,
    /// so that no event arrives between history and live. What follows the welcome of a subscription
    /// is written by the caller.
    fn admit(&mut self, number: u32, key: u32, position: JoinPosition) {
        let feed = self.channels[key].feed();
        let head = feed.position();
        let (last, recovered) = match position {
            JoinPosition::Feed(seen, _) | JoinPosition::History(seen) => (seen, true),
            JoinPosition::NotContinuous => (head, false),
        };
        let owner = self.connections.owner(number);
        let wants_presence = self.connections.wants_presence(number);
        match is_subscription(number) {
            true => {
                let Some(joining) = self.connections.subscription(number).joining() else { return };
                let reference = joining.reference.as_deref();
                let welcome = frame::subscription_welcome(&joining.channel, last, head, recovered, reference);
                self.connections[owner].enqueue(welcome);
            }
            false => {
                let wants_recovery = self.connections[number].client.wants_recovery();
                let welcome = wants_recovery.then(|| frame::welcome(last, head, recovered));
                self.upgrade(number, State::Live, welcome);
            }
        }
        let feed = self.channels[key].feed();
        let end = Cursor { entry: feed.end(), offset: 0 };
        match position {
            JoinPosition::Feed(seen, cursor) => self.connections.start_live(number, feed, cursor, seen),
            JoinPosition::History(seen) => self.connections.start_replay(number, feed, seen),
            JoinPosition::NotContinuous => self.connections.start_live(number, feed, end, head),
        }
        self.add_member(key, number);
        if wants_presence {
            self.follow_presence(key, number);
        }
        if !is_subscription(number) {
            self.flush(number);
        }
    }

    /// Opens a connection that has no default channel.
    pub(super) fn admit_without_channel(&mut self, slot: u32) {
        self.upgrade(slot, State::WithoutChannel, Some(frame::welcome_without_channel()));
        self.flush(slot);
    }

    /// Sends the response of an upgrade with the first frame.
    fn upgrade(&mut self, slot: u32, state: State, first: Option<Bytes>) {
        let connection = &mut self.connections[slot];
        let State::Joining(join) = std::mem::replace(&mut connection.state, state) else { return };
        let mut response = BytesMut::from(&join.response[..]);
        if let Some(first) = first {
            response.extend_from_slice(&first);
        }
        connection.enqueue(Bytes::from(response));
        connection.liveness.restart(self.tick);
        if join.grant.is_some() {
            self.connections.set_mut(slot).grant = join.grant;
        }
        self.metrics().upgraded.add(1);
    }

    /// Starts the feed of a channel after `position`. `recent` are the entries that another shard
    /// has from before.
    pub(super) fn on_followed(
        &mut self,
        name: &ChannelForm,
        base: EventId,
        position: EventId,
        recent: Vec<Entry>,
    ) {
        let Some(key) = self.channels.key(name) else { return };
        let channel = &mut self.channels[key];
        if channel.feed.is_some() {
            return;
        }
        let before = recent.first().map_or(position, Entry::before);
        channel.feed = Some(Feed::new(base, before));
        let joining = std::mem::take(&mut channel.joining);
        let early = std::mem::take(&mut channel.early).into_iter().filter(|entry| entry.before() >= position);
        for entry in recent.into_iter().chain(early) {
            self.on_entry(name, entry, self.now);
        }
        self.deferred.answered.extend(joining.into_iter().map(|id| (id, Pending::Nothing)));
    }

    /// Sends [`BusMessage::Followed`] to another shard, with the entries that are in memory here.
    pub(super) fn on_share(&mut self, channel: ChannelForm, base: EventId, position: EventId, with: ShardId) {
        let key = self.channels.key(&channel);
        let feed = key.and_then(|key| self.channels[key].feed.as_ref());
        // A channel that was dropped here and added again is not at this position.
        let feed = feed.filter(|feed| feed.position() == position && feed.base() == base);
        let recent = feed.map_or_else(Vec::new, |feed| feed.recent().cloned().collect());
        self.context.shards.send(with, BusMessage::Followed { channel, base, position, recent });
    }

    pub(super) fn on_not_followed(&mut self, name: &ChannelForm, why: &BusError) {
        let Some(key) = self.channels.key(name) else { return };
        for id in std::mem::take(&mut self.channels[key].joining) {
            if let Some(number) = self.connections.find(id) {
                self.reject_join(number, why);
            }
        }
        self.drop_channel(key);
    }

    /// Asks the bus for newer events of a channel, unless it was asked already.
    fn refresh_next(&mut self, key: u32) {
        let channel = &mut self.channels[key];
        if !channel.refresh.is_in_flight() && channel.refresh.start() {
            let channel = channel.name.clone();
            self.request_bus(Request::Refresh { channel, shard: self.context.id });
        }
    }

    pub(super) fn on_refreshed(&mut self, name: &ChannelForm, result: Result<(), BusError>) {
        let Some(key) = self.channels.key(name) else { return };
        for id in self.channels[key].refresh.complete() {
            match &result {
                Ok(()) => self.deferred.answered.push_back((id, Pending::Refresh)),
                Err(why) => {
                    if let Some(number) = self.connections.find(id) {
                        self.reject_join(number, why);
                    }
                }
            }
        }
        self.refresh_next(key);
    }

    /// Rejects a connection or a subscription that waits to join. Why the bus is unavailable is for
    /// operators, so the answer does not say it.
    pub(super) fn reject_join(&mut self, number: u32, why: &BusError) {
        if !self.connections.is_joining(number) {
            return;
        }
        let is_subscription = is_subscription(number);
        let text = match why {
            BusError::Unavailable(_) if is_subscription => {
                "no client can subscribe now: try again later".into()
            }
            BusError::Unavailable(_) => "no client can join now: try again, or another node".into(),
            BusError::TooManyChannels => Cow::from(why.to_string()),
        };
        match is_subscription {
            true => self.reject_subscription(number, ErrorCode::Unavailable, &text),
            false => self.reject(number, &Rejection::unavailable(text)),
        }
    }

    /// Rejects a connection or a subscription whose client has named too many new channels.
    fn reject_new_channel(&mut self, number: u32) {
        match is_subscription(number) {
            true => self.reject_subscription(number, ErrorCode::RateLimited, TOO_MANY_CHANNELS),
            false => self.reject(number, &rejections::too_many_channels()),
        }
    }

    /// Drops a channel without members.
    pub(super) fn drop_channel(&mut self, key: u32) {
        let channel = self.channels.remove(key);
        self.context.handshake.limits.followed.remove(channel.name.name.clone());
        self.replay.pages.forget(channel.id);
    }
}
