//! Publishing by HTTP POST or a Redis command. Events by a socket are sent by a client.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::SocketAddr;

use mio::net::TcpStream;
use mio::{Interest, Registry, Token};

use super::client::describe;
use super::plan::Publish;
use super::wire::{self, Body};

/// Longest reply, in bytes.
const REPLY_MAX: usize = 64 << 10;

/// A connection to a backend's interface, and the events that wait for it. A single connection, with
/// one HTTP request at a time, so that events arrive in the order of their numbers.
pub struct Publisher {
    method: Publish,
    addr: SocketAddr,
    /// Commands before the first event.
    setup: Vec<Vec<String>>,
    token: Token,
    /// `None` after an error, until the next event.
    connection: Option<Connection>,
    waiting: VecDeque<Event>,
}

/// An event to publish.
pub struct Event {
    pub text: String,
    pub channel: u32,
}

impl Event {
    /// Puts text and channel where the template has `{event}` and `{channel}`.
    pub fn fill(&self, template: &str) -> String {
        template.replace("{channel}", &self.channel.to_string()).replace("{event}", &self.text)
    }
}

struct Connection {
    stream: TcpStream,
    out: Vec<u8>,
    replies: Vec<u8>,
    /// Setup commands without a reply.
    setting_up: usize,
    /// Requests without a reply.
    unanswered: usize,
}

impl Publisher {
    /// Connects. `None` for events that a client sends.
    ///
    /// # Errors
    /// No connection could be started.
    pub fn connect(method: &Publish, registry: &Registry, token: Token) -> io::Result<Option<Publisher>> {
        let (addr, setup) = match method {
            Publish::Socket { .. } => return Ok(None),
            Publish::Http { addr, .. } => (*addr, Vec::new()),
            Publish::Redis { addr, setup, .. } => (*addr, setup.clone()),
        };
        let connection = Some(Connection::open(addr, &setup, registry, token)?);
        let (method, waiting) = (method.clone(), VecDeque::new());
        Ok(Some(Publisher { method, addr, setup, token, connection, waiting }))
    }

    /// Publishes an event as soon as the connection is free.
    pub fn publish(&mut self, event: Event) {
        self.waiting.push_back(event);
    }

    /// Events that have no reply yet.
    pub fn unanswered(&self) -> usize {
        self.waiting.len() + self.connection.as_ref().map_or(0, |connection| connection.unanswered)
    }

    /// Sends what waits. To be called after every [`Publisher::publish`] of a turn. Returns why
    /// events were not published.
    pub fn send(&mut self, registry: &Registry) -> Vec<String> {
        if self.connection.is_none() && !self.waiting.is_empty() {
            match Connection::open(self.addr, &self.setup, registry, self.token) {
                Ok(connection) => self.connection = Some(connection),
                Err(error) => return self.waiting.drain(..).map(|_| describe(&error)).collect(),
            }
        }
        let Some(connection) = &mut self.connection else { return Vec::new() };
        connection.fill(&self.method, &mut self.waiting);
        match connection.flush() {
            Ok(()) => Vec::new(),
            Err(error) => self.disconnect(&describe(&error)),
        }
    }

    /// Handles readiness of its socket: reads replies, and sends what waits. Returns why events were
    /// not published.
    pub fn advance(&mut self, registry: &Registry) -> Vec<String> {
        let Some(connection) = &mut self.connection else { return Vec::new() };
        let (mut problems, end) = connection.read(matches!(self.method, Publish::Http { .. }));
        if let Some(why) = end {
            problems.extend(self.disconnect(&why));
        }
        problems.extend(self.send(registry));
        problems
    }

    /// Closes the connection. Returns the reason for each event without a reply.
    fn disconnect(&mut self, why: &str) -> Vec<String> {
        let unanswered = self.connection.take().map_or(0, |connection| connection.unanswered);
        vec![why.to_owned(); unanswered]
    }
}

