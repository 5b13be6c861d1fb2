//! One connection: what a shard keeps for a client.
//!
//! A plain struct in the slab of its shard. Its methods never wait. It has no queue of events: it
//! is a position in its channel, and only frames for it alone are queued.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use mio::net::TcpStream;

use crate::feed::Feed;
use crate::limits::connections::{Address, ConnectionLimits, ConnectionSlot};
use crate::limits::rate::{Allowance, Decision};
use crate::protocol::close::CloseReason;
use crate::protocol::frame;
use crate::ws::client::{Client, Join};
use crate::ws::inbound::Inbound;
use crate::ws::liveness::Liveness;
use crate::ws::outbox::{Outbox, SharedTails};
use crate::ws::progress::Progress;
use crate::ws::replay::Replay;
use crate::ws::socket::Socket;
use crate::ws::writer::{Flushed, Sink, Tally};

/// No slot, and no channel.
pub const NONE: u32 = u32::MAX;

/// What a connection is doing.
#[derive(Debug)]
pub enum State {
    /// The request is incomplete. With its bytes so far.
    Request(Option<Box<Vec<u8>>>),
    /// The client joins as soon as the bus has answered.
    Joining(Box<Join>),
    /// It follows its channel in the feed.
    Live,
    /// The feed has left it behind: it reads history, page by page.
    Replay(Replay),
    /// It has no default channel: it follows channels by subscriptions alone.
    WithoutChannel,
    /// It missed events and gets no recovery frames, so it is going to be closed.
    Missed,
    /// Its last frames are written, then it waits until the peer closes its side.
    Closing {
        /// They are written, and the write side is closed.
        finished: bool,
    },
    /// Its socket is dead or done. Its slot is freed at the end of the turn.
    Discarded,
}

const _: () = assert!(size_of::<State>() == 16, "every connection has a state");

/// The place of a member in its channel.
#[derive(Clone, Copy, Debug)]
pub struct Membership {
    /// The key of the channel in the shard. Set when the connection joins.
    pub channel: u32,
    /// The index among the members of the channel.
    pub index: u32,
    /// The numbers of its neighbours in the list of its user's members of the channel.
    pub previous: u32,
    pub next: u32,
}

/// One connection.
#[derive(Debug)]
pub struct Connection {
    /// Distinguishes it from earlier connections in its slot.
    pub generation: u32,
    pub state: State,
    pub socket: Socket,
    /// What it adds to the counts of the node.
    pub connection_slot: ConnectionSlot,
    pub client: Client,
    pub membership: Membership,
    pub liveness: Liveness,
    pub inbound: Inbound,
    outbox: Outbox,
    /// Its progress in its default channel.
    pub progress: Progress,
}

/// The memory of a node with idle connections is mostly this. In debug builds sockets of mio are
/// larger.
const _: () = assert!(
    size_of::<Connection>() <= 176 + (size_of::<TcpStream>() - size_of::<i32>()).next_multiple_of(8),
    "no connection takes more than 176 bytes"
);

impl Connection {
    /// A connection that has sent nothing yet.
    pub fn new(stream: TcpStream, connection_slot: ConnectionSlot, generation: u32, tick: u32) -> Connection {
        Connection {
            generation,
            state: State::Request(None),
            socket: Socket::new(stream),
            connection_slot,
            client: Client::default(),
            membership: Membership { channel: NONE, index: NONE, previous: NONE, next: NONE },
            liveness: Liveness::new(tick),
            inbound: Inbound::default(),
            outbox: Outbox::default(),
            progress: Progress::default(),
        }
    }

    /// Client address for logs: the address it is counted under, else the peer address. `None` if a
    /// proxy reported an address that is over a limit, since that is not kept.
    pub fn client_address(&self) -> Option<Address> {
        match self.connection_slot {
            ConnectionSlot::Client(address) => Some(address),
            ConnectionSlot::Rejecting { reported: true, .. } => None,
            _ => self.socket.stream().peer_addr().ok().map(|peer| peer.ip().into()),
        }
    }

    /// Whether it is upgraded and not closing.
    pub fn is_open(&self) -> bool {
        self.is_member() || matches!(self.state, State::WithoutChannel)
    }

    /// Whether it is a member of its default channel.
    pub fn is_member(&self) -> bool {
        matches!(self.state, State::Live | State::Replay(_) | State::Missed)
    }

    /// Whether other members have events that it has not got: its socket is full, or it reads
    /// history.
    pub fn is_behind(&self) -> bool {
        self.socket.is_blocked() || matches!(self.state, State::Replay(_))
    }

    // ---- joining ----

