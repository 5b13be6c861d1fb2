//! The connections to Redis: one for commands, one for subscriptions. They live and die together as a session,
//! and nothing of a session outlives it: fred neither reconnects nor resends nor resubscribes here. So what is
//! sent again, and under which number, is decided in one place; and a connection that hangs in the middle of a
//! write is simply dropped.

use std::sync::Arc;
use std::time::Duration;

use fred::clients::{Client, SubscriberClient};
use fred::error::{Error, ErrorKind};
use fred::interfaces::{ClientLike, EventInterface, PubsubInterface};
use fred::types::config::{
    Config, ConnectionConfig, PerformanceConfig, ReconnectError, TcpConfig, UnresponsiveConfig,
};
use fred::types::{Message, Value};
use tokio::sync::{broadcast, mpsc, watch};
use tokio::task::AbortHandle;

use super::commands::{Caller, SCRIPTS, command};
use super::dns::{Name, Peer};
use super::errors::ConnectError;
use super::functions::{self, WriteMode};
use super::reply::bytes;
use super::requirements::{check_permissions, check_server, setup};
use super::settings::Terms;

/// Longest wait for a connection to be made, TLS and login included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Longest that all of making a session may take. Its parts have limits of their own; this one holds whatever they
/// miss, since no other attempt begins meanwhile.
pub const SESSION_TIMEOUT: Duration = CONNECT_TIMEOUT.saturating_mul(4);

/// Messages that fred holds for us. Its default of 32 loses under any load; each takes about 200 bytes even
/// when empty. What is lost beyond is a hole like any other.
const MESSAGES: usize = 4096;

/// Names in one SUBSCRIBE.
const NAMES_MAX: usize = 1000;

/// What a session tells the bus.
#[derive(Debug)]
pub enum Report {
    /// All subscriptions up to this ticket are in force.
    Subscribed(u64),
    /// The session is over, for this reason.
    Ended(String),
}

enum Order {
    Subscribe(Vec<String>, u64),
    Unsubscribe(Vec<String>),
}

/// Two connections that work. Dropping it ends both, and every call under way with [`CallError::Lost`].
#[derive(Debug)]
pub struct Session {
    caller: Caller,
    /// Its peer, if it is connected by name.
    pub peer: Option<Peer>,
    /// Why other programs can't publish by FCALL, if they can't: Redis' words.
    pub no_library: Option<Arc<str>>,
    orders: mpsc::UnboundedSender<Order>,
    tasks: Vec<AbortHandle>,
    /// Dropped with the session.
    _open: watch::Sender<()>,
}

