//! From an accepted request to a member of a channel.

use std::borrow::Cow;
use std::time::Instant;

use bytes::{Bytes, BytesMut};

use super::Shard;
use super::deferred::Pending;
use crate::bus::{BusError, BusMessage, Request, ShardId};
use crate::feed::{Cursor, Feed, Lookup};
use crate::http::Rejection;
use crate::protocol::event::{ChannelName, Entry, EventId};
use crate::protocol::frame;
use crate::ws::client::LastSeen;
use crate::ws::connection::State;
use crate::ws::handshake::rejections;

/// Where a connection joins the channel.
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
    /// Makes a connection a member of its channel once its position is known. `pending` has just
    /// been answered.
    pub(super) fn join(&mut self, slot: u32, pending: Pending) {
        let State::Joining(join) = &self.connections[slot].state else { return };
        let last_seen = join.last_seen;
        let name = join.channel.clone();
        let key = match self.channels.key(&name) {
            Some(key) => key,
            None if self.may_add_channel(slot) => self.follow(name),
            None => {
                return self.reject(slot, &rejections::too_many_channels());
            }
        };
        let id = self.connections.id(slot);
        self.connections[slot].membership.channel = key;
        let channel = &mut self.channels[key];
        let Some(feed) = &channel.feed else { return channel.joining.push(id) };
        let position = match last_seen {
            LastSeen::Newcomer { history } => {
                let from = EventId(feed.position().0.saturating_sub(history.into()));
                return self.join_newcomer(slot, key, from, pending);
            }
            LastSeen::NewcomerAfter(from) => return self.join_newcomer(slot, key, from, pending),
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
                        let bytes = self.connections[slot].next_page_bytes();
                        return self.request_page(slot, seen, bytes);
                    }
                },
            },
        };
        self.admit(slot, key, position);
    }

    /// Makes a newcomer a member, with the events after `from` or as many of them as history holds.
    fn join_newcomer(&mut self, slot: u32, key: u32, from: EventId, pending: Pending) {
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
                    let connection = &mut self.connections[slot];
                    if let State::Joining(join) = &mut connection.state {
                        join.last_seen = LastSeen::NewcomerAfter(from);
                    }
                    let bytes = connection.next_page_bytes();
                    return self.request_page(slot, from, bytes);
                }
            }
        };
        self.admit(slot, key, position);
    }

    /// Whether the client of this connection may name one more channel that this shard does not
    /// follow.
    fn may_add_channel(&mut self, slot: u32) -> bool {
        let limits = &self.context.handshake.limits;
        let connection = &mut self.connections[slot];
        connection.allowance(limits).is_none_or(|client| limits.take_channel(client))
    }

    /// Adds a channel, which the bus is asked to follow. Returns its key.
    fn follow(&mut self, name: ChannelName) -> u32 {
        self.request_bus(Request::Follow { channel: name.clone(), shard: self.context.id });
        self.channels.insert(name, Instant::now())
    }

    /// Makes a connection a member. Its welcome reads the head in the same turn, so that no event
    /// arrives between history and live.
    fn admit(&mut self, slot: u32, key: u32, position: JoinPosition) {
        let connection = &mut self.connections[slot];
        let State::Joining(join) = std::mem::replace(&mut connection.state, State::Live) else { return };
        let feed = self.channels[key].feed();
        let end = Cursor { entry: feed.end(), offset: 0 };
        let (last, recovered) = match position {
            JoinPosition::Feed(seen, _) | JoinPosition::History(seen) => (seen, true),
            JoinPosition::NotContinuous => (feed.position(), false),
        };
        match position {
            JoinPosition::Feed(seen, cursor) => connection.start_live(feed, cursor, seen),
            JoinPosition::History(seen) => connection.start_replay(feed, seen),
            JoinPosition::NotContinuous => connection.start_live(feed, end, feed.position()),
        }
        let mut response = BytesMut::from(&join.response[..]);
        if connection.client.wants_recovery {
            response.extend_from_slice(&frame::welcome(last, feed.position(), recovered));
        }
        connection.enqueue(Bytes::from(response));
        connection.liveness.restart(self.tick);
        self.channels.add_member(key, slot, &mut self.connections);
        self.metrics().upgraded.add(1);
        self.flush(slot);
    }

    /// Starts the feed of a channel after `position`. `recent` are the entries that another shard
    /// has from before.
    pub(super) fn on_followed(
        &mut self,
        name: &ChannelName,
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
    pub(super) fn on_share(&mut self, channel: ChannelName, base: EventId, position: EventId, with: ShardId) {
        let key = self.channels.key(&channel);
        let feed = key.and_then(|key| self.channels[key].feed.as_ref());
        // A channel that was dropped here and added again is not at this position.
        let feed = feed.filter(|feed| feed.position() == position && feed.base() == base);
        let recent = feed.map_or_else(Vec::new, |feed| feed.recent().cloned().collect());
        self.context.shards.send(with, BusMessage::Followed { channel, base, position, recent });
    }

    pub(super) fn on_not_followed(&mut self, name: &ChannelName, why: &BusError) {
        let Some(key) = self.channels.key(name) else { return };
        for id in std::mem::take(&mut self.channels[key].joining) {
            if let Some(slot) = self.connections.find(id) {
                self.reject_join(slot, why);
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

    pub(super) fn on_refreshed(&mut self, name: &ChannelName, result: Result<(), BusError>) {
        let Some(key) = self.channels.key(name) else { return };
        for id in self.channels[key].refresh.complete() {
            match &result {
                Ok(()) => self.deferred.answered.push_back((id, Pending::Refresh)),
                Err(why) => {
                    if let Some(slot) = self.connections.find(id) {
                        self.reject_join(slot, why);
                    }
                }
            }
        }
        self.refresh_next(key);
    }

    /// Rejects a connection that waits to join. Why the bus is unavailable is for operators, so the
    /// response does not say it.
    pub(super) fn reject_join(&mut self, slot: u32, why: &BusError) {
        if !matches!(self.connections[slot].state, State::Joining(_)) {
            return;
        }
        let text = match why {
            BusError::Unavailable(_) => "no client can join now: try again, or another node".into(),
            BusError::TooManyChannels => Cow::from(why.to_string()),
        };
        self.reject(slot, &Rejection::unavailable(text));
    }

    /// Drops a channel without members.
    pub(super) fn drop_channel(&mut self, key: u32) {
        let channel = self.channels.remove(key);
        self.replay.pages.forget(channel.id);
    }
}
