//! Checks every frame that clients get, in any order of events, pages, evictions, pings and short
//! writes.

use std::time::Duration;

use proptest::prelude::*;
use serde_json::Value;

use super::super::connections::token;
use super::testbed::{CLIENTS, Client, Mode, Testbed, masked};
use crate::limits::connections::tests::counts;
use crate::protocol::event::{Entry, EventId};

/// What happens next.
#[derive(Clone, Debug)]
enum Step {
    /// Events of this size are published for all subscribers.
    Publish {
        count: u64,
        size: usize,
    },
    /// Events of this size are published for one user.
    PublishTo {
        user: usize,
        count: u64,
        size: usize,
    },
    /// An event without id arrives.
    PublishExternal,
    /// A new epoch starts, further on.
    NewEpoch,
    /// A client sends this many pings.
    Ping {
        client: usize,
        count: usize,
    },
    /// A client publishes this many messages.
    Send {
        client: usize,
        count: usize,
    },
    /// A client reads this many bytes.
    Read {
        client: usize,
        bytes: usize,
    },
    /// A client reconnects.
    Reconnect {
        client: usize,
    },
    /// A newcomer replaces a client. It asks for this many events from before.
    Join {
        client: usize,
        history: u64,
    },
    /// The bus answers its requests.
    Answer,
    /// A turn of the shard's loop.
    Turn,
    /// The first half of a turn: some of the sockets are ready.
    Ready {
        from: usize,
        count: usize,
    },
    /// Fan-outs continue for this many writes.
    Fanout {
        writes: u64,
    },
    Tick,
}

fn step() -> impl Strategy<Value = Step> {
    let client = 0..CLIENTS.len();
    let size = prop_oneof![4 => 0..200_usize, 2 => 200..3000_usize];
    prop_oneof![
        6 => (1..5_u64, size.clone()).prop_map(|(count, size)| Step::Publish { count, size }),
        2 => (0..3_usize, 1..3_u64, size).prop_map(|(user, count, size)| Step::PublishTo { user, count, size }),
        1 => Just(Step::PublishExternal),
        1 => Just(Step::NewEpoch),
        3 => (client.clone(), 1..120_usize).prop_map(|(client, count)| Step::Ping { client, count }),
        1 => (client.clone(), 1..40_usize).prop_map(|(client, count)| Step::Send { client, count }),
        5 => (client.clone(), 1..8000_usize).prop_map(|(client, bytes)| Step::Read { client, bytes }),
        2 => client.clone().prop_map(|client| Step::Reconnect { client }),
        2 => (client, 1..101_u64).prop_map(|(client, history)| Step::Join { client, history }),
        4 => Just(Step::Answer),
        6 => Just(Step::Turn),
        6 => (0..8_usize, 1..8_usize).prop_map(|(from, count)| Step::Ready { from, count }),
        6 => (1..3_u64).prop_map(|writes| Step::Fanout { writes }),
        2 => Just(Step::Tick),
    ]
}

