//! Thousands of clients that disconnect and resume with their last id, in one poll. Every frame is
//! checked: the welcome is recovered, ids rise by one from the last id, and there are no other
//! frames.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::ops::Range;
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, bail, ensure};
use fanfare::cli::bench::wire::{self, KEY, PING, PONG, TEXT};
use mio::{Events, Interest, Poll, Token};
use serde_json::Value;

/// Handshakes at once, below the kernel's accept queue (net.core.somaxconn, 4096): where that is
/// full the kernel retries after a second, which would be measured as the server's.
const HANDSHAKES: usize = 2048;

/// How long nothing may arrive while something is due.
const TIMEOUT: Duration = Duration::from_secs(20);

struct Client {
    /// `None` while disconnected.
    stream: Option<mio::net::TcpStream>,
    stage: Stage,
    /// The last id received; `None` before the first welcome.
    position: Option<u64>,
    /// The start of an incomplete frame.
    rest: Vec<u8>,
}

#[derive(Clone, Copy, PartialEq)]
enum Stage {
    Away,
    /// The request is sent.
    Asking,
    /// Upgraded, before the welcome.
    Upgraded,
    Welcomed,
}

/// Clients of one channel.
pub struct ReconnectClients {
    poll: Poll,
    ready: Events,
    scratch: Vec<u8>,
    clients: Vec<Client>,
    channel: String,
    /// The prefix of their user ids.
    name: String,
    asking: usize,
    welcomed: usize,
    progress: u64,
}

/// Called for every event with the client's number, the event's id and its text.
pub type OnEvent<'a> = &'a mut dyn FnMut(usize, u64, &[u8]) -> Result<()>;

impl ReconnectClients {
    /// Starts with no clients.
    pub fn new(name: &str, channel: &str) -> Result<ReconnectClients> {
        Ok(ReconnectClients {
            poll: Poll::new()?,
            ready: Events::with_capacity(1024),
            scratch: vec![0; 256 << 10],
            clients: Vec::new(),
            channel: channel.to_owned(),
            name: name.to_owned(),
            asking: 0,
            welcomed: 0,
            progress: 0,
        })
    }

    /// Adds clients that are disconnected and have no position.
    pub fn add(&mut self, count: usize) -> Range<usize> {
        let first = self.clients.len();
        let away = || Client { stream: None, stage: Stage::Away, position: None, rest: Vec::new() };
        self.clients.resize_with(first + count, away);
        first..self.clients.len()
    }

    /// The number of disconnected clients.
    pub fn away(&self) -> usize {
        self.clients.len() - self.asking - self.welcomed
    }

    fn all_at(&self, id: u64) -> bool {
        let there = |client: &&Client| client.stage != Stage::Away;
        self.clients.iter().filter(there).all(|client| client.position == Some(id))
    }

    /// Drops these connections without a close frame.
    pub fn cut(&mut self, which: Range<usize>) {
        which.for_each(|number| self.lose(number));
    }

    fn lose(&mut self, number: usize) {
        let client = &mut self.clients[number];
        client.stream = None;
        client.rest.clear();
        match std::mem::replace(&mut client.stage, Stage::Away) {
            Stage::Away => {}
            Stage::Welcomed => self.welcomed -= 1,
            Stage::Asking | Stage::Upgraded => self.asking -= 1,
        }
    }

    /// Connects these as fast as the server answers, with `query` appended to their own. Events of
    /// the others are read meanwhile.
    pub fn connect(
        &mut self,
        addr: SocketAddr,
        which: Range<usize>,
        query: &str,
        on_event: OnEvent<'_>,
    ) -> Result<()> {
        let mut seen = (0, Instant::now());
        for number in which {
            while self.asking >= HANDSHAKES {
                self.turn(Duration::from_millis(100), on_event)?;
                self.check_progress(&mut seen)?;
            }
            self.send_request(addr, number, query).with_context(|| format!("client {number}"))?;
            if number % 64 == 0 {
                self.turn(Duration::ZERO, on_event)?;
            }
        }
        while self.asking > 0 {
            self.turn(Duration::from_millis(100), on_event)?;
            self.check_progress(&mut seen)?;
        }
        Ok(())
    }

    /// Reads until every connected client is at this id.
    pub fn wait_for(&mut self, id: u64, on_event: OnEvent<'_>) -> Result<()> {
        let mut seen = (0, Instant::now());
        while !self.all_at(id) {
            self.turn(Duration::from_millis(100), on_event)?;
            self.check_progress(&mut seen).with_context(|| self.stragglers(id))?;
        }
        Ok(())
    }

    fn check_progress(&self, seen: &mut (u64, Instant)) -> Result<()> {
        if self.progress != seen.0 {
            *seen = (self.progress, Instant::now());
        }
        ensure!(seen.1.elapsed() < TIMEOUT, "nothing has arrived for {TIMEOUT:?}");
        Ok(())
    }

    fn stragglers(&self, id: u64) -> String {
        let late =
            |(_, client): &(usize, &Client)| client.stage != Stage::Away && client.position != Some(id);
        let late: Vec<_> = self.clients.iter().enumerate().filter(late).collect();
        let shown = late.first().map(|(number, client)| (*number, client.position, client.stage as u8));
        format!("{} of {} are not at {id}: {shown:?}…", late.len(), self.clients.len())
    }

