//! Clients that watch a channel over many connections, and note what they see.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use crate::checker::{Seen, Subscriber};
use crate::common::client::position;
use crate::common::{Client, Frame, Options, Rng};
use crate::workload::run::{Kind, Shared, canonical};

/// Between two attempts to connect, as clients do it.
const RETRY: Duration = Duration::from_millis(50);

/// The longest that a slow client does not read at a time.
const STALL: Duration = Duration::from_millis(400);

/// The longest that a slow client which comes and goes stays away.
const AWAY: Duration = Duration::from_secs(2);

/// Who watches.
pub struct Plan {
    /// Its name.
    pub name: String,
    /// Its user.
    pub user: String,
    /// How it connects.
    pub kind: Kind,
    /// The node it stays on while it can; `None`: it comes and goes.
    pub home: Option<usize>,
    /// Where it connects, if that is no node.
    pub door: Option<SocketAddr>,
    /// It stalls once in so many frames, 200 ms on the whole, and now and then stays away for a second. In that time
    /// the stream must not bring as many, or it never comes to the end.
    pub stalls: Option<u64>,
    /// There is little room in its socket, so that frames come in parts; some 50 KB a second is all it can take.
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
            // Without recovery it knows nothing of what was before.
            Seen::LetIn => self.shared.stands(&self.subscriber.name, 0),
            Seen::Ended(_) => {}
        }
        self.subscriber.seen.push((self.shared.now(), seen));
    }
}

/// Watches until the run is over.
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
        // One whose node is gone goes where the balancer leads it.
        let door = match (plan.door, plan.home) {
            (Some(door), _) => door,
            (None, Some(home)) if failures < 3 => shared.nodes.get(home).public,
            _ => shared.nodes.any(&mut rng).public,
        };
        let query = match (plan.kind, notes.position) {
            (Kind::Plain, _) | (Kind::Json, None) => format!("channel={channel}"),
            (_, None) => format!("channel={channel}&lastEventId="),
            (_, Some(at)) => format!("channel={channel}&lastEventId={at}"),
        };
        let options = Options { query, subprotocol: plan.kind.subprotocol(), small_buffer: plan.narrow };
        let Ok(mut client) = Client::try_open(door, &plan.user, &options).await else {
            failures += 1;
            tokio::time::sleep(RETRY).await;
            continue;
        };
        failures = 0;
        if !recovers {
            notes.note(Seen::LetIn);
        }
        // One that roams leaves after some frames.
        let frames = if plan.home.is_some() { u64::MAX } else { 1 + rng.below(60) };
        let mut welcomed = !recovers;
        for _ in 0..frames {
            if plan.stalls.is_some_and(|frames| rng.below(frames) == 0) {
                let time = STALL.mul_f64(rng.below(100) as f64 / 100.0);
                tokio::time::sleep(time).await; // that it stalls is what is tested
            }
            let frame = tokio::select! {
                frame = client.next_frame() => frame,
                _ = over.wait_for(|over| *over) => {
                    notes.subscriber.stayed = welcomed;
                    return notes.subscriber;
                }
            };
            match frame {
                // All that a heartbeat can tell one who gave no position: it is there.
                Frame::Text(text) if !recovers && text == r#"{"type":"ping"}"# => {}
                Frame::Text(text) => {
                    let asked = notes.position;
                    let seen = read(&text, asked);
                    welcomed |= matches!(seen, Seen::Welcomed { .. });
                    let is_event = matches!(seen, Seen::Event(..));
                    notes.note(seen);
                    // Now and then one in JSON mode asks where it stands.
                    if plan.kind == Kind::Json && is_event && rng.below(20) == 0 {
                        client.try_send(r#"{"type":"ping"}"#).await;
                    }
                }
                Frame::Ping(_) | Frame::Pong(_) => {}
                Frame::Close(code, reason) => {
                    // Only one without recovery frames is told by a close that it missed something.
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

/// What a text frame says.
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
        _ => panic!("no frame for one who only watches: {text}"),
    }
}
