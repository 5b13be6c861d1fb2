//! Which users this node has in the channels of `--presence`, kept in Redis: see `presence.lua`.
//!
//! Nothing is written for a connection, only for the first of a user and the last. A channel has at
//! most one call in flight; calls are for many channels. A call without a reply is made again with a
//! new number: what it did is done once, since it adds to sets.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use fred::types::{Resp3Frame, Value};
use tokio::sync::oneshot;

use super::commands::{Commands, Script};
use super::errors::CallError;
use super::primaries::{FIRST, SessionId}; // there is no --presence on a cluster
use super::scripts::number;
use super::{Bus, Outcome, advice, reply};
use crate::bus::presence::{Change, LINGER, Lingering, NodeUsers};
use crate::bus::{BusError, PresencePage};
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

/// How long a node counts as alive after a call. presence.lua has the same time.
const LEASE: Duration = Duration::from_secs(12);

// Users of a node that is gone have the same time to come back as others.
const _: () = assert!(LEASE.as_millis() >= LINGER.as_millis() + RENEWAL_INTERVAL.as_millis());

/// Most changes in one call: some 3 ms of Redis' time.
const CHANGES_MAX: usize = 500;

/// Most channels in one call: some 2 ms of Redis' time.
const CHANNELS_MAX: usize = 250;

/// Most calls for one page while users of nodes that are gone are removed: 500 in each.
const READS_MAX: usize = 1000;

const UNSETTLED: &str =
    "it has lost the users of this channel, and all nodes add theirs again: try again in 5 seconds";

/// A channel in which this node has users.
#[derive(Debug, Default)]
struct TrackedChannel {
    users: NodeUsers,
    /// The generation in which users of this node are stored. `None`: none are, or nobody knows.
    generation: Option<u64>,
    /// The changes of the call in flight.
    in_flight: Option<Vec<Change>>,
    /// In [`Presence::ready`].
    is_ready: bool,
    /// When the lease is renewed.
    renewal: Option<Instant>,
}

#[derive(Debug)]
pub(super) struct Presence {
    channels: HashMap<ChannelName, TrackedChannel>,
    lingering: Lingering,
    /// Channels with a call to make.
    ready: VecDeque<ChannelName>,
    /// Channels whose lease is renewed later, in this order. Some had another call meanwhile.
    renewals: VecDeque<(Instant, ChannelName)>,
    /// The number of the last call.
    last_number: u64,
    warnings: WarningLimit,
}

impl Presence {
    pub(super) fn new(settings: &Settings) -> Presence {
        Presence {
            channels: HashMap::new(),
            lingering: Lingering::new(settings),
            ready: VecDeque::new(),
            renewals: VecDeque::new(),
            last_number: 0,
            warnings: WarningLimit::default(),
        }
    }

    /// A user has become present on a shard, or is no more.
    pub(super) fn on_user(&mut self, name: ChannelName, user: Arc<str>, present: bool) {
        if present {
            self.channels.entry(name.clone()).or_default().users.enter(user);
            return self.mark_ready(&name);
        }
        let now = Instant::now();
        let Some(channel) = self.channels.get_mut(&name) else { return };
        if channel.users.leave(&user, now) {
            self.lingering.push(now, name, user);
        }
    }

    fn expire(&mut self, now: Instant) {
        while let Some((left, name, user)) = self.lingering.pop_due(now) {
            if let Some(channel) = self.channels.get_mut(&name) {
                channel.users.expire(&user, left);
                self.mark_ready(&name);
            }
        }
        while let Some((due, name)) = self.renewals.pop_front_if(|(due, _)| *due <= now) {
            if self.channels.get(&name).is_some_and(|channel| channel.renewal == Some(due)) {
                self.mark_due(&name);
            }
        }
    }

    /// Marks a channel if it has changes.
    fn mark_ready(&mut self, name: &ChannelName) {
        if self.channels.get(name).is_some_and(|channel| channel.users.has_changes()) {
            self.mark_due(name);
        }
    }

    /// Marks a channel. One with a call in flight is marked again after it.
    fn mark_due(&mut self, name: &ChannelName) {
        let Some(channel) = self.channels.get_mut(name) else { return };
        if !channel.is_ready && channel.in_flight.is_none() {
            channel.is_ready = true;
            self.ready.push_back(name.clone());
        }
    }

    /// Adds channels to the arguments of [`UPDATE_SCRIPT`]. Returns them.
    fn take_ready(&mut self, args: &mut Vec<Value>) -> Vec<ChannelName> {
        let (mut names, mut left) = (Vec::new(), CHANGES_MAX);
        while names.len() < CHANNELS_MAX && left > 0 {
            let Some(name) = self.ready.pop_front() else { break };
            let Some(channel) = self.channels.get_mut(&name) else { continue };
            channel.is_ready = false;
            let changes = channel.users.next_changes(left);
            if changes.is_empty() && channel.users.is_empty() {
                self.channels.remove(&name);
                continue;
            }
            left -= changes.len();
            let adds = changes.iter().filter(|change| change.present);
            let removes = changes.iter().filter(|change| !change.present);
            args.extend([
                Value::from(name.as_str()),
                number(channel.generation.unwrap_or(0)),
                number(adds.clone().count() as u64),
                number(removes.clone().count() as u64),
            ]);
            args.extend(adds.chain(removes).map(|change| Value::from(&*change.user)));
            channel.in_flight = Some(changes);
            names.push(name);
        }
        names
    }

