//! The admin listener: publish, metrics, stats. HTTP/1.1 with keep-alive, on the control thread.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{Semaphore, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::bus::{Answer, Publish, PublishError, Request, Requests};
use crate::event::{ChannelName, DEFAULT_CHANNEL, is_user_id};
use crate::foreign;
use crate::http::{self, BodyLength, Head, Refusal, Response};
use crate::keys::KeyRing;
use crate::metrics::Metrics;
use crate::refusals::Class;

mod listener;
#[cfg(test)]
mod tests;

use listener::Stream;
pub use listener::{Listener, Open};

/// How long a kept connection may wait for its next request. Longer than a scraper's usual 15 to 60 s.
const IDLE: Duration = Duration::from_secs(75);
/// How long a request may take to arrive once it has begun.
const REQUEST_TIME: Duration = Duration::from_secs(10);
/// How long a client may take to read an answer.
const WRITE_TIME: Duration = Duration::from_secs(10);
/// How long we go on reading after a last answer, so that the kernel doesn't throw it away with a reset
/// because bytes of the client were left unread (RFC 9112 section 9.6).
const LINGER_TIME: Duration = Duration::from_secs(1);
/// The bus answers within `--publish-timeout`; what it needs to notice that time is up comes on top.
const BUS_GRACE: Duration = Duration::from_secs(5);
/// Wait after a failed accept: without descriptors the next one fails too.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Bytes read at a time. Most requests fit.
const READ: usize = 4096;

/// What the admin listener works with.
#[derive(Clone, Debug)]
pub struct AdminContext {
    /// The way to the bus.
    pub requests: Requests,
    /// What it shows, and whether the node is ready.
    pub metrics: Arc<Metrics>,
    /// The key to it.
    pub keys: Arc<KeyRing>,
    /// Connections at once; more wait to be accepted.
    pub connections: usize,
    /// Longest body, in bytes.
    pub max_message: usize,
    /// How long the bus may take to answer a publish.
    pub publish_timeout: Duration,
}

