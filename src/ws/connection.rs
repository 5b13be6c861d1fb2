//! One connection: its states, and the one function that writes.
//!
//! A plain struct in a shard's slab whose methods never wait. It holds a few numbers; what it has to say to this
//! client alone waits in a queue that exists only while something is in it.

use std::io::{self, Read};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use mio::net::TcpStream;

use crate::auth::token::NEVER;
use crate::feed::{Cursor, Feed};
use crate::limits::connections::{Address, ConnectionLimits, ConnectionSlot};
use crate::limits::rate::Allowance;
use crate::protocol::close::CloseReason;
use crate::protocol::event::EventId;
use crate::protocol::frame;
use crate::ws::decoder::Partial;
use crate::ws::outbox::{FRAME_OVERHEAD, Outbox, Queue, SharedTails};
use crate::ws::replay::{PartState, Replay};
use crate::ws::session::Join;
use crate::ws::writer::{Flushed, Tally};

/// Slowest client whose pong is in time, in bytes a second: before a ping it reads all bytes that were written earlier.
const SLOWEST_READER: u32 = 32 * 1024;

/// Most bytes on their way to a client: more than the kernels of node, proxy and client hold with Linux' defaults
/// (`tcp_rmem` 6 MiB and `tcp_wmem` 4 MiB at most).
const ON_THE_WAY_MAX: u32 = 16 * 1024 * 1024;

/// No user has an earlier or later connection.
pub const NONE: u32 = u32::MAX;

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

const _: () = assert!(size_of::<State>() == 16, "a state is in every connection");

/// One connection.
#[derive(Debug)]
pub struct Connection {
    pub(super) stream: TcpStream,
    /// Tells it from the earlier owners of its slot.
    pub generation: u32,
    /// What it is doing.
    pub state: State,
    pub(super) outbox: Outbox,
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
    pub(super) live_from: u64,
    /// Its last flush wrote everything, and its socket has not been full since.
    pub(super) current: bool,
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
    pub(super) unconfirmed: u32,
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
    pub(super) fn outbox_mut(&mut self) -> &mut Queue {
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

    pub(super) fn count_written(&mut self, written: usize, tally: &mut Tally) {
        tally.bytes += written as u64;
        self.unconfirmed = self.unconfirmed.saturating_add(written as u32);
    }

    /// Finds the allowance of its client when it is first needed.
    pub fn load_allowance(&mut self, limits: &ConnectionLimits) {
        if self.allowance.is_none() {
            self.allowance = limits.allowance(self.connection_slot, &self.user);
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
