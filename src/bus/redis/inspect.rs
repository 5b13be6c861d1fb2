//! Inspects a Redis for `fanfare doctor`, before nodes use it. Changes nothing, not even the
//! function that nodes load.

use std::collections::HashMap;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use fred::clients::Client;
use fred::interfaces::ClientLike;
use fred::types::config::Config;
use fred::types::{Resp3Frame, Value};
use tokio::time::{sleep, timeout};

use super::commands::{Peers, command};
use super::errors::{CallError, ConnectError, MissingRights};
pub use super::publish_queue::BATCH_BYTES;
use super::requirements::check_permissions;
pub use super::server::Server;
use super::settings::RedisSettings;
use super::{advice, reply, session, topology, url};
use crate::config::{RedisUrl, Settings};
use crate::protocol::event::ChannelName;

/// Longest time for everything but the sample.
const INSPECT_TIMEOUT: Duration = Duration::from_secs(15);
/// How long events are counted.
pub const SAMPLE: Duration = Duration::from_secs(2);
/// Most keys scanned, since Redis may hold millions of other programs' keys.
const SCANNED_MAX: usize = 200_000;
/// Most channels inspected.
const CHANNELS_MAX: usize = 200;
/// Keys in one SCAN: well below a millisecond of Redis' time.
const SCAN_COUNT: usize = 1000;

/// Facts about a Redis. Sizes in bytes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Facts {
    pub server: Server,
    /// Median of a few.
    pub round_trip: Duration,
    /// In Redis' words: `master` for a primary, `slave` for a replica.
    pub role: String,
    /// Connected replicas.
    pub replicas: u64,
    /// Limit of memory for data; 0 is no limit.
    pub maxmemory: u64,
    /// What happens when `maxmemory` is reached.
    pub policy: String,
    /// Memory in use.
    pub used: u64,
    /// Memory of its host; 0 if unknown.
    pub host: u64,
    /// The settings that `CONFIG GET` returns to this user.
    pub config: HashMap<String, String>,
    pub missing_rights: Option<MissingRights>,
    /// Commands and INFO fields that a node needs and this Redis lacks.
    pub unavailable: Option<String>,
    /// How far its clock is ahead of this host's, in seconds, and how uncertain that is.
    pub clock: (f64, f64),
    /// The first channels found that have history.
    pub channels: Vec<History>,
    /// There may be more channels.
    pub more: bool,
}

impl Facts {
    /// What the eviction policy does.
    pub fn eviction(&self) -> String {
        advice::for_eviction(&self.policy, self.maxmemory)
    }
}

/// A channel's history.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct History {
    pub name: String,
    /// Events kept.
    pub events: u64,
    pub bytes: u64,
    /// Events per second since the sequence started, if known.
    pub since_start: Option<f64>,
    /// Events per second in the sample.
    pub now: f64,
}

/// Facts, or what is wrong and what to do.
pub type Inspected = Result<Facts, String>;

/// Inspects a Redis. Of a cluster it inspects each primary, with its address.
///
/// # Errors
/// What is wrong with all of it and what to do.
pub async fn inspect(
    settings: &Settings,
    url: &RedisUrl,
) -> Result<Vec<(Option<String>, Inspected)>, String> {
    url::check_ca_certificates(url).map_err(|error| error.to_string())?;
    let configs = url::configs(url).map_err(|error| error.problem)?;
    if !url.is_cluster() {
        return Ok(vec![(None, inspect_server(settings, configs[0].clone()).await)]);
    }
    let seeds: Vec<_> = configs.iter().filter_map(topology::address_of).collect();
    let view = topology::look(&Peers::default(), &seeds, &configs[0], u64::MAX).await.map_err(explain)?;
    let inspected = view.primaries().into_iter().map(|address| {
        let config = topology::config_at(&address, &configs[0]);
        async move { (Some(address.to_string()), inspect_server(settings, config).await) }
    });
    let mut primaries = Vec::new();
    for primary in inspected {
        primaries.push(primary.await);
    }
    if primaries.is_empty() {
        Err("the cluster has no slots: see CLUSTER INFO".into())
    } else {
        Ok(primaries)
    }
}

