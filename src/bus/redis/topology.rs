//! Which primary of a Redis Cluster has which slots: asked of its nodes every few seconds, and at
//! once when something has changed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use fred::clients::Client;
use fred::interfaces::ClientLike;
use fred::types::Resp3Frame;
use fred::types::config::{Config, Server, ServerConfig};
use tokio::time::timeout;

use super::commands::{Commands, Peers, command};
use super::errors::{CallError, ConnectError, readable};
use super::link::Link;
use super::primaries::{FIRST, Primary};
use super::reply;
use super::session::connection_config;
use super::slots::SlotMap;
use super::status::Status;
use super::{Bus, Outcome, advice};
use crate::bus::Unusable;

/// Time between two looks at the slots while all primaries work.
const INTERVAL: Duration = Duration::from_secs(2);

/// The same while one does not, or after a redirection: a failover or a move of slots is under way.
const INTERVAL_CHANGING: Duration = Duration::from_millis(200);

/// How long a failover may take. After that a primary is looked for less often.
const CHANGING_TIME: Duration = Duration::from_secs(30);

/// Longest wait for one node's answer, and for a new connection to it.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);

/// An older view than the one in use is taken after this long without a newer one: then the cluster
/// was made anew.
const OLDER_AFTER: Duration = Duration::from_secs(10);

/// Nodes of the cluster remembered, as addresses to ask.
const NODES_MAX: usize = 1000;

/// What a node of the cluster says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// `cluster_current_epoch`: it rises with failovers and moved slots. A node that is cut off
    /// keeps an old one.
    pub epoch: u64,
    /// `cluster_state:ok`: the node sees the majority of the primaries.
    pub ok: bool,
    /// First and last slot, and the address of the primary.
    pub slots: Vec<(u16, u16, Arc<str>)>,
    /// Addresses of all nodes, replicas included.
    pub nodes: Vec<Arc<str>>,
}

