//! A worker process: its part of the clients, in one thread and one epoll set. Commands come as
//! lines of JSON on standard input, reports go to standard output.

use std::io::{self, BufRead, Write};
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use hdrhistogram::Histogram;
use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token, Waker};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, Socket, Type};

use super::client::{Client, Gone, Seen, Shared, Stage, Tally, count, describe};
use super::mark::{Finder, Mark};
use super::plan::{Command, HANDSHAKES, Load, Plan, Publish};
use super::publisher::Publisher;

/// How often a worker reports.
const REPORT: Duration = Duration::from_millis(100);

const WAKER: Token = Token(usize::MAX);
const PUBLISHER: Token = Token(usize::MAX - 1);

/// Latencies are recorded in microseconds up to a minute, with two significant digits.
pub fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 60_000_000, 2).expect("the bounds are constant")
}

/// Nanoseconds of the monotonic clock, the same in every process.
pub fn monotonic() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// The state of a worker. Counts are of the whole run.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Report {
    /// Commands that it has carried out or started.
    pub commands: u32,
    /// Clients that get events.
    pub ready: u32,
    /// Clients on the way to it, or waiting to reconnect.
    pub pending: u32,
    /// Events published.
    pub published: u32,
    /// Deliveries that are due for the number given by [`Command::Expect`].
    pub missing: u64,
    pub tally: Tally,
    /// Latencies since the last report: microseconds and count.
    pub latencies: Vec<(u64, u64)>,
    /// CPU time of the process, and time for which it waited for a core, in nanoseconds.
    pub cpu: u64,
    pub waited: u64,
}

/// Runs a worker until its standard input ends.
pub fn run() -> ExitCode {
    match work() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "fanfare bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn work() -> Result<()> {
    let mut lines = io::stdin().lock().lines();
    let first = lines.next().context("no plan")??;
    let Command::Setup { plan, process, started } = serde_json::from_str(&first)? else { bail!("no plan") };
    drop(lines);
    let poll = Poll::new()?;
    let waker = Arc::new(Waker::new(poll.registry(), WAKER)?);
    let (commands, received) = channel();
    std::thread::spawn(move || {
        for line in io::stdin().lock().lines().map_while(Result::ok) {
            let Ok(command) = serde_json::from_str(&line) else { break };
            if commands.send(command).is_err() {
                break;
            }
            let _ = waker.wake();
        }
        drop(commands);
        let _ = waker.wake();
    });
    Worker::new(&plan, process, started, poll)?.run(&received)
}

/// A client that is to connect.
struct Joining {
    slot: usize,
    number: u64,
    seen: Seen,
    last_id: u64,
}

struct Worker<'p> {
    poll: Poll,
    started: u64,
    shared: Shared<'p>,
    clients: Vec<Option<Client>>,
    joining: Vec<Joining>,
    /// Clients whose handshake is under way.
    handshakes: usize,
    ready: u32,
    /// The number of the next new client.
    next_number: u64,
    /// How many clients the worker has, apart from the observer.
    count: usize,
    /// The slot of the client that publishes and by which events in flight are counted.
    observer: Option<usize>,
    publisher: Option<Publisher>,
    load: Load,
    /// When the rate was set, and events published since.
    rate_start: (Instant, u32),
    published: u32,
    /// Clients that are replaced: since when, how many a second, and how many so far.
    churn: Option<(Instant, f64, u64)>,
    /// When clients started to connect, and how many have since.
    connect_start: (Instant, u64),
    expected: Option<u32>,
    report: Report,
}

