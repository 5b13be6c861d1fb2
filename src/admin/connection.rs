//! One connection to the admin listener. Requests are handled in order: the next is parsed after a
//! response is written.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::Notify;
use tokio::task::yield_now;
use tokio::time::{Instant, timeout, timeout_at};

use super::listener::Stream;
use super::{Phase, Shared, authorize, respond};
use crate::http::{self, BodyLength, Head, Rejection, Response};

/// Longest wait for the next request. Longer than the usual 15 to 60 s of a scraper.
pub(super) const IDLE_TIME: Duration = Duration::from_secs(75);
/// Longest time for a request's head: from accept for the first request, from its first byte for
/// others.
pub(super) const HEAD_TIME: Duration = Duration::from_secs(5);
/// Longest time for a body after its head.
const BODY_TIME: Duration = Duration::from_secs(10);
/// Longest time for a client to read a response.
const WRITE_TIME: Duration = Duration::from_secs(10);
/// Longest time for a new connection to start its request when the node stops: it may have
/// connected just before.
const LAST_REQUEST_TIME: Duration = Duration::from_secs(1);
/// Longest time to read on after the last response. Closing with unread bytes resets the
/// connection, and the client could lose the response (RFC 9112 section 9.6).
const LINGER_TIME: Duration = Duration::from_secs(1);
/// Bytes per read. Most requests fit.
const READ: usize = 4096;

/// Connections that wait for their clients, longest first. With too many connections the first one
/// is closed, so that idle clients hold no slots.
#[derive(Debug, Default)]
pub(super) struct Waits(Mutex<Waiting>);

#[derive(Debug, Default)]
struct Waiting {
    next: u64,
    stops: BTreeMap<u64, Arc<Notify>>,
}

/// A connection's wait for its client, until this is dropped.
struct Wait<'a> {
    waits: &'a Waits,
    number: u64,
    stop: Arc<Notify>,
}

impl Waits {
    fn start(&self) -> Wait<'_> {
        let stop = Arc::new(Notify::new());
        let mut waiting = self.0.lock().expect("nothing panics while holding it");
        let number = waiting.next;
        waiting.next += 1;
        waiting.stops.insert(number, stop.clone());
        Wait { waits: self, number, stop }
    }

    /// Ends the longest wait.
    pub fn stop_longest(&self) {
        let mut waiting = self.0.lock().expect("nothing panics while holding it");
        if let Some((_, stop)) = waiting.stops.pop_first() {
            stop.notify_one();
        }
    }
}

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        let mut waiting = self.waits.0.lock().expect("nothing panics while holding it");
        waiting.stops.remove(&self.number);
    }
}

/// What a connection waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// The first request.
    New,
    /// A later request.
    Idle,
    /// The rest of a request's head.
    Head,
    /// The rest of a request's body.
    Body,
}

impl Stage {
    fn time(self) -> Duration {
        match self {
            Stage::New | Stage::Head => HEAD_TIME,
            Stage::Idle => IDLE_TIME,
            Stage::Body => BODY_TIME,
        }
    }

    fn is_between_requests(self) -> bool {
        matches!(self, Stage::New | Stage::Idle)
    }
}

#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "matched where it is made")]
enum Progress<'a> {
    /// An incomplete head.
    Head,
    /// A head with an incomplete body. `wants_continue`: the client waits for `100 Continue` before
    /// it sends the body.
    Body { wants_continue: bool },
    /// A request and its length in bytes.
    Request { head: Head<'a>, body: &'a [u8], length: usize },
}

/// Parses the bytes received so far. Nothing but the bytes is kept between two calls.
fn progress<'a>(bytes: &'a [u8], shared: &Shared) -> Result<Progress<'a>, Rejection> {
    let body_max = shared.context.settings.max_message_size;
    let Some((head, start)) = http::parse(bytes)? else { return Ok(Progress::Head) };
    authorize(&head, shared)?; // before the body takes memory
    let body_length = match head.body_length()? {
        BodyLength::Empty => 0,
        BodyLength::Known(length) if length <= body_max as u64 => length as usize,
        BodyLength::Known(_) => {
            return Err(Rejection::new(413, format!("the body is too long: at most {body_max} bytes")));
        }
        BodyLength::Chunked => return Err(Rejection::new(411, "send the body with a Content-Length")),
    };
    let wants_continue = match head.header("expect") {
        None => false,
        Some(expected) if expected.eq_ignore_ascii_case("100-continue") => head.is_http_1_1,
        Some(_) => return Err(Rejection::new(417, "100-continue is the only supported expectation")),
    };
    let length = start + body_length;
    if bytes.len() < length {
        return Ok(Progress::Body { wants_continue });
    }
    Ok(Progress::Request { head, body: &bytes[start..length], length })
}

