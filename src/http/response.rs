//! Responses and rejections, written to a byte buffer.

use std::borrow::Cow;

use bytes::{BufMut, Bytes, BytesMut};
use http::StatusCode;

use super::Head;
use crate::protocol::close::CloseReason;

/// A request that is not served: sent as a [`Response`] with one line of text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejection {
    pub status: u16,
    /// What is wrong and what to do, in one line without its line end.
    pub text: Cow<'static, str>,
    /// Headers that belong to the status, such as `Allow` and `Retry-After`.
    pub headers: Vec<(&'static str, Cow<'static, str>)>,
    /// The reason under which the closed connection is counted and logged.
    pub reason: CloseReason,
    /// What the log has in place of the text.
    pub log_detail: Option<LogDetail>,
    /// The request was HEAD.
    omit_body: bool,
}

/// Why a request is rejected, if only operators may learn it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogDetail {
    /// A value of a closed set, under which log lines are counted.
    pub cause: &'static str,
    pub text: String,
}

impl Rejection {
    /// A rejection without headers, counted as [`CloseReason::HttpResponse`].
    pub fn new(status: u16, text: impl Into<Cow<'static, str>>) -> Rejection {
        Rejection {
            status,
            text: text.into(),
            headers: Vec::new(),
            reason: CloseReason::HttpResponse,
            log_detail: None,
            omit_body: false,
        }
    }

    /// A 503 after which the client may try again at once, possibly at another node.
    pub fn unavailable(text: impl Into<Cow<'static, str>>) -> Rejection {
        Rejection::new(503, text).with("Retry-After", "1")
    }

    /// Adds a header.
    pub fn with(mut self, name: &'static str, value: impl Into<Cow<'static, str>>) -> Rejection {
        self.headers.push((name, value.into()));
        self
    }

    /// Sets the reason.
    pub fn because(mut self, reason: CloseReason) -> Rejection {
        self.reason = reason;
        self
    }

    /// Sets what the log has in place of the text.
    pub fn logged(mut self, cause: &'static str, text: String) -> Rejection {
        self.log_detail = Some(LogDetail { cause, text });
        self
    }

    /// The text for the log.
    pub fn log_text(&self) -> &str {
        self.log_detail.as_ref().map_or(&self.text, |detail| &detail.text)
    }

    /// Makes it the response to this request.
    pub fn answering(mut self, head: &Head<'_>) -> Rejection {
        self.omit_body = head.method == "HEAD";
        self
    }
}

/// A response with its whole body.
#[derive(Clone, Debug)]
pub struct Response {
    status: u16,
    content_type: &'static str,
    headers: Vec<(&'static str, Cow<'static, str>)>,
    body: Bytes,
    /// The request was HEAD.
    omit_body: bool,
}

impl Response {
    pub fn new(status: u16, content_type: &'static str, body: impl Into<Bytes>) -> Response {
        Response { status, content_type, headers: Vec::new(), body: body.into(), omit_body: false }
    }

    /// A response of one line of text, given without its line end.
    pub fn line(status: u16, text: &str) -> Response {
        let mut body = one_line(text).into_owned();
        body.push('\n');
        Response::new(status, "text/plain; charset=utf-8", body)
    }

    /// A response of one JSON text, given without its line end.
    pub fn json(status: u16, text: &str) -> Response {
        Response::new(status, "application/json", format!("{text}\n"))
    }

    /// Adds a header.
    pub fn with(mut self, name: &'static str, value: impl Into<Cow<'static, str>>) -> Response {
        self.headers.push((name, value.into()));
        self
    }

    /// Makes it the response to this request.
    pub fn answering(mut self, head: &Head<'_>) -> Response {
        self.omit_body = head.method == "HEAD";
        self
    }

    pub fn status(&self) -> u16 {
        self.status
    }

    /// The bytes to send. The caller keeps the connection or closes it, as `keep_alive` says.
    pub fn to_bytes(&self, keep_alive: bool) -> Bytes {
        let mut out = BytesMut::with_capacity(256 + self.body.len());
        let status = StatusCode::from_u16(self.status).expect("statuses are constants");
        let phrase = match self.status {
            413 => "Content Too Large", // RFC 9110 section 15.5.14; the crate has the older phrase
            _ => status.canonical_reason().unwrap_or_default(),
        };
        out.put_slice(format!("HTTP/1.1 {} {phrase}\r\n", self.status).as_bytes());
        let has_content = !matches!(self.status, 204 | 304); // RFC 9110 sections 15.3.5 and 15.4.5
        if has_content {
            put_header(&mut out, "Content-Type", self.content_type);
            put_header(&mut out, "Content-Length", &self.body.len().to_string());
        }
        put_header(&mut out, "Connection", if keep_alive { "keep-alive" } else { "close" });
        for (name, value) in &self.headers {
            put_header(&mut out, name, value);
        }
        out.put_slice(b"\r\n");
        if has_content && !self.omit_body {
            out.put_slice(&self.body);
        }
        out.freeze()
    }
}

impl From<&Rejection> for Response {
    fn from(rejection: &Rejection) -> Response {
        let line = Response::line(rejection.status, &rejection.text);
        Response { headers: rejection.headers.clone(), omit_body: rejection.omit_body, ..line }
    }
}

impl From<Rejection> for Response {
    fn from(rejection: Rejection) -> Response {
        Response::from(&rejection)
    }
}

fn put_header(out: &mut BytesMut, name: &str, value: &str) {
    out.put_slice(name.as_bytes());
    out.put_slice(b": ");
    out.put_slice(one_line(value).as_bytes());
    out.put_slice(b"\r\n");
}

/// Replaces control characters: a header or a line that quotes a client must not start another.
fn one_line(text: &str) -> Cow<'_, str> {
    if !text.contains(char::is_control) {
        return Cow::Borrowed(text);
    }
    Cow::Owned(text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect())
}
