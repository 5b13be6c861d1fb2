//! Which users this node has in the channels of `--presence`, kept in Redis: see `presence.lua`.
//!
//! Nothing is written for a connection, only for the first of a user and the last. A channel has at
//! most one call in flight; calls are for many channels. A call without a reply is made again with a
//! new number: what it did is done once, since it adds to sets.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use fred::types::{Resp3Frame, Value};
use tokio::sync::oneshot;

use super::commands::{Commands, Script};
use super::errors::CallError;
use super::primaries::{FIRST, SessionId}; // there is no --presence on a cluster
use super::scripts::number;
use super::{Bus, Outcome, advice, reply};
use crate::bus::presence::{Change, LINGER, Snapshot, TrackedChannel, TrackedChannels};
use crate::bus::{BusError, Follower, PresencePage, ShardSender};
use crate::config::Settings;
use crate::metrics::WarningLimit;
use crate::protocol::event::ChannelName;

/// With `allow-oom`: a node must renew its leases when Redis is out of memory, too. Users take some
/// 100 bytes each.
pub const UPDATE_SCRIPT: &str = concat!(
    "#!lua flags=allow-oom\n",
    include_str!("lua/epoch.lua"),
    "\n",
    include_str!("lua/presence.lua"),
    "\n",
    include_str!("lua/presence_update.lua"),
);

/// With `allow-oom`, as [`UPDATE_SCRIPT`].
pub const READ_SCRIPT: &str = concat!(
    "#!lua flags=allow-oom\n",
    include_str!("lua/epoch.lua"),
    "\n",
    include_str!("lua/presence.lua"),
    "\n",
    include_str!("lua/presence_read.lua"),
);

/// Time between two calls for a channel without changes: they renew the lease of this node.
const RENEWAL_INTERVAL: Duration = Duration::from_secs(2);

/// Time between two readings of who is in a channel, while clients of this node want to know it.
const READ_INTERVAL: Duration = Duration::from_secs(1);

/// How long a node counts as alive after a call. presence.lua has the same time.
const LEASE: Duration = Duration::from_secs(12);

// Users of a node that is gone have the same time to come back as others.
const _: () = assert!(LEASE.as_millis() >= LINGER.as_millis() + RENEWAL_INTERVAL.as_millis());

/// Most changes in one call: some 3 ms of Redis' time.
const CHANGES_MAX: usize = 500;

/// Listing this many users takes as long as a change.
const READ_USERS_PER_CHANGE: usize = 20;

/// Most channels in one call: some 2 ms of Redis' time.
const CHANNELS_MAX: usize = 250;

/// Most calls for one page while users of nodes that are gone are removed: 500 in each.
const READS_MAX: usize = 1000;

const UNSETTLED: &str =
    "Redis lost the users of this channel and nodes are adding them again: try again in 5 seconds";

/// What is kept for a channel.
#[derive(Debug, Default)]
struct ChannelCalls {
    /// The generation in which users of this node are stored. `None` before the first reply and after
    /// a loss.
    generation: Option<u64>,
    /// The changes of the call in flight.
    in_flight: Option<Vec<Change>>,
    /// In [`Presence::ready`].
    is_ready: bool,
    /// When the lease is renewed.
    renewal: Option<Instant>,
    /// Up to where the audience knows who is in the channel; `None`: all must be read.
    seen: Option<SeenPresence>,
    /// When to read again who is in the channel.
    next_read: Option<Instant>,
}

/// A position in the joins and leaves of a channel.
#[derive(Debug)]
struct SeenPresence {
    generation: u64,
    version: u64,
    /// The last entry of the stream.
    entry: String,
}

/// What a reply says about one channel.
#[derive(Debug, PartialEq, Eq)]
enum Reply {
    Stored {
        generation: u64,
        has_more: bool,
        read: Option<PresenceRead>,
    },
    /// All users must be stored again.
    Lost,
    /// A call with this number came before.
    Late(u64),
    Fault(String),
    /// There was no reply.
    Unknown,
}

/// Who is in a channel.
#[derive(Debug, PartialEq, Eq)]
struct PresenceRead {
    version: u64,
    entry: String,
    settled: bool,
    /// `None`: as before.
    snapshot: Option<Snapshot>,
}

