//! Members of channels: connections in their default channel, and subscriptions.
//!
//! A member number is the slot of a connection, or the number of a subscription with the top bit
//! set. A channel knows its members by number alone.

use super::connections::ConnectionTable;
use crate::feed::{Cursor, Feed};
use crate::protocol::event::{ChannelName, EventId};
use crate::protocol::form::ChannelForm;
use crate::ws::client::LastSeen;
use crate::ws::connection::{Membership, NONE, State};
use crate::ws::progress::Progress;
use crate::ws::replay::Replay;
use crate::ws::subscription::{ChannelSet, Joining, Phase, Subscription};
use crate::ws::writer::{Sink, Tally};

/// Member numbers from here on are those of subscriptions.
const FIRST_SUBSCRIPTION: u32 = 1 << 31;

/// Whether this is the number of a subscription.
pub fn is_subscription(number: u32) -> bool {
    number >= FIRST_SUBSCRIPTION && number != NONE
}

fn index(number: u32) -> u32 {
    number - FIRST_SUBSCRIPTION
}

impl ConnectionTable {
    // ---- subscriptions ----

    /// Adds a subscription of an open connection. Returns its number.
    pub fn subscribe(&mut self, slot: u32, joining: Joining) -> u32 {
        let generation = self.next_generation();
        let index = self.subscriptions.insert(|_| Subscription::new(generation, slot, joining));
        let number = FIRST_SUBSCRIPTION + index;
        self.set_mut(slot).subscriptions.push(number);
        number
    }

    /// Removes a subscription, which is a member of no channel any more.
    pub fn remove_subscription(&mut self, number: u32) -> Subscription {
        let subscription = self.subscriptions.remove(index(number));
        if let Some(set) = self.sets.get_mut(&subscription.owner) {
            set.subscriptions.retain(|other| *other != number);
            if set.current == number {
                (set.current, set.spent) = (NONE, 0);
            }
            if set.reading == number {
                set.reading = NONE;
            }
            set.reading_next.retain(|other| *other != number);
        }
        subscription
    }

    pub fn find_subscription(&self, number: u32) -> Option<&Subscription> {
        self.subscriptions.get(index(number))
    }

    pub fn subscription(&self, number: u32) -> &Subscription {
        &self.subscriptions[index(number)]
    }

    /// Number of subscriptions of all connections.
    pub fn subscriptions(&self) -> usize {
        self.subscriptions.len()
    }

    /// What a connection has beside its default channel.
    pub fn set(&self, slot: u32) -> Option<&ChannelSet> {
        self[slot].socket.carries_set.then(|| &self.sets[&slot])
    }

    /// The same, created if it does not exist.
    pub fn set_mut(&mut self, slot: u32) -> &mut ChannelSet {
        self[slot].socket.carries_set = true;
        self.sets.entry(slot).or_default()
    }

    /// Removes it when the connection is closed.
    pub fn take_set(&mut self, slot: u32) -> Option<ChannelSet> {
        std::mem::take(&mut self[slot].socket.carries_set).then(|| self.sets.remove(&slot)).flatten()
    }

    // ---- members ----

    /// The slot of the connection to which a member belongs.
    #[inline]
    pub fn owner(&self, number: u32) -> u32 {
        if is_subscription(number) { self.subscription(number).owner } else { number }
    }

    pub fn user(&self, number: u32) -> &str {
        &self[self.owner(number)].client.user
    }

    #[inline]
    pub fn membership(&self, number: u32) -> &Membership {
        match is_subscription(number) {
            true => &self.subscription(number).membership,
            false => &self[number].membership,
        }
    }

    #[inline]
    pub fn membership_mut(&mut self, number: u32) -> &mut Membership {
        match is_subscription(number) {
            true => &mut self.subscriptions[index(number)].membership,
            false => &mut self[number].membership,
        }
    }