impl View {
    /// The addresses of the primaries, each once.
    pub fn primaries(&self) -> Vec<Arc<str>> {
        let mut all: Vec<Arc<str>> = self.slots.iter().map(|(.., address)| address.clone()).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// Reads CLUSTER INFO and CLUSTER SLOTS. A node that knows no name of itself leaves out its
    /// host, which is the one it was asked at.
    fn parse(info: &str, slots: &Resp3Frame, host: &str) -> Option<View> {
        let mut view = View {
            epoch: reply::info_number(info, "cluster_current_epoch"),
            ok: reply::info_field(info, "cluster_state") == Some("ok"),
            ..View::default()
        };
        for range in reply::array(slots)? {
            let [first, last, nodes @ ..] = reply::array(range)? else { return None };
            let slot = |frame| reply::integer(frame).and_then(|slot| u16::try_from(slot).ok());
            let mut addresses = nodes.iter().filter_map(|node| {
                let [name, port, ..] = reply::array(node)? else { return None };
                let name = reply::text(name).filter(|name| !name.is_empty() && name != "?");
                let address = format!("{}:{}", name.as_deref().unwrap_or(host), reply::integer(port)?);
                Some(Arc::from(address))
            });
            if let Some(primary) = addresses.next() {
                view.slots.push((slot(first)?, slot(last)?, Arc::clone(&primary)));
                view.nodes.push(primary);
                view.nodes.extend(addresses);
            }
        }
        view.nodes.sort_unstable();
        view.nodes.dedup();
        view.nodes.truncate(NODES_MAX);
        Some(view)
    }
}

/// Asks a node.
async fn ask(client: &Client, host: &str) -> Result<View, CallError> {
    let info = command(client, "CLUSTER", vec!["INFO".into()]).await?;
    let slots = command(client, "CLUSTER", vec!["SLOTS".into()]).await?;
    let view = View::parse(&reply::text(&info).unwrap_or_default(), &slots, host);
    view.ok_or_else(|| CallError::unexpected_reply("CLUSTER SLOTS"))
}

/// The address of the only server in a configuration.
pub fn address_of(config: &Config) -> Option<Arc<str>> {
    let ServerConfig::Centralized { server } = &config.server else { return None };
    Some(format!("{}:{}", server.host.trim_matches(['[', ']']), server.port).into())
}

pub fn host_of(address: &str) -> &str {
    address.rsplit_once(':').map_or(address, |(host, _)| host)
}

/// `config` for another node of the cluster.
pub fn config_at(address: &str, config: &Config) -> Config {
    let mut config = config.clone();
    if let Some((host, port)) = address.rsplit_once(':') {
        let host = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
        let server = Server::new(host, port.parse().unwrap_or_default());
        config.server = ServerConfig::Centralized { server };
    }
    config
}

/// The newest view of those that nodes of the cluster have: of open sessions, else of `addresses`.
/// The first of at least `epoch` is enough.
pub async fn look(
    peers: &Peers,
    addresses: &[Arc<str>],
    config: &Config,
    epoch: u64,
) -> Result<View, ConnectError> {
    let mut best: Option<View> = None;
    let mut failure = ConnectError::Unreachable("no addresses of the cluster".into());
    for commands in peers.all() {
        if let Ok(Ok(view)) = timeout(ANSWER_TIMEOUT, ask_session(&commands)).await
            && is_enough(&mut best, view, epoch)
        {
            return Ok(best.expect("it was just found"));
        }
    }
    for address in addresses {
        match ask_address(address, config).await {
            Ok(view) => {
                if is_enough(&mut best, view, epoch) {
                    break;
                }
            }
            Err(error) => failure = error,
        }
    }
    best.ok_or(failure)
}

async fn ask_session(commands: &Commands) -> Result<View, CallError> {
    ask(commands.client(), commands.host()).await
}

async fn ask_address(address: &str, config: &Config) -> Result<View, ConnectError> {
    let unreachable = |text: String| ConnectError::Unreachable(text);
    let client = Client::new(config_at(address, config), None, Some(connection_config(Vec::new())), None);
    let asked = async {
        let opened = timeout(ANSWER_TIMEOUT, client.init()).await;
        let opened = opened.map_err(|_| unreachable(format!("{address} does not answer in time")))?;
        opened.map_err(super::session::connect_error)?;
        let answer = timeout(ANSWER_TIMEOUT, ask(&client, host_of(address))).await;
        match answer.map_err(|_| unreachable(format!("{address} does not answer in time")))? {
            Ok(view) => Ok(view),
            Err(CallError::ErrorReply(text)) if text.contains("cluster support disabled") => {
                Err(ConnectError::Unsupported(
                    "the server at --redis is not a node of a Redis Cluster: use redis://HOST:PORT".into(),
                ))
            }
            Err(CallError::ErrorReply(text)) => Err(ConnectError::Rejected(text.to_string())),
            Err(error) => Err(unreachable(error.text().to_string())),
        }
    };
    let result = asked.await;
    // fred's task ends with the last of its clients only after QUIT.
    let _ = timeout(ANSWER_TIMEOUT, client.quit()).await;
    result
}

/// Keeps the better of two views. True if it needs no other.
fn is_enough(best: &mut Option<View>, view: View, epoch: u64) -> bool {
    let rank = |view: &View| (view.ok, view.epoch, !view.slots.is_empty());
    let enough = view.ok && view.epoch >= epoch && !view.slots.is_empty();
    if best.as_ref().is_none_or(|best| rank(&view) > rank(best)) {
        *best = Some(view);
    }
    enough
}

/// The search for the primaries of a cluster.
pub struct Topology {
    /// Login and TLS for all nodes.
    config: Config,
    /// The nodes that `--redis` names.
    seeds: Vec<Arc<str>>,
    pub peers: Arc<Peers>,
    /// The view in use.
    view: View,
    /// When it was last confirmed.
    seen: Option<Instant>,
    asking: bool,
    /// Since when a primary is away.
    away_since: Option<Instant>,
    last: Instant,
    next: Instant,
}

impl Topology {
    pub fn new(configs: &[Config]) -> Topology {
        Topology {
            config: configs[0].clone(),
            seeds: configs.iter().filter_map(address_of).collect(),
            peers: Arc::default(),
            view: View::default(),
            seen: None,
            asking: false,
            away_since: None,
            last: Instant::now(),
            next: Instant::now(),
        }
    }

