//! The function `fanfare_publish`, with which other programs publish, and its settings for each prefix.
//!
//! In Redis a function's name is unique, so deployments that share a Redis share the function. Their settings are in a
//! hash for each prefix, which the function reads. In a Redis Cluster a function can't read undeclared keys of another
//! slot: there each primary would need a copy of the hash under a hash tag of its own slots.

use std::sync::Arc;
use std::time::{Duration, Instant};

use fred::clients::Client;
use fred::types::{Resp3Frame, Value};

use super::commands::{command, script_args};
use super::errors::CallError;
use super::reply;
use super::scripts;
use super::settings::Terms;
use super::{Bus, Outcome};

/// Time between two checks that the function and settings for other programs are there.
const LOAD_EVERY: Duration = Duration::from_secs(2);

const NAME: &str = "fanfare1";

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The library. Its name must stay the same, since Redis refuses a second library with the same function.
const TEXT: &str = concat!(
    "#!lua name=fanfare1\nlocal VERSION = '",
    env!("CARGO_PKG_VERSION"),
    "'\n",
    include_str!("lua/epoch.lua"),
    "\n",
    include_str!("lua/function.lua"),
);

/// How the library and settings are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteMode {
    /// Those of this process, which has just started, replace earlier ones.
    Replace,
    /// Only if they are missing, as after a flush, an eviction or a failover.
    IfMissing,
}

/// Writes the library and the settings of this prefix for other programs. Nodes don't need them.
pub async fn provide(client: &Client, terms: &Terms, mode: WriteMode) -> Result<(), CallError> {
    let replace = u64::from(mode == WriteMode::Replace);
    let mut args = vec![scripts::number(replace), scripts::number(terms.settings_ttl_ms())];
    args.extend(settings(terms));
    let script = Value::from_static_str(scripts::SETTINGS);
    command(client, "EVAL", script_args(script, &[&terms.settings_key()], args)).await?;

    let found = command(client, "FUNCTION", vec!["LIST".into(), "LIBRARYNAME".into(), NAME.into()]).await?;
    if must_load(version(&found).as_deref(), mode) {
        let args = vec!["LOAD".into(), "REPLACE".into(), Value::from_static_str(TEXT)];
        command(client, "FUNCTION", args).await?;
    }
    Ok(())
}

/// Fields and values of the hash, as `function.lua` reads them. Nodes of other versions read and write it, too: fields may
/// be added, but existing ones keep their meaning.
fn settings(terms: &Terms) -> Vec<Value> {
    let mut bare: Vec<&str> = terms.bare.iter().map(|channel| channel.as_str()).collect();
    bare.sort_unstable();
    vec![
        "max_message_size".into(),
        scripts::number(terms.max_message_size as u64),
        "history".into(),
        scripts::number(terms.history),
        "history_bytes".into(),
        scripts::number(terms.history_bytes as u64),
        "history_ttl".into(),
        scripts::number(terms.ttl_ms),
        "durable".into(),
        scripts::number(u64::from(terms.durable)),
        "pubsub_channels".into(),
        bare.join(" ").into(),
    ]
}

/// The newest version stays, whichever node starts last: it works with the settings of all.
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

/// The library's version in an answer of FUNCTION LIST, which is the function's description; empty if it has none.
fn version(list: &Resp3Frame) -> Option<String> {
    let libraries = reply::array(list)?;
    let texts = flatten(libraries.first()?);
    let at = texts.iter().position(|text| text == "description");
    Some(at.and_then(|at| texts.get(at + 1).cloned()).unwrap_or_default())
}

/// All texts of an answer, in order; RESP2 has lists where RESP3 has maps.
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

impl Bus {
    /// What came of loading the function for other programs: said when it changes.
    pub(super) fn tell_of_library(&mut self, refused: Option<Arc<str>>) {
        self.next_load = Instant::now() + LOAD_EVERY;
        if refused.is_none() {
            self.library_write = WriteMode::IfMissing;
        }
        if self.no_library == refused {
            return;
        }
        match &refused {
            None => tracing::info!("FCALL fanfare_publish is available"),
            Some(words) => {
                tracing::warn!("FCALL fanfare_publish is unavailable, all else works: Redis says {words}");
            }
        }
        self.no_library = refused;
    }

    /// While Redis works: writes the function and settings for other programs if they are missing, as after FUNCTION FLUSH,
    /// FLUSHALL, an eviction or a failover.
    pub(super) fn load_again(&mut self, now: Instant) {
        let Some(session) = &self.link.session else { return };
        if now < self.next_load {
            return;
        }
        self.next_load = now + LOAD_EVERY;
        let (caller, terms, write) = (session.caller(), self.terms.clone(), self.library_write);
        let (outcomes, generation) = (self.outcomes.clone(), self.link.generation);
        tokio::spawn(async move {
            let result = caller.provide_library(&terms, write).await;
            let _ = outcomes.send(Outcome::Library(generation, result));
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_library_stays() {
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
