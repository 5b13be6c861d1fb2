//! Clients that subscribe to channels over many connections, and record what they see.

use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::{Instant, sleep, sleep_until};
use tokio_tungstenite::tungstenite::Error;

use crate::checker::Subscriber;
use crate::common::{Client, Frame, Options, Rng};
use crate::workload::followed::{Followed, State};
use crate::workload::run::Kind;
use crate::workload::shared::Shared;

/// Time between two attempts to connect or to subscribe.
const RETRY: Duration = Duration::from_millis(50);

/// The longest pause in a slow client's reading.
const STALL: Duration = Duration::from_millis(400);

/// The longest time that a slow, roaming client stays disconnected.
const AWAY: Duration = Duration::from_secs(2);

/// The longest time that a channel stays unsubscribed.
const APART: Duration = Duration::from_millis(300);

/// Channels in one `subscribe` frame: as many as the default `--max-subscriptions` allows.
const FRAME_MAX: usize = 100;

/// How a subscriber behaves.
pub struct Plan {
    pub name: String,
    pub user: String,
    pub kind: Kind,
    /// The node it stays on while it can. `None`: it disconnects and resumes on any node, and
    /// changes its subscriptions.
    pub home: Option<usize>,
    /// Where it connects, if not to a node.
    pub addr: Option<SocketAddr>,
    /// It pauses once in this many frames, for 200 ms on average, and sometimes disconnects for a
    /// second. The stream must bring fewer events in that time, or the client never catches up.
    pub stalls: Option<u64>,
    /// Small socket buffers, so that frames are sent in parts. Reads about 50 KB/s at most.
    pub narrow: bool,
    /// The channels that it subscribes to, by number. Unless the main one is among them, that is
    /// its default channel.
    pub subscriptions: Range<usize>,
    /// `--max-subscriptions` of its nodes.
    pub subscriptions_max: usize,
}

impl Plan {
    fn has_default(&self) -> bool {
        !self.subscriptions.contains(&0)
    }
}

/// A client on one connection after the other.
struct Watcher {
    shared: Arc<Shared>,
    plan: Plan,
    rng: Rng,
    /// Its channels, by number.
    channels: Vec<Followed>,
    /// Whether the first frame of the connection has come.
    greeted: bool,
    /// When it subscribes next, if a channel is idle.
    subscribes_at: Instant,
    /// The last `ref`.
    reference: u64,
    /// A `subscribe` to a channel that it follows: its `ref` and the channel.
    doubled: Option<(u64, usize)>,
    /// Tokens for all channels, and for the main one and those with odd numbers.
    tokens: Option<[String; 2]>,
    /// Which token is in force.
    token: usize,
    /// A token frame without an answer: its `ref`, and which token it is.
    renewing: Option<(u64, usize)>,
}

/// Subscribes until the run is over. Returns its records in each channel.
pub fn watch(shared: Arc<Shared>, plan: Plan, seed: u64) -> impl Future<Output = Vec<Subscriber>> {
    Watcher::new(shared, plan, Rng(seed)).run()
}

impl Watcher {
    fn new(shared: Arc<Shared>, plan: Plan, rng: Rng) -> Watcher {
        let subscriber = Subscriber {
            name: plan.name.clone(),
            user: plan.user.clone(),
            home: plan.home,
            recovers: plan.kind != Kind::Plain,
            stayed: false,
            seen: Vec::new(),
        };
        let channels = (0..plan.subscriptions.end.max(1))
            .map(|number| Followed::new(&shared, number, subscriber.clone()))
            .collect();
        let odd = shared.channels.iter().skip(1).step_by(2).map(|channel| &*channel.name);
        let some: Vec<&str> = std::iter::once(&*shared.main().name).chain(odd).collect();
        let tokens = shared
            .token_key
            .as_ref()
            .map(|key| [key.token(&plan.user, &[]), key.token(&plan.user, &["--channel", &some.join(",")])]);
        Watcher {
            shared,
            plan,
            rng,
            channels,
            greeted: false,
            subscribes_at: Instant::now(),
            reference: 0,
            doubled: None,
            tokens,
            token: 0,
            renewing: None,
        }
    }

