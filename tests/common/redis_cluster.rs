//! A Redis Cluster for one test: real processes, whose cluster bus leads through proxies, so that a
//! node can be cut off.

use std::process::Command;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::redis::{Redis, Resp, Value, free_port};
use super::until;

/// Number of slots.
const SLOTS: usize = 16_384;

/// When a node counts as failed. On a machine that runs many tests one may get no turn for a second.
const NODE_TIMEOUT_MS: &str = "2000";

/// Where the sender's id is in a packet of the cluster bus (`clusterMsg` of cluster.h).
const SENDER: std::ops::Range<usize> = 40..80;

/// Nodes of a cluster. The first are primaries, then come as many replicas or none; a node keeps its
/// place when it changes its role.
pub struct RedisCluster {
    pub nodes: Vec<Redis>,
    ids: Vec<String>,
    primaries: usize,
    flags: Vec<String>,
    buses: Vec<Bus>,
    isolated: watch::Sender<Option<String>>,
}

impl RedisCluster {
    /// Three primaries, each with a replica.
    pub async fn start(flags: &[&str]) -> RedisCluster {
        RedisCluster::of(3, true, flags).await
    }

    /// This many primaries with or without replicas.
    pub async fn of(primaries: usize, replicas: bool, flags: &[&str]) -> RedisCluster {
        let mut cluster = RedisCluster {
            nodes: Vec::new(),
            ids: Vec::new(),
            primaries,
            flags: flags.iter().map(|flag| flag.to_string()).collect(),
            buses: Vec::new(),
            isolated: watch::Sender::new(None),
        };
        for _ in 0..primaries * if replicas { 2 } else { 1 } {
            cluster.add_node().await;
        }
        for place in 0..primaries {
            let first = (place * SLOTS / primaries).to_string();
            let last = ((place + 1) * SLOTS / primaries - 1).to_string();
            cluster.ok(place, &["CLUSTER", "ADDSLOTSRANGE", &first, &last]).await;
        }
        cluster.wait_until_known().await;
        for place in primaries..cluster.nodes.len() {
            let primary = cluster.ids[place - primaries].clone();
            cluster.ok(place, &["CLUSTER", "REPLICATE", &primary]).await;
        }
        cluster.healthy().await;
        cluster
    }

    /// Starts one more node without slots. Returns its place.
    pub async fn add_node(&mut self) -> usize {
        let place = self.nodes.len();
        let bus_port = free_port();
        let id = Arc::new(Mutex::new(String::new()));
        let bus = Bus::to(bus_port, id.clone(), self.isolated.subscribe()).await;
        let (bus_port, announced) = (bus_port.to_string(), bus.port.to_string());
        let mut flags = vec!["--cluster-enabled", "yes", "--cluster-node-timeout", NODE_TIMEOUT_MS];
        flags.extend(["--cluster-port", &bus_port, "--cluster-announce-bus-port", &announced]);
        // A replica may replace its primary however old its data is, and follows without a pause.
        flags.extend(["--cluster-replica-validity-factor", "0", "--repl-diskless-sync-delay", "0"]);
        flags.extend(self.flags.iter().map(String::as_str));
        let redis = Redis::start(&flags).await;
        let epoch = (place + 1).to_string();
        let mut client = redis.client().await;
        client.call(&["CLUSTER", "SET-CONFIG-EPOCH", &epoch]).await;
        let own = client.call(&["CLUSTER", "MYID"]).await.text().to_owned();
        id.lock().expect("nothing panics while holding it").clone_from(&own);
        if let (Some(first), Some(first_bus)) = (self.nodes.first(), self.buses.first()) {
            let meet = [first.port().to_string(), first_bus.port.to_string()];
            client.call(&["CLUSTER", "MEET", "127.0.0.1", &meet[0], &meet[1]]).await;
        }
        self.nodes.push(redis);
        self.ids.push(own);
        self.buses.push(bus);
        place
    }

    /// Waits until every node knows all the others.
    pub async fn wait_until_known(&self) {
        let count = self.nodes.len().to_string();
        until("all nodes of the cluster to know each other", || async {
            for place in 0..self.nodes.len() {
                if self.cluster_info(place, "cluster_known_nodes").await? != count {
                    return None;
                }
                let nodes = self.nodes_as_seen_by(place).await;
                if nodes.contains("handshake") || nodes.contains("disconnected") {
                    return None;
                }
            }
            Some(())
        })
        .await;
    }

