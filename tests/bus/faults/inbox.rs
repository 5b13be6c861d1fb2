//! Inboxes under faults: clients send with keys and again after every doubtful answer, workers die
//! in the middle, and a judge compares what was acknowledged with what was worked on.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::sleep;

use crate::common::client::JSON_MODE;
use crate::common::{self, Client, Frame, Node, Options, Proxy, Redis, Resp, Rng, Silence, until};

const STREAM: &str = "fanfare:{desk}:inbox";
const CLIENTS: usize = 3;
const MESSAGES: usize = 200;

/// What clients and workers saw.
#[derive(Default)]
struct Records {
    /// Key and stream id of each acknowledged message.
    acked: Mutex<Vec<(String, String)>>,
    /// Stream ids of each key that a worker received.
    worked: Mutex<HashMap<String, HashSet<String>>>,
    /// Messages received by a worker that died before it deleted them.
    abandoned: Mutex<u64>,
    /// Clients notified of a loss in the channel.
    notified: Mutex<u64>,
    stop: AtomicBool,
}

impl Records {
    fn acked(&self) -> usize {
        self.acked.lock().expect("no panic").len()
    }

    fn notified(&self) -> u64 {
        *self.notified.lock().expect("no panic")
    }

    /// Acknowledged keys that no worker received.
    fn lost(&self) -> Vec<String> {
        let worked = self.worked.lock().expect("no panic");
        let acked = self.acked.lock().expect("no panic");
        acked.iter().map(|(key, _)| key.clone()).filter(|key| !worked.contains_key(key)).collect()
    }

    /// Every acknowledged message was worked on, and none was stored twice.
    fn judge(&self) {
        assert_eq!(self.lost(), Vec::<String>::new(), "acknowledged and not worked on");
        let worked = self.worked.lock().expect("no panic");
        for (key, ids) in worked.iter() {
            assert_eq!(ids.len(), 1, "{key} was stored as {ids:?}");
        }
        for (key, id) in self.acked.lock().expect("no panic").iter() {
            assert!(
                worked[key].contains(id),
                "{key} was acknowledged as {id}, and stored as {:?}",
                worked[key]
            );
        }
    }
}

/// A client that follows the channel, and the reset or failed recovery that it may get.
struct Sender {
    nodes: Vec<SocketAddr>,
    user: String,
    client: Option<Client>,
    last: String,
    records: Arc<Records>,
}

impl Sender {
    /// The connection, opened again if it was lost.
    async fn client(&mut self) -> &mut Client {
        while self.client.is_none() {
            self.nodes.rotate_left(1);
            let query = format!("channel=desk&lastEventId={}", self.last);
            let options = Options { query, subprotocol: Some(JSON_MODE), ..Options::default() };
            match Client::try_open(self.nodes[0], &self.user, &options).await {
                Ok(client) => self.client = Some(client),
                Err(_) => sleep(Duration::from_millis(50)).await,
            }
        }
        self.client.as_mut().expect("it was opened")
    }

    /// The next frame that answers this message: its id, or `None` if it must be sent again.
    async fn answer(&mut self, reference: usize) -> Option<String> {
        loop {
            let frame = match self.client().await.next_frame().await {
                Frame::Text(text) => serde_json::from_str::<Value>(&text).expect("JSON"),
                Frame::Ping(_) | Frame::Pong(_) => continue,
                Frame::Close(..) | Frame::Lost(_) => {
                    self.client = None;
                    return None;
                }
            };
            if let Some(last) = frame["lastEventId"].as_u64() {
                let known = std::mem::replace(&mut self.last, last.to_string());
                let is_loss = frame["type"] == "reset" || frame["recovered"] == false && !known.is_empty();
                *self.records.notified.lock().expect("no panic") += u64::from(is_loss);
            }
            if frame["ref"] != json!(reference) {
                continue;
            }
            match frame["type"].as_str() {
                Some("ack") => return Some(frame["id"].as_str().expect("a stream id").to_owned()),
                _ => {
                    sleep(Duration::from_millis(20)).await;
                    return None;
                }
            }
        }
    }