    /// Handles the reply for a channel; `None` if there is none. Returns an error to log.
    fn on_reply(&mut self, name: &ChannelName, reply: Option<&str>, now: Instant) -> Option<String> {
        let channel = self.channels.get_mut(name)?;
        let changes = channel.in_flight.take()?;
        let mut words = reply.unwrap_or_default().split(' ');
        let kind = words.next().unwrap_or_default();
        let value = words.next().and_then(|word| word.parse::<u64>().ok());
        let mut is_due = false;
        let error = match (kind, value) {
            ("ok", Some(generation)) => {
                channel.generation = Some(generation);
                channel.users.on_stored(&changes);
                is_due = words.next() == Some("more");
                None
            }
            ("lost", _) => {
                channel.generation = None;
                channel.users.on_lost();
                is_due = true;
                None
            }
            _ => {
                channel.users.on_unknown(&changes);
                if let ("late", Some(number)) = (kind, value) {
                    self.last_number = self.last_number.max(number);
                }
                reply.filter(|_| kind != "late").map(str::to_owned)
            }
        };
        // After an error the next call waits for the renewal.
        let due = now + RENEWAL_INTERVAL;
        let channel = self.channels.get_mut(name)?;
        channel.renewal = Some(due);
        self.renewals.push_back((due, name.clone()));
        if is_due {
            self.mark_due(name);
        } else if error.is_none() {
            self.mark_ready(name);
        }
        error
    }

    pub(super) fn shrink(&mut self) {
        self.channels.shrink_to(2 * self.channels.len());
        self.ready.shrink_to(2 * self.ready.len());
        self.renewals.shrink_to(2 * self.renewals.len());
        self.lingering.shrink();
    }

    fn users(&self) -> usize {
        self.channels.values().map(|channel| channel.users.len()).sum()
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
        let Some(session) = open.filter(|_| !self.presence.ready.is_empty()) else { return };
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
        let names = self.presence.take_ready(&mut args);
        if names.is_empty() {
            return;
        }
        let (commands, outcomes) = (session.commands(), self.handles.outcomes.clone());
        let (topic, id) = (settings.probe_topic(FIRST), self.primaries.session_id(FIRST));
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
        let replies = result.as_ref().map_or_else(|_| Vec::new(), reply::texts);
        for (at, name) in names.iter().enumerate() {
            let error = self.presence.on_reply(name, replies.get(at).map(String::as_str), now);
            if let Some(error) = error
                && self.presence.warnings.is_due(now)
            {
                tracing::warn!(channel = %name, error, "presence not stored");
            }
        }
        self.handles.metrics.presence_users.set(self.presence.users() as u64);
        match result {
            Ok(_) => self.call_presence(),
            Err(error) => {
                if let CallError::ErrorReply(text) = &error
                    && self.presence.warnings.is_due(now)
                {
                    let advice = advice::for_error_reply(text);
                    tracing::warn!(error = &**text, advice, "presence not stored");
                }
                self.on_call_error(session, &error);
            }
        }
    }

    pub(super) fn read_presence(
        &self,
        channel: &ChannelName,
        from: Option<String>,
        limit: usize,
        answer: oneshot::Sender<Result<PresencePage, BusError>>,
    ) {
        let (Some(session), None) = (self.primaries[FIRST].link.session(), self.unavailable(FIRST)) else {
            let why =
                self.unavailable(FIRST).unwrap_or_else(|| BusError::Unavailable("not connected".into()));
            let _ = answer.send(Err(why)); // fails if the task no longer waits
            return;
        };
        let settings = &self.handles.settings;
        let args = vec![
            Value::from_static_str(settings.kind.name()),
            number(settings.history),
            number(settings.history_ttl_ms),
            Value::from(from.unwrap_or_else(|| "0".into())),
            number(limit as u64),
        ];
        let (commands, reads) = (session.commands(), self.primaries[FIRST].reads.clone());
        let key = settings.channel_key(channel);
        tokio::spawn(async move {
            let _permit = reads.acquire_owned().await;
            let _ = answer.send(read_page(&commands, &key, args).await);
        });
    }
}

/// Reads a page, again and again while users of nodes that are gone are removed.
async fn read_page(commands: &Commands, key: &str, args: Vec<Value>) -> Result<PresencePage, BusError> {
    for _ in 0..READS_MAX {
        let frame = commands
            .run(Script::ReadPresence, key, args.clone())
            .await
            .map_err(|error| BusError::Unavailable(advice::for_call(&error).into()))?;
        let Some([status, count, next, users @ ..]) = reply::array(&frame) else { break };
        match (reply::text(status).as_deref(), reply::integer(count), reply::text(next)) {
            (Some("more"), ..) => {}
            (Some("settling"), ..) => return Err(BusError::Unavailable(UNSETTLED.into())),
            (Some("ok"), Some(count), Some(next)) => {
                let users = users.iter().filter_map(reply::text).map(Into::into).collect();
                return Ok(PresencePage { users, count, next: Some(next).filter(|next| next != "0") });
            }
            _ => break,
        }
    }
    Err(BusError::Unavailable("unexpected reply of presence_read.lua".into()))
}
