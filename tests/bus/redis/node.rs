//! A node as the bus sees it: two shards that record their messages and check the promise.

use std::collections::VecDeque;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use fanfare::bus::{
    self, Answer, BusContext, BusError, BusMessage, Page, PageReader, Publish, PublishError, Request,
    Requests, ShardId, ShardSender, Unusable,
};
use fanfare::config::{Action, RedisUrl, Settings};
use fanfare::metrics::{BusMetrics, Readiness};
use fanfare::protocol::event::{ChannelName, Entry, EventId, Kind};
use fanfare::protocol::form::{ChannelForm, Form};
use fanfare::protocol::inbox::{MessageId, PublishedId};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use super::redis_server::TIMEOUT;

pub fn settings(url: &str) -> Settings {
    let Ok(Action::Run(defaults)) = Settings::from([], []) else { panic!("the defaults are right") };
    Settings {
        redis: Some(RedisUrl(url.into())),
        max_channels: NonZeroUsize::new(100).unwrap(),
        history_ttl: Duration::from_secs(3600),
        publish_timeout: Duration::from_secs(20),
        ..defaults
    }
}

pub fn channel(name: &str) -> ChannelName {
    ChannelName::parse(name).unwrap()
}

/// The shards' inboxes.
#[derive(Clone, Debug)]
struct Inboxes(Arc<[mpsc::UnboundedSender<BusMessage>]>);

impl ShardSender for Inboxes {
    fn count(&self) -> usize {
        self.0.len()
    }

    fn send(&self, shard: ShardId, message: BusMessage) {
        let _ = self.0[shard].send(message); // fails only when the test has ended
    }
}

pub struct Node {
    pub requests: Requests,
    pub metrics: Arc<BusMetrics>,
    pub readiness: Arc<Readiness>,
    inboxes: Vec<mpsc::UnboundedReceiver<BusMessage>>,
    /// Messages skipped while searching for another one.
    skipped: Vec<VecDeque<BusMessage>>,
    pub task: tokio::task::JoinHandle<Result<(), Unusable>>,
}

impl Node {
    pub fn start(settings: Settings) -> Node {
        let (requests, requests_rx) = mpsc::unbounded_channel();
        let (senders, inboxes): (Vec<_>, Vec<_>) = (0..2).map(|_| mpsc::unbounded_channel()).unzip();
        let shards = Inboxes(senders.into());
        let inboxes = inboxes.into_iter().map(|inbox| share_nothing(inbox, shards.clone())).collect();
        let metrics = Arc::new(BusMetrics::default());
        let readiness = Arc::new(Readiness::waiting_for_bus(bus::starting(&settings)));
        let context = BusContext {
            requests: requests_rx,
            shards: Arc::new(shards),
            bans: Arc::default(),
            metrics: metrics.clone(),
            readiness: readiness.clone(),
        };
        let task = tokio::spawn(async move { bus::run(&settings, context).await });
        let skipped = vec![VecDeque::new(), VecDeque::new()];
        Node { requests, metrics, readiness, inboxes, skipped, task }
    }

    /// Starts it and waits until it is ready.
    pub async fn ready(settings: Settings) -> Node {
        let node = Node::start(settings);
        node.until_ready().await;
        node
    }

    pub async fn until_ready(&self) {
        until("the node is ready", || self.readiness.not_ready_reason().is_none()).await;
    }

    fn ask(&self, request: Request) {
        self.requests.send(request).unwrap();
    }

    /// The next message to a shard for which `wanted` returns a value. The others stay in order.
    pub async fn message<T>(&mut self, shard: usize, mut wanted: impl FnMut(&BusMessage) -> Option<T>) -> T {
        for at in 0..self.skipped[shard].len() {
            if let Some(found) = wanted(&self.skipped[shard][at]) {
                self.skipped[shard].remove(at);
                return found;
            }
        }
        loop {
            let message =
                timeout(TIMEOUT, self.inboxes[shard].recv()).await.expect("a message in time").unwrap();
            match wanted(&message) {
                Some(found) => return found,
                None => self.skipped[shard].push_back(message),
            }
        }
    }

