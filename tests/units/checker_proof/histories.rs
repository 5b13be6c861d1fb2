//! A model of a correct bus, which generates histories without violations. They contain everything
//! that real ones do: joins, resumes, resets, lost answers, private events, clients without
//! recovery.

use crate::checker::{Attempt, History, Moment, Outcome, Seen, Subscriber};
use crate::common::Rng;

const USERS: usize = 3;
const LINES: usize = 3;

struct Client {
    subscriber: Subscriber,
    connected: bool,
    /// The last id processed for it, including private events of others.
    served: u64,
    /// The last position that it got or saw.
    position: Option<u64>,
}

struct Model {
    channel: String,
    rng: Rng,
    moment: Moment,
    base: u64,
    head: u64,
    /// The events of the current epoch, by id from `base + 1` on: body and recipient.
    events: Vec<(String, Option<String>)>,
    clients: Vec<Client>,
    attempts: Vec<Attempt>,
}

/// Generates a correct history with this many steps.
pub fn history(seed: u64, steps: usize) -> History {
    history_of("a", seed, steps)
}

/// The same for a channel with this name.
pub fn history_of(channel: &str, seed: u64, steps: usize) -> History {
    let clients = (0..2 * USERS + 2).map(|n| Client {
        subscriber: Subscriber {
            name: format!("subscriber {n}"),
            user: format!("user{}", n % USERS),
            home: None,
            recovers: n < 2 * USERS,
            stayed: false,
            seen: Vec::new(),
        },
        connected: false,
        served: 0,
        position: None,
    });
    let clients = clients.collect();
    let (base, head) = (1000, 1000);
    let mut model = Model {
        channel: channel.into(),
        rng: Rng(seed),
        moment: 0,
        base,
        head,
        events: Vec::new(),
        clients,
        attempts: Vec::new(),
    };
    for _ in 0..steps {
        model.step();
    }
    for at in 0..model.clients.len() {
        if !model.clients[at].connected {
            model.join(at);
        }
    }
    model.publish(false, Outcome::Acked(0));
    for at in 0..model.clients.len() {
        model.serve(at, usize::MAX);
        model.clients[at].subscriber.stayed = true;
    }
    let subscribers = model.clients.into_iter().map(|client| client.subscriber).collect();
    History { channel: model.channel, attempts: model.attempts, subscribers, ids_may_fall: false }
}

impl Model {
    fn now(&mut self) -> Moment {
        self.moment += 1;
        self.moment
    }

    fn step(&mut self) {
        let at = self.rng.index(self.clients.len());
        match self.rng.index(40) {
            0 => self.anchor(),
            1..=3 if self.clients[at].connected => self.leave(at, None),
            1..=9 if !self.clients[at].connected => self.join(at),
            10..=20 => {
                let outcome = match self.rng.index(12) {
                    0 => Outcome::Rejected,
                    1 | 2 => Outcome::Unknown,
                    _ => Outcome::Acked(0),
                };
                let private = self.rng.once_in(3);
                self.publish(private, outcome);
            }
            _ if self.clients[at].connected => {
                let most = 1 + self.rng.index(6);
                self.serve(at, most);
                if self.rng.once_in(20) && self.clients[at].subscriber.recovers {
                    let moment = self.now();
                    let client = &mut self.clients[at];
                    client.position = Some(client.served);
                    client.subscriber.seen.push((moment, Seen::Stands(client.served)));
                }
            }
            _ => {}
        }
    }

    fn publish(&mut self, private: bool, outcome: Outcome) {
        let started = self.now();
        let to = private.then(|| format!("user{}", self.rng.index(USERS)));
        let body = format!("event {} of {}", self.attempts.len(), self.channel);
        let taken = match outcome {
            Outcome::Acked(_) => true,
            Outcome::Rejected => false,
            Outcome::Unknown => self.rng.once_in(2),
        };
        if taken {
            self.head += 1;
            self.events.push((body.clone(), to.clone()));
            // Some clients see it before its publisher gets the answer.
            for at in 0..self.clients.len() {
                if self.rng.once_in(4) && self.clients[at].connected {
                    self.serve(at, 3);
                }
            }
        }
        let outcome = if let Outcome::Acked(_) = outcome { Outcome::Acked(self.head) } else { outcome };
        let line = format!("line {}", self.rng.index(LINES));
        let finished = self.now();
        self.attempts.push(Attempt { line, body, to, started, finished, outcome });
    }

    fn anchor(&mut self) {
        self.base = self.head + 1 + self.rng.below(1000);
        self.head = self.base;
        self.events.clear();
        for at in 0..self.clients.len() {
            if !self.clients[at].connected {
                continue;
            }
            if !self.clients[at].subscriber.recovers {
                self.leave(at, Some(4008));
                continue;
            }
            let moment = self.now();
            let client = &mut self.clients[at];
            client.subscriber.seen.push((moment, Seen::Reset(self.base)));
            (client.served, client.position) = (self.base, Some(self.base));
        }
    }

    fn leave(&mut self, at: usize, code: Option<u16>) {
        let moment = self.now();
        let client = &mut self.clients[at];
        client.subscriber.seen.push((moment, Seen::Ended(code)));
        client.connected = false;
    }

    fn join(&mut self, at: usize) {
        let moment = self.now();
        let client = &mut self.clients[at];
        client.connected = true;
        client.served = self.head;
        if !client.subscriber.recovers {
            client.subscriber.seen.push((moment, Seen::LetIn));
            return;
        }
        let asked = client.position;
        let recovered = asked.is_none_or(|asked| asked >= self.base);
        let position = if recovered { asked.unwrap_or(self.head) } else { self.head };
        client
            .subscriber
            .seen
            .push((moment, Seen::Welcomed { asked, at: position, head: self.head, recovered }));
        (client.served, client.position) = (position, Some(position));
    }

    fn serve(&mut self, at: usize, most: usize) {
        for _ in 0..most {
            let client = &self.clients[at];
            let Some((body, to)) = self.events.get((client.served - self.base) as usize).cloned() else {
                return;
            };
            let moment = self.now();
            let client = &mut self.clients[at];
            client.served += 1;
            if to.as_ref().is_none_or(|to| *to == client.subscriber.user) {
                client.position = Some(client.served);
                client.subscriber.seen.push((moment, Seen::Event(client.served, body, to)));
            }
        }
    }
}
