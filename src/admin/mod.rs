//! The admin API: publish, disconnect, history, channels, presence, live view, metrics, stats, health.
//! HTTP/1.1 with keep-alive on a thread of its own, so that it delays no event.

use std::future::{Future, ready};
use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use bytes::Bytes;
use tokio::runtime;
use tokio::sync::{Semaphore, SemaphorePermit, oneshot, watch};
use tokio::task::{JoinSet, yield_now};
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

use crate::auth::keys::KeyRing;
use crate::bus::{Answer, BusError, Publish, PublishError, Request, Requests};
use crate::config::Settings;
use crate::http::origin;
use crate::http::{self, Head, Rejection, Response};
use crate::limits::bans::Bans;
use crate::metrics::rejections::RejectionClass;
use crate::metrics::{AcceptLog, Metrics};
use crate::protocol::event::{ChannelName, is_idempotency_key, is_user_id};
use crate::protocol::inbox::PublishedId;
use crate::protocol::ingest;
use crate::shard::mailbox::MailboxSenders;

mod channels;
mod connection;
mod connections;
mod control;
mod history;
mod listener;
mod live_view;
mod presence;
mod query;
#[cfg(test)]
mod tests;

use channels::ChannelsQuery;
use connection::{Waits, serve_connection};
use connections::ConnectionsQuery;
use history::HistoryQuery;
use listener::{Accepting, SocketFile};
pub use listener::{Listener, Open};
use presence::PresenceQuery;

/// Least number of connections: systemd may pass a socket although `--admin` is off, and then none
/// are planned.
const CONNECTIONS_MIN: usize = 4;
/// One in this many connections is reserved for health and metrics while requests wait for the bus
/// or the shards on all others.
const RESERVED_PART: usize = 16;
/// Requests for history or channels that are answered at a time. More wait their turn, so that
/// lookups do not delay deliveries.
const CONCURRENT_LOOKUPS: usize = 2;
/// Added to `--publish-timeout`: the bus answers within that time, plus the time to notice that it
/// is over.
const BUS_GRACE: Duration = Duration::from_secs(5);
/// Wait after a failed accept: without descriptors the next accept fails too.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Interval of the turns that the watchdog counts.
const TURN: Duration = Duration::from_millis(500);
/// Longest time for clients to read the last responses once the node no longer waits for the bus.
const LAST_ANSWERS: Duration = Duration::from_secs(1);

#[derive(Clone, Debug)]
pub struct AdminContext {
    pub requests: Requests,
    pub shards: MailboxSenders,
    pub metrics: Arc<Metrics>,
    pub keys: Arc<KeyRing>,
    pub bans: Arc<Bans>,
    pub settings: Arc<Settings>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Serving,
    /// New connections are not accepted; open requests are answered.
    Finishing,
    /// Publishes that still wait for the bus are answered `unknown`, other requests 503.
    Ending,
}

/// Returns once the phase is `least` or later, or its sender is gone.
async fn reached(mut phase: watch::Receiver<Phase>, least: Phase) {
    while *phase.borrow_and_update() < least {
        if phase.changed().await.is_err() {
            return;
        }
    }
}

/// A running admin listener.
#[derive(Debug)]
pub struct Admin {
    phase: watch::Sender<Phase>,
    ended: oneshot::Receiver<()>,
    _file: Option<SocketFile>,
}

/// Serves on a thread of its own until [`Admin::finish`].
pub fn start(listener: Listener, context: AdminContext) -> io::Result<Admin> {
    let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
    let (accepting, file) = {
        let _entered = runtime.enter();
        listener.into_accepting()?
    };
    // One slot is for a client that connects when all others are in use, until one of those is
    // closed.
    let connections = (context.settings.admin_connections() as usize).max(CONNECTIONS_MIN) - 1;
    let waiting = connections - connections.div_ceil(RESERVED_PART);
    let (phase, seen) = watch::channel(Phase::Serving);
    let (end, ended) = oneshot::channel();
    let body = move || {
        runtime.block_on(serve([connections, waiting], accepting, context, seen));
        let _ = end.send(()); // fails only when nobody waits for it
    };
    thread::Builder::new().name("admin".into()).spawn(body)?;
    Ok(Admin { phase, ended, _file: file })
}

