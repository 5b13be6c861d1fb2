//! Inspects a Redis before a launch, for `fanfare doctor`. It changes nothing, not even the function that nodes load.

use std::collections::HashMap;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use fred::clients::Client;
use fred::interfaces::ClientLike;
use fred::types::config::Config;
use fred::types::{Resp3Frame, Value};
use tokio::time::{sleep, timeout};

use super::commands::command;
use super::errors::CallError;
use super::errors::ConnectError;
use super::requirements::{check_permissions, check_server, field as info_field};
use super::session;
use super::settings::Terms;
use super::{advice, reply};
use crate::config::{RedisUrl, Settings};

/// Longest that the whole look may take, but for the sample.
const LOOK_TIME: Duration = Duration::from_secs(15);
/// How long events are counted.
pub const SAMPLE: Duration = Duration::from_secs(2);
/// Keys looked through in a Redis that may hold millions of others, and channels looked at.
const KEYS: usize = 200_000;
const CHANNELS: usize = 200;
/// Keys that one SCAN looks through: well below a millisecond of Redis' time.
const SCAN: usize = 1000;

/// What was found. Sizes in bytes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Facts {
    /// Its version.
    pub version: String,
    /// The way there and back, in the median of a few.
    pub round_trip: Duration,
    /// `master` or `slave`.
    pub role: String,
    /// Replicas in touch.
    pub replicas: u64,
    /// The most memory it takes for data; 0 is no limit.
    pub maxmemory: u64,
    /// What it does when that is full.
    pub policy: String,
    /// Memory in use.
    pub used: u64,
    /// Memory of its host; 0 where it does not say.
    pub host: u64,
    /// What `CONFIG GET` says; a setting that is refused or unknown is not in it.
    pub config: HashMap<String, String>,
    /// What a node would not be permitted, and what to grant.
    pub not_permitted: Option<String>,
    /// Commands and fields that a node needs and this Redis does not have.
    pub lacking: Option<String>,
    /// How far its clock is ahead of this host's, in seconds, and how uncertain that is.
    pub clock: (f64, f64),
    /// Channels that have history, the first of those found.
    pub channels: Vec<History>,
    /// Whether there may be more of them.
    pub more: bool,
}

/// A channel's history.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct History {
    /// The channel.
    pub name: String,
    /// Events kept.
    pub events: u64,
    /// What they take.
    pub bytes: u64,
    /// Events a second since its sequence began, if that can be told.
    pub since_begin: Option<f64>,
    /// Events a second in the sample.
    pub now: f64,
}

/// Looks.
///
/// # Errors
/// What is wrong, in words that say what to do.
pub async fn inspect(settings: &Settings, url: &RedisUrl) -> Result<Facts, String> {
    let config = Config::from_url(&url.0).map_err(|error| error.details().to_owned())?;
    let client = Client::new(config, None, Some(session::connection_config(Vec::new())), None);
    let result = timeout(LOOK_TIME + SAMPLE, look(&client, &Terms::new(settings))).await;
    // Whether it hears that or not, this process ends.
    let _ = timeout(Duration::from_secs(1), client.quit()).await;
    match result {
        Ok(Ok(facts)) => Ok(facts),
        Ok(Err(ConnectError::Unusable(text) | ConnectError::NotPermitted(text))) => Err(text),
        Ok(Err(ConnectError::Lacking(what))) => Err(advice::lacking(&what)),
        Ok(Err(ConnectError::Away(words))) => Err(format!("{} ({words})", advice::away(&words))),
        Ok(Err(ConnectError::Refused(words))) => Err(format!("{} ({words})", advice::refused(&words))),
        Err(_) => Err(format!("{} (no end within {LOOK_TIME:?})", advice::away("no answer"))),
    }
}

async fn look(client: &Client, terms: &Terms) -> Result<Facts, ConnectError> {
    client.init().await.map_err(session::not_connected)?;
    let info = check_server(client).await?;
    let field = |name: &str| info_field(&info, name).unwrap_or_default();
    let number = |name: &str| field(name).parse().unwrap_or(0);
    let mut facts = Facts {
        version: field("redis_version").into(),
        role: field("role").into(),
        replicas: number("connected_slaves"),
        maxmemory: number("maxmemory"),
        policy: field("maxmemory_policy").into(),
        used: number("used_memory"),
        host: number("total_system_memory"),
        ..Facts::default()
    };
    match check_permissions(client, terms).await {
        Err(ConnectError::NotPermitted(text)) => facts.not_permitted = Some(text),
        Err(ConnectError::Lacking(what)) => facts.lacking = Some(what),
        result => result?,
    }
    clock(client, &mut facts).await?;
    facts.config = settings(client).await?;
    histories(client, terms, &mut facts).await?;
    Ok(facts)
}

/// A command that may be refused, as managed services do with some: `None` then.
async fn ask(
    client: &Client,
    name: &'static str,
    args: Vec<Value>,
) -> Result<Option<Resp3Frame>, ConnectError> {
    match command(client, name, args).await {
        Ok(frame) => Ok(Some(frame)),
        Err(CallError::Refused(_)) => Ok(None),
        Err(CallError::Lost(words)) => Err(ConnectError::Away(words.to_string())),
    }
}

