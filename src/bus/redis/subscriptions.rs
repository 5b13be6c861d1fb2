//! What the bus does with channels that are followed: subscriptions, messages, reads.

use std::sync::Arc;
use std::time::{Duration, Instant};

use fred::types::Message;
use tokio::sync::broadcast::error::RecvError;

use super::commands::{Caller, Script};
use super::decode::FAULT;
use super::errors::CallError;
use super::followed::Follow;
use super::scripts::Wanted;
use super::settings::Lane;
use super::{Bus, Outcome, Purpose, advice, decode, scripts};
use crate::bus::{BusError, BusMessage, Page, ShardId, ShardSender};
use crate::protocol::event::{ChannelName, Entry, EventId, Kind};
use crate::protocol::ingest;

/// Events that one read brings when a hole is filled.
const FILL_EVENTS: u64 = 1024;

/// About how many bytes such a read brings: Redis serves nobody else while it reads them.
const READ_BYTES: usize = 1 << 20;

/// Least time between two warnings about oversized messages, and between two about messages shown as text.
const WARN_EVERY: Duration = Duration::from_secs(60);

impl Bus {
    pub(super) fn follow(&mut self, name: ChannelName, shard: ShardId) {
        let is_followed = self.channels.get(&name).is_some_and(|channel| channel.follow.is_some());
        let full = self.followed >= self.terms.max_channels;
        let refusal = if full { Some(BusError::TooManyChannels) } else { self.away() };
        // A refused channel is not remembered.
        if let Some(why) = refusal.filter(|_| !is_followed) {
            self.shards.send(shard, BusMessage::NotFollowed { channel: name, why });
            return;
        }
        let channel = self.channels.entry(name.clone()).or_default();
        match &mut channel.follow {
            Some(Follow { sequence: Some(sequence), followers, .. }) => {
                let other = followers.iter().find(|other| **other != shard);
                self.shards.share(name, sequence.base(), sequence.position(), other, shard);
                if !followers.contains(&shard) {
                    followers.push(shard);
                }
                return;
            }
            Some(follow) => {
                follow.joining.push(shard);
                return;
            }
            None => {}
        }
        self.ticket += 1;
        channel.follow = Some(Follow::new(shard, self.ticket));
        if !channel.in_rounds {
            channel.in_rounds = true;
            self.rounds.push_back(name.clone());
        }
        let session = self.link.session().expect("without a session the bus is away");
        session.subscribe(self.terms.lanes(&name), self.ticket);
        self.starting.push_back((self.ticket, name));
        self.count_followed(1);
    }

    pub(super) fn unfollow(&mut self, name: &ChannelName, shard: ShardId) {
        let Some(channel) = self.channels.get_mut(name) else { return };
        if channel.follow.as_mut().is_some_and(|follow| follow.leave(shard)) {
            self.let_go(name);
        }
    }

    /// Nobody here follows the channel any more: its position is forgotten.
    fn let_go(&mut self, name: &ChannelName) {
        let Some(channel) = self.channels.get_mut(name) else { return };
        if channel.follow.take().is_none() {
            return;
        }
        channel.used = Instant::now();
        if let Some(session) = self.link.session() {
            session.unsubscribe(self.terms.lanes(name));
        }
        self.count_followed(-1);
    }

    fn count_followed(&mut self, by: isize) {
        self.followed = self.followed.checked_add_signed(by).expect("only what is followed is let go");
        self.numbers.channels.set(self.followed as u64);
    }

    /// These subscriptions are in force: positions can be read.
    pub(super) fn start_follows(&mut self, ticket: u64) {
        while let Some((ticket, name)) = self.starting.front().cloned().filter(|(asked, _)| *asked <= ticket)
        {
            self.starting.pop_front();
            let channel = self.channels.get(&name).and_then(|channel| channel.follow.as_ref());
            if channel.is_some_and(|follow| follow.ticket == ticket && follow.sequence.is_none()) {
                self.read(&name, Purpose::Start(ticket));
            }
        }
    }

    /// The session is over: who waited to follow is told, who follows stays.
    pub(super) fn fail_joins(&mut self, why: &str) {
        let joining: Vec<_> = self.channels.iter().filter(|(_, channel)| is_joining(channel)).collect();
        let names: Vec<ChannelName> = joining.into_iter().map(|(name, _)| name.clone()).collect();
        for name in names {
            self.refuse_join(&name, why);
        }
    }

