//! Processes of fanfare.

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, ExitStatus};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use super::http::{self, Response};
use super::process::Process;
use super::rng::Rng;
use super::{Cgroup, Redis, until};

/// A running node on free ports. Dropping it kills it.
pub struct Node {
    process: Process,
    /// The address of its public listener.
    pub public: SocketAddr,
    /// The address of its admin listener.
    pub admin: SocketAddr,
}

impl Node {
    /// Starts a node and waits until it is ready.
    pub async fn start(flags: &[&str]) -> Node {
        let node = Node::start_unready(flags).await;
        node.ready().await;
        node
    }

    /// Starts a node on this Redis and waits until it is ready.
    pub async fn on(redis: &Redis, flags: &[&str]) -> Node {
        Node::start(&[&["--redis", &redis.url()], flags].concat()).await
    }

    /// Starts a node with this limit on open files, and waits until it is ready.
    pub async fn start_with_files(files: u32, flags: &[&str]) -> Node {
        let mut command = Command::new("sh");
        command.args(["-c", &format!("ulimit -n {files} && exec \"$0\" \"$@\"")]);
        command.arg(env!("CARGO_BIN_EXE_fanfare"));
        let node = Node::start_by(command, flags).await;
        node.ready().await;
        node
    }

    /// Starts a node in a cgroup, and waits until it is ready.
    pub async fn start_in(cgroup: &Cgroup, flags: &[&str]) -> Node {
        let mut command = Command::new("sh");
        command.args(["-c", &format!("echo $$ > '{}' && exec \"$0\" \"$@\"", cgroup.processes().display())]);
        command.arg(env!("CARGO_BIN_EXE_fanfare"));
        let node = Node::start_by(command, flags).await;
        node.ready().await;
        node
    }

    /// Starts a node with this environment variable, and waits for its ready line only.
    pub async fn start_unready_with(name: &str, value: &Path, flags: &[&str]) -> Node {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fanfare"));
        command.env(name, value);
        Node::start_by(command, flags).await
    }

    /// Starts a node and waits for its ready line only.
    pub async fn start_unready(flags: &[&str]) -> Node {
        Node::start_by(Command::new(env!("CARGO_BIN_EXE_fanfare")), flags).await
    }

