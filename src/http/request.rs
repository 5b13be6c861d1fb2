//! Requests read from a byte buffer.

use std::borrow::Cow;

use super::Refusal;

/// Longest request line. nginx and HAProxy in front pass on at most 8 KiB by default.
pub const REQUEST_LINE_MAX: usize = 8 * 1024;
/// Most bytes of header lines. Cookies of a whole site may come along, so not less.
pub const HEADERS_MAX: usize = 16 * 1024;
/// Most header lines. Browsers behind two proxies send about 25.
pub const HEADER_COUNT_MAX: usize = 64;
/// A buffer of this size holds every head that [`parse`] takes. (An empty line may come first.)
pub const HEAD_MAX: usize = 2 + REQUEST_LINE_MAX + HEADERS_MAX;

/// A request's head. It borrows from the bytes it was read from.
#[derive(Debug)]
pub struct Head<'a> {
    /// `GET` and its kin, as sent: methods are case-sensitive.
    pub method: &'a str,
    /// The path, still percent-encoded; begins with `/`, but for `OPTIONS *`.
    pub path: &'a str,
    /// What follows the `?`, still percent-encoded; empty when there is none.
    pub query: &'a str,
    /// Whether the client speaks HTTP/1.1 rather than 1.0.
    pub is_http_1_1: bool,
    headers: [httparse::Header<'a>; HEADER_COUNT_MAX],
    count: usize,
}

/// How a request's body is delimited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyLength {
    /// There is none.
    Empty,
    /// By `Content-Length`, in bytes.
    Known(u64),
    /// By `Transfer-Encoding: chunked`.
    Chunked,
}

/// Reads a request's head from the start of `bytes`: the head and its length, or `None` when more bytes are needed.
///
/// Stricter than httparse alone: lines end in CRLF, an HTTP/1.1 request has exactly one `Host`, and the target is
/// ASCII. After a refusal nobody knows where the next request begins: answer it and close.
pub fn parse(bytes: &[u8]) -> Result<Option<(Head<'_>, usize)>, Refusal> {
    // One empty line before a request is tolerated (RFC 9112 section 2.2).
    let start = if bytes.starts_with(b"\r\n") { 2 } else { 0 };
    let Some(length) = head_length(&bytes[start..])? else { return Ok(None) };
    let end = start + length;

    let mut headers = [httparse::EMPTY_HEADER; HEADER_COUNT_MAX];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(&bytes[start..end]) {
        Ok(httparse::Status::Complete(_)) => {}
        Ok(httparse::Status::Partial) => return Err(Refusal::new(400, "this is not an HTTP request")),
        Err(error) => return Err(syntax(error, &bytes[start..end])),
    }
    let (Some(method), Some(target), Some(minor)) = (request.method, request.path, request.version) else {
        return Err(Refusal::new(400, "this is not an HTTP request"));
    };
    let count = request.headers.len();
    let (path, query) = split_target(method, target)?;
    let head = Head { method, path, query, is_http_1_1: minor == 1, headers, count };
    head.check_host()?;
    Ok(Some((head, end)))
}

