//! The Lua that runs inside Redis: put together, given its arguments, its answers taken apart.
//! <https://redis.io/docs/latest/develop/interact/programmability/eval-intro/>

use std::sync::Arc;

use bytes::Bytes;
use fred::types::{Resp3Frame, Value};

use super::decode;
use super::publish_queue::Batch;
use super::reply::{array, bytes, integer};
use super::settings::Terms;
use crate::bus::Page;
use crate::protocol::event::{ChannelName, Entry, EventId};

/// No flag: Redis refuses it whole when out of memory, so that a refused event is certainly not taken.
pub const PUBLISH: &str =
    concat!("#!lua\n", include_str!("lua/epoch.lua"), "\n", include_str!("lua/publish.lua"));

/// Readers may write a few bytes (a new anchor) even when events are refused for want of memory.
pub const READ: &str =
    concat!("#!lua flags=allow-oom\n", include_str!("lua/epoch.lua"), "\n", include_str!("lua/read.lua"));

/// As [`READ`].
pub const CANARY: &str =
    concat!("#!lua flags=allow-oom\n", include_str!("lua/epoch.lua"), "\n", include_str!("lua/probe.lua"));

/// Writes nothing.
pub const CHECK: &str = concat!("#!lua flags=no-writes,allow-oom\n", include_str!("lua/check.lua"));

/// Stores the settings of this prefix for other programs' FCALL.
pub const SETTINGS: &str = concat!("#!lua flags=allow-oom\n", include_str!("lua/settings.lua"));

/// What every call on a channel carries: what this node knows of it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Known {
    /// The highest id seen.
    pub seen: EventId,
    /// The last anchor known.
    pub base: EventId,
}

impl Known {
    /// Learns from an answer.
    pub fn learn(&mut self, base: EventId, head: EventId) {
        self.base = self.base.max(base);
        self.seen = self.seen.max(head);
    }
}

/// A number as an argument.
pub fn number(value: u64) -> Value {
    Value::Integer(i64::try_from(value).expect("ids, sizes and milliseconds are below 2^63"))
}

fn opening(terms: &Terms, known: Known) -> Vec<Value> {
    vec![number(u64::from(terms.durable)), number(terms.ttl_ms), number(known.seen.0), number(known.base.0)]
}

/// The arguments of [`PUBLISH`], but for the events.
pub fn publish_args(terms: &Terms, channel: &ChannelName, known: Known, batch: &Batch) -> Vec<Value> {
    let bare = if terms.bare.contains(channel) { channel.as_str() } else { "" };
    let mut args = opening(terms, known);
    args.extend([
        number(terms.history),
        Value::from(bare),
        Value::from(terms.node.as_str()),
        number(batch.number),
        number(u64::from(batch.retry)),
        number(terms.number_ttl_ms),
        Value::from(batch.key.as_deref().unwrap_or_default()),
        number(terms.history_bytes as u64),
    ]);
    args
}

/// What came of a publish.
#[derive(Clone, Copy, Debug)]
pub struct Taken {
    /// The first event's id; `None`: it may or may not have been taken.
    pub first: Option<EventId>,
    /// It was certainly not published, and never will be.
    pub refused: bool,
    /// The channel's base and head then.
    pub base: EventId,
    /// The last id given.
    pub head: EventId,
}

/// Takes the answer of [`PUBLISH`] apart.
pub fn taken(frame: &Resp3Frame) -> Option<Taken> {
    let items = array(frame)?;
    let ids: Vec<u64> = items.iter().map(integer).collect::<Option<_>>()?;
    let [status, first, base, head] = ids[..] else { return None };
    let first = (status == 1).then_some(EventId(first));
    Some(Taken { first, refused: status == 2, base: EventId(base), head: EventId(head) })
}

/// What a read asks for.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// The first id wanted.
    pub from: EventId,
    /// The last id wanted.
    pub to: EventId,
    /// Most events.
    pub events: u64,
    /// About how many bytes. One event comes in any case.
    pub bytes: usize,
    /// The events from this id up to `from` are added if they have fewer than `shared_bytes`.
    pub shared_from: EventId,
    /// See `shared_from`.
    pub shared_bytes: usize,
}

/// Most events, and most bytes if all were as long as allowed, that a read takes from the stream in one step. It may
/// bring this many bytes more than wanted.
const STEP_EVENTS: usize = 32;
const STEP_BYTES: usize = 2 << 20;

/// The arguments of [`READ`].
pub fn read_args(terms: &Terms, known: Known, wanted: Wanted) -> Vec<Value> {
    let step = (STEP_BYTES / terms.max_message_size).clamp(1, STEP_EVENTS);
    let mut args = opening(terms, known);
    args.extend([
        number(wanted.from.0),
        number(wanted.to.0),
        number(wanted.events),
        number(wanted.bytes as u64),
        number(wanted.shared_from.0),
        number(wanted.shared_bytes as u64),
        number(step as u64),
    ]);
    args
}

/// Takes the answer of [`READ`] apart.
pub fn page(frame: &Resp3Frame) -> Option<Page> {
    let items = array(frame)?;
    let (heads, events) = items.split_at_checked(3)?;
    let ids: Vec<u64> = heads.iter().map(integer).collect::<Option<_>>()?;
    let mut history: Vec<(Bytes, Option<Arc<str>>)> = Vec::with_capacity(events.len() / 2);
    for pair in events.chunks_exact(2) {
        let user = bytes(&pair[1])?;
        let user = (!user.is_empty()).then(|| String::from_utf8_lossy(&user).into());
        history.push((bytes(&pair[0])?, user));
    }
    let entries = decode::entries(&history);
    let after = entries.first().map_or(EventId(0), Entry::before);
    Some(Page { after, base: EventId(ids[0]), head: EventId(ids[1]), oldest: EventId(ids[2]), entries })
}

/// The arguments of [`CANARY`], but for the channels.
pub fn canary_args(terms: &Terms, canary: u64) -> Vec<Value> {
    vec![
        number(u64::from(terms.durable)),
        number(terms.ttl_ms),
        Value::from(terms.prefix.as_str()),
        number(canary),
    ]
}

/// A channel's part in [`CANARY`]'s arguments.
pub fn canary_channel(args: &mut Vec<Value>, channel: &ChannelName, known: Known) {
    args.extend([Value::from(channel.as_str()), number(known.seen.0), number(known.base.0)]);
}
