//! A node: starts the shards, the accept loop, the bus and the admin listener, and stops them in
//! order.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

use self::systemd::Manager;
use crate::admin::{self, AdminContext};
use crate::auth::keys::KeyRing;
use crate::bus::{self, Requests};
use crate::config::{RedisUrl, SettingError, Settings};
use crate::limits::connections::ConnectionLimits;
use crate::metrics::{BusMetrics, Metrics, Readiness};
use crate::node::listeners::Listeners;
use crate::shard::mailbox::{MailboxSenders, ShardMessage};
use crate::shard::{self, NodeUnsent, ShardContext};
use crate::ws::handshake::HandshakeContext;

pub mod accept;
pub mod listeners;
pub mod memory_watch;
pub mod systemd;

/// Time for the accept loop to stop, and for the shards to stop after `--drain-timeout`. They need
/// milliseconds unless one hangs.
const GRACE: Duration = Duration::from_secs(2);

/// Longest wait after the drain for publishes of backends.
const PUBLISH_WAIT_MAX: Duration = Duration::from_secs(60);

const RAISE_OPEN_FILES: &str = "raise LimitNOFILE= in the unit, or ulimit -n in a shell";

/// What this host lacks to run a node with these settings: descriptors, CA certificates for TLS.
pub fn unmet_requirements(settings: &Settings) -> Vec<SettingError> {
    let certificates = settings.redis.as_ref().map(bus::redis::url::check_ca_certificates);
    settings.open_files_problem().into_iter().chain(certificates.and_then(Result::err)).collect()
}

/// Serves until `shutdown` returns a reason to stop, then closes every connection.
///
/// # Errors
/// When a shard, the accept loop or the bus fails.
pub async fn run(
    settings: Settings,
    keys: Arc<KeyRing>,
    listeners: Listeners,
    manager: Arc<Manager>,
    shutdown: impl Future<Output = &'static str>,
) -> anyhow::Result<()> {
    let settings = Arc::new(settings);
    let bus_metrics = Arc::new(BusMetrics::default());
    let readiness = Arc::new(Readiness::waiting_for_bus(bus::starting(&settings)));
    let metrics = Arc::new(Metrics::new(settings.shards.get(), bus_metrics.clone(), readiness.clone()));
    let (requests, asked) = mpsc::unbounded_channel();
    let limits = Arc::new(ConnectionLimits::new(&settings));
    metrics.max_connections.set(u64::from(settings.connection_limit()));
    let context = HandshakeContext {
        settings: settings.clone(),
        readiness: readiness.clone(),
        keys: keys.clone(),
        limits: limits.clone(),
        loopback: listeners
            .public()?
            .into_iter()
            .filter(|addr| addr.ip().to_canonical().is_loopback())
            .collect(),
    };

    log_start(&settings, &listeners)?;
    let (shards, mut ended) = start_shards(&context, &requests, &metrics)?;
    let bans = limits.bans.clone();
    let mut accept_loop = accept::start(
        &settings,
        listeners.public,
        listeners.shared,
        shards.clone(),
        limits,
        metrics.clone(),
    )?;
    manager.ready();
    tokio::spawn(systemd::keep_notified(manager.clone(), metrics.clone()));
    let context = AdminContext {
        requests,
        shards: shards.clone(),
        metrics: metrics.clone(),
        keys,
        bans: bans.clone(),
        settings: settings.clone(),
    };
    let admin = listeners.admin.map(|listener| admin::start(listener, context)).transpose()?;

    let context = bus::BusContext {
        requests: asked,
        shards: Arc::new(shards.clone()),
        bans,
        metrics: bus_metrics,
        readiness: readiness.clone(),
    };
    let mut bus = std::pin::pin!(bus::run(&settings, context));
    let why = tokio::select! {
        result = &mut bus => return Ok(result?),
        end = ended.recv() => return end.unwrap_or(Ok(())).context("a shard failed"),
        error = accept_loop.failed() => return Err(error).context("the accept loop failed"),
        why = shutdown => why,
    };

    let (stopping, closed) = (Instant::now(), metrics.closed());
    tracing::info!(why, connections = metrics.connections(), "stopping");
    // Publishes of backends may wait for the bus after the drain, but no longer than the drain may
    // take.
    let publish_wait = settings.publish_timeout.min(settings.drain_timeout.max(GRACE)).min(PUBLISH_WAIT_MAX);
    manager.stopping(settings.drain_delay + settings.drain_timeout + publish_wait + 3 * GRACE);
    readiness.drain();
    let drained = async {
        sleep(settings.drain_delay).await;
        // The shards get the last accepted sockets before the drain starts.
        let _ = timeout(GRACE, accept_loop.stop()).await;
        for shard in 0..shards.count() {
            shards.send(shard, ShardMessage::Drain(settings.drain_timeout));
        }
        let all_ended = async {
            for _ in 0..shards.count() {
                ended.recv().await;
            }
        };
        let drained = timeout(settings.drain_timeout + GRACE, all_ended).await;
        if let Some(admin) = admin {
            admin.finish(publish_wait).await;
        }
        drained
    };
    // The bus runs during the drain to answer publishes of clients and backends.
    tokio::select! {
        result = &mut bus => result?,
        result = drained => {
            result.context("a shard hangs: it did not stop after the drain")?;
        }
    }
    let (seconds, closed) = (stopping.elapsed().as_secs_f64(), metrics.closed() - closed);
    tracing::info!(seconds, closed, left = metrics.connections(), "stopped");
    Ok(())
}