    /// Looks soon: something has changed.
    pub fn look_soon(&mut self) {
        self.next = self.next.min(self.last + INTERVAL_CHANGING);
    }

    /// Whether to use this view.
    fn accepts(&self, view: &View, now: Instant) -> bool {
        let is_old = self.seen.is_some_and(|seen| now.duration_since(seen) > OLDER_AFTER);
        let is_newer = view.ok && (view.epoch >= self.view.epoch || !self.view.ok);
        !view.slots.is_empty() && (is_newer || is_old || self.seen.is_none())
    }
}

impl Bus {
    /// A slot is not where it was.
    pub(super) fn look_for_slots(&mut self) {
        if let Some(topology) = &mut self.topology {
            topology.look_soon();
        }
    }

    /// Looks at the slots if that is due.
    pub(super) fn check_topology(&mut self, now: Instant) {
        let Some(topology) = &mut self.topology else { return };
        let is_away =
            |(at, primary): (usize, &Primary)| at != FIRST && *primary.link.status() != Status::Working;
        topology.away_since = match self.primaries.iter().any(is_away) {
            true => Some(topology.away_since.unwrap_or(now)),
            false => None,
        };
        if topology.peers.take_redirected() {
            topology.look_soon();
        }
        if topology.asking || now < topology.next {
            return;
        }
        topology.asking = true;
        topology.last = now;
        let is_changing = topology.away_since.is_some_and(|since| now.duration_since(since) < CHANGING_TIME);
        topology.next = now + if is_changing { INTERVAL_CHANGING } else { INTERVAL };
        let mut addresses = topology.view.nodes.clone();
        addresses.extend(topology.seeds.iter().filter(|seed| !topology.view.nodes.contains(seed)).cloned());
        let (peers, config, epoch) = (topology.peers.clone(), topology.config.clone(), topology.view.epoch);
        let outcomes = self.handles.outcomes.clone();
        tokio::spawn(async move {
            let found = look(&peers, &addresses, &config, epoch).await;
            let _ = outcomes.send(Outcome::Topology(found));
        });
    }

    pub(super) fn on_topology(&mut self, found: Result<View, ConnectError>) -> Result<(), Unusable> {
        let Some(topology) = &mut self.topology else { return Ok(()) };
        topology.asking = false;
        let now = Instant::now();
        match found {
            Ok(view) if topology.accepts(&view, now) => {
                topology.seen = Some(now);
                let is_same = topology.view.slots == view.slots;
                topology.view = view;
                if !is_same {
                    self.apply_slots();
                }
            }
            Ok(view) => {
                tracing::debug!(epoch = view.epoch, ok = view.ok, "ignored old view of the cluster");
                if !self.primaries.is_cluster_known() {
                    let error = "the cluster has no slots";
                    self.set_status(FIRST, Status::unreachable(error), Some(error));
                }
            }
            Err(ConnectError::Unsupported(text)) if !self.primaries.is_cluster_known() => {
                return Err(Unusable(text));
            }
            Err(ConnectError::Rejected(text)) if !self.primaries.is_cluster_known() => {
                self.set_status(FIRST, Status::rejecting(&text), Some(&text));
            }
            Err(error) if !self.primaries.is_cluster_known() => {
                let text = match error {
                    ConnectError::Unreachable(text) => text,
                    other => readable(&format!("{other:?}")),
                };
                self.set_status(FIRST, Status::unreachable(&text), Some(&text));
            }
            Err(_) => {} // the sessions report what is wrong
        }
        Ok(())
    }