impl std::fmt::Debug for Order {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Order")
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl Session {
    /// What calls scripts; cloned into whatever waits for an answer.
    pub fn caller(&self) -> Caller {
        self.caller.clone()
    }

    /// Whether it has ended already. It says so by [`Report::Ended`] too, once.
    pub fn is_over(&self) -> bool {
        self.tasks.iter().any(AbortHandle::is_finished)
    }

    /// Subscribes, in the order asked; [`Report::Subscribed`] says when.
    pub fn subscribe(&self, names: Vec<String>, ticket: u64) {
        let _ = self.orders.send(Order::Subscribe(names, ticket)); // a session that ends says so itself
    }

    /// Unsubscribes, in the order asked.
    pub fn unsubscribe(&self, names: Vec<String>) {
        let _ = self.orders.send(Order::Unsubscribe(names));
    }
}

/// What fred is told for every connection; where its defaults are wrong for us, the reason.
pub fn connection_config(reconnect_errors: Vec<ReconnectError>) -> ConnectionConfig {
    ConnectionConfig {
        connection_timeout: CONNECT_TIMEOUT,
        internal_command_timeout: CONNECT_TIMEOUT,
        max_command_attempts: 1, // sending again without its number could double an event
        tcp: TcpConfig { nodelay: Some(true), ..TcpConfig::default() },
        unresponsive: UnresponsiveConfig::default(), // off: the canary does it, for Pub/Sub too
        reconnect_errors,
        ..ConnectionConfig::default()
    }
}

/// Why a connection could not be made.
pub fn not_connected(error: Error) -> ConnectError {
    match error.kind() {
        ErrorKind::Auth => ConnectError::Refused(error.details().to_owned()),
        _ => ConnectError::Away(error.details().to_owned()),
    }
}

/// Connects to the first address of this Redis that accepts connections.
pub async fn connect(
    config: Config,
    terms: &Terms,
    mode: WriteMode,
    reports: impl Fn(Report) + Clone + Send + Sync + 'static,
) -> Result<(Session, broadcast::Receiver<Message>), ConnectError> {
    let Some(name) = Name::of(&config) else { return connect_to(config, None, terms, mode, reports).await };
    let mut failure = ConnectError::Away("no addresses for the name".into());
    for address in name.lookup().await.map_err(ConnectError::Away)? {
        let peer = Peer { name: name.clone(), address };
        let config = name.at(address, &config);
        match connect_to(config, Some(peer), terms, mode, reports.clone()).await {
            Err(error @ ConnectError::Away(_)) => failure = error,
            result => return result,
        }
    }
    Err(failure)
}

/// Makes both connections, checks that this Redis will do, and loads what runs in it.
async fn connect_to(
    config: Config,
    peer: Option<Peer>,
    terms: &Terms,
    mode: WriteMode,
    reports: impl Fn(Report) + Clone + Send + Sync + 'static,
) -> Result<(Session, broadcast::Receiver<Message>), ConnectError> {
    let mut tasks = Tasks(Vec::new());
    let client = Client::new(config.clone(), None, Some(connection_config(Vec::new())), None);
    let commands_end = client.init().await.map_err(not_connected)?;
    tasks.0.push(commands_end.abort_handle());
    check_server(&client).await?;

    let performance =
        PerformanceConfig { broadcast_channel_capacity: MESSAGES, ..PerformanceConfig::default() };
    // fred takes SUBSCRIBE for done before Redis has answered. A refusal must not get lost, so it ends the session.
    let refusals = vec![ReconnectError::Custom("NOPERM")];
    let subscriber =
        SubscriberClient::new(config, Some(performance), Some(connection_config(refusals)), None);
    let subscriber_end = subscriber.init().await.map_err(not_connected)?;
    tasks.0.push(subscriber_end.abort_handle());
    let messages = subscriber.message_rx();

    let mut hashes = Vec::with_capacity(SCRIPTS.len());
    for (_, text) in SCRIPTS {
        let hash = setup(&client, "SCRIPT", vec!["LOAD".into(), text.into()]).await?;
        hashes.push(Value::Bytes(bytes(&hash).unwrap_or_default()));
    }
    let hashes: [Value; SCRIPTS.len()] = hashes.try_into().expect("as many hashes as scripts");
    let (open, watch_open) = watch::channel(());
    let caller = Caller::new(client.clone(), hashes, watch_open);
    check_permissions(&client, terms).await?;
    let no_library = functions::provide(&client, terms, mode).await.err().map(|error| error.text());

    let (orders, orders_rx) = mpsc::unbounded_channel();
    let report = reports.clone();
    let driver = tokio::spawn(async move {
        if let Err(why) = drive(subscriber, orders_rx, &report).await {
            report(Report::Ended(why));
        }
    });
    tasks.0.push(driver.abort_handle());
    let watcher = tokio::spawn(async move {
        let end = tokio::select! { end = commands_end => end, end = subscriber_end => end };
        let why = match end {
            Ok(Err(error)) => error.details().to_owned(),
            _ => "the connection was closed".to_owned(),
        };
        reports(Report::Ended(why));
    });
    tasks.0.push(watcher.abort_handle());
    let tasks = std::mem::take(&mut tasks.0);
    Ok((Session { caller, peer, no_library, orders, tasks, _open: open }, messages))
}

/// Ends what was begun when a later step fails.
struct Tasks(Vec<AbortHandle>);

impl Drop for Tasks {
    fn drop(&mut self) {
        for task in &self.0 {
            task.abort();
        }
    }
}

/// Carries out orders one after the other; what has gathered goes in one SUBSCRIBE. Redis answers on this
/// connection in order, so the PONG that follows proves the subscriptions before it.
async fn drive(
    subscriber: SubscriberClient,
    mut orders: mpsc::UnboundedReceiver<Order>,
    report: &impl Fn(Report),
) -> Result<(), String> {
    let client = subscriber.to_client();
    let mut next = orders.recv().await;
    while let Some(order) = next.take() {
        match order {
            Order::Subscribe(mut names, mut ticket) => {
                while names.len() < NAMES_MAX {
                    match orders.try_recv() {
                        Ok(Order::Subscribe(more, later)) => {
                            names.extend(more);
                            ticket = later;
                        }
                        Ok(other) => {
                            next = Some(other);
                            break;
                        }
                        Err(_) => break,
                    }
                }
                let names: Vec<fred::types::Key> = names.into_iter().map(Into::into).collect();
                subscriber.subscribe(names).await.map_err(|error| error.details().to_owned())?;
                command(&client, "PING", Vec::new()).await.map_err(|error| error.text().to_string())?;
                report(Report::Subscribed(ticket));
            }
            Order::Unsubscribe(names) => {
                let names: Vec<fred::types::Key> = names.into_iter().map(Into::into).collect();
                subscriber.unsubscribe(names).await.map_err(|error| error.details().to_owned())?;
            }
        }
        if next.is_none() {
            next = orders.recv().await;
        }
    }
    Ok(())
}
