//! The Lua scripts that run inside Redis: their texts, arguments and replies.
//! <https://redis.io/docs/latest/develop/interact/programmability/eval-intro/>

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use fred::types::{Resp3Frame, Value};

use super::decode;
use super::publish_queue::{Batch, Item};
use super::reply::{array, bytes, integer};
use super::settings::RedisSettings;
use crate::bus::page::Page;
use crate::protocol::control::Order;
use crate::protocol::event::{ChannelName, Entry, EventId};
use crate::protocol::inbox::MessageId;

/// Without `allow-oom`: when out of memory, Redis rejects it before it runs, so certainly nothing
/// is published.
pub const PUBLISH: &str = concat!(
    "#!lua\n",
    include_str!("lua/epoch.lua"),
    "\n",
    include_str!("lua/number.lua"),
    "\n",
    include_str!("lua/publish.lua")
);

/// Without `allow-oom`, as [`PUBLISH`].
pub const INBOX: &str = concat!(
    "#!lua\n",
    include_str!("lua/epoch.lua"),
    "\n",
    include_str!("lua/number.lua"),
    "\n",
    include_str!("lua/inbox.lua")
);

/// With `allow-oom`: an expiry takes a few bytes.
pub const INBOX_STATS: &str = concat!("#!lua flags=allow-oom\n", include_str!("lua/inbox_stats.lua"));

/// With `allow-oom`: a read may write a few bytes (a new base), and must work when events are
/// rejected.
pub const READ: &str =
    concat!("#!lua flags=allow-oom\n", include_str!("lua/epoch.lua"), "\n", include_str!("lua/read.lua"));

/// With `allow-oom`, as [`READ`]. On a cluster its channels are in several slots.
pub const PROBE: &str = concat!(
    "#!lua flags=allow-oom,allow-cross-slot-keys\n",
    include_str!("lua/epoch.lua"),
    "\n",
    include_str!("lua/probe.lua"),
);

/// As [`PUBLISH`].
pub const ORDER: &str = concat!(
    "#!lua\n",
    include_str!("lua/epoch.lua"),
    "\n",
    include_str!("lua/control.lua"),
    "\n",
    include_str!("lua/order.lua")
);

/// With `allow-oom`, as [`READ`].
pub const BANS: &str = concat!(
    "#!lua flags=allow-oom\n",
    include_str!("lua/epoch.lua"),
    "\n",
    include_str!("lua/control.lua"),
    "\n",
    include_str!("lua/bans.lua")
);

/// Checks commands and rights.
pub const CHECK: &str = concat!("#!lua flags=no-writes,allow-oom\n", include_str!("lua/check.lua"));

/// Stores the FCALL settings of this prefix.
pub const SETTINGS: &str = concat!("#!lua flags=allow-oom\n", include_str!("lua/settings.lua"));

/// What this node knows of a channel. Every call on a channel carries it, so that the script
/// notices a loss of events.
#[derive(Clone, Copy, Debug, Default)]
pub struct KnownPosition {
    /// The highest id seen.
    pub seen: EventId,
    /// The latest base; 0 if the node does not know one.
    pub base: EventId,
}

impl KnownPosition {
    pub fn update(&mut self, base: EventId, head: EventId) {
        self.base = self.base.max(base);
        self.seen = self.seen.max(head);
    }
}

/// A number as an argument.
pub fn number(value: u64) -> Value {
    Value::Integer(i64::try_from(value).expect("ids, sizes and milliseconds are below 2^63"))
}

/// The first arguments of all scripts on a channel.
fn channel_args(settings: &RedisSettings, known: KnownPosition) -> Vec<Value> {
    vec![
        Value::from_static_str(settings.kind.name()),
        number(settings.history_ttl_ms),
        number(known.seen.0),
        number(known.base.0),
    ]
}