/// Serves until dropped; its connections end with it.
pub async fn serve(listener: Listener, context: AdminContext) {
    let slots = Arc::new(Semaphore::new(context.connections));
    let mut connections = JoinSet::new();
    loop {
        let slot = slots.clone().acquire_owned().await.expect("the semaphore is never closed");
        while connections.try_join_next().is_some() {}
        match listener.accept().await {
            Ok(stream) => {
                let context = context.clone();
                connections.spawn(async move {
                    if let Err(error) = converse(stream, &context).await {
                        tracing::debug!(%error, "an admin connection broke");
                    }
                    drop(slot);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "the admin listener could not accept a connection");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// How far the bytes in hand go.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "looked at and dropped where it is made")]
enum Progress<'a> {
    /// Not yet a whole request; `true` when the client waits for a word before it sends the body.
    More { wants_continue: bool },
    /// A request and its length in bytes.
    Request { head: Head<'a>, body: &'a [u8], length: usize },
}

/// Looks at what has come. Nothing is kept between two looks but the bytes themselves.
fn progress<'a>(bytes: &'a [u8], context: &AdminContext) -> Result<Progress<'a>, Refusal> {
    let body_max = context.max_message;
    let Some((head, start)) = http::parse(bytes)? else {
        return Ok(Progress::More { wants_continue: false });
    };
    authorize(&head, context)?; // before a stranger's body takes memory
    let body_length = match head.body_length()? {
        BodyLength::Empty => 0,
        BodyLength::Known(length) if length <= body_max as u64 => length as usize,
        BodyLength::Known(_) => {
            return Err(Refusal::new(413, format!("the body is too long: at most {body_max} bytes")));
        }
        BodyLength::Chunked => return Err(Refusal::new(411, "send the body with a Content-Length")),
    };
    let wants_continue = match head.header("expect") {
        None => false,
        Some(expected) if expected.eq_ignore_ascii_case("100-continue") => head.is_http_1_1,
        Some(_) => return Err(Refusal::new(417, "no other expectation than 100-continue can be met")),
    };
    let length = start + body_length;
    if bytes.len() < length {
        return Ok(Progress::More { wants_continue });
    }
    Ok(Progress::Request { head, body: &bytes[start..length], length })
}

/// One connection: requests one after the other, each answered before the next is looked at.
async fn converse(mut stream: impl Stream, context: &AdminContext) -> io::Result<()> {
    let mut buffer = BytesMut::with_capacity(READ);
    let mut told_to_continue = false;
    let mut deadline = Instant::now() + IDLE;
    loop {
        match progress(&buffer, context) {
            Err(refusal) => return close(stream, Response::from(refusal)).await,
            Ok(Progress::Request { head, body, length }) => {
                let response = answer(&head, body, context).await.unwrap_or_else(Response::from);
                let keep_alive = head.keep_alive();
                send(&mut stream, &response.to_bytes(&head, keep_alive)).await?;
                if !keep_alive {
                    return linger(stream).await;
                }
                buffer.advance(length);
                told_to_continue = false;
                deadline = Instant::now() + REQUEST_TIME;
                if buffer.is_empty() {
                    buffer = BytesMut::with_capacity(READ); // a long body's memory is not kept while idle
                    deadline = Instant::now() + IDLE;
                }
                continue;
            }
            Ok(Progress::More { wants_continue: true }) if !told_to_continue => {
                told_to_continue = true;
                send(&mut stream, b"HTTP/1.1 100 Continue\r\n\r\n").await?;
            }
            Ok(Progress::More { .. }) => {}
        }
        let was_idle = buffer.is_empty();
        buffer.reserve(READ);
        match timeout_at(deadline, stream.read_buf(&mut buffer)).await {
            Ok(Ok(0)) => return Ok(()), // between requests or within one: nobody is there to be answered
            Ok(Ok(_)) if was_idle => deadline = Instant::now() + REQUEST_TIME,
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return Err(error),
            Err(_) if was_idle => return Ok(()),
            Err(_) => {
                let seconds = REQUEST_TIME.as_secs();
                let refusal =
                    Refusal::new(408, format!("the request was not complete after {seconds} seconds"));
                return close(stream, Response::from(refusal)).await;
            }
        }
    }
}

/// Whoever watches over the process may look at its health; all else needs the key, if there is one.
fn authorize(head: &Head<'_>, context: &AdminContext) -> Result<(), Refusal> {
    if matches!(head.path, "/healthz" | "/readyz") || context.keys.current().admit_admin(head) {
        return Ok(());
    }
    context.metrics.admin_refused.add(1);
    let class = Class { what: "admin request", why: "key", status: 401 };
    context.metrics.refusals.note(class, "the key is missing or wrong: see --admin-key");
    let text = "the admin key is missing or wrong: send Authorization: Bearer KEY";
    Err(Refusal::new(401, text).with("WWW-Authenticate", "Bearer"))
}

async fn send(stream: &mut impl Stream, bytes: &[u8]) -> io::Result<()> {
    timeout(WRITE_TIME, stream.write_all(bytes)).await.map_err(|_| io::ErrorKind::TimedOut)?
}

async fn close(mut stream: impl Stream, response: Response) -> io::Result<()> {
    send(&mut stream, &response.to_closing_bytes()).await?;
    linger(stream).await
}

/// Says that nothing more comes, then reads what is still on its way, for a while.
async fn linger(mut stream: impl Stream) -> io::Result<()> {
    stream.shutdown().await?;
    let mut scrap = [0; READ];
    let drained = async { while stream.read(&mut scrap).await.is_ok_and(|count| count > 0) {} };
    let _ = timeout(LINGER_TIME, drained).await; // whoever still sends has had time to read
    Ok(())
}

async fn answer(head: &Head<'_>, body: &[u8], context: &AdminContext) -> Result<Response, Refusal> {
    let allowed = match head.path {
        "/publish" => "POST",
        "/metrics" | "/stats" | "/healthz" | "/readyz" => "GET, HEAD",
        _ => {
            let known = "POST /publish, GET /metrics, /stats, /healthz and /readyz";
            return Err(Refusal::new(404, format!("there is no such path; there are {known}")));
        }
    };
    if !allowed.split(", ").any(|method| method == head.method) {
        return Err(Refusal::new(405, format!("{} takes {allowed}", head.path)).with("Allow", allowed));
    }
    let metrics = context.metrics.clone();
    Ok(match head.path {
        "/publish" => publish(head, body, context).await?,
        "/metrics" => {
            let text = render(move || metrics.prometheus()).await?;
            Response::new(200, "text/plain; version=0.0.4; charset=utf-8", text)
        }
        "/stats" => Response::json(200, &render(move || metrics.stats_json()).await?),
        "/healthz" => Response::line(200, "ok"),
        _ => match context.metrics.readiness.trouble() {
            None => Response::line(200, "ready"),
            Some(trouble) => Response::line(503, &trouble).with("Retry-After", "1"),
        },
    })
}

/// Reads the numbers away from the control thread, which carries every event: proc can be slow.
async fn render(text: impl FnOnce() -> String + Send + 'static) -> Result<String, Refusal> {
    let rendered = tokio::task::spawn_blocking(text).await;
    rendered.map_err(|_| Refusal::new(503, "this node is stopping").with("Retry-After", "1"))
}

async fn publish(head: &Head<'_>, body: &[u8], context: &AdminContext) -> Result<Response, Refusal> {
    if head.count("origin") > 0 {
        // Any page that a browser on this machine has open could publish here, without being able to read the
        // answer. Programs send no Origin.
        return Err(Refusal::new(403, "this is for programs, not for pages in a browser"));
    }
    let (channel, to) = destination(head.query)?;
    let event = foreign::published(body, to.as_deref()).map_err(|bad| Refusal::new(400, bad.to_string()))?;
    let id = match hand_over(channel, to, event, context).await {
        Ok(id) => id,
        Err(error) => {
            let text = error.to_string();
            let (status, why) = match error {
                PublishError::Refused(_) => (503, "unavailable"),
                PublishError::Unknown => (504, "unknown"),
            };
            context.metrics.refusals.note(Class { what: "admin request", why, status }, &text);
            let refusal = Refusal::new(status, text);
            return Err(if status == 503 { refusal.with("Retry-After", "1") } else { refusal });
        }
    };
    Ok(Response::json(200, &format!(r#"{{"id":{id}}}"#)))
}

/// `channel` and `to`. An unknown parameter is refused: a mistyped `channel` would publish to everybody in the
/// default one, a mistyped `to` to everybody else.
fn destination(query: &str) -> Result<(ChannelName, Option<Arc<str>>), Refusal> {
    let mut seen = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let name = pair.split_once('=').map_or(pair, |(name, _)| name);
        if !matches!(name, "channel" | "to") {
            return Err(Refusal::new(400, format!("there is no parameter {name}; there are channel and to")));
        }
        if seen.contains(&name) {
            return Err(Refusal::new(400, format!("the parameter {name} is given twice")));
        }
        seen.push(name);
    }
    let channel = http::query_value(query, "channel")?;
    let channel = ChannelName::parse(channel.as_deref().unwrap_or(DEFAULT_CHANNEL))
        .ok_or_else(|| Refusal::new(400, "channel must be 1 to 128 letters, digits, _ . : and -"))?;
    let to = http::query_value(query, "to")?;
    if to.as_deref().is_some_and(|user| !is_user_id(user)) {
        return Err(Refusal::new(400, "to must be a user id: 1 to 128 bytes, no control characters"));
    }
    Ok((channel, to.map(|user| user.as_ref().into())))
}

/// Gives the event to the bus and waits for its id.
async fn hand_over(
    channel: ChannelName,
    to: Option<Arc<str>>,
    event: Bytes,
    context: &AdminContext,
) -> Result<crate::event::EventId, PublishError> {
    let (waiter, outcome) = oneshot::channel();
    let publish = Publish { channel, to, event, answer: Answer::Waiter(waiter) };
    if context.requests.send(Request::Publish(publish)).is_err() {
        return Err(PublishError::Refused("this node is stopping".into()));
    }
    match timeout(context.publish_timeout + BUS_GRACE, outcome).await {
        Ok(Ok(result)) => result,
        Ok(Err(_)) | Err(_) => Err(PublishError::Unknown),
    }
}