impl<'p> Worker<'p> {
    fn new(plan: &'p Plan, process: u32, started: u64, poll: Poll) -> Result<Worker<'p>> {
        let (first, count) = plan.part(process);
        let is_first = process == 0;
        let publisher = match is_first {
            true => Publisher::connect(&plan.publish, poll.registry(), PUBLISHER)?,
            false => None,
        };
        let slots = count as usize + usize::from(is_first);
        let mut joining: Vec<Joining> = (0..count as usize)
            .map(|slot| Joining {
                slot,
                number: u64::from(first) + slot as u64,
                seen: Seen::Unknown,
                last_id: 0,
            })
            .collect();
        let observer = is_first.then_some(count as usize);
        joining.extend(observer.map(|slot| Joining {
            slot,
            number: u64::from(plan.connections),
            seen: Seen::Unknown,
            last_id: 0,
        }));
        // Taken from the end: without the observer there are no events.

        let shared = Shared {
            plan,
            tally: Tally::default(),
            latencies: histogram(),
            scratch: vec![0; 256 << 10],
            finder: Finder::default(),
            now: 0,
        };
        // New clients of each process have numbers of their own.
        let next_number = u64::from(plan.connections) + 1 + u64::from(process) * 1_000_000_000;
        let now = Instant::now();
        Ok(Worker {
            poll,
            started,
            shared,
            clients: (0..slots).map(|_| None).collect(),
            joining,
            handshakes: 0,
            ready: 0,
            next_number,
            count: count as usize,
            observer,
            publisher,
            load: Load::Nothing,
            rate_start: (now, 0),
            published: 0,
            churn: None,
            connect_start: (now, 0),
            expected: None,
            report: Report::default(),
        })
    }

    fn run(&mut self, commands: &Receiver<Command>) -> Result<()> {
        let mut events = Events::with_capacity(4096);
        let mut next_report = Instant::now();
        let mut connecting = false;
        loop {
            let now = Instant::now();
            if now >= next_report {
                self.send_report()?;
                next_report = now + REPORT;
            }
            loop {
                match commands.try_recv() {
                    Ok(Command::Connect) => {
                        connecting = true;
                        self.connect_start = (now, 0);
                        self.report.commands += 1;
                    }
                    Ok(command) => self.apply(command, now),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => return Ok(()),
                }
            }
            if connecting {
                self.connect(now);
            }
            self.replace(now);
            self.publish(now);
            let timeout = self.timeout(next_report);
            match self.poll.poll(&mut events, Some(timeout)) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                other => other?,
            }
            self.shared.now = (monotonic() - self.started) / 1000;
            for event in &events {
                let token = event.token();
                match (token, &mut self.publisher) {
                    (WAKER, _) => {}
                    (PUBLISHER, Some(publisher)) => {
                        let problems = publisher.advance(self.poll.registry());
                        self.shared.tally.not_published(problems);
                    }
                    (Token(slot), _) => self.advance(slot),
                }
            }
        }
    }

    fn timeout(&self, next_report: Instant) -> Duration {
        let now = Instant::now();
        let mut at = next_report;
        if let Load::Rate(rate) = self.load {
            at = at.min(self.rate_start.0 + Duration::from_secs_f64(f64::from(self.rate_start.1) / rate));
        }
        if let Some((start, rate, done)) = self.churn {
            at = at.min(start + Duration::from_secs_f64(done as f64 / rate));
        }
        if let (Some(rate), false) = (self.shared.plan.connect_rate, self.joining.is_empty()) {
            at = at.min(self.connect_start.0 + Duration::from_secs_f64(self.connect_start.1 as f64 / rate));
        }
        at.saturating_duration_since(now)
    }

