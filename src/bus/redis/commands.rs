//! Commands and scripts over a session's command connection, and the redirections of a cluster.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use fred::clients::Client;
use fred::interfaces::ClientLike;
use fred::types::{ClusterHash, CustomCommand, Resp3Frame, Value};
use tokio::sync::watch;
use tokio::time::timeout;

use super::errors::{CallError, ELSEWHERE, readable};
use super::scripts;

/// Longest wait for a reply. After that the connection counts as lost.
const CALL_TIMEOUT: Duration = Duration::from_secs(4);

#[derive(Clone, Copy, Debug)]
pub enum Script {
    Publish,
    Inbox,
    InboxStats,
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
    scripts::INBOX_STATS,
    scripts::READ,
    scripts::PROBE,
    scripts::ORDER,
    scripts::BANS,
    super::presence::UPDATE_SCRIPT,
    super::presence::READ_SCRIPT,
];

/// The open sessions of a cluster by address, to which redirections lead. A single Redis has no
/// entry, and sends no redirections.
#[derive(Debug, Default)]
pub struct Peers {
    open: Mutex<HashMap<Arc<str>, Commands>>,
    /// A primary has redirected a call: slots have moved.
    redirected: AtomicBool,
}

impl Peers {
    fn open(&self) -> MutexGuard<'_, HashMap<Arc<str>, Commands>> {
        self.open.lock().expect("nothing panics while holding it")
    }

    pub fn add(&self, address: Arc<str>, commands: Commands) {
        self.open().insert(address, commands);
    }

    pub fn remove(&self, address: &str) {
        self.open().remove(address);
    }

    fn get(&self, address: &str) -> Option<Commands> {
        self.open().get(address).cloned()
    }

    pub fn all(&self) -> Vec<Commands> {
        self.open().values().cloned().collect()
    }

    /// Whether a call was redirected since the last time.
    pub fn take_redirected(&self) -> bool {
        self.redirected.swap(false, Ordering::Relaxed)
    }
}

/// How a session sends scripts.
#[derive(Clone, Debug)]
pub enum Routing {
    /// With the channel as a declared key.
    Single,
    /// Without declared keys, and to the primary that a redirection names: see `channel_of` in
    /// `epoch.lua`. The host is that of this session.
    Cluster(Arc<Peers>, Arc<str>),
}

/// The command connection of a session.
#[derive(Clone)]
pub struct Commands {
    client: Client,
    routing: Routing,
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
    pub fn new(
        client: Client,
        routing: Routing,
        hashes: [Value; SCRIPTS.len()],
        open: watch::Receiver<()>,
    ) -> Commands {
        Commands { client, routing, hashes: Arc::new(hashes), open }
    }

    /// The host of this session in a cluster.
    pub fn host(&self) -> &str {
        match &self.routing {
            Routing::Single => "",
            Routing::Cluster(_, host) => host,
        }
    }

    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Runs a script by its hash, or by its text if Redis has lost the script. `key` is what it works
    /// on.
    pub async fn run(
        &self,
        script: Script,
        key: &str,
        mut args: Vec<Value>,
    ) -> Result<Resp3Frame, CallError> {
        if matches!(self.routing, Routing::Single) {
            return self.run_here(script, &[key], args).await;
        }
        args.push(key.into());
        match self.run_here(script, &[], args.clone()).await {
            Err(CallError::ErrorReply(text)) if Commands::is_elsewhere(script, &text) => {
                self.follow(script, key, args).await
            }
            result => result,
        }
    }

    /// Whether an error means that the keys of a script are at another primary of the cluster.
    fn is_elsewhere(script: Script, error: &str) -> bool {
        !matches!(script, Script::Probe) && (error == ELSEWHERE || error.starts_with("READONLY"))
    }

    async fn run_here(
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

    /// Runs a script at the primary to which this one redirects commands on the channel.
    async fn follow(&self, script: Script, key: &str, args: Vec<Value>) -> Result<Resp3Frame, CallError> {
        let elsewhere = Err(CallError::ErrorReply(ELSEWHERE.into()));
        let Routing::Cluster(peers, host) = &self.routing else { return elsewhere };
        let reply = match self.send("EXISTS", vec![format!("{key}:meta").into()]).await {
            Err(CallError::ErrorReply(text)) => text,
            Err(error) => return Err(error),
            Ok(_) => return elsewhere, // on their way
        };
        let Some((asking, address)) = redirection(&reply, host) else { return elsewhere };
        if !asking {
            peers.redirected.store(true, Ordering::Relaxed);
        }
        let Some(peer) = peers.get(&address) else { return elsewhere };
        // ASKING is about the next command on the connection. If another one comes between, Redis
        // rejects the script as it did here.
        let result = match asking {
            true => tokio::join!(peer.send("ASKING", Vec::new()), peer.run_here(script, &[], args)).1,
            false => peer.run_here(script, &[], args).await,
        };
        result.map_err(|error| match error {
            CallError::NoReply(text) => CallError::NoReplyElsewhere(text),
            error => error,
        })
    }

    pub async fn send(&self, name: &'static str, args: Vec<Value>) -> Result<Resp3Frame, CallError> {
        let mut open = self.open.clone();
        tokio::select! {
            result = command(&self.client, name, args) => result,
            _ = open.changed() => Err(CallError::NoReply("the session was closed".into())),
        }
    }
}

/// Whether a redirection (`MOVED 3999 127.0.0.1:6381`, or ASK) is for one command only, and the
/// address. Without a host it is that of the replying server.
fn redirection(error: &str, own_host: &str) -> Option<(bool, String)> {
    let mut words = error.split(' ');
    let asking = match words.next()? {
        "ASK" => true,
        "MOVED" => false,
        _ => return None,
    };
    let address = words.nth(1)?;
    let (host, port) = address.rsplit_once(':')?;
    Some((asking, format!("{}:{port}", if host.is_empty() { own_host } else { host })))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirections_name_an_address() {
        for (error, expected) in [
            ("MOVED 3999 127.0.0.1:6381", Some((false, "127.0.0.1:6381"))),
            ("ASK 3999 a.example:6381", Some((true, "a.example:6381"))),
            ("MOVED 3999 :6381", Some((false, "own:6381"))),
            ("MOVED 3999 ::1:6381", Some((false, "::1:6381"))),
            ("MOVED 3999", None),
            ("ERR unknown command", None),
        ] {
            let found = redirection(error, "own");
            assert_eq!(found.as_ref().map(|(asking, address)| (*asking, &**address)), expected, "{error}");
        }
    }
}
