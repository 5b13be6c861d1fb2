//! A reconnect storm: ten thousand clients cut at once come back with their last ids while a thousand others stay and
//! events go on. Every event of everybody is checked (`benches/support/reconnect_clients.rs`), and what it cost Redis is counted.
//! How live events fare meanwhile is what `cargo bench --bench storm` shows.

#[path = "../../benches/support/files.rs"]
mod files;
#[path = "../../benches/support/reconnect_clients.rs"]
#[allow(dead_code)]
mod reconnect_clients;
#[path = "../../benches/support/wire.rs"]
#[allow(dead_code)]
mod wire;

use std::time::Duration;

use tokio::sync::oneshot;

use crate::common::{Node, Redis, Resp};
use reconnect_clients::ReconnectClients;

/// Who is cut, and who stays.
const CUT: usize = 10_000;
const STAY: usize = 1_000;

/// Events of a page of history; a page begins where an id is a multiple of it.
const PAGE: u64 = 256;

/// Time between two events while clients come back.
const PACE: Duration = Duration::from_millis(250);

/// Who publishes: `{"n":0}`, `{"n":1}`… so that each number belongs to one id.
struct Publisher {
    redis: Resp,
    next: u64,
    /// The last id given.
    last: u64,
}

impl Publisher {
    async fn publish(&mut self, count: u64) {
        for _ in 0..count {
            let event = format!(r#"{{"n":{},"padding":"{}"}}"#, self.next, "x".repeat(100));
            self.next += 1;
            self.last = self.redis.fcall("room", event.as_bytes(), None).await.int() as u64;
        }
    }
}

/// Checks that an event's number belongs to its id, as the first event did for everybody.
fn same_for_all() -> impl FnMut(usize, u64, &[u8]) -> anyhow::Result<()> {
    let mut between = None;
    move |_, id, text| {
        let number = text.strip_prefix(br#"{"n":"#).and_then(|rest| rest.split(|byte| *byte == b',').next());
        let number: Option<u64> = number.and_then(|digits| std::str::from_utf8(digits).ok()?.parse().ok());
        let distance = number.map(|number| id - number);
        anyhow::ensure!(
            distance.is_some() && *between.get_or_insert(distance) == distance,
            "{id} is {:?}",
            String::from_utf8_lossy(text)
        );
        Ok(())
    }
}

/// How a node's history was read.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Reads {
    /// As the node counts it.
    node: u64,
    /// As Redis counts it: ranges of the stream. Nothing else asks for any.
    ranges: u64,
}

impl Reads {
    async fn of(node: &Node, redis: &Redis) -> Reads {
        let stats = redis.client().await.call(&["INFO", "commandstats"]).await;
        let line = stats.text().lines().find_map(|line| line.strip_prefix("cmdstat_xrange:calls="));
        let ranges = line.and_then(|line| line.split(',').next()?.parse().ok()).unwrap_or(0);
        Reads { node: node.metric("fanfare_bus_reads_total").await as u64, ranges }
    }

    /// Whether each of these pages was read once at most. The last one goes on while it is read, so it may be read
    /// again from there. Within Redis a page takes eight steps, one more where it is read from both sides of a position,
    /// and one for the oldest event held.
    fn are_of(self, pages: u64) -> bool {
        (1..=pages + 1).contains(&self.node) && self.ranges <= 10 * self.node
    }
}

/// Ten thousand about to be cut, a thousand who stay, and who publishes to them.
struct Storm {
    redis: Redis,
    publisher: Publisher,
    clients: ReconnectClients,
    /// The last id that everybody has.
    at: u64,
}

impl Storm {
    /// Everybody comes: those who stay to one node, the others to another or the same.
    async fn gathers(redis: Redis, stay: &Node, cut: &Node) -> Storm {
        let mut clients = ReconnectClients::new("user", "room").expect("a poll");
        clients.add(STAY + CUT);
        let (stay, cut) = (stay.public, cut.public);
        let clients = blocking(move || {
            clients.connect(stay, 0..STAY, "", &mut |_, _, _| Ok(()))?;
            clients.connect(cut, STAY..STAY + CUT, "", &mut |_, _, _| Ok(()))?;
            Ok(clients)
        })
        .await;
        let mut publisher = Publisher { redis: redis.client().await, next: 0, last: 0 };
        publisher.publish(1).await;
        let at = publisher.last;
        Storm { redis, publisher, clients: everybody_has(clients, at).await, at }
    }

