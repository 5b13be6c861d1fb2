//! From a good request to a member of a channel.

use std::sync::Arc;
use std::time::Instant;

use bytes::{Bytes, BytesMut};

use super::replay::Part;
use super::{JOIN_TIME, Shard};
use crate::bus::reads::Read;
use crate::bus::{BusError, BusMessage, ConnectionId, Page, Request, ShardId};
use crate::feed::{Cursor, Feed, Lookup};
use crate::protocol::close::CloseReason;
use crate::protocol::event::{ChannelName, Entry, EventId};
use crate::protocol::frame;
use crate::ws::connection::{LastSeen, State};
use crate::ws::handshake;

/// What the bus was asked for a client that can't come in without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    /// Nothing yet.
    Nothing,
    /// Whether there are ids ahead of this node.
    Look,
    /// For history; this part came.
    Page(Part),
}

/// Where a client comes in.
#[derive(Clone, Copy, Debug)]
enum Entrance {
    /// Where it said it is, and that is in the feed.
    Feed(EventId, Cursor),
    /// Where it said it is, and history holds what follows.
    History(EventId),
    /// At the head, having missed nothing.
    Head,
    /// At the head; it can't be proven that it missed nothing.
    Unproven,
}

impl Shard {
    /// Lets a client in whose request is good, as soon as its place is known; `asked` has just been answered.
    pub(super) fn join(&mut self, slot: u32, asked: Asked) {
        let id = self.id_of(slot);
        let State::Joining(join) = &self.connections[slot as usize].state else { return };
        let last_seen = join.last_seen;
        let name = join.channel.clone();
        if !self.names.contains_key(&name) && !self.may_name_channel(slot) {
            return self.refuse(slot, handshake::too_many_channels(), CloseReason::RateLimited);
        }
        let key = self.channel_key(&name);
        self.connections[slot as usize].channel = key;
        let channel = &mut self.channels[key as usize];
        let Some(feed) = &channel.feed else { return channel.joining.push(id) };
        let entrance = match last_seen {
            LastSeen::Nothing => Entrance::Head,
            LastSeen::Unknown => Entrance::Unproven,
            LastSeen::Event(seen) => match feed.find(seen) {
                Lookup::Found(cursor) => Entrance::Feed(seen, cursor),
                Lookup::Discontinuous => Entrance::Unproven,
                Lookup::Ahead if asked == Asked::Look => Entrance::Unproven,
                Lookup::Ahead => {
                    channel.look_next.push(id);
                    return self.look(key);
                }
                Lookup::Evicted => match self.pages.find((key, channel.serial), seen, self.tick) {
                    Some(page) if page.proves(seen) => Entrance::History(seen),
                    Some(_) => Entrance::Unproven,
                    // An answer that says nothing about this client is not to be asked for again.
                    None if matches!(asked, Asked::Page(_)) => Entrance::Unproven,
                    None => {
                        let bytes = self.connections[slot as usize].next_part_bytes();
                        return self.wait_for_page(slot, seen, bytes);
                    }
                },
            },
        };
        self.admit(slot, key, entrance);
    }

    /// Whether the client of this connection has not named too many new channels lately. One that only this shard does
    /// not follow counts, too.
    fn may_name_channel(&mut self, slot: u32) -> bool {
        let limits = &self.context.limits;
        let connection = &mut self.connections[slot as usize];
        connection.load_allowance(limits);
        connection.allowance.as_deref().is_none_or(|client| limits.take_channel(client))
    }

    /// Gives a client that has to wait for the bus a deadline.
    pub(super) fn wait_to_join(&mut self, slot: u32) {
        let joins = self.connections.contains(slot as usize) && self.is_joining(slot);
        if joins {
            self.joining.push_back((Instant::now() + JOIN_TIME, self.id_of(slot)));
        }
    }

    /// Makes a client a member. It takes its place in the same turn in which its welcome reads the head, so
    /// nothing can slip between history and live.
    fn admit(&mut self, slot: u32, key: u32, entrance: Entrance) {
        let connection = &mut self.connections[slot as usize];
        let State::Joining(joining) = std::mem::replace(&mut connection.state, State::Live) else { return };
        let feed =
            self.channels[key as usize].feed.as_ref().expect("clients join channels that are followed");
        let end = Cursor { entry: feed.end(), offset: 0 };
        let (last, recovered) = match entrance {
            Entrance::Feed(seen, _) | Entrance::History(seen) => (seen, true),
            Entrance::Head => (feed.position(), true),
            Entrance::Unproven => (feed.position(), false),
        };
        match entrance {
            Entrance::Feed(seen, cursor) => connection.start_live(feed, cursor, seen),
            Entrance::History(seen) => connection.start_replay(feed, seen),
            Entrance::Head | Entrance::Unproven => connection.start_live(feed, end, feed.position()),
        }
        let mut first = BytesMut::from(&joining.response[..]);
        if joining.wants_recovery {
            first.extend_from_slice(&frame::welcome(last, feed.position(), recovered));
        }
        connection.enqueue(Bytes::from(first));
        connection.wants_recovery = joining.wants_recovery;
        connection.json_mode = joining.json_mode;
        connection.may_publish = joining.may_publish;
        connection.expires = joining.expires;
        connection.last_activity = self.tick;
        connection.last_ping = self.tick;
        self.channels[key as usize].add(slot, &mut self.connections, &self.hasher);
        self.numbers().upgraded.add(1);
        self.flush(slot);
    }

