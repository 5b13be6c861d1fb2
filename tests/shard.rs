//! A shard alone, with the test as its bus: what depends on the order in which the two speak.

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::raw::{frame_bytes, opcode};
use common::{Lone, http, until};
use fanfare::bus::{Page, Request, ToShard};
use fanfare::event::{ChannelName, Entry, EventId};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

struct Shard(Lone);

impl Shard {
    fn start() -> Shard {
        Shard(Lone::start(&["--shards", "1"], false).expect("a shard"))
    }

    /// A client's end of a connection; the shard has the other. What `bytes` are it finds there already.
    async fn client(&self, bytes: &[u8]) -> TcpStream {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let addr = listener.local_addr().expect("it is bound");
        let (client, accepted) = tokio::join!(TcpStream::connect(addr), listener.accept());
        let (mut client, socket) = (client.expect("it is listening"), accepted.expect("one comes").0);
        client.write_all(bytes).await.expect("there is room");
        let socket = socket.into_std().expect("a socket of tokio's");
        let place = self.0.guard.arrive(addr.ip()).expect("there is room");
        self.0.shards.tell(0, ToShard::Socket(mio::net::TcpStream::from_std(socket), place));
        client
    }

    /// The next thing it asks of the bus.
    async fn asks(&mut self) -> Request {
        let asked = tokio::time::timeout(Duration::from_secs(60), self.0.asked.recv()).await;
        asked.expect("it asks within a minute").expect("it runs")
    }

    async fn follows(&mut self) {
        let Request::Follow { channel, .. } = self.asks().await else { panic!("it asks to follow") };
        let (base, position) = (EventId(1000), EventId(1000));
        self.0.shards.tell(0, ToShard::Followed { channel, base, position, recent: Vec::new() });
    }

    async fn closed(&self, many: u64) {
        until("connections to be closed", || async {
            (self.0.metrics.shards[0].closed.get() >= many).then_some(())
        })
        .await;
    }
}

impl Drop for Shard {
    fn drop(&mut self) {
        self.0.shards.tell(0, ToShard::Drain(Duration::ZERO));
    }
}

fn upgrade() -> Vec<u8> {
    upgrade_after("")
}

/// The request of a client that goes on from somewhere, or says nothing of it.
fn upgrade_after(query: &str) -> Vec<u8> {
    let headers = [
        ("Connection", "Upgrade"),
        ("Upgrade", "websocket"),
        ("Sec-WebSocket-Version", "13"),
        ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
    ];
    let path = format!("/ws/alice?channel=a{query}");
    http::request_bytes(([127, 0, 0, 1], 1).into(), "GET", &path, &headers, b"")
}

#[tokio::test]
async fn a_channel_whose_first_client_never_came_in_is_let_go() {
    let mut shard = Shard::start();
    let client = shard.client(&upgrade()).await;
    let Request::Follow { channel, .. } = shard.asks().await else { panic!("it asks to follow") };
    client.set_zero_linger().expect("a TCP socket");
    drop(client);
    shard.closed(1).await;
    let (base, position) = (EventId(1000), EventId(1000));
    shard.0.shards.tell(0, ToShard::Followed { channel, base, position, recent: Vec::new() });
    assert!(matches!(shard.asks().await, Request::Unfollow { .. }));
}

#[tokio::test]
async fn the_end_of_a_client_is_seen_though_nothing_was_read_when_it_came() {
    let mut shard = Shard::start();
    let mut client = shard.client(&upgrade()).await;
    shard.follows().await;
    let mut answer = [0; 12];
    client.read_exact(&mut answer).await.expect("an answer");
    assert_eq!(&answer, b"HTTP/1.1 101");
    // More messages than it takes without an answer from the bus: it pauses.
    let message = frame_bytes(true, opcode::TEXT, true, &[b'a'; 250]);
    client.write_all(&message.repeat(510)).await.expect("there is room");
    client.shutdown().await.expect("a TCP socket");
    // Whoever is answered now comes after the end in the shard's poll.
    let mut other = shard.client(b"GET /healthz HTTP/1.0\r\n\r\n").await;
    other.read_to_end(&mut Vec::new()).await.expect("an answer");
    shard.closed(1).await;
    for id in 1001..=1510 {
        let Request::Publish(publish) = shard.asks().await else { panic!("it publishes") };
        shard.0.shards.answer(publish.answer, Ok(EventId(id)));
    }
    // Long before a heartbeat could tell.
    let begun = Instant::now();
    shard.closed(2).await;
    assert!(begun.elapsed() < Duration::from_secs(10), "only the heartbeat has noticed");
}