    pub async fn try_follow(&mut self, name: &str, shard: usize) -> Result<Reader, BusError> {
        let wanted = ChannelForm::from(channel(name));
        self.ask(Request::Follow { channel: wanted.clone(), shard });
        let answer = self
            .message(shard, |message| match message {
                BusMessage::Followed { channel, base, position, .. } if *channel == wanted => {
                    Some(Ok((*base, *position)))
                }
                BusMessage::NotFollowed { channel, why } if *channel == wanted => Some(Err(why.clone())),
                _ => None,
            })
            .await?;
        // As a shard does: earlier messages with older entries are from before it unfollowed.
        self.skipped[shard].retain(|message| match message {
            BusMessage::Entry { channel, entry, .. } => *channel != wanted || entry.before() >= answer.1,
            _ => true,
        });
        Ok(Reader {
            channel: channel(name),
            shard,
            base: answer.0,
            position: answer.1,
            events: Vec::new(),
            private: Vec::new(),
            raw: Vec::new(),
            resets: Vec::new(),
        })
    }

    pub async fn follow(&mut self, name: &str, shard: usize) -> Reader {
        self.try_follow(name, shard).await.expect("followed")
    }

    pub fn unfollow(&self, reader: Reader) {
        self.ask(Request::Unfollow { channel: reader.channel.into(), shard: reader.shard });
    }

    pub fn publish_later(
        &self,
        name: &str,
        to: Option<&str>,
        event: &str,
    ) -> oneshot::Receiver<Result<EventId, PublishError>> {
        let (id, event_id) = oneshot::channel();
        let result = self.ask_publish(name, None, to, None, event);
        tokio::spawn(async move {
            let Ok(result) = result.await else { return };
            let _ = id.send(result.map(|id| match id {
                PublishedId::Event(id) => id,
                PublishedId::Message(id) => panic!("{id} is no event"),
            }));
        });
        event_id
    }

    fn ask_publish(
        &self,
        name: &str,
        sender: Option<&str>,
        to: Option<&str>,
        key: Option<&str>,
        event: &str,
    ) -> oneshot::Receiver<Result<PublishedId, PublishError>> {
        let (answer, result) = oneshot::channel();
        self.ask(Request::Publish(Publish {
            channel: channel(name),
            sender: sender.map(Into::into),
            to: to.map(Into::into),
            key: key.map(Into::into),
            event: event.to_owned().into(),
            answer: Answer::Waiter(answer),
        }));
        result
    }

    /// Sends a message of `user` to the inbox of a channel.
    pub fn store_later(
        &self,
        name: &str,
        user: &str,
        key: Option<&str>,
        event: &str,
    ) -> oneshot::Receiver<Result<PublishedId, PublishError>> {
        self.ask_publish(name, Some(user), None, key, event)
    }

    /// The same, with its answer.
    pub async fn store(
        &self,
        name: &str,
        user: &str,
        key: Option<&str>,
        event: &str,
    ) -> Result<MessageId, PublishError> {
        let result = timeout(TIMEOUT, self.store_later(name, user, key, event)).await;
        result.expect("answered in time").unwrap().map(message_id)
    }

    pub async fn publish(&self, name: &str, event: &str) -> Result<EventId, PublishError> {
        timeout(TIMEOUT, self.publish_later(name, None, event)).await.expect("answered in time").unwrap()
    }

    pub async fn page(&mut self, name: &str, number: u64, shard: usize) -> Result<Arc<Page>, BusError> {
        self.ask_page(name, block_after(number), shard);
        self.page_answer(block_after(number), shard).await
    }

    pub fn ask_page(&self, name: &str, after: EventId, shard: usize) {
        let reader = PageReader::Shard(shard, Form::Unnamed);
        self.ask(Request::Read { channel: channel(name), position: after, bytes: 1 << 20, reader });
    }

    pub async fn page_answer(&mut self, asked: EventId, shard: usize) -> Result<Arc<Page>, BusError> {
        self.message(shard, |message| match message {
            BusMessage::Page { position, result, .. } if *position == asked => Some(result.clone()),
            _ => None,
        })
        .await
    }

    pub fn ask_look(&self, name: &str, shard: usize) {
        self.ask(Request::Refresh { channel: channel(name).into(), shard });
    }
}

/// The id of a message.
pub fn message_id(id: PublishedId) -> MessageId {
    match id {
        PublishedId::Message(id) => id,
        PublishedId::Event(id) => panic!("{id} is an event"),
    }
}