/// The arguments of [`PUBLISH`] before the events.
pub fn publish_args(
    settings: &RedisSettings,
    channel: &ChannelName,
    known: KnownPosition,
    batch: &Batch,
) -> Vec<Value> {
    let pubsub = if settings.pubsub_channels.contains(channel) { channel.as_str() } else { "" };
    let mut args = channel_args(settings, known);
    args.extend([
        number(settings.history),
        Value::from(pubsub),
        Value::from(settings.node.as_str()),
        number(batch.number),
        number(u64::from(batch.retry)),
        number(settings.publish_number_ttl_ms),
        Value::from(batch.key().unwrap_or_default()),
        number(settings.history_bytes as u64),
    ]);
    args
}

/// Adds events to the arguments of [`PUBLISH`]. Consecutive ones for the same recipients are a run:
/// the user or nothing, the number of events, and their texts.
pub fn add_events(args: &mut Vec<Value>, items: &[Item]) {
    for run in items.chunk_by(|a, b| a.to == b.to) {
        args.push(optional(run[0].to.as_ref()));
        args.push(number(run.len() as u64));
        args.extend(run.iter().map(|item| Value::Bytes(item.text.clone())));
    }
}

/// A text as an argument; empty if there is none.
fn optional(text: Option<&Arc<str>>) -> Value {
    Value::from(text.map_or("", |text| text))
}

/// The arguments of [`INBOX`] before the messages.
pub fn inbox_args(
    settings: &RedisSettings,
    channel: &ChannelName,
    known: KnownPosition,
    batch: &Batch,
) -> Vec<Value> {
    let mut args = channel_args(settings, known);
    args.extend([
        Value::from(settings.node.as_str()),
        number(batch.number),
        number(u64::from(batch.retry)),
        number(settings.publish_number_ttl_ms),
        number(settings.inbox_max),
        Value::from(channel.as_str()),
        number(settings.history_bytes as u64),
    ]);
    args
}

/// Adds messages to the arguments of [`INBOX`].
pub fn add_messages(args: &mut Vec<Value>, items: &[Item]) {
    for Item { text: json, sender, to, key } in items {
        args.extend([
            optional(sender.as_ref()),
            optional(to.as_ref()),
            optional(key.as_ref()),
            Value::Bytes(json.clone()),
        ]);
    }
}

/// The reply of `publish.lua`.
#[derive(Clone, Copy, Debug)]
pub struct PublishReply {
    /// The id of the first event; `None` if the events may or may not have been published.
    pub first: Option<EventId>,
    /// The events were certainly not published and never will be.
    pub rejected: bool,
    pub base: EventId,
    pub head: EventId,
}

pub fn parse_publish(frame: &Resp3Frame) -> Option<PublishReply> {
    let items = array(frame)?;
    let ids: Vec<u64> = items.iter().map(integer).collect::<Option<_>>()?;
    let [status, first, base, head] = ids[..] else { return None };
    let first = (status == 1).then_some(EventId(first));
    Some(PublishReply { first, rejected: status == 2, base: EventId(base), head: EventId(head) })
}

/// The reply of `inbox.lua`.
#[derive(Clone, Debug)]
pub struct InboxReply {
    /// The id of each message, `None` if the inbox had no room for it; or else: the messages may or
    /// may not have been stored.
    pub ids: Option<Vec<Option<MessageId>>>,
    /// The messages were certainly not stored and never will be.
    pub rejected: bool,
    pub base: EventId,
    pub head: EventId,
}

pub fn parse_inbox(frame: &Resp3Frame) -> Option<InboxReply> {
    let [status, base, head, ids @ ..] = array(frame)? else { return None };
    let [status, base, head] = [integer(status)?, integer(base)?, integer(head)?];
    let id = |frame: &Resp3Frame| match &*bytes(frame)? {
        b"" => Some(None),
        text => MessageId::parse(text).map(Some),
    };
    let ids = if status == 1 { Some(ids.iter().map(id).collect::<Option<_>>()?) } else { None };
    Some(InboxReply { ids, rejected: status == 2, base: EventId(base), head: EventId(head) })
}

/// Which events a read returns.
#[derive(Clone, Copy, Debug)]
pub struct ReadRange {
    /// The first id.
    pub from: EventId,
    /// The last id.
    pub to: EventId,
    /// Most events.
    pub events: u64,
    /// About how many bytes; at least one event.
    pub bytes: usize,
    /// The events from this id up to `from` are added if they have fewer than `shared_bytes`.
    pub shared_from: EventId,
    pub shared_bytes: usize,
}