    pub fn progress(&self, number: u32) -> &Progress {
        match is_subscription(number) {
            true => &self.subscription(number).progress,
            false => &self[number].progress,
        }
    }

    pub fn progress_mut(&mut self, number: u32) -> &mut Progress {
        match is_subscription(number) {
            true => &mut self.subscriptions[index(number)].progress,
            false => &mut self[number].progress,
        }
    }

    /// The connection of a member, to write to, and the progress of the member.
    #[inline]
    pub fn writer(&mut self, number: u32) -> (Sink<'_>, &mut Progress) {
        if !is_subscription(number) {
            return self.slots[number].split();
        }
        let subscription = &mut self.subscriptions[index(number)];
        let (sink, _) = self.slots[subscription.owner].split();
        (sink, &mut subscription.progress)
    }

    /// Whether a member follows its channel in the feed.
    #[inline]
    pub fn is_live(&self, number: u32) -> bool {
        match is_subscription(number) {
            true => self.subscription(number).phase.is_none(),
            false => matches!(self[number].state, State::Live),
        }
    }

    /// The position to send in a frame that is queued now.
    pub fn shown_position(&mut self, number: u32, feed: &Feed) -> EventId {
        if !self.is_live(number) {
            return self.progress(number).position();
        }
        let (sink, progress) = self.writer(number);
        progress.shown_position(feed, sink.user())
    }

    // ---- joining ----

    /// The channel that a member waits to join, and the last event that its client has.
    pub fn joining(&self, number: u32) -> Option<(ChannelForm, LastSeen)> {
        if is_subscription(number) {
            let joining = self.subscription(number).joining()?;
            return Some((ChannelForm::named(joining.channel.clone()), joining.last_seen));
        }
        match &self[number].state {
            State::Joining(join) => Some((join.channel.clone()?.into(), join.last_seen)),
            _ => None,
        }
    }

    /// Whether a member that waits to join wants to know who is in the channel.
    pub fn wants_presence(&self, number: u32) -> bool {
        if is_subscription(number) {
            return self.subscription(number).joining().is_some_and(|joining| joining.presence);
        }
        matches!(&self[number].state, State::Joining(join) if join.presence)
    }

    /// The name of the channel that a subscription waits to follow.
    pub fn awaited_channel(&self, number: u32) -> Option<&ChannelName> {
        self.subscription(number).joining().map(|joining| &joining.channel)
    }

    /// Replaces the last event of a client that waits to join.
    pub fn set_last_seen(&mut self, number: u32, last_seen: LastSeen) {
        match is_subscription(number) {
            true => {
                let phase = self.subscriptions[index(number)].phase.as_deref_mut();
                if let Some(Phase::Joining(joining)) = phase {
                    joining.last_seen = last_seen;
                }
            }
            false => {
                if let State::Joining(join) = &mut self[number].state {
                    join.last_seen = last_seen;
                }
            }
        }
    }

    /// Has a member follow the feed: the client has everything up to `position`, and `cursor` is
    /// next.
    pub fn start_live(&mut self, number: u32, feed: &Feed, cursor: Cursor, position: EventId) {
        *self.progress_mut(number) = Progress::new(feed, cursor, position);
        self.set_replay(number, None);
    }

    /// Has a member read from history what follows `position`.
    pub fn start_replay(&mut self, number: u32, feed: &Feed, position: EventId) {
        *self.progress_mut(number) = Progress::new(feed, Cursor::default(), position);
        self.set_replay(number, Some(Replay::default()));
    }

    /// Has a member follow the feed from `cursor`, where its position is.
    pub fn end_replay(&mut self, number: u32, feed: &Feed, cursor: Cursor, tally: &mut Tally) {
        self.progress_mut(number).leave_history(feed, cursor, tally);
        self.set_replay(number, None);
    }

