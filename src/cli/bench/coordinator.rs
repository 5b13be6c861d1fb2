//! The process that the user started: starts the workers, gives them the phases one by one, and
//! collects their reports.

use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use hdrhistogram::Histogram;

use super::mark::TAGS;
use super::phase::Phase;
use super::plan::{Command, Load, Plan, STALL_TIMEOUT};
use super::process::{Worker, is_current, start_worker, write_line};
use super::progress::Progress;
use super::result::{self, PhaseResult, Second, Storm};
use super::server::{Server, Usage};
use super::shared::Tally;
use super::worker::{Report, histogram, monotonic};

/// Load before clients reconnect in a storm, so that there is something to resume.
const BEFORE_STORM: Duration = Duration::from_secs(1);

/// Load after clients joined: each must receive something.
const SETTLE: Duration = Duration::from_secs(1);

/// What a run showed.
pub struct Outcome {
    pub phases: Vec<PhaseResult>,
    pub seconds: Vec<Second>,
    /// Names of the phases, and the seconds at which they started.
    pub starts: Vec<(String, f64)>,
    /// Of all phases.
    pub latencies: Histogram<u64>,
    /// The server's name for itself.
    pub server: Option<String>,
}

/// What a phase showed while its load was on.
#[derive(Default)]
struct Performed {
    storm: Option<Storm>,
    /// The server with clients that stall.
    stalled: Option<Usage>,
}

/// The worker processes, and what they have reported.
pub struct Coordinator<'p> {
    plan: &'p Plan,
    server: Server,
    workers: Vec<Worker>,
    reports: Receiver<(usize, Option<Report>)>,
    started: Instant,
    /// Latencies since the last phase, since clients reconnect, and since the last second.
    of_phase: Histogram<u64>,
    of_storm: Histogram<u64>,
    of_second: Histogram<u64>,
    outcome: Outcome,
    /// When the last second was recorded, and deliveries until then.
    last_second: (Instant, u64),
    progress: Progress,
}

