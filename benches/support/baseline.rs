//! The baseline: the minimum that any fan-out server must do. A minimal epoll loop accepts,
//! upgrades, and for each event builds one frame and calls `send()` once per connection. It keeps
//! five bytes per connection.
//!
//! It runs as a separate process (the bench starts itself again) and implements as much of
//! WebSocket as `fanfare bench` uses, so that it is measured by the same code as the server.

use std::collections::HashMap;
use std::io::Write;
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, bail, ensure};
use fanfare::cli::bench::wire::{self, PING, TEXT};
use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, SocketFlags, accept_with, listen, recv, send, sockopt};
use rustix::process::{Signal, set_parent_process_death_signal};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

/// The hidden first argument that makes a bench run as the baseline. `one` or `batch` and the
/// seconds between pings (0: none) follow.
pub const ARGUMENT: &str = "--be-the-baseline";

/// Time between two parts of the walk of pings over the connections.
const TICK: Duration = Duration::from_millis(100);

/// Runs as the baseline if the command line says so.
pub fn run_if_asked() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).take(3).collect();
    let [argument, how, ping_interval] = &words[..] else { return Ok(()) };
    if argument != ARGUMENT {
        return Ok(());
    }
    set_parent_process_death_signal(Some(Signal::KILL))?;
    let ping_interval: u64 = ping_interval.parse()?;
    Baseline::bind(how == "batch", (ping_interval > 0).then(|| Duration::from_secs(ping_interval)))?.run()
}

#[derive(Clone, Copy, PartialEq)]
enum State {
    Free,
    Asking,
    Open,
}

struct Baseline {
    epoll: OwnedFd,
    listener: TcpListener,
    /// By descriptor number.
    sockets: Vec<Option<OwnedFd>>,
    states: Vec<State>,
    /// Partly received frames, by descriptor number; nearly always empty.
    parts: HashMap<usize, Vec<u8>>,
    /// Whether all events that arrived together are sent with one `send()`.
    batch: bool,
    ping_interval: Option<Duration>,
    /// The position of the walk of pings, and the fraction of a connection still due.
    walk: (usize, f64),
    next_id: u64,
}