/// Logs the settings that help to read the rest of the log.
fn log_start(settings: &Settings, listeners: &Listeners) -> io::Result<()> {
    let listen: Vec<String> = listeners.public()?.iter().map(SocketAddr::to_string).collect();
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        listen = listen.join(","),
        admin = listeners.admin()?.to_string(),
        bus = settings.redis.as_ref().map_or_else(|| "local".into(), RedisUrl::to_string),
        shards = settings.shards,
        max_connections = settings.connection_limit(),
        max_channels = settings.max_channels,
        max_message_size = settings.max_message_size,
        history = settings.history,
        buffer_memory = settings.buffer_memory(),
        open_files = settings.open_files,
        "started"
    );
    if let Some(excess) = settings.memory_excess() {
        tracing::warn!(
            excess,
            limit = settings.memory.limit(),
            advice = "lower --max-connections or --buffer-memory",
            "the settings need more memory than available"
        );
    }
    if settings.has_few_open_files() {
        tracing::warn!(
            max_connections = settings.connection_limit(),
            open_files = settings.open_files,
            advice = RAISE_OPEN_FILES,
            "the limit on open files allows few connections"
        );
    }
    if let Some(asked) = settings.max_connections.filter(|asked| asked.get() > settings.connection_limit()) {
        tracing::warn!(
            max_connections = settings.connection_limit(),
            advice = RAISE_OPEN_FILES,
            "--max-connections {asked} is more than the limit on open files allows"
        );
    }
    Ok(())
}

type Ended = mpsc::UnboundedReceiver<io::Result<()>>;

fn start_shards(
    handshake: &HandshakeContext,
    requests: &Requests,
    metrics: &Arc<Metrics>,
) -> io::Result<(MailboxSenders, Ended)> {
    let (end, ended) = mpsc::unbounded_channel();
    let (shards, inboxes) = MailboxSenders::new(handshake.settings.shards.get());
    let unsent = Arc::new(NodeUnsent::default());
    for (id, inbox) in inboxes.into_iter().enumerate() {
        let context = ShardContext {
            id,
            handshake: handshake.clone(),
            requests: requests.clone(),
            shards: shards.clone(),
            metrics: metrics.clone(),
            unsent: unsent.clone(),
            takes_binary: false,
        };
        let end = end.clone();
        thread::Builder::new().name(format!("shard-{id}")).spawn(move || {
            let _ = end.send(shard::run(context, inbox)); // fails only when the node has ended
        })?;
    }
    Ok((shards, ended))
}
