//! Thousands of clients that leave and come back with their last id, in one poll. Every frame of each is checked as it
//! comes: ids rise by one from the id it came with, it is recovered, and nothing else is said. The cheaper crowd
//! (`crowd.rs`) only counts.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::ops::Range;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use mio::{Events, Interest, Poll, Token};
use serde_json::Value;

use super::wire::{self, ACCEPT, KEY, PING, PONG, TEXT};

/// Requests under way at once, below the kernel's queue for the listener (net.core.somaxconn, 4096): whoever finds
/// it full tries again after a second, and that second would be the kernel's.
const ASKING: usize = 2048;

/// How long nothing may come while something must.
const PATIENCE: Duration = Duration::from_secs(20);

/// One client.
struct Member {
    /// `None` while it is away.
    stream: Option<mio::net::TcpStream>,
    stage: Stage,
    /// The last id that it has; `None` before its first welcome.
    position: Option<u64>,
    /// The beginning of a frame.
    rest: Vec<u8>,
}

#[derive(Clone, Copy, PartialEq)]
enum Stage {
    Away,
    /// Its request is sent.
    Asking,
    /// It is upgraded, and its welcome comes next.
    Upgraded,
    Welcomed,
}

/// Many clients of one channel.
pub struct Herd {
    poll: Poll,
    ready: Events,
    scratch: Vec<u8>,
    members: Vec<Member>,
    channel: String,
    /// A name for its users, which other herds don't use.
    name: String,
    asking: usize,
    welcomed: usize,
    progress: u64,
}

/// What is done with every event: which member got it, and its text.
pub type OnEvent<'a> = &'a mut dyn FnMut(usize, u64, &[u8]) -> Result<()>;

impl Herd {
    /// Nobody yet.
    pub fn new(name: &str, channel: &str) -> Result<Herd> {
        Ok(Herd {
            poll: Poll::new()?,
            ready: Events::with_capacity(1024),
            scratch: vec![0; 256 << 10],
            members: Vec::new(),
            channel: channel.to_owned(),
            name: name.to_owned(),
            asking: 0,
            welcomed: 0,
            progress: 0,
        })
    }

    /// So many more, who are away and have seen nothing.
    pub fn add(&mut self, count: usize) -> Range<usize> {
        let first = self.members.len();
        let away = || Member { stream: None, stage: Stage::Away, position: None, rest: Vec::new() };
        self.members.resize_with(first + count, away);
        first..self.members.len()
    }

    /// How many are not there.
    pub fn away(&self) -> usize {
        self.members.len() - self.asking - self.welcomed
    }

    fn all_at(&self, id: u64) -> bool {
        let there = |member: &&Member| member.stage != Stage::Away;
        self.members.iter().filter(there).all(|member| member.position == Some(id))
    }

    /// Ends these connections at once, without a word.
    pub fn cut(&mut self, which: Range<usize>) {
        which.for_each(|number| self.lose(number));
    }

    /// Has those who are away come back as newcomers.
    pub fn forget(&mut self) {
        self.members.iter_mut().for_each(|member| member.position = None);
    }

    /// The lowest id that somebody has who is there.
    pub fn lowest(&self) -> Option<u64> {
        let there = self.members.iter().filter(|member| member.stage == Stage::Welcomed);
        there.filter_map(|member| member.position).min()
    }

    fn lose(&mut self, number: usize) {
        let member = &mut self.members[number];
        member.stream = None;
        member.rest.clear();
        match std::mem::replace(&mut member.stage, Stage::Away) {
            Stage::Away => {}
            Stage::Welcomed => self.welcomed -= 1,
            Stage::Asking | Stage::Upgraded => self.asking -= 1,
        }
    }

    /// Brings these back as fast as they are answered, those with the query that `query` gives them besides; whatever
    /// else comes meanwhile is taken too.
    pub fn bring(
        &mut self,
        addr: SocketAddr,
        which: Range<usize>,
        query: &str,
        on_event: OnEvent<'_>,
    ) -> Result<()> {
        let mut seen = (0, Instant::now());
        for number in which {
            while self.asking >= ASKING {
                self.turn(Duration::from_millis(100), on_event)?;
                self.goes_on(&mut seen)?;
            }
            self.ask(addr, number, query).with_context(|| format!("client {number}"))?;
            if number % 64 == 0 {
                self.turn(Duration::ZERO, on_event)?;
            }
        }
        while self.asking > 0 {
            self.turn(Duration::from_millis(100), on_event)?;
            self.goes_on(&mut seen)?;
        }
        Ok(())
    }

    /// Reads until everybody who is there has this id, and maybe later ones.
    pub fn wait_beyond(&mut self, id: u64, on_event: OnEvent<'_>) -> Result<()> {
        let mut seen = (0, Instant::now());
        while self.lowest().is_some_and(|lowest| lowest < id) {
            self.turn(Duration::from_millis(100), on_event)?;
            self.goes_on(&mut seen)?;
        }
        Ok(())
    }

    /// Reads until everybody who is there has everything up to this id, and no more.
    pub fn wait_for(&mut self, id: u64, on_event: OnEvent<'_>) -> Result<()> {
        let mut seen = (0, Instant::now());
        while !self.all_at(id) {
            self.turn(Duration::from_millis(100), on_event)?;
            self.goes_on(&mut seen).with_context(|| self.stragglers(id))?;
        }
        Ok(())
    }

