//! One connection: its states, and the one function that writes.
//!
//! A plain struct in a shard's slab whose methods never wait. It holds a few numbers; what it has to say to this
//! client alone waits in a queue that exists only while something is in it.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, IoSlice, Read, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use mio::net::TcpStream;

use crate::auth::token::NEVER;
use crate::feed::{Cursor, Feed, Lookup, Reader};
use crate::limits::connections::{Address, ConnectionLimits, ConnectionSlot};
use crate::limits::rate::Allowance;
use crate::protocol::close::CloseReason;
use crate::protocol::event::{ChannelName, Entry, EventId, Kind};
use crate::protocol::frame;
use crate::ws::decoder::Partial;

/// Most entries in one vectored write. More would not make a write cheaper, only the stack larger.
const SLICES: usize = 64;

/// Most bytes that one connection writes before others get their turn.
pub const BURST: usize = 256 * 1024;

/// Slowest client whose pong is in time, in bytes a second: before a ping it reads all bytes that were written earlier.
const SLOWEST_READER: u32 = 32 * 1024;

/// Memory of a queued frame beside its bytes: its place in the queue and its allocations.
const FRAME_OVERHEAD: usize = 64;

/// Most bytes on their way to a client: more than the kernels of node, proxy and client hold with Linux' defaults
/// (`tcp_rmem` 6 MiB and `tcp_wmem` 4 MiB at most).
const ON_THE_WAY_MAX: u32 = 16 * 1024 * 1024;

/// No user has an earlier or later connection.
pub const NONE: u32 = u32::MAX;

/// What a client said about the last event it saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LastSeen {
    /// Nothing yet: it wants what comes from now on.
    Nothing,
    /// This one.
    Event(EventId),
    /// Something that is no id.
    Unknown,
}

/// A request to join a channel that passed every check of the handshake.
#[derive(Debug)]
pub struct Join {
    /// Who.
    pub user: Box<str>,
    /// Where.
    pub channel: ChannelName,
    /// From which event on.
    pub last_seen: LastSeen,
    /// Whether the client gets recovery frames.
    pub wants_recovery: bool,
    /// Whether it speaks `fanfare.v1`.
    pub json_mode: bool,
    /// Whether it may publish.
    pub may_publish: bool,
    /// When its token ends, in seconds since 1970.
    pub expires: u32,
    /// The 101 response.
    pub response: Bytes,
}

/// What a connection is doing.
#[derive(Debug)]
pub enum State {
    /// Its request is not complete; what has come is kept.
    Request(Option<Box<Vec<u8>>>),
    /// Its request waits for the bus.
    Joining(Box<Join>),
    /// It follows its channel in the feed.
    Live,
    /// The feed has left it behind: it reads history, part by part.
    Replay(Replay),
    /// It missed events and gets no recovery frames, so that it is going to be closed.
    Missed,
    /// Its last words are on their way; then it waits for the peer's end.
    Closing {
        /// They are out, and our end is closed.
        finished: bool,
    },
    /// Its socket is dead or done. Its slot is freed at the end of the turn.
    Discarded,
}

/// Where a connection that reads history is with its next part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PartState {
    /// It has not asked for one.
    #[default]
    Needed,
    /// It waits for one, or for the time when it may ask.
    Awaited,
    /// The part that it waited for has just arrived.
    Arrived,
}

/// How one connection reads history.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Replay {
    /// Bytes that it took since it last asked for a part.
    taken: u32,
    /// Bytes that it took in the latest tick of the shard.
    in_tick: u32,
    /// The low bits of that tick's number.
    tick: u16,
    part: PartState,
}

/// Most bytes of history that one connection takes in a tick (40 MB/s), so that it leaves Redis to others, too.
const HISTORY_IN_TICK: u32 = 4 * 1024 * 1024;

/// Bytes of history that a connection asks for at first.
const PART_FIRST: usize = 64 * 1024;

impl Replay {
    /// Has it wait for its next part.
    pub fn wait(&mut self) {
        self.part = PartState::Awaited;
    }

    /// Ends the wait. `arrived`: the part is in memory.
    pub fn resume(&mut self, arrived: bool) {
        self.part = if arrived { PartState::Arrived } else { PartState::Needed };
    }

