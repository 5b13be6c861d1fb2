//! What comes from a client's socket.

use bytes::Bytes;

use super::Shard;
use super::join::Asked;
use crate::bus::{Answer, ConnectionId, Publish, PublishError, Request};
use crate::config::ClientPublish;
use crate::limits::connections::LimitReached;
use crate::limits::rate::Decision;
use crate::protocol::close::CloseReason;
use crate::protocol::event::EventId;
use crate::protocol::frame::{self, ClientFrame, ErrorCode};
use crate::ws::connection::State;
use crate::ws::decoder::{self, Incoming};
use crate::ws::handshake::{self, HandshakeOutcome};

/// Nothing more is read from a client that has this many publishes without an answer,
const UNANSWERED_MAX: u32 = 256;

/// or that leaves this many bytes of acks, pongs and errors unread. It is read again at half of either.
const QUEUE_MAX: usize = 64 * 1024;

/// Pongs that answer the pings of one read, in bytes; of more than these only the last is sent.
const PONGS_MAX: usize = 2 * 1024;

/// Why nothing more is taken from a client.
enum End {
    /// It closes, with this code.
    Close(Option<u16>),
    /// It is closed.
    For(CloseReason),
}

impl From<CloseReason> for End {
    fn from(reason: CloseReason) -> End {
        End::For(reason)
    }
}

impl Shard {
    /// Reads what has come, up to one scratch buffer full; `to_end` where the peer's end may be there, which epoll
    /// does not tell twice.
    pub(super) fn on_readable(&mut self, slot: u32, to_end: bool) {
        let id = self.id_of(slot);
        loop {
            let connection = &mut self.connections[slot as usize];
            if connection.read_paused {
                return;
            }
            let Ok((length, new)) = connection.read(&mut self.scratch) else {
                return self.end_or_remove(slot);
            };
            if let Some(new) = new.filter(|new| *new > 0) {
                // A client that sends and does not read is no better than a silent one.
                if !connection.blocked {
                    connection.last_activity = self.tick;
                }
                self.tally.received += new as u64;
            }
            match connection.state {
                _ if length == 0 => {}
                State::Request(_) => self.on_request_bytes(slot, length),
                // A client may only speak after the upgrade; what it says here would be lost.
                State::Joining(_) => self.refuse(slot, handshake::too_early(), CloseReason::HttpResponse),
                State::Live | State::Replay(_) | State::Missed => self.on_frames(slot, length),
                State::Closing { .. } => {}
            }
            if self.find(id).is_none() || new.is_none() {
                return;
            }
            if new == Some(0) {
                return self.on_end(slot);
            }
            if length == self.scratch.len() {
                return self.read_later(slot);
            }
            if !to_end {
                return; // a short read has emptied the socket (epoll(7)); what comes later is told anew
            }
        }
    }

    fn on_end(&mut self, slot: u32) {
        match self.connections[slot as usize].state {
            // A proxy takes an end without an answer for a dead node.
            State::Request(Some(_)) => self.refuse(slot, handshake::incomplete(), CloseReason::HttpResponse),
            _ => self.end_or_remove(slot),
        }
    }

    fn end_or_remove(&mut self, slot: u32) {
        match self.connections[slot as usize].state {
            State::Closing { .. } => self.remove(slot),
            _ => self.end(slot, CloseReason::ConnectionLost),
        }
    }

    fn on_request_bytes(&mut self, slot: u32, length: usize) {
        let bytes = &self.scratch[..length];
        let connection = &mut self.connections[slot as usize];
        let loopback = self.context.is_loopback(connection.stream());
        let State::Request(kept) = &mut connection.state else { return };
        let outcome = match kept {
            None => handshake::decide(bytes, &self.context, &mut connection.connection_slot, loopback),
            Some(kept) => {
                kept.extend_from_slice(bytes);
                handshake::decide(kept, &self.context, &mut connection.connection_slot, loopback)
            }
        };
        match outcome {
            HandshakeOutcome::Incomplete(read) => match kept {
                None => *kept = Some(Box::new(bytes[read..].to_vec())),
                Some(kept) => drop(kept.drain(..read)),
            },
            HandshakeOutcome::Answer(answer) => self.answer(slot, answer, CloseReason::HttpResponse),
            HandshakeOutcome::Reject(answer, reason) => self.refuse(slot, answer, reason),
            // It waited to be accepted when the node began to stop.
            HandshakeOutcome::Join(_) if self.drain.is_some() => {
                self.refuse(slot, handshake::stopping(), CloseReason::Draining);
            }
            HandshakeOutcome::Join(mut join) => {
                if !self.context.limits.acquire_user(&join.user) {
                    return self.refuse(slot, LimitReached::User.answer(), LimitReached::User.reason());
                }
                connection.user = std::mem::take(&mut join.user);
                connection.state = State::Joining(join);
                self.join(slot, Asked::Nothing);
                self.wait_to_join(slot);
            }
        }
    }