async fn inspect_server(settings: &Settings, config: Config) -> Inspected {
    let client = Client::new(config, None, Some(session::connection_config(Vec::new())), None);
    let result = timeout(INSPECT_TIMEOUT + SAMPLE, collect(&client, &RedisSettings::new(settings))).await;
    // Whatever comes of it, this process exits soon.
    let _ = timeout(Duration::from_secs(1), client.quit()).await;
    match result {
        Ok(result) => result.map_err(explain),
        Err(_) => {
            let advice = advice::for_connection("no reply");
            Err(format!("{advice} (not finished within {INSPECT_TIMEOUT:?})"))
        }
    }
}

fn explain(error: ConnectError) -> String {
    match error {
        ConnectError::Unsupported(text) => text,
        ConnectError::NotPermitted(rights) => rights.to_string(),
        ConnectError::Unavailable(what) => advice::for_unavailable(&what),
        ConnectError::Unreachable(error) => format!("{} ({error})", advice::for_connection(&error)),
        ConnectError::Rejected(error) => format!("{} ({error})", advice::for_error_reply(&error)),
    }
}

async fn collect(client: &Client, settings: &RedisSettings) -> Result<Facts, ConnectError> {
    let (_, info) = session::open(client, settings.kind).await?;
    let field = |name: &str| reply::info_field(&info, name).unwrap_or_default();
    let number = |name: &str| reply::info_number(&info, name);
    let mut facts = Facts {
        server: Server::of(&info),
        role: field("role").into(),
        replicas: number("connected_slaves"),
        maxmemory: number("maxmemory"),
        policy: field("maxmemory_policy").into(),
        used: number("used_memory"),
        host: number("total_system_memory"),
        ..Facts::default()
    };
    match check_permissions(client, settings).await {
        Err(ConnectError::NotPermitted(rights)) => facts.missing_rights = Some(rights),
        Err(ConnectError::Unavailable(what)) => facts.unavailable = Some(what),
        result => result?,
    }
    clock(client, &mut facts).await?;
    facts.config = config(client).await?;
    histories(client, settings, &mut facts).await?;
    Ok(facts)
}

/// Sends a command that managed services may reject: `None` then.
async fn optional(
    client: &Client,
    name: &'static str,
    args: Vec<Value>,
) -> Result<Option<Resp3Frame>, ConnectError> {
    match command(client, name, args).await {
        Ok(frame) => Ok(Some(frame)),
        Err(CallError::ErrorReply(_)) => Ok(None),
        Err(error) => Err(ConnectError::Unreachable(error.text().to_string())),
    }
}

/// Asks for the time a few times. The fastest reply is the most accurate.
async fn clock(client: &Client, facts: &mut Facts) -> Result<(), ConnectError> {
    let mut samples = Vec::new();
    for _ in 0..5 {
        let (started, before) = (Instant::now(), SystemTime::now());
        let Some(answer) = optional(client, "TIME", Vec::new()).await? else { return Ok(()) };
        let took = started.elapsed();
        let Ok(before) = before.duration_since(UNIX_EPOCH) else { return Ok(()) };
        let [seconds, micros] = &reply::texts(&answer)[..] else { return Ok(()) };
        let theirs = seconds.parse().unwrap_or(0.0) + micros.parse().unwrap_or(0.0) / 1e6;
        samples.push((took, theirs - (before + took / 2).as_secs_f64()));
    }
    samples.sort_by_key(|(took, _)| *took);
    facts.round_trip = samples[samples.len() / 2].0;
    facts.clock = (samples[0].1, samples[0].0.as_secs_f64() / 2.0);
    Ok(())
}

