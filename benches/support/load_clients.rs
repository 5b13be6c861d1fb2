//! Thousands of WebSocket clients in one epoll set, read and counted with as little CPU as
//! possible.
//!
//! Every connection is checked: any frame but an event, a ping or the welcome ends the bench,
//! and so does a connection with one event too few or too many.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{Timespec, epoll};
use rustix::io::Errno;

use super::wire::{self, ACCEPT, CLOSE, KEY, PING, PONG, TEXT};

/// Handshakes under way at once: below any listen backlog.
const HANDSHAKES: usize = 64;

/// How long nothing may arrive while something is due.
const TIMEOUT: Duration = Duration::from_secs(10);

/// One connection in this many measures latency.
const SAMPLE: usize = 50;

/// Digits at the start of each text: when it was due, in nanoseconds since the start.
const STAMP: usize = 20;

struct Client {
    stream: TcpStream,
    open: bool,
    welcomed: bool,
    /// Events received.
    events: u64,
    /// Payload bytes still to come of a partly read frame.
    left: usize,
    /// The start of a frame, too short to be classified.
    rest: Vec<u8>,
}

/// Clients of one server; the first one also publishes.
pub struct LoadClients {
    epoll: OwnedFd,
    ready: Vec<epoll::Event>,
    scratch: Vec<u8>,
    clients: Vec<Client>,
    addr: SocketAddr,
    began: Instant,
    unsent: Vec<u8>,
    published: u64,
    size: usize,
    tally: Tally,
}

/// What all clients together have received.
#[derive(Default)]
struct Tally {
    welcomed: usize,
    events: u64,
    pings: u64,
    /// While sampling: the time of events from due to read.
    latencies: Option<Vec<Duration>>,
}

impl LoadClients {
    /// Starts with no clients. `size` is the length of a text in bytes.
    pub fn new(addr: SocketAddr, size: usize) -> Result<LoadClients> {
        ensure!(size >= STAMP, "a text must hold its {STAMP} digits of time");
        Ok(LoadClients {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            ready: Vec::with_capacity(1024),
            scratch: vec![0; 256 << 10],
            clients: Vec::new(),
            addr,
            began: Instant::now(),
            unsent: Vec::new(),
            published: 0,
            size,
            tally: Tally::default(),
        })
    }

    /// Connects until there are `connections`, and waits for each one's welcome.
    pub fn grow(&mut self, connections: usize) -> Result<()> {
        let mut deadline = Instant::now() + TIMEOUT;
        while self.tally.welcomed < connections {
            let before = self.tally.welcomed;
            while self.clients.len() < connections && self.clients.len() - before < HANDSHAKES {
                self.connect()?;
            }
            self.turn(TIMEOUT)?;
            if self.tally.welcomed > before {
                deadline = Instant::now() + TIMEOUT;
            }
            let missing = self.clients.len() - self.tally.welcomed;
            ensure!(Instant::now() < deadline, "{missing} clients got no welcome within {TIMEOUT:?}");
        }
        Ok(())
    }

    fn connect(&mut self) -> Result<()> {
        let number = self.clients.len();
        let mut stream = TcpStream::connect(self.addr).with_context(|| format!("connection {number}"))?;
        stream.set_nodelay(true)?;
        // An empty lastEventId asks for recovery frames: a welcome now, and a `reset` or `error`
        // that shows.
        let request = format!(
            "GET /ws/u{number}?lastEventId= HTTP/1.1\r\nHost: {}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {KEY}\r\n\r\n",
            self.addr
        );
        stream.write_all(request.as_bytes())?;
        stream.set_nonblocking(true)?;
        let data = epoll::EventData::new_u64(number as u64);
        let flags = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
        let flags = if number == 0 { flags } else { flags - epoll::EventFlags::OUT };
        epoll::add(&self.epoll, &stream, data, flags)?;
        self.clients.push(Client {
            stream,
            open: false,
            welcomed: false,
            events: 0,
            left: 0,
            rest: Vec::new(),
        });
        Ok(())
    }

    /// How many clients there are.
    pub fn len(&self) -> usize {
        self.clients.len()
    }

    /// Events received, by all clients together.
    pub fn events(&self) -> u64 {
        self.tally.events
    }

    /// Pings received and answered.
    pub fn pings(&self) -> u64 {
        self.tally.pings
    }

    /// Events published.
    pub fn published(&self) -> u64 {
        self.published
    }

    /// Events that the first client has not received yet. It may have received more than were
    /// expected so far.
    pub fn in_flight(&self) -> u64 {
        self.published.saturating_sub(self.clients[0].events)
    }