#[derive(Debug)]
pub(super) struct Presence {
    channels: TrackedChannels<ChannelCalls>,
    /// Channels with a call to make.
    ready: VecDeque<ChannelName>,
    /// Channels whose lease is renewed later, in this order. Some had another call meanwhile.
    renewals: VecDeque<(Instant, ChannelName)>,
    /// The number of the last call.
    last_number: u64,
    /// Redis has answered a call with an error: when to make the next.
    retry: Option<Instant>,
    /// `--presence-list`
    list_max: usize,
    warnings: WarningLimit,
}

impl Presence {
    pub(super) fn new(settings: &Settings) -> Presence {
        Presence {
            channels: TrackedChannels::new(settings),
            ready: VecDeque::new(),
            renewals: VecDeque::new(),
            last_number: 0,
            retry: None,
            list_max: settings.presence_list,
            warnings: WarningLimit::default(),
        }
    }

    /// A user's first member on a shard has joined, or the last has left.
    pub(super) fn on_user(&mut self, name: ChannelName, user: Arc<str>, present: bool) {
        if present {
            self.channels.enter(&name, user);
            self.mark_ready(&name);
        } else {
            self.channels.leave(name, user, Instant::now());
        }
    }

    fn expire(&mut self, now: Instant) {
        while let Some(name) = self.channels.expire_next(now) {
            self.mark_ready(&name);
        }
        while let Some((due, name)) = self.renewals.pop_front_if(|(due, _)| *due <= now) {
            if self.channels.get(&name).is_some_and(|channel| channel.state.renewal == Some(due)) {
                self.mark_due(&name);
            }
        }
    }

    /// Marks a channel if it has changes.
    fn mark_ready(&mut self, name: &ChannelName) {
        if self.channels.get(name).is_some_and(|channel| channel.users().has_changes()) {
            self.mark_due(name);
        }
    }

    /// Marks a channel. One with a call in flight is marked again after it.
    fn mark_due(&mut self, name: &ChannelName) {
        let Some(channel) = self.channels.get_mut(name) else { return };
        if !channel.state.is_ready && channel.state.in_flight.is_none() {
            channel.state.is_ready = true;
            self.ready.push_back(name.clone());
        }
    }

    /// A shard has its first client that wants to know who is in a channel, or lost the last one.
    fn follow(&mut self, name: &ChannelName, follower: Follower, follow: bool, shards: &dyn ShardSender) {
        if !follow {
            if let Some(channel) = self.channels.get_mut(name) {
                channel.audience.remove(follower);
            }
            return;
        }
        let channel = self.channels.get_or_add(name);
        if channel.audience.is_empty() {
            (channel.state.seen, channel.state.next_read) = (None, None);
        }
        channel.audience.add(name, follower, shards);
        self.mark_due(name);
    }

    /// Adds channels to the arguments of [`UPDATE_SCRIPT`]. Returns them.
    fn take_ready(&mut self, args: &mut Vec<Value>, now: Instant) -> Vec<ChannelName> {
        let (mut names, mut left) = (Vec::new(), CHANGES_MAX);
        while names.len() < CHANNELS_MAX && left > 0 {
            let Some(name) = self.ready.pop_front() else { break };
            let changes = self.channels.change_users(&name, |users| users.next_changes(left));
            let changes = changes.unwrap_or_default();
            if changes.is_empty() && self.channels.remove_unused(&name) {
                continue;
            }
            let Some(TrackedChannel { audience, state, .. }) = self.channels.get_mut(&name) else { continue };
            state.is_ready = false;
            left = left.saturating_sub(changes.len());
            args.extend([Value::from(name.as_str()), number(state.generation.unwrap_or(0))]);
            let reads = !audience.is_empty() && state.next_read.is_none_or(|at| at <= now);
            if reads {
                let users = audience.list_max(self.list_max);
                left = left.saturating_sub(users / READ_USERS_PER_CHANGE);
                let seen = state.seen.as_ref();
                let (generation, version, entry) =
                    seen.map_or((0, 0, "0-0"), |seen| (seen.generation, seen.version, &*seen.entry));
                args.extend([number(users as u64), number(generation), number(version), Value::from(entry)]);
            } else {
                args.extend([""; 4].map(Value::from));
            }
            let adds = changes.iter().filter(|change| change.present);
            let removes = changes.iter().filter(|change| !change.present);
            args.extend([number(adds.clone().count() as u64), number(removes.clone().count() as u64)]);
            args.extend(adds.chain(removes).map(|change| Value::from(&*change.user)));
            state.in_flight = Some(changes);
            names.push(name);
        }
        names
    }

