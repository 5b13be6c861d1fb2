//! The outbox: frames for one connection alone, such as acks, pings and errors.

use std::collections::{BTreeMap, VecDeque};
use std::io::IoSlice;
use std::sync::Arc;

use bytes::Bytes;

use super::writer::Tally;
use crate::feed::Cursor;
use crate::protocol::event::Entry;

/// Memory of a queued frame beside its bytes: its place in the queue and its allocations.
const FRAME_OVERHEAD: usize = 64;

/// Frames that are written before any further event. Takes no memory while it is empty.
#[derive(Debug, Default)]
pub enum Outbox {
    #[default]
    Empty,
    /// The last `left` bytes of a partly written frame whose entry was evicted. All connections
    /// with a part of it share the frame, so that thousands of stalled connections cost no more
    /// than others.
    Tail { frame: Arc<Bytes>, left: u32 },
    /// Frames, after such a tail if there was one.
    Frames(Box<Queue>),
}

#[derive(Debug, Default)]
pub struct Queue {
    frames: VecDeque<Bytes>,
    bytes: usize,
    /// The shared frame of which the first one is the tail.
    tail_of: Option<Arc<Bytes>>,
}

impl Outbox {
    pub fn is_empty(&self) -> bool {
        matches!(self, Outbox::Empty)
    }

    /// Bytes to write.
    pub fn bytes(&self) -> usize {
        match self {
            Outbox::Empty => 0,
            Outbox::Tail { left, .. } => *left as usize,
            Outbox::Frames(queue) => queue.bytes,
        }
    }

    /// Memory of the frames in bytes, without the shared one; and the address and length of the
    /// shared one.
    pub fn memory(&self) -> (u64, Option<(usize, u64)>) {
        let shared = |frame: &Arc<Bytes>| (frame.as_ptr() as usize, frame.len() as u64);
        match self {
            Outbox::Empty => (0, None),
            Outbox::Tail { frame, .. } => (0, Some(shared(frame))),
            Outbox::Frames(queue) => {
                let tail = queue.tail_of.as_ref().map_or(0, |_| queue.frames[0].len());
                let own = queue.bytes - tail + queue.frames.len() * FRAME_OVERHEAD;
                (own as u64, queue.tail_of.as_ref().map(shared))
            }
        }
    }

    pub fn push(&mut self, frame: Bytes) {
        let queue = self.queue_mut();
        queue.bytes += frame.len();
        queue.frames.push_back(frame);
    }

    /// Puts the last `left` bytes of a frame before all others.
    pub fn push_tail(&mut self, frame: Arc<Bytes>, left: u32) {
        if self.is_empty() {
            *self = Outbox::Tail { frame, left };
            return;
        }
        let queue = self.queue_mut();
        queue.bytes += left as usize;
        queue.frames.push_front(frame.slice(frame.len() - left as usize..));
        queue.tail_of = Some(frame);
    }

    fn queue_mut(&mut self) -> &mut Queue {
        if !matches!(self, Outbox::Frames(_)) {
            let mut queue = Box::<Queue>::default();
            if let Outbox::Tail { frame, left } = self {
                queue.bytes = *left as usize;
                queue.frames.push_back(frame.slice(frame.len() - *left as usize..));
                queue.tail_of = Some(frame.clone());
            }
            *self = Outbox::Frames(queue);
        }
        match self {
            Outbox::Frames(queue) => queue,
            _ => unreachable!("it was made a queue above"),
        }
    }

    /// Puts the first frames into `slices`. Returns how many, and their bytes.
    pub fn fill<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> (usize, usize) {
        match self {
            Outbox::Empty => (0, 0),
            Outbox::Tail { frame, left } => {
                slices[0] = IoSlice::new(&frame[frame.len() - *left as usize..]);
                (1, *left as usize)
            }
            Outbox::Frames(queue) => {
                let (mut frames, mut bytes) = (0, 0);
                for (slice, frame) in slices.iter_mut().zip(&queue.frames) {
                    *slice = IoSlice::new(frame);
                    frames += 1;
                    bytes += frame.len();
                }
                (frames, bytes)
            }
        }
    }