    async fn run(mut self) -> Vec<Subscriber> {
        let mut over = self.shared.over.subscribe();
        let recovers = self.plan.kind != Kind::Plain;
        let mut failures = 0;
        while !*over.borrow_and_update() {
            let Ok(mut client) = self.connect(failures).await else {
                failures += 1;
                sleep(RETRY).await;
                continue;
            };
            failures = 0;
            // A roaming client disconnects after some frames.
            let most = if self.plan.subscriptions.is_empty() { 60 } else { 600 };
            let mut frames = if self.plan.home.is_some() { u64::MAX } else { 1 + self.rng.below(most) };
            let mut code = None;
            while frames > 0 {
                if self.plan.stalls.is_some_and(|frames| self.rng.below(frames) == 0) {
                    let time = STALL.mul_f64(self.rng.below(100) as f64 / 100.0);
                    sleep(time).await; // the pause is what is tested
                }
                let frame = tokio::select! {
                    frame = client.next_frame() => Some(frame),
                    () = sleep_until(self.subscribes_at), if self.is_due() => None,
                    _ = over.wait_for(|over| *over) => {
                        return self.channels.into_iter().map(Followed::finish).collect();
                    }
                };
                let Some(frame) = frame else {
                    self.subscribe(&mut client).await;
                    continue;
                };
                frames -= 1;
                match frame {
                    // A ping carries no position for a client without recovery.
                    Frame::Text(text) if !recovers && text == r#"{"type":"ping"}"# => {}
                    Frame::Text(text) => {
                        let is_event = self.read(&text);
                        if is_event && self.plan.kind == Kind::Json {
                            self.act(&mut client).await;
                        }
                    }
                    Frame::Ping(_) | Frame::Pong(_) => {}
                    Frame::Close(reason, text) => {
                        // Only clients without recovery are closed when they miss events.
                        let due = reason == 1012 || (reason == 4008 && !recovers);
                        assert!(due, "{} was closed with {reason}: {text}", self.plan.name);
                        code = Some(reason);
                        break;
                    }
                    Frame::Lost(_) => break,
                }
            }
            self.channels.iter_mut().for_each(|followed| followed.ended(code));
            drop(client);
            let plan = &self.plan;
            if plan.home.is_none() && plan.stalls.is_some_and(|frames| self.rng.below(frames / 20) == 0) {
                let time = AWAY.mul_f64(self.rng.below(100) as f64 / 100.0);
                sleep(time).await; // as above
            }
        }
        self.channels.into_iter().map(Followed::finish).collect()
    }

    /// Connects. If its node is gone it connects to any node, as through a load balancer.
    async fn connect(&mut self, failures: u64) -> Result<Client, Error> {
        let addr = match (self.plan.addr, self.plan.home) {
            (Some(addr), _) => addr,
            (None, Some(home)) if failures < 3 => self.shared.nodes.get(home).public,
            _ => self.shared.nodes.any(&mut self.rng).public,
        };
        let channel = if self.plan.has_default() { &*self.shared.main().name } else { "" };
        let main = &mut self.channels[0];
        let last = match (self.plan.kind, main.position) {
            (Kind::Plain, _) | (Kind::Json, None) => String::new(),
            _ if !self.plan.has_default() => String::new(),
            (_, None) => "&lastEventId=".into(),
            (_, Some(at)) => format!("&lastEventId={at}"),
        };
        let token = self.tokens.as_ref().map(|tokens| format!("&token={}", tokens[0])).unwrap_or_default();
        let query = format!("channel={channel}{last}{token}");
        let subprotocol = self.plan.kind.subprotocol();
        let options = Options { query, subprotocol, small_buffer: self.plan.narrow };
        let client = Client::try_open(addr, &self.plan.user, &options).await?;
        (self.greeted, self.doubled, self.token, self.renewing) = (false, None, 0, None);
        self.subscribes_at = Instant::now();
        match (self.plan.kind, self.plan.has_default()) {
            (Kind::Plain, _) => main.let_in(),
            (_, true) => main.ask(None),
            (_, false) => {}
        }
        Ok(client)
    }

    fn next_reference(&mut self) -> u64 {
        self.reference += 1;
        self.reference
    }

    /// A random channel of its subscriptions that fulfils this.
    fn pick(&mut self, wanted: impl Fn(&Followed) -> bool) -> Option<usize> {
        let fit: Vec<usize> =
            self.plan.subscriptions.clone().filter(|number| wanted(&self.channels[*number])).collect();
        (!fit.is_empty()).then(|| fit[self.rng.index(fit.len())])
    }

    fn is_quiet(&self) -> bool {
        *self.shared.quiet.borrow()
    }

    /// Whether it subscribes to channels, or renews its token, as soon as it is time.
    fn is_due(&self) -> bool {
        let mut subscriptions = self.channels[self.plan.subscriptions.clone()].iter();
        subscriptions.clone().for_each(Followed::check_patience);
        let is_open = subscriptions.any(|followed| followed.is_idle() && followed.leaving.is_none());
        self.greeted && self.renewing.is_none() && (is_open || (self.is_quiet() && self.token != 0))
    }