/// Finds the empty line that ends the head, within the limits. What can't become a request is refused before it
/// is complete, so that a TLS client in front of a plain port needn't wait for a timeout.
fn head_length(bytes: &[u8]) -> Result<Option<usize>, Refusal> {
    if bytes.first().is_some_and(|first| !first.is_ascii_alphabetic() && *first != b'\r') {
        let tls = bytes[0] == 0x16; // a handshake record, RFC 8446 section 5.1
        let text = if tls { "this port speaks plain HTTP, not TLS" } else { "this is not an HTTP request" };
        return Err(Refusal::new(400, text));
    }
    let mut line_start = 0;
    let mut headers_start = 0;
    let mut lines = 0;
    loop {
        let line_length = bytes[line_start..].iter().position(|byte| *byte == b'\n').map(|at| at + 1);
        let end = line_length.map_or(bytes.len(), |length| line_start + length);
        if lines == 0 && end > REQUEST_LINE_MAX {
            return Err(Refusal::new(
                414,
                format!("the request line is too long: at most {REQUEST_LINE_MAX} bytes"),
            ));
        }
        if lines > 0 && end - headers_start > HEADERS_MAX {
            return Err(Refusal::new(431, format!("the headers are too long: at most {HEADERS_MAX} bytes")));
        }
        if line_length.is_none() {
            return Ok(None);
        }
        let line = &bytes[line_start..end];
        let Some(text) = line.strip_suffix(b"\r\n").filter(|text| !text.contains(&b'\r')) else {
            return Err(Refusal::new(400, "lines of a request must end in CR LF"));
        };
        if lines == 0 {
            headers_start = end;
            if text.is_empty() {
                return Err(Refusal::new(400, "the request line is missing"));
            }
        } else if text.is_empty() {
            return Ok(Some(end));
        } else if lines > HEADER_COUNT_MAX {
            return Err(Refusal::new(431, format!("too many headers: at most {HEADER_COUNT_MAX}")));
        }
        lines += 1;
        line_start = end;
    }
}

fn syntax(error: httparse::Error, head: &[u8]) -> Refusal {
    let line = head.split(|byte| *byte == b'\r').next().unwrap_or_default();
    match error {
        _ if line.starts_with(b"PRI * HTTP/2") => {
            Refusal::new(400, "this port speaks HTTP/1.1, not HTTP/2 without an upgrade")
        }
        httparse::Error::Version if line.windows(6).any(|word| word == b" HTTP/") => {
            Refusal::new(505, "only HTTP/1.1 and HTTP/1.0 are spoken here")
        }
        httparse::Error::TooManyHeaders => {
            Refusal::new(431, format!("too many headers: at most {HEADER_COUNT_MAX}"))
        }
        httparse::Error::HeaderName | httparse::Error::HeaderValue => {
            Refusal::new(400, "a header line is malformed")
        }
        _ => Refusal::new(400, "the request line is malformed"),
    }
}

/// Path and query of a request target: origin form, absolute form (a server must take it, RFC 9112 section 3.2.2),
/// or `*` for `OPTIONS`.
fn split_target<'a>(method: &str, target: &'a str) -> Result<(&'a str, &'a str), Refusal> {
    if !target.is_ascii() || target.contains('#') {
        return Err(Refusal::new(400, "the path must be percent-encoded"));
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
        _ => return Err(Refusal::new(400, "the request target must be a path")),
    };
    let (path, query) = local.split_once('?').unwrap_or((local, ""));
    Ok((if path.is_empty() { "/" } else { path }, query))
}