/// Serves a connection until it closes.
pub(super) async fn serve_connection(mut stream: impl Stream, shared: &Shared) -> io::Result<()> {
    let mut buffer = BytesMut::with_capacity(READ);
    let mut sent_continue = false;
    let mut stopping = false;
    let mut stage = Stage::New;
    let mut deadline = Instant::now() + stage.time();
    loop {
        let next = match progress(&buffer, shared) {
            Err(rejection) => return close(stream, Response::from(rejection), shared).await,
            Ok(Progress::Request { head, body, length }) => {
                let response = respond(&head, body, shared).await.unwrap_or_else(Response::from);
                // While the node stops, clients send their next request to another node.
                let keep_alive = head.keep_alive() && !shared.context.metrics.readiness.is_draining();
                send(&mut stream, &response.answering(&head).to_bytes(keep_alive), shared).await?;
                if !keep_alive {
                    return linger(stream).await;
                }
                buffer.advance(length);
                if buffer.is_empty() {
                    buffer = BytesMut::with_capacity(READ); // frees the memory of a long body
                }
                sent_continue = false;
                stage = Stage::Idle;
                deadline = Instant::now() + stage.time();
                yield_now().await; // one request per turn, or pipelined requests delay other connections
                continue;
            }
            Ok(Progress::Head) if buffer.is_empty() => stage,
            Ok(Progress::Head) => Stage::Head,
            Ok(Progress::Body { wants_continue }) => {
                if wants_continue && !sent_continue {
                    sent_continue = true;
                    send(&mut stream, b"HTTP/1.1 100 Continue\r\n\r\n", shared).await?;
                }
                Stage::Body
            }
        };
        if next != stage {
            if (stage, next) != (Stage::New, Stage::Head) {
                deadline = Instant::now() + next.time();
            }
            stage = next;
        }
        buffer.reserve(READ);
        let wait = shared.waits.start();
        let read = tokio::select! {
            biased;
            read = timeout_at(deadline, stream.read_buf(&mut buffer)) => read,
            () = wait.stop.notified() => return Ok(()),
            () = shared.reached(Phase::Finishing), if stage.is_between_requests() && !stopping => {
                if stage == Stage::Idle {
                    return Ok(());
                }
                stopping = true;
                deadline = deadline.min(Instant::now() + LAST_REQUEST_TIME);
                continue;
            }
        };
        match read {
            Ok(Ok(0)) => return Ok(()), // the client is gone
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return Err(error),
            Err(_) if stage.is_between_requests() => return Ok(()),
            Err(_) => {
                let seconds = stage.time().as_secs();
                let rejection =
                    Rejection::new(408, format!("the request was not complete after {seconds} seconds"));
                return close(stream, Response::from(rejection), shared).await;
            }
        }
    }
}

async fn send(stream: &mut impl Stream, bytes: &[u8], shared: &Shared) -> io::Result<()> {
    let wait = shared.waits.start();
    tokio::select! {
        biased;
        sent = timeout(WRITE_TIME, stream.write_all(bytes)) => sent.map_err(|_| io::ErrorKind::TimedOut)?,
        () = wait.stop.notified() => Err(io::ErrorKind::TimedOut.into()),
    }
}

async fn close(mut stream: impl Stream, response: Response, shared: &Shared) -> io::Result<()> {
    send(&mut stream, &response.to_bytes(false), shared).await?;
    linger(stream).await
}

/// Shuts down the write side, then reads and drops input until the client closes.
async fn linger(mut stream: impl Stream) -> io::Result<()> {
    stream.shutdown().await?;
    let mut scrap = [0; READ];
    let drained = async { while stream.read(&mut scrap).await.is_ok_and(|count| count > 0) {} };
    let _ = timeout(LINGER_TIME, drained).await; // a client that still sends had time to read
    Ok(())
}