/// Most events that a read takes from the stream in one step, and most bytes if each has
/// `--max-message-size`. A read may return this many bytes more than [`ReadRange::bytes`].
const STEP_EVENTS: usize = 32;
const STEP_BYTES: usize = 2 << 20;

/// The arguments of [`READ`].
pub fn read_args(settings: &RedisSettings, known: KnownPosition, range: ReadRange) -> Vec<Value> {
    let step = (STEP_BYTES / settings.max_message_size).clamp(1, STEP_EVENTS);
    let mut args = channel_args(settings, known);
    args.extend([
        number(range.from.0),
        number(range.to.0),
        number(range.events),
        number(range.bytes as u64),
        number(range.shared_from.0),
        number(range.shared_bytes as u64),
        number(step as u64),
    ]);
    args
}

/// The reply of `read.lua`.
pub fn parse_page(frame: &Resp3Frame) -> Option<Page> {
    let items = array(frame)?;
    let (position, events) = items.split_at_checked(3)?;
    let ids: Vec<u64> = position.iter().map(integer).collect::<Option<_>>()?;
    let mut history: Vec<(Bytes, Option<Arc<str>>)> = Vec::with_capacity(events.len() / 2);
    for pair in events.chunks_exact(2) {
        let user = bytes(&pair[1])?;
        let user = (!user.is_empty()).then(|| String::from_utf8_lossy(&user).into());
        history.push((bytes(&pair[0])?, user));
    }
    let entries = decode::entries(&history);
    let after = entries.first().map_or(EventId(0), Entry::before);
    let [base, head, oldest] = [0, 1, 2].map(|at| EventId(ids[at]));
    Some(Page { after, base, head, oldest, entries, ..Page::default() })
}

/// The arguments of [`PROBE`] before the channels.
pub fn probe_args(settings: &RedisSettings, probe: u64) -> Vec<Value> {
    vec![
        Value::from_static_str(settings.kind.name()),
        number(settings.history_ttl_ms),
        Value::from(settings.prefix.as_str()),
        number(probe),
    ]
}

/// Adds a channel to the arguments of [`PROBE`].
pub fn add_probe_channel(args: &mut Vec<Value>, channel: &ChannelName, known: KnownPosition) {
    args.extend([Value::from(channel.as_str()), number(known.seen.0), number(known.base.0)]);
}

/// The arguments of [`ORDER`].
pub fn order_args(settings: &RedisSettings, known: KnownPosition, order: &Order) -> Vec<Value> {
    let (action, user, channel, time) = match order {
        Order::Disconnect { user, channel } => ("disconnect", user, channel.as_ref(), Duration::ZERO),
        Order::Ban { user, time } => ("ban", user, None, *time),
        Order::Unban { user } => ("unban", user, None, Duration::ZERO),
    };
    let mut args = channel_args(settings, known);
    args.extend([
        Value::from(action),
        Value::from(&**user),
        Value::from(channel.map_or("", ChannelName::as_str)),
        number(time.as_millis() as u64),
    ]);
    args
}

/// The arguments of [`BANS`].
pub fn bans_args(settings: &RedisSettings) -> Vec<Value> {
    vec![Value::from_static_str(settings.kind.name())]
}

/// All bans in Redis at one moment.
#[derive(Debug)]
pub struct StoredBans {
    /// The clock of Redis, in milliseconds since 1970.
    pub now: u64,
    /// Users, and when their bans end.
    pub bans: Vec<(Arc<str>, u64)>,
}

/// The reply of `bans.lua`. Pairs that no node has written are skipped, such as a name that is not
/// UTF-8.
pub fn parse_bans(frame: &Resp3Frame) -> Option<StoredBans> {
    let (now, bans) = array(frame)?.split_first()?;
    let ban = |pair: &[Resp3Frame]| {
        let user = String::from_utf8(bytes(&pair[0])?.into()).ok()?;
        Some((user.into(), integer(&pair[1])?))
    };
    Some(StoredBans { now: integer(now)?, bans: bans.chunks_exact(2).filter_map(ban).collect() })
}
