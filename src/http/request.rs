//! Requests, read from a byte buffer.

use super::Rejection;
use super::origin::is_host_byte;

/// Longest request line, in bytes. nginx and HAProxy forward at most 8 KiB by default.
pub(super) const REQUEST_LINE_MAX: usize = 8 * 1024;
/// Most bytes of header lines: the cookies of a whole site may be among them.
pub(super) const HEADERS_MAX: usize = 16 * 1024;
/// Most header lines. Browsers behind two proxies send about 25.
pub(super) const HEADER_COUNT_MAX: usize = 64;
/// Longest head that [`parse`] accepts, with an empty line before it.
pub const HEAD_MAX: usize = 2 + REQUEST_LINE_MAX + HEADERS_MAX;

/// The head of a request. It borrows from the bytes that it was read from.
#[derive(Debug)]
pub struct Head<'a> {
    /// As sent: methods are case-sensitive.
    pub method: &'a str,
    /// Percent-encoded. Starts with `/`, except in `OPTIONS *`.
    pub path: &'a str,
    /// The part after the `?`, percent-encoded. Empty without one.
    pub query: &'a str,
    /// HTTP/1.1, not 1.0.
    pub is_http_1_1: bool,
    headers: [httparse::Header<'a>; HEADER_COUNT_MAX],
    count: usize,
}

/// How a request's body is delimited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyLength {
    Empty,
    /// `Content-Length`, in bytes.
    Known(u64),
    /// `Transfer-Encoding: chunked`.
    Chunked,
}

/// Reads the head of a request from the start of `bytes`. Returns the head and its length, or
/// `None` if more bytes are needed.
///
/// Stricter than httparse alone: lines end in CRLF, an HTTP/1.1 request has exactly one `Host`, and
/// the target is ASCII. After a rejection the start of the next request is unknown, so the
/// connection must be closed.
pub fn parse(bytes: &[u8]) -> Result<Option<(Head<'_>, usize)>, Rejection> {
    // One empty line before a request is allowed (RFC 9112 section 2.2).
    let start = if bytes.starts_with(b"\r\n") { 2 } else { 0 };
    let Some(length) = head_length(&bytes[start..])? else { return Ok(None) };
    let end = start + length;

    let mut headers = [httparse::EMPTY_HEADER; HEADER_COUNT_MAX];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(&bytes[start..end]) {
        Ok(httparse::Status::Complete(_)) => {}
        Ok(httparse::Status::Partial) => return Err(Rejection::new(400, "this is not an HTTP request")),
        Err(error) => return Err(syntax(error, &bytes[start..end])),
    }
    let (Some(method), Some(target), Some(minor)) = (request.method, request.path, request.version) else {
        return Err(Rejection::new(400, "this is not an HTTP request"));
    };
    let count = request.headers.len();
    let (path, query) = split_target(method, target)?;
    let head = Head { method, path, query, is_http_1_1: minor == 1, headers, count };
    head.check_host()?;
    Ok(Some((head, end)))
}

/// Finds the empty line at the end of the head, within the limits. Bytes that can't become a
/// request are rejected before the head is complete, so that a TLS client of a plain port doesn't
/// wait for a timeout.
fn head_length(bytes: &[u8]) -> Result<Option<usize>, Rejection> {
    if bytes.first().is_some_and(|first| !first.is_ascii_alphabetic() && *first != b'\r') {
        let tls = bytes[0] == 0x16; // a handshake record, RFC 8446 section 5.1
        let text = if tls { "this port speaks plain HTTP, not TLS" } else { "this is not an HTTP request" };
        return Err(Rejection::new(400, text));
    }
    let mut line_start = 0;
    let mut headers_start = 0;
    let mut lines = 0;
    loop {
        let line_length = bytes[line_start..].iter().position(|byte| *byte == b'\n').map(|at| at + 1);
        let end = line_length.map_or(bytes.len(), |length| line_start + length);
        if lines == 0 && end > REQUEST_LINE_MAX {
            return Err(Rejection::new(
                414,
                format!("the request line is too long: at most {REQUEST_LINE_MAX} bytes"),
            ));
        }
        if lines > 0 && end - headers_start > HEADERS_MAX {
            return Err(Rejection::new(
                431,
                format!("the headers are too long: at most {HEADERS_MAX} bytes"),
            ));
        }
        if line_length.is_none() {
            return Ok(None);
        }
        let line = &bytes[line_start..end];
        let Some(text) = line.strip_suffix(b"\r\n").filter(|text| !text.contains(&b'\r')) else {
            return Err(Rejection::new(400, "lines of a request must end in CR LF"));
        };
        if lines == 0 {
            headers_start = end;
            if text.is_empty() {
                return Err(Rejection::new(400, "the request line is missing"));
            }
        } else if text.is_empty() {
            return Ok(Some(end));
        } else if lines > HEADER_COUNT_MAX {
            return Err(Rejection::new(431, format!("too many headers: at most {HEADER_COUNT_MAX}")));
        }
        lines += 1;
        line_start = end;
    }
}

