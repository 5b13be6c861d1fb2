//! HTTP/1.1 as far as the tests need it: one request, one response with Content-Length.

use std::net::SocketAddr;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

use super::within;

/// A whole response.
#[derive(Clone, Debug)]
pub struct Response {
    pub status: u16,
    /// Header names in lower case, in the order sent.
    pub headers: Vec<(String, String)>,
    pub body: String,
}

impl Response {
    /// The value of a header that occurs at most once. `name` is in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut values = self.headers.iter().filter(|(n, _)| n == name);
        let value = values.next().map(|(_, value)| value.as_str());
        assert!(values.next().is_none(), "{name} is there twice: {:?}", self.headers);
        value
    }

    /// The body as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("no JSON ({error}): {self:?}"))
    }

    /// Fails unless this is a rejection with this status and one line of text as its reason.
    pub fn expect_rejection(&self, status: u16) {
        assert_eq!(self.status, status, "{self:?}");
        assert!(!self.body.trim().is_empty(), "no reason given: {self:?}");
    }
}

/// Sends one request on its own connection.
pub async fn request(
    to: SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> Response {
    within(&format!("the answer to {method} {path}"), async {
        let mut socket = BufReader::new(TcpStream::connect(to).await.expect("the listener accepts"));
        let bytes = request_bytes(to, method, path, headers, body);
        socket.get_mut().write_all(&bytes).await.expect("the request can be sent");
        read_response(&mut socket, method == "HEAD").await.expect("a whole response")
    })
    .await
}

/// A request as bytes. It has a Content-Length if it has a body or the method requires one.
pub fn request_bytes(
    to: SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> Vec<u8> {
    let mut head = format!("{method} {path} HTTP/1.1\r\nHost: {to}\r\n");
    if !body.is_empty() || method == "POST" {
        head += &format!("Content-Length: {}\r\n", body.len());
    }
    for (name, value) in headers {
        head += &format!("{name}: {value}\r\n");
    }
    [head.as_bytes(), b"\r\n", body].concat()
}

/// Reads one response, whose body has the length of its Content-Length.
pub async fn read_response(
    from: &mut BufReader<impl AsyncRead + Unpin>,
    no_body: bool,
) -> Result<Response, String> {
    let status_line = read_line(from).await?;
    let mut parts = status_line.splitn(3, ' ');
    let (version, status) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    if version != "HTTP/1.1" {
        return Err(format!("no HTTP/1.1 response: {status_line:?}"));
    }
    let status = status.parse().map_err(|_| format!("no status in {status_line:?}"))?;
    let mut response = Response { status, headers: Vec::new(), body: String::new() };
    loop {
        let line = read_line(from).await?;
        if line.is_empty() {
            break;
        }
        let (name, value) = line.split_once(':').ok_or(format!("no header: {line:?}"))?;
        response.headers.push((name.to_ascii_lowercase(), value.trim().into()));
    }
    if status == 101 || no_body {
        return Ok(response);
    }
    let length = response.header("content-length").ok_or(format!("no Content-Length: {response:?}"))?;
    let mut body = vec![0; length.parse().map_err(|_| format!("not a length: {length}"))?];
    from.read_exact(&mut body).await.map_err(|error| format!("half a body: {error}"))?;
    response.body = String::from_utf8_lossy(&body).into();
    Ok(response)
}

async fn read_line(from: &mut BufReader<impl AsyncRead + Unpin>) -> Result<String, String> {
    let mut line = Vec::new();
    from.read_until(b'\n', &mut line).await.map_err(|error| format!("no response: {error}"))?;
    let line = line.strip_suffix(b"\r\n").ok_or(format!("ended in a response's head: {line:?}"))?;
    Ok(String::from_utf8_lossy(line).into())
}