    /// Publishes an event, due at that moment.
    fn publish(&mut self, due: Instant) -> Result<()> {
        let mut text = format!("{:0STAMP$}", (due - self.began).as_nanos()).into_bytes();
        text.resize(self.size, b'x');
        wire::put_masked(&mut self.unsent, TEXT, &text);
        self.published += 1;
        Ok(())
    }

    fn send_published(&mut self) -> Result<()> {
        while !self.unsent.is_empty() {
            match self.clients[0].stream.write(&self.unsent) {
                Ok(len) => drop(self.unsent.drain(..len)),
                Err(why) if why.kind() == ErrorKind::WouldBlock => break,
                Err(why) => bail!("the publisher can't send: {why}"),
            }
        }
        Ok(())
    }

    /// Publishes `events` events, one every `period`, and waits until every client has each.
    pub fn publish_steadily(&mut self, events: u32, period: Duration) -> Result<()> {
        self.publish_while(|published| published < events, period)
    }

    /// The same while `go_on` returns true.
    fn publish_while(&mut self, go_on: impl Fn(u32) -> bool, period: Duration) -> Result<()> {
        let start = Instant::now();
        for event in (0..).take_while(|event| go_on(*event)) {
            let due = start + period * event;
            loop {
                let now = Instant::now();
                if now >= due {
                    break;
                }
                self.turn(due - now)?;
            }
            self.publish(due)?;
            self.send_published()?;
        }
        self.wait_for_all()
    }

    /// As [`LoadClients::publish_steadily`], and returns the latencies of a sample, from due to
    /// read.
    pub fn publish_and_time(&mut self, events: u32, period: Duration) -> Result<Vec<Duration>> {
        self.time_while(|published| published < events, period)
    }

    /// The same while `go_on` returns true.
    pub fn time_while(&mut self, go_on: impl Fn(u32) -> bool, period: Duration) -> Result<Vec<Duration>> {
        let before = self.published;
        self.tally.latencies = Some(Vec::new());
        self.publish_while(go_on, period)?;
        let samples = self.clients.len().div_ceil(SAMPLE) * (self.published - before) as usize;
        let latencies = self.tally.latencies.take().expect("nothing else takes it");
        // Frames split between two reads are not timed: at live rates there are hardly any.
        ensure!(latencies.len() * 100 >= samples * 95, "only {} of {samples} samples", latencies.len());
        Ok(latencies)
    }

    /// Keeps `window` events in flight for this time, and returns deliveries per second, measured
    /// after the first fifth of it. Then waits until every client has each event.
    pub fn publish_windowed(&mut self, window: u64, time: Duration) -> Result<f64> {
        let start = Instant::now();
        let mut measured = None;
        let mut progress = (self.tally.events, start);
        loop {
            let now = Instant::now();
            if measured.is_none() && now - start > time / 5 {
                measured = Some((now, self.tally.events));
            }
            if now - start > time {
                break;
            }
            while self.in_flight() < window {
                self.publish(now)?;
            }
            self.send_published()?;
            self.turn(Duration::from_millis(100))?;
            if self.tally.events > progress.0 {
                progress = (self.tally.events, now);
            }
            ensure!(now - progress.1 < TIMEOUT, "nothing has arrived for {TIMEOUT:?}: {}", self.shortfall());
        }
        let (from, events) = measured.expect("the measurement starts before the time is over");
        let rate = (self.tally.events - events) as f64 / from.elapsed().as_secs_f64();
        self.wait_for_all()?;
        Ok(rate)
    }

    /// Reads and answers pings for this time.
    pub fn idle(&mut self, time: Duration) -> Result<()> {
        let end = Instant::now() + time;
        loop {
            let now = Instant::now();
            if now >= end {
                return Ok(());
            }
            self.turn(end - now)?;
        }
    }

    /// Reads what has arrived, without waiting.
    pub fn drain(&mut self) -> Result<()> {
        self.turn(Duration::ZERO)
    }

    /// Counts events published elsewhere, which every client must get as well.
    pub fn expect(&mut self, events: u64) {
        self.published += events;
    }

    /// Waits until every client has every event, once.
    pub fn wait_for_all(&mut self) -> Result<()> {
        let due = self.published * self.clients.len() as u64;
        let mut progress = (self.tally.events, Instant::now());
        while self.tally.events < due || !self.unsent.is_empty() {
            self.send_published()?;
            self.turn(Duration::from_millis(100))?;
            if self.tally.events > progress.0 {
                progress = (self.tally.events, Instant::now());
            }
            ensure!(progress.1.elapsed() < TIMEOUT, "{}", self.shortfall());
        }
        ensure!(self.clients.iter().all(|client| client.events == self.published), "{}", self.shortfall());
        Ok(())
    }