fn syntax(error: httparse::Error, head: &[u8]) -> Rejection {
    let line = head.split(|byte| *byte == b'\r').next().unwrap_or_default();
    match error {
        _ if line.starts_with(b"PRI * HTTP/2") => {
            Rejection::new(400, "this port speaks HTTP/1.1, not HTTP/2 without an upgrade")
        }
        httparse::Error::Version if line.windows(6).any(|word| word == b" HTTP/") => {
            Rejection::new(505, "only HTTP/1.1 and HTTP/1.0 are supported")
        }
        httparse::Error::TooManyHeaders => {
            Rejection::new(431, format!("too many headers: at most {HEADER_COUNT_MAX}"))
        }
        httparse::Error::HeaderName | httparse::Error::HeaderValue => {
            Rejection::new(400, "a header line is malformed")
        }
        _ => Rejection::new(400, "the request line is malformed"),
    }
}

/// Splits a request target into path and query: origin form, absolute form (which a server must
/// accept, RFC 9112 section 3.2.2), or `*` for `OPTIONS`.
fn split_target<'a>(method: &str, target: &'a str) -> Result<(&'a str, &'a str), Rejection> {
    if !target.is_ascii() || target.contains('#') {
        return Err(Rejection::new(400, "the path must be percent-encoded"));
    }
    if method == "OPTIONS" && target == "*" {
        return Ok((target, ""));
    }
    let is_http =
        |scheme: &str| matches!(scheme.to_ascii_lowercase().as_str(), "http" | "https" | "ws" | "wss");
    let local = match target.split_once("://") {
        _ if target.starts_with('/') => target,
        Some((scheme, rest)) if is_http(scheme) => {
            rest.find(['/', '?']).map_or("/", |authority_end| &rest[authority_end..])
        }
        _ => return Err(Rejection::new(400, "the request target must be a path")),
    };
    let (path, query) = local.split_once('?').unwrap_or((local, ""));
    Ok((if path.is_empty() { "/" } else { path }, query))
}

impl<'a> Head<'a> {
    /// All headers in order, names as sent. Values may not be UTF-8.
    pub fn headers(&self) -> impl Iterator<Item = (&'a str, &'a [u8])> + '_ {
        self.headers[..self.count].iter().map(|header| (header.name, header.value))
    }

    /// The values of all headers with this name, case ignored.
    pub fn values<'s>(&'s self, name: &'s str) -> impl Iterator<Item = &'a [u8]> + 's {
        self.headers().filter(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }

    /// The value of the first header with this name. `None` without one, or if it is not UTF-8.
    pub fn header(&self, name: &str) -> Option<&'a str> {
        self.values(name).next().and_then(|value| std::str::from_utf8(value).ok()).map(str::trim)
    }

    /// How many headers have this name.
    pub fn count(&self, name: &str) -> usize {
        self.values(name).count()
    }

    /// The comma-separated members of all headers with this name, in order (RFC 9110 section
    /// 5.6.1).
    pub fn tokens<'s>(&'s self, name: &'s str) -> impl Iterator<Item = &'a str> + 's {
        let texts = self.values(name).filter_map(|value| std::str::from_utf8(value).ok());
        texts.flat_map(|text| text.split(',')).map(str::trim).filter(|token| !token.is_empty())
    }

    /// Whether a list header such as `Connection` or `Upgrade` has this member, case ignored.
    pub fn has_token(&self, name: &str, token: &str) -> bool {
        self.tokens(name).any(|member| member.eq_ignore_ascii_case(token))
    }

    /// Whether the client asks to keep the connection after the response (RFC 9112 section 9.3).
    pub fn keep_alive(&self) -> bool {
        !self.has_token("connection", "close")
            && (self.is_http_1_1 || self.has_token("connection", "keep-alive"))
    }

    /// How the body is delimited (RFC 9112 section 6.3). Headers that proxies could read in two
    /// ways are rejected.
    pub fn body_length(&self) -> Result<BodyLength, Rejection> {
        let mut lengths = self.values("content-length");
        let length = lengths.next();
        if self.count("transfer-encoding") > 0 {
            if length.is_some() || !self.is_http_1_1 {
                return Err(Rejection::new(
                    400,
                    "Transfer-Encoding needs HTTP/1.1 and excludes Content-Length",
                ));
            }
            let mut codings = self.tokens("transfer-encoding");
            let chunked = codings.next().is_some_and(|coding| coding.eq_ignore_ascii_case("chunked"));
            if !chunked || codings.next().is_some() {
                return Err(Rejection::new(501, "no Transfer-Encoding other than chunked is supported"));
            }
            return Ok(BodyLength::Chunked);
        }
        let Some(length) = length else { return Ok(BodyLength::Empty) };
        if lengths.any(|other| other != length) {
            return Err(Rejection::new(400, "Content-Length is given twice"));
        }
        // `u64::from_str` would accept a plus sign.
        let digits =
            length.iter().all(u8::is_ascii_digit).then(|| std::str::from_utf8(length).ok()).flatten();
        match digits.and_then(|digits| digits.parse().ok()) {
            Some(0) => Ok(BodyLength::Empty),
            Some(length) => Ok(BodyLength::Known(length)),
            None => Err(Rejection::new(400, "Content-Length is not a number of bytes")),
        }
    }

    fn check_host(&self) -> Result<(), Rejection> {
        match self.count("host") {
            0 if self.is_http_1_1 => return Err(Rejection::new(400, "the Host header is missing")),
            0 | 1 => {}
            _ => return Err(Rejection::new(400, "the Host header is given twice")),
        }
        let is_valid = |host: &[u8]| host.trim_ascii().iter().copied().all(is_host_byte);
        if !self.values("host").all(is_valid) {
            return Err(Rejection::new(400, "the Host header is invalid"));
        }
        Ok(())
    }
}
