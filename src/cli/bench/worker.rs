//! A worker process: its part of the clients, in one thread and one epoll set. Commands come as
//! lines of JSON on standard input, reports go to standard output.

use std::io::{self, BufRead, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use hdrhistogram::Histogram;
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Registry, Token, Waker};
use rustix::time::{
    ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, clock_gettime,
    timerfd_create, timerfd_settime,
};
use serde::{Deserialize, Serialize};

use super::clients::Clients;
use super::mark::{Finder, Mark};
use super::plan::{Command, Load, Publish, TIMED_MIN};
use super::publisher::{Event, Publisher};
use super::shared::{Shared, Tally};

/// How often a worker reports.
const REPORT_INTERVAL: Duration = Duration::from_millis(100);

/// The same while expected events are missing: the coordinator measures when all have arrived.
const CATCH_UP_INTERVAL: Duration = Duration::from_millis(10);

/// Bytes that one read takes, at least.
const READ_BUFFER: usize = 256 << 10;

/// Most bytes of events that wait for the observer's socket or the publisher: a server that takes no
/// more must not fill the memory of this process. Their times stay those at which they are due.
const UNSENT_MAX: usize = 4 << 20;

/// Events in flight that the observer has not received after this time are written off: the loop
/// goes on with others.
const WRITE_OFF: Duration = Duration::from_secs(1);

/// Clients that are read before due events are published and timed clients are read. In a storm each
/// may have hundreds of events to read.
const CLIENTS_A_TURN: usize = 64;

/// Timed clients that are read at once: all of them.
const TIMED_A_TURN: usize = 2 * TIMED_MIN as usize;

const WAKER: Token = Token(usize::MAX);
const PUBLISHER: Token = Token(usize::MAX - 1);
const TIMER: Token = Token(usize::MAX - 2);
const TIMED: Token = Token(usize::MAX - 3);

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
    match run_worker() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "fanfare bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run_worker() -> Result<()> {
    let mut lines = io::stdin().lock().lines();
    let first = lines.next().context("no plan")??;
    let Command::Setup { plan, process, started, tag } = serde_json::from_str(&first)? else {
        bail!("no plan")
    };
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
    let shared = Shared {
        plan: &plan,
        tally: Tally::default(),
        latencies: histogram(),
        scratch: vec![0; READ_BUFFER],
        tag,
        finder: Finder::new(tag),
        started,
        now: 0,
    };
    Worker::new(shared, process, poll)?.run(&received)
}

struct Worker<'p> {
    poll: Poll,
    /// The sockets of clients whose latencies are recorded. They are read first: the latency is the
    /// server's, and not the time that this process needs for the others.
    timed: Poll,
    timer: Timer,
    shared: Shared<'p>,
    clients: Clients,
    publisher: Option<Publisher>,
    load: Load,
    /// When the load was set, and events published since.
    load_start: (Instant, u32),
    published: u32,
    /// Events in flight do not count up to this number.
    written_off: u32,
    /// What the observer had at last, and since when.
    observed: (u32, Instant),
    expected: Option<u32>,
    report: Report,
}

