//! One client: handshake, frames, and the judgement of the events it receives.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write};

use hdrhistogram::Histogram;
use mio::net::TcpStream;
use serde::{Deserialize, Serialize};

use super::mark::{Finder, MARK, Mark};
use super::plan::Plan;
use super::wire::{self, CLOSE, PING, PONG, TEXT};

/// How far a client is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    Connecting,
    /// The request was sent.
    Upgrading,
    /// Waits for the message after which it is ready.
    Greeting,
    Ready,
}

/// What a client has of the run's events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// Nothing is known: any event may be its first.
    Unknown,
    /// It has all events up to this number.
    UpTo(u32),
    /// It was notified that events after this number may be missing.
    Notified(u32),
}

/// What the clients of a process have received together. Counts of the whole run.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Tally {
    pub deliveries: u64,
    pub bytes: u64,
    /// Events that a client should have received, and did not, without a notice.
    pub lost: u64,
    /// Events that came twice, or after a later one.
    pub repeated: u64,
    /// Notices that events may be missing.
    pub notices: u64,
    /// Clients that resumed after their last event.
    pub resumed: u64,
    /// Events that the server did not take, by reason.
    pub rejected: BTreeMap<String, u64>,
    /// Handshakes that failed, by reason.
    pub refused: BTreeMap<String, u64>,
    /// Connections that the server closed, by close code or error.
    pub closed: BTreeMap<String, u64>,
    /// The `Server` header of the last upgrade.
    pub server: Option<String>,
}

impl Tally {
    /// Counts events that were not published, by reason.
    pub fn not_published(&mut self, problems: Vec<String>) {
        problems.into_iter().for_each(|problem| count(&mut self.rejected, problem));
    }
}

/// Adds 1 for this reason, of which a server may make up many.
pub fn count(counts: &mut BTreeMap<String, u64>, reason: String) {
    if counts.len() < REASONS_MAX || counts.contains_key(&reason) {
        *counts.entry(reason).or_default() += 1;
    }
}

/// What all clients of a process share.
pub struct Shared<'p> {
    pub plan: &'p Plan,
    pub tally: Tally,
    /// Latencies in microseconds, since the last report.
    pub latencies: Histogram<u64>,
    pub scratch: Vec<u8>,
    pub finder: Finder,
    /// Microseconds since the run started, as of the last read.
    pub now: u64,
}

pub struct Client {
    pub stream: TcpStream,
    pub number: u64,
    pub stage: Stage,
    pub seen: Seen,
    /// The id of its last event, if the server gives ids.
    pub last_id: u64,
    /// Whether it asked to resume.
    pub resuming: bool,
    pub stalled: bool,
    /// Events due from this time on are timed, in microseconds since the run started.
    pub timed_from: u64,
    /// The start of a frame or response head.
    rest: Vec<u8>,
    /// Bytes to send.
    out: Vec<u8>,
}

/// Most different reasons that are counted.
const REASONS_MAX: usize = 100;

/// Time of a client that is not timed.
const NEVER: u64 = u64::MAX;

/// Why a client is gone.
#[derive(Debug)]
pub struct Gone(pub String);

impl Client {
    /// A client whose socket is connecting. With `last_id` above 0 it resumes.
    pub fn new(stream: TcpStream, number: u64, seen: Seen, last_id: u64, plan: &Plan) -> Client {
        Client {
            stream,
            number,
            stage: Stage::Connecting,
            seen,
            last_id,
            resuming: last_id > 0,
            stalled: false,
            timed_from: if plan.is_timed(number) { 0 } else { NEVER },
            rest: Vec::new(),
            out: plan.request(number, last_id).into_bytes(),
        }
    }

    /// Sends a message as soon as the socket takes it.
    pub fn send(&mut self, text: &[u8]) -> Result<(), Gone> {
        wire::put_masked(&mut self.out, TEXT, text);
        self.flush()
    }

    /// Times only events that are due from now on: those that it missed so far are late for a reason.
    pub fn time_from(&mut self, now: u64) {
        if self.timed_from != NEVER {
            self.timed_from = now;
        }
    }

    /// Bytes that wait for the socket.
    pub fn unsent(&self) -> usize {
        self.out.len()
    }

