//! Commands and scripts over a session's command connection.

use std::sync::Arc;
use std::time::Duration;

use fred::clients::Client;
use fred::interfaces::ClientLike;
use fred::types::{ClusterHash, CustomCommand, Resp3Frame, Value};
use tokio::sync::watch;
use tokio::time::timeout;

use super::errors::CallError;
use super::functions::{self, WriteMode};
use super::scripts;
use super::settings::Terms;

/// Longest wait for an answer. Later the connection counts as lost.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(4);

/// Which script.
#[derive(Clone, Copy, Debug)]
pub enum Script {
    /// Gives ids and tells everyone.
    Publish,
    /// Reads history.
    Read,
    /// Compares positions.
    Canary,
}

pub const SCRIPTS: [(Script, &str); 3] =
    [(Script::Publish, scripts::PUBLISH), (Script::Read, scripts::READ), (Script::Canary, scripts::CANARY)];

/// Calls scripts over the commands connection.
#[derive(Clone)]
pub struct Caller {
    client: Client,
    hashes: Arc<[Value; SCRIPTS.len()]>,
    open: watch::Receiver<()>,
}

impl std::fmt::Debug for Caller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Caller")
    }
}

impl Caller {
    /// Calls over `client`, whose Redis has the scripts under these hashes, until the other end of `open` is dropped.
    pub fn new(client: Client, hashes: [Value; SCRIPTS.len()], open: watch::Receiver<()>) -> Caller {
        Caller { client, hashes: Arc::new(hashes), open }
    }

    /// See [`functions::provide`].
    pub async fn provide_library(&self, terms: &Terms, mode: WriteMode) -> Result<(), CallError> {
        functions::provide(&self.client, terms, mode).await
    }

    /// Runs a script with these keys. A script that Redis has forgotten is sent again whole.
    pub async fn call(
        &self,
        script: Script,
        keys: &[&str],
        args: Vec<Value>,
    ) -> Result<Resp3Frame, CallError> {
        let hash = self.hashes[script as usize].clone();
        let result = self.command("EVALSHA", script_args(hash, keys, args.clone())).await;
        match result {
            Err(CallError::Refused(text)) if text.starts_with("NOSCRIPT") => {
                let text = Value::from_static_str(SCRIPTS[script as usize].1);
                self.command("EVAL", script_args(text, keys, args)).await
            }
            result => result,
        }
    }

    async fn command(&self, name: &'static str, args: Vec<Value>) -> Result<Resp3Frame, CallError> {
        let mut open = self.open.clone();
        tokio::select! {
            result = command(&self.client, name, args) => result,
            _ = open.changed() => Err(CallError::Lost("the connection was given up".into())),
        }
    }
}

/// The arguments of EVAL or EVALSHA.
pub fn script_args(script: Value, keys: &[&str], args: Vec<Value>) -> Vec<Value> {
    let mut all = Vec::with_capacity(2 + keys.len() + args.len());
    all.push(script);
    all.push(Value::Integer(keys.len() as i64));
    all.extend(keys.iter().map(|key| Value::from(*key)));
    all.extend(args);
    all
}

/// Sends one command and waits for its answer.
pub async fn command(client: &Client, name: &'static str, args: Vec<Value>) -> Result<Resp3Frame, CallError> {
    let command = CustomCommand::new_static(name, ClusterHash::FirstKey, false);
    match timeout(CALL_TIMEOUT, client.custom_raw(command, args)).await {
        Err(_) => Err(CallError::Lost(format!("no answer to {name} within {CALL_TIMEOUT:?}").into())),
        Ok(Err(error)) => Err(CallError::Lost(error.to_string().into())),
        Ok(Ok(Resp3Frame::SimpleError { data, .. })) => Err(CallError::Refused((*data).into())),
        Ok(Ok(Resp3Frame::BlobError { data, .. })) => {
            Err(CallError::Refused(String::from_utf8_lossy(&data).into()))
        }
        Ok(Ok(frame)) => Ok(frame),
    }
}

/// Whether Redis will soon do what it refuses now.
pub fn is_passing(error: &str) -> bool {
    ["LOADING", "BUSY", "MASTERDOWN", "TRYAGAIN"].iter().any(|prefix| error.starts_with(prefix))
}
