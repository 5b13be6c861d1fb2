//! The clients of one process: which are connected, on their way, or waiting to connect.

use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use mio::net::TcpStream;
use mio::{Interest, Registry, Token};
use rustix::io::Errno;
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use super::client::{Client, Closed, Joining, Stage, describe};
use super::plan::{HANDSHAKE_TIMEOUT, HANDSHAKES, Plan};
use super::position::Position;
use super::shared::{Shared, count};

/// Numbers of new clients that each process has for itself.
const NUMBERS: u64 = 1_000_000_000;

pub struct Clients {
    registry: Registry,
    /// For the sockets of clients whose latencies are recorded.
    timed: Registry,
    slots: Vec<Option<Client>>,
    joining: Vec<Joining>,
    /// Clients whose handshake is under way.
    handshakes: usize,
    pub ready: u32,
    /// How many there are, apart from the observer in the last slot.
    count: usize,
    /// The number of the next new client.
    next_number: u64,
    /// When clients started to connect, and how many have since. `None`: they may not.
    connects: Option<(Instant, u64)>,
    /// Clients that are replaced: since when, how many a second, and how many so far.
    churn: Option<(Instant, f64, u64)>,
}

impl Clients {
    /// The clients of a process, none of them connected. The first process has one more, the
    /// observer: it publishes, and shows which events are in flight.
    pub fn new(plan: &Plan, process: u32, registry: Registry, timed: Registry) -> Clients {
        let (first, count) = plan.part(process);
        let numbers = (first..first + count).chain((process == 0).then_some(plan.connections));
        let joining: Vec<Joining> =
            numbers.enumerate().map(|(slot, number)| newcomer(plan, slot, number.into())).collect();
        Clients {
            registry,
            timed,
            slots: joining.iter().map(|_| None).collect(),
            joining,
            handshakes: 0,
            ready: 0,
            count: count as usize,
            next_number: u64::from(plan.connections) + 1 + u64::from(process) * NUMBERS,
            connects: None,
            churn: None,
        }
    }

    /// The client that publishes, once it is ready.
    pub fn observer(&mut self) -> Option<&mut Client> {
        let observer = self.slots.get_mut(self.count)?.as_mut();
        observer.filter(|client| client.stage == Stage::Ready)
    }

    pub fn ready(&mut self) -> impl Iterator<Item = &mut Client> {
        self.slots.iter_mut().flatten().filter(|client| client.stage == Stage::Ready)
    }

    /// Clients that are not ready yet.
    pub fn pending(&self) -> usize {
        self.handshakes + self.joining.len()
    }

    /// Starts to count for the rate of new connections.
    pub fn start_connecting(&mut self, now: Instant) {
        self.connects = Some((now, 0));
    }

    /// Starts handshakes, as far as the rate and the limit allow.
    pub fn connect(&mut self, now: Instant, shared: &mut Shared<'_>) {
        // From the end, so the observer is first: without it there are no events.
        while self.handshakes < HANDSHAKES && self.next_connect(shared.plan).is_some_and(|at| at <= now) {
            let (Some(joining), Some(connects)) = (self.joining.pop(), &mut self.connects) else { return };
            connects.1 += 1;
            let slot = joining.slot;
            // The observer is read in its turn: it shows how far all are.
            let is_timed = slot < self.count && shared.plan.is_timed(joining.number);
            let registry = if is_timed { &self.timed } else { &self.registry };
            match open(shared.plan, slot, joining.number, registry) {
                Ok(stream) => {
                    self.handshakes += 1;
                    self.slots[slot] = Some(Client::new(stream, joining, shared));
                }
                Err(error) => count(&mut shared.tally.refused, describe(&error)),
            }
        }
    }

    fn next_connect(&self, plan: &Plan) -> Option<Instant> {
        let (start, done) = self.connects?;
        let after = plan.connect_rate.map_or(Duration::ZERO, |rate| {
            Duration::from_secs_f64(done as f64 * f64::from(plan.processes) / rate)
        });
        (!self.joining.is_empty()).then_some(start + after)
    }

    /// When a client is to connect or to be replaced.
    pub fn next_due(&self, plan: &Plan) -> Option<Instant> {
        let connect = self.next_connect(plan).filter(|_| self.handshakes < HANDSHAKES);
        let replace =
            self.churn.map(|(start, rate, done)| start + Duration::from_secs_f64(done as f64 / rate));
        connect.into_iter().chain(replace).min()
    }

    /// Handles readiness of a client's socket.
    pub fn advance(&mut self, slot: usize, is_closed: bool, shared: &mut Shared<'_>) {
        let Some(client) = self.slots.get_mut(slot).and_then(Option::as_mut) else { return };
        let before = client.stage;
        match client.advance(shared, is_closed) {
            Ok(()) if before != Stage::Ready && client.stage == Stage::Ready => {
                self.handshakes -= 1;
                self.ready += 1;
            }
            Ok(()) => {}
            Err(closed) => self.on_closed(slot, closed, shared),
        }
    }

    /// Sends a message of the observer.
    pub fn publish(&mut self, message: &str, shared: &mut Shared<'_>) {
        if let Some(Err(closed)) = self.observer().map(|observer| observer.send(message.as_bytes())) {
            self.on_closed(self.count, closed, shared);
        }
    }