    /// Where it is with its next part. The arrival of one is returned once.
    pub fn take_part(&mut self) -> PartState {
        let part = self.part;
        if part == PartState::Arrived {
            self.part = PartState::Needed;
        }
        part
    }

    /// Counts what it took.
    pub fn took(&mut self, bytes: u64, tick: u32) {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        if self.tick != tick as u16 {
            (self.tick, self.in_tick) = (tick as u16, 0);
        }
        self.taken = self.taken.saturating_add(bytes);
        self.in_tick = self.in_tick.saturating_add(bytes);
    }

    /// Whether it may take more in this tick.
    pub fn may_take(&self, tick: u32) -> bool {
        self.tick != tick as u16 || self.in_tick < HISTORY_IN_TICK
    }

    /// The size of the part that it asks for now, in bytes: twice what it took of the last one, at most [`BURST`]. So a
    /// slow reader, whose parts may be dropped before it has read them, causes few reads.
    pub fn ask(&mut self) -> usize {
        let taken = std::mem::take(&mut self.taken) as usize;
        taken.saturating_mul(2).clamp(PART_FIRST, BURST)
    }
}

const _: () = assert!(size_of::<State>() == 16, "a state is in every connection");

/// What came of writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flushed {
    /// All that there is was written.
    All,
    /// The socket is full.
    Blocked,
    /// There is more, and others come first.
    More,
    /// The feed no longer holds what comes next.
    Behind,
    /// A reset comes next, and this client has no frame for it.
    Missed,
    /// The socket is dead.
    Dead,
}

/// What reading and writing count.
#[derive(Debug, Default)]
pub struct Tally {
    /// Calls of write.
    pub writes: u64,
    /// Bytes taken from sockets.
    pub received: u64,
    /// Events handed to sockets.
    pub deliveries: u64,
    /// Bytes handed to sockets.
    pub bytes: u64,
    /// Reset frames written.
    pub resets: u64,
    /// Times a connection missed events without id.
    pub pubsub_misses: u64,
    /// Bytes of frames that are kept for full sockets after their entries were evicted.
    pub kept: u64,
}

/// What waits for one client alone.
#[derive(Debug, Default)]
enum Outbox {
    #[default]
    Nothing,
    /// The last `left` bytes of a frame that the feed, or a page, has let go of, and whose begin the socket has. All who
    /// have it share it: thousands who stall cost no more than thousands who don't.
    Tail { frame: Arc<Bytes>, left: u32 },
    /// Frames of its own, behind such a rest if there was one.
    Frames(Box<Queue>),
}

#[derive(Debug, Default)]
struct Queue {
    frames: VecDeque<Bytes>,
    bytes: usize,
    /// The frame whose rest is the first one.
    tail_of: Option<Arc<Bytes>>,
}

/// Frames of entries that go, each once for all who have its begin: their rest must not keep the whole entry.
#[derive(Debug, Default)]
pub struct SharedTails(BTreeMap<Cursor, Arc<Bytes>>);

