//! Messages of clients: what they publish, and the answers.

use bytes::Bytes;

use super::Shard;
use crate::bus::{Answer, ConnectionId, Publish, PublishError, Request};
use crate::config::ClientPublish;
use crate::protocol::close::CloseReason;
use crate::protocol::event::EventId;
use crate::protocol::frame::{self, ClientFrame, ErrorCode};
use crate::ws::connection::State;

impl Shard {
    /// Handles a text message. An error closes the connection.
    pub(super) fn on_text(&mut self, slot: u32, text: &str) -> Result<(), CloseReason> {
        self.metrics().messages_received.add(1);
        let connection = &mut self.connections[slot];
        let (event, to, reference) = if connection.client.json_mode {
            match frame::parse_client_frame(&connection.client.user, text) {
                Ok(ClientFrame::Publish(publish)) => (publish.event, publish.to, publish.reference),
                Ok(ClientFrame::Ping) => {
                    let feed = self.channels[connection.membership.channel].feed.as_ref();
                    let position = feed.map(|feed| connection.shown_position(feed));
                    connection.enqueue(frame::json_ping(position));
                    return Ok(());
                }
                Err(bad) => {
                    let (code, reference) = (ErrorCode::Invalid, bad.reference.as_deref());
                    self.context.metrics.reject_message(self.context.id, code, &bad.message);
                    connection.enqueue(frame::error(code, &bad.message, reference));
                    return Ok(());
                }
            }
        } else {
            (frame::chat_event(&connection.client.user, text), None, None)
        };
        let may_address = self.context.handshake.settings.client_publish == ClientPublish::Any;
        let reason = if to.is_some() && !may_address {
            "clients may not address one user here"
        } else if !connection.client.may_publish {
            "you may not publish here"
        } else {
            self.publish(slot, event, to, reference);
            return Ok(());
        };
        let (code, reference) = (ErrorCode::Forbidden, reference.as_deref());
        self.reject_message(slot, code, reason, reference, CloseReason::Forbidden)
    }

    /// Rejects a message. A client without recovery frames gets no error frame: it is closed.
    pub(super) fn reject_message(
        &mut self,
        slot: u32,
        code: ErrorCode,
        text: &str,
        reference: Option<&str>,
        reason: CloseReason,
    ) -> Result<(), CloseReason> {
        self.context.metrics.reject_message(self.context.id, code, text);
        let connection = &mut self.connections[slot];
        if !connection.client.wants_recovery {
            return Err(reason);
        }
        connection.enqueue(frame::error(code, text, reference));
        Ok(())
    }

    pub(super) fn publish(
        &mut self,
        slot: u32,
        event: Bytes,
        to: Option<String>,
        reference: Option<Box<str>>,
    ) {
        let answer = Answer::Connection(self.connections.id(slot), reference);
        let connection = &mut self.connections[slot];
        connection.inbound.count_publish();
        let channel = self.channels[connection.membership.channel].name.clone();
        let publish = Publish { channel, to: to.map(Into::into), key: None, event, answer };
        self.request_bus(Request::Publish(publish));
    }

    pub(super) fn on_published(
        &mut self,
        id: ConnectionId,
        reference: Option<&str>,
        result: Result<EventId, PublishError>,
    ) {
        let Some(slot) = self.connections.find(id) else { return };
        let connection = &mut self.connections[slot];
        if !connection.is_open() {
            return;
        }
        connection.inbound.count_answer();
        match result {
            Ok(event) => {
                if let Some(reference) = reference {
                    connection.enqueue(frame::ack(reference, event));
                }
            }
            Err(error) => {
                let code = match error {
                    PublishError::Rejected(_) => ErrorCode::Unavailable,
                    PublishError::Unknown => ErrorCode::Unknown,
                };
                let text = error.to_string();
                self.context.metrics.reject_message(self.context.id, code, &text);
                if !connection.client.wants_recovery {
                    return self.close(slot, CloseReason::PublishFailed);
                }
                // What is wrong with the bus is for operators.
                let text = if code == ErrorCode::Unavailable { frame::NOT_PUBLISHED } else { &text };
                connection.enqueue(frame::error(code, text, reference));
            }
        }
        // A sender that is live gets its event now, not when the fan-out comes to it: it may wait for
        // its event before it sends more.
        let is_live = matches!(connection.state, State::Live) && !connection.socket.is_blocked();
        if is_live || connection.queued() > 0 {
            self.flush(slot);
        }
        self.resume_reading(slot);
    }

    /// Resumes reading from a client that has taken most of its frames and answers.
    pub(super) fn resume_reading(&mut self, slot: u32) {
        let connection = &mut self.connections[slot];
        if connection.inbound.resume_if_due(connection.queued()) {
            self.read_later(slot);
        }
    }
}