    async fn send(&mut self, n: usize) {
        let key = format!("{} {n}", self.user).replace(' ', ":");
        loop {
            let frame = json!({ "text": key, "key": key, "ref": n }).to_string();
            if !self.client().await.try_send(frame).await {
                self.client = None;
                continue;
            }
            if let Some(id) = self.answer(n).await {
                self.records.acked.lock().expect("no panic").push((key, id));
                return;
            }
        }
    }
}

fn start_senders(nodes: &[&Node], records: &Arc<Records>, messages: usize) -> Vec<JoinHandle<()>> {
    let start = |n: usize| {
        let nodes = nodes.iter().map(|node| node.public).collect();
        let (user, last) = (format!("client{n}"), String::new());
        let mut sender = Sender { nodes, user, client: None, last, records: records.clone() };
        tokio::spawn(async move {
            for n in 0..messages {
                sender.send(n).await;
            }
        })
    };
    (0..CLIENTS).map(start).collect()
}

/// A new connection, if Redis runs.
async fn connect(port: u16) -> Option<Resp> {
    let addr = SocketAddr::from(([127, 0, 0, 1], port));
    TcpStream::connect(addr).await.ok()?;
    tokio::spawn(Resp::connect(addr)).await.ok()
}

/// Takes a batch of messages, and dies in the middle of one in ten batches.
async fn work(redis: &mut Resp, name: &str, records: &Records, rng: &mut Rng) -> std::io::Result<()> {
    let claimed =
        redis.try_call(&["XAUTOCLAIM", STREAM, "workers", name, "300", "0-0", "COUNT", "10"]).await?;
    let mut entries = match &claimed {
        common::Value::Error(_) => {
            redis.try_call(&["XGROUP", "CREATE", STREAM, "workers", "0", "MKSTREAM"]).await?;
            return Ok(());
        }
        claimed => claimed.list()[1].list().to_vec(),
    };
    if entries.is_empty() {
        let command =
            ["XREADGROUP", "GROUP", "workers", name, "COUNT", "10", "BLOCK", "50", "STREAMS", STREAM, ">"];
        entries = match redis.try_call(&command).await? {
            common::Value::List(streams) => streams[0].list()[1].list().to_vec(),
            _ => return Ok(()),
        };
    }
    let dies_at = rng.once_in(10).then(|| rng.index(entries.len().max(1)));
    for (at, entry) in entries.iter().enumerate() {
        let id = entry.list()[0].text();
        let fields: Vec<_> = entry.list()[1].list().iter().map(common::Value::text).collect();
        let key = fields.chunks(2).find(|pair| pair[0] == "key").expect("a key")[1];
        records.worked.lock().expect("no panic").entry(key.into()).or_default().insert(id.into());
        if dies_at == Some(at) {
            *records.abandoned.lock().expect("no panic") += (entries.len() - at) as u64;
            return Err(std::io::ErrorKind::Interrupted.into());
        }
        redis.try_call(&["XDEL", STREAM, id]).await?;
        redis.try_call(&["XACK", STREAM, "workers", id]).await?;
    }
    Ok(())
}

fn start_workers(redis: &Redis, records: &Arc<Records>) -> Vec<JoinHandle<()>> {
    let start = |seed: u64| {
        let (records, port, mut rng) = (records.clone(), redis.port(), Rng(seed));
        tokio::spawn(async move {
            let mut lives = 0;
            while !records.stop.load(Ordering::Relaxed) {
                lives += 1;
                let Some(mut redis) = connect(port).await else {
                    sleep(Duration::from_millis(50)).await;
                    continue;
                };
                let name = format!("worker {seed} {lives}");
                while !records.stop.load(Ordering::Relaxed) {
                    if work(&mut redis, &name, &records, &mut rng).await.is_err() {
                        break;
                    }
                }
            }
        })
    };
    (1..=2).map(start).collect()
}

