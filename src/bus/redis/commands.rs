//! Commands and scripts over a session's command connection.

use std::sync::Arc;
use std::time::Duration;

use fred::clients::Client;
use fred::interfaces::ClientLike;
use fred::types::{ClusterHash, CustomCommand, Resp3Frame, Value};
use tokio::sync::watch;
use tokio::time::timeout;

use super::errors::{CallError, readable};
use super::scripts;

/// Longest wait for a reply. After that the connection counts as lost.
const CALL_TIMEOUT: Duration = Duration::from_secs(4);

#[derive(Clone, Copy, Debug)]
pub enum Script {
    Publish,
    Inbox,
    InboxLook,
    Read,
    Probe,
    Order,
    Bans,
    UpdatePresence,
    ReadPresence,
}

/// The text of each script, indexed by [`Script`].
pub const SCRIPTS: [&str; 9] = [
    scripts::PUBLISH,
    scripts::INBOX,
    scripts::INBOX_LOOK,
    scripts::READ,
    scripts::PROBE,
    scripts::ORDER,
    scripts::BANS,
    super::presence::UPDATE_SCRIPT,
    super::presence::READ_SCRIPT,
];

/// The command connection of a session.
#[derive(Clone)]
pub struct Commands {
    client: Client,
    /// Indexed by [`Script`].
    hashes: Arc<[Value; SCRIPTS.len()]>,
    /// Changes when the session closes.
    open: watch::Receiver<()>,
}

impl std::fmt::Debug for Commands {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Commands")
    }
}

impl Commands {
    /// Calls fail once the sender of `open` is dropped.
    pub fn new(client: Client, hashes: [Value; SCRIPTS.len()], open: watch::Receiver<()>) -> Commands {
        Commands { client, hashes: Arc::new(hashes), open }
    }

    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Runs a script by its hash, or by its text if Redis has lost the script.
    pub async fn run(
        &self,
        script: Script,
        keys: &[&str],
        args: Vec<Value>,
    ) -> Result<Resp3Frame, CallError> {
        let hash = self.hashes[script as usize].clone();
        let result = self.send("EVALSHA", script_args(hash, keys, args.clone())).await;
        match result {
            Err(CallError::ErrorReply(text)) if text.starts_with("NOSCRIPT") => {
                let text = Value::from_static_str(SCRIPTS[script as usize]);
                self.send("EVAL", script_args(text, keys, args)).await
            }
            result => result,
        }
    }

    async fn send(&self, name: &'static str, args: Vec<Value>) -> Result<Resp3Frame, CallError> {
        let mut open = self.open.clone();
        tokio::select! {
            result = command(&self.client, name, args) => result,
            _ = open.changed() => Err(CallError::NoReply("the session was closed".into())),
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

/// Sends one command and waits for its reply.
pub async fn command(client: &Client, name: &'static str, args: Vec<Value>) -> Result<Resp3Frame, CallError> {
    let command = CustomCommand::new_static(name, ClusterHash::FirstKey, false);
    match timeout(CALL_TIMEOUT, client.custom_raw(command, args)).await {
        Err(_) => Err(CallError::NoReply(format!("no reply to {name} within {CALL_TIMEOUT:?}").into())),
        Ok(Err(error)) => Err(CallError::NoReply(readable(error.details()).into())),
        Ok(Ok(Resp3Frame::SimpleError { data, .. })) => Err(CallError::ErrorReply((*data).into())),
        Ok(Ok(Resp3Frame::BlobError { data, .. })) => {
            Err(CallError::ErrorReply(String::from_utf8_lossy(&data).into()))
        }
        Ok(Ok(frame)) => Ok(frame),
    }
}