    fn apply(&mut self, command: Command, now: Instant) {
        self.report.commands += 1;
        match command {
            Command::Setup { .. } | Command::Connect => {}
            Command::ExpectAfter(number) => {
                for client in self.clients.iter_mut().flatten() {
                    if client.stage == Stage::Ready {
                        client.seen = Seen::UpTo(number);
                    }
                }
            }
            Command::Publish(load) => {
                self.load = load;
                self.rate_start = (now, 0);
            }
            Command::Storm(share) => {
                self.connect_start = (now, 0);
                for slot in self.some(share) {
                    let Some(client) = self.leave(slot) else { continue };
                    let resumes = self.shared.plan.resume.is_some() && client.last_id > 0;
                    let seen = if resumes { client.seen } else { Seen::Unknown };
                    let (number, last_id) = (client.number, if resumes { client.last_id } else { 0 });
                    self.joining.push(Joining { slot, number, seen, last_id });
                }
            }
            Command::Stall(share) => {
                for slot in self.some(share) {
                    if let Some(client) = &mut self.clients[slot] {
                        client.stalled = true;
                    }
                }
                if share == 0.0 {
                    for slot in 0..self.count {
                        let Some(client) = &mut self.clients[slot] else { continue };
                        if std::mem::take(&mut client.stalled) {
                            client.time_from(self.shared.now);
                            self.advance(slot);
                        }
                    }
                }
            }
            Command::Churn(rate) => self.churn = (rate > 0.0).then_some((now, rate, 0)),
            Command::Expect(number) => self.expected = Some(number),
            Command::Leave => {
                self.joining.clear();
                for slot in 0..self.clients.len() {
                    self.leave(slot);
                }
            }
        }
    }

    /// Every nth slot of the clients, without the observer.
    fn some(&self, share: f64) -> Vec<usize> {
        let part = |slot: usize| (slot as f64 * share) as usize;
        (0..self.count).filter(|slot| part(*slot) < part(slot + 1)).collect()
    }

    /// Removes a client. Its socket is closed when it is dropped.
    fn leave(&mut self, slot: usize) -> Option<Client> {
        let client = self.clients[slot].take()?;
        match client.stage {
            Stage::Ready => self.ready -= 1,
            Stage::Connecting | Stage::Upgrading | Stage::Greeting => self.handshakes -= 1,
        }
        Some(client)
    }

    /// Starts handshakes, as far as the rate and the limit allow.
    fn connect(&mut self, now: Instant) {
        while self.handshakes < HANDSHAKES && !self.joining.is_empty() {
            if let Some(rate) = self.shared.plan.connect_rate
                && self.connect_start.1 as f64 > (now - self.connect_start.0).as_secs_f64() * rate
            {
                return;
            }
            self.connect_start.1 += 1;
            let Joining { slot, number, seen, last_id } = self.joining.pop().expect("it is not empty");
            match self.open(slot, number) {
                Ok(stream) => {
                    self.handshakes += 1;
                    self.clients[slot] = Some(Client::new(stream, number, seen, last_id, self.shared.plan));
                }
                Err(error) => count(&mut self.shared.tally.refused, describe(&error)),
            }
        }
    }

