//! Followed channels: subscriptions, messages, and reads that fill gaps.

use std::sync::Arc;
use std::time::{Duration, Instant};

use fred::types::{Message, Value};
use tokio::sync::Semaphore;
use tokio::sync::broadcast::error::RecvError;

use super::commands::{Commands, Script};
use super::errors::{CallError, ELSEWHERE};
use super::followed::FollowedChannel;
use super::primaries::SessionId;
use super::scripts::ReadRange;
use super::settings::Topic;
use super::{Bus, Channel, Outcome, advice, decode, scripts};
use crate::bus::{BusError, BusMessage, Follower, Page};
use crate::metrics::WarningLimit;
use crate::protocol::event::{ChannelName, Entry, EventId, Kind};
use crate::protocol::ingest;

/// Most events in one read that fills a gap.
const FILL_EVENTS: u64 = 1024;

/// About how many bytes such a read returns: Redis executes nothing else meanwhile.
const FILL_BYTES: usize = 1 << 20;

/// Why a channel is read.
#[derive(Clone, Copy, Debug)]
pub(super) enum ReadPurpose {
    /// For its base, before the first publish.
    LoadBase,
    /// For its position, after the subscription with this ticket.
    Start(u64),
    /// For the events after this position.
    Fill(EventId),
}

/// What concerns the subscriptions of all channels.
#[derive(Debug, Default)]
pub(super) struct Subscriptions {
    /// Number of followed channels.
    followed: usize,
    last_ticket: u64,
    oversized: WarningLimit,
    not_json: WarningLimit,
}

impl Subscriptions {
    /// Tickets rise. Redis confirms subscriptions in their order.
    pub(super) fn next_ticket(&mut self) -> u64 {
        self.last_ticket += 1;
        self.last_ticket
    }
}

impl Bus {
    pub(super) fn follow(&mut self, name: ChannelName, follower: Follower) {
        let known = self.channels.get(&name);
        let is_followed = known.is_some_and(|channel| channel.followed.is_some());
        let primary = known.map_or_else(|| self.primaries.of(&name), |channel| channel.primary);
        let full = self.subscriptions.followed >= self.handles.settings.max_channels;
        let error = if full { Some(BusError::TooManyChannels) } else { self.unavailable(primary) };
        // A channel that can't be followed must not be remembered.
        if let Some(why) = error.filter(|_| !is_followed) {
            let channel = follower.channel(&name);
            self.handles.shards.send(follower.shard, BusMessage::NotFollowed { channel, why });
            return;
        }
        let channel = self.channels.entry(name.clone()).or_insert_with(|| Box::new(Channel::at(primary)));
        match &mut channel.followed {
            Some(FollowedChannel { sequence: Some(sequence), followers, .. }) => {
                let (base, position) = (sequence.base(), sequence.position());
                self.handles.shards.share(&name, base, position, followers, follower);
                if !followers.contains(&follower) {
                    followers.push(follower);
                }
                return;
            }
            Some(followed) => {
                followed.joining.push(follower);
                return;
            }
            None => {}
        }
        self.subscribe(name, vec![follower]);
        self.change_followed(1);
    }

    /// Subscribes to a channel that these shards are going to follow. Its primary has a session.
    pub(super) fn subscribe(&mut self, name: ChannelName, joining: Vec<Follower>) {
        let primary = self.primaries.of(&name);
        let session = self.primaries[primary].link.session();
        let session = session.expect("without a session the primary is unavailable");
        let ticket = self.subscriptions.next_ticket();
        session.subscribe(self.handles.settings.topics(&name), ticket);
        self.start_following(name, joining, ticket);
    }

    /// Notes that the subscription to a channel is under way.
    pub(super) fn start_following(&mut self, name: ChannelName, joining: Vec<Follower>, ticket: u64) {
        let primary = self.primaries.of(&name);
        let channel = self.channels.entry(name.clone()).or_insert_with(|| Box::new(Channel::at(primary)));
        channel.followed = Some(FollowedChannel::new(joining, ticket));
        if !channel.in_rotation {
            channel.in_rotation = true;
            self.primaries[primary].probes.add(name.clone());
        }
        self.primaries[primary].starting.push_back((ticket, name));
    }

