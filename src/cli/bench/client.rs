//! One client: handshake, frames, and the judgement of the events it receives.

use std::io::{self, ErrorKind, Read, Write};

use mio::net::TcpStream;

use super::mark::{Finder, MARK, Mark};
use super::position::{Judgement, Position};
use super::shared::Shared;
use super::wire::{self, CLOSE, PING, PONG, TEXT};

/// Handshake state of a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    Connecting,
    /// The request was sent.
    Upgrading,
    /// Waits for the message after which it is ready.
    Greeting,
    Ready,
}

/// A client that is to connect.
#[derive(Debug)]
pub struct Joining {
    pub slot: usize,
    pub number: u64,
    pub position: Position,
    /// Above 0: resume after the event with this id.
    pub last_id: u64,
    /// Comes back after a storm: its latencies are of no interest before the next phase.
    pub returns: bool,
}

pub struct Client {
    pub stream: TcpStream,
    pub number: u64,
    pub stage: Stage,
    pub position: Position,
    /// The id of its last event, if the server gives ids.
    pub last_id: u64,
    /// Whether it asked to resume.
    resuming: bool,
    returns: bool,
    pub stalled: bool,
    /// When its handshake started, in microseconds since the run started.
    pub joined: u64,
    is_timed: bool,
    /// Events due from this time on are timed, in microseconds since the run started.
    timed_from: u64,
    /// The start of a frame or response head.
    partial: Vec<u8>,
    /// The start of a fragmented message.
    fragments: Vec<u8>,
    /// Bytes to send.
    out: Vec<u8>,
}

/// Most bytes that wait for the socket of a client that does not publish.
const ANSWERS_MAX: usize = 64 << 10;

/// Start of the timing of a client that is not ready, or not timed.
const NEVER: u64 = u64::MAX;

/// What one read of a socket got.
enum Received {
    Nothing,
    Part,
    /// As much as fits.
    Full,
}

/// Why a connection closed.
#[derive(Debug)]
pub struct Closed(pub String);

impl Client {
    /// A client whose socket is connecting.
    pub fn new(stream: TcpStream, joining: Joining, shared: &Shared<'_>) -> Client {
        let plan = shared.plan;
        let Joining { number, position, last_id, returns, .. } = joining;
        Client {
            stream,
            number,
            stage: Stage::Connecting,
            position,
            last_id,
            resuming: last_id > 0,
            returns,
            stalled: false,
            joined: shared.now,
            is_timed: plan.is_timed(number),
            timed_from: NEVER,
            partial: Vec::new(),
            fragments: Vec::new(),
            out: plan.request(number, last_id).into_bytes(),
        }
    }

    /// Sends a message as soon as the socket takes it.
    pub fn send(&mut self, text: &[u8]) -> Result<(), Closed> {
        wire::put_masked(&mut self.out, TEXT, text);
        self.flush()
    }

    /// Times only events due from now on: events replayed after an outage would count the outage.
    pub fn time_from(&mut self, now: u64) {
        if self.is_timed {
            self.timed_from = now;
        }
    }

    fn become_ready(&mut self, now: u64) {
        self.stage = Stage::Ready;
        if !self.returns {
            self.time_from(now);
        }
    }

    /// Bytes that wait for the socket.
    pub fn unsent(&self) -> usize {
        self.out.len()
    }