impl<'p> Worker<'p> {
    fn new(shared: Shared<'p>, process: u32, poll: Poll) -> Result<Worker<'p>> {
        let plan = shared.plan;
        let publisher = match process {
            0 => Publisher::connect(&plan.publish, poll.registry(), PUBLISHER)?,
            _ => None,
        };
        let now = Instant::now();
        let timed = Poll::new()?;
        poll.registry().register(&mut SourceFd(&timed.as_raw_fd()), TIMED, Interest::READABLE)?;
        let registries = (poll.registry().try_clone()?, timed.registry().try_clone()?);
        Ok(Worker {
            clients: Clients::new(plan, process, registries.0, registries.1),
            timed,
            timer: Timer::new(poll.registry())?,
            poll,
            shared,
            publisher,
            load: Load::Nothing,
            load_start: (now, 0),
            published: 0,
            written_off: 0,
            observed: (0, now),
            expected: None,
            report: Report::default(),
        })
    }

    fn run(&mut self, commands: &Receiver<Command>) -> Result<()> {
        let mut events = Events::with_capacity(CLIENTS_A_TURN);
        let mut timed_events = Events::with_capacity(TIMED_A_TURN);
        let mut next_report = Instant::now();
        loop {
            let now = Instant::now();
            let connected = self.report.pending > 0 && self.clients.pending() == 0;
            let carried_out = self.report.commands;
            loop {
                match commands.try_recv() {
                    Ok(command) => self.apply(command, now),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => return Ok(()),
                }
            }
            // The coordinator measures how long a storm takes: it must not wait for the next report.
            if now >= next_report || connected || self.report.commands > carried_out {
                self.clients.time_out(&mut self.shared);
                self.send_report()?;
                let is_catching_up = self.report.missing > 0;
                next_report = now + if is_catching_up { CATCH_UP_INTERVAL } else { REPORT_INTERVAL };
            }
            self.clients.replace(now, self.shared.plan);
            self.clients.connect(now, &mut self.shared);
            let mut wake = self.clients.next_due(self.shared.plan).unwrap_or(next_report).min(next_report);
            self.publish(now);
            if let Load::Rate(rate) = self.load
                && self.can_publish()
            {
                wake = wake.min(self.due(rate));
            }
            self.timer.set(wake)?;
            match self.poll.poll(&mut events, None) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                other => other?,
            }
            match self.timed.poll(&mut timed_events, Some(Duration::ZERO)) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => other?,
            }
            self.shared.read_clock();
            for event in timed_events.iter().chain(&events) {
                match (event.token(), &mut self.publisher) {
                    (WAKER | TIMER | TIMED, _) => {}
                    (PUBLISHER, Some(publisher)) => {
                        let problems = publisher.advance(self.poll.registry());
                        self.shared.tally.not_published(problems);
                    }
                    (Token(slot), _) => {
                        let is_closed = event.is_read_closed() || event.is_error();
                        self.clients.advance(slot, is_closed, &mut self.shared);
                    }
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
                self.shared.read_clock();
                let now = self.shared.now;
                for client in self.clients.ready() {
                    client.position.expect_after(number);
                    client.time_from(now);
                }
            }
            Command::Publish(load) => {
                self.load = load;
                self.load_start = (now, 0);
            }
            Command::Cut(share) => self.clients.cut(share, self.shared.plan),
            Command::Stall(share) if share > 0.0 => self.clients.stall(share),
            Command::Stall(_) => self.clients.end_stall(&mut self.shared),
            Command::Churn(rate) => {
                self.clients.start_connecting(now);
                self.clients.churn(rate / f64::from(self.shared.plan.processes), now);
            }
            Command::Expect(number) => self.expected = Some(number),
            Command::Leave => self.clients.remove_all(),
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
            let due = (monotonic() - late).saturating_sub(self.shared.started) / 1000;
            let mark = Mark { number: self.published, due };
            let text = mark.text(self.shared.tag, self.shared.plan.size);
            let event = Event { text, channel: mark.number % self.shared.plan.channels };
            match (&mut self.publisher, &self.shared.plan.publish) {
                (Some(publisher), _) => publisher.publish(event),
                (None, Publish::Socket { message }) => {
                    self.clients.publish(&event.fill(message), &mut self.shared);
                }
                (None, _) => {}
            }
        }
        if let Some(publisher) = &mut self.publisher {
            let problems = publisher.send(self.poll.registry());
            self.shared.tally.not_published(problems);
        }
    }

    /// Whether there is a client that publishes, and the server takes events.
    fn can_publish(&mut self) -> bool {
        let most = (UNSENT_MAX / self.shared.plan.size).max(1);
        let is_free = self.publisher.as_ref().is_none_or(|publisher| publisher.unanswered() < most);
        is_free && self.clients.observer().is_some_and(|observer| observer.unsent() < UNSENT_MAX)
    }

    /// When the next event is due, if that is now and it can be published.
    fn next_event(&mut self, now: Instant) -> Option<Instant> {
        if self.load == Load::Nothing || !self.can_publish() {
            return None;
        }
        match self.load {
            Load::Nothing => None,
            Load::Rate(rate) => Some(self.due(rate)).filter(|due| *due <= now),
            Load::InFlight(events) => {
                let last = self.clients.observer()?.position.last().unwrap_or(self.published);
                if last != self.observed.0 {
                    self.observed = (last, now);
                } else if now - self.observed.1 > WRITE_OFF {
                    self.written_off = self.published;
                    self.observed.1 = now;
                }
                let in_flight = self.published - last.max(self.written_off).min(self.published);
                (in_flight < events).then_some(now)
            }
        }
    }

    fn send_report(&mut self) -> Result<()> {
        let report = &mut self.report;
        report.ready = self.clients.ready;
        report.pending = self.clients.pending() as u32;
        report.published = self.published;
        report.missing = self.expected.map_or(0, |number| {
            self.clients.ready().map(|client| u64::from(client.position.missing(number))).sum()
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

/// Wakes the worker at a time. The timeouts of epoll are whole milliseconds, and an event that is
/// published late looks like a slow server.
struct Timer {
    file: OwnedFd,
    at: Option<Instant>,
}

impl Timer {
    fn new(registry: &Registry) -> io::Result<Timer> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let file = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        registry.register(&mut SourceFd(&file.as_raw_fd()), TIMER, Interest::READABLE)?;
        Ok(Timer { file, at: None })
    }

    fn set(&mut self, at: Instant) -> io::Result<()> {
        if self.at == Some(at) && at > Instant::now() {
            return Ok(());
        }
        self.at = Some(at);
        // Zero would disarm it.
        let after = at.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1));
        let it_value = Timespec::try_from(after).map_err(io::Error::other)?;
        let it_interval = Timespec { tv_sec: 0, tv_nsec: 0 };
        timerfd_settime(&self.file, TimerfdTimerFlags::empty(), &Itimerspec { it_interval, it_value })?;
        Ok(())
    }
}

/// CPU time of this thread and time for which it waited for a core, in nanoseconds.
fn own_cpu() -> (u64, u64) {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let mut fields = text.split_whitespace().map(|field| field.parse().unwrap_or_default());
    (fields.next().unwrap_or_default(), fields.next().unwrap_or_default())
}