    fn open(&self, slot: usize, number: u64) -> io::Result<TcpStream> {
        let Plan { target, bind, .. } = self.shared.plan;
        let socket = Socket::new(Domain::for_address(target.addr), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_nonblocking(true)?;
        socket.set_tcp_nodelay(true)?;
        if !bind.is_empty() {
            let source = bind[number as usize % bind.len()];
            socket.bind(&SocketAddr::new(source, 0).into())?;
        }
        match socket.connect(&target.addr.into()) {
            Err(error) if error.raw_os_error() != Some(rustix::io::Errno::INPROGRESS.raw_os_error()) => {
                return Err(error);
            }
            _ => {}
        }
        let mut stream = TcpStream::from_std(socket.into());
        let interest = Interest::READABLE | Interest::WRITABLE;
        self.poll.registry().register(&mut stream, Token(slot), interest)?;
        Ok(stream)
    }

    fn advance(&mut self, slot: usize) {
        let Some(client) = &mut self.clients[slot] else { return };
        let before = client.stage;
        match client.advance(&mut self.shared) {
            Ok(()) => {
                if before != Stage::Ready && client.stage == Stage::Ready {
                    self.handshakes -= 1;
                    self.ready += 1;
                    client.time_from(self.shared.now);
                }
            }
            Err(Gone(why)) => {
                let tally = &mut self.shared.tally;
                count(if before == Stage::Ready { &mut tally.closed } else { &mut tally.refused }, why);
                self.leave(slot);
            }
        }
    }

    /// Replaces clients by new ones, at the rate of [`Command::Churn`].
    fn replace(&mut self, now: Instant) {
        let Some((start, rate, mut done)) = self.churn else { return };
        while self.count > 0 && done as f64 <= (now - start).as_secs_f64() * rate {
            let slot = (self.next_number % self.count as u64) as usize;
            if self.leave(slot).is_some() {
                self.joining.push(Joining {
                    slot,
                    number: self.next_number,
                    seen: Seen::Unknown,
                    last_id: 0,
                });
            }
            self.next_number += 1;
            done += 1;
        }
        self.churn = Some((start, rate, done));
    }

    /// Publishes what is due.
    fn publish(&mut self, now: Instant) {
        let Some(observer) = self.observer else { return };
        loop {
            let due = match self.load {
                Load::Nothing => break,
                Load::Rate(rate) => {
                    let due =
                        self.rate_start.0 + Duration::from_secs_f64(f64::from(self.rate_start.1) / rate);
                    if due > now {
                        break;
                    }
                    due
                }
                Load::InFlight(events) => {
                    let has = self.clients[observer].as_ref().map(|client| client.missing(self.published));
                    if has.is_none_or(|missing| missing >= events) {
                        break;
                    }
                    now
                }
            };
            // A server that takes no more must not fill this process's memory.
            let unsent = self.clients[observer].as_ref().map_or(usize::MAX, Client::unsent);
            let waits = self.publisher.as_ref().map_or(unsent > 64 << 20, |one| one.unanswered() > 100_000);
            if waits {
                break;
            }
            self.rate_start.1 += 1;
            self.published += 1;
            let since_due = (Instant::now() - due).as_nanos() as u64;
            let due = (monotonic() - since_due).saturating_sub(self.started) / 1000;
            let text = Mark { number: self.published, due }.text(self.shared.plan.size);
            match (&mut self.publisher, &self.shared.plan.publish) {
                (Some(publisher), _) => publisher.publish(text),
                (None, Publish::Socket { message }) => {
                    let message = message.replace("{event}", &text);
                    let Some(client) = &mut self.clients[observer] else { break };
                    if let Err(Gone(why)) = client.send(message.as_bytes()) {
                        count(&mut self.shared.tally.closed, why);
                        self.leave(observer);
                        break;
                    }
                }
                (None, _) => break,
            }
        }
        if let Some(publisher) = &mut self.publisher {
            let problems = publisher.send(self.poll.registry());
            self.shared.tally.not_published(problems);
        }
    }

    fn send_report(&mut self) -> Result<()> {
        let report = &mut self.report;
        report.ready = self.ready;
        report.pending = (self.handshakes + self.joining.len()) as u32;
        report.published = self.published;
        report.missing = self.expected.map_or(0, |number| {
            let clients = self.clients.iter().flatten().filter(|client| client.stage == Stage::Ready);
            clients.map(|client| u64::from(client.missing(number))).sum()
        });
        report.tally = self.shared.tally.clone();
        let recorded = self.shared.latencies.iter_recorded();
        report.latencies =
            recorded.map(|value| (value.value_iterated_to(), value.count_at_value())).collect();
        self.shared.latencies.reset();
        (report.cpu, report.waited) = own_cpu();
        let mut line = serde_json::to_vec(report)?;
        line.push(b'\n');
        io::stdout().lock().write_all(&line).context("the coordinator has ended")
    }
}

/// CPU time of this thread and time for which it waited for a core, in nanoseconds.
fn own_cpu() -> (u64, u64) {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let mut fields = text.split_whitespace().map(|field| field.parse().unwrap_or_default());
    (fields.next().unwrap_or_default(), fields.next().unwrap_or_default())
}
