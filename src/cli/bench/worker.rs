//! A worker process: its part of the clients, in one thread and one epoll set. Commands come as
//! lines of JSON on standard input, reports go to standard output.

use std::io::{self, BufRead, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use hdrhistogram::Histogram;
use mio::{Events, Poll, Token, Waker};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use super::client::{Seen, Shared, Tally};
use super::clients::Clients;
use super::mark::{Finder, Mark};
use super::plan::{Command, Load, Plan, Publish};
use super::publisher::Publisher;

/// How often a worker reports.
const REPORT: Duration = Duration::from_millis(100);

/// Bytes that one read takes, at least.
const READ: usize = 256 << 10;

/// Most bytes of events that wait for the observer's socket: a server that takes no more must not
/// fill the memory of this process.
const UNSENT_MAX: usize = 64 << 20;

/// Most events that wait for the publisher, for the same reason.
const UNANSWERED_MAX: u64 = 100_000;

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

struct Worker<'p> {
    poll: Poll,
    started: u64,
    shared: Shared<'p>,
    clients: Clients,
    publisher: Option<Publisher>,
    load: Load,
    /// When the load was set, and events published since.
    load_start: (Instant, u32),
    published: u32,
    expected: Option<u32>,
    report: Report,
}

impl<'p> Worker<'p> {
    fn new(plan: &'p Plan, process: u32, started: u64, poll: Poll) -> Result<Worker<'p>> {
        let publisher = match process {
            0 => Publisher::connect(&plan.publish, poll.registry(), PUBLISHER)?,
            _ => None,
        };
        let shared = Shared {
            plan,
            tally: Tally::default(),
            latencies: histogram(),
            scratch: vec![0; READ],
            finder: Finder::default(),
            now: 0,
        };
        let now = Instant::now();
        Ok(Worker {
            clients: Clients::new(plan, process, poll.registry().try_clone()?, now),
            poll,
            started,
            shared,
            publisher,
            load: Load::Nothing,
            load_start: (now, 0),
            published: 0,
            expected: None,
            report: Report::default(),
        })
    }

    fn run(&mut self, commands: &Receiver<Command>) -> Result<()> {
        let mut events = Events::with_capacity(4096);
        let mut next_report = Instant::now();
        let mut connects = false;
        loop {
            let now = Instant::now();
            let connected = self.report.pending > 0 && self.clients.pending() == 0;
            let carried_out = self.report.commands;
            loop {
                match commands.try_recv() {
                    Ok(command) => {
                        connects |= matches!(command, Command::Connect);
                        self.apply(command, now);
                    }
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => return Ok(()),
                }
            }
            // The coordinator measures how long a storm takes: it must not wait for the next report.
            if now >= next_report || connected || self.report.commands > carried_out {
                self.send_report()?;
                next_report = now + REPORT;
            }
            let mut wake = next_report;
            if connects {
                self.clients.replace(now);
                self.clients.connect(now, &mut self.shared);
                wake = wake.min(self.clients.next_due(self.shared.plan).unwrap_or(wake));
            }
            self.publish(now);
            if let Load::Rate(rate) = self.load {
                wake = wake.min(self.due(rate));
            }
            match self.poll.poll(&mut events, Some(wake.saturating_duration_since(Instant::now()))) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                other => other?,
            }
            self.shared.now = (monotonic() - self.started) / 1000;
            for event in &events {
                match (event.token(), &mut self.publisher) {
                    (WAKER, _) => {}
                    (PUBLISHER, Some(publisher)) => {
                        let problems = publisher.advance(self.poll.registry());
                        self.shared.tally.not_published(problems);
                    }
                    (Token(slot), _) => self.clients.advance(slot, &mut self.shared),
                }
            }
        }
    }

    fn apply(&mut self, command: Command, now: Instant) {
        self.report.commands += 1;
        match command {
            Command::Setup { .. } => {}
            Command::Connect => self.clients.start_connecting(now),
            Command::ExpectAfter(number) => {
                self.clients.ready().for_each(|client| client.seen = Seen::UpTo(number));
            }
            Command::Publish(load) => {
                self.load = load;
                self.load_start = (now, 0);
            }
            Command::Storm(share) => {
                self.clients.start_connecting(now);
                self.clients.storm(share, self.shared.plan);
            }
            Command::Stall(share) if share > 0.0 => self.clients.stall(share),
            Command::Stall(_) => self.clients.end_stall(&mut self.shared),
            Command::Churn(rate) => {
                self.clients.start_connecting(now);
                self.clients.churn(rate, now);
            }
            Command::Expect(number) => self.expected = Some(number),
            Command::Leave => self.clients.leave_all(),
        }
    }

    /// When the next event is due at this rate.
    fn due(&self, rate: f64) -> Instant {
        let (start, done) = self.load_start;
        start + Duration::from_secs_f64(f64::from(done) / rate)
    }

    /// Publishes what is due.
    fn publish(&mut self, now: Instant) {
        while let Some(due) = self.next_event(now) {
            self.load_start.1 += 1;
            self.published += 1;
            let late = due.elapsed().as_nanos() as u64;
            let due = (monotonic() - late).saturating_sub(self.started) / 1000;
            let text = Mark { number: self.published, due }.text(self.shared.plan.size);
            match (&mut self.publisher, &self.shared.plan.publish) {
                (Some(publisher), _) => publisher.publish(text),
                (None, Publish::Socket { message }) => {
                    self.clients.publish(&message.replace("{event}", &text), &mut self.shared);
                }
                (None, _) => {}
            }
        }
        if let Some(publisher) = &mut self.publisher {
            let problems = publisher.send(self.poll.registry());
            self.shared.tally.not_published(problems);
        }
    }

    /// When the next event is due, if that is now and the server takes it.
    fn next_event(&mut self, now: Instant) -> Option<Instant> {
        let published = self.published;
        let observer = self.clients.observer()?;
        if observer.unsent() > UNSENT_MAX {
            return None;
        }
        let missing = observer.missing(published);
        if self.publisher.as_ref().is_some_and(|publisher| publisher.unanswered() > UNANSWERED_MAX) {
            return None;
        }
        match self.load {
            Load::Nothing => None,
            Load::Rate(rate) => Some(self.due(rate)).filter(|due| *due <= now),
            Load::InFlight(events) => (missing < events).then_some(now),
        }
    }

    fn send_report(&mut self) -> Result<()> {
        let report = &mut self.report;
        report.ready = self.clients.ready;
        report.pending = self.clients.pending() as u32;
        report.published = self.published;
        report.missing = self
            .expected
            .map_or(0, |number| self.clients.ready().map(|client| u64::from(client.missing(number))).sum());
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