    async fn start_by(mut command: Command, flags: &[&str]) -> Node {
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("FANFARE_")) {
            command.env_remove(name);
        }
        for flag in ["--listen", "--admin"].iter().filter(|flag| !flags.contains(flag)) {
            command.args([flag, "127.0.0.1:0"]);
        }
        command.args(flags);
        let process = Process::start("fanfare", &mut command);
        let addresses = process.line("the ready line", addresses).await;
        let (public, admin) = addresses.unwrap_or_else(|ended| panic!("{ended}"));
        Node { process, public, admin }
    }

    /// Waits until `/readyz` answers 200.
    pub async fn ready(&self) {
        until("a node that is ready", || async { (self.get("/readyz").await.status == 200).then_some(()) })
            .await;
    }

    /// Waits until `/readyz` answers 503. Returns the reason that the admin listener gives.
    pub async fn unready(&self) -> String {
        until("a node that is not ready", || async {
            if self.get("/readyz").await.status != 503 {
                return None;
            }
            let response = self.admin("GET", "/readyz", b"").await;
            (response.status == 503).then_some(response.body)
        })
        .await
    }

    /// GET on the public listener.
    pub async fn get(&self, path: &str) -> Response {
        http::request(self.public, "GET", path, &[], b"").await
    }

    /// A request to the admin listener.
    pub async fn admin(&self, method: &str, path: &str, body: &[u8]) -> Response {
        self.admin_with(method, path, &[], body).await
    }

    /// The same with headers.
    pub async fn admin_with(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Response {
        http::request(self.admin, method, path, headers, body).await
    }

    /// Publishes by `POST /publish`, which must succeed. Returns the id.
    pub async fn publish(&self, channel: &str, event: &Value) -> u64 {
        self.post(&format!("/publish?channel={channel}"), event).await
    }

    /// Publishes to one user.
    pub async fn publish_to(&self, channel: &str, user: &str, event: &Value) -> u64 {
        self.post(&format!("/publish?channel={channel}&to={user}"), event).await
    }

    /// Publishes `{"n":first}`, `{"n":first+1}`… and returns their ids.
    pub async fn publish_numbers(&self, channel: &str, numbers: std::ops::Range<u64>) -> Vec<u64> {
        let mut ids = Vec::new();
        for n in numbers {
            ids.push(self.publish(channel, &json!({ "n": n })).await);
        }
        ids
    }

    async fn post(&self, path: &str, event: &Value) -> u64 {
        self.id_of("POST", path, &event.to_string()).await
    }

    /// Sends a command about the connections of a user, which the node must accept. Returns its id.
    pub async fn order(&self, method: &str, path: &str) -> u64 {
        self.id_of(method, path, "").await
    }

    /// Disconnects a user. Returns the id of the command.
    pub async fn disconnect(&self, query: &str) -> u64 {
        self.order("POST", &format!("/disconnect?{query}")).await
    }

    /// Sends a request that the node must accept. Returns the id in the response.
    async fn id_of(&self, method: &str, path: &str, body: &str) -> u64 {
        let response = self.admin(method, path, body.as_bytes()).await;
        assert_eq!(response.status, 200, "{method} {path} {body}: {}", response.body);
        response.json()["id"].as_u64().unwrap_or_else(|| panic!("no id in {}", response.body))
    }

    /// A value of `/metrics`: the sum of all series of this name, or one series with its labels.
    pub async fn metric(&self, name: &str) -> f64 {
        let metrics = self.admin("GET", "/metrics", b"").await.body;
        let series = metrics.lines().filter(|line| {
            line.strip_prefix(name).is_some_and(|rest| rest.starts_with(' ') || rest.starts_with('{'))
        });
        let mut values =
            series.map(|line| line.rsplit(' ').next().and_then(|value| value.parse::<f64>().ok()));
        let first = values.next().unwrap_or_else(|| panic!("no metric {name} in\n{metrics}"));
        values.fold(first, |sum, value| Some(sum? + value?)).expect("a metric's value is a number")
    }

    /// One series of `/metrics`, by its only label: `reason="protocol"`.
    pub async fn metric_of(&self, name: &str, label: &str) -> f64 {
        let metrics = self.admin("GET", "/metrics", b"").await.body;
        let series = format!("{name}{{{label}}} ");
        let value = metrics.lines().find_map(|line| line.strip_prefix(&series));
        value.and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("no {series} in\n{metrics}"))
    }

    /// Resident memory in bytes.
    pub fn resident(&self) -> u64 {
        self.memory("VmRSS:")
    }

    /// Private resident memory in bytes, without the program itself.
    pub fn anonymous(&self) -> u64 {
        self.memory("RssAnon:")
    }

    fn memory(&self, field: &str) -> u64 {
        let path = format!("/proc/{}/status", self.process.pid());
        let status = std::fs::read_to_string(path).expect("the node runs");
        let line = status.lines().find(|line| line.starts_with(field)).expect("Linux shows it");
        line.split_whitespace().nth(1).and_then(|kb| kb.parse::<u64>().ok()).expect("a number of kB") * 1024
    }

    /// The number of open descriptors.
    pub fn descriptors(&self) -> u64 {
        let open = std::fs::read_dir(format!("/proc/{}/fd", self.process.pid())).expect("the node runs");
        open.count() as u64
    }

    /// Changes the limit on open files of the running process.
    pub fn limit_files(&self, files: u64) {
        let pid = self.process.pid().to_string();
        let status = Command::new("prlimit").args(["--pid", &pid, &format!("--nofile={files}")]).status();
        assert!(status.expect("prlimit is there").success(), "can't limit files to {files}");
    }

    /// All output so far.
    pub fn log(&self) -> String {
        self.process.output().join("\n")
    }

    /// Sends a signal: `TERM`, `STOP`, `CONT`.
    pub fn signal(&self, signal: &str) {
        self.process.signal(signal);
    }

    /// Kills it, as in a crash.
    pub fn kill(&self) {
        self.process.kill();
    }

    /// Waits for its exit.
    pub async fn ended(&self) -> ExitStatus {
        self.process.ended().await
    }
}

/// Nodes that may be replaced while clients connect to them.
#[derive(Clone, Default)]
pub struct Nodes(Arc<Mutex<Vec<Arc<Node>>>>);

impl Nodes {
    pub fn new(nodes: impl IntoIterator<Item = Node>) -> Nodes {
        Nodes(Arc::new(Mutex::new(nodes.into_iter().map(Arc::new).collect())))
    }

    pub fn of(node: Arc<Node>) -> Nodes {
        Nodes(Arc::new(Mutex::new(vec![node])))
    }

    /// The node with this number.
    pub fn get(&self, number: usize) -> Arc<Node> {
        self.0.lock().expect("nothing panics while holding it")[number].clone()
    }

    pub fn all(&self) -> Vec<Arc<Node>> {
        self.0.lock().expect("nothing panics while holding it").clone()
    }

    /// A random node.
    pub fn any(&self, rng: &mut Rng) -> Arc<Node> {
        let nodes = self.0.lock().expect("nothing panics while holding it");
        nodes[rng.index(nodes.len())].clone()
    }

    /// Replaces a node.
    pub fn replace(&self, number: usize, node: Node) {
        self.0.lock().expect("nothing panics while holding it")[number] = Arc::new(node);
    }
}

/// Reads `… serving http://127.0.0.1:1/ (admin http://127.0.0.1:2/): open …`.
fn addresses(line: &str) -> Option<(SocketAddr, SocketAddr)> {
    let address = |after: &str| line.split_once(after)?.1.split_once('/')?.0.parse().ok();
    Some((address(" serving http://")?, address("(admin http://")?))
}