impl<'p> Coordinator<'p> {
    /// Starts the workers.
    ///
    /// # Errors
    /// A process that can't be started.
    pub fn start(plan: &'p Plan, server: Server) -> Result<Coordinator<'p>> {
        let (sender, reports) = channel();
        let started = monotonic();
        let tag = (started / 1_000_000) as u32 % TAGS;
        let workers: Result<_> = (0..plan.processes)
            .map(|process| start_worker(plan, process, (started, tag), sender.clone()))
            .collect();
        let now = Instant::now();
        Ok(Coordinator {
            plan,
            server,
            workers: workers?,
            reports,
            started: now,
            of_phase: histogram(),
            of_storm: histogram(),
            of_second: histogram(),
            outcome: Outcome {
                phases: Vec::new(),
                seconds: Vec::new(),
                starts: Vec::new(),
                latencies: histogram(),
                server: None,
            },
            last_second: (now, 0),
            progress: Progress::new(),
        })
    }

    /// Runs all phases.
    ///
    /// # Errors
    /// A worker that ended, or a server that no client reaches.
    pub fn run(mut self) -> Result<Outcome> {
        for phase in &self.plan.phases {
            self.run_phase(*phase)?;
        }
        self.progress.clear();
        self.outcome.server = self.total().server;
        Ok(self.outcome)
    }

    fn run_phase(&mut self, phase: Phase) -> Result<()> {
        let start = Instant::now();
        let name = phase.to_string();
        self.outcome.starts.push((name.clone(), (start - self.started).as_secs_f64()));
        self.progress.phase = name.clone();
        let tally = self.total();
        let published = self.workers[0].report.published;
        let (busy, own_cpu) = (self.busy(), self.own_cpu());
        let cpu = self.server.usage().cpu;
        self.of_phase.reset();

        let Performed { storm, stalled } = self.perform(phase)?;
        self.send(0, &Command::Publish(Load::Nothing))?;
        self.wait_until_current()?;
        let time = start.elapsed();
        let deliveries = self.total().deliveries - tally.deliveries;
        let generator = self.busy_since(&busy, time);
        let (clients, pending) = (self.ready(), self.pending());
        let publishes = !matches!(phase, Phase::Connect | Phase::Idle(_) | Phase::Leave);
        let missing = self.drain()?;
        let usage = self.server.usage();
        let published = self.workers[0].report.published - published;
        self.outcome.phases.push(PhaseResult {
            name,
            time,
            storm,
            clients,
            published,
            tally: result::since(&self.total(), &tally),
            deliveries,
            missing,
            pending,
            publishes,
            latencies: self.of_phase.clone(),
            server_cpu: Duration::from_nanos(usage.cpu.saturating_sub(cpu)),
            usage: stalled.unwrap_or(usage),
            generator_cpu: Duration::from_nanos(self.own_cpu().saturating_sub(own_cpu)),
            generator,
        });
        if phase == Phase::Connect && self.ready() == 0 {
            self.progress.clear();
            let refused = self.total().refused;
            let reason = refused.keys().next().map_or("no answer", String::as_str);
            bail!("no client could connect to {}: {reason}", self.plan.targets[0].host);
        }
        Ok(())
    }

    /// Puts the load of a phase on the server.
    fn perform(&mut self, phase: Phase) -> Result<Performed> {
        let mut performed = Performed::default();
        match phase {
            Phase::Connect => {
                self.send_all(&Command::Connect)?;
                self.wait_until_ready()?;
            }
            Phase::Idle(time) => self.watch(time)?,
            Phase::Rate(rate, time) => {
                self.publish(Load::Rate(rate))?;
                self.watch(time)?;
            }
            Phase::Saturate(events, time) => {
                self.publish(Load::InFlight(events))?;
                self.watch(time)?;
            }
            Phase::Storm(share, away) => {
                self.publish(Load::Rate(self.plan.rate))?;
                self.watch(BEFORE_STORM)?;
                self.send_all(&Command::Cut(share))?;
                self.watch(away)?;
                performed.storm = Some(self.reconnect()?);
                self.watch(self.settle_time())?;
            }
            Phase::Stall(share, time) => {
                self.publish(Load::Rate(self.plan.rate))?;
                self.send_all(&Command::Stall(share))?;
                self.watch(time)?;
                performed.stalled = Some(self.server.usage());
                self.send_all(&Command::Stall(0.0))?;
            }
            Phase::Churn(rate, time) => {
                self.publish(Load::Rate(self.plan.rate))?;
                self.send_all(&Command::Churn(rate))?;
                self.watch(time)?;
                self.send_all(&Command::Churn(0.0))?;
                self.wait_until_ready()?;
                self.watch(self.settle_time())?;
            }
            Phase::Leave => {
                self.send_all(&Command::Leave)?;
                self.wait(
                    |workers| workers.iter().all(|worker| worker.report.ready == 0),
                    Coordinator::ready,
                )?;
            }
        }
        Ok(performed)
    }

    /// Lets all clients connect that are cut, and waits until they have what they missed.
    fn reconnect(&mut self) -> Result<Storm> {
        self.wait_until_current()?;
        self.of_storm.reset();
        let (start, busy, cpu) = (Instant::now(), self.busy(), self.server.usage().cpu);
        let published = self.workers[0].report.published;
        self.send_all(&Command::Connect)?;
        self.wait_until_ready()?;
        // Clients that don't resume need nothing.
        if self.plan.resume.is_some() {
            self.wait_until_received(published)?;
        }
        let time = start.elapsed();
        Ok(Storm {
            time,
            is_over: self.pending() == 0 && self.missing() == 0,
            latencies: self.of_storm.clone(),
            server_cpu: Duration::from_nanos(self.server.usage().cpu.saturating_sub(cpu)),
            generator: self.busy_since(&busy, time),
        })
    }

    fn publish(&mut self, load: Load) -> Result<()> {
        self.send(0, &Command::Publish(load))
    }

    /// Long enough that an event is published in every channel.
    fn settle_time(&self) -> Duration {
        SETTLE.max(Duration::from_secs_f64(2.0 * f64::from(self.plan.channels) / self.plan.rate))
    }

    /// Waits until every client has every event. Returns how many deliveries are missing when none
    /// of them has arrived for [`STALL_TIMEOUT`]. What comes after that is late, and counts no more.
    fn drain(&mut self) -> Result<u64> {
        let published = self.workers[0].report.published;
        self.wait_until_received(published)?;
        let missing = self.missing();
        self.send_all(&Command::ExpectAfter(published))?;
        self.wait_until_current()?;
        Ok(missing)
    }

    /// Waits until every client has all events up to this number.
    fn wait_until_received(&mut self, number: u32) -> Result<()> {
        self.send_all(&Command::Expect(number))?;
        self.wait_until_current()?;
        self.wait(|workers| workers.iter().all(|worker| worker.report.missing == 0), Coordinator::missing)
    }

    fn wait_until_ready(&mut self) -> Result<()> {
        let progress =
            |all: &Coordinator<'_>| (all.ready(), all.pending(), all.total().refused.values().sum::<u64>());
        self.wait(
            |workers| workers.iter().all(|worker| is_current(worker) && worker.report.pending == 0),
            progress,
        )
    }

    /// Waits until all commands are carried out.
    fn wait_until_current(&mut self) -> Result<()> {
        self.wait(
            |workers| workers.iter().all(is_current),
            |all| all.workers.iter().map(|worker| worker.report.commands).sum::<u32>(),
        )
    }

    /// Waits until the condition holds, or for [`STALL_TIMEOUT`] without progress.
    fn wait<P: PartialEq>(
        &mut self,
        until: impl Fn(&[Worker]) -> bool,
        progress: impl Fn(&Coordinator<'p>) -> P,
    ) -> Result<()> {
        let (mut changed, mut before) = (Instant::now(), progress(self));
        while !until(&self.workers) {
            self.receive(Instant::now() + Duration::from_millis(50))?;
            let now = progress(self);
            if now != before {
                (before, changed) = (now, Instant::now());
            } else if changed.elapsed() > STALL_TIMEOUT {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Collects reports for this time.
    fn watch(&mut self, time: Duration) -> Result<()> {
        let end = Instant::now() + time;
        while Instant::now() < end {
            self.receive(end)?;
        }
        Ok(())
    }

    /// Waits for the next report, at most until `end`.
    fn receive(&mut self, end: Instant) -> Result<()> {
        match self.reports.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok((_, None)) | Err(RecvTimeoutError::Disconnected) => bail!("a worker process ended"),
            Err(RecvTimeoutError::Timeout) => {}
            Ok((process, Some(report))) => {
                for (latency, count) in &report.latencies {
                    let Coordinator { of_phase, of_storm, of_second, outcome, .. } = self;
                    for histogram in [of_phase, of_storm, of_second, &mut outcome.latencies] {
                        histogram.saturating_record_n(*latency, *count);
                    }
                }
                self.workers[process].report = report;
            }
        }
        let (last, deliveries) = self.last_second;
        let passed = last.elapsed().as_secs_f64();
        if passed >= 1.0 {
            let now = self.total().deliveries;
            let second = Second {
                at: self.started.elapsed().as_secs_f64(),
                clients: self.ready(),
                deliveries: ((now - deliveries) as f64 / passed) as u64,
                p50: self.of_second.value_at_quantile(0.5),
                p99: self.of_second.value_at_quantile(0.99),
            };
            self.of_second.reset();
            self.last_second = (Instant::now(), now);
            self.outcome.seconds.push(second);
            self.progress.show(second);
        }
        Ok(())
    }

    fn total(&self) -> Tally {
        result::total(self.workers.iter().map(|worker| &worker.report.tally))
    }

    fn pending(&self) -> u32 {
        self.workers.iter().map(|worker| worker.report.pending).sum()
    }

    fn missing(&self) -> u64 {
        self.workers.iter().map(|worker| worker.report.missing).sum()
    }

    fn ready(&self) -> u32 {
        self.workers.iter().map(|worker| worker.report.ready).sum()
    }

    /// CPU time of all workers, in nanoseconds.
    fn own_cpu(&self) -> u64 {
        self.workers.iter().map(|worker| worker.report.cpu).sum()
    }

    /// Nanoseconds for which each worker ran or waited for a core.
    fn busy(&self) -> Vec<u64> {
        self.workers.iter().map(|worker| worker.report.cpu + worker.report.waited).collect()
    }

    /// Share of the time that the busiest worker ran or waited for a core.
    fn busy_since(&self, before: &[u64], time: Duration) -> f64 {
        let now = self.busy();
        let busiest = now.iter().zip(before).map(|(now, before)| now.saturating_sub(*before)).max();
        busiest.unwrap_or_default() as f64 / time.as_nanos() as f64
    }

    fn send(&mut self, process: usize, command: &Command) -> Result<()> {
        let worker = &mut self.workers[process];
        worker.sent += 1;
        write_line(&mut worker.input, command)
    }

    fn send_all(&mut self, command: &Command) -> Result<()> {
        (0..self.workers.len()).try_for_each(|process| self.send(process, command))
    }
}