    /// Has a member read history, or else follow the feed.
    fn set_replay(&mut self, number: u32, replay: Option<Replay>) {
        match is_subscription(number) {
            true => {
                let phase = replay.map(|replay| Box::new(Phase::Replay(replay)));
                self.subscriptions[index(number)].phase = phase;
            }
            false => self[number].state = replay.map_or(State::Live, State::Replay),
        }
    }

    // ---- history ----

    fn replay(&self, number: u32) -> Option<&Replay> {
        if is_subscription(number) {
            return match self.subscription(number).phase.as_deref() {
                Some(Phase::Replay(replay)) => Some(replay),
                _ => None,
            };
        }
        match &self[number].state {
            State::Replay(replay) => Some(replay),
            _ => None,
        }
    }

    /// How a member reads history, if it does.
    pub fn replay_mut(&mut self, number: u32) -> Option<&mut Replay> {
        if is_subscription(number) {
            return match self.subscriptions[index(number)].phase.as_deref_mut() {
                Some(Phase::Replay(replay)) => Some(replay),
                _ => None,
            };
        }
        match &mut self[number].state {
            State::Replay(replay) => Some(replay),
            _ => None,
        }
    }

    /// Whether a member waits to join.
    pub fn is_joining(&self, number: u32) -> bool {
        match is_subscription(number) {
            true => self.subscription(number).joining().is_some(),
            false => matches!(self[number].state, State::Joining(_)),
        }
    }

    /// Whether a member waits for a page of history.
    pub fn awaits_page(&self, number: u32) -> bool {
        self.is_joining(number) || self.replay(number).is_some_and(Replay::is_waiting)
    }

    /// Has a member wait for a page of history.
    pub fn wait_for_page(&mut self, number: u32) {
        if let Some(replay) = self.replay_mut(number) {
            replay.wait();
        }
    }

    /// Whether a member may ask for a page now. If another member of its connection waits for one,
    /// it asks after that: a connection takes history at one speed, however many channels it has,
    /// and a page that fills the socket is not read for each of them.
    pub fn may_read(&mut self, number: u32) -> bool {
        let owner = self.owner(number);
        if self.set(owner).is_none() {
            return true;
        }
        let may_read = self.reader(owner).is_none_or(|other| other == number);
        let set = self.set_mut(owner);
        if may_read {
            set.reading = number;
        } else if !set.reading_next.contains(&number) {
            set.reading_next.push_back(number);
        }
        may_read
    }

    /// The member that may ask for a page, since no other of this connection waits for one.
    pub fn next_reader(&mut self, owner: u32) -> Option<u32> {
        let set = self.set(owner)?;
        if set.reading_next.is_empty() || self.reader(owner).is_some() {
            return None;
        }
        self.set_mut(owner).reading_next.pop_front()
    }

    /// The member of a connection with several that waits for a page.
    fn reader(&self, owner: u32) -> Option<u32> {
        let reading = self.set(owner)?.reading;
        (reading != NONE && self.awaits_page(reading)).then_some(reading)
    }

    /// Whether a member may take more history in this tick.
    pub fn may_replay(&self, number: u32, tick: u32) -> bool {
        let of_set = self.set(self.owner(number)).is_none_or(|set| set.taken.may_take(tick));
        of_set && self.replay(number).is_some_and(|replay| replay.may_take(tick))
    }

    /// Counts bytes of history that were written to a member.
    pub fn count_replayed(&mut self, number: u32, bytes: u64, tick: u32) {
        if let Some(replay) = self.replay_mut(number) {
            replay.count(bytes, tick);
        }
        let owner = self.owner(number);
        if bytes > 0 && self.set(owner).is_some() {
            self.set_mut(owner).taken.count(bytes, tick);
        }
    }

    /// The size of the page of history to ask for now, in bytes.
    pub fn next_page_bytes(&mut self, number: u32) -> usize {
        match self.replay_mut(number) {
            Some(replay) => replay.next_page_bytes(),
            None => Replay::default().next_page_bytes(),
        }
    }
}