    fn goes_on(&self, seen: &mut (u64, Instant)) -> Result<()> {
        if self.progress != seen.0 {
            *seen = (self.progress, Instant::now());
        }
        ensure!(seen.1.elapsed() < PATIENCE, "nothing has come for {PATIENCE:?}");
        Ok(())
    }

    fn stragglers(&self, id: u64) -> String {
        let late =
            |(_, member): &(usize, &Member)| member.stage != Stage::Away && member.position != Some(id);
        let late: Vec<_> = self.members.iter().enumerate().filter(late).collect();
        let shown = late.first().map(|(number, member)| (*number, member.position, member.stage as u8));
        format!("{} of {} are not at {id}: {shown:?}…", late.len(), self.members.len())
    }

    fn ask(&mut self, addr: SocketAddr, number: usize, query: &str) -> Result<()> {
        let member = &mut self.members[number];
        ensure!(member.stage == Stage::Away, "it is there");
        let mut stream = TcpStream::connect(addr)?;
        stream.set_nodelay(true)?;
        let seen = member.position.map(|id| id.to_string()).unwrap_or_default();
        let request = format!(
            "GET /ws/{}{number}?channel={}&lastEventId={seen}{query} HTTP/1.1\r\nHost: {addr}\r\nUpgrade: websocket\r\n\
             Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {KEY}\r\n\r\n",
            self.name, self.channel
        );
        stream.write_all(request.as_bytes())?;
        stream.set_nonblocking(true)?;
        let mut stream = mio::net::TcpStream::from_std(stream);
        self.poll.registry().register(&mut stream, Token(number), Interest::READABLE)?;
        member.stream = Some(stream);
        member.stage = Stage::Asking;
        self.asking += 1;
        Ok(())
    }

    /// Takes what is there, waiting up to `timeout` for it.
    pub fn turn(&mut self, timeout: Duration, on_event: OnEvent<'_>) -> Result<()> {
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
            let member = &mut self.members[number];
            let Some(stream) = &mut member.stream else { return Ok(()) };
            let held = member.rest.len();
            self.scratch[..held].copy_from_slice(&member.rest);
            let length = match stream.read(&mut self.scratch[held..]) {
                Ok(length) if length > 0 => length,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                _ => {
                    self.lose(number); // as when its node dies
                    return Ok(());
                }
            };
            let before = member.stage;
            let taken = member.take(number, &self.scratch[..held + length], on_event)?;
            member.rest.clear();
            member.rest.extend_from_slice(&self.scratch[taken..held + length]);
            self.progress += 1;
            if member.stage == Stage::Welcomed && before != Stage::Welcomed {
                self.asking -= 1;
                self.welcomed += 1;
            }
            if held + length < self.scratch.len() {
                return Ok(());
            }
        }
    }
}

impl Member {
    /// Takes what is whole; says how much that was.
    fn take(&mut self, number: usize, bytes: &[u8], on_event: OnEvent<'_>) -> Result<usize> {
        let mut taken = 0;
        if self.stage == Stage::Asking {
            let Some(head) = wire::http_head(bytes) else { return Ok(0) };
            let answer = String::from_utf8_lossy(&bytes[head.clone()]);
            let upgraded = answer.starts_with("HTTP/1.1 101") && answer.contains(ACCEPT);
            ensure!(upgraded, "not upgraded: {}", String::from_utf8_lossy(bytes));
            self.stage = Stage::Upgraded;
            taken = head.end;
        }
        while let Some(head) = wire::head(&bytes[taken..])? {
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
        stream.write_all(&pong).context("can't answer a heartbeat")
    }

    /// Whoever came with an id gets it back, and all that follows.
    fn welcome(&mut self, payload: &[u8]) -> Result<()> {
        let text = String::from_utf8_lossy(payload);
        let welcome: Value = serde_json::from_slice(payload).with_context(|| text.clone().into_owned())?;
        let last = welcome["lastEventId"].as_u64();
        ensure!(welcome["type"] == "welcome" && welcome["recovered"] == true && last.is_some(), "{text}");
        ensure!(self.position.is_none() || self.position == last, "it came with {:?}: {text}", self.position);
        self.position = last;
        self.stage = Stage::Welcomed;
        Ok(())
    }

    fn event(&mut self, payload: &[u8]) -> Result<u64> {
        let id = id_of(payload).with_context(|| String::from_utf8_lossy(payload).into_owned())?;
        let due = self.position.context("no welcome")? + 1;
        ensure!(id == due, "event {id} came, and {due} was next");
        self.position = Some(id);
        Ok(id)
    }
}

/// The id, which is the last member of an event.
fn id_of(payload: &[u8]) -> Option<u64> {
    let rest = payload.strip_suffix(b"}")?;
    let digits = rest.iter().rev().take_while(|byte| byte.is_ascii_digit()).count();
    let (before, id) = rest.split_at(rest.len() - digits);
    if !before.ends_with(br#","id":"#) {
        return None;
    }
    std::str::from_utf8(id).ok()?.parse().ok()
}
