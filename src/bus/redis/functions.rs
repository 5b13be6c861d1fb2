//! The functions for other programs (FCALL): `fanfare_publish`, `fanfare_disconnect` and
//! `fanfare_unban`; and their settings for each prefix.
//!
//! Function names are unique in Redis, so deployments that share a Redis share the function. It
//! reads their settings from one hash per prefix. On a Redis Cluster no key is in the slots of all
//! channels of a primary: there the nodes call the function `fanfare_settings`, and the library
//! remembers the settings for as long as it is loaded.

use std::sync::Arc;
use std::time::{Duration, Instant};

use fred::clients::Client;
use fred::types::{Resp3Frame, Value};

use super::commands::{command, script_args};
use super::errors::CallError;
use super::settings::{Kind, RedisSettings};
use super::{Bus, Outcome, advice, reply, scripts};

/// Time between two checks that the function and the settings are present.
const CHECK_INTERVAL: Duration = Duration::from_secs(2);

const NAME: &str = "fanfare1";

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Errors with which Redis rejects every write.
const REJECT_ALL: [&str; 4] = ["OOM", "MISCONF", "NOREPLICAS", "READONLY"];

/// The library. Its name must stay the same, since Redis rejects a second library with the same
/// function.
const TEXT: &str = concat!(
    "#!lua name=fanfare1\nlocal VERSION = '",
    env!("CARGO_PKG_VERSION"),
    "'\n",
    include_str!("lua/epoch.lua"),
    "\n",
    include_str!("lua/control.lua"),
    "\n",
    include_str!("lua/function.lua"),
);

/// How the function and the settings are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteMode {
    /// They replace earlier ones. Used once, when this process has started.
    Replace,
    /// Only if they are missing.
    IfMissing,
}

/// Writes the function and the settings of this prefix, which only other programs need.
pub async fn provide(client: &Client, settings: &RedisSettings, mode: WriteMode) -> Result<(), CallError> {
    let replace = scripts::number(u64::from(mode == WriteMode::Replace));
    if settings.kind == Kind::Cluster {
        // The library of another node has the settings of other prefixes: it stays if it is as new.
        load(client, WriteMode::IfMissing).await?;
        let mut args = vec![settings.prefix.as_str().into(), replace];
        args.extend(settings_fields(settings));
        command(client, "FCALL", script_args("fanfare_settings".into(), &[], args)).await?;
        return Ok(());
    }
    let mut args = vec![replace, scripts::number(settings.settings_ttl_ms())];
    args.extend(settings_fields(settings));
    let script = Value::from_static_str(scripts::SETTINGS);
    command(client, "EVAL", script_args(script, &[&settings.settings_key()], args)).await?;
    load(client, mode).await
}

async fn load(client: &Client, mode: WriteMode) -> Result<(), CallError> {
    let found = command(client, "FUNCTION", vec!["LIST".into(), "LIBRARYNAME".into(), NAME.into()]).await?;
    if must_load(version(&found).as_deref(), mode) {
        let args = vec!["LOAD".into(), "REPLACE".into(), Value::from_static_str(TEXT)];
        command(client, "FUNCTION", args).await?;
    }
    Ok(())
}

/// Fields and values of the hash, as `function.lua` reads them. Nodes of other versions read and
/// write it, too: fields may be added, but existing ones keep their meaning.
fn settings_fields(settings: &RedisSettings) -> Vec<Value> {
    let mut pubsub: Vec<&str> = settings.pubsub_channels.iter().map(|channel| channel.as_str()).collect();
    pubsub.sort_unstable();
    vec![
        "max_message_size".into(),
        scripts::number(settings.max_message_size as u64),
        "history".into(),
        scripts::number(settings.history),
        "history_bytes".into(),
        scripts::number(settings.history_bytes as u64),
        "history_ttl".into(),
        scripts::number(settings.history_ttl_ms),
        "durable".into(),
        scripts::number(u64::from(settings.kind == Kind::Durable)),
        "pubsub_channels".into(),
        pubsub.join(" ").into(),
    ]
}