    /// Subscribes to all channels that are idle, in one frame if it takes them.
    async fn subscribe(&mut self, client: &mut Client) {
        self.subscribes_at = Instant::now() + RETRY;
        if self.is_quiet() && self.token != 0 {
            return self.renew(client, 0).await;
        }
        let idle = self.plan.subscriptions.clone();
        let idle = idle.filter(|number| self.channels[*number].is_idle());
        let idle: Vec<usize> = idle.filter(|number| self.channels[*number].leaving.is_none()).collect();
        for numbers in idle.chunks(FRAME_MAX.min(self.plan.subscriptions_max)) {
            let reference = self.next_reference();
            let mut channels = Vec::new();
            for number in numbers {
                let followed = &mut self.channels[*number];
                followed.ask(Some(reference));
                let name = &self.shared.channels[*number].name;
                channels.push(match followed.position {
                    Some(at) => json!({"channel": name, "lastEventId": at}),
                    None => json!({"channel": name}),
                });
            }
            let frame = match &channels[..] {
                [one] if self.rng.once_in(2) => {
                    let mut frame = one.clone();
                    (frame["type"], frame["ref"]) = (json!("subscribe"), json!(reference));
                    frame
                }
                _ => json!({"type": "subscribe", "channels": channels, "ref": reference}),
            };
            client.try_send(frame.to_string()).await;
        }
        // Sometimes it changes its mind before the answer.
        if self.plan.home.is_none() && self.rng.once_in(5) {
            self.unsubscribe(client).await;
        }
    }

    async fn unsubscribe(&mut self, client: &mut Client) {
        let Some(number) = self.pick(|followed| !followed.is_idle() && followed.leaving.is_none()) else {
            return;
        };
        if self.is_quiet() || self.doubled.is_some_and(|(_, doubled)| doubled == number) {
            return;
        }
        let reference = self.next_reference();
        self.channels[number].leaving = Some(reference);
        let name = &self.shared.channels[number].name;
        let frame = json!({"type": "unsubscribe", "channel": name, "ref": reference});
        client.try_send(frame.to_string()).await;
    }

    /// Sends another token.
    async fn renew(&mut self, client: &mut Client, token: usize) {
        let Some(tokens) = &self.tokens else { return };
        let text = tokens[token].clone();
        let reference = self.next_reference();
        self.renewing = Some((reference, token));
        client.try_send(json!({"type": "token", "token": text, "ref": reference}).to_string()).await;
    }