    fn refuse_join(&mut self, name: &ChannelName, why: &str) {
        let Some(follow) = self.channels.get_mut(name).and_then(|channel| channel.follow.as_mut()) else {
            return;
        };
        for shard in std::mem::take(&mut follow.joining) {
            let why = BusError::Away(why.into());
            self.shards.send(shard, BusMessage::NotFollowed { channel: name.clone(), why });
        }
        if follow.followers.is_empty() {
            self.let_go(name);
        }
    }

    pub(super) fn message(&mut self, message: Result<Message, RecvError>) {
        let message = match message {
            Ok(message) => message,
            Err(RecvError::Lagged(lost)) => {
                tracing::debug!("{lost} messages came faster than they were taken; history has them");
                return self.canary_soon();
            }
            Err(RecvError::Closed) => return self.session_over("the subscriptions were closed"),
        };
        let Some(text) = message.value.as_bytes() else { return };
        let terms = self.terms.clone();
        let (channel, entry) = match terms.lane(&message.channel) {
            Lane::Events(channel) => (channel, decode::broadcast(text)),
            Lane::Private(channel) => (channel, decode::private(text)),
            Lane::Canary => return self.canary_heard(text),
            Lane::Bare(channel) => return self.bare(channel, text),
        };
        let Some(entry) = entry else { return };
        let Some((name, channel)) = self.channels.get_key_value(channel) else { return };
        if channel.follow.is_none() {
            return; // unsubscribed, and this was still under way
        }
        let name = name.clone();
        let mut out = Vec::new();
        if let Some(follow) = self.channels.get_mut(&name).and_then(|channel| channel.follow.as_mut()) {
            follow.live(entry, &mut out);
        }
        self.hand_on(&name, out);
    }

    /// A plain PUBLISH of another program: shown to everyone at once, with no id.
    fn bare(&mut self, channel: &str, text: &[u8]) {
        let Some((name, channel)) = self.channels.get_key_value(channel) else { return };
        let Some(follow) = &channel.follow else { return };
        let Some(sequence) = &follow.sequence else { return };
        if text.len() > self.terms.max_message_size {
            self.numbers.oversized.add(1);
            if is_due(&mut self.warned_of_size) {
                tracing::warn!(channel = %name, bytes = text.len(), "message dropped: longer than --max-message-size");
            }
            return;
        }
        let Some(shown) = ingest::plain(text) else { return };
        if let Some(fault) = shown.fault
            && is_due(&mut self.warned_of_json)
        {
            tracing::warn!(channel = %name, "message of a plain PUBLISH shown as text: {fault}");
        }
        let entry = Entry::plain(sequence.position(), shown.event.as_bytes());
        tell(&*self.shards, &follow.followers, name, entry, Instant::now());
    }

    /// Gives entries to everyone who follows, and reads if there is a hole.
    pub(super) fn hand_on(&mut self, name: &ChannelName, entries: Vec<Entry>) {
        let Some(channel) = self.channels.get_mut(name) else { return };
        let Some(follow) = &mut channel.follow else { return };
        let arrived = Instant::now();
        for entry in entries {
            self.numbers.events.add(entry.ids());
            if entry.kind == Kind::Reset {
                self.numbers.resets.add(1);
            }
            tell(&*self.shards, &follow.followers, name, entry, arrived);
        }
        if let Some(sequence) = &follow.sequence {
            channel.known.learn(sequence.base(), sequence.position());
        }
        if self.link.session().is_some()
            && let Some(asked) = follow.ask()
        {
            self.read(name, Purpose::Fill(asked));
        }
    }

    pub(super) fn look(&mut self, name: ChannelName, shard: ShardId) {
        let away = self.away();
        let follow = self.channels.get_mut(&name).and_then(|channel| channel.follow.as_mut());
        let result = match (follow, away) {
            (Some(follow), None) if follow.sequence.is_some() => {
                follow.look(shard);
                return self.hand_on(&name, Vec::new());
            }
            (_, Some(away)) => Err(away),
            _ => Err(BusError::Away("the channel is not followed".into())),
        };
        self.shards.send(shard, BusMessage::Refreshed { channel: name, result });
    }

