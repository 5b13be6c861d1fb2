//! A session: one connection for commands and one for subscriptions. Both open and close together.
//! fred neither reconnects nor resends nor resubscribes: the bus decides what is sent again and under
//! which number, and a connection that hangs in the middle of a write is dropped.

use std::sync::Arc;
use std::time::Duration;

use fred::clients::{Client, SubscriberClient};
use fred::error::{Error, ErrorKind};
use fred::interfaces::{ClientLike, EventInterface, PubsubInterface};
use fred::types::config::{
    Config, ConnectionConfig, PerformanceConfig, ReconnectError, TcpConfig, UnresponsiveConfig,
};
use fred::types::{ConnectHandle, Message, Value};
use tokio::sync::{broadcast, mpsc, watch};
use tokio::task::AbortHandle;

use super::advice::{CLOSED_AT_ONCE, NO_TLS_ANSWER};
use super::commands::{Commands, Routing, SCRIPTS, command};
use super::dns::{HostName, Peer};
use super::errors::{ConnectError, readable};
use super::functions::{self, WriteMode};
use super::reply;
use super::requirements::{check_permissions, check_server, eviction_warning, required};
use super::server::Server;
use super::settings::{Kind, RedisSettings};

/// Longest wait for one connection, TLS and login included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Longest time for all steps of [`connect`], since no other attempt starts meanwhile. Each step
/// has a limit of its own.
pub const SESSION_TIMEOUT: Duration = CONNECT_TIMEOUT.saturating_mul(4);

/// Messages in fred's buffer, about 200 bytes each even when empty. Its default of 32 loses
/// messages under any load. A lost message is a gap like any other.
const MESSAGES: usize = 4096;

/// Most channels in one SUBSCRIBE.
const SUBSCRIBE_MAX: usize = 1000;

/// What a session reports to the bus.
#[derive(Debug)]
pub enum Report {
    /// Redis has confirmed all subscriptions up to this ticket.
    Subscribed(u64),
    /// The session has closed, for this reason.
    Closed(String),
}

enum SubscriptionRequest {
    Subscribe(Vec<String>, u64),
    Unsubscribe(Vec<String>),
}

/// Two open connections. Dropping it closes both, and all calls in flight fail with
/// [`CallError::NoReply`](super::errors::CallError::NoReply).
#[derive(Debug)]
pub struct Session {
    commands: Commands,
    /// The peer, if it is connected by name.
    pub peer: Option<Peer>,
    pub server: Server,
    /// What the eviction policy of Redis does, if it may evict keys.
    pub eviction_warning: Option<String>,
    /// Why FCALL is unavailable to other programs, if it is: the error of Redis.
    pub fcall_error: Option<Arc<str>>,
    subscriptions: mpsc::UnboundedSender<SubscriptionRequest>,
    tasks: AbortOnDrop,
    /// Dropped with the session.
    _open: watch::Sender<()>,
}

impl std::fmt::Debug for SubscriptionRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SubscriptionRequest")
    }
}

/// Tasks that end with their session, or with a failed attempt to make one.
#[derive(Debug)]
struct AbortOnDrop(Vec<AbortHandle>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        for task in &self.0 {
            task.abort();
        }
    }
}

impl Session {
    pub fn commands(&self) -> Commands {
        self.commands.clone()
    }

    /// Whether it has closed already. It also reports [`Report::Closed`], once.
    pub fn is_closed(&self) -> bool {
        self.tasks.0.iter().any(AbortHandle::is_finished)
    }

    /// Subscribes, in the order of the calls; [`Report::Subscribed`] confirms it.
    pub fn subscribe(&self, topics: Vec<String>, ticket: u64) {
        // A session that has closed reports that itself.
        let _ = self.subscriptions.send(SubscriptionRequest::Subscribe(topics, ticket));
    }

    /// Unsubscribes, in the order of the calls.
    pub fn unsubscribe(&self, topics: Vec<String>) {
        let _ = self.subscriptions.send(SubscriptionRequest::Unsubscribe(topics));
    }
}

pub fn connection_config(reconnect_errors: Vec<ReconnectError>) -> ConnectionConfig {
    ConnectionConfig {
        connection_timeout: CONNECT_TIMEOUT,
        internal_command_timeout: CONNECT_TIMEOUT,
        max_command_attempts: 1, // a second attempt without its number could publish an event twice
        tcp: TcpConfig { nodelay: Some(true), ..TcpConfig::default() },
        unresponsive: UnresponsiveConfig::default(), // off: the probe checks that, for Pub/Sub too
        reconnect_errors,
        ..ConnectionConfig::default()
    }
}

/// Connects, logs in and checks the server. Returns the reply of INFO, too.
pub async fn open(client: &Client, kind: Kind) -> Result<(ConnectHandle, String), ConnectError> {
    let over_tls = client.client_config().tls.is_some();
    let opened = async {
        let closed = client.init().await.map_err(connect_error)?;
        Ok((closed, check_server(client, kind).await?))
    };
    opened.await.map_err(|error| match error {
        ConnectError::Unreachable(text) => ConnectError::Unreachable(before_first_reply(text, over_tls)),
        error => error,
    })
}

pub fn connect_error(error: Error) -> ConnectError {
    match error.kind() {
        ErrorKind::Auth => ConnectError::Rejected(readable(error.details())),
        _ => ConnectError::Unreachable(readable(error.details())),
    }
}