    fn on_frames(&mut self, slot: u32, length: usize) {
        let id = self.id_of(slot);
        let mut begin = 0;
        loop {
            let connection = &mut self.connections[slot as usize];
            let data = &mut self.scratch[begin..length];
            let mut messages = std::mem::take(&mut self.messages);
            let read = decoder::read(&mut connection.partial, data, self.limits, &mut messages);
            let more = messages.len() == decoder::MESSAGES_AT_ONCE;
            let end = self.on_messages(slot, messages.drain(..));
            self.messages = messages;
            let connection = &mut self.connections[slot as usize];
            // A client that leaves its pongs unread gets no more of them.
            if !self.pongs.is_empty() && connection.queued() < QUEUE_MAX / 2 {
                connection.enqueue(Bytes::copy_from_slice(&self.pongs));
            }
            self.pongs.clear();
            match (end, read) {
                (Err(End::Close(code)), _) => {
                    connection.enqueue(frame::close_answer(code));
                    return self.end(slot, CloseReason::ClosedByPeer);
                }
                (Err(End::For(reason)), _) | (Ok(()), Err(reason)) => return self.end(slot, reason),
                (Ok(()), Ok(read)) => begin += read,
            }
            if self.connections[slot as usize].queued() > 0 {
                self.flush(slot);
            }
            let Some(connection) = self.find(id).map(|slot| &mut self.connections[slot as usize]) else {
                return;
            };
            if !connection.is_open() {
                return;
            }
            connection.read_paused =
                connection.queued() > QUEUE_MAX || connection.unanswered >= UNANSWERED_MAX;
            if connection.read_paused || !more {
                connection.keep(&self.scratch[begin..length]);
                return self.record_partial(slot, length);
            }
        }
    }

    fn on_messages(&mut self, slot: u32, messages: impl Iterator<Item = Incoming>) -> Result<(), End> {
        let now = self.context.limits.allowances.now();
        for message in messages {
            let connection = &mut self.connections[slot as usize];
            let answers_ping = message == Incoming::Pong && connection.take_pong();
            if !answers_ping && !matches!(message, Incoming::Close(_)) {
                let (bytes, frames) = message.size();
                let decision = self.check_rate(slot, bytes, frames, now);
                if let Decision::Reject(text) | Decision::Close(text) = &decision {
                    self.reject_message(slot, &message, text, matches!(decision, Decision::Close(_)))?;
                    continue;
                }
            }
            match message {
                Incoming::Text(text, _) => self.on_text(slot, &text)?,
                Incoming::Binary(bytes, _) => self.publish(slot, bytes, None, None),
                Incoming::Ping(payload) => {
                    // The last one is as good as all before it (RFC 6455 section 5.5.3).
                    if self.pongs.len() + payload.len() > PONGS_MAX {
                        self.pongs.clear();
                    }
                    frame::put_pong(&mut self.pongs, &payload);
                }
                Incoming::Pong => {}
                Incoming::Close(code) => return Err(End::Close(code)),
            }
        }
        Ok(())
    }

    fn check_rate(&mut self, slot: u32, bytes: usize, frames: u32, now: u64) -> Decision {
        let limits = &self.context.limits;
        let Some(limiter) = limits.allowances.limiter() else { return Decision::Accept };
        let connection = &mut self.connections[slot as usize];
        connection.load_allowance(limits);
        let client = connection.allowance.as_deref();
        let cost = limiter.cost(bytes, frames);
        limiter.check(&mut connection.tat, &mut connection.rejected, client, cost, now)
    }