/// Asks for the time a few times; the quickest answer tells most of the clock.
async fn clock(client: &Client, facts: &mut Facts) -> Result<(), ConnectError> {
    let mut tries = Vec::new();
    for _ in 0..5 {
        let (begun, before) = (Instant::now(), SystemTime::now());
        let Some(answer) = ask(client, "TIME", Vec::new()).await? else { return Ok(()) };
        let took = begun.elapsed();
        let Ok(before) = before.duration_since(UNIX_EPOCH) else { return Ok(()) };
        let [seconds, micros] = &reply::texts(&answer)[..] else { return Ok(()) };
        let theirs = seconds.parse().unwrap_or(0.0) + micros.parse().unwrap_or(0.0) / 1e6;
        tries.push((took, theirs - (before + took / 2).as_secs_f64()));
    }
    tries.sort_by_key(|(took, _)| *took);
    facts.round_trip = tries[tries.len() / 2].0;
    facts.clock = (tries[0].1, tries[0].0.as_secs_f64() / 2.0);
    Ok(())
}

async fn settings(client: &Client) -> Result<HashMap<String, String>, ConnectError> {
    let mut found = HashMap::new();
    for name in [
        "client-output-buffer-limit",
        "appendonly",
        "appendfsync",
        "save",
        "min-replicas-to-write",
        "repl-backlog-ttl",
        "proto-max-bulk-len",
        "client-query-buffer-limit",
    ] {
        // One by one: a service may show some and hide others.
        if let Some(answer) = ask(client, "CONFIG", vec!["GET".into(), name.into()]).await?
            && let [name, value] = &reply::pairs(&answer)[..]
        {
            found.insert(name.clone(), value.clone());
        }
    }
    Ok(found)
}

async fn histories(client: &Client, terms: &Terms, facts: &mut Facts) -> Result<(), ConnectError> {
    let escaped: String = terms
        .prefix
        .chars()
        .flat_map(|c| if "*?[]\\".contains(c) { vec!['\\', c] } else { vec![c] })
        .collect();
    let pattern = format!("{escaped}:{{*}}:events");
    let (mut cursor, mut looked) = ("0".to_owned(), 0);
    loop {
        let args = vec![
            cursor.into(),
            "MATCH".into(),
            pattern.as_str().into(),
            "COUNT".into(),
            (SCAN as i64).into(),
        ];
        let Some(answer) = ask(client, "SCAN", args).await? else { break };
        let Some((next, keys)) = reply::scanned(&answer) else { break };
        looked += SCAN;
        for key in keys {
            let name = key
                .strip_prefix(&format!("{}:{{", terms.prefix))
                .and_then(|rest| rest.strip_suffix("}:events"));
            // A key may be named twice while Redis moves its table.
            if let Some(name) = name.filter(|name| facts.channels.iter().all(|known| known.name != *name)) {
                facts.channels.push(History { name: name.into(), ..History::default() });
            }
        }
        if next == "0" {
            break;
        }
        if looked >= KEYS || facts.channels.len() >= CHANNELS {
            facts.more = true;
            break;
        }
        cursor = next;
    }
    let mut first = Vec::new();
    for channel in &mut facts.channels {
        let events = format!("{}:{{{}}}:events", terms.prefix, channel.name);
        let length = ask(client, "XLEN", vec![events.as_str().into()]).await?;
        channel.events = length.as_ref().and_then(reply::integer).unwrap_or(0);
        let size = ask(client, "MEMORY", vec!["USAGE".into(), events.into()]).await?;
        channel.bytes = size.as_ref().and_then(reply::integer).unwrap_or(0);
        first.push((Instant::now(), ends(client, terms, &channel.name).await?));
    }
    if facts.channels.is_empty() {
        return Ok(());
    }
    sleep(SAMPLE).await;
    for (channel, (begun, before)) in facts.channels.iter_mut().zip(first) {
        let (Some((head, base)), Some((head_before, base_before))) =
            (ends(client, terms, &channel.name).await?, before)
        else {
            continue;
        };
        if base != base_before {
            continue; // a new sequence: nothing to compare
        }
        channel.now = head.saturating_sub(head_before) as f64 / begun.elapsed().as_secs_f64();
        // A sequence begins at the clock of Redis in microseconds, unless that was set back.
        let clock =
            SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |now| now.as_secs_f64()) + facts.clock.0;
        let age = clock - base as f64 / 1e6;
        channel.since_begin = (age > 1.0).then(|| head.saturating_sub(base) as f64 / age);
    }
    Ok(())
}

/// A channel's head and base.
async fn ends(client: &Client, terms: &Terms, channel: &str) -> Result<Option<(u64, u64)>, ConnectError> {
    let key = format!("{}:{{{channel}}}:meta", terms.prefix);
    let Some(answer) = ask(client, "HMGET", vec![key.into(), "head".into(), "base".into()]).await? else {
        return Ok(None);
    };
    let [head, base] = &reply::texts(&answer)[..] else { return Ok(None) };
    Ok(head.parse().ok().zip(base.parse().ok()))
}
