//! Responses written to a byte buffer.

use std::borrow::Cow;

use bytes::{BufMut, Bytes, BytesMut};

use super::Head;

/// A request that is not served, and why: becomes a [`Response`] with one line of text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The HTTP status.
    pub status: u16,
    /// What is wrong and what to do, in one line without its end.
    pub text: Cow<'static, str>,
    /// Headers that belong to the status, such as `Allow` and `Retry-After`.
    pub headers: Vec<(&'static str, Cow<'static, str>)>,
}

impl Refusal {
    /// A refusal without headers of its own.
    pub fn new(status: u16, text: impl Into<Cow<'static, str>>) -> Refusal {
        Refusal { status, text: text.into(), headers: Vec::new() }
    }

    /// The same with one more header.
    pub fn with(mut self, name: &'static str, value: impl Into<Cow<'static, str>>) -> Refusal {
        self.headers.push((name, value.into()));
        self
    }
}

/// A response, written whole.
#[derive(Clone, Debug)]
pub struct Response {
    status: u16,
    content_type: &'static str,
    headers: Vec<(&'static str, Cow<'static, str>)>,
    body: Bytes,
}

impl Response {
    /// A response with a body.
    pub fn new(status: u16, content_type: &'static str, body: impl Into<Bytes>) -> Response {
        Response { status, content_type, headers: Vec::new(), body: body.into() }
    }

    /// A response of one line of text, given without its end.
    pub fn line(status: u16, text: &str) -> Response {
        let mut body = one_line(text).into_owned();
        body.push('\n');
        Response::new(status, "text/plain; charset=utf-8", body)
    }

    /// A response of one JSON text, given without its line end.
    pub fn json(status: u16, text: &str) -> Response {
        Response::new(status, "application/json", format!("{text}\n"))
    }

    /// The same with one more header.
    pub fn with(mut self, name: &'static str, value: impl Into<Cow<'static, str>>) -> Response {
        self.headers.push((name, value.into()));
        self
    }

    /// The HTTP status.
    pub fn status(&self) -> u16 {
        self.status
    }

    /// The bytes to send in answer to `head`. The caller closes or keeps the connection as `keep_alive` says.
    pub fn to_bytes(&self, head: &Head<'_>, keep_alive: bool) -> Bytes {
        self.write(keep_alive, head.method != "HEAD")
    }

    /// The bytes to send when the head could not be read, or the request goes no further: the connection closes.
    pub fn to_closing_bytes(&self) -> Bytes {
        self.write(false, true)
    }

    fn write(&self, keep_alive: bool, with_body: bool) -> Bytes {
        let mut out = BytesMut::with_capacity(256 + self.body.len());
        let status = format!("HTTP/1.1 {} {}\r\n", self.status, reason(self.status));
        out.put_slice(status.as_bytes());
        let bodiless = matches!(self.status, 204 | 304); // RFC 9110 sections 15.3.5 and 15.4.5
        if !bodiless {
            put_header(&mut out, "Content-Type", self.content_type);
            put_header(&mut out, "Content-Length", &self.body.len().to_string());
        }
        put_header(&mut out, "Connection", if keep_alive { "keep-alive" } else { "close" });
        for (name, value) in &self.headers {
            put_header(&mut out, name, value);
        }
        out.put_slice(b"\r\n");
        if with_body && !bodiless {
            out.put_slice(&self.body);
        }
        out.freeze()
    }
}

impl From<Refusal> for Response {
    fn from(refusal: Refusal) -> Response {
        Response { headers: refusal.headers, ..Response::line(refusal.status, &refusal.text) }
    }
}

fn put_header(out: &mut BytesMut, name: &str, value: &str) {
    out.put_slice(name.as_bytes());
    out.put_slice(b": ");
    out.put_slice(one_line(value).as_bytes());
    out.put_slice(b"\r\n");
}

/// What a client sent may be quoted in a header or a line: it must not begin another.
fn one_line(text: &str) -> Cow<'_, str> {
    if !text.contains(char::is_control) {
        return Cow::Borrowed(text);
    }
    Cow::Owned(text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect())
}

/// The status of a response written by [`Response`]; 0 for what is none.
pub fn status_of(response: &[u8]) -> u16 {
    let digits = response.strip_prefix(b"HTTP/1.1 ").and_then(|rest| rest.get(..3));
    digits.and_then(|digits| std::str::from_utf8(digits).ok()?.parse().ok()).unwrap_or(0)
}

/// The text of a response written by [`Response`].
pub fn body_of(response: &[u8]) -> Cow<'_, str> {
    let body = response.windows(4).position(|four| four == b"\r\n\r\n").map_or(response.len(), |at| at + 4);
    String::from_utf8_lossy(&response[body..])
}

/// The reason phrase of a status (RFC 9110 section 15).
pub fn reason(status: u16) -> &'static str {
    match status {
        100 => "Continue",
        101 => "Switching Protocols",
        200 => "OK",
        204 => "No Content",
        304 => "Not Modified",
        400 => "Bad Request",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        411 => "Length Required",
        413 => "Content Too Large",
        414 => "URI Too Long",
        415 => "Unsupported Media Type",
        417 => "Expectation Failed",
        426 => "Upgrade Required",
        429 => "Too Many Requests",
        431 => "Request Header Fields Too Large",
        500 => "Internal Server Error",
        501 => "Not Implemented",
        503 => "Service Unavailable",
        504 => "Gateway Timeout",
        505 => "HTTP Version Not Supported",
        _ => "Unknown",
    }
}
