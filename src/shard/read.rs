//! Reading from sockets: the request, then frames.

use bytes::Bytes;

use super::Shard;
use super::deferred::Pending;
use crate::bus::BusError;
use crate::limits::connections::LimitReached;
use crate::limits::rate::Decision;
use crate::protocol::client_frame;
use crate::protocol::close::CloseReason;
use crate::protocol::frame::{self, ErrorCode, Regarding};
use crate::ws::connection::State;
use crate::ws::decoder::{self, Incoming};
use crate::ws::handshake::{self, HandshakeOutcome, rejections};
use crate::ws::inbound::QUEUE_MAX;

/// Most bytes that one read takes. Connections with more take turns.
pub(super) const READ_MAX: usize = 16 * 1024;

/// Pongs that answer the pings of one read, in bytes. Beyond it only the last is sent.
const PONGS_MAX: usize = 2 * 1024;

/// Buffers that all connections read into, one after the other.
#[derive(Debug)]
pub(super) struct Input {
    buffer: Box<[u8]>,
    messages: Vec<Incoming>,
    pongs: Vec<u8>,
    limits: decoder::Limits,
}

impl Input {
    pub fn new(limits: decoder::Limits) -> Input {
        Input { buffer: vec![0; READ_MAX].into(), messages: Vec::new(), pongs: Vec::new(), limits }
    }
}

/// Why a connection is not read from any more.
enum End {
    /// The client has sent a close frame with this code.
    ByClient(Option<u16>),
    For(CloseReason),
}

impl From<CloseReason> for End {
    fn from(reason: CloseReason) -> End {
        End::For(reason)
    }
}

impl Shard {
    /// Reads from a socket, up to one buffer full. `to_end`: the end of the stream may follow,
    /// which epoll does not report twice.
    pub(super) fn on_readable(&mut self, slot: u32, to_end: bool) {
        loop {
            let connection = &mut self.connections[slot];
            if connection.inbound.is_paused() || matches!(connection.state, State::Discarded) {
                return;
            }
            let Ok((length, new)) = connection.read(&mut self.input.buffer) else {
                return self.abort(slot);
            };
            if let Some(new) = new.filter(|new| *new > 0) {
                // A client that sends but does not read counts as idle.
                if !connection.socket.is_blocked() {
                    connection.liveness.record_activity(self.tick);
                }
                self.tally.received += new as u64;
            }
            match connection.state {
                _ if length == 0 => {}
                State::Request(_) => self.on_request_bytes(slot, length),
                // Nothing would handle what a client sends before the upgrade.
                State::Joining(_) => self.reject(slot, &rejections::early_data()),
                State::Live | State::Replay(_) | State::WithoutChannel | State::Missed => {
                    self.on_frames(slot, length);
                }
                State::Closing { .. } | State::Discarded => {}
            }
            match new {
                None => return,
                Some(0) => return self.on_end(slot),
                Some(_) if length == self.input.buffer.len() => return self.read_later(slot),
                // A short read has emptied the socket (epoll(7)). The next bytes cause another
                // event.
                Some(_) if !to_end => return,
                Some(_) => {}
            }
        }
    }

    fn on_end(&mut self, slot: u32) {
        match self.connections[slot].state {
            // Without a response a proxy would consider the node dead.
            State::Request(Some(_)) => self.reject(slot, &rejections::incomplete()),
            _ => self.abort(slot),
        }
    }

    fn on_request_bytes(&mut self, slot: u32, length: usize) {
        let received = &self.input.buffer[..length];
        let connection = &mut self.connections[slot];
        let context = &self.context.handshake;
        let is_loopback = || context.is_loopback(connection.socket.stream());
        let State::Request(kept) = &mut connection.state else { return };
        let request = match kept {
            None => received,
            Some(kept) => {
                kept.extend_from_slice(received);
                kept
            }
        };
        let (outcome, connection_slot) =
            handshake::decide(request, context, connection.connection_slot, &is_loopback);
        connection.connection_slot = connection_slot;
        match outcome {
            HandshakeOutcome::Incomplete(read) => match kept {
                None => *kept = Some(Box::new(received[read..].to_vec())),
                Some(kept) => drop(kept.drain(..read)),
            },
            HandshakeOutcome::Respond(response) => {
                self.respond(slot, &response, CloseReason::HttpResponse);
            }
            HandshakeOutcome::Reject(rejection) => self.reject(slot, &rejection),
            HandshakeOutcome::RejectUpgraded(rejection, bytes) => self.reject_with(slot, &rejection, bytes),
            // It was in the accept queue when the drain started.
            HandshakeOutcome::Join(_) if self.drain.is_some() => {
                self.reject(slot, &rejections::stopping());
            }
            HandshakeOutcome::Join(join) => {
                if !self.context.handshake.limits.acquire_user(&join.client.user) {
                    return self.reject(slot, LimitReached::User.rejection());
                }
                let has_channel = join.channel.is_some();
                connection.start_joining(join);
                match has_channel {
                    true => self.join(slot, Pending::Nothing),
                    // The bus does not pass on commands to disconnect users yet.
                    false if self.context.handshake.readiness.are_commands_pending() => {
                        self.reject_join(slot, &BusError::Unavailable("starting".into()));
                    }
                    false => self.admit_without_channel(slot),
                }
                if matches!(self.connections[slot].state, State::Joining(_)) {
                    self.deadlines.joins.push(self.connections.id(slot), self.tick, &self.connections);
                }
            }
        }
    }