    /// Those who are there get so many events more.
    async fn wait_for_acks(mut self, events: u64) -> Storm {
        let last = self.publisher.last + events;
        let (clients, ()) = tokio::join!(everybody_has(self.clients, last), self.publisher.publish(events));
        assert_eq!(self.publisher.last, last, "ids are contiguous");
        Storm { clients, ..self }
    }

    /// Everybody who is away comes back at `node`, while events go on, and gets all. Says how the node read history,
    /// and over how many pages that lay.
    async fn comes_back(mut self, node: &Node) -> (Reads, u64) {
        assert_eq!(self.clients.away(), CUT);
        let before = Reads::of(node, &self.redis).await;
        let (over, mut stop) = oneshot::channel();
        let (addr, mut clients) = (node.public, self.clients);
        let coming = blocking(move || {
            clients.connect(addr, STAY..STAY + CUT, "", &mut same_for_all())?;
            let _ = over.send(());
            Ok(clients)
        });
        let publishing = async {
            while stop.try_recv().is_err() {
                self.publisher.publish(1).await;
                tokio::time::sleep(PACE).await; // the pace of events, not a wait
            }
        };
        let (clients, ()) = tokio::join!(coming, publishing);
        let last = self.publisher.last;
        let clients = everybody_has(clients, last).await;
        assert_eq!(clients.away(), 0);
        let after = Reads::of(node, &self.redis).await;
        let reads = Reads { node: after.node - before.node, ranges: after.ranges - before.ranges };
        (reads, last / PAGE - (self.at + 1) / PAGE + 1)
    }
}

async fn everybody_has(mut clients: ReconnectClients, id: u64) -> ReconnectClients {
    blocking(move || {
        clients.wait_for(id, &mut same_for_all())?;
        Ok(clients)
    })
    .await
}

/// Clients in thousands keep a thread to themselves.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> anyhow::Result<T> + Send + 'static) -> T {
    let done = tokio::task::spawn_blocking(work).await.expect("it does not panic");
    done.unwrap_or_else(|error| panic!("{error:?}"))
}

#[tokio::test]
async fn resumes_from_memory() {
    let _alone = crate::alone().await;
    files::allow_files(CUT + STAY).expect("as many open files");
    let redis = Redis::start(&[]).await;
    let node = Node::on(&redis, &["--shards", "2"]).await;
    let mut storm = Storm::gathers(redis, &node, &node).await;
    storm.clients.cut(STAY..STAY + CUT);
    let (reads, _) = storm.wait_for_acks(100).await.comes_back(&node).await;
    assert_eq!(reads, Reads { node: 0, ranges: 0 });
}

#[tokio::test]
async fn resumes_from_redis_history() {
    let _alone = crate::alone().await;
    files::allow_files(CUT + STAY).expect("as many open files");
    let redis = Redis::start(&[]).await;
    let flags = ["--shards", "2", "--buffer-memory", "64KiB", "--max-message-size", "1KiB"]; // some 100 events a shard
    let node = Node::on(&redis, &flags).await;
    let mut storm = Storm::gathers(redis, &node, &node).await;
    storm.clients.cut(STAY..STAY + CUT);
    for _ in 0..10 {
        storm = storm.wait_for_acks(50).await; // so that those who stay don't fall behind, and need no history
    }
    let (reads, pages) = storm.comes_back(&node).await;
    assert!(pages >= 3 && reads.are_of(pages), "{reads:?} of {pages} pages");
}

/// The node dies under ten thousand, who all come to another that nobody was on.
#[tokio::test]
async fn resumes_on_a_new_node_after_a_crash() {
    let _alone = crate::alone().await;
    files::allow_files(CUT + STAY).expect("as many open files");
    let redis = Redis::start(&[]).await;
    let flags = ["--shards", "2"];
    let (stay, dies) = tokio::join!(Node::on(&redis, &flags), Node::on(&redis, &flags));
    let storm = Storm::gathers(redis, &stay, &dies).await;
    dies.kill();
    let storm = storm.wait_for_acks(100).await;
    let node = Node::on(&storm.redis, &flags).await;
    let (reads, pages) = storm.comes_back(&node).await;
    assert!(reads.are_of(pages), "{reads:?} of {pages} pages");
}
