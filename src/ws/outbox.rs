//! Frames queued for one connection.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use bytes::Bytes;

use super::writer::Tally;
use crate::feed::Cursor;
use crate::protocol::event::Entry;

/// Memory of a queued frame beside its bytes: its place in the queue and its allocations.
pub(super) const FRAME_OVERHEAD: usize = 64;

/// What waits for one client alone.
#[derive(Debug, Default)]
pub(super) enum Outbox {
    #[default]
    Nothing,
    /// The last `left` bytes of a frame that the feed, or a page, has let go of, and whose begin the socket has. All who
    /// have it share it: thousands who stall cost no more than thousands who don't.
    Tail { frame: Arc<Bytes>, left: u32 },
    /// Frames of its own, behind such a rest if there was one.
    Frames(Box<Queue>),
}

#[derive(Debug, Default)]
pub(super) struct Queue {
    pub(super) frames: VecDeque<Bytes>,
    pub(super) bytes: usize,
    /// The frame whose rest is the first one.
    pub(super) tail_of: Option<Arc<Bytes>>,
}

/// Frames of entries that go, each once for all who have its begin: their rest must not keep the whole entry.
#[derive(Debug, Default)]
pub struct SharedTails(BTreeMap<Cursor, Arc<Bytes>>);

impl SharedTails {
    /// The frame in which this cursor stands, and how much of it is ahead.
    pub(super) fn tail(&mut self, entry: &Entry, cursor: Cursor, tally: &mut Tally) -> (Arc<Bytes>, u32) {
        let (begin, end) = (entry.frame_start(cursor.offset), entry.frame_end(cursor.offset));
        let frame = self.0.entry(Cursor { offset: end, ..cursor }).or_insert_with(|| {
            tally.kept += u64::from(end - begin);
            Arc::new(match entry.frames() {
                1 => entry.bytes.clone(),
                _ => Bytes::copy_from_slice(&entry.bytes[begin as usize..end as usize]),
            })
        });
        (frame.clone(), end - cursor.offset)
    }
}