/// The newest version stays, whichever node starts last: it works with the settings of all
/// versions.
fn must_load(found: Option<&str>, mode: WriteMode) -> bool {
    let Some(found) = found else { return true };
    match parts(found).cmp(&parts(VERSION)) {
        std::cmp::Ordering::Less => true,
        std::cmp::Ordering::Equal => mode == WriteMode::Replace,
        std::cmp::Ordering::Greater => false,
    }
}

fn parts(version: &str) -> Vec<u32> {
    version.split(['.', '-']).map_while(|part| part.parse().ok()).collect()
}

/// The version of the library in a reply of FUNCTION LIST: the description of its function, or
/// empty if it has none.
fn version(list: &Resp3Frame) -> Option<String> {
    let libraries = reply::array(list)?;
    let texts = flatten(libraries.first()?);
    let at = texts.iter().position(|text| text == "description");
    Some(at.and_then(|at| texts.get(at + 1).cloned()).unwrap_or_default())
}

/// All strings of a reply, in order. RESP2 has arrays where RESP3 has maps.
fn flatten(frame: &Resp3Frame) -> Vec<String> {
    match frame {
        Resp3Frame::Map { data, .. } => {
            data.iter().flat_map(|(name, value)| [flatten(name), flatten(value)]).flatten().collect()
        }
        Resp3Frame::Array { data, .. } => data.iter().flat_map(flatten).collect(),
        Resp3Frame::Null => vec![String::new()],
        other => reply::text(other).into_iter().collect(),
    }
}

/// When and how this node writes the function and the settings.
#[derive(Debug)]
pub(super) struct FunctionLoader {
    /// Why FCALL is unavailable, as last logged.
    error: Option<Arc<str>>,
    mode: WriteMode,
    next_check: Instant,
}

impl FunctionLoader {
    pub(super) fn new() -> FunctionLoader {
        FunctionLoader { error: None, mode: WriteMode::Replace, next_check: Instant::now() }
    }

    pub(super) fn mode(&self) -> WriteMode {
        self.mode
    }

    /// The function was loaded, or Redis replied with this error. Logs changes.
    pub(super) fn on_loaded(&mut self, error: Option<Arc<str>>) {
        self.next_check = Instant::now() + CHECK_INTERVAL;
        if error.is_none() {
            self.mode = WriteMode::IfMissing;
        }
        if self.error == error {
            return;
        }
        match &error {
            None => tracing::info!("FCALL fanfare_publish available"),
            Some(error) => {
                let effect = match REJECT_ALL.iter().any(|prefix| error.starts_with(prefix)) {
                    true => "all events are rejected",
                    false => "clients are not affected",
                };
                let (error, advice) = (&**error, advice::for_error_reply(error));
                tracing::warn!(error, advice, "FCALL fanfare_publish unavailable, {effect}");
            }
        }
        self.error = error;
    }

    fn is_due(&mut self, now: Instant) -> bool {
        let due = now >= self.next_check;
        if due {
            self.next_check = now + CHECK_INTERVAL;
        }
        due
    }
}

impl Bus {
    /// Writes the function and the settings again if they are missing, as after FUNCTION FLUSH,
    /// FLUSHALL, an eviction or a failover.
    pub(super) fn check_functions(&mut self, primary: usize, now: Instant) {
        let id = self.primaries.session_id(primary);
        let primary = &mut self.primaries[primary];
        let Some(session) = primary.link.session() else { return };
        if !primary.functions.is_due(now) {
            return;
        }
        let (commands, settings, mode) =
            (session.commands(), self.handles.settings.clone(), primary.functions.mode());
        let outcomes = self.handles.outcomes.clone();
        tokio::spawn(async move {
            let result = provide(commands.client(), &settings, mode).await;
            let _ = outcomes.send(Outcome::FunctionLoaded(id, result));
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newest_library_stays() {
        for (found, missing, replace) in [
            (None, true, true),
            (Some(""), true, true),
            (Some("0.0.9"), true, true),
            (Some(VERSION), false, true),
            (Some("99.0.0"), false, false),
        ] {
            assert_eq!(must_load(found, WriteMode::IfMissing), missing, "{found:?}");
            assert_eq!(must_load(found, WriteMode::Replace), replace, "{found:?}");
        }
        assert!(parts("0.10.0") > parts("0.9.3"));
    }
}