    /// Waits until all running nodes consider the cluster to be up and agree about slots, and replicas
    /// follow.
    pub async fn healthy(&self) {
        until("a cluster that is up", || async {
            let mut slots: Option<Vec<String>> = None;
            for place in (0..self.nodes.len()).filter(|place| self.nodes[*place].is_running()) {
                if self.cluster_info(place, "cluster_state").await? != "ok" {
                    return None;
                }
                let info = self.nodes[place].client().await.call(&["INFO", "replication"]).await;
                if info.text().contains("master_link_status:down") {
                    return None;
                }
                let seen = slots_in(&self.nodes_as_seen_by(place).await);
                if slots.get_or_insert_with(|| seen.clone()) != &seen {
                    return None;
                }
            }
            Some(())
        })
        .await;
    }

    async fn cluster_info(&self, place: usize, field: &str) -> Option<String> {
        let info = self.nodes[place].client().await.call(&["CLUSTER", "INFO"]).await;
        let value = info.text().lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        value.map(|value| value.trim().to_owned())
    }

    /// CLUSTER NODES of one node.
    pub async fn nodes_as_seen_by(&self, place: usize) -> String {
        self.nodes[place].client().await.call(&["CLUSTER", "NODES"]).await.text().to_owned()
    }

    /// Runs a command that must succeed.
    pub async fn ok(&self, place: usize, command: &[&str]) -> Value {
        let answer = self.nodes[place].client().await.call(command).await;
        assert!(!matches!(answer, Value::Error(_)), "{command:?}: {answer:?}");
        answer
    }

    /// The URL that names the first primaries.
    pub fn url(&self) -> String {
        let ports: Vec<_> = self.nodes.iter().map(|node| format!("127.0.0.1:{}", node.port())).collect();
        format!("redis-cluster://{}", ports[..self.primaries].join(","))
    }

    pub fn ports(&self) -> Vec<u16> {
        self.nodes.iter().map(Redis::port).collect()
    }

    /// The slot of a channel.
    pub async fn slot(&self, channel: &str) -> u16 {
        let mut client = self.running().client().await;
        client.call(&["CLUSTER", "KEYSLOT", channel]).await.int() as u16
    }

    fn running(&self) -> &Redis {
        self.nodes.iter().find(|node| node.is_running()).expect("some node runs")
    }

    /// The place of the primary of a slot, as that primary itself sees it.
    pub async fn primary_of(&self, slot: u16) -> usize {
        until("a primary of the slot", || async {
            for place in (0..self.nodes.len()).filter(|place| self.nodes[*place].is_running()) {
                if self.nodes_as_seen_by(place).await.lines().any(|line| is_own_line_with(line, slot)) {
                    return Some(place);
                }
            }
            None
        })
        .await
    }

    /// A connection to the primary of a channel.
    pub async fn client_of(&self, channel: &str) -> Resp {
        let place = self.primary_of(self.slot(channel).await).await;
        self.nodes[place].client().await
    }

    /// Channel names, `count` of them at each of the first primaries, in the order of those.
    pub async fn channels(&self, count: usize) -> Vec<Vec<String>> {
        let mut found = vec![Vec::new(); self.primaries];
        for n in 0.. {
            let name = format!("room{n}");
            let place = usize::from(self.slot(&name).await) * self.primaries / SLOTS;
            if found[place].len() < count {
                found[place].push(name);
            }
            if found.iter().all(|names| names.len() == count) {
                break;
            }
        }
        found
    }

    /// A channel whose slot is below this one.
    pub async fn channel_below(&self, slot: u16) -> String {
        let mut client = self.running().client().await;
        for n in 0.. {
            let name = format!("low{n}");
            if client.call(&["CLUSTER", "KEYSLOT", &name]).await.int() < slot.into() {
                return name;
            }
        }
        unreachable!("slots are even")
    }

    /// The last id of a channel in the data of one node.
    pub async fn head(&self, place: usize, channel: &str) -> u64 {
        let mut client = self.nodes[place].client().await;
        client.call(&["READONLY"]).await; // or replicas redirect it
        match client.call(&["HGET", &format!("fanfare:{{{channel}}}:meta"), "head"]).await {
            Value::Nil => 0,
            head => head.int() as u64,
        }
    }

    /// Waits until the replica of a primary has replaced it.
    pub async fn promoted(&self, replica: usize) {
        until("the replica to be promoted", || async {
            let nodes = self.nodes_as_seen_by(replica).await;
            nodes
                .lines()
                .any(|line| line.contains("myself,master") && line.split(' ').count() > 8)
                .then_some(())
        })
        .await;
    }

    /// Stops replication from a primary, so that its replica misses what follows.
    pub async fn stop_replication(&self, primary: usize) {
        self.ok(primary, &["ACL", "SETUSER", "default", "-psync", "-sync"]).await;
        self.ok(primary, &["CLIENT", "KILL", "TYPE", "replica"]).await;
    }