    fn flush(&mut self) -> Result<(), Closed> {
        while !self.out.is_empty() {
            match self.stream.write(&self.out) {
                Ok(written) => drop(self.out.drain(..written)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::NotConnected => break,
                Err(error) => return Err(Closed(describe(&error))),
            }
        }
        Ok(())
    }

    /// Handles readiness of the socket: writes what waits, and reads everything. `is_closed`: the
    /// server will send no more, which is not announced again.
    pub fn advance(&mut self, shared: &mut Shared<'_>, is_closed: bool) -> Result<(), Closed> {
        if self.stage == Stage::Connecting {
            if let Ok(Some(error)) | Err(error) = self.stream.take_error() {
                return Err(Closed(describe(&error)));
            }
            if self.stream.peer_addr().is_err() {
                return Ok(()); // not connected yet
            }
            self.stage = Stage::Upgrading;
        }
        self.flush()?;
        while !self.stalled {
            match self.read(shared)? {
                Received::Nothing => break,
                Received::Part if !is_closed => break, // a short read empties the socket
                Received::Part | Received::Full => {}
            }
        }
        Ok(())
    }

    fn read(&mut self, shared: &mut Shared<'_>) -> Result<Received, Closed> {
        let mut scratch = std::mem::take(&mut shared.scratch);
        let held = self.partial.len();
        if scratch.len() < 2 * held {
            scratch.resize(2 * held, 0);
        }
        scratch[..held].copy_from_slice(&self.partial);
        let outcome = match self.stream.read(&mut scratch[held..]) {
            Ok(0) => Err(Closed("closed without a close frame".into())),
            Ok(len) => {
                self.partial.clear();
                shared.read_clock();
                let read = if held + len == scratch.len() { Received::Full } else { Received::Part };
                self.take(&scratch[..held + len], shared).map(|()| read)
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(Received::Nothing),
            Err(error) => Err(Closed(describe(&error))),
        };
        shared.scratch = scratch;
        outcome
    }

    fn take(&mut self, mut bytes: &[u8], shared: &mut Shared<'_>) -> Result<(), Closed> {
        if self.stage == Stage::Upgrading {
            let Some(answer) = wire::answer(bytes).map_err(Closed)? else {
                self.partial.extend_from_slice(bytes);
                return Ok(());
            };
            if answer.status != 101 || !answer.accepted {
                return Err(Closed(format!("HTTP {}", answer.status)));
            }
            shared.tally.server = answer.server.or(shared.tally.server.take());
            bytes = &bytes[answer.len..];
            self.greet(shared)?;
        }
        while let Some(head) = wire::head(bytes).map_err(Closed)? {
            if head.mask.is_some() {
                return Err(Closed("a masked frame".into()));
            }
            let Some(payload) = bytes.get(head.len..head.len + head.payload) else { break };
            self.on_frame(head.first, payload, shared)?;
            bytes = &bytes[head.len + head.payload..];
        }
        self.partial.extend_from_slice(bytes);
        Ok(())
    }

    fn greet(&mut self, shared: &Shared<'_>) -> Result<(), Closed> {
        let plan = shared.plan;
        let number = self.number.to_string();
        for hello in &plan.greeting.hello {
            wire::put_masked(&mut self.out, TEXT, hello.replace("{i}", &number).as_bytes());
        }
        // A server that resumes says so first.
        let waits = plan.greeting.ready.is_some() || plan.resume.is_some();
        match waits {
            true => self.stage = Stage::Greeting,
            false => self.become_ready(shared.now),
        }
        self.flush()
    }

    fn on_frame(&mut self, first: u8, payload: &[u8], shared: &mut Shared<'_>) -> Result<(), Closed> {
        match first {
            PING if self.out.len() > ANSWERS_MAX => Ok(()), // it reads nothing, so it gets no pong
            PING => {
                shared.tally.pings += 1;
                wire::put_masked(&mut self.out, PONG, payload);
                self.flush()
            }
            PONG => Ok(()),
            CLOSE => Err(Closed(match payload {
                [a, b, reason @ ..] => {
                    let code = u16::from_be_bytes([*a, *b]);
                    format!("{code} {}", String::from_utf8_lossy(reason)).trim_end().to_owned()
                }
                _ => "1005".into(),
            })),
            // A message in fragments (RFC 6455 section 5.4): its first one, and those after it.
            0x01 | 0x02 => {
                self.fragments = payload.to_vec();
                Ok(())
            }
            0x00 | 0x80 => {
                self.fragments.extend_from_slice(payload);
                if self.fragments.len() > wire::FRAME_MAX {
                    return Err(Closed("a message that is too long".into()));
                }
                if first == 0x00 {
                    return Ok(());
                }
                let message = std::mem::take(&mut self.fragments);
                self.on_message(&message, shared)
            }
            _ => self.on_message(payload, shared),
        }
    }

    fn on_message(&mut self, payload: &[u8], shared: &mut Shared<'_>) -> Result<(), Closed> {
        shared.tally.bytes += payload.len() as u64;
        let mut found = shared.finder.find(payload);
        if found.is_none() {
            return self.on_other(payload, shared);
        }
        while let Some((mark, rest)) = found {
            self.on_event(mark, shared);
            // What follows is the padding of this event, and perhaps further events.
            let padding = shared.plan.size.saturating_sub(MARK);
            found = rest.get(padding..).filter(|rest| rest.len() > MARK).and_then(|rest| {
                let mut finder = Finder::new(shared.tag);
                finder.find(rest)
            });
        }
        if shared.plan.resume.is_some() {
            self.last_id = trailing_id(payload).unwrap_or(self.last_id);
        }
        Ok(())
    }

    fn on_event(&mut self, mark: Mark, shared: &mut Shared<'_>) {
        shared.tally.deliveries += 1;
        if mark.due >= self.timed_from {
            let latency = shared.now.saturating_sub(mark.due);
            shared.latencies.saturating_record(latency);
        }
        match self.position.take(mark.number) {
            Judgement::Next | Judgement::Late => {}
            Judgement::Gap(lost) => shared.tally.lost += u64::from(lost),
            Judgement::Repeated => shared.tally.repeated += 1,
            Judgement::OtherChannel => shared.tally.misrouted += 1,
        }
    }

    /// Handles a message without a mark: recovery frames, the ready text, requests to answer.
    fn on_other(&mut self, payload: &[u8], shared: &mut Shared<'_>) -> Result<(), Closed> {
        let plan = shared.plan;
        let greeting = &plan.greeting;
        if plan.resume.is_some() {
            let contains = |text: &str| contains(payload, text.as_bytes());
            match payload {
                [b'{', ..] if contains(r#""type":"welcome""#) => {
                    let recovered = contains(r#""recovered":true"#);
                    match self.resuming {
                        true if recovered => shared.tally.resumed += 1,
                        true => self.mark_notified(shared),
                        false => {}
                    }
                    self.resuming = false;
                    if self.last_id == 0 {
                        self.last_id = number_after(payload, br#""lastEventId":"#).unwrap_or_default();
                    }
                    if greeting.ready.is_none() && self.stage == Stage::Greeting {
                        self.become_ready(shared.now);
                    }
                }
                [b'{', ..] if contains(r#""type":"reset""#) => self.mark_notified(shared),
                [b'{', ..] if contains(r#""type":"error""#) => {
                    shared.tally.not_published(vec![String::from_utf8_lossy(payload).into_owned()]);
                }
                _ => {}
            }
        }
        if let Some(ready) = &greeting.ready
            && self.stage == Stage::Greeting
            && contains(payload, ready.as_bytes())
        {
            self.become_ready(shared.now);
        }
        for (received, reply) in &greeting.answers {
            if payload.starts_with(received.as_bytes()) {
                if self.out.len() > ANSWERS_MAX {
                    return Err(Closed("it sends, and does not read".into()));
                }
                return self.send(reply.as_bytes());
            }
        }
        Ok(())
    }

    fn mark_notified(&mut self, shared: &mut Shared<'_>) {
        shared.tally.notices += 1;
        self.position.notify();
    }
}

fn contains(bytes: &[u8], text: &[u8]) -> bool {
    bytes.windows(text.len()).any(|window| window == text)
}

/// The id with which an event of fanfare ends: `…,"id":N}`.
fn trailing_id(payload: &[u8]) -> Option<u64> {
    let digits = payload.strip_suffix(b"}")?;
    let start = digits.iter().rposition(|byte| !byte.is_ascii_digit())? + 1;
    if !digits[..start].ends_with(br#""id":"#) {
        return None;
    }
    std::str::from_utf8(&digits[start..]).ok()?.parse().ok()
}

/// The number that follows this text.
fn number_after(payload: &[u8], text: &[u8]) -> Option<u64> {
    let start = payload.windows(text.len()).position(|window| window == text)? + text.len();
    let digits = payload[start..].iter().take_while(|byte| byte.is_ascii_digit()).count();
    std::str::from_utf8(&payload[start..start + digits]).ok()?.parse().ok()
}

/// What a socket error means, in a few words.
pub fn describe(error: &io::Error) -> String {
    match error.kind() {
        ErrorKind::ConnectionRefused => "connection refused".into(),
        ErrorKind::ConnectionReset => "connection reset".into(),
        ErrorKind::BrokenPipe => "connection closed".into(),
        ErrorKind::AddrNotAvailable | ErrorKind::AddrInUse => {
            "no free port: give more source addresses with --bind".into()
        }
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_ids_at_the_end_of_events() {
        assert_eq!(trailing_id(br#"{"text":"x","id":17}"#), Some(17));
        for other in [r#"{"id":17,"a":1}"#, r#"{"id":}"#, "17}", ""] {
            assert_eq!(trailing_id(other.as_bytes()), None, "{other}");
        }
    }
}
