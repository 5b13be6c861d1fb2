//! A channel as one client follows it, and the frames about it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::checker::{Seen, Subscriber};
use crate::common::client::position;
use crate::workload::shared::{Channel, Shared, canonical};

/// How long a `subscribe` may stay without an answer while its connection lives: longer than any
/// fault here. The server's own limit is ten seconds.
const SILENCE: Duration = Duration::from_secs(30);

/// A channel of one client, over all its connections.
pub struct Followed {
    shared: Arc<Shared>,
    /// The number of the channel.
    number: usize,
    pub subscriber: Subscriber,
    pub position: Option<u64>,
    pub state: State,
    /// The `ref` of an unsubscribe without an answer.
    pub leaving: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum State {
    Idle,
    /// It was asked for, after this position. The default channel has no `ref`.
    Asked {
        after: Option<u64>,
        reference: Option<u64>,
        since: Instant,
    },
    Live,
}

impl Followed {
    pub fn new(shared: &Arc<Shared>, number: usize, subscriber: Subscriber) -> Followed {
        shared.channels[number].stands(&subscriber.name, Some(0));
        let shared = shared.clone();
        Followed { shared, number, subscriber, position: None, state: State::Idle, leaving: None }
    }

    fn channel(&self) -> &Channel {
        &self.shared.channels[self.number]
    }

    pub fn is_idle(&self) -> bool {
        self.state == State::Idle
    }

    /// The client asks for it, from its position on.
    pub fn ask(&mut self, reference: Option<u64>) {
        assert!(self.is_idle(), "{}: {:?}", self.subscriber.name, self.state);
        self.state = State::Asked { after: self.position, reference, since: Instant::now() };
        self.channel().stands(&self.subscriber.name, Some(self.position.unwrap_or(0)));
    }

    /// Fails if the client has asked for it and has waited too long.
    pub fn check_patience(&self) {
        if let State::Asked { since, .. } = self.state {
            assert!(since.elapsed() < SILENCE, "{}: no answer to a subscribe", self.subscriber.name);
        }
    }

    fn note(&mut self, seen: Seen) {
        match seen {
            Seen::Event(at, ..) | Seen::Reset(at) | Seen::Stands(at) | Seen::Welcomed { at, .. } => {
                self.position = Some(at);
                self.channel().stands(&self.subscriber.name, Some(at));
            }
            // Without recovery it knows nothing of earlier events.
            Seen::LetIn => self.channel().stands(&self.subscriber.name, Some(0)),
            Seen::Ended(_) => {}
        }
        self.subscriber.seen.push((self.shared.now(), seen));
    }

    /// The client has joined without recovery, which has no welcome.
    pub fn let_in(&mut self) {
        self.state = State::Live;
        self.note(Seen::LetIn);
    }

    pub fn welcomed(&mut self, frame: &Value) {
        let asked = match self.state {
            State::Asked { after, reference, .. } => {
                assert_eq!(frame.get("ref").and_then(Value::as_u64), reference, "{frame}");
                after
            }
            // A violation, which the checker reports.
            State::Idle | State::Live => self.position,
        };
        self.state = State::Live;
        self.note(Seen::Welcomed {
            asked,
            at: position(&frame["lastEventId"]),
            head: position(&frame["head"]),
            recovered: frame["recovered"].as_bool().unwrap_or_else(|| panic!("{frame}")),
        });
    }

    /// An event; `frame` is `text` without its channel.
    pub fn event(&mut self, mut frame: Value, text: &str) {
        let id = position(&frame["id"]);
        assert!(text.ends_with(&format!(r#""id":{id}}}"#)) && !text.contains('\n'), "{text:?}");
        frame.as_object_mut().expect("it has an id").remove("id");
        let to = frame.get("to").map(|to| to.as_str().unwrap_or_else(|| panic!("{text}")).to_owned());
        self.note(Seen::Event(id, canonical(&frame), to));
    }

    pub fn reset(&mut self, frame: &Value) {
        self.note(Seen::Reset(position(&frame["lastEventId"])));
    }

    pub fn stands(&mut self, at: &Value) {
        self.note(Seen::Stands(position(at)));
    }

    /// The server has unsubscribed it.
    pub fn unsubscribed(&mut self) {
        self.ended(None);
        self.channel().stands(&self.subscriber.name, None);
    }

    /// The server has rejected a `subscribe` with this `ref`. `is_lasting`: it will do so again
    /// until something changes.
    pub fn rejected(&mut self, reference: Option<u64>, is_lasting: bool) {
        let is_answer = matches!(self.state, State::Asked { reference: asked, .. } if asked == reference);
        assert!(is_answer, "{}: {:?} was rejected, {reference:?}", self.subscriber.name, self.state);
        self.state = State::Idle;
        if is_lasting {
            self.channel().stands(&self.subscriber.name, None);
        }
    }

    /// The connection or the subscription has ended.
    pub fn ended(&mut self, code: Option<u16>) {
        if self.state == State::Live {
            self.note(Seen::Ended(code));
        }
        self.state = State::Idle;
        self.leaving = None;
    }

    /// The records of the client in this channel.
    pub fn finish(mut self) -> Subscriber {
        self.subscriber.stayed = self.state == State::Live && self.leaving.is_none();
        self.subscriber
    }
}