impl Admin {
    /// Stops accepting, and returns once every open request is answered. Publishes wait for the bus
    /// no longer than `publish_wait`; the caller runs the bus meanwhile.
    pub async fn finish(mut self, publish_wait: Duration) {
        self.phase.send_replace(Phase::Finishing);
        if timeout(publish_wait, &mut self.ended).await.is_err() {
            self.phase.send_replace(Phase::Ending);
            let _ = timeout(2 * LAST_ANSWERS, self.ended).await; // the process exits in any case
        }
    }
}

#[derive(Debug)]
struct Shared {
    context: AdminContext,
    /// Whether browsers can reach the listener without a key.
    checks_host: bool,
    /// Requests that may wait for the bus or the shards.
    waiting: Semaphore,
    lookups: Semaphore,
    waits: Waits,
    phase: watch::Receiver<Phase>,
}

impl Shared {
    async fn reached(&self, least: Phase) {
        reached(self.phase.clone(), least).await;
    }
}

/// Serves up to `most` connections, until [`Phase::Finishing`] and all requests are answered. One
/// connection more closes the one that has waited longest for its client. Up to `waiting` requests
/// wait for the bus or the shards. One more gets 503.
async fn serve(
    [most, waiting]: [usize; 2],
    listener: Accepting,
    context: AdminContext,
    phase: watch::Receiver<Phase>,
) {
    let metrics = context.metrics.clone();
    let shared = Arc::new(Shared {
        checks_host: listener.is_tcp() && !context.keys.current().requires_admin_key(),
        waiting: Semaphore::new(waiting),
        lookups: Semaphore::new(CONCURRENT_LOOKUPS),
        waits: Waits::default(),
        phase: phase.clone(),
        context,
    });
    let mut connections = JoinSet::new();
    let spawn = |connections: &mut JoinSet<()>, stream| {
        let shared = shared.clone();
        connections.spawn(async move {
            if let Err(error) = serve_connection(stream, &shared).await {
                tracing::debug!(%error, "admin connection failed");
            }
        });
    };
    let mut log = AcceptLog::new("admin");
    let mut turns = interval(TURN);
    turns.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut finishing = std::pin::pin!(reached(phase.clone(), Phase::Finishing));
    loop {
        while connections.try_join_next().is_some() {}
        let is_full = connections.len() > most;
        let accepted = tokio::select! {
            () = &mut finishing => break,
            _ = turns.tick() => {
                metrics.admin_turns.add(1);
                continue;
            }
            _ = connections.join_next(), if is_full => continue,
            accepted = listener.accept(), if !is_full => accepted,
        };
        match accepted {
            Ok(stream) => {
                log.succeeded();
                spawn(&mut connections, stream);
                if connections.len() > most {
                    shared.waits.stop_longest();
                }
            }
            Err(error) => {
                metrics.accept_failures.add(1);
                log.failed(&error, "clients wait");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    // Closing the listener would reset the connections in its queue.
    loop {
        yield_now().await; // lets the runtime poll the listener
        tokio::select! {
            biased;
            Ok(stream) = listener.accept() => spawn(&mut connections, stream),
            () = ready(()) => break,
        }
    }
    drop(listener);
    let cut = async {
        reached(phase, Phase::Ending).await;
        sleep(LAST_ANSWERS).await;
    };
    tokio::select! {
        () = async { while connections.join_next().await.is_some() {} } => {}
        () = cut => {}
    }
}

/// Rejects a request without the right key or host. Health checks need no key, nor does the live
/// view, which asks for it.
fn authorize(head: &Head<'_>, shared: &Shared) -> Result<(), Rejection> {
    let AdminContext { keys, metrics, settings, .. } = &shared.context;
    let reject = |reason, rejection: Rejection| {
        metrics.admin_rejections.add(1);
        let class = RejectionClass::new("admin request", reason, rejection.status);
        metrics.rejections.record(class, &rejection.text);
        Err(rejection)
    };
    // DNS rebinding: a site can point its name to this machine, and its page could read the
    // responses. All browsers send Host.
    let is_own = |host| origin::is_loopback_host(host) || origin::names_host(&settings.allow_origin, host);
    if shared.checks_host && head.count("host") > 0 && !head.header("host").is_some_and(is_own) {
        let text =
            "the Host must be localhost, 127.0.0.1 or a host in --allow-origin, unless an --admin-key is set";
        return reject("host", Rejection::new(403, text));
    }
    if matches!(head.path, "/" | "/healthz" | "/readyz") || keys.current().allows_admin(head) {
        return Ok(());
    }
    let text = "the admin key is missing or wrong: send Authorization: Bearer KEY (--admin-key)";
    reject("key", Rejection::new(401, text).with("WWW-Authenticate", "Bearer"))
}

async fn respond(head: &Head<'_>, body: &[u8], shared: &Shared) -> Result<Response, Rejection> {
    let allowed = match head.path {
        "/publish" | "/disconnect" => "POST",
        "/ban" => "DELETE",
        "/" | "/history" | "/channels" | "/presence" | "/connections" | "/bans" | "/metrics" | "/stats"
        | "/healthz" | "/readyz" => "GET, HEAD",
        _ => {
            let known = "POST /publish and /disconnect, DELETE /ban, GET /, /history, /channels, /presence, /connections, \
                /bans, /metrics, /stats, /healthz and /readyz";
            return Err(Rejection::new(404, format!("no such path: use {known}")));
        }
    };
    if !allowed.split(", ").any(|method| method == head.method) {
        return Err(Rejection::new(405, format!("{} accepts {allowed}", head.path)).with("Allow", allowed));
    }
    let metrics = &shared.context.metrics;
    Ok(match head.path {
        "/" => live_view::response(shared.context.keys.current().requires_admin_key()),
        "/publish" => publish(head, body, shared).await?,
        "/disconnect" => control::execute(head, control::parse_disconnect(head.query)?, shared).await?,
        "/ban" => control::execute(head, control::parse_unban(head.query)?, shared).await?,
        "/bans" => control::list_bans(head.query, shared)?,
        "/history" => look_up(HistoryQuery::parse(head.query)?.answer(shared), shared).await?,
        "/channels" => look_up(ChannelsQuery::parse(head.query)?.answer(shared), shared).await?,
        "/presence" => {
            let query = PresenceQuery::parse(head.query, &shared.context.settings)?;
            look_up(query.answer(shared), shared).await?
        }
        "/connections" => look_up(ConnectionsQuery::parse(head.query)?.answer(shared), shared).await?,
        "/metrics" => Response::new(200, "text/plain; version=0.0.4; charset=utf-8", metrics.prometheus()),
        "/stats" => Response::json(200, &metrics.stats_json()),
        "/healthz" => Response::line(200, "ok"),
        _ => match metrics.readiness.not_ready_reason() {
            None => match metrics.readiness.unavailable_primaries() {
                None => Response::line(200, "ready"),
                Some(primaries) => Response::line(200, &format!("ready, but unavailable: {primaries}")),
            },
            Some(reason) => Response::line(503, &reason).with("Retry-After", "1"),
        },
    })
}

async fn publish(head: &Head<'_>, body: &[u8], shared: &Shared) -> Result<Response, Rejection> {
    reject_pages(head, "publish")?;
    let (channel, to) = destination(head.query)?;
    let event = ingest::published(body, to.as_deref()).map_err(|bad| Rejection::new(400, bad.to_string()))?;
    let key = idempotency_key(head)?;
    let _permit = acquire_wait_slot(shared)?;
    let id = match publish_event(channel, to, key, event, shared).await {
        Ok(id) => id,
        Err(error) => {
            let (status, reason) = match error {
                PublishError::Rejected(_) | PublishError::Full => (503, "unavailable"),
                PublishError::Unknown => (504, "unknown"),
            };
            return Err(reject_and_log(error.to_string(), status, reason, shared));
        }
    };
    Ok(Response::json(200, &format!(r#"{{"id":{id}}}"#)))
}

/// The rejection of a request that the bus has not executed, which is logged.
fn reject_and_log(text: String, status: u16, reason: &'static str, shared: &Shared) -> Rejection {
    let class = RejectionClass::new("admin request", reason, status);
    shared.context.metrics.rejections.record(class, &text);
    match status {
        503 => Rejection::unavailable(text),
        _ => Rejection::new(status, text),
    }
}

/// Rejects requests of pages. Any page open in a browser on this machine could send them, even
/// without access to the response. Programs send no Origin.
fn reject_pages(head: &Head<'_>, what: &str) -> Result<(), Rejection> {
    match head.count("origin") {
        0 => Ok(()),
        _ => {
            Err(Rejection::new(403, format!("requests from browser pages (with Origin) may not {what} here")))
        }
    }
}

/// Takes one of the slots for requests that wait for the bus or the shards.
fn acquire_wait_slot(shared: &Shared) -> Result<SemaphorePermit<'_>, Rejection> {
    let text = "too many requests in progress: try again, or use another node";
    shared.waiting.try_acquire().map_err(|_| Rejection::unavailable(text))
}

/// Waits for an answer of the bus or the shards, which is JSON.
async fn look_up(
    answer: impl Future<Output = Result<String, BusError>>,
    shared: &Shared,
) -> Result<Response, Rejection> {
    let _permit = acquire_wait_slot(shared)?;
    let answer = async {
        let _turn = shared.lookups.acquire().await;
        answer.await
    };
    let time = shared.context.settings.publish_timeout + BUS_GRACE;
    tokio::select! {
        biased;
        answer = timeout(time, answer) => match answer {
            Ok(Ok(json)) => Ok(Response::json(200, &json)),
            Ok(Err(why)) => Err(Rejection::unavailable(why.to_string())),
            Err(_) => Err(Rejection::unavailable("no reply in time: try again")),
        },
        () = shared.reached(Phase::Ending) => Err(Rejection::unavailable("this node is stopping")),
    }
}

/// Parses `channel` and `to`.
fn destination(query: &str) -> Result<(ChannelName, Option<Arc<str>>), Rejection> {
    query::check_names(query, &["channel", "to"])?;
    let channel = http::query_channel(query)?;
    let to = http::query_value(query, "to")?;
    if to.as_deref().is_some_and(|user| !is_user_id(user)) {
        return Err(Rejection::new(400, "to must be a user id: 1 to 128 bytes, no control characters"));
    }
    Ok((channel, to.map(|user| user.as_ref().into())))
}

/// The `Idempotency-Key`, with which a retry publishes nothing twice. Quotes around it
/// (draft-ietf-httpapi-idempotency-key-header) are not part of the key.
fn idempotency_key(head: &Head<'_>) -> Result<Option<Arc<str>>, Rejection> {
    let given = match head.count("idempotency-key") {
        0 => return Ok(None),
        1 => head.header("idempotency-key"),
        _ => None,
    };
    let unquoted =
        given.map(|key| key.strip_prefix('"').and_then(|key| key.strip_suffix('"')).unwrap_or(key));
    match unquoted.filter(|key| is_idempotency_key(key)) {
        Some(key) => Ok(Some(key.into())),
        None => {
            let rule = "1 to 128 printable ASCII characters without blanks and quotes (quotes around it are dropped)";
            Err(Rejection::new(400, format!("Idempotency-Key must be given once: {rule}")))
        }
    }
}

/// Sends the event to the bus and waits for its id.
async fn publish_event(
    channel: ChannelName,
    to: Option<Arc<str>>,
    key: Option<Arc<str>>,
    event: Bytes,
    shared: &Shared,
) -> Result<PublishedId, PublishError> {
    let (waiter, outcome) = oneshot::channel();
    let publish = Publish { channel, sender: None, to, key, event, answer: Answer::Waiter(waiter) };
    let stopping = PublishError::Rejected(STOPPING.into());
    ask_bus(Request::Publish(publish), outcome, stopping, PublishError::Unknown, shared).await
}

/// Why the bus takes no more requests.
const STOPPING: &str = "this node is stopping";

/// Sends a request to the bus and waits for its result: `stopping` if the bus takes no more requests,
/// `unknown` if it has not answered in time, or before the node ends.
async fn ask_bus<T, E>(
    request: Request,
    result: oneshot::Receiver<Result<T, E>>,
    stopping: E,
    unknown: E,
    shared: &Shared,
) -> Result<T, E> {
    if shared.context.requests.send(request).is_err() {
        return Err(stopping);
    }
    let time = shared.context.settings.publish_timeout + BUS_GRACE;
    tokio::select! {
        biased;
        result = timeout(time, result) => match result {
            Ok(Ok(result)) => result,
            Ok(Err(_)) | Err(_) => Err(unknown),
        },
        () = shared.reached(Phase::Ending) => Err(unknown),
    }
}
