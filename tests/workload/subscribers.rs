//! Clients that subscribe to a channel over many connections, and record what they see.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use crate::checker::{Seen, Subscriber};
use crate::common::client::position;
use crate::common::{Client, Frame, Options, Rng};
use crate::workload::run::{Kind, Shared, canonical};

/// Time between two attempts to connect.
const RETRY: Duration = Duration::from_millis(50);

/// The longest pause in a slow client's reading.
const STALL: Duration = Duration::from_millis(400);

/// The longest time that a slow, roaming client stays disconnected.
const AWAY: Duration = Duration::from_secs(2);

/// How a subscriber behaves.
pub struct Plan {
    pub name: String,
    pub user: String,
    pub kind: Kind,
    /// The node it stays on while it can. `None`: it disconnects and resumes on any node.
    pub home: Option<usize>,
    /// Where it connects, if not to a node.
    pub addr: Option<SocketAddr>,
    /// It pauses once in this many frames, for 200 ms on average, and sometimes disconnects for a
    /// second. The stream must bring fewer events in that time, or the client never catches up.
    pub stalls: Option<u64>,
    /// Small socket buffers, so that frames are sent in parts. Reads about 50 KB/s at most.
    pub narrow: bool,
}

struct Notes {
    shared: Arc<Shared>,
    subscriber: Subscriber,
    position: Option<u64>,
}

impl Notes {
    fn note(&mut self, seen: Seen) {
        match seen {
            Seen::Event(at, ..) | Seen::Reset(at) | Seen::Stands(at) | Seen::Welcomed { at, .. } => {
                self.position = Some(at);
                self.shared.stands(&self.subscriber.name, at);
            }
            // Without recovery it knows nothing of earlier events.
            Seen::LetIn => self.shared.stands(&self.subscriber.name, 0),
            Seen::Ended(_) => {}
        }
        self.subscriber.seen.push((self.shared.now(), seen));
    }
}

/// Subscribes until the run is over.
pub async fn watch(shared: Arc<Shared>, plan: Plan, seed: u64) -> Subscriber {
    let mut rng = Rng(seed);
    let mut over = shared.over.subscribe();
    let recovers = plan.kind != Kind::Plain;
    let subscriber = Subscriber {
        name: plan.name.clone(),
        user: plan.user.clone(),
        home: plan.home,
        recovers,
        stayed: false,
        seen: Vec::new(),
    };
    let mut notes = Notes { shared: shared.clone(), subscriber, position: None };
    let (channel, mut failures) = (shared.channel.clone(), 0);
    while !*over.borrow_and_update() {
        // If its node is gone it connects to any node, as through a load balancer.
        let addr = match (plan.addr, plan.home) {
            (Some(addr), _) => addr,
            (None, Some(home)) if failures < 3 => shared.nodes.get(home).public,
            _ => shared.nodes.any(&mut rng).public,
        };
        let query = match (plan.kind, notes.position) {
            (Kind::Plain, _) | (Kind::Json, None) => format!("channel={channel}"),
            (_, None) => format!("channel={channel}&lastEventId="),
            (_, Some(at)) => format!("channel={channel}&lastEventId={at}"),
        };
        let options = Options { query, subprotocol: plan.kind.subprotocol(), small_buffer: plan.narrow };
        let Ok(mut client) = Client::try_open(addr, &plan.user, &options).await else {
            failures += 1;
            tokio::time::sleep(RETRY).await;
            continue;
        };
        failures = 0;
        if !recovers {
            notes.note(Seen::LetIn);
        }
        // A roaming client disconnects after some frames.
        let frames = if plan.home.is_some() { u64::MAX } else { 1 + rng.below(60) };
        let mut welcomed = !recovers;
        for _ in 0..frames {
            if plan.stalls.is_some_and(|frames| rng.below(frames) == 0) {
                let time = STALL.mul_f64(rng.below(100) as f64 / 100.0);
                tokio::time::sleep(time).await; // the pause is what is tested
            }
            let frame = tokio::select! {
                frame = client.next_frame() => frame,
                _ = over.wait_for(|over| *over) => {
                    notes.subscriber.stayed = welcomed;
                    return notes.subscriber;
                }
            };
            match frame {
                // A ping carries no position for a client without recovery.
                Frame::Text(text) if !recovers && text == r#"{"type":"ping"}"# => {}
                Frame::Text(text) => {
                    let asked = notes.position;
                    let seen = read(&text, asked);
                    welcomed |= matches!(seen, Seen::Welcomed { .. });
                    let is_event = matches!(seen, Seen::Event(..));
                    notes.note(seen);
                    // A client in JSON mode sometimes asks for its position.
                    if plan.kind == Kind::Json && is_event && rng.below(20) == 0 {
                        client.try_send(r#"{"type":"ping"}"#).await;
                    }
                }
                Frame::Ping(_) | Frame::Pong(_) => {}
                Frame::Close(code, reason) => {
                    // Only clients without recovery are closed when they miss events.
                    let due = code == 1012 || (code == 4008 && !recovers);
                    assert!(due, "{} was closed with {code}: {reason}", plan.name);
                    if welcomed {
                        notes.note(Seen::Ended(Some(code)));
                    }
                    welcomed = false;
                    break;
                }
                Frame::Lost(_) => {
                    if welcomed {
                        notes.note(Seen::Ended(None));
                    }
                    welcomed = false;
                    break;
                }
            }
        }
        if welcomed {
            notes.note(Seen::Ended(None));
        }
        drop(client);
        if plan.home.is_none() && plan.stalls.is_some_and(|frames| rng.below(frames / 20) == 0) {
            let time = AWAY.mul_f64(rng.below(100) as f64 / 100.0);
            tokio::time::sleep(time).await; // as above
        }
    }
    notes.subscriber
}

/// Parses a text frame.
fn read(text: &str, asked: Option<u64>) -> Seen {
    let mut frame: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text:?}"));
    if let Some(id) = frame.get("id") {
        assert!(text.ends_with(&format!(r#""id":{id}}}"#)) && !text.contains('\n'), "{text:?}");
        let id = position(id);
        frame.as_object_mut().expect("it has an id").remove("id");
        let to = frame.get("to").map(|to| to.as_str().unwrap_or_else(|| panic!("{text}")).to_owned());
        return Seen::Event(id, canonical(&frame), to);
    }
    let at = position(&frame["lastEventId"]);
    match frame["type"].as_str() {
        Some("welcome") => Seen::Welcomed {
            asked,
            at,
            head: position(&frame["head"]),
            recovered: frame["recovered"].as_bool().unwrap_or_else(|| panic!("{text}")),
        },
        Some("reset") => Seen::Reset(at),
        Some("ping") => Seen::Stands(at),
        _ => panic!("unexpected frame for a subscriber: {text}"),
    }
}