    fn shortfall(&self) -> String {
        let due = self.published;
        let wrong: Vec<_> = self.clients.iter().enumerate().filter(|(_, c)| c.events != due).collect();
        let Some((number, client)) = wrong.first() else { return "every client has every event".into() };
        format!(
            "deliveries are missing: {} of {} clients don't have exactly {due} events; client {number} has {}",
            wrong.len(),
            self.clients.len(),
            client.events
        )
    }

    /// Reads what has arrived, waiting up to `timeout` for it.
    fn turn(&mut self, timeout: Duration) -> Result<()> {
        let timeout = Timespec::try_from(timeout)?;
        match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut self.ready), Some(&timeout)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(why) => bail!("epoll: {why}"),
        }
        for event in self.ready.drain(..) {
            let number = event.data.u64() as usize;
            let client = &mut self.clients[number];
            let sampled = number.is_multiple_of(SAMPLE);
            while client
                .read(&mut self.scratch, &mut self.tally, self.began, sampled)
                .with_context(|| format!("client {number}"))?
            {}
        }
        Ok(())
    }
}

impl Client {
    /// Reads once; true if there may be more to read.
    fn read(&mut self, scratch: &mut [u8], tally: &mut Tally, began: Instant, sampled: bool) -> Result<bool> {
        let held = self.rest.len();
        scratch[..held].copy_from_slice(&self.rest);
        self.rest.clear();
        let len = match self.stream.read(&mut scratch[held..]) {
            Ok(0) => bail!("the server closed the connection without a close frame"),
            Ok(len) => len,
            Err(why) if why.kind() == ErrorKind::WouldBlock => {
                self.rest.extend_from_slice(&scratch[..held]);
                return Ok(false);
            }
            Err(why) => bail!("the server broke the connection: {why}"),
        };
        let more = held + len == scratch.len();
        let mut bytes = &scratch[..held + len];
        if !self.open {
            let Some(head) = wire::http_head(bytes) else {
                self.rest.extend_from_slice(bytes);
                return Ok(more);
            };
            let answer = String::from_utf8_lossy(&bytes[head.clone()]).into_owned();
            let upgraded = answer.starts_with("HTTP/1.1 101") && answer.contains(ACCEPT);
            ensure!(upgraded, "not upgraded: {answer}");
            self.open = true;
            bytes = &bytes[head.end..];
        }
        self.take(bytes, tally, sampled.then_some(began))?;
        Ok(more)
    }

    fn take(&mut self, mut bytes: &[u8], tally: &mut Tally, began: Option<Instant>) -> Result<()> {
        loop {
            let skipped = self.left.min(bytes.len());
            self.left -= skipped;
            bytes = &bytes[skipped..];
            if bytes.is_empty() {
                return Ok(());
            }
            let Some(head) = wire::head(bytes)? else { break };
            ensure!(head.mask.is_none(), "a server's frame with a mask");
            let payload = &bytes[head.len..(head.len + head.payload).min(bytes.len())];
            // Every event is longer than this. Other frames are handled whole.
            if payload.len() < head.payload && payload.len() < 16
                || head.first != TEXT && payload.len() < head.payload
            {
                break;
            }
            match head.first {
                TEXT if !payload.starts_with(br#"{"type":""#) => {
                    self.events += 1;
                    tally.events += 1;
                    if let (Some(began), Some(latencies)) = (began, &mut tally.latencies) {
                        latencies.extend(age(payload, began));
                    }
                }
                TEXT if payload.len() < head.payload => break,
                TEXT if !self.welcomed && payload.starts_with(br#"{"type":"welcome""#) => {
                    self.welcomed = true;
                    tally.welcomed += 1;
                }
                PING => {
                    let mut pong = Vec::with_capacity(6 + payload.len());
                    wire::put_masked(&mut pong, PONG, payload);
                    self.stream.write_all(&pong).context("can't answer a ping")?;
                    tally.pings += 1;
                }
                TEXT | CLOSE => bail!("the server says {:?}", String::from_utf8_lossy(payload)),
                first => bail!("an unexpected frame, {first:#x}"),
            }
            self.left = head.payload - payload.len();
            bytes = &bytes[head.len + payload.len()..];
        }
        self.rest.extend_from_slice(bytes);
        Ok(())
    }
}

/// How long ago the event was due; `None` if its time is not part of this read.
fn age(event: &[u8], began: Instant) -> Option<Duration> {
    const BEFORE: &[u8] = br#""text":""#;
    let at = event.windows(BEFORE.len()).position(|part| part == BEFORE)? + BEFORE.len();
    let digits = std::str::from_utf8(event.get(at..at + STAMP)?).ok()?;
    let due = Duration::from_nanos(digits.parse().ok()?);
    Some(began.elapsed().saturating_sub(due))
}