/// Events with these ids, for everybody, in one entry.
fn events(ids: std::ops::RangeInclusive<u64>) -> Entry {
    let texts: Vec<String> = ids.clone().map(|id| format!(r#"{{"n":{id},"id":{id}}}"#)).collect();
    Entry::events(EventId(*ids.start()), texts.iter().map(String::as_bytes))
}

impl Shard {
    fn gets(&self, entry: Entry) {
        let channel = ChannelName::parse("a").expect("a name");
        self.0.shards.tell(0, ToShard::Entry { channel, entry, arrived: Instant::now() });
    }
}

/// The ids of all events that come to a client, up to this one; and that it was let in as recovered.
async fn ids_up_to(client: &mut TcpStream, last: u64) -> Vec<u64> {
    let (mut bytes, end) = (Vec::new(), format!(r#""id":{last}}}"#));
    let read = async {
        while !bytes.windows(end.len()).any(|part| part == end.as_bytes()) {
            assert!(client.read_buf(&mut bytes).await.expect("it is connected") > 0, "it was closed");
        }
    };
    let waited = tokio::time::timeout(Duration::from_secs(60), read).await;
    let text = String::from_utf8_lossy(&bytes);
    assert!(waited.is_ok() && text.contains(r#""recovered":true"#), "{text}");
    let ids = text.split(r#""id":"#).skip(1).map(|rest| rest.split('}').next().expect("it ends"));
    ids.map(|id| id.parse().expect("an id")).collect()
}

#[tokio::test]
async fn entries_that_come_before_the_word_that_it_is_followed_are_kept_if_they_are_new() {
    let mut shard = Shard::start();
    let mut client = shard.client(&upgrade_after("&lastEventId=1000")).await;
    let Request::Follow { channel, .. } = shard.asks().await else { panic!("it asks to follow") };
    // As when another shard passes the channel on: these came from the bus meanwhile.
    shard.gets(events(999..=1000));
    shard.gets(events(1001..=1002));
    let (base, position) = (EventId(900), EventId(1000));
    shard.0.shards.tell(0, ToShard::Followed { channel, base, position, recent: Vec::new() });
    shard.gets(events(1003..=1003));
    assert_eq!(ids_up_to(&mut client, 1003).await, [1001, 1002, 1003]);
}

#[tokio::test]
async fn a_shard_gives_what_is_in_memory_only_if_it_stands_where_the_bus_says() {
    let mut shard = Shard::start();
    let _client = shard.client(&upgrade()).await;
    shard.follows().await;
    shard.gets(events(1001..=1002));
    // The second and third are what the bus says when this shard's part is of another time.
    for (base, position, held) in [(1000, 1002, true), (2000, 2000, false), (1000, 1005, false)] {
        let (base, position) = (EventId(base), EventId(position));
        let channel = ChannelName::parse("a").expect("a name");
        shard.0.shards.tell(0, ToShard::Share { channel, base, position, with: 1 });
        let told = tokio::time::timeout(Duration::from_secs(60), shard.0.other.recv()).await;
        let Ok(Some(ToShard::Followed { base: to_base, position: to_position, recent, .. })) = told else {
            panic!("the other is told that it follows: {told:?}")
        };
        assert_eq!((to_base, to_position, !recent.is_empty()), (base, position, held));
    }
}

#[tokio::test]
async fn a_page_that_knows_more_than_the_feed_brings_nothing_twice() {
    let mut shard = Shard::start();
    let mut client = shard.client(&upgrade_after("&lastEventId=1002")).await;
    let Request::Follow { channel, .. } = shard.asks().await else { panic!("it asks to follow") };
    let (base, position) = (EventId(1000), EventId(1005));
    shard.0.shards.tell(0, ToShard::Followed { channel, base, position, recent: Vec::new() });
    let Request::Read { channel, after, .. } = shard.asks().await else { panic!("it asks for history") };
    // History has what the messages of Pub/Sub have yet to bring.
    let page = Page { base, head: EventId(1008), oldest: EventId(1001), entries: vec![events(1001..=1008)] };
    shard.0.shards.tell(0, ToShard::Page { channel, after, result: Ok(Arc::new(page)) });
    assert_eq!(ids_up_to(&mut client, 1005).await, [1003, 1004, 1005]);
    shard.gets(events(1006..=1007));
    shard.gets(events(1008..=1009));
    let text = async {
        let mut bytes = Vec::new();
        while !bytes.windows(9).any(|part| part == br#""id":1009"#) {
            assert!(client.read_buf(&mut bytes).await.expect("it is connected") > 0, "it was closed");
        }
        String::from_utf8_lossy(&bytes).matches(r#""id":"#).count()
    };
    assert_eq!(tokio::time::timeout(Duration::from_secs(60), text).await, Ok(4));
}