    /// Handles the reply for a channel.
    fn on_reply(&mut self, name: &ChannelName, reply: &Reply, now: Instant) {
        let Some(channel) = self.channels.get_mut(name) else { return };
        let Some(changes) = channel.state.in_flight.take() else { return };
        let interval = if channel.audience.is_empty() { RENEWAL_INTERVAL } else { READ_INTERVAL };
        channel.state.renewal = Some(now + interval);
        let mut is_due = false;
        match reply {
            Reply::Stored { generation, has_more, .. } => {
                channel.state.generation = Some(*generation);
                is_due = *has_more;
            }
            Reply::Lost => {
                channel.state.generation = None;
                is_due = true;
            }
            Reply::Late(number) => self.last_number = self.last_number.max(*number),
            Reply::Fault(_) | Reply::Unknown => {}
        }
        self.channels.change_users(name, |users| match reply {
            Reply::Stored { .. } => users.on_stored(&changes),
            Reply::Lost => users.on_lost(),
            Reply::Late(_) | Reply::Fault(_) | Reply::Unknown => users.on_unknown(&changes),
        });
        self.renewals.push_back((now + interval, name.clone()));
        if is_due {
            self.mark_due(name);
        } else if !matches!(reply, Reply::Fault(_) | Reply::Unknown) {
            self.mark_ready(name); // after an error the next call waits for the renewal
        }
    }

    /// Tells the audience of a channel what was read.
    fn on_read(&mut self, name: &ChannelName, reply: Reply, now: Instant, shards: &dyn ShardSender) {
        let Reply::Stored { generation, read: Some(read), .. } = reply else { return };
        let Some(channel) = self.channels.get_mut(name) else { return };
        channel.state.next_read = Some(now + READ_INTERVAL);
        let is_list = !matches!(read.snapshot, Some(Snapshot::Count(_)));
        channel.state.seen = (read.settled && is_list).then_some(SeenPresence {
            generation,
            version: read.version,
            entry: read.entry,
        });
        if let Some(snapshot) = read.snapshot {
            channel.audience.update(name, snapshot, read.settled, shards);
        }
    }

    pub(super) fn shrink(&mut self) {
        self.channels.shrink();
        self.ready.shrink_to(2 * self.ready.len());
        self.renewals.shrink_to(2 * self.renewals.len());
    }
}

impl Bus {
    pub(super) fn update_presence(&mut self, now: Instant) {
        self.presence.expire(now);
        self.call_presence();
    }

    /// Makes one call for the channels that need one.
    fn call_presence(&mut self) {
        let open = self.primaries[FIRST].link.session();
        let is_ready =
            !self.presence.ready.is_empty() && self.presence.retry.is_none_or(|at| at <= Instant::now());
        let Some(session) = open.filter(|_| is_ready) else { return };
        let settings = &self.handles.settings;
        self.presence.last_number += 1;
        let mut args = vec![
            Value::from_static_str(settings.kind.name()),
            Value::from(settings.prefix.as_str()),
            Value::from(settings.node.as_str()),
            number(self.presence.last_number),
            number(settings.history),
            number(settings.history_ttl_ms),
        ];
        let names = self.presence.take_ready(&mut args, Instant::now());
        if names.is_empty() {
            return;
        }
        let (commands, outcomes) = (session.commands(), self.handles.outcomes.clone());
        let id = self.primaries.session_id(FIRST);
        let topic = settings.probe_topic(id.generation);
        tokio::spawn(async move {
            let result = commands.run(Script::UpdatePresence, &topic, args).await;
            let _ = outcomes.send(Outcome::PresenceUpdated(id, names, result));
        });
    }

