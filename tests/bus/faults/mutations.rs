//! Tests that the checker finds a broken bus: a proxy between a node and its clients drops,
//! doubles, swaps, renumbers or relabels one event.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};

use crate::checker::Rule;
use crate::common::{Node, Nodes, Redis};
use crate::workload::run::{Run, Workload};
use crate::workload::testbed::FLAGS;

/// What happens to the next event.
#[derive(Clone, Copy, Debug)]
enum Mutation {
    Drop,
    Double,
    Swap,
    /// Delivers it with the id of the event before it, which is dropped.
    ReuseId,
    /// Delivers an event of one channel as one of another.
    WrongChannel,
    /// Delivers an event again after its channel was unsubscribed.
    AfterUnsubscribed,
    /// Delivers the first event of a resumed channel before the welcome.
    BeforeWelcome,
    /// Drops the first event of a resumed channel.
    DropResumed,
    /// Delivers an event again when its channel is resumed.
    DoubleResumed,
}

impl Mutation {
    /// Whether it is about channels beside the default one.
    fn is_of_subscriptions(self) -> bool {
        !matches!(self, Mutation::Drop | Mutation::Double | Mutation::Swap | Mutation::ReuseId)
    }
}

/// The frames of a node for one client.
struct Frames {
    from: BufReader<OwnedReadHalf>,
    /// Frames that were read to see what follows.
    queue: VecDeque<Vec<u8>>,
    /// The last event of each subscription.
    last: HashMap<String, Vec<u8>>,
    /// The number of events read.
    events: u32,
}

impl Frames {
    async fn next(&mut self) -> std::io::Result<Vec<u8>> {
        match self.queue.pop_front() {
            Some(frame) => Ok(frame),
            None => read_frame(&mut self.from).await,
        }
    }

    async fn next_event(&mut self, between: &mut Vec<u8>) -> std::io::Result<Vec<u8>> {
        loop {
            let next = self.next().await?;
            if is_event(&next) {
                return Ok(next);
            }
            between.extend(next);
        }
    }

    /// The next two frames, if both are events of this channel. Otherwise they stay.
    async fn two_events(&mut self, channel: &str) -> std::io::Result<Option<[Vec<u8>; 2]>> {
        let two = [self.next().await?, self.next().await?];
        if two.iter().all(|frame| is_event(frame) && json(frame)["channel"] == channel) {
            return Ok(Some(two));
        }
        two.into_iter().rev().for_each(|frame| self.queue.push_front(frame));
        Ok(None)
    }

    /// What is delivered instead of this frame. `None`: the mutation can't be done here.
    async fn mutate(&mut self, frame: &[u8], what: Mutation) -> std::io::Result<Option<Vec<u8>>> {
        let value = json(frame);
        if !what.is_of_subscriptions() {
            // Some events come first.
            if !is_event(frame) || self.events <= 5 {
                return Ok(None);
            }
            let mut between = Vec::new();
            return Ok(Some(match what {
                Mutation::Drop => Vec::new(),
                Mutation::Double => frame.repeat(2),
                Mutation::Swap => {
                    let next = self.next_event(&mut between).await?;
                    [&next, &*between, frame].concat()
                }
                _ => {
                    let next = self.next_event(&mut between).await?;
                    [between, with_id_of(&next, frame)].concat()
                }
            }));
        }
        let Some(channel) = value["channel"].as_str() else { return Ok(None) };
        let is_resumed = value["type"] == "welcome" && self.last.contains_key(channel);
        Ok(match what {
            Mutation::WrongChannel if is_event(frame) && channel.ends_with(".1") => {
                let text = String::from_utf8(frame[header(frame)..].to_vec()).expect("text");
                let other = channel.replace(".1", ".2");
                Some([&frame[..header(frame)], text.replacen(channel, &other, 1).as_bytes()].concat())
            }
            Mutation::AfterUnsubscribed if value["type"] == "unsubscribed" => {
                self.last.get(channel).map(|last| [frame, last].concat())
            }
            Mutation::DoubleResumed if is_resumed => Some([frame, &*self.last[channel]].concat()),
            Mutation::BeforeWelcome if is_resumed => {
                self.two_events(channel).await?.map(|[first, second]| [&first, frame, &second].concat())
            }
            Mutation::DropResumed if is_resumed => {
                self.two_events(channel).await?.map(|[_, second]| [frame, &second].concat())
            }
            _ => None,
        })
    }
}

/// A proxy between a node and its clients.
#[derive(Default)]
struct Mutator {
    next: Mutex<Option<Mutation>>,
    done: AtomicU32,
}

impl Mutator {
    /// What is delivered for the next frame.
    async fn deliver(&self, frames: &mut Frames) -> std::io::Result<Vec<u8>> {
        let frame = frames.next().await?;
        frames.events += u32::from(is_event(&frame));
        let next = *self.next.lock().expect("nothing panics while holding it");
        if let Some(what) = next
            && frame[0] == TEXT
            && let Some(mutated) = frames.mutate(&frame, what).await?
        {
            // Another connection may have been first.
            let next = self.next.lock().expect("nothing panics while holding it").take();
            self.done.fetch_add(u32::from(next.is_some()), Ordering::SeqCst);
            return Ok(mutated);
        }
        if is_event(&frame)
            && let Some(channel) = json(&frame)["channel"].as_str()
        {
            frames.last.insert(channel.into(), frame.clone());
        }
        Ok(frame)
    }