    /// Moves the channels whose slots have another primary now. What they miss until they are
    /// subscribed there is read.
    pub(super) fn move_channels(&mut self) {
        let mut moved = Vec::new();
        for (name, channel) in &mut self.channels {
            let (from, to) = (channel.primary, self.primaries.of(name));
            if from == to {
                continue;
            }
            channel.primary = to;
            self.primaries[from].queued_bytes -= channel.queue.bytes();
            self.primaries[to].queued_bytes += channel.queue.bytes();
            self.publishing.mark_changed(name.clone());
            if channel.in_rotation {
                self.primaries[to].probes.add(name.clone());
            }
            moved.push((name.clone(), from, to));
        }
        if moved.is_empty() {
            return;
        }
        tracing::info!(channels = moved.len(), "slots of the cluster have moved");
        for primary in self.primaries.numbers() {
            let channels = &self.channels;
            let is_here =
                |name: &ChannelName| channels.get(name).is_some_and(|channel| channel.primary == primary);
            self.primaries[primary].probes.retain(is_here);
        }
        for (name, from, to) in moved {
            let Some(followed) = self.channels.get_mut(&name).and_then(|channel| channel.followed.as_mut())
            else {
                continue;
            };
            if let Some(session) = self.primaries[from].link.session() {
                session.unsubscribe(self.handles.settings.topics(&name));
            }
            // A session that is made later subscribes to all channels of its primary.
            if let Some(session) = self.primaries[to].link.session() {
                let ticket = self.subscriptions.next_ticket();
                followed.ticket = ticket;
                session.subscribe(self.handles.settings.topics(&name), ticket);
                self.primaries[to].starting.push_back((ticket, name));
            } else if followed.sequence.is_none()
                && let Some(BusError::Unavailable(why)) = self.unavailable(to)
            {
                self.fail_join(&name, &why);
            }
        }
    }

    /// Its slots are at other primaries, and its channels have been moved.
    pub(super) fn remove_primary(&mut self, primary: usize) {
        let mut removed = self.primaries.remove(primary);
        if let (Some(topology), Some(address)) = (&self.topology, &removed.address) {
            topology.peers.remove(address);
        }
        let why = BusError::Unavailable("the primary of this channel was replaced".into());
        for (name, reader, position) in removed.pages.drain() {
            self.handles.shards.send_page(reader, name, position, Err(why.clone()));
        }
    }

    pub(super) fn unfollow(&mut self, name: &ChannelName, follower: Follower) {
        let Some(channel) = self.channels.get_mut(name) else { return };
        if channel.followed.as_mut().is_some_and(|followed| followed.remove(follower)) {
            self.unsubscribe(name);
        }
    }

    /// No shard follows the channel any more.
    fn unsubscribe(&mut self, name: &ChannelName) {
        let Some(channel) = self.channels.get_mut(name) else { return };
        if channel.followed.take().is_none() {
            return;
        }
        channel.last_used = Instant::now();
        if let Some(session) = self.primaries[channel.primary].link.session() {
            session.unsubscribe(self.handles.settings.topics(name));
        }
        if !name.is_control() {
            self.change_followed(-1);
        }
    }

    fn change_followed(&mut self, by: isize) {
        let followed = self.subscriptions.followed.checked_add_signed(by);
        self.subscriptions.followed = followed.expect("only followed channels are unsubscribed");
        self.handles.metrics.channels.set(self.subscriptions.followed as u64);
    }

    /// Redis has confirmed all subscriptions up to `ticket`. From here on the channels' positions
    /// can be read.
    pub(super) fn on_subscribed(&mut self, primary: usize, ticket: u64) {
        if self.primaries[primary].link.confirm(ticket) {
            if self.control_primary() != primary {
                self.probe_all(primary);
            } else if self.control_position().is_some() {
                self.read_bans();
            }
        }
        while let Some((ticket, name)) = self.primaries[primary].next_confirmed(ticket) {
            let followed = self.channels.get_mut(&name).and_then(|channel| channel.followed.as_mut());
            let Some(followed) = followed.filter(|followed| followed.ticket == ticket) else { continue };
            match &mut followed.sequence {
                None => self.read(&name, ReadPurpose::Start(ticket)),
                // It was moved here.
                Some(sequence) => {
                    sequence.refresh();
                    self.deliver(&name, Vec::new());
                }
            }
        }
    }

    /// The session has closed: shards that are joining get an error, shards that follow stay.
    pub(super) fn fail_joins(&mut self, primary: usize, why: &str) {
        let joining = |channel: &Channel| {
            channel.primary == primary
                && channel.followed.as_ref().is_some_and(|followed| !followed.joining.is_empty())
        };
        let names =
            self.channels.iter().filter(|(_, channel)| joining(channel)).map(|(name, _)| name.clone());
        for name in names.collect::<Vec<_>>() {
            self.fail_join(&name, why);
        }
    }

    fn fail_join(&mut self, name: &ChannelName, why: &str) {
        let Some(followed) = self.channels.get_mut(name).and_then(|channel| channel.followed.as_mut()) else {
            return;
        };
        for follower in std::mem::take(&mut followed.joining) {
            let (channel, why) = (follower.channel(name), BusError::Unavailable(why.into()));
            self.handles.shards.send(follower.shard, BusMessage::NotFollowed { channel, why });
        }
        if followed.followers.is_empty() {
            self.unsubscribe(name);
        }
    }