impl Testbed {
    fn run(&mut self, step: &Step) -> Result<(), TestCaseError> {
        match step {
            Step::Publish { count, size } => {
                let first = self.source.head + 1;
                (0..*count).for_each(|_| self.source.publish(None, *size));
                self.deliver_from(first);
            }
            Step::PublishTo { user, count, size } => {
                let first = self.source.head + 1;
                let user = ["alice", "bob", "nobody"][*user];
                (0..*count).for_each(|_| self.source.publish(Some(user.to_owned()), *size));
                self.deliver_from(first);
            }
            Step::PublishExternal if self.is_followed => {
                self.deliver(Entry::without_id(EventId(self.source.head), br#"{"raw":1}"#))
            }
            Step::PublishExternal => {}
            Step::NewEpoch => {
                let mark = self.source.start_epoch();
                if self.is_followed {
                    self.deliver(mark);
                }
            }
            Step::Ping { client, count } => {
                let ping = match CLIENTS[*client].1 {
                    Mode::Json => masked(1, br#"{"type":"ping"}"#),
                    Mode::Recovering | Mode::Plain => masked(9, b""),
                };
                self.clients[*client].peer.send(&ping.repeat(*count));
            }
            Step::Send { client, count } => {
                let text = match CLIENTS[*client].1 {
                    Mode::Json => r#"{"text":"a","ref":1}"#,
                    Mode::Recovering | Mode::Plain => "a",
                };
                self.clients[*client].peer.send(&masked(1, text.as_bytes()).repeat(*count));
            }
            Step::Read { client, bytes } => self.read(*client, *bytes)?,
            Step::Reconnect { client } => {
                let position = self.clients[*client].position.filter(|_| CLIENTS[*client].1 != Mode::Plain);
                self.clients[*client] = self.connect(*client, position, None);
            }
            Step::Join { client, history } => {
                self.clients[*client] = self.connect(*client, None, Some(*history));
            }
            Step::Answer => self.answer(),
            Step::Turn => self.turn(),
            Step::Ready { from, count } => self.ready(*from, *count),
            Step::Fanout { writes } => self.shard.visit_members(*writes),
            Step::Tick => self.shard.on_tick(),
        }
        let key = self.shard.channels.key(&self.channel.clone().into());
        let members = key.map_or(0, |key| {
            self.shard.channels[key].assert_consistent(&self.shard.connections);
            self.shard.channels[key].members.len()
        });
        let slots = self.shard.connections.slots();
        let open = slots.filter(|slot| self.shard.connections[*slot].is_open()).count();
        prop_assert_eq!(open, members, "every open connection is a member");
        for slot in self.shard.connections.slots() {
            let connection = &self.shard.connections[slot];
            let (own, frame) = connection.unsent();
            prop_assert_eq!(
                connection.queued() > 0,
                own > 0 || frame.is_some(),
                "everything queued is counted"
            );
        }
        Ok(())
    }

    fn read(&mut self, number: usize, bytes: usize) -> Result<(), TestCaseError> {
        self.clients[number].peer.read(bytes);
        while let Some((opcode, text)) = self.clients[number].peer.next_frame() {
            match opcode {
                1 => self.check_frame(number, &serde_json::from_slice(&text).expect("JSON"))?,
                8 => {
                    let code = u16::from_be_bytes([text[0], text[1]]);
                    prop_assert!(matches!(code, 4008 | 1013) && CLIENTS[number].1 == Mode::Plain, "{}", code);
                    self.clients[number].position = None;
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Checks one frame against what the client received before.
    fn check_frame(&mut self, number: usize, frame: &Value) -> Result<(), TestCaseError> {
        let user = CLIENTS[number].0;
        let at = self.clients[number].position;
        // The first event that it has not received.
        let due = at.and_then(|at| self.source.due(user, at));
        let position = frame["lastEventId"].as_u64();
        let now = match frame["type"].as_str() {
            Some("welcome") if frame["recovered"] == true && at.is_some() => {
                prop_assert_eq!(position, at, "client {} resumes where it was", number);
                position
            }
            Some("welcome") if at.is_none() => {
                prop_assert_eq!(&frame["recovered"], true, "a newcomer misses nothing: {}", frame);
                let head = frame["head"].as_u64().expect("a position");
                let count = self.clients[number].history.unwrap_or(0);
                // History may have been trimmed since the client joined, but never grows back.
                let latest = head.saturating_sub(count).max(self.source.oldest() - 1).max(self.source.base);
                prop_assert!(
                    position.is_some_and(|position| position <= latest.min(head)),
                    "client {} asked for {} events: {}",
                    number,
                    count,
                    frame
                );
                position
            }
            Some("welcome") => position,
            Some("reset") => {
                prop_assert!(position >= at, "client {}: a reset goes back from {:?}: {}", number, at, frame);
                position
            }
            Some("ping") => {
                let Some(position) = position else { return Ok(()) };
                prop_assert!(Some(position) >= at, "client {} had {:?}, then {}", number, at, frame);
                prop_assert!(
                    due.is_none_or(|due| due > position),
                    "client {} lacks {:?}: {}",
                    number,
                    due,
                    frame
                );
                Some(position)
            }
            Some(_) => return Ok(()),
            None => match frame["id"].as_u64() {
                None => return Ok(()),
                id if at.is_none() => id,
                id => {
                    prop_assert_eq!(id, due, "client {} had {:?}", number, at);
                    id
                }
            },
        };
        self.clients[number].position = now;
        Ok(())
    }

    /// Runs until every client has read to the head.
    fn settle(&mut self) -> Result<(), TestCaseError> {
        for _ in 0..2000 {
            self.answer();
            self.turn();
            self.shard.on_tick();
            for number in 0..CLIENTS.len() {
                self.read(number, 4000)?;
            }
            let behind = |(number, client): (usize, &Client)| {
                let at = client.position.unwrap_or(self.source.head);
                self.source.due(CLIENTS[number].0, at).is_some()
            };
            let busy = !self.requests.is_empty() || self.shard.has_deferred();
            if !busy && !self.clients.iter().enumerate().any(behind) {
                return Ok(());
            }
        }
        let at: Vec<_> = self.clients.iter().map(|client| client.position).collect();
        prop_assert!(false, "at {:?} of {}", at, self.source.head);
        Ok(())
    }

    /// Ends all connections, which frees their slots and everything counted for them, once.
    /// `drains`: the node stops, else the clients leave.
    fn end(mut self, drains: bool) -> Result<(), TestCaseError> {
        if drains {
            self.shard.on_drain(Duration::ZERO);
        }
        let clients = std::mem::take(&mut self.clients);
        let slots: Vec<u32> = self.shard.connections.slots().collect();
        drop(clients);
        for slot in slots {
            self.shard.on_ready(token(self.shard.connections.id(slot)), true, true, true);
        }
        for _ in 0..20 {
            self.answer();
            self.turn();
            self.shard.on_tick();
        }
        prop_assert_eq!(self.shard.connections.len(), 0);
        prop_assert_eq!(counts(&self.limits), [0; 4], "connections, rejections, addresses, users");
        prop_assert_eq!(self.shard.metrics().closed.get(), self.accepted);
        prop_assert!(!self.shard.has_deferred() && self.requests.is_empty());
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// A client gets its events in order and without a gap, unless a reset or a welcome precedes
    /// the gap. A ping carries a position up to which the client has all of its events, and no
    /// later ping carries an earlier one.
    #[test]
    fn positions_hold_at_their_place_on_the_wire(
        steps in prop::collection::vec(step(), 1..400),
        drains: bool,
    ) {
        let mut testbed = Testbed::new();
        for step in &steps {
            testbed.run(step)?;
        }
        testbed.settle()?;
        testbed.end(drains)?;
    }
}