    async fn carry(self: Arc<Mutator>, listener: TcpListener, node: SocketAddr) {
        while let Ok((client, _)) = listener.accept().await {
            let Ok(server) = TcpStream::connect(node).await else { continue };
            let ((mut from_client, to_client), (from_node, mut to_node)) =
                (client.into_split(), server.into_split());
            let mutator = self.clone();
            tokio::spawn(async move {
                tokio::select! {
                    _ = tokio::io::copy(&mut from_client, &mut to_node) => {}
                    _ = mutator.down(from_node, to_client) => {}
                }
            });
        }
    }

    async fn down(&self, from: OwnedReadHalf, mut to: OwnedWriteHalf) -> std::io::Result<()> {
        let mut from = BufReader::new(from);
        // The response to the upgrade.
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(from.read_u8().await?);
        }
        to.write_all(&head).await?;
        if !head.starts_with(b"HTTP/1.1 101") {
            return tokio::io::copy(&mut from, &mut to).await.map(|_| ());
        }
        let mut frames = Frames { from, queue: VecDeque::new(), last: HashMap::new(), events: 0 };
        loop {
            to.write_all(&self.deliver(&mut frames).await?).await?;
        }
    }
}

/// The first byte of a text frame.
const TEXT: u8 = 0x81;

/// One frame. Frames of servers are not masked (RFC 6455 section 5.2).
async fn read_frame(from: &mut BufReader<OwnedReadHalf>) -> std::io::Result<Vec<u8>> {
    let mut frame = vec![from.read_u8().await?, from.read_u8().await?];
    let length = match frame[1] {
        126 => {
            let length = from.read_u16().await?;
            frame.extend(length.to_be_bytes());
            length as usize
        }
        length if length < 126 => length as usize,
        _ => panic!("no event here is so long"),
    };
    let start = frame.len();
    frame.resize(start + length, 0);
    from.read_exact(&mut frame[start..]).await?;
    Ok(frame)
}

/// The length of a frame's header.
fn header(frame: &[u8]) -> usize {
    if frame[1] == 126 { 4 } else { 2 }
}

/// What a text frame says.
fn json(frame: &[u8]) -> Value {
    serde_json::from_slice(&frame[header(frame)..]).expect("JSON")
}

fn is_event(frame: &[u8]) -> bool {
    frame[0] == TEXT && frame.windows(5).any(|part| part == b"\"id\":")
}

/// The same event with another id. Ids have 16 digits for the next two centuries.
fn with_id_of(event: &[u8], other: &[u8]) -> Vec<u8> {
    let (end, other_end) = (event.len() - 17, other.len() - 17);
    [&event[..end], &other[other_end..]].concat()
}

async fn is_caught(what: Mutation, rules: &[Rule]) {
    let redis = Redis::start(&[]).await;
    let mut node = Node::on(&redis, &FLAGS).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let mutator = Arc::new(Mutator::default());
    let straight = node.public;
    node.public = listener.local_addr().expect("it is bound");
    let carrying = tokio::spawn(mutator.clone().carry(listener, straight));
    let nodes = Nodes::new([node]);
    for round in 0..3 {
        // No publishers over WebSocket: the test is about what subscribers see.
        let workload = Workload {
            users: 2,
            roamers: 0,
            clients: 0,
            programs: 2,
            seed: round,
            channel: format!("broken{round}"),
            channels: if what.is_of_subscriptions() { 3 } else { 1 },
            ..Workload::default()
        };
        let run = Run::at(&nodes, 1, &redis, workload).await;
        run.wait_for_acks(50).await;
        *mutator.next.lock().expect("nothing panics while holding it") = Some(what);
        crate::common::until("the break", || async {
            (mutator.done.load(Ordering::SeqCst) == round as u32 + 1).then_some(())
        })
        .await;
        run.wait_for_acks(50).await;
        let violations = run.violations().await;
        assert!(
            violations.iter().any(|violation| rules.contains(&violation.rule)),
            "{what:?}: {violations:?}"
        );
    }
    carrying.abort();
}

#[tokio::test]
async fn checker_finds_a_dropped_event() {
    is_caught(Mutation::Drop, &[Rule::Missing]).await;
}

#[tokio::test]
async fn checker_finds_a_doubled_event() {
    is_caught(Mutation::Double, &[Rule::Twice]).await;
}

#[tokio::test]
async fn checker_finds_swapped_events() {
    is_caught(Mutation::Swap, &[Rule::Order]).await;
}

#[tokio::test]
async fn checker_finds_a_reused_id() {
    is_caught(Mutation::ReuseId, &[Rule::OneId]).await;
}

#[tokio::test]
async fn checker_finds_an_event_in_another_channel() {
    is_caught(Mutation::WrongChannel, &[Rule::Published]).await;
}

#[tokio::test]
async fn checker_finds_an_event_after_unsubscribed() {
    is_caught(Mutation::AfterUnsubscribed, &[Rule::Form]).await;
}

#[tokio::test]
async fn checker_finds_an_event_before_a_welcome() {
    is_caught(Mutation::BeforeWelcome, &[Rule::Form]).await;
}

#[tokio::test]
async fn checker_finds_a_lost_event_of_a_resumed_channel() {
    is_caught(Mutation::DropResumed, &[Rule::Missing]).await;
}

#[tokio::test]
async fn checker_finds_a_doubled_event_of_a_resumed_channel() {
    is_caught(Mutation::DoubleResumed, &[Rule::Twice, Rule::Order]).await;
}