/// Waits until the inbox is empty, and ends the workers.
async fn finish(redis: &Redis, records: &Records, tasks: Vec<JoinHandle<()>>) {
    until("an empty inbox", || async {
        (redis.client().await.call(&["XLEN", STREAM]).await.int() == 0).then_some(())
    })
    .await;
    records.stop.store(true, Ordering::Relaxed);
    for task in tasks {
        task.await.expect("a worker");
    }
}

async fn wait_for_acks(records: &Records, more: usize) {
    let wanted = records.acked() + more;
    until("more acknowledged messages", || async { (records.acked() >= wanted).then_some(()) }).await;
}

#[tokio::test]
async fn acknowledged_messages_are_worked_on_under_faults() {
    let mut redis = Redis::start(&["--appendonly", "yes", "--appendfsync", "always"]).await;
    let flags = ["--inbox", "desk", "--redis-durable", "--max-message-rate", "0"];
    let (first, second) = (Node::on(&redis, &flags).await, Node::on(&redis, &flags).await);
    let records = Arc::new(Records::default());
    let workers = start_workers(&redis, &records);
    let senders = start_senders(&[&first, &second], &records, MESSAGES);
    wait_for_acks(&records, 30).await;
    for _ in 0..3 {
        redis.client().await.call(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]).await;
        wait_for_acks(&records, 30).await;
    }
    redis.freeze();
    sleep(Duration::from_secs(1)).await; // the fault itself
    redis.thaw();
    wait_for_acks(&records, 30).await;
    redis.kill();
    first.unready().await;
    redis.up().await;
    wait_for_acks(&records, 30).await;
    drop(first); // killed
    for sender in senders {
        sender.await.expect("a client");
    }
    finish(&redis, &records, workers).await;
    assert_eq!(records.acked(), CLIENTS * MESSAGES);
    assert!(*records.abandoned.lock().expect("no panic") > 0, "no worker died in the middle");
    records.judge();
    assert_eq!(records.notified(), 0, "nothing was lost");
}

#[tokio::test]
async fn messages_that_redis_lost_are_announced() {
    let mut redis = Redis::start(&[]).await;
    let node = Node::on(&redis, &["--inbox", "desk", "--max-message-rate", "0"]).await;
    let records = Arc::new(Records::default());
    let senders = start_senders(&[&node], &records, MESSAGES);
    wait_for_acks(&records, 50).await;
    redis.kill();
    node.unready().await;
    redis.up().await;
    for sender in senders {
        sender.await.expect("a client");
    }
    let workers = start_workers(&redis, &records);
    finish(&redis, &records, workers).await;
    assert!(records.lost().len() >= 50, "without persistence everything is lost");
    assert!(records.notified() >= CLIENTS as u64, "not every client was notified");
}

#[tokio::test]
async fn messages_that_a_failover_lost_are_announced() {
    let mut primary = Redis::start(&[]).await;
    let link = Proxy::to(primary.port()).await;
    let replica = Redis::replica_by(&link).await;
    let sentinel = Redis::sentinel_for(&primary).await;
    let url = format!("redis-sentinel://127.0.0.1:{}?sentinelServiceName=main", sentinel.port());
    let node = Node::start(&["--redis", &url, "--inbox", "desk", "--max-message-rate", "0"]).await;
    let records = Arc::new(Records::default());
    let senders = start_senders(&[&node], &records, MESSAGES);
    wait_for_acks(&records, 30).await;
    link.silence(Silence { up: true, down: true });
    wait_for_acks(&records, 30).await;
    primary.kill();
    for sender in senders {
        sender.await.expect("a client");
    }
    let workers = start_workers(&replica, &records);
    finish(&replica, &records, workers).await;
    assert!(records.lost().len() >= 30, "the replica had everything");
    assert!(records.notified() >= CLIENTS as u64, "not every client was notified");
}