    fn send_request(&mut self, addr: SocketAddr, number: usize, query: &str) -> Result<()> {
        let client = &mut self.clients[number];
        ensure!(client.stage == Stage::Away, "already connected");
        let mut stream = TcpStream::connect(addr)?;
        stream.set_nodelay(true)?;
        let seen = client.position.map(|id| id.to_string()).unwrap_or_default();
        let request = format!(
            "GET /ws/{}{number}?channel={}&lastEventId={seen}{query} HTTP/1.1\r\nHost: {addr}\r\nUpgrade: websocket\r\n\
             Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {KEY}\r\n\r\n",
            self.name, self.channel
        );
        stream.write_all(request.as_bytes())?;
        stream.set_nonblocking(true)?;
        let mut stream = mio::net::TcpStream::from_std(stream);
        self.poll.registry().register(&mut stream, Token(number), Interest::READABLE)?;
        client.stream = Some(stream);
        client.stage = Stage::Asking;
        self.asking += 1;
        Ok(())
    }

    /// Reads what has arrived, waiting up to `timeout` for it.
    fn turn(&mut self, timeout: Duration, on_event: OnEvent<'_>) -> Result<()> {
        match self.poll.poll(&mut self.ready, Some(timeout)) {
            Err(error) if error.kind() != ErrorKind::Interrupted => return Err(error.into()),
            _ => {}
        }
        let ready: Vec<usize> = self.ready.iter().map(|event| event.token().0).collect();
        for number in ready {
            self.read(number, on_event).with_context(|| format!("client {number} of {}", self.name))?;
        }
        Ok(())
    }

    fn read(&mut self, number: usize, on_event: OnEvent<'_>) -> Result<()> {
        loop {
            let client = &mut self.clients[number];
            let Some(stream) = &mut client.stream else { return Ok(()) };
            let held = client.rest.len();
            self.scratch[..held].copy_from_slice(&client.rest);
            let length = match stream.read(&mut self.scratch[held..]) {
                Ok(length) if length > 0 => length,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                _ => {
                    self.lose(number); // as when the node dies
                    return Ok(());
                }
            };
            let before = client.stage;
            let taken = client.take(number, &self.scratch[..held + length], on_event)?;
            client.rest.clear();
            client.rest.extend_from_slice(&self.scratch[taken..held + length]);
            self.progress += 1;
            if client.stage == Stage::Welcomed && before != Stage::Welcomed {
                self.asking -= 1;
                self.welcomed += 1;
            }
            if held + length < self.scratch.len() {
                return Ok(());
            }
        }
    }
}

impl Client {
    /// Handles whole frames; returns the number of bytes read.
    fn take(&mut self, number: usize, bytes: &[u8], on_event: OnEvent<'_>) -> Result<usize> {
        let mut taken = 0;
        if self.stage == Stage::Asking {
            let Some(answer) = wire::answer(bytes).map_err(Error::msg)? else { return Ok(0) };
            let upgraded = answer.status == 101 && answer.accepted;
            ensure!(upgraded, "not upgraded: {}", String::from_utf8_lossy(bytes));
            self.stage = Stage::Upgraded;
            taken = answer.len;
        }
        while let Some(head) = wire::head(&bytes[taken..]).map_err(Error::msg)? {
            ensure!(head.mask.is_none(), "a server's frame with a mask");
            let Some(payload) = bytes[taken..].get(head.len..head.len + head.payload) else { break };
            taken += head.len + head.payload;
            match (head.first, self.stage) {
                (PING, _) => self.answer(payload)?,
                (TEXT, Stage::Upgraded) => self.welcome(payload)?,
                (TEXT, _) => {
                    let id = self.event(payload)?;
                    on_event(number, id, payload)?;
                }
                (first, _) => bail!("frame {first:#x}: {}", String::from_utf8_lossy(payload)),
            }
        }
        Ok(taken)
    }

    fn answer(&mut self, ping: &[u8]) -> Result<()> {
        let mut pong = Vec::with_capacity(6 + ping.len());
        wire::put_masked(&mut pong, PONG, ping);
        let stream = self.stream.as_mut().expect("a ping came from it");
        stream.write_all(&pong).context("can't answer a ping")
    }

    /// A client that resumes must be recovered at its last id.
    fn welcome(&mut self, payload: &[u8]) -> Result<()> {
        let text = String::from_utf8_lossy(payload);
        let welcome: Value = serde_json::from_slice(payload).with_context(|| text.clone().into_owned())?;
        let last = welcome["lastEventId"].as_u64();
        ensure!(welcome["type"] == "welcome" && welcome["recovered"] == true && last.is_some(), "{text}");
        ensure!(self.position.is_none() || self.position == last, "resumed at {:?}: {text}", self.position);
        self.position = last;
        self.stage = Stage::Welcomed;
        Ok(())
    }

    fn event(&mut self, payload: &[u8]) -> Result<u64> {
        let id = id_of(payload).with_context(|| String::from_utf8_lossy(payload).into_owned())?;
        let due = self.position.context("no welcome")? + 1;
        ensure!(id == due, "event {id} instead of {due}");
        self.position = Some(id);
        Ok(id)
    }
}

/// The id, which is the last client of an event.
fn id_of(payload: &[u8]) -> Option<u64> {
    let rest = payload.strip_suffix(b"}")?;
    let digits = rest.iter().rev().take_while(|byte| byte.is_ascii_digit()).count();
    let (before, id) = rest.split_at(rest.len() - digits);
    if !before.ends_with(br#","id":"#) {
        return None;
    }
    std::str::from_utf8(id).ok()?.parse().ok()
}