    pub(super) fn on_presence_updated(
        &mut self,
        session: SessionId,
        names: &[ChannelName],
        result: Result<Resp3Frame, CallError>,
    ) {
        let now = Instant::now();
        let replies = result.as_ref().ok().and_then(reply::array).unwrap_or_default();
        for (at, name) in names.iter().enumerate() {
            let reply = replies.get(at).map_or(Reply::Unknown, |frame| parse_reply(&reply::texts(frame)));
            if let Reply::Fault(error) = &reply
                && self.presence.warnings.is_due(now)
            {
                tracing::warn!(channel = %name, error, "presence not stored");
            }
            self.presence.on_reply(name, &reply, now);
            self.presence.on_read(name, reply, now, &*self.handles.shards);
        }
        self.handles.metrics.presence_users.set(self.presence.channels.user_count() as u64);
        match result {
            Ok(_) => self.call_presence(),
            Err(error) => {
                if let CallError::ErrorReply(text) = &error {
                    self.presence.retry = Some(now + RENEWAL_INTERVAL);
                    if self.presence.warnings.is_due(now) {
                        let advice = advice::for_error_reply(text);
                        tracing::warn!(error = &**text, advice, "presence not stored");
                    }
                }
                self.on_call_error(session, &error);
            }
        }
    }

    pub(super) fn follow_presence(&mut self, name: &ChannelName, follower: Follower, follow: bool) {
        self.presence.follow(name, follower, follow, &*self.handles.shards);
    }

    pub(super) fn read_presence(
        &self,
        channel: &ChannelName,
        from: Option<String>,
        limit: usize,
        mut answer: oneshot::Sender<Result<PresencePage, BusError>>,
    ) {
        let session = match self.usable_session(FIRST) {
            Ok(session) => session,
            Err(why) => {
                let _ = answer.send(Err(why)); // fails if the task no longer waits
                return;
            }
        };
        let settings = &self.handles.settings;
        let generation = self.presence.channels.get(channel).and_then(|channel| channel.state.generation);
        let args = vec![
            Value::from_static_str(settings.kind.name()),
            number(settings.history),
            number(settings.history_ttl_ms),
            Value::from(from.unwrap_or_else(|| "0".into())),
            number(limit as u64),
            number(generation.unwrap_or(0)),
        ];
        let (commands, reads) = (session.commands(), self.primaries[FIRST].reads.clone());
        let key = settings.channel_key(channel);
        tokio::spawn(async move {
            let _permit = reads.acquire_owned().await;
            let page = tokio::select! {
                page = read_page(&commands, &key, args) => page,
                () = answer.closed() => return,
            };
            let _ = answer.send(page);
        });
    }
}

/// Parses what [`UPDATE_SCRIPT`] returns for one channel.
fn parse_reply(texts: &[String]) -> Reply {
    let [status, rest @ ..] = texts else {
        return Reply::Fault("unexpected reply of presence_update.lua".into());
    };
    let mut words = status.split(' ');
    let (kind, value) = (words.next(), words.next().and_then(|word| word.parse().ok()));
    match (kind, value) {
        (Some("ok"), Some(generation)) => {
            Reply::Stored { generation, has_more: words.next().is_some(), read: parse_read(rest) }
        }
        (Some("lost"), _) => Reply::Lost,
        (Some("late"), Some(number)) => Reply::Late(number),
        _ => Reply::Fault(status.clone()),
    }
}

fn parse_read(texts: &[String]) -> Option<PresenceRead> {
    let [version, entry, settled, kind, items @ ..] = texts else { return None };
    let change = |item: &String| {
        let present = item.starts_with('+');
        Some(Change { user: item.get(1..)?.into(), present })
    };
    let snapshot = match kind.as_str() {
        "same" => None,
        "changes" => Some(Snapshot::Changes(items.iter().map(change).collect::<Option<_>>()?)),
        "all" => Some(Snapshot::All(items.iter().map(|user| user.as_str().into()).collect())),
        _ => Some(Snapshot::Count(items.first()?.parse().ok()?)),
    };
    Some(PresenceRead {
        version: version.parse().ok()?,
        entry: entry.clone(),
        settled: settled == "1",
        snapshot,
    })
}