    pub(super) fn on_message(&mut self, primary: usize, message: Result<Message, RecvError>) {
        let message = match message {
            Ok(message) => message,
            Err(RecvError::Lagged(lost)) => {
                tracing::debug!(lost, "dropped messages that came too fast, reading history");
                return self.primaries[primary].probes.send_soon();
            }
            Err(RecvError::Closed) => return self.close_session(primary, "the subscriptions were closed"),
        };
        let Some(text) = message.value.as_bytes() else { return };
        let settings = self.handles.settings.clone();
        let (channel, entry) = match settings.topic(&message.channel) {
            Topic::Events(channel) => (channel, decode::broadcast(text)),
            Topic::Private(channel) => (channel, decode::private(text)),
            Topic::Probe => return self.on_probe(primary, text),
            Topic::External(channel) => return self.on_external_message(primary, channel, text),
        };
        let Some(entry) = entry else { return };
        let Some((name, channel)) = self.channels.get_key_value(channel) else { return };
        if channel.followed.is_none() {
            return; // unsubscribed while the message was in flight
        }
        let name = name.clone();
        let mut out = Vec::new();
        if let Some(followed) = self.channels.get_mut(&name).and_then(|channel| channel.followed.as_mut()) {
            followed.on_live(entry, &mut out);
        }
        self.deliver(&name, out);
    }

    /// `PUBLISH` of another program: clients get it at once, without an id. A cluster brings it to
    /// all sessions that are subscribed, which may be two while the channel moves.
    fn on_external_message(&mut self, primary: usize, channel: &str, text: &[u8]) {
        let Some((name, channel)) = self.channels.get_key_value(channel) else { return };
        if channel.primary != primary {
            return;
        }
        let Some(followed) = &channel.followed else { return };
        let Some(sequence) = &followed.sequence else { return };
        if text.len() > self.handles.settings.max_message_size {
            self.handles.metrics.oversized.add(1);
            if self.subscriptions.oversized.is_due(Instant::now()) {
                tracing::warn!(
                    channel = %name, bytes = text.len(),
                    "dropped Pub/Sub message longer than --max-message-size"
                );
            }
            return;
        }
        let Some(shown) = ingest::external(text) else { return };
        if let Some(error) = shown.fault
            && self.subscriptions.not_json.is_due(Instant::now())
        {
            tracing::warn!(channel = %name, "sent Pub/Sub message as text: {error}");
        }
        let entry = Entry::without_id(sequence.position(), shown.event.as_bytes());
        self.handles.shards.send_entry(name, &entry, &followed.followers, Instant::now());
    }

    /// Sends entries to the followers. Reads if there is a gap.
    pub(super) fn deliver(&mut self, name: &ChannelName, entries: Vec<Entry>) {
        let Some(channel) = self.channels.get_mut(name) else { return };
        let Some(followed) = &mut channel.followed else { return };
        let arrived = Instant::now();
        for entry in entries {
            if name.is_control() {
                self.control.on_entry(&entry);
                continue;
            }
            self.handles.metrics.events.add(entry.ids());
            if entry.kind == Kind::Reset {
                self.handles.metrics.resets.add(1);
            }
            self.handles.shards.send_entry(name, &entry, &followed.followers, arrived);
        }
        if let Some(sequence) = &followed.sequence {
            channel.known.update(sequence.base(), sequence.position());
            if name.is_control() {
                self.control.answer_up_to(sequence.position());
            }
        }
        if self.primaries[channel.primary].link.session().is_some()
            && let Some(position) = followed.start_read()
        {
            self.read(name, ReadPurpose::Fill(position));
        }
    }

    pub(super) fn refresh(&mut self, name: ChannelName, follower: Follower) {
        let unavailable = self.channels.get(&name).and_then(|channel| self.unavailable(channel.primary));
        let followed = self.channels.get_mut(&name).and_then(|channel| channel.followed.as_mut());
        let result = match (followed, unavailable) {
            (Some(followed), None) if followed.sequence.is_some() => {
                followed.refresh(follower);
                return self.deliver(&name, Vec::new());
            }
            (_, Some(error)) => Err(error),
            _ => Err(BusError::Unavailable("the channel is not followed".into())),
        };
        let channel = follower.channel(&name);
        self.handles.shards.send(follower.shard, BusMessage::Refreshed { channel, result });
    }