/// Marks errors that mean something else on a connection that was never usable.
fn before_first_reply(error: String, over_tls: bool) -> String {
    let is_any = |parts: &[&str]| parts.iter().any(|part| error.contains(part));
    if is_any(&["reset by peer", "handshake eof", "unexpected eof", "Broken pipe"]) {
        format!("{error} {CLOSED_AT_ONCE}")
    } else if is_any(&["Expected string"]) {
        format!("connection closed {CLOSED_AT_ONCE}") // fred's error is about its own reading of the end
    } else if over_tls && is_any(&["timed out"]) {
        format!("{NO_TLS_ANSWER}: {error}")
    } else {
        error
    }
}

/// Connects to the first address of this Redis that accepts connections.
pub async fn connect(
    config: Config,
    routing: Routing,
    settings: &RedisSettings,
    mode: WriteMode,
    report: impl Fn(Report) + Clone + Send + Sync + 'static,
) -> Result<(Session, broadcast::Receiver<Message>), ConnectError> {
    let Some(name) = HostName::of(&config) else {
        return connect_to(config, routing, None, settings, mode, report).await;
    };
    let mut failure = ConnectError::Unreachable("no addresses for the name".into());
    for address in name.lookup().await.map_err(ConnectError::Unreachable)? {
        let peer = Peer { name: name.clone(), address };
        let config = name.at(address, &config);
        match connect_to(config, routing.clone(), Some(peer), settings, mode, report.clone()).await {
            Err(error @ ConnectError::Unreachable(_)) => failure = error,
            result => return result,
        }
    }
    Err(failure)
}

/// Opens both connections, checks the requirements, and loads scripts and function.
async fn connect_to(
    config: Config,
    routing: Routing,
    peer: Option<Peer>,
    settings: &RedisSettings,
    mode: WriteMode,
    report: impl Fn(Report) + Clone + Send + Sync + 'static,
) -> Result<(Session, broadcast::Receiver<Message>), ConnectError> {
    let mut tasks = AbortOnDrop(Vec::new());
    let client = Client::new(config.clone(), None, Some(connection_config(Vec::new())), None);
    let (commands_closed, info) = open(&client, settings.kind).await?;
    tasks.0.push(commands_closed.abort_handle());
    let (server, eviction_warning) = (Server::of(&info), eviction_warning(&info));

    let performance =
        PerformanceConfig { broadcast_channel_capacity: MESSAGES, ..PerformanceConfig::default() };
    // fred completes SUBSCRIBE before Redis has replied. An error reply must not get lost, so it
    // closes the session.
    let subscribe_errors = vec![ReconnectError::Custom("NOPERM")];
    let subscriber =
        SubscriberClient::new(config, Some(performance), Some(connection_config(subscribe_errors)), None);
    let subscriber_closed = subscriber.init().await.map_err(connect_error)?;
    tasks.0.push(subscriber_closed.abort_handle());
    let messages = subscriber.message_rx();

    let mut hashes = Vec::with_capacity(SCRIPTS.len());
    for text in SCRIPTS {
        let hash = required(&client, "SCRIPT", vec!["LOAD".into(), text.into()]).await?;
        hashes.push(Value::Bytes(reply::bytes(&hash).unwrap_or_default()));
    }
    let hashes: [Value; SCRIPTS.len()] = hashes.try_into().expect("as many hashes as scripts");
    let (open, open_rx) = watch::channel(());
    let commands = Commands::new(client.clone(), routing, hashes, open_rx);
    check_permissions(&client, settings).await?;
    let fcall_error = functions::provide(&client, settings, mode).await.err().map(|error| error.text());

    let (subscriptions, requests) = mpsc::unbounded_channel();
    let report_driver = report.clone();
    let driver = tokio::spawn(async move {
        if let Err(why) = drive_subscriptions(subscriber, requests, &report_driver).await {
            report_driver(Report::Closed(why));
        }
    });
    tasks.0.push(driver.abort_handle());
    let watcher = tokio::spawn(async move {
        let result =
            tokio::select! { result = commands_closed => result, result = subscriber_closed => result };
        let why = match result {
            Ok(Err(error)) => readable(error.details()),
            _ => "the connection was closed".to_owned(),
        };
        report(Report::Closed(why));
    });
    tasks.0.push(watcher.abort_handle());
    let session =
        Session { commands, peer, server, eviction_warning, fcall_error, subscriptions, tasks, _open: open };
    Ok((session, messages))
}

/// Executes subscription requests one after the other. Waiting ones share a SUBSCRIBE. Redis replies
/// in order on this connection, so the PONG that follows confirms the subscriptions before it.
async fn drive_subscriptions(
    subscriber: SubscriberClient,
    mut requests: mpsc::UnboundedReceiver<SubscriptionRequest>,
    report: &impl Fn(Report),
) -> Result<(), String> {
    let client = subscriber.to_client();
    let mut next = requests.recv().await;
    while let Some(request) = next.take() {
        match request {
            SubscriptionRequest::Subscribe(mut topics, mut ticket) => {
                while topics.len() < SUBSCRIBE_MAX {
                    match requests.try_recv() {
                        Ok(SubscriptionRequest::Subscribe(more, later)) => {
                            topics.extend(more);
                            ticket = later;
                        }
                        Ok(other) => {
                            next = Some(other);
                            break;
                        }
                        Err(_) => break,
                    }
                }
                let topics: Vec<fred::types::Key> = topics.into_iter().map(Into::into).collect();
                subscriber.subscribe(topics).await.map_err(|error| readable(error.details()))?;
                command(&client, "PING", Vec::new()).await.map_err(|error| error.text().to_string())?;
                report(Report::Subscribed(ticket));
            }
            SubscriptionRequest::Unsubscribe(topics) => {
                let topics: Vec<fred::types::Key> = topics.into_iter().map(Into::into).collect();
                subscriber.unsubscribe(topics).await.map_err(|error| readable(error.details()))?;
            }
        }
        if next.is_none() {
            next = requests.recv().await;
        }
    }
    Ok(())
}
