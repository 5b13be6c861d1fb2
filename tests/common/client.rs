//! A WebSocket client, with checks of the frames it receives.

use std::net::SocketAddr;

use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio::net::{TcpSocket, TcpStream};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::http::HeaderValue;
use tokio_tungstenite::tungstenite::{Error, Message};

use super::{Node, within};

/// The subprotocol of JSON mode.
pub const JSON_MODE: &str = "fanfare.v1";

/// How a client connects.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The query without `?`: `channel=…&lastEventId=…`.
    pub query: String,
    /// The value of Sec-WebSocket-Protocol.
    pub subprotocol: Option<&'static str>,
    /// A small receive buffer, so that the server's sends block soon when the client does not read.
    pub small_buffer: bool,
}

/// A received frame, or the end of the connection.
#[derive(Clone, Debug, PartialEq)]
pub enum Frame {
    Text(String),
    /// A ping's payload. tungstenite sends the pong.
    Ping(Vec<u8>),
    /// A pong's payload.
    Pong(Vec<u8>),
    /// The peer's close code and reason.
    Close(u16, String),
    /// The connection ended without a close frame.
    Lost(String),
}

pub type Socket = WebSocketStream<TcpStream>;

/// A connection. Failure messages include the last frames received.
pub struct Client {
    socket: Socket,
    user: String,
    seen: Vec<String>,
    /// The subprotocol that the server selected.
    pub subprotocol: Option<String>,
}

impl Client {
    /// Joins `channel` in plain mode without `lastEventId`.
    pub async fn plain(node: &Node, user: &str, channel: &str) -> Client {
        Client::open(node, user, &format!("channel={channel}"), None).await
    }

    /// Joins in plain mode with a `lastEventId`, which may be empty. Returns the welcome frame too.
    pub async fn resume(node: &Node, user: &str, channel: &str, last: impl ToString) -> (Client, Value) {
        let query = format!("channel={channel}&lastEventId={}", last.to_string());
        let mut client = Client::open(node, user, &query, None).await;
        let welcome = client.welcome().await;
        (client, welcome)
    }

    /// Joins in JSON mode. Returns the welcome frame too.
    pub async fn json(node: &Node, user: &str, channel: &str) -> (Client, Value) {
        let mut client = Client::open(node, user, &format!("channel={channel}"), Some(JSON_MODE)).await;
        let welcome = client.welcome().await;
        (client, welcome)
    }

    /// Joins the default channel in plain mode, with nothing but the path.
    pub async fn simple(node: &Node, user: &str) -> Client {
        Client::open(node, user, "", None).await
    }

    /// Joins; the test fails if that is rejected.
    pub async fn open(node: &Node, user: &str, query: &str, subprotocol: Option<&'static str>) -> Client {
        let options = Options { query: query.into(), subprotocol, ..Options::default() };
        let joined = Client::try_open(node.public, user, &options).await;
        joined.unwrap_or_else(|error| panic!("{user} can't join with {options:?}: {error}"))
    }

    /// Joins, or returns the server's answer. `user` is used in the path without encoding.
    pub async fn try_open(to: SocketAddr, user: &str, options: &Options) -> Result<Client, Error> {
        within(&format!("{user}'s handshake"), async {
            let mark = if options.query.is_empty() { "" } else { "?" };
            let mut request = format!("ws://{to}/ws/{user}{mark}{}", options.query).into_client_request()?;
            if let Some(subprotocol) = options.subprotocol {
                let value = HeaderValue::from_static(subprotocol);
                request.headers_mut().insert("Sec-WebSocket-Protocol", value);
            }
            let socket = TcpSocket::new_v4()?;
            if options.small_buffer {
                socket.set_recv_buffer_size(4096)?;
            }
            let stream = socket.connect(to).await?;
            stream.set_nodelay(true)?;
            let (socket, response) = tokio_tungstenite::client_async(request, stream).await?;
            let chosen = response.headers().get("Sec-WebSocket-Protocol");
            let subprotocol = chosen.map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
            Ok(Client { socket, user: user.into(), seen: Vec::new(), subprotocol })
        })
        .await
    }

    /// Sends a text frame.
    pub async fn send(&mut self, text: impl Into<String>) {
        self.send_message(Message::text(text.into())).await;
    }

    /// Sends a text frame. Returns false if the connection is closed.
    pub async fn try_send(&mut self, text: impl Into<String>) -> bool {
        within("a message to go out", self.socket.send(Message::text(text.into()))).await.is_ok()
    }

    pub async fn send_message(&mut self, message: Message) {
        let sent = within("a message to go out", self.socket.send(message)).await;
        sent.unwrap_or_else(|error| panic!("{}: can't send: {error}; saw {:#?}", self.user, self.seen));
    }

    /// The next frame of any kind.
    pub async fn next_frame(&mut self) -> Frame {
        let what = format!("{}'s next frame; the last it saw: {:#?}", self.user, self.seen);
        let frame = match within(&what, self.socket.next()).await {
            Some(Ok(Message::Text(text))) => Frame::Text(text.as_str().into()),
            Some(Ok(Message::Ping(payload))) => Frame::Ping(payload.to_vec()),
            Some(Ok(Message::Pong(payload))) => Frame::Pong(payload.to_vec()),
            Some(Ok(Message::Close(Some(close)))) => {
                Frame::Close(close.code.into(), close.reason.as_str().into())
            }
            Some(Ok(Message::Close(None))) => Frame::Close(1005, String::new()),
            Some(Ok(other)) => panic!("{}: the server sends no such frame: {other:?}", self.user),
            Some(Err(error)) => Frame::Lost(error.to_string()),
            None => Frame::Lost("the stream ended".into()),
        };
        if self.seen.len() == 20 {
            self.seen.remove(0);
        }
        self.seen.push(format!("{frame:.200?}"));
        frame
    }