    /// Makes and removes primaries, and moves channels, after the view has changed.
    fn apply_slots(&mut self) {
        let Some(topology) = &self.topology else { return };
        let (view, config) = (topology.view.clone(), topology.config.clone());
        let mut slots = SlotMap::all_at(FIRST);
        for (first, last, address) in &view.slots {
            let primary = self.primaries.find(address).unwrap_or_else(|| {
                let link = Link::new(super::connecting(address), Some(Instant::now()));
                let longest = self.handles.settings.max_message_size;
                let config = config_at(address, &config);
                tracing::info!(%address, "found primary of the cluster");
                self.primaries.add(Primary::new(Some(address.clone()), config, link, longest))
            });
            slots.assign(*first, *last, primary);
        }
        if !self.primaries.set_slots(slots) {
            return;
        }
        self.primaries[FIRST].link.set_status(Status::Unreachable(advice::NO_PRIMARY));
        self.move_channels();
        let gone: Vec<usize> = self
            .primaries
            .numbers()
            .into_iter()
            .filter(|at| {
                *at != FIRST
                    && !view.slots.iter().any(|slot| Some(&slot.2) == self.primaries[*at].address.as_ref())
            })
            .collect();
        for primary in gone {
            self.remove_primary(primary);
        }
        self.report_readiness();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &'static str) -> Resp3Frame {
        Resp3Frame::BlobString { data: text.into(), attributes: None }
    }

    fn number(data: i64) -> Resp3Frame {
        Resp3Frame::Number { data, attributes: None }
    }

    fn list(data: Vec<Resp3Frame>) -> Resp3Frame {
        Resp3Frame::Array { data, attributes: None }
    }

    #[test]
    fn view_has_slots_and_nodes() {
        let node = |host, port| list(vec![text(host), number(port), text("id"), list(vec![])]);
        let slots = list(vec![
            list(vec![number(0), number(99), node("10.0.0.1", 7000), node("10.0.0.2", 7001)]),
            list(vec![number(100), number(16383), node("", 7002)]),
        ]);
        let info = "cluster_state:ok\r\ncluster_current_epoch:7\r\n";
        let view = View::parse(info, &slots, "a.example").unwrap();
        assert_eq!((view.ok, view.epoch), (true, 7));
        assert_eq!(view.slots, [(0, 99, "10.0.0.1:7000".into()), (100, 16383, "a.example:7002".into())]);
        assert_eq!(view.nodes.len(), 3);
        assert_eq!(view.primaries(), ["10.0.0.1:7000".into(), "a.example:7002".into()]);
        assert_eq!(View::parse(info, &number(1), "a"), None);
    }

    #[test]
    fn newest_view_of_the_majority_is_used() {
        let view = |ok, epoch| View { ok, epoch, slots: vec![(0, 1, "a:1".into())], nodes: Vec::new() };
        let mut best = None;
        assert!(!is_enough(&mut best, view(false, 9), 5));
        assert!(!is_enough(&mut best, view(true, 4), 5));
        assert_eq!(best, Some(view(true, 4)));
        assert!(is_enough(&mut best, view(true, 5), 5));

        let config = Config::from_url("redis://u:p@a:1").unwrap();
        let mut topology = Topology::new(&[config]);
        let now = Instant::now();
        assert!(topology.accepts(&view(false, 1), now), "better than nothing");
        (topology.view, topology.seen) = (view(true, 5), Some(now));
        assert!(topology.accepts(&view(true, 5), now));
        assert!(!topology.accepts(&view(true, 4), now), "a node that was cut off");
        assert!(!topology.accepts(&view(false, 6), now));
        assert!(topology.accepts(&view(true, 4), now + 2 * OLDER_AFTER), "the cluster was made anew");
        assert!(!topology.accepts(&View { ok: true, epoch: 9, ..View::default() }, now));
    }

    #[test]
    fn addresses_may_be_ipv6() {
        let config = Config::from_url("rediss://u:p@a:1").unwrap();
        let at = config_at("::1:7000", &config);
        assert_eq!(address_of(&at).as_deref(), Some("::1:7000"));
        assert_eq!((at.username, at.password), (config.username, config.password));
    }
}