/// Passes messages on. A shard that must share a channel does so at once, with an empty feed.
fn share_nothing(
    mut messages: mpsc::UnboundedReceiver<BusMessage>,
    shards: Inboxes,
) -> mpsc::UnboundedReceiver<BusMessage> {
    let (sender, inbox) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Some(message) = messages.recv().await {
            if let BusMessage::Share { channel, base, position, with } = message {
                shards.send(with, BusMessage::Followed { channel, base, position, recent: Vec::new() });
            } else if sender.send(message).is_err() {
                return;
            }
        }
    });
    inbox
}

/// The position before a block.
pub fn block_after(number: u64) -> EventId {
    EventId(number * bus::BLOCK - 1)
}

/// What a shard has received of a channel. Every entry is checked against the promise.
#[derive(Debug)]
pub struct Reader {
    pub channel: ChannelName,
    pub shard: usize,
    pub base: EventId,
    pub position: EventId,
    /// Public events by id, as clients see them.
    pub events: Vec<(u64, String)>,
    /// Private events: id, user, text.
    pub private: Vec<(u64, String, String)>,
    pub raw: Vec<String>,
    /// The positions of resets.
    pub resets: Vec<u64>,
}

/// The text of the entry's first frame.
fn text(entry: &Entry) -> String {
    let frame = &entry.bytes[..entry.frame_end(0) as usize];
    let head = match frame[1] {
        126 => 4,
        127 => 10,
        _ => 2,
    };
    String::from_utf8(frame[head..].to_vec()).unwrap()
}

impl Reader {
    pub fn take(&mut self, entry: &Entry) {
        match &entry.kind {
            Kind::WithoutId => self.raw.push(text(entry)),
            Kind::Reset => {
                assert!(entry.last >= self.position, "a reset goes back");
                self.resets.push(entry.last.0);
                self.position = entry.last;
            }
            Kind::Private(_) | Kind::Events => {
                assert_eq!(entry.before(), self.position, "a gap or a double");
                while self.position < entry.last {
                    let rest = entry.after(self.position).unwrap();
                    self.position = self.position.next();
                    let text = text(&rest);
                    assert!(text.ends_with(&format!("\"id\":{}}}", self.position)), "{text}");
                    match &entry.kind {
                        Kind::Private(user) => self.private.push((self.position.0, user.to_string(), text)),
                        _ => self.events.push((self.position.0, text)),
                    }
                }
            }
        }
    }

    pub async fn next(&mut self, node: &mut Node) {
        let channel = ChannelForm::from(self.channel.clone());
        let entry = node
            .message(self.shard, |message| match message {
                BusMessage::Entry { channel: other, entry, .. } if *other == channel => Some(entry.clone()),
                _ => None,
            })
            .await;
        self.take(&entry);
    }

    /// Reads entries up to this position.
    pub async fn until(&mut self, node: &mut Node, id: EventId) {
        while self.position < id {
            self.next(node).await;
        }
    }

    /// Reads entries until this holds.
    pub async fn until_it(&mut self, node: &mut Node, holds: impl Fn(&Reader) -> bool) {
        while !holds(self) {
            self.next(node).await;
        }
    }

    /// Asserts that there is one event with this id, and that it contains this text.
    pub fn assert_has(&self, id: EventId, text: &str) {
        let found: Vec<_> = self.events.iter().filter(|(other, _)| *other == id.0).collect();
        assert_eq!(found.len(), 1, "event {id} once");
        assert!(found[0].1.contains(text), "event {id}: {} has no {text}", found[0].1);
    }

    /// The number of events that contain this text.
    pub fn count(&self, text: &str) -> usize {
        self.events.iter().filter(|(_, event)| event.contains(text)).count()
    }
}

/// Waits until this holds.
pub async fn until(what: &str, holds: impl Fn() -> bool) {
    let deadline = tokio::time::Instant::now() + TIMEOUT;
    while !holds() {
        assert!(tokio::time::Instant::now() < deadline, "{what}: not within {TIMEOUT:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// An event with this number.
pub fn event(n: usize) -> String {
    format!(r#"{{"n":"<{n}>"}}"#)
}

/// Text that only the event with this number contains.
pub fn mark(n: usize) -> String {
    format!("\"<{n}>\"")
}