    /// The next text frame. Pings and pongs are skipped.
    pub async fn next_text(&mut self) -> String {
        loop {
            match self.next_frame().await {
                Frame::Text(text) => return text,
                Frame::Ping(_) | Frame::Pong(_) => {}
                other => panic!("{}: {other:?} instead of text; saw {:#?}", self.user, self.seen),
            }
        }
    }

    /// The next text frame, which must be one JSON object on one line, with `id`, if present, as
    /// its last member.
    pub async fn next_json(&mut self) -> Value {
        let text = self.next_text().await;
        let value: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text:?}"));
        assert!(value.is_object(), "not one JSON object: {text:?}");
        assert!(!text.contains('\n'), "line break: {text:?}");
        if let Some(id) = value.get("id") {
            assert!(text.ends_with(&format!(r#""id":{id}}}"#)), "id is not the last member: {text:?}");
        }
        value
    }

    /// The next text frame, which must be an event: its id, and the event without it.
    pub async fn next_event(&mut self) -> (u64, Value) {
        let mut value = self.next_json().await;
        let id = value.as_object_mut().and_then(|event| event.remove("id"));
        let id = id.and_then(|id| id.as_u64());
        (id.unwrap_or_else(|| panic!("{}: not an event: {value}; saw {:#?}", self.user, self.seen)), value)
    }

    /// Fails unless the next text frame is this event.
    pub async fn expect_event(&mut self, id: u64, event: &Value) {
        assert_eq!(self.next_event().await, (id, event.clone()), "{}; saw {:#?}", self.user, self.seen);
    }

    /// Fails unless the next text frames are the events `{"n":…}` of [`Node::publish_numbers`],
    /// with these ids.
    pub async fn expect_numbers(&mut self, ids: &[u64], first: u64) {
        for (n, id) in (first..).zip(ids) {
            self.expect_event(*id, &json!({ "n": n })).await;
        }
    }

    /// The next text frame, which must have this type and no `id`.
    pub async fn next_control(&mut self, kind: &str) -> Value {
        let value = self.next_json().await;
        let right = value["type"] == kind && value.get("id").is_none();
        assert!(right, "{}: {value} instead of {kind}; saw {:#?}", self.user, self.seen);
        value
    }

    /// The welcome frame, with its form checked.
    pub async fn welcome(&mut self) -> Value {
        let welcome = self.next_control("welcome").await;
        let (last, head) = (position(&welcome["lastEventId"]), position(&welcome["head"]));
        let recovered = welcome["recovered"].as_bool().unwrap_or_else(|| panic!("{welcome}"));
        assert!(last <= head, "{welcome}");
        assert!(recovered || last == head, "nothing can follow what is not recovered: {welcome}");
        welcome
    }

    /// The next text frame, which must be an `error` for the frame with this `ref`. Returns its
    /// code.
    pub async fn expect_error(&mut self, reference: Option<Value>) -> String {
        let error = self.next_control("error").await;
        assert_eq!(error.get("ref"), reference.as_ref(), "{error}");
        assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()), "{error}");
        error["code"].as_str().unwrap_or_else(|| panic!("no code: {error}")).into()
    }

    /// Sends a frame in JSON mode and waits for its answer. Events that arrive before it are
    /// returned too.
    pub async fn send_for_ack(&mut self, mut message: Value) -> (Result<u64, Value>, Vec<Value>) {
        let reference = json!(format!("ref {}", self.seen.len()));
        message["ref"] = reference.clone();
        self.send(message.to_string()).await;
        let mut before = Vec::new();
        loop {
            let value = self.next_json().await;
            match value["type"].as_str() {
                Some("ack") if value.get("id").is_some() => {
                    assert_eq!(value["ref"], reference);
                    return (Ok(position(&value["id"])), before);
                }
                Some("error") => return (Err(value), before),
                _ => before.push(value),
            }
        }
    }

    /// Waits for the close frame, before which there may only be pings, and for the end of the
    /// connection.
    pub async fn expect_close(&mut self) -> (u16, String) {
        loop {
            match self.next_frame().await {
                Frame::Close(code, reason) => {
                    while !matches!(self.next_frame().await, Frame::Lost(_)) {}
                    return (code, reason);
                }
                Frame::Ping(_) | Frame::Pong(_) => {}
                other => panic!("{}: {other:?} instead of a close; saw {:#?}", self.user, self.seen),
            }
        }
    }

    /// The two halves, to send and read at the same time.
    pub fn split(self) -> (SplitSink<Socket, Message>, SplitStream<Socket>) {
        self.socket.split()
    }

    /// Closes the connection, and fails unless the server answers the close frame.
    pub async fn leave(mut self) {
        within("a close to go out", self.socket.close(None)).await.expect("the connection is open");
        loop {
            match self.next_frame().await {
                Frame::Close(..) => return,
                Frame::Lost(why) => panic!("{}: the close was not answered: {why}", self.user),
                Frame::Text(_) | Frame::Ping(_) | Frame::Pong(_) => {}
            }
        }
    }
}

/// A position of the sequence.
pub fn position(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("not a position: {value}"))
}