    /// Cuts a node off from the others: the cluster bus carries nothing from it and to it.
    pub fn isolate(&self, place: usize) {
        self.isolated.send_replace(Some(self.ids[place].clone()));
    }

    pub fn reconnect(&self) {
        self.isolated.send_replace(None);
    }

    /// Moves slots by `redis-cli --cluster reshard`, those with the lowest numbers first.
    pub async fn reshard(&self, from: usize, to: usize, slots: usize) {
        self.healthy().await;
        let mut command = Command::new("redis-cli");
        command.args(["--cluster", "reshard", &format!("127.0.0.1:{}", self.running().port())]);
        command.args(["--cluster-from", &self.ids[from], "--cluster-to", &self.ids[to]]);
        command.args(["--cluster-slots", &slots.to_string(), "--cluster-yes"]);
        let output = tokio::task::spawn_blocking(move || command.output().expect("redis-cli is there"));
        let output = output.await.expect("nothing panics");
        let (text, errors) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success() && !text.contains("[ERR]"), "reshard: {text}{errors}");
    }

    /// Moves one slot in single steps, with a pause after each key.
    pub async fn move_slot(&self, slot: u16, from: usize, to: usize, pause: std::time::Duration) {
        let (number, port) = (slot.to_string(), self.nodes[to].port().to_string());
        self.ok(to, &["CLUSTER", "SETSLOT", &number, "IMPORTING", &self.ids[from]]).await;
        self.ok(from, &["CLUSTER", "SETSLOT", &number, "MIGRATING", &self.ids[to]]).await;
        loop {
            let keys = self.ok(from, &["CLUSTER", "GETKEYSINSLOT", &number, "1"]).await;
            tokio::time::sleep(pause).await;
            let Some(key) = keys.list().first() else { break };
            self.ok(from, &["MIGRATE", "127.0.0.1", &port, key.text(), "0", "5000"]).await;
        }
        for place in [to, from] {
            self.ok(place, &["CLUSTER", "SETSLOT", &number, "NODE", &self.ids[to]]).await;
        }
    }
}

/// The primaries in CLUSTER NODES with their slots, sorted.
fn slots_in(nodes: &str) -> Vec<String> {
    let slots = nodes.lines().filter_map(|line| {
        let words: Vec<&str> = line.split(' ').collect();
        (words.len() > 8).then(|| format!("{} {}", words[0], words[8..].join(" ")))
    });
    let mut slots: Vec<String> = slots.collect();
    slots.sort_unstable();
    slots
}

/// Whether a line of CLUSTER NODES is that of the node itself, as a primary with this slot.
fn is_own_line_with(line: &str, slot: u16) -> bool {
    let holds = |range: &str| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        matches!((first.parse::<u16>(), last.parse::<u16>()), (Ok(first), Ok(last)) if (first..=last).contains(&slot))
    };
    line.contains("myself,master") && line.split(' ').skip(8).any(holds)
}

/// A proxy before the cluster bus of one node.
struct Bus {
    port: u16,
    accepting: JoinHandle<()>,
}

impl Bus {
    async fn to(target: u16, id: Arc<Mutex<String>>, isolated: watch::Receiver<Option<String>>) -> Bus {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let port = listener.local_addr().expect("it is bound").port();
        let accepting = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(carry(stream, target, id.clone(), isolated.clone()));
            }
        });
        Bus { port, accepting }
    }
}

impl Drop for Bus {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// Carries a link of the cluster bus until its sender or its target is isolated.
async fn carry(
    mut stream: TcpStream,
    target: u16,
    id: Arc<Mutex<String>>,
    mut isolated: watch::Receiver<Option<String>>,
) -> Option<()> {
    let mut head = [0; SENDER.end];
    stream.read_exact(&mut head).await.ok()?;
    let sender = String::from_utf8_lossy(&head[SENDER]).into_owned();
    let is_cut = |isolated: &Option<String>| {
        let own = id.lock().expect("nothing panics while holding it");
        isolated.as_ref().is_some_and(|cut| *cut == sender || *cut == *own)
    };
    if is_cut(&isolated.borrow_and_update()) {
        return None;
    }
    let mut node = TcpStream::connect(("127.0.0.1", target)).await.ok()?;
    node.write_all(&head).await.ok()?;
    tokio::select! {
        _ = tokio::io::copy_bidirectional(&mut stream, &mut node) => {}
        _ = isolated.wait_for(is_cut) => {}
    }
    Some(())
}