impl Connection {
    fn open(
        addr: SocketAddr,
        setup: &[Vec<String>],
        registry: &Registry,
        token: Token,
    ) -> io::Result<Connection> {
        let mut out = Vec::new();
        for command in setup {
            put_command(&mut out, command.len(), command.iter().cloned());
        }
        let mut stream = TcpStream::connect(addr)?;
        registry.register(&mut stream, token, Interest::READABLE | Interest::WRITABLE)?;
        let _ = stream.set_nodelay(true);
        Ok(Connection { stream, out, replies: Vec::new(), setting_up: setup.len(), unanswered: 0 })
    }

    /// Takes as many events as may be sent now.
    fn fill(&mut self, method: &Publish, waiting: &mut VecDeque<Event>) {
        match method {
            Publish::Socket { .. } => {}
            Publish::Http { host, path, headers, body, .. } => {
                if self.unanswered > 0 {
                    return;
                }
                let Some(event) = waiting.pop_front() else { return };
                let (path, body) = (event.fill(path), event.fill(body));
                let headers: String = headers.iter().map(|line| format!("{line}\r\n")).collect();
                let length = body.len();
                let head = format!(
                    "POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {length}\r\n{headers}\r\n"
                );
                self.out.extend_from_slice(head.as_bytes());
                self.out.extend_from_slice(body.as_bytes());
                self.unanswered = 1;
            }
            Publish::Redis { command, .. } => {
                for event in waiting.drain(..) {
                    let parts = command.iter().map(|part| event.fill(part));
                    put_command(&mut self.out, command.len(), parts);
                    self.unanswered += 1;
                }
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        while !self.out.is_empty() {
            match self.stream.write(&self.out) {
                Ok(written) => drop(self.out.drain(..written)),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::NotConnected) => {
                    break;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Reads all replies. Returns what rejected events got instead of success, and why the
    /// connection ended if it has.
    fn read(&mut self, is_http: bool) -> (Vec<String>, Option<String>) {
        let mut buffer = [0; 16 << 10];
        let mut problems = Vec::new();
        loop {
            let len = match self.stream.read(&mut buffer) {
                Ok(len) => len,
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::NotConnected) => {
                    return (problems, None);
                }
                Err(error) => return (problems, Some(describe(&error))),
            };
            self.replies.extend_from_slice(&buffer[..len]);
            if let Err(why) = self.parse(is_http, len == 0, &mut problems) {
                return (problems, Some(why));
            }
            if len == 0 {
                return (problems, Some("the server closed the connection".into()));
            }
        }
    }

    /// Takes the complete replies.
    fn parse(&mut self, is_http: bool, ended: bool, problems: &mut Vec<String>) -> Result<(), String> {
        let mut start = 0;
        loop {
            let rest = &self.replies[start..];
            let reply = if is_http { http_reply(rest, ended)? } else { redis_reply(rest)? };
            let Some((len, problem)) = reply else { break };
            start += len;
            if self.setting_up > 0 {
                self.setting_up -= 1;
                problem.map_or(Ok(()), Err)?;
                continue;
            }
            self.unanswered = self.unanswered.saturating_sub(1);
            problems.extend(problem);
        }
        self.replies.drain(..start);
        if self.replies.len() > REPLY_MAX { Err("a reply that is too long".into()) } else { Ok(()) }
    }
}

/// A reply: its length in bytes, and what it says if it is not a success.
type Reply = Option<(usize, Option<String>)>;

fn http_reply(bytes: &[u8], ended: bool) -> Result<Reply, String> {
    let Some(answer) = wire::answer(bytes)? else { return Ok(None) };
    let rest = &bytes[answer.len..];
    let body = match answer.body {
        Body::Length(length) if rest.len() >= length => length,
        Body::Chunked => match rest.windows(5).position(|window| window == b"0\r\n\r\n") {
            Some(at) => at + 5,
            None => return Ok(None),
        },
        Body::Close if ended => rest.len(),
        Body::Length(_) | Body::Close => return Ok(None),
    };
    let text = String::from_utf8_lossy(&rest[..body.min(200)]).trim().to_owned();
    let problem = (!(200..300).contains(&answer.status)).then(|| format!("HTTP {}: {text}", answer.status));
    Ok(Some((answer.len + body, problem)))
}

/// Reads one reply of the Redis protocol (RESP2): no commands with nested replies are expected.
fn redis_reply(bytes: &[u8]) -> Result<Reply, String> {
    let Some(end) = bytes.windows(2).position(|window| window == b"\r\n") else { return Ok(None) };
    let Some(line) = bytes.get(1..end) else { return Err("a reply that is not of Redis".into()) };
    let line = String::from_utf8_lossy(line).into_owned();
    let reply = match bytes[0] {
        b'+' | b':' => (end + 2, None),
        b'-' => (end + 2, Some(line)),
        b'$' => match line.parse::<i64>() {
            Ok(length @ 0..) => (end + 2 + length as usize + 2, None),
            _ => (end + 2, None),
        },
        _ => return Err(format!("a reply of Redis that is not a single value: {line}")),
    };
    Ok(Some(reply).filter(|(len, _)| *len <= bytes.len()))
}

/// Appends a command in the Redis protocol.
fn put_command(out: &mut Vec<u8>, count: usize, parts: impl Iterator<Item = String>) {
    out.extend_from_slice(format!("*{count}\r\n").as_bytes());
    for part in parts {
        out.extend_from_slice(format!("${}\r\n{part}\r\n", part.len()).as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_replies_of_redis() {
        assert_eq!(redis_reply(b":12\r\n:").unwrap(), Some((5, None)));
        assert_eq!(redis_reply(b"$3\r\nabc\r\n").unwrap(), Some((9, None)));
        assert_eq!(redis_reply(b"$3\r\nab").unwrap(), None);
        assert_eq!(redis_reply(b"-ERR no\r\n").unwrap(), Some((9, Some("ERR no".into()))));
        assert_eq!(redis_reply(b":1").unwrap(), None);
        assert!(redis_reply(b"\r\n").is_err());
        assert!(redis_reply(b"*1\r\n:1\r\n").is_err());
        let mut out = Vec::new();
        put_command(&mut out, 2, ["PUBLISH", "ä"].map(str::to_owned).into_iter());
        assert_eq!(out, "*2\r\n$7\r\nPUBLISH\r\n$2\r\nä\r\n".as_bytes());
    }

    #[test]
    fn logs_in_before_the_first_event() {
        for (reply, expected) in
            [("+OK\r\n:1\r\n", &[][..]), ("-WRONGPASS\r\n-NOAUTH\r\n", &["WRONGPASS".to_owned()])]
        {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            let method = Publish::Redis {
                addr: listener.local_addr().unwrap(),
                setup: vec![["AUTH", "secret"].map(str::to_owned).to_vec()],
                command: ["PUBLISH", "c{channel}", "{event}"].map(str::to_owned).to_vec(),
            };
            let poll = mio::Poll::new().unwrap();
            let mut publisher = Publisher::connect(&method, poll.registry(), Token(0)).unwrap().unwrap();
            let (mut server, _) = listener.accept().unwrap();
            publisher.publish(Event { text: "x".into(), channel: 2 });
            assert!(publisher.send(poll.registry()).is_empty());
            let sent = "*2\r\n$4\r\nAUTH\r\n$6\r\nsecret\r\n*3\r\n$7\r\nPUBLISH\r\n$2\r\nc2\r\n$1\r\nx\r\n";
            let mut bytes = vec![0; sent.len()];
            server.read_exact(&mut bytes).unwrap();
            assert_eq!(String::from_utf8(bytes).unwrap(), sent);
            server.write_all(reply.as_bytes()).unwrap();
            drop(server);
            let mut problems = Vec::new();
            while publisher.unanswered() > 0 {
                problems.extend(publisher.advance(poll.registry()));
            }
            assert_eq!(problems, expected);
        }
    }

    #[test]
    fn reads_replies_of_http() {
        let reply = |text: &str, ended| http_reply(text.as_bytes(), ended).unwrap();
        assert_eq!(reply("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP", false), Some((40, None)));
        assert_eq!(reply("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\no", false), None);
        let chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n";
        assert_eq!(reply(chunked, false), Some((chunked.len(), None)));
        let refused = "HTTP/1.1 401 No\r\n\r\nkey\n";
        assert_eq!(reply(refused, false), None);
        assert_eq!(reply(refused, true), Some((refused.len(), Some("HTTP 401: key".into()))));
    }
}