impl<'a> Head<'a> {
    /// All headers in order, names as sent. Values are bytes: they needn't be UTF-8.
    pub fn headers(&self) -> impl Iterator<Item = (&'a str, &'a [u8])> + '_ {
        self.headers[..self.count].iter().map(|header| (header.name, header.value))
    }

    /// The values of every header of this name, case ignored.
    pub fn values<'s>(&'s self, name: &'s str) -> impl Iterator<Item = &'a [u8]> + 's {
        self.headers().filter(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }

    /// The value of the first header of this name; `None` when there is none or it is not UTF-8.
    pub fn header(&self, name: &str) -> Option<&'a str> {
        self.values(name).next().and_then(|value| std::str::from_utf8(value).ok()).map(str::trim)
    }

    /// How many headers have this name.
    pub fn count(&self, name: &str) -> usize {
        self.values(name).count()
    }

    /// The comma-separated members of every header of this name, in order (RFC 9110 section 5.6.1).
    pub fn tokens<'s>(&'s self, name: &'s str) -> impl Iterator<Item = &'a str> + 's {
        let texts = self.values(name).filter_map(|value| std::str::from_utf8(value).ok());
        texts.flat_map(|text| text.split(',')).map(str::trim).filter(|token| !token.is_empty())
    }

    /// Whether a list header such as `Connection` or `Upgrade` has this member, case ignored.
    pub fn has_token(&self, name: &str, token: &str) -> bool {
        self.tokens(name).any(|member| member.eq_ignore_ascii_case(token))
    }

    /// Whether the client wants the connection kept after the answer (RFC 9112 section 9.3).
    pub fn keep_alive(&self) -> bool {
        !self.has_token("connection", "close")
            && (self.is_http_1_1 || self.has_token("connection", "keep-alive"))
    }

    /// How the body is delimited (RFC 9112 section 6.3). What proxies could read in two ways is refused.
    pub fn body_length(&self) -> Result<BodyLength, Refusal> {
        let mut lengths = self.values("content-length");
        let length = lengths.next();
        if self.count("transfer-encoding") > 0 {
            if length.is_some() || !self.is_http_1_1 {
                return Err(Refusal::new(
                    400,
                    "Transfer-Encoding needs HTTP/1.1 and excludes Content-Length",
                ));
            }
            let mut codings = self.tokens("transfer-encoding");
            let chunked = codings.next().is_some_and(|coding| coding.eq_ignore_ascii_case("chunked"));
            if !chunked || codings.next().is_some() {
                return Err(Refusal::new(501, "no other Transfer-Encoding than chunked is known here"));
            }
            return Ok(BodyLength::Chunked);
        }
        let Some(length) = length else { return Ok(BodyLength::Empty) };
        if lengths.any(|other| other != length) {
            return Err(Refusal::new(400, "Content-Length is given twice"));
        }
        // `u64::from_str` would take a plus sign.
        let digits =
            length.iter().all(u8::is_ascii_digit).then(|| std::str::from_utf8(length).ok()).flatten();
        match digits.and_then(|digits| digits.parse().ok()) {
            Some(0) => Ok(BodyLength::Empty),
            Some(length) => Ok(BodyLength::Known(length)),
            None => Err(Refusal::new(400, "Content-Length is not a number of bytes")),
        }
    }

    fn check_host(&self) -> Result<(), Refusal> {
        match self.count("host") {
            0 if self.is_http_1_1 => return Err(Refusal::new(400, "the Host header is missing")),
            0 | 1 => {}
            _ => return Err(Refusal::new(400, "the Host header is given twice")),
        }
        let strange = |byte: &u8| !byte.is_ascii_graphic() || b"/?#@\\,".contains(byte);
        if self.values("host").any(|host| host.trim_ascii().iter().any(strange)) {
            return Err(Refusal::new(400, "the Host header is not a host"));
        }
        Ok(())
    }
}

/// Decodes a path segment (RFC 3986 section 2.1); `+` stays `+`. `None` for a `%` without two hex digits and for
/// what is not UTF-8.
pub fn percent_decode(text: &str) -> Option<String> {
    decode(text, false).map(Cow::into_owned)
}

/// The first value of a query parameter, decoded: `None` when it is absent, empty for `?name` and `?name=`.
/// `+` is a space, as `URLSearchParams` and forms write it; `encodeURIComponent` writes neither `+` nor space as
/// they are, so both kinds of client are read right.
pub fn query_value<'a>(query: &'a str, name: &str) -> Result<Option<Cow<'a, str>>, Refusal> {
    for pair in query.split('&') {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        if decode(key, true).is_some_and(|key| key == name) {
            return match decode(value, true) {
                Some(value) => Ok(Some(value)),
                None => {
                    Err(Refusal::new(400, format!("query parameter {name} is not percent-encoded UTF-8")))
                }
            };
        }
    }
    Ok(None)
}

fn decode(text: &str, plus_is_space: bool) -> Option<Cow<'_, str>> {
    if !text.bytes().any(|byte| byte == b'%' || (byte == b'+' && plus_is_space)) {
        return Some(Cow::Borrowed(text));
    }
    let mut decoded = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        decoded.push(match byte {
            b'%' => hex(bytes.next()?)? << 4 | hex(bytes.next()?)?,
            b'+' if plus_is_space => b' ',
            other => other,
        });
    }
    String::from_utf8(decoded).ok().map(Cow::Owned)
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).map(|value| value as u8)
}