    /// Rejects a message that is over the rate.
    fn reject_message(
        &mut self,
        slot: u32,
        message: &Incoming,
        text: &str,
        close: bool,
    ) -> Result<(), CloseReason> {
        self.metrics.reject_message(self.id, ErrorCode::RateLimited, text);
        let connection = &mut self.connections[slot as usize];
        if close || !connection.wants_recovery {
            return Err(CloseReason::RateLimited);
        }
        let reference = match message {
            Incoming::Text(text, _) if connection.json_mode => frame::reference_in(text),
            _ => None,
        };
        connection.enqueue(frame::error(ErrorCode::RateLimited, text, reference.as_deref()));
        Ok(())
    }

    /// An error ends the connection.
    fn on_text(&mut self, slot: u32, text: &str) -> Result<(), CloseReason> {
        self.numbers().messages_received.add(1);
        let connection = &mut self.connections[slot as usize];
        let (event, to, reference) = if connection.json_mode {
            match frame::parse_client_frame(&connection.user, text) {
                Ok(ClientFrame::Publish(publish)) => (publish.event, publish.to, publish.reference),
                Ok(ClientFrame::Ping) => {
                    let feed = self.channels[connection.channel as usize].feed.as_ref();
                    let position = feed.map(|feed| connection.shown_position(feed));
                    connection.enqueue(frame::json_ping(position));
                    return Ok(());
                }
                Err(bad) => {
                    self.metrics.reject_message(self.id, ErrorCode::Invalid, &bad.message);
                    connection.enqueue(frame::error(
                        ErrorCode::Invalid,
                        &bad.message,
                        bad.reference.as_deref(),
                    ));
                    return Ok(());
                }
            }
        } else {
            (frame::chat_event(&connection.user, text), None, None)
        };
        let to_others = to.is_some() && self.settings.client_publish != ClientPublish::Any;
        if !connection.may_publish || to_others {
            let text =
                if to_others { "clients may not address one user here" } else { "you may not publish here" };
            self.metrics.reject_message(self.id, ErrorCode::Forbidden, text);
            if !connection.wants_recovery {
                return Err(CloseReason::Forbidden);
            }
            connection.enqueue(frame::error(ErrorCode::Forbidden, text, reference.as_deref()));
            return Ok(());
        }
        self.publish(slot, event, to, reference);
        Ok(())
    }

    fn publish(&mut self, slot: u32, event: Bytes, to: Option<String>, reference: Option<Box<str>>) {
        let answer = Answer::Connection(self.id_of(slot), reference);
        let connection = &mut self.connections[slot as usize];
        connection.unanswered += 1;
        let channel = self.channels[connection.channel as usize].name.clone();
        self.ask(Request::Publish(Publish { channel, to: to.map(Into::into), key: None, event, answer }));
    }

    pub(super) fn on_published(
        &mut self,
        id: ConnectionId,
        reference: Option<&str>,
        result: Result<EventId, PublishError>,
    ) {
        let Some(slot) = self.find(id) else { return };
        let connection = &mut self.connections[slot as usize];
        if !connection.is_open() {
            return;
        }
        connection.unanswered -= 1;
        match result {
            Ok(event) => {
                if let Some(reference) = reference {
                    connection.enqueue(frame::ack(reference, event));
                }
            }
            Err(error) => {
                let code = match error {
                    PublishError::Refused(_) => ErrorCode::Unavailable,
                    PublishError::Unknown => ErrorCode::Unknown,
                };
                let text = error.to_string();
                self.metrics.reject_message(self.id, code, &text);
                if !connection.wants_recovery {
                    return self.end(slot, CloseReason::PublishFailed);
                }
                // What is wrong with the bus is for operators.
                let text = if code == ErrorCode::Unavailable { frame::NOT_PUBLISHED } else { &text };
                connection.enqueue(frame::error(code, text, reference));
            }
        }
        if connection.queued() > 0 {
            self.flush(slot);
        } else {
            self.resume_reading(slot);
        }
    }

    /// Reads from a client again that has taken what waited for it.
    pub(super) fn resume_reading(&mut self, slot: u32) {
        let connection = &mut self.connections[slot as usize];
        let eased = connection.queued() <= QUEUE_MAX / 2 && connection.unanswered <= UNANSWERED_MAX / 2;
        if connection.read_paused && eased {
            connection.read_paused = false;
            self.read_later(slot);
        }
    }
}