impl SharedTails {
    /// The frame in which this cursor stands, and how much of it is ahead.
    fn tail(&mut self, entry: &Entry, cursor: Cursor, tally: &mut Tally) -> (Arc<Bytes>, u32) {
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

/// One connection.
#[derive(Debug)]
pub struct Connection {
    stream: TcpStream,
    /// Tells it from the earlier owners of its slot.
    pub generation: u32,
    /// What it is doing.
    pub state: State,
    outbox: Outbox,
    /// What it keeps between two reads.
    pub partial: Option<Box<Partial>>,
    /// What it holds of the node's counts.
    pub connection_slot: ConnectionSlot,
    /// Who it is; empty until its request is found good, and its user has room for it.
    pub user: Box<str>,
    /// Its channel's key in the shard.
    pub channel: u32,
    /// Its place among the channel's members.
    pub member: u32,
    /// The neighbours among this user's connections in the channel.
    pub same_user: (u32, u32),
    /// Where it stands in the feed.
    pub cursor: Cursor,
    /// The last event that it has, or that was not for it.
    pub position: EventId,
    live_from: u64,
    /// Its last flush wrote everything, and its socket has not been full since.
    current: bool,
    /// Its socket is full.
    pub blocked: bool,
    /// Its socket was full when its heartbeat was last checked.
    pub was_blocked: bool,
    /// It is told when its socket has room again.
    pub write_interest: bool,
    /// Nothing is read from it until it takes what waits for it, or the bus has answered it.
    pub read_paused: bool,
    /// It is on the shard's list of those who have more to read,
    pub read_queued: bool,
    /// and of those who have more to write.
    pub write_queued: bool,
    /// It gets recovery frames.
    pub wants_recovery: bool,
    /// It speaks `fanfare.v1`.
    pub json_mode: bool,
    /// It may publish.
    pub may_publish: bool,
    /// When its token ends, in seconds since 1970.
    pub expires: u32,
    /// When it was last active, in ticks of the shard: it sent bytes or, while its socket is full, took some.
    pub last_activity: u32,
    /// Bytes written that no pong has confirmed as read.
    unconfirmed: u32,
    /// How many of them were written before the ping that awaits its pong.
    before_ping: u32,
    /// Publishes without an answer yet.
    pub unanswered: u32,
    /// When the last heartbeat was sent, in ticks of the shard.
    pub last_ping: u32,
    /// A pong is due from it.
    awaiting_pong: bool,
    /// TAT of its messages, see [`crate::limits::rate`].
    pub tat: u64,
    /// The allowance of its client, looked up when it is first needed.
    pub allowance: Option<Arc<Allowance>>,
    /// Messages rejected by its own rate, less those accepted since.
    pub rejected: u16,
}

impl Connection {
    /// A socket that has sent nothing yet.
    pub fn new(stream: TcpStream, connection_slot: ConnectionSlot, generation: u32, tick: u32) -> Connection {
        Connection {
            stream,
            generation,
            connection_slot,
            state: State::Request(None),
            outbox: Outbox::Nothing,
            partial: None,
            user: Box::default(),
            channel: NONE,
            member: NONE,
            same_user: (NONE, NONE),
            cursor: Cursor::default(),
            position: EventId(0),
            live_from: 0,
            current: false,
            blocked: false,
            was_blocked: false,
            write_interest: false,
            read_paused: false,
            read_queued: false,
            write_queued: false,
            wants_recovery: false,
            json_mode: false,
            may_publish: false,
            expires: NEVER,
            last_activity: tick,
            unconfirmed: 0,
            before_ping: 0,
            unanswered: 0,
            last_ping: tick,
            awaiting_pong: false,
            tat: 0,
            allowance: None,
            rejected: 0,
        }
    }

    /// The socket, for registering it.
    pub fn stream(&mut self) -> &mut TcpStream {
        &mut self.stream
    }

    /// Where its client is, for people: by what it is counted, else where the socket says. `None` also for one whom a
    /// proxy has named in vain, since that name was not kept.
    pub fn client(&self) -> Option<Address> {
        match self.connection_slot {
            ConnectionSlot::Client(address) => Some(address),
            ConnectionSlot::Rejecting { reported: true, .. } => None,
            _ => self.stream.peer_addr().ok().map(|peer| peer.ip().into()),
        }
    }

    /// Whether it is one of its channel's members.
    pub fn is_open(&self) -> bool {
        matches!(self.state, State::Live | State::Replay(_) | State::Missed)
    }

    /// Whether it has yet to get what others in its channel have: its socket is full, or it reads history.
    pub fn is_behind(&self) -> bool {
        self.blocked || matches!(self.state, State::Replay(_))
    }

    /// Whether it waits for a part of history.
    pub fn awaits_page(&self) -> bool {
        match &self.state {
            State::Joining(_) => true,
            State::Replay(replay) => replay.part == PartState::Awaited,
            _ => false,
        }
    }

    /// Has it wait for a part of history.
    pub fn wait_for_part(&mut self) {
        if let State::Replay(replay) = &mut self.state {
            replay.wait();
        }
    }

    /// Whether it may take more history in this tick.
    pub fn may_replay(&self, tick: u32) -> bool {
        matches!(&self.state, State::Replay(replay) if replay.may_take(tick))
    }

    /// Counts what it took of history.
    pub fn count_replayed(&mut self, bytes: u64, tick: u32) {
        if let State::Replay(replay) = &mut self.state {
            replay.took(bytes, tick);
        }
    }

    /// The size of the part of history that it asks for now, in bytes.
    pub fn next_part_bytes(&mut self) -> usize {
        match &mut self.state {
            State::Replay(replay) => replay.ask(),
            _ => Replay::default().ask(),
        }
    }

    /// Reads into `buffer`, behind what is kept from the last read. Gives how much is in it now, and how much of that
    /// is new: `None` when there is nothing to be had, 0 when the peer has ended.
    pub fn read(&mut self, buffer: &mut [u8]) -> io::Result<(usize, Option<usize>)> {
        let kept =
            self.partial.as_mut().map(|partial| std::mem::take(&mut partial.unread)).unwrap_or_default();
        buffer[..kept.len()].copy_from_slice(&kept);
        loop {
            match self.stream.read(&mut buffer[kept.len()..]) {
                Ok(new) => return Ok((kept.len() + new, Some(new))),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok((kept.len(), None)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Keeps bytes for the next read.
    pub fn keep(&mut self, unread: &[u8]) {
        if !unread.is_empty() {
            self.partial.get_or_insert_default().unread = unread.to_vec();
        }
    }

    /// Has a frame wait for its turn.
    pub fn enqueue(&mut self, frame: Bytes) {
        let queue = self.outbox_mut();
        queue.bytes += frame.len();
        queue.frames.push_back(frame);
    }

    /// What waits, as frames of its own.
    fn outbox_mut(&mut self) -> &mut Queue {
        if !matches!(self.outbox, Outbox::Frames(_)) {
            let mut queue = Box::<Queue>::default();
            if let Outbox::Tail { frame, left } = &self.outbox {
                queue.bytes = *left as usize;
                queue.frames.push_back(frame.slice(frame.len() - *left as usize..));
                queue.tail_of = Some(frame.clone());
            }
            self.outbox = Outbox::Frames(queue);
        }
        match &mut self.outbox {
            Outbox::Frames(queue) => queue,
            _ => unreachable!("it was made so above"),
        }
    }

    /// Bytes that wait for this client alone.
    pub fn queued(&self) -> usize {
        match &self.outbox {
            Outbox::Nothing => 0,
            Outbox::Tail { left, .. } => *left as usize,
            Outbox::Frames(queue) => queue.bytes,
        }
    }

    /// What is kept until its socket takes it: the bytes for this client alone; and of the frame that it may share with
    /// others the address and the length.
    pub fn unsent(&self) -> (u64, Option<(usize, u64)>) {
        let shared = |frame: &Arc<Bytes>| (frame.as_ptr() as usize, frame.len() as u64);
        match &self.outbox {
            Outbox::Nothing => (0, None),
            Outbox::Tail { frame, .. } => (0, Some(shared(frame))),
            Outbox::Frames(queue) => {
                let rest = queue.tail_of.as_ref().map_or(0, |_| queue.frames[0].len());
                let own = queue.bytes - rest + queue.frames.len() * FRAME_OVERHEAD;
                (own as u64, queue.tail_of.as_ref().map(shared))
            }
        }
    }

    /// Enqueues a ping.
    pub fn ping(&mut self) {
        if !std::mem::replace(&mut self.awaiting_pong, true) {
            self.before_ping = self.unconfirmed;
        }
        self.enqueue(frame::PING);
    }

    /// Takes a pong. True if it answers a ping; then the client has read what was written before that ping.
    pub fn take_pong(&mut self) -> bool {
        let answers = std::mem::take(&mut self.awaiting_pong);
        if answers {
            self.unconfirmed = self.unconfirmed.saturating_sub(self.before_ping);
        }
        answers
    }

    /// How long the client may take to read the bytes on their way to it.
    pub fn reading_time(&self) -> Duration {
        Duration::from_secs(1) * self.unconfirmed.min(ON_THE_WAY_MAX) / SLOWEST_READER
    }

    fn count_written(&mut self, written: usize, tally: &mut Tally) {
        tally.bytes += written as u64;
        self.unconfirmed = self.unconfirmed.saturating_add(written as u32);
    }

    /// Has it stand at `cursor`, with everything up to `position`.
    pub fn start_live(&mut self, feed: &Feed, cursor: Cursor, position: EventId) {
        self.state = State::Live;
        self.cursor = cursor;
        self.position = position;
        self.live_from = feed.end();
        self.current = false;
    }

    /// Has it read what follows `position` from history.
    pub fn start_replay(&mut self, feed: &Feed, position: EventId) {
        self.state = State::Replay(Replay::default());
        self.cursor = Cursor::default();
        self.position = position;
        self.live_from = feed.end();
        self.current = false;
    }

    /// Finds the allowance of its client when it is first needed.
    pub fn load_allowance(&mut self, limits: &ConnectionLimits) {
        if self.allowance.is_none() {
            self.allowance = limits.allowance(self.connection_slot, &self.user);
        }
    }

    /// The position to send in a frame that is enqueued now. Entries for other users do not hold it back.
    pub fn shown_position(&mut self, feed: &Feed) -> EventId {
        if !matches!(self.state, State::Live) {
            return self.position;
        }
        if self.is_inside_frame(feed) {
            // The rest of the frame that is partly written comes first.
            let entry = feed.get(self.cursor.entry).expect("a cursor inside a frame is inside an entry");
            return position_at(entry, entry.frame_end(self.cursor.offset));
        }
        self.skip_others(feed);
        self.position
    }

    /// Moves the cursor over entries for other users, so that a position that was sent never goes back.
    fn skip_others(&mut self, feed: &Feed) {
        if !self.current || !feed.holds_all_from(self.cursor.entry, &self.user) {
            return;
        }
        let next = feed.next_for(self.cursor.entry, self.reader()).unwrap_or(feed.end());
        if next > self.cursor.entry {
            self.cursor = Cursor { entry: next, offset: 0 };
            self.position = feed.position_before(next);
        }
    }

    fn reader(&self) -> Reader<'_> {
        Reader { user: &self.user, live_from: self.live_from }
    }

    /// Whether its socket has part of a frame of the feed.
    pub fn is_inside_frame(&self, feed: &Feed) -> bool {
        self.cursor.offset > 0
            && feed.get(self.cursor.entry).is_some_and(|entry| !entry.is_boundary(self.cursor.offset))
    }

    /// The feed lets go of the entry it stands in: keeps the rest of the frame whose begin the socket has.
    pub fn keep_tail(&mut self, entry: &Entry, tails: &mut SharedTails, tally: &mut Tally) {
        tally.deliveries += 1;
        let end = entry.frame_end(self.cursor.offset);
        let (frame, left) = tails.tail(entry, self.cursor, tally);
        if self.queued() == 0 {
            self.outbox = Outbox::Tail { frame, left };
        } else {
            let queue = self.outbox_mut();
            queue.bytes += left as usize;
            queue.frames.push_front(frame.slice(frame.len() - left as usize..));
            queue.tail_of = Some(frame);
        }
        self.position = position_at(entry, end);
        let whole = end as usize == entry.bytes.len();
        self.cursor = if whole {
            Cursor { entry: self.cursor.entry + 1, offset: 0 }
        } else {
            Cursor { offset: end, ..self.cursor }
        };
    }

    /// Counts, once, that the feed has removed events without id which came while it was connected and which it has not
    /// got. They are in no history.
    pub fn count_bare_miss(&mut self, feed: &Feed, tally: &mut Tally) {
        if feed.has_evicted_plain(self.cursor.entry.max(self.live_from)) {
            tally.pubsub_misses += 1;
            self.live_from = feed.start();
        }
    }

    /// Writes what its channel has for it, from its cursor to the feed's end, and what waits for it alone.
    pub fn flush(&mut self, feed: &Feed, tally: &mut Tally) -> Flushed {
        if self.cursor.entry < feed.start() {
            self.count_bare_miss(feed, tally);
            // What it had begun to write was kept whole when the feed let go of it.
            let held = self.current && feed.holds_all_from(self.cursor.entry, &self.user);
            if self.position < feed.before() && !held {
                self.current = false;
                return match self.flush_queue(tally) {
                    Flushed::All => Flushed::Behind,
                    other => other,
                };
            }
            self.cursor = Cursor { entry: feed.start(), offset: 0 };
            self.position = self.position.max(feed.before());
        }
        let flushed = self.write_from(feed, tally);
        self.current = flushed == Flushed::All;
        if self.current {
            self.cursor = Cursor { entry: feed.end(), offset: 0 };
            self.position = feed.position();
        }
        flushed
    }

    /// Writes what a page of history has for it. The page may go afterwards: a frame whose begin the socket has
    /// is kept whole.
    pub fn flush_page(&mut self, page: &Feed, tails: &mut SharedTails, tally: &mut Tally) -> Flushed {
        let Lookup::Found(cursor) = page.find(self.position) else { return Flushed::Behind };
        self.cursor = cursor;
        self.current = false;
        let flushed = self.write_from(page, tally);
        match flushed {
            Flushed::All => self.position = page.position(),
            _ if self.is_inside_frame(page) => {
                let entry = page.get(self.cursor.entry).expect("a cursor inside a frame is inside an entry");
                self.keep_tail(entry, tails, tally);
            }
            _ => {}
        }
        self.cursor = Cursor::default(); // it was the page's
        flushed
    }

    /// Writes what waits for it alone.
    pub fn flush_queue(&mut self, tally: &mut Tally) -> Flushed {
        let nothing = Feed::new(EventId(0), EventId(0));
        let cursor = std::mem::take(&mut self.cursor);
        let flushed = self.write_from(&nothing, tally);
        self.cursor = cursor;
        flushed
    }

    fn write_from(&mut self, feed: &Feed, tally: &mut Tally) -> Flushed {
        if self.blocked {
            return Flushed::Blocked;
        }
        if let Some(flushed) = self.write_one(feed, tally) {
            return flushed;
        }
        let mut burst = 0;
        loop {
            // Frames for this client alone go between two frames of the feed, never into one.
            let inside = self.queued() > 0 && self.is_inside_frame(feed);
            let mut numbers = [0u64; SLICES];
            let mut slices = [IoSlice::new(&[]); SLICES];
            let mut count = 0;
            let mut queued = 0;
            let mut size = 0;
            let mut missed = false;
            match &self.outbox {
                Outbox::Tail { frame, left } if !inside => {
                    slices[0] = IoSlice::new(&frame[frame.len() - *left as usize..]);
                    size = *left as usize;
                    queued = 1;
                }
                Outbox::Frames(queue) if !inside => {
                    // All of them are written before any event: the positions in welcome, reset and ping hold only
                    // at their place in the stream.
                    for frame in queue.frames.iter().take(SLICES) {
                        slices[queued] = IoSlice::new(frame);
                        size += frame.len();
                        queued += 1;
                    }
                }
                _ => {}
            }
            let mut next = self.cursor.entry;
            while queued + count < SLICES && size < BURST {
                let Some(number) = feed.next_for(next, self.reader()) else { break };
                let entry = feed.get(number).expect("next_for names entries that are held");
                if entry.kind == Kind::Reset && !self.wants_recovery {
                    missed = true;
                    break;
                }
                let begin = if number == self.cursor.entry { self.cursor.offset as usize } else { 0 };
                let end =
                    if inside { entry.frame_end(self.cursor.offset) as usize } else { entry.bytes.len() };
                slices[queued + count] = IoSlice::new(&entry.bytes[begin..end]);
                numbers[count] = number;
                size += end - begin;
                count += 1;
                next = number + 1;
                if inside {
                    break;
                }
            }
            if size == 0 {
                return if missed { Flushed::Missed } else { Flushed::All };
            }
            tally.writes += 1;
            let written = match &slices[..queued + count] {
                [one] => self.stream.write(one),
                many => self.stream.write_vectored(many),
            };
            let written = match written {
                Ok(written) => written,
                Err(error) => match self.not_written(&error) {
                    Some(flushed) => return flushed,
                    None => continue,
                },
            };
            self.count_written(written, tally);
            let rest = self.take_queued(written, queued);
            self.advance(feed, &numbers[..count], rest, tally);
            if written < size {
                // A short write says that the socket is full; writable comes when it has room again.
                self.blocked = true;
                return Flushed::Blocked;
            }
            burst += written;
            if burst >= BURST {
                return Flushed::More;
            }
        }
    }

    /// The common case, live: one entry lies ahead and nothing waits for this client alone. `None`: it is another.
    fn write_one(&mut self, feed: &Feed, tally: &mut Tally) -> Option<Flushed> {
        if !matches!(self.outbox, Outbox::Nothing) || self.cursor.offset > 0 {
            return None;
        }
        let Some(number) = feed.next_for(self.cursor.entry, self.reader()) else { return Some(Flushed::All) };
        if number + 1 != feed.end() {
            return None;
        }
        let entry = feed.get(number).filter(|entry| entry.kind != Kind::Reset)?;
        tally.writes += 1;
        match self.stream.write(&entry.bytes) {
            Ok(written) => {
                self.count_written(written, tally);
                if written == entry.bytes.len() {
                    tally.deliveries += entry.frames() as u64;
                    return Some(Flushed::All); // the caller puts the cursor at the end
                }
                self.advance(feed, &[number], written, tally);
                self.blocked = true;
                Some(Flushed::Blocked)
            }
            Err(error) => self.not_written(&error),
        }
    }

    /// What an error of a write means; `None`: it is to be tried again.
    fn not_written(&mut self, error: &io::Error) -> Option<Flushed> {
        match error.kind() {
            io::ErrorKind::Interrupted => None,
            io::ErrorKind::WouldBlock => {
                self.blocked = true;
                Some(Flushed::Blocked)
            }
            _ => Some(Flushed::Dead),
        }
    }

    /// Takes what was written of the first `frames` that wait; the rest was written from the feed.
    fn take_queued(&mut self, mut written: usize, frames: usize) -> usize {
        if frames == 0 {
            return written;
        }
        let left = match &mut self.outbox {
            Outbox::Nothing => 0,
            Outbox::Tail { left, .. } => {
                let part = written.min(*left as usize);
                written -= part;
                *left -= part as u32;
                *left as usize
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
                queue.frames.len()
            }
        };
        if left == 0 {
            self.outbox = Outbox::Nothing;
        }
        written
    }

    /// Moves the cursor over what was written of these entries.
    fn advance(&mut self, feed: &Feed, numbers: &[u64], mut written: usize, tally: &mut Tally) {
        for number in numbers {
            if written == 0 {
                break;
            }
            let entry = feed.get(*number).expect("it was held when it was written");
            let begin = if *number == self.cursor.entry { self.cursor.offset } else { 0 };
            let part = written.min(entry.bytes.len() - begin as usize);
            written -= part;
            let offset = begin + part as u32;
            let frames = entry.frames_until(offset);
            let before = if begin == 0 { 0 } else { entry.frames_until(begin) };
            match entry.kind {
                Kind::Reset => tally.resets += (frames - before) as u64,
                _ => tally.deliveries += (frames - before) as u64,
            }
            if offset as usize == entry.bytes.len() {
                self.cursor = Cursor { entry: number + 1, offset: 0 };
                self.position = entry.last;
            } else {
                self.cursor = Cursor { entry: *number, offset };
                if frames > 0 {
                    self.position = EventId(entry.before().0 + frames as u64);
                }
            }
        }
    }

    /// Begins its end: the close frame for `reason`, if there is one, is its last word.
    pub fn close(&mut self, reason: CloseReason) {
        self.partial = None; // what it says now means nothing
        // Before the upgrade an HTTP answer is all there is to say.
        if let Some((code, text)) = reason.close().filter(|_| self.is_open()) {
            self.enqueue(frame::close(code, text));
        }
        self.state = State::Closing { finished: false };
    }

    /// Writes its last words, and closes our end once they are out. `false`: the socket is dead.
    pub fn finish(&mut self, feed: Option<&Feed>, tally: &mut Tally) -> bool {
        if let Some(feed) = feed.filter(|feed| self.is_inside_frame(feed)) {
            let entry =
                feed.get(self.cursor.entry).expect("a cursor inside a frame is inside an entry").clone();
            self.keep_tail(&entry, &mut SharedTails::default(), tally);
        }
        match self.flush_queue(tally) {
            Flushed::All if matches!(self.state, State::Closing { finished: true }) => true,
            Flushed::All => {
                self.state = State::Closing { finished: true };
                self.stream.shutdown(std::net::Shutdown::Write).is_ok()
            }
            Flushed::Dead => false,
            _ => true,
        }
    }

    /// A message that was begun and not ended since before `then`.
    pub fn began_before(&self, then: Instant) -> bool {
        self.partial.as_ref().is_some_and(|partial| partial.since < then)
    }
}

/// The position of a client that has everything of this entry up to here, where a frame ends.
fn position_at(entry: &Entry, end: u32) -> EventId {
    EventId(entry.before().0 + entry.frames_until(end) as u64).min(entry.last)
}