    fn flush(&mut self) -> Result<(), Gone> {
        while !self.out.is_empty() {
            match self.stream.write(&self.out) {
                Ok(written) => drop(self.out.drain(..written)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::NotConnected => break,
                Err(error) => return Err(Gone(describe(&error))),
            }
        }
        Ok(())
    }

    /// Goes on after the socket became ready: writes what waits, and reads everything.
    pub fn advance(&mut self, shared: &mut Shared<'_>) -> Result<(), Gone> {
        if self.stage == Stage::Connecting {
            if let Ok(Some(error)) | Err(error) = self.stream.take_error() {
                return Err(Gone(describe(&error)));
            }
            if self.stream.peer_addr().is_err() {
                return Ok(()); // not connected yet
            }
            self.stage = Stage::Upgrading;
        }
        self.flush()?;
        while !self.stalled && self.read(shared)? {}
        Ok(())
    }

    /// Reads once; true if there may be more to read.
    fn read(&mut self, shared: &mut Shared<'_>) -> Result<bool, Gone> {
        let mut scratch = std::mem::take(&mut shared.scratch);
        let held = self.rest.len();
        if scratch.len() < 2 * held {
            scratch.resize(2 * held, 0);
        }
        scratch[..held].copy_from_slice(&self.rest);
        let outcome = match self.stream.read(&mut scratch[held..]) {
            Ok(0) => Err(Gone("closed without a close frame".into())),
            Ok(len) => {
                self.rest.clear();
                let more = held + len == scratch.len();
                self.take(&scratch[..held + len], shared).map(|()| more)
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(Gone(describe(&error))),
        };
        shared.scratch = scratch;
        outcome
    }

    fn take(&mut self, mut bytes: &[u8], shared: &mut Shared<'_>) -> Result<(), Gone> {
        if self.stage == Stage::Upgrading {
            let Some(answer) = wire::answer(bytes).map_err(Gone)? else {
                self.rest.extend_from_slice(bytes);
                return Ok(());
            };
            if answer.status != 101 || !answer.accepted {
                return Err(Gone(format!("HTTP {}", answer.status)));
            }
            shared.tally.server = answer.server.or(shared.tally.server.take());
            bytes = &bytes[answer.len..];
            self.greet(shared.plan)?;
        }
        while let Some(head) = wire::head(bytes).map_err(Gone)? {
            let Some(payload) = bytes.get(head.len..head.len + head.payload) else { break };
            self.on_frame(head.first, payload, shared)?;
            bytes = &bytes[head.len + head.payload..];
        }
        self.rest.extend_from_slice(bytes);
        Ok(())
    }

    fn greet(&mut self, plan: &Plan) -> Result<(), Gone> {
        let number = self.number.to_string();
        for hello in &plan.greeting.hello {
            wire::put_masked(&mut self.out, TEXT, hello.replace("{i}", &number).as_bytes());
        }
        // A server that resumes says so first.
        let waits = plan.greeting.ready.is_some() || plan.resume.is_some();
        self.stage = if waits { Stage::Greeting } else { Stage::Ready };
        self.flush()
    }

    fn on_frame(&mut self, first: u8, payload: &[u8], shared: &mut Shared<'_>) -> Result<(), Gone> {
        match first {
            PING => {
                wire::put_masked(&mut self.out, PONG, payload);
                self.flush()
            }
            PONG => Ok(()),
            CLOSE => Err(Gone(match payload {
                [a, b, reason @ ..] => {
                    let code = u16::from_be_bytes([*a, *b]);
                    format!("{code} {}", String::from_utf8_lossy(reason)).trim_end().to_owned()
                }
                _ => "1005".into(),
            })),
            _ => self.on_message(payload, shared),
        }
    }

    fn on_message(&mut self, payload: &[u8], shared: &mut Shared<'_>) -> Result<(), Gone> {
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
                let mut finder = Finder::default();
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
        match self.seen {
            Seen::UpTo(last) | Seen::Notified(last) if mark.number <= last => {
                shared.tally.repeated += 1;
                return;
            }
            Seen::UpTo(last) => shared.tally.lost += u64::from(mark.number - last - 1),
            Seen::Unknown | Seen::Notified(_) => {}
        }
        self.seen = Seen::UpTo(mark.number);
    }

    /// A message that is no event: of the greeting, or one that wants an answer.
    fn on_other(&mut self, payload: &[u8], shared: &mut Shared<'_>) -> Result<(), Gone> {
        let plan = shared.plan;
        let greeting = &plan.greeting;
        if plan.resume.is_some() {
            let contains = |text: &str| contains(payload, text.as_bytes());
            match payload {
                [b'{', ..] if contains(r#""type":"welcome""#) => {
                    let recovered = contains(r#""recovered":true"#);
                    match self.resuming {
                        true if recovered => shared.tally.resumed += 1,
                        true => self.notice(shared),
                        false => {}
                    }
                    self.resuming = false;
                    if greeting.ready.is_none() && self.stage == Stage::Greeting {
                        self.stage = Stage::Ready;
                    }
                }
                [b'{', ..] if contains(r#""type":"reset""#) => self.notice(shared),
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
            self.stage = Stage::Ready;
        }
        for (received, reply) in &greeting.answers {
            if payload.starts_with(received.as_bytes()) {
                return self.send(reply.as_bytes());
            }
        }
        Ok(())
    }

    fn notice(&mut self, shared: &mut Shared<'_>) {
        shared.tally.notices += 1;
        if let Seen::UpTo(last) = self.seen {
            self.seen = Seen::Notified(last);
        }
    }

    /// How many events up to this number it lacks.
    pub fn missing(&self, number: u32) -> u32 {
        match self.seen {
            Seen::UpTo(last) => number.saturating_sub(last),
            Seen::Unknown | Seen::Notified(_) => 0,
        }
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

/// What a socket error means, in a few words.
pub fn describe(error: &io::Error) -> String {
    match error.kind() {
        ErrorKind::ConnectionRefused => "connection refused".into(),
        ErrorKind::ConnectionReset => "connection reset".into(),
        ErrorKind::BrokenPipe => "connection closed".into(),
        ErrorKind::AddrNotAvailable => "no free port: give more source addresses with --bind".into(),
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