async fn config(client: &Client) -> Result<HashMap<String, String>, ConnectError> {
    let mut found = HashMap::new();
    for name in [
        "client-output-buffer-limit",
        "appendonly",
        "appendfsync",
        "save",
        "min-replicas-to-write",
        "repl-backlog-ttl",
        "cluster-require-full-coverage",
        "proto-max-bulk-len",
        "client-query-buffer-limit",
    ] {
        // One by one: a managed service may hide some of them.
        if let Some(answer) = optional(client, "CONFIG", vec!["GET".into(), name.into()]).await?
            && let [name, value] = &reply::pairs(&answer)[..]
        {
            found.insert(name.clone(), value.clone());
        }
    }
    Ok(found)
}

async fn histories(client: &Client, settings: &RedisSettings, facts: &mut Facts) -> Result<(), ConnectError> {
    let escaped: String = settings
        .prefix
        .chars()
        .flat_map(|c| if "*?[]\\".contains(c) { vec!['\\', c] } else { vec![c] })
        .collect();
    let pattern = format!("{escaped}:{{*}}:events");
    let (mut cursor, mut scanned) = ("0".to_owned(), 0);
    loop {
        let args = vec![
            cursor.into(),
            "MATCH".into(),
            pattern.as_str().into(),
            "COUNT".into(),
            (SCAN_COUNT as i64).into(),
        ];
        let Some(answer) = optional(client, "SCAN", args).await? else { break };
        let Some((next, keys)) = reply::scan(&answer) else { break };
        scanned += SCAN_COUNT;
        for key in keys {
            let name = key
                .strip_prefix(&format!("{}:{{", settings.prefix))
                .and_then(|rest| rest.strip_suffix("}:events"));
            // Commands to nodes are no channel's.
            let name = name.filter(|name| ChannelName::parse(name).is_some());
            // SCAN may return a key twice while Redis resizes its table.
            if let Some(name) = name.filter(|name| facts.channels.iter().all(|known| known.name != *name)) {
                facts.channels.push(History { name: name.into(), ..History::default() });
            }
        }
        if next == "0" {
            break;
        }
        if scanned >= SCANNED_MAX || facts.channels.len() >= CHANNELS_MAX {
            facts.more = true;
            break;
        }
        cursor = next;
    }
    let mut first = Vec::new();
    for channel in &mut facts.channels {
        let events = format!("{}:{{{}}}:events", settings.prefix, channel.name);
        let length = optional(client, "XLEN", vec![events.as_str().into()]).await?;
        channel.events = length.as_ref().and_then(reply::integer).unwrap_or(0);
        let size = optional(client, "MEMORY", vec!["USAGE".into(), events.into()]).await?;
        channel.bytes = size.as_ref().and_then(reply::integer).unwrap_or(0);
        first.push((Instant::now(), position(client, settings, &channel.name).await?));
    }
    if facts.channels.is_empty() {
        return Ok(());
    }
    sleep(SAMPLE).await;
    for (channel, (started, before)) in facts.channels.iter_mut().zip(first) {
        let (Some((head, base)), Some((head_before, base_before))) =
            (position(client, settings, &channel.name).await?, before)
        else {
            continue;
        };
        if base != base_before {
            continue; // a new epoch: nothing to compare
        }
        channel.now = head.saturating_sub(head_before) as f64 / started.elapsed().as_secs_f64();
        // A sequence starts at the clock of Redis in microseconds, unless that was set back.
        let clock =
            SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |now| now.as_secs_f64()) + facts.clock.0;
        let age = clock - base as f64 / 1e6;
        channel.since_start = (age > 1.0).then(|| head.saturating_sub(base) as f64 / age);
    }
    Ok(())
}

/// A channel's head and base.
async fn position(
    client: &Client,
    settings: &RedisSettings,
    channel: &str,
) -> Result<Option<(u64, u64)>, ConnectError> {
    let key = format!("{}:{{{channel}}}:meta", settings.prefix);
    let Some(answer) = optional(client, "HMGET", vec![key.into(), "head".into(), "base".into()]).await?
    else {
        return Ok(None);
    };
    let [head, base] = &reply::texts(&answer)[..] else { return Ok(None) };
    Ok(head.parse().ok().zip(base.parse().ok()))
}