    /// Sends something now and then: a client in JSON mode asks for its positions, and a roaming one
    /// changes its subscriptions.
    async fn act(&mut self, client: &mut Client) {
        if self.rng.below(20) == 0 {
            client.try_send(r#"{"type":"ping"}"#).await;
        }
        let is_changing = self.plan.home.is_none() && !self.plan.subscriptions.is_empty();
        if !is_changing || self.is_quiet() || !self.rng.once_in(15) {
            return;
        }
        match self.rng.below(4) {
            0 if self.renewing.is_none() && self.doubled.is_none() => {
                let is_staying =
                    |followed: &Followed| followed.state == State::Live && followed.leaving.is_none();
                let Some(number) = self.pick(is_staying) else { return };
                let reference = self.next_reference();
                self.doubled = Some((reference, number));
                let name = &self.shared.channels[number].name;
                let frame = json!({"type": "subscribe", "channel": name, "ref": reference});
                client.try_send(frame.to_string()).await;
            }
            1 if self.renewing.is_none() && self.doubled.is_none() => {
                self.renew(client, 1 - self.token).await;
            }
            _ => self.unsubscribe(client).await,
        }
    }

    /// Reads a text frame. `true`: it is an event.
    fn read(&mut self, text: &str) -> bool {
        let mut frame: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text:?}"));
        let label = frame.as_object_mut().expect("an object").remove("channel");
        let number = match &label {
            None if self.plan.has_default() => 0,
            None => usize::MAX, // for frames about no channel
            Some(label) => {
                let mut names = self.shared.channels[..self.channels.len()].iter();
                let number = names.position(|channel| *label == channel.name);
                let is_subscription = |number: &usize| self.plan.subscriptions.contains(number);
                number.filter(is_subscription).unwrap_or_else(|| panic!("{}: {text}", self.plan.name))
            }
        };
        if frame.get("id").is_some() && frame["type"] != "ack" {
            let is_first =
                label.as_ref().is_none_or(|label| text.starts_with(&format!(r#"{{"channel":{label},"#)));
            assert!(is_first, "{text}");
            self.followed(number, text).event(frame, text);
            return true;
        }
        match frame["type"].as_str() {
            Some("welcome") if label.is_none() && !self.greeted && !self.plan.has_default() => {
                assert_eq!(text, r#"{"type":"welcome"}"#);
            }
            Some("welcome") => self.followed(number, text).welcomed(&frame),
            Some("reset") => self.followed(number, text).reset(&frame),
            Some("ping") => self.on_ping(&frame),
            Some("unsubscribed") => self.on_unsubscribed(number, &frame),
            Some("error") => self.on_error(number, &frame),
            Some("ack") => self.on_token(&frame),
            _ => panic!("unexpected frame for a subscriber: {text}"),
        }
        self.greeted = true;
        false
    }

    fn followed(&mut self, number: usize, text: &str) -> &mut Followed {
        let name = &self.plan.name;
        self.channels.get_mut(number).unwrap_or_else(|| panic!("{name}: about no channel: {text}"))
    }

    /// A ping carries the positions of all channels that the client follows, and no others.
    fn on_ping(&mut self, frame: &Value) {
        if self.plan.has_default() {
            self.channels[0].stands(&frame["lastEventId"]);
        } else {
            assert!(frame.get("lastEventId").is_none(), "{frame}");
        }
        let mut others = frame.get("channels").and_then(Value::as_object).cloned().unwrap_or_default();
        for number in self.plan.subscriptions.clone() {
            let followed = &mut self.channels[number];
            let at = others.remove(&self.shared.channels[number].name);
            let is_live = followed.state == State::Live;
            assert_eq!(at.is_some(), is_live, "{}: {:?} in {frame}", self.plan.name, followed.state);
            if let Some(at) = at {
                followed.stands(&at);
            }
        }
        assert!(others.is_empty(), "{}: {frame}", self.plan.name);
    }

    fn on_unsubscribed(&mut self, number: usize, frame: &Value) {
        let is_narrowing = self.renewing.is_some_and(|(_, token)| token == 1);
        let followed = &mut self.channels[number];
        match frame["reason"].as_str() {
            Some("requested") => {
                let reference = frame.get("ref").and_then(Value::as_u64);
                assert!(followed.leaving.is_some() && followed.leaving == reference, "{frame}");
                assert!(!followed.is_idle(), "{}: {number} {frame}", self.plan.name);
                followed.unsubscribed();
            }
            // An unsubscribe under way is answered by an error.
            Some("forbidden") => {
                assert!(is_narrowing && number.is_multiple_of(2) && number > 0, "{number}: {frame}");
                assert!(followed.state == State::Live && frame.get("ref").is_none(), "{frame}");
                let leaving = followed.leaving;
                followed.unsubscribed();
                followed.leaving = leaving;
            }
            _ => panic!("{}: {number} {frame}", self.plan.name),
        }
        self.subscribes_at = Instant::now() + APART.mul_f64(self.rng.below(100) as f64 / 100.0);
    }

    fn on_error(&mut self, number: usize, frame: &Value) {
        let reference = frame.get("ref").and_then(Value::as_u64);
        let count = self.channels.iter().filter(|followed| !followed.is_idle()).count();
        let followed = &mut self.channels[number];
        match frame["code"].as_str() {
            Some("subscribed") if self.doubled.is_some() => {
                assert_eq!(self.doubled.take(), reference.map(|reference| (reference, number)), "{frame}");
            }
            Some("not_subscribed") if followed.leaving.is_some() => {
                assert!(followed.is_idle() && followed.leaving == reference, "{number}: {frame}");
                followed.leaving = None;
            }
            Some("unavailable") => followed.rejected(reference, false),
            Some("too_many") => {
                assert!(count > self.plan.subscriptions_max, "{count} channels: {frame}");
                followed.rejected(reference, true);
            }
            Some("forbidden") => {
                let is_narrow = self.token == 1 || self.renewing.is_some_and(|(_, token)| token == 1);
                assert!(is_narrow && number.is_multiple_of(2) && number > 0, "{number}: {frame}");
                followed.rejected(reference, true);
            }
            _ => panic!("{}: {number} {:?}: {frame}", self.plan.name, followed.state),
        }
        self.subscribes_at = Instant::now() + APART.mul_f64(self.rng.below(100) as f64 / 100.0);
    }

    /// The new token is in force: the client has left the channels that it does not allow.
    fn on_token(&mut self, frame: &Value) {
        let (reference, token) = self.renewing.take().unwrap_or_else(|| panic!("{frame}"));
        assert_eq!(frame.get("ref").and_then(Value::as_u64), Some(reference), "{frame}");
        self.token = token;
        for number in self.plan.subscriptions.clone().filter(|number| number.is_multiple_of(2) && *number > 0)
        {
            let is_left = self.channels[number].is_idle();
            assert!(token == 0 || is_left, "{}: {:?}", self.plan.name, self.channels[number].state);
        }
    }
}