/// Reads a page, again and again while users of nodes that are gone are removed.
async fn read_page(commands: &Commands, key: &str, args: Vec<Value>) -> Result<PresencePage, BusError> {
    for _ in 0..READS_MAX {
        let frame = commands
            .run(Script::ReadPresence, key, args.clone())
            .await
            .map_err(|error| BusError::Unavailable(advice::for_call(&error).into()))?;
        let unexpected = || BusError::Unavailable("unexpected reply of presence_read.lua".into());
        let [status, count, next, users @ ..] = reply::array(&frame).unwrap_or_default() else {
            return Err(unexpected());
        };
        match (reply::text(status).as_deref(), reply::integer(count), reply::text(next)) {
            (Some("more"), ..) => {}
            (Some("settling"), ..) => return Err(BusError::Unavailable(UNSETTLED.into())),
            (Some("ok"), Some(count), Some(next)) => {
                let users = users.iter().filter_map(reply::text).map(Into::into).collect();
                return Ok(PresencePage { users, count, next: Some(next).filter(|next| next != "0") });
            }
            _ => return Err(unexpected()),
        }
    }
    Err(BusError::Unavailable("too many users of stopped nodes are being removed: try again".into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Action;

    #[test]
    fn flapping_user_ends_no_linger_of_others() {
        let flags = ["--max-connections", "1", "--max-subscriptions", "1"];
        let Ok(Action::Run(settings)) = Settings::from(flags.map(Into::into), []) else {
            panic!("good settings")
        };
        let mut presence = Presence::new(&settings);
        let room = ChannelName::parse("room").expect("a name");
        for name in std::iter::once("bob").chain(["eve"; 2000]) {
            presence.on_user(room.clone(), name.into(), true);
            presence.on_user(room.clone(), name.into(), false);
        }
        let now = Instant::now();
        presence.expire(now);
        let users = presence.channels.get(&room).expect("it has users").users();
        assert_eq!(users.present_after(None).map(|user| &**user).collect::<Vec<_>>(), ["bob", "eve"]);
        assert_eq!(presence.channels.user_count(), 2);
        // Redis is away: users who were never stored are forgotten.
        presence.expire(now + LINGER);
        assert_eq!(presence.channels.user_count(), 0);
        assert!(presence.channels.get(&room).expect("a channel").users().is_empty());
    }

    fn parsed(texts: &[&str]) -> Reply {
        parse_reply(&texts.iter().map(|text| text.to_string()).collect::<Vec<_>>())
    }

    #[test]
    fn replies_are_parsed() {
        let stored = |read| Reply::Stored { generation: 7, has_more: false, read };
        let read = |snapshot| {
            let entry = "5-0".to_owned();
            stored(Some(PresenceRead { version: 9, entry, settled: true, snapshot }))
        };
        assert_eq!(parsed(&["ok 7"]), stored(None));
        assert_eq!(parsed(&["ok 7 more"]), Reply::Stored { generation: 7, has_more: true, read: None });
        assert_eq!(parsed(&["ok 7", "9", "5-0", "1", "same"]), read(None));
        let changes = [("a", true), ("b", false)];
        let changes = changes.map(|(user, present)| Change { user: user.into(), present }).into();
        assert_eq!(
            parsed(&["ok 7", "9", "5-0", "1", "changes", "+a", "-b"]),
            read(Some(Snapshot::Changes(changes)))
        );
        let all = ["a".into(), "b".into()].into();
        assert_eq!(parsed(&["ok 7", "9", "5-0", "1", "all", "b", "a"]), read(Some(Snapshot::All(all))));
        assert_eq!(parsed(&["ok 7", "9", "5-0", "1", "count", "12"]), read(Some(Snapshot::Count(12))));
        assert_eq!(parsed(&["lost"]), Reply::Lost);
        assert_eq!(parsed(&["late 8"]), Reply::Late(8));
        assert_eq!(parsed(&["FAULT x y"]), Reply::Fault("FAULT x y".into()));
        assert!(matches!(parsed(&[]), Reply::Fault(_)));
    }
}