    /// Removes what was written of the first frames: `written` bytes of `frames` frames and what
    /// followed them. Returns the bytes of what followed.
    pub fn consume(&mut self, mut written: usize, frames: usize) -> usize {
        if frames == 0 {
            return written;
        }
        let is_done = match self {
            Outbox::Empty => true,
            Outbox::Tail { left, .. } => {
                let part = written.min(*left as usize);
                written -= part;
                *left -= part as u32;
                *left == 0
            }
            Outbox::Frames(queue) => {
                for _ in 0..frames {
                    let front = &mut queue.frames[0];
                    let part = written.min(front.len());
                    written -= part;
                    queue.bytes -= part;
                    if part < front.len() {
                        *front = front.slice(part..);
                        break;
                    }
                    queue.frames.pop_front();
                    queue.tail_of = None;
                }
                queue.frames.is_empty()
            }
        };
        if is_done {
            *self = Outbox::Empty;
        }
        written
    }
}

/// Copies of partly written frames, one per frame, so that the evicted entry can be freed.
#[derive(Debug, Default)]
pub struct SharedTails(BTreeMap<Cursor, Arc<Bytes>>);

impl SharedTails {
    /// The frame in which this cursor is, and how many of its bytes are left.
    pub fn tail(&mut self, entry: &Entry, cursor: Cursor, tally: &mut Tally) -> (Arc<Bytes>, u32) {
        let (start, end) = (entry.frame_start(cursor.offset), entry.frame_end(cursor.offset));
        let frame = self.0.entry(Cursor { offset: end, ..cursor }).or_insert_with(|| {
            tally.kept += u64::from(end - start);
            Arc::new(match entry.frames() {
                1 => entry.bytes.clone(),
                _ => Bytes::copy_from_slice(&entry.bytes[start as usize..end as usize]),
            })
        });
        (frame.clone(), end - cursor.offset)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SLICES: usize = 4;

    fn slices_of(outbox: &Outbox) -> (Vec<u8>, usize) {
        let mut slices = [IoSlice::new(&[]); SLICES];
        let (frames, bytes) = outbox.fill(&mut slices);
        let content: Vec<u8> = slices[..frames].iter().flat_map(|slice| slice.to_vec()).collect();
        assert_eq!(content.len(), bytes);
        (content, frames)
    }

    proptest! {
        /// Frames are written in order, a tail before all others, whatever the sizes of the writes.
        #[test]
        fn every_byte_is_written_once_in_order(
            steps in prop::collection::vec((0..3u8, 1..9usize), 1..60),
        ) {
            let (mut outbox, mut expected, mut written) = (Outbox::default(), Vec::new(), Vec::new());
            let mut number = 0u8;
            let mut frame = |size: usize| {
                number = number.wrapping_add(1);
                Bytes::from(vec![number; size])
            };
            let mut is_inside = false;
            for (step, size) in steps {
                match step {
                    0 => {
                        let frame = frame(size);
                        expected.extend_from_slice(&frame);
                        outbox.push(frame);
                    }
                    // A tail is pushed only while the socket has no part of another frame.
                    1 if !is_inside => {
                        let frame = frame(size + 1);
                        expected.splice(written.len()..written.len(), frame[1..].iter().copied());
                        outbox.push_tail(Arc::new(frame), size as u32);
                    }
                    _ => {
                        let (content, frames) = slices_of(&outbox);
                        let part = size.min(content.len());
                        written.extend_from_slice(&content[..part]);
                        prop_assert_eq!(outbox.consume(part, frames), 0);
                        is_inside = part < content.len();
                    }
                }
                prop_assert_eq!(outbox.bytes(), expected.len() - written.len());
                prop_assert_eq!(outbox.is_empty(), expected.len() == written.len());
                let (own, shared) = outbox.memory();
                prop_assert_eq!(outbox.is_empty(), own == 0 && shared.is_none());
            }
            while !outbox.is_empty() {
                let (content, frames) = slices_of(&outbox);
                written.extend_from_slice(&content);
                // Bytes of the feed may follow in the same write.
                prop_assert_eq!(outbox.consume(content.len() + 7, frames), 7);
            }
            prop_assert_eq!(written, expected);
        }
    }
}