impl Baseline {
    fn bind(batch: bool, ping_interval: Option<Duration>) -> Result<Baseline> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        listen(&listener, 4096)?;
        listener.set_nonblocking(true)?;
        sockopt::set_tcp_nodelay(&listener, true)?; // accepted sockets inherit it
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let number = listener.as_raw_fd() as u64;
        epoll::add(&epoll, &listener, epoll::EventData::new_u64(number), epoll::EventFlags::IN)?;
        let mut out = std::io::stdout();
        writeln!(out, "the baseline serves http://{}/", listener.local_addr()?)?;
        out.flush()?;
        Ok(Baseline {
            epoll,
            listener,
            sockets: Vec::new(),
            states: Vec::new(),
            parts: HashMap::new(),
            batch,
            ping_interval,
            walk: (0, 0.0),
            next_id: 1_000_000_000_000_000,
        })
    }

    fn run(mut self) -> Result<()> {
        let mut events = Vec::with_capacity(1024);
        let mut scratch = vec![0; 256 << 10];
        let tick = Timespec::try_from(TICK)?;
        let mut ticked = Instant::now();
        loop {
            let timeout = self.ping_interval.map(|_| &tick);
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), timeout) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(why) => bail!("epoll: {why}"),
            }
            for event in events.drain(..) {
                match event.data.u64() as usize {
                    number if number == self.listener.as_raw_fd() as usize => self.accept()?,
                    number => self.read(number, &mut scratch)?,
                }
            }
            if let Some(period) = self.ping_interval.filter(|_| ticked.elapsed() >= TICK) {
                self.beat(ticked.elapsed().as_secs_f64() / period.as_secs_f64())?;
                ticked = Instant::now();
            }
        }
    }

    fn accept(&mut self) -> Result<()> {
        loop {
            let socket = match accept_with(&self.listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
                Ok(socket) => socket,
                Err(Errno::AGAIN) => return Ok(()),
                Err(why) => bail!("accept: {why}"),
            };
            let number = socket.as_raw_fd() as usize;
            let data = epoll::EventData::new_u64(number as u64);
            epoll::add(&self.epoll, &socket, data, epoll::EventFlags::IN | epoll::EventFlags::ET)?;
            if self.sockets.len() <= number {
                self.sockets.resize_with(number + 1, || None);
                self.states.resize(number + 1, State::Free);
            }
            self.sockets[number] = Some(socket);
            self.states[number] = State::Asking;
        }
    }

    fn read(&mut self, number: usize, scratch: &mut [u8]) -> Result<()> {
        loop {
            let Some(socket) = &self.sockets[number] else { return Ok(()) };
            let len = match recv(socket, &mut *scratch, RecvFlags::empty()) {
                Err(Errno::AGAIN) => return Ok(()),
                Ok((_, 0)) | Err(_) => {
                    self.sockets[number] = None; // closing removes it from the epoll set
                    self.states[number] = State::Free;
                    self.parts.remove(&number);
                    return Ok(());
                }
                Ok((_, len)) => len,
            };
            match self.states[number] {
                State::Asking => self.upgrade(number, &scratch[..len])?,
                _ => self.take(number, &scratch[..len])?,
            }
            if len < scratch.len() {
                return Ok(());
            }
        }
    }

    fn upgrade(&mut self, number: usize, request: &[u8]) -> Result<()> {
        let request = std::str::from_utf8(request)?;
        ensure!(request.ends_with("\r\n\r\n"), "load clients send their request in one piece");
        let (_, after) = request.split_once("Sec-WebSocket-Key: ").context("no key")?;
        let key = after.split("\r\n").next().unwrap_or_default();
        let head = self.next_id - 1;
        // It has no history: a client recovers only if it has missed nothing.
        let (_, seen) = request.split_once("lastEventId=").context("no lastEventId")?;
        let seen = seen.split([' ', '&']).next().unwrap_or_default();
        let recovered = seen.is_empty() || seen == head.to_string();
        let welcome =
            format!(r#"{{"type":"welcome","lastEventId":{head},"head":{head},"recovered":{recovered}}}"#);
        let mut answer = Vec::with_capacity(256);
        write!(
            answer,
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             Sec-WebSocket-Accept: {}\r\n\r\n",
            derive_accept_key(key.as_bytes())
        )?;
        wire::put(&mut answer, TEXT, welcome.as_bytes());
        self.states[number] = State::Open;
        let socket = self.sockets[number].as_ref().expect("it was just read");
        send_all(socket, &answer)
    }

    /// Reads whole frames of a client: each text frame is an event for all, pongs are dropped.
    fn take(&mut self, number: usize, chunk: &[u8]) -> Result<()> {
        let mut joined = self.parts.remove(&number);
        if let Some(part) = &mut joined {
            part.extend_from_slice(chunk);
        }
        let mut bytes = joined.as_deref().unwrap_or(chunk);
        let mut out = Vec::new();
        while let Some(head) = wire::head(bytes).map_err(Error::msg)? {
            let Some(payload) = bytes.get(head.len..head.len + head.payload) else { break };
            if head.first == TEXT {
                let mask = head.mask.context("a client's frame without mask")?;
                let text: Vec<u8> = payload.iter().zip(mask.iter().cycle()).map(|(b, m)| b ^ m).collect();
                self.put_event(&mut out, &text)?;
                if !self.batch {
                    self.send_to_all(&out)?;
                    out.clear();
                }
            }
            bytes = &bytes[head.len + head.payload..];
        }
        if !bytes.is_empty() {
            self.parts.insert(number, bytes.to_vec());
        }
        if out.is_empty() { Ok(()) } else { self.send_to_all(&out) }
    }

    /// The event that the server builds from a text.
    fn put_event(&mut self, out: &mut Vec<u8>, text: &[u8]) -> Result<()> {
        let mut event = Vec::with_capacity(text.len() + 64);
        event.extend_from_slice(br#"{"sender":"baseline","text":""#);
        event.extend_from_slice(text);
        write!(event, r#"","id":{}}}"#, self.next_id)?;
        self.next_id += 1;
        wire::put(out, TEXT, &event);
        Ok(())
    }

    fn send_to_all(&self, frames: &[u8]) -> Result<()> {
        for (socket, state) in self.sockets.iter().zip(&self.states) {
            if let (Some(socket), State::Open) = (socket, state) {
                send_all(socket, frames)?;
            }
        }
        Ok(())
    }

    /// Pings the connections that are due after this share of the period.
    fn beat(&mut self, share: f64) -> Result<()> {
        let (at, owed) = &mut self.walk;
        *owed += share * self.sockets.len() as f64;
        while *owed >= 1.0 {
            *owed -= 1.0;
            *at = (*at + 1) % self.sockets.len();
            if let (Some(socket), State::Open) = (&self.sockets[*at], self.states[*at]) {
                send_all(socket, &[PING, 0])?;
            }
        }
        Ok(())
    }
}

/// One `send()`, unless the socket is full: then it waits, since the baseline loses no event
/// either.
fn send_all(socket: &OwnedFd, mut bytes: &[u8]) -> Result<()> {
    loop {
        match send(socket, bytes, SendFlags::NOSIGNAL) {
            Ok(len) if len == bytes.len() => return Ok(()),
            Ok(len) => bytes = &bytes[len..],
            Err(Errno::AGAIN) => {
                poll(&mut [PollFd::new(socket, PollFlags::OUT)], None)?;
            }
            Err(Errno::PIPE | Errno::CONNRESET) => return Ok(()), // read() handles it
            Err(why) => bail!("send: {why}"),
        }
    }
}