    /// Reads a channel's base and head, and with [`ReadPurpose::Fill`] the events after a position.
    pub(super) fn read(&mut self, name: &ChannelName, purpose: ReadPurpose) {
        let Some(channel) = self.channels.get(name) else { return };
        let primary = &self.primaries[channel.primary];
        let Some(session) = primary.link.session() else { return };
        let (from, events) = match purpose {
            ReadPurpose::LoadBase | ReadPurpose::Start(_) => (EventId(0), 0),
            ReadPurpose::Fill(position) => {
                self.handles.metrics.reads.add(1);
                (position.next(), FILL_EVENTS)
            }
        };
        let range = ReadRange {
            from,
            to: EventId(EventId::LIMIT - 1),
            events,
            bytes: FILL_BYTES,
            shared_from: from,
            shared_bytes: 0,
        };
        let args = scripts::read_args(&self.handles.settings, channel.known, range);
        let (commands, outcomes, reads) =
            (session.commands(), self.handles.outcomes.clone(), primary.reads.clone());
        let key = self.handles.settings.channel_key(name);
        let (id, name) = (self.primaries.session_id(channel.primary), name.clone());
        tokio::spawn(async move {
            let mut result = read_page(&commands, &reads, &key, args).await;
            if let (Ok(page), ReadPurpose::Fill(position)) = (&mut result, purpose) {
                decode::make_consistent(page, position);
            }
            let _ = outcomes.send(Outcome::Read(id, name, purpose, result));
        });
    }

    pub(super) fn on_read(
        &mut self,
        session: SessionId,
        name: &ChannelName,
        purpose: ReadPurpose,
        result: Result<Page, CallError>,
    ) {
        let Some(channel) = self.channels.get_mut(name) else { return };
        if matches!(purpose, ReadPurpose::LoadBase) {
            channel.loading_base = false;
        }
        let page = match result {
            Ok(page) => page,
            Err(error) => return self.on_read_failed(session, name, purpose, &error),
        };
        channel.known.update(page.base, page.head);
        let mut out = Vec::new();
        match (purpose, &mut channel.followed) {
            (ReadPurpose::LoadBase, _) => self.publishing.mark_changed(name.clone()),
            (ReadPurpose::Start(ticket), Some(followed))
                if followed.ticket == ticket && followed.sequence.is_none() =>
            {
                for follower in followed.start(page.base, page.head, &mut out) {
                    self.handles.shards.share(name, page.base, page.head, &[], follower);
                }
                if name.is_control() {
                    self.on_control_started(page.head);
                }
                self.deliver(name, out);
            }
            (ReadPurpose::Fill(position), Some(followed)) => {
                let refreshed = followed.on_page(position, &page, &mut out);
                let events = out.iter().any(|entry| entry.ids() > 0);
                if events && !out.iter().any(|entry| entry.kind == Kind::Reset) {
                    self.handles.metrics.gaps_filled.add(1);
                }
                self.deliver(name, out);
                for follower in refreshed {
                    let message = BusMessage::Refreshed { channel: follower.channel(name), result: Ok(()) };
                    self.handles.shards.send(follower.shard, message);
                }
            }
            _ => {} // no longer followed
        }
    }

    fn on_read_failed(
        &mut self,
        session: SessionId,
        name: &ChannelName,
        purpose: ReadPurpose,
        error: &CallError,
    ) {
        let why: Arc<str> = advice::for_call(error).into();
        let followed = self.channels.get_mut(name).and_then(|channel| channel.followed.as_mut());
        match (purpose, followed) {
            // Publishing to the channel fails as well, and the next tick would read it again.
            (ReadPurpose::LoadBase, _) if error.is_fault() => self.reject_unsent(name, &why),
            (ReadPurpose::Start(ticket), Some(followed)) if followed.ticket == ticket => {
                self.fail_join(name, &why);
                if name.is_control() {
                    self.on_control_failed(error);
                }
            }
            (ReadPurpose::Fill(_), Some(followed)) => {
                for follower in followed.on_read_failed() {
                    let result = Err(BusError::Unavailable(why.clone()));
                    let message = BusMessage::Refreshed { channel: follower.channel(name), result };
                    self.handles.shards.send(follower.shard, message);
                }
            }
            _ => {}
        }
        self.on_call_error(session, error);
    }
}

/// How long a read is repeated while its channel's slot moves.
const MOVE_TIMEOUT: Duration = Duration::from_secs(2);

/// Time between two such reads.
const MOVE_INTERVAL: Duration = Duration::from_millis(20);

pub(super) async fn read_page(
    commands: &Commands,
    reads: &Semaphore,
    key: &str,
    args: Vec<Value>,
) -> Result<Page, CallError> {
    let deadline = Instant::now() + MOVE_TIMEOUT;
    let frame = loop {
        let permit = reads.acquire().await;
        let result = commands.run(Script::Read, key, args.clone()).await;
        drop(permit);
        match result {
            Err(CallError::ErrorReply(text)) if &*text == ELSEWHERE && Instant::now() < deadline => {
                tokio::time::sleep(MOVE_INTERVAL).await;
            }
            result => break result?,
        }
    };
    scripts::parse_page(&frame).ok_or_else(|| CallError::unexpected_reply("read.lua"))
}