    /// Has it wait for the bus. Its user is counted.
    pub fn start_joining(&mut self, mut join: Box<Join>) {
        self.client = std::mem::take(&mut join.client);
        self.state = State::Joining(join);
    }

    // ---- writing ----

    /// What writing needs of it, and its progress in its default channel.
    #[inline]
    pub fn split(&mut self) -> (Sink<'_>, &mut Progress) {
        let Connection { socket, outbox, liveness, client, progress, .. } = self;
        (Sink { socket, outbox, liveness, client }, progress)
    }

    /// Writes the outbox alone.
    pub fn flush_queue(&mut self, tally: &mut Tally) -> Flushed {
        let (mut sink, progress) = self.split();
        sink.flush_queue(progress, tally)
    }

    // ---- reading ----

    /// Reads into `buffer`, after the bytes kept from the last read. Returns how many bytes are in
    /// it, and how many of them are new: `None` if there is nothing to read, 0 at the end of the
    /// stream.
    pub fn read(&mut self, buffer: &mut [u8]) -> io::Result<(usize, Option<usize>)> {
        let kept = self.inbound.take_unread();
        buffer[..kept.len()].copy_from_slice(&kept);
        let new = self.socket.read(&mut buffer[kept.len()..])?;
        Ok((kept.len() + new.unwrap_or(0), new))
    }

    /// Whether the client started a message before `then` and has not completed it.
    pub fn has_partial_since(&self, then: Instant) -> bool {
        self.inbound.partial.as_ref().is_some_and(|partial| partial.since < then)
    }

    /// Checks the rate of a message of this size.
    pub fn check_rate(&mut self, limits: &ConnectionLimits, bytes: usize, frames: u32, now: u64) -> Decision {
        let Some(limiter) = limits.allowances.limiter() else { return Decision::Accept };
        self.allowance(limits);
        self.inbound.check_rate(limiter, limiter.cost(bytes, frames), now)
    }

    /// Checks the rate of a frame that is as much work as this many quarters of a message.
    pub fn check_work(&mut self, limits: &ConnectionLimits, quarters: usize, now: u64) -> Decision {
        let Some(limiter) = limits.allowances.limiter() else { return Decision::Accept };
        self.allowance(limits);
        self.inbound.check_rate(limiter, limiter.cost_of_quarters(quarters), now)
    }

    /// The allowance of the client, looked up when it is first needed. `None` if the connection
    /// shares none.
    pub fn allowance(&mut self, limits: &ConnectionLimits) -> Option<&Allowance> {
        let allowance = &mut self.inbound.allowance;
        if allowance.is_none() {
            *allowance = limits.allowance(self.connection_slot, &self.client.user);
        }
        allowance.as_deref()
    }

    /// The same, to be kept.
    pub fn shared_allowance(&mut self, limits: &ConnectionLimits) -> Option<Arc<Allowance>> {
        self.allowance(limits)?;
        self.inbound.allowance.clone()
    }

    // ---- the outbox ----

    /// Queues a frame.
    pub fn enqueue(&mut self, frame: Bytes) {
        self.outbox.push(frame);
    }

    /// Queues a WebSocket ping.
    pub fn ping(&mut self) {
        self.liveness.await_pong();
        self.enqueue(frame::PING);
    }

    /// Bytes of queued frames.
    pub fn queued(&self) -> usize {
        self.outbox.bytes()
    }

    /// Memory kept until the socket takes it: of frames for this client alone in bytes, and the
    /// address and length of a frame that connections share.
    pub fn unsent(&self) -> (u64, Option<(usize, u64)>) {
        self.outbox.memory()
    }

    // ---- closing ----

    /// Starts to close it. If the reason has a close frame, it is the last one.
    pub fn close(&mut self, reason: CloseReason) {
        self.inbound.partial = None; // what the client sends now is ignored
        // Before the upgrade an HTTP response is all that is sent.
        if let Some((code, text)) = reason.close().filter(|_| self.is_open()) {
            self.enqueue(frame::close(code, text));
        }
        self.state = State::Closing { finished: false };
    }

    /// Flushes queued frames, then shuts down the write side. `feed` is that of its channel if it
    /// was a member. `false` if the socket is dead.
    pub fn finish(&mut self, feed: Option<&Feed>, tally: &mut Tally) -> bool {
        if let Some(feed) = feed {
            let (mut sink, progress) = self.split();
            sink.keep_frame(progress, feed, &mut SharedTails::default(), tally);
        }
        match self.flush_queue(tally) {
            Flushed::All if matches!(self.state, State::Closing { finished: true }) => true,
            Flushed::All => {
                self.state = State::Closing { finished: true };
                self.socket.shutdown()
            }
            Flushed::Dead => false,
            _ => true,
        }
    }
}