    fn on_closed(&mut self, slot: usize, Closed(why): Closed, shared: &mut Shared<'_>) {
        let tally = &mut shared.tally;
        let was_ready = self.remove(slot).is_some_and(|client| client.stage == Stage::Ready);
        count(if was_ready { &mut tally.closed } else { &mut tally.refused }, why);
    }

    /// Removes a client. Its socket is closed when it is dropped.
    fn remove(&mut self, slot: usize) -> Option<Client> {
        let client = self.slots[slot].take()?;
        match client.stage {
            Stage::Ready => self.ready -= 1,
            Stage::Connecting | Stage::Upgrading | Stage::Greeting => self.handshakes -= 1,
        }
        Some(client)
    }

    /// Removes all.
    pub fn remove_all(&mut self) {
        self.joining.clear();
        for slot in 0..self.slots.len() {
            self.abort(slot);
        }
    }

    /// Closes clients whose handshake takes too long.
    pub fn time_out(&mut self, shared: &mut Shared<'_>) {
        shared.read_clock();
        let oldest = shared.now.saturating_sub(HANDSHAKE_TIMEOUT.as_micros() as u64);
        for slot in 0..self.slots.len() {
            let is_late = |client: &Client| client.stage != Stage::Ready && client.joined < oldest;
            if self.slots[slot].as_ref().is_some_and(is_late) {
                let why = Closed(format!("not ready after {} s", HANDSHAKE_TIMEOUT.as_secs()));
                self.on_closed(slot, why, shared);
            }
        }
    }

    /// Cuts the connections of this share of the clients. None connects until
    /// [`Clients::start_connecting`].
    pub fn cut(&mut self, share: f64, plan: &Plan) {
        self.connects = None;
        for slot in self.evenly_spread(share) {
            let Some(client) = self.abort(slot) else { continue };
            let mut joining = newcomer(plan, slot, client.number);
            joining.returns = true;
            if plan.resume.is_some() && client.last_id > 0 {
                (joining.position, joining.last_id) = (client.position, client.last_id);
            }
            self.joining.push(joining);
        }
    }

    /// Removes a client with a reset (RST), so that its port is free again at once.
    fn abort(&mut self, slot: usize) -> Option<Client> {
        let client = self.remove(slot)?;
        let _ = SockRef::from(&client.stream).set_linger(Some(Duration::ZERO));
        Some(client)
    }

    /// This share of the clients reads nothing from now on.
    pub fn stall(&mut self, share: f64) {
        for slot in self.evenly_spread(share) {
            if let Some(client) = &mut self.slots[slot] {
                client.stalled = true;
            }
        }
    }

    /// All read again.
    pub fn end_stall(&mut self, shared: &mut Shared<'_>) {
        for slot in 0..self.count {
            let Some(client) = &mut self.slots[slot] else { continue };
            if std::mem::take(&mut client.stalled) {
                shared.read_clock();
                client.time_from(shared.now);
                self.advance(slot, true, shared);
            }
        }
    }

    /// Replaces this many clients per second; 0 stops.
    pub fn churn(&mut self, rate: f64, now: Instant) {
        self.churn = (rate > 0.0 && self.count > 0).then_some((now, rate, 0));
    }

    /// Replaces the clients that are due.
    pub fn replace(&mut self, now: Instant, plan: &Plan) {
        let Some((start, rate, mut done)) = self.churn else { return };
        while done as f64 <= (now - start).as_secs_f64() * rate {
            let (number, slot) = (self.next_number, (self.next_number % self.count as u64) as usize);
            if self.abort(slot).is_some() {
                self.joining.push(newcomer(plan, slot, number));
            }
            self.next_number += 1;
            done += 1;
        }
        self.churn = Some((start, rate, done));
    }

    /// Slots of this share of the clients, evenly spread, without the observer.
    fn evenly_spread(&self, share: f64) -> Vec<usize> {
        let part = |slot: usize| (slot as f64 * share) as usize;
        (0..self.count).filter(|slot| part(*slot) < part(slot + 1)).collect()
    }
}

fn newcomer(plan: &Plan, slot: usize, number: u64) -> Joining {
    let position = Position::unknown(plan.channel_of(number));
    Joining { slot, number, position, last_id: 0, returns: false }
}

/// Starts to connect.
fn open(plan: &Plan, slot: usize, number: u64, registry: &Registry) -> io::Result<TcpStream> {
    let (addr, bind) = (plan.target(number).addr, &plan.bind);
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    socket.set_tcp_nodelay(true)?;
    if !bind.is_empty() {
        let source = bind[number as usize % bind.len()];
        socket.bind(&SocketAddr::new(source, 0).into())?;
    }
    match socket.connect(&addr.into()) {
        Err(error) if error.raw_os_error() != Some(Errno::INPROGRESS.raw_os_error()) => return Err(error),
        _ => {}
    }
    let mut stream = TcpStream::from_std(socket.into());
    registry.register(&mut stream, Token(slot), Interest::READABLE | Interest::WRITABLE)?;
    Ok(stream)
}