    fn on_frames(&mut self, slot: u32, length: usize) {
        let mut start = 0;
        loop {
            let connection = &mut self.connections[slot];
            let data = &mut self.input.buffer[start..length];
            let mut messages = std::mem::take(&mut self.input.messages);
            let read = decoder::read(&mut connection.inbound.partial, data, self.input.limits, &mut messages);
            let more = messages.len() == decoder::MESSAGES_AT_ONCE;
            let end = self.on_messages(slot, messages.drain(..));
            self.input.messages = messages;
            let connection = &mut self.connections[slot];
            // A client that does not read its pongs gets no more of them.
            if !self.input.pongs.is_empty() && connection.queued() < QUEUE_MAX / 2 {
                connection.enqueue(Bytes::copy_from_slice(&self.input.pongs));
            }
            self.input.pongs.clear();
            match (end, read) {
                (Err(End::ByClient(code)), _) => {
                    connection.enqueue(frame::close_answer(code));
                    return self.close(slot, CloseReason::ClosedByPeer);
                }
                (Err(End::For(reason)), _) | (Ok(()), Err(reason)) => return self.close(slot, reason),
                (Ok(()), Ok(read)) => start += read,
            }
            if connection.queued() > 0 {
                self.flush(slot);
            }
            let connection = &mut self.connections[slot];
            if !connection.is_open() {
                return;
            }
            let is_paused = connection.inbound.pause_if_due(connection.queued());
            if is_paused || !more {
                connection.inbound.keep(&self.input.buffer[start..length]);
                return self.record_partial(slot, length);
            }
        }
    }

    fn on_messages(&mut self, slot: u32, messages: impl Iterator<Item = Incoming>) -> Result<(), End> {
        let now = self.context.handshake.limits.allowances.now();
        for message in messages {
            let connection = &mut self.connections[slot];
            let answers_ping = message == Incoming::Pong && connection.liveness.take_pong();
            if !answers_ping && !matches!(message, Incoming::Close(_)) {
                let (bytes, frames) = message.size();
                match connection.check_rate(&self.context.handshake.limits, bytes, frames, now) {
                    Decision::Accept => {}
                    Decision::Reject(text) => {
                        self.reject_over_rate(slot, &message, &text)?;
                        continue;
                    }
                    Decision::Close(text) => {
                        self.context.metrics.reject_message(self.context.id, ErrorCode::RateLimited, &text);
                        return Err(CloseReason::RateLimited.into());
                    }
                }
            }
            match message {
                Incoming::Text(text, _) => self.on_text(slot, &text)?,
                Incoming::Binary(bytes, _) => {
                    if let Some(channel) = self.default_channel(slot).cloned() {
                        self.publish(slot, channel, bytes, None, None, Regarding::default());
                    }
                }
                Incoming::Ping(payload) => {
                    // A pong for the last ping answers all before it (RFC 6455 section 5.5.3).
                    let pongs = &mut self.input.pongs;
                    if pongs.len() + payload.len() > PONGS_MAX {
                        pongs.clear();
                    }
                    frame::put_pong(pongs, &payload);
                }
                Incoming::Pong => {}
                Incoming::Close(code) => return Err(End::ByClient(code)),
            }
        }
        Ok(())
    }

    fn reject_over_rate(&mut self, slot: u32, message: &Incoming, text: &str) -> Result<(), CloseReason> {
        let reference = match message {
            Incoming::Text(text, _) if self.connections[slot].client.is_json() => {
                client_frame::reference_in(text)
            }
            _ => None,
        };
        let (code, regarding) = (ErrorCode::RateLimited, Regarding { channel: None, reference });
        self.reject_message(slot, code, text, &regarding, CloseReason::RateLimited)
    }
}