    /// Asks Redis where the channel stands and, to fill a hole, for what comes after a position.
    pub(super) fn read(&mut self, name: &ChannelName, purpose: Purpose) {
        let (Some(session), Some(channel)) = (self.link.session(), self.channels.get(name)) else { return };
        let (from, count) = match purpose {
            Purpose::Learn | Purpose::Start(_) => (EventId(0), 0),
            Purpose::Fill(asked) => {
                self.numbers.reads.add(1);
                (asked.next(), FILL_EVENTS)
            }
        };
        let wanted = Wanted {
            from,
            to: EventId(EventId::LIMIT - 1),
            events: count,
            bytes: READ_BYTES,
            shared_from: from,
            shared_bytes: 0,
        };
        let args = scripts::read_args(&self.terms, channel.known, wanted);
        let (caller, outcomes, reads) = (session.caller(), self.outcomes.clone(), self.reads.clone());
        let (key, generation, name) = (self.terms.key(name), self.link.generation(), name.clone());
        tokio::spawn(async move {
            let _permit = reads.acquire_owned().await;
            let mut result = read(&caller, &key, args).await;
            if let (Ok(page), Purpose::Fill(asked)) = (&mut result, purpose) {
                decode::whole(page, asked);
            }
            let _ = outcomes.send(Outcome::Read(generation, name, purpose, result));
        });
    }

    pub(super) fn was_read(
        &mut self,
        generation: u64,
        name: &ChannelName,
        purpose: Purpose,
        result: Result<Page, CallError>,
    ) {
        let Some(channel) = self.channels.get_mut(name) else { return };
        if matches!(purpose, Purpose::Learn) {
            channel.learning = false;
        }
        let page = match result {
            Ok(page) => page,
            Err(error) => return self.read_failed(generation, name, purpose, &error),
        };
        channel.known.learn(page.base, page.head);
        let mut out = Vec::new();
        match (purpose, &mut channel.follow) {
            (Purpose::Learn, _) => self.touched.push(name.clone()),
            (Purpose::Start(ticket), Some(follow))
                if follow.ticket == ticket && follow.sequence.is_none() =>
            {
                for shard in follow.start(page.base, page.head, &mut out) {
                    self.shards.share(name.clone(), page.base, page.head, None, shard);
                }
                self.hand_on(name, out);
            }
            (Purpose::Fill(asked), Some(follow)) => {
                let looked = follow.answer(asked, &page, &mut out);
                let events = out.iter().any(|entry| entry.ids() > 0);
                if events && !out.iter().any(|entry| entry.kind == Kind::Reset) {
                    self.numbers.gaps_filled.add(1);
                }
                self.hand_on(name, out);
                for shard in looked {
                    self.shards.send(shard, BusMessage::Refreshed { channel: name.clone(), result: Ok(()) });
                }
            }
            _ => {} // let go meanwhile
        }
    }

    fn read_failed(&mut self, generation: u64, name: &ChannelName, purpose: Purpose, error: &CallError) {
        let text: Arc<str> = advice::of(error).into();
        let follow = self.channels.get_mut(name).and_then(|channel| channel.follow.as_mut());
        match (purpose, follow) {
            // The channel can't be published to either, and the next tick would read it again.
            (Purpose::Learn, _) if matches!(error, CallError::Refused(words) if words.starts_with(FAULT)) => {
                self.refuse_unsent(name, &text);
            }
            (Purpose::Start(ticket), Some(follow)) if follow.ticket == ticket => {
                self.refuse_join(name, &text)
            }
            (Purpose::Fill(_), Some(follow)) => {
                for shard in follow.failed() {
                    let result = Err(BusError::Away(text.clone()));
                    self.shards.send(shard, BusMessage::Refreshed { channel: name.clone(), result });
                }
            }
            _ => {}
        }
        self.judge(generation, error);
    }
}

/// Whether a minute has passed since the last warning; then a new minute starts.
fn is_due(warned: &mut Option<Instant>) -> bool {
    let due = warned.is_none_or(|at| at.elapsed() > WARN_EVERY);
    if due {
        *warned = Some(Instant::now());
    }
    due
}

fn is_joining(channel: &super::Channel) -> bool {
    channel.follow.as_ref().is_some_and(|follow| !follow.joining.is_empty())
}

fn tell(shards: &dyn ShardSender, followers: &[ShardId], name: &ChannelName, entry: Entry, arrived: Instant) {
    for shard in followers {
        shards.send(*shard, BusMessage::Entry { channel: name.clone(), entry: entry.clone(), arrived });
    }
}

pub(super) async fn read(
    caller: &Caller,
    key: &str,
    args: Vec<fred::types::Value>,
) -> Result<Page, CallError> {
    let frame = caller.call(Script::Read, &[key], args).await?;
    scripts::page(&frame).ok_or_else(|| CallError::Refused("an answer of a form that no script gives".into()))
}
