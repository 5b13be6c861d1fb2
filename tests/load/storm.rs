//! A reconnect storm: ten thousand clients lose their connections at once and resume with their
//! last ids, while a thousand others stay and events continue. Every event of every client is
//! checked (`reconnect_clients.rs`), and the reads of Redis are counted. `cargo
//! bench --bench storm` measures the latency of live events meanwhile.

use std::time::Duration;

use tokio::sync::oneshot;

use crate::common::{Node, Redis, Resp};
use crate::reconnect_clients::ReconnectClients;

/// Clients that lose their connection, and clients that stay.
const CUT: usize = 10_000;
const STAY: usize = 1_000;

/// Events per page of history. Pages start at multiples of it.
const BLOCK: u64 = 256;

/// Time between two events while clients resume.
const PACE: Duration = Duration::from_millis(250);

/// Raises the limit on open files for all clients.
fn allow_files() {
    let limit = rlimit::increase_nofile_limit(u64::MAX).expect("a limit");
    assert!(limit > (CUT + STAY) as u64 + 200, "{limit} open files are too few");
}

/// Publishes `{"n":0}`, `{"n":1}`… so that each number belongs to one id.
struct Publisher {
    redis: Resp,
    next: u64,
    /// The last id.
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

/// Checks that an event's number belongs to its id, as the first event showed.
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

/// How often history was read.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Reads {
    /// As counted by the node.
    node: u64,
    /// Ranges of streams, as counted by Redis. Nothing else reads any.
    ranges: u64,
}

impl Reads {
    async fn of(node: &Node, redis: &Redis) -> Reads {
        let stats = redis.client().await.call(&["INFO", "commandstats"]).await;
        let line = stats.text().lines().find_map(|line| line.strip_prefix("cmdstat_xrange:calls="));
        let ranges = line.and_then(|line| line.split(',').next()?.parse().ok()).unwrap_or(0);
        Reads { node: node.metric("fanfare_bus_reads_total").await as u64, ranges }
    }

    /// Whether each of these pages was read at most once. The last page grows while it is read, so
    /// it may be read again. In Redis a page takes eight steps, one more if it is read from both
    /// sides of a position, and one for the oldest event.
    fn are_of(self, pages: u64) -> bool {
        (1..=pages + 1).contains(&self.node) && self.ranges <= 10 * self.node
    }
}

/// Clients that are about to lose their connections, clients that stay, and a publisher.
struct Storm {
    redis: Redis,
    publisher: Publisher,
    clients: ReconnectClients,
    /// The last id that all clients have.
    at: u64,
}

impl Storm {
    /// Connects all clients: those that stay to one node, the others to another or the same.
    async fn start(redis: Redis, stay: &Node, cut: &Node) -> Storm {
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
        Storm { redis, publisher, clients: wait_for_all(clients, at).await, at }
    }

    /// Publishes this many events to the connected clients.
    async fn publish(mut self, events: u64) -> Storm {
        let last = self.publisher.last + events;
        let (clients, ()) = tokio::join!(wait_for_all(self.clients, last), self.publisher.publish(events));
        assert_eq!(self.publisher.last, last, "ids are contiguous");
        Storm { clients, ..self }
    }

    /// All disconnected clients resume on `node` while events continue, and get all of them.
    /// Returns how the node read history, and over how many pages the missed events were spread.
    async fn resume(mut self, node: &Node) -> (Reads, u64) {
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
        let clients = wait_for_all(clients, last).await;
        assert_eq!(clients.away(), 0);
        let after = Reads::of(node, &self.redis).await;
        let reads = Reads { node: after.node - before.node, ranges: after.ranges - before.ranges };
        (reads, last / BLOCK - (self.at + 1) / BLOCK + 1)
    }
}

async fn wait_for_all(mut clients: ReconnectClients, id: u64) -> ReconnectClients {
    blocking(move || {
        clients.wait_for(id, &mut same_for_all())?;
        Ok(clients)
    })
    .await
}

/// Thousands of clients run on their own thread.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> anyhow::Result<T> + Send + 'static) -> T {
    let done = tokio::task::spawn_blocking(work).await.expect("it does not panic");
    done.unwrap_or_else(|error| panic!("{error:?}"))
}

#[tokio::test]
async fn resumes_from_memory() {
    let _alone = crate::alone().await;
    allow_files();
    let redis = Redis::start(&[]).await;
    let node = Node::on(&redis, &["--shards", "2"]).await;
    let mut storm = Storm::start(redis, &node, &node).await;
    storm.clients.cut(STAY..STAY + CUT);
    let (reads, _) = storm.publish(100).await.resume(&node).await;
    assert_eq!(reads, Reads { node: 0, ranges: 0 });
}

#[tokio::test]
async fn resumes_from_redis_history() {
    let _alone = crate::alone().await;
    allow_files();
    let redis = Redis::start(&[]).await;
    let flags = ["--shards", "2", "--buffer-memory", "64KiB", "--max-message-size", "1KiB"]; // some 100 events a shard
    let node = Node::on(&redis, &flags).await;
    let mut storm = Storm::start(redis, &node, &node).await;
    storm.clients.cut(STAY..STAY + CUT);
    for _ in 0..10 {
        storm = storm.publish(50).await; // so that the clients that stay do not fall behind and read history
    }
    let (reads, pages) = storm.resume(&node).await;
    assert!(pages >= 3 && reads.are_of(pages), "{reads:?} of {pages} pages");
}

/// A node with ten thousand clients dies. They all resume on a new node.
#[tokio::test]
async fn resumes_on_a_new_node_after_a_crash() {
    let _alone = crate::alone().await;
    allow_files();
    let redis = Redis::start(&[]).await;
    let flags = ["--shards", "2"];
    let (stay, dies) = tokio::join!(Node::on(&redis, &flags), Node::on(&redis, &flags));
    let storm = Storm::start(redis, &stay, &dies).await;
    dies.kill();
    let storm = storm.publish(100).await;
    let node = Node::on(&storm.redis, &flags).await;
    let (reads, pages) = storm.resume(&node).await;
    assert!(reads.are_of(pages), "{reads:?} of {pages} pages");
}
