//! A WebSocket client as people write them, and the checks that tests ask of what it sees.

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
    /// What it asks for in Sec-WebSocket-Protocol.
    pub subprotocol: Option<&'static str>,
    /// Whether its receive buffer is so small that the server soon feels when nobody reads.
    pub small_buffer: bool,
}

/// What arrived.
#[derive(Clone, Debug, PartialEq)]
pub enum Frame {
    /// A text frame.
    Text(String),
    /// A ping's payload. The pong goes out by itself.
    Ping(Vec<u8>),
    /// A pong's payload.
    Pong(Vec<u8>),
    /// The peer closes, with its code.
    Close(u16, String),
    /// The connection ended without a close frame.
    Lost(String),
}

/// What a client talks through.
pub type Socket = WebSocketStream<TcpStream>;

/// One connection. What it saw last is part of every failure's message.
pub struct Client {
    socket: Socket,
    user: String,
    seen: Vec<String>,
    /// The subprotocol that the server chose.
    pub subprotocol: Option<String>,
}

impl Client {
    /// Joins `channel` in plain mode without `lastEventId`: a client of a simple chat server.
    pub async fn plain(node: &Node, user: &str, channel: &str) -> Client {
        Client::open(node, user, &format!("channel={channel}"), None).await
    }

    /// Joins in plain mode with a `lastEventId` (may be empty) and gives the welcome frame.
    pub async fn resume(node: &Node, user: &str, channel: &str, last: impl ToString) -> (Client, Value) {
        let query = format!("channel={channel}&lastEventId={}", last.to_string());
        let mut client = Client::open(node, user, &query, None).await;
        let welcome = client.welcome().await;
        (client, welcome)
    }

    /// Joins in JSON mode and gives the welcome frame.
    pub async fn json(node: &Node, user: &str, channel: &str) -> (Client, Value) {
        let mut client = Client::open(node, user, &format!("channel={channel}"), Some(JSON_MODE)).await;
        let welcome = client.welcome().await;
        (client, welcome)
    }

    /// Joins in plain mode with nothing but the path, and so the default channel.
    pub async fn simple(node: &Node, user: &str) -> Client {
        Client::open(node, user, "", None).await
    }

    /// Joins where it must work.
    pub async fn open(node: &Node, user: &str, query: &str, subprotocol: Option<&'static str>) -> Client {
        let options = Options { query: query.into(), subprotocol, ..Options::default() };
        let joined = Client::try_open(node.public, user, &options).await;
        joined.unwrap_or_else(|error| panic!("{user} can't join with {options:?}: {error}"))
    }

    /// Joins, or says what the server answered. `user` goes into the path as it is.
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

    /// Sends one text frame.
    pub async fn send(&mut self, text: impl Into<String>) {
        self.send_message(Message::text(text.into())).await;
    }

    /// Sends one text frame, if the connection still takes one.
    pub async fn try_send(&mut self, text: impl Into<String>) -> bool {
        within("a message to go out", self.socket.send(Message::text(text.into()))).await.is_ok()
    }

    /// Sends any message.
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

    /// The next text frame as it came; pings and pongs are passed over.
    pub async fn next_text(&mut self) -> String {
        loop {
            match self.next_frame().await {
                Frame::Text(text) => return text,
                Frame::Ping(_) | Frame::Pong(_) => {}
                other => panic!("{}: {other:?} instead of text; saw {:#?}", self.user, self.seen),
            }
        }
    }

    /// The next text frame, which holds one JSON object on one line; what has an `id` has it last.
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

    /// The next frame, which must be an event with an id: the event without it, and the id.
    pub async fn next_event(&mut self) -> (u64, Value) {
        let mut value = self.next_json().await;
        let id = value.as_object_mut().and_then(|event| event.remove("id"));
        let id = id.and_then(|id| id.as_u64());
        (id.unwrap_or_else(|| panic!("{}: not an event: {value}; saw {:#?}", self.user, self.seen)), value)
    }

    /// Fails unless the next frame is just this event.
    pub async fn expect_event(&mut self, id: u64, event: &Value) {
        assert_eq!(self.next_event().await, (id, event.clone()), "{}; saw {:#?}", self.user, self.seen);
    }

    /// Fails unless the next frames are the events `{"n":…}` of [`Node::publish_numbers`], with these ids.
    pub async fn expect_numbers(&mut self, ids: &[u64], first: u64) {
        for (n, id) in (first..).zip(ids) {
            self.expect_event(*id, &json!({ "n": n })).await;
        }
    }

    /// The next frame, which must be one without `id` of this type.
    pub async fn next_control(&mut self, kind: &str) -> Value {
        let value = self.next_json().await;
        let right = value["type"] == kind && value.get("id").is_none();
        assert!(right, "{}: {value} instead of {kind}; saw {:#?}", self.user, self.seen);
        value
    }

    /// The welcome frame, well formed.
    pub async fn welcome(&mut self) -> Value {
        let welcome = self.next_control("welcome").await;
        let (last, head) = (position(&welcome["lastEventId"]), position(&welcome["head"]));
        let recovered = welcome["recovered"].as_bool().unwrap_or_else(|| panic!("{welcome}"));
        assert!(last <= head, "{welcome}");
        assert!(recovered || last == head, "nothing can follow what is not recovered: {welcome}");
        welcome
    }

    /// The next frame, which must be a negative answer to the frame with this `ref`: its code.
    pub async fn expect_error(&mut self, reference: Option<Value>) -> String {
        let error = self.next_control("error").await;
        assert_eq!(error.get("ref"), reference.as_ref(), "{error}");
        assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()), "{error}");
        error["code"].as_str().unwrap_or_else(|| panic!("no code: {error}")).into()
    }

    /// Sends a frame in JSON mode and reads on to its answer. Events that come first are given too.
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

    /// Reads on to the close frame, which must be the next but for pings, and then to the end of the connection.
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

    /// Its two halves, for one that sends while it reads.
    pub fn split(self) -> (SplitSink<Socket, Message>, SplitStream<Socket>) {
        self.socket.split()
    }

    /// Leaves with a proper close, and fails unless the server answers it.
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