    /// Follows from `position` on; `recent` is what another shard has of the time before.
    pub(super) fn on_followed(
        &mut self,
        name: &ChannelName,
        base: EventId,
        position: EventId,
        recent: Vec<Entry>,
    ) {
        let Some(key) = self.names.get(name).copied() else { return };
        let channel = &mut self.channels[key as usize];
        if channel.feed.is_some() {
            return;
        }
        let begin = recent.first().map_or(position, Entry::before);
        channel.feed = Some(Feed::new(base, begin));
        let joining = std::mem::take(&mut channel.joining);
        let early = std::mem::take(&mut channel.early).into_iter().filter(|entry| entry.before() >= position);
        for entry in recent.into_iter().chain(early) {
            self.on_entry(name, entry, self.now);
        }
        self.answered.extend(joining.into_iter().map(|id| (id, Asked::Nothing)));
    }

    /// Tells another shard that it follows the channel, and what is in memory of it here.
    pub(super) fn on_share(&mut self, channel: ChannelName, base: EventId, position: EventId, with: ShardId) {
        let key = self.names.get(&channel);
        let feed = key.and_then(|key| self.channels[*key as usize].feed.as_ref());
        // A channel that has been dropped here and is followed anew is not where the bus says.
        let feed = feed.filter(|feed| feed.position() == position && feed.base() == base);
        let recent = feed.map_or_else(Vec::new, |feed| feed.recent().cloned().collect());
        self.shards.send(with, BusMessage::Followed { channel, base, position, recent });
    }

    pub(super) fn on_not_followed(&mut self, name: &ChannelName, why: &BusError) {
        let Some(key) = self.names.get(name).copied() else { return };
        for id in std::mem::take(&mut self.channels[key as usize].joining) {
            self.refuse_join(id, why);
        }
        self.drop_channel(key);
    }

    /// Looks at the bus for those who wait for it, unless a look is under way.
    fn look(&mut self, key: u32) {
        let channel = &mut self.channels[key as usize];
        if channel.looking.is_empty() && !channel.look_next.is_empty() {
            channel.looking = std::mem::take(&mut channel.look_next);
            let channel = channel.name.clone();
            self.ask(Request::Look { channel, shard: self.id });
        }
    }

    pub(super) fn on_looked(&mut self, name: &ChannelName, result: Result<(), BusError>) {
        let Some(key) = self.names.get(name).copied() else { return };
        for id in std::mem::take(&mut self.channels[key as usize].looking) {
            match &result {
                Ok(()) => self.answered.push_back((id, Asked::Look)),
                Err(why) => self.refuse_join(id, why),
            }
        }
        self.look(key);
    }

    /// Goes on with those whom the bus has answered: thousands may have waited for one answer.
    pub(super) fn go_on(&mut self, budget: usize) {
        for _ in 0..budget {
            let Some((id, asked)) = self.answered.pop_front() else { break };
            if let Some(slot) = self.find(id) {
                self.connections[slot as usize].waits_for_page = false;
                match self.connections[slot as usize].state {
                    State::Joining(_) => self.join(slot, asked),
                    State::Replay(_) => self.catch_up(slot, matches!(asked, Asked::Page(_))),
                    _ => {}
                }
            }
            if let Asked::Page(part) = asked {
                self.pages.served(part);
            }
        }
        self.read_history();
    }

    /// Has a connection wait for a part of history of about so many bytes, or for the next tick if its client had more
    /// read than it may.
    pub(super) fn wait_for_page(&mut self, slot: u32, position: EventId, bytes: usize) {
        let id = self.id_of(slot);
        let limits = &self.context.limits;
        let now = limits.allowances.now();
        let connection = &mut self.connections[slot as usize];
        connection.load_allowance(limits);
        connection.waits_for_page = true;
        if connection.allowance.as_deref().is_some_and(|client| !client.take_history(bytes, now)) {
            return self.next_tick.push(id);
        }
        let key = connection.channel;
        self.pages.wait((key, self.channels[key as usize].serial), position, bytes, id);
        self.read_history();
    }

    /// Asks the bus for the parts of history that are next, as far as there is memory for them.
    fn read_history(&mut self) {
        let connections = &self.connections;
        let stays = |id: &ConnectionId| {
            let connection = connections.get(id.slot as usize);
            connection
                .is_some_and(|connection| connection.generation == id.generation && connection.awaits_page())
        };
        while let Some(Read { channel: (key, _), position, bytes }) = self.pages.start(stays) {
            let channel = self.channels[key as usize].name.clone();
            self.ask(Request::Read { channel, position, bytes, shard: self.id });
        }
    }

    pub(super) fn on_page(
        &mut self,
        name: &ChannelName,
        position: EventId,
        result: Result<Arc<Page>, BusError>,
    ) {
        let Some(key) = self.names.get(name).copied() else { return };
        let channel = &self.channels[key as usize];
        match result {
            Err(why) => {
                for id in self.pages.fail((key, channel.serial), position) {
                    self.refuse_join(id, &why);
                    self.parked.push(id);
                }
            }
            Ok(page) => {
                let Some(feed) = &channel.feed else { return }; // it was dropped and came back since
                let (part, served) = self.pages.take((key, channel.serial), position, &page, feed, self.tick);
                self.answered.extend(served.into_iter().map(|id| (id, Asked::Page(part))));
            }
        }
        self.read_history();
    }
}
