//! A single shard with the test as its bus: what depends on the order of their messages.

use std::io::Read;
use std::ops::RangeInclusive;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use bytes::Bytes;
use fanfare::bus::{BusMessage, Page, Request, ShardSender};
use fanfare::protocol::close::CloseReason;
use fanfare::protocol::event::{ChannelName, Entry, EventId};
use fanfare::shard::mailbox::ShardMessage;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::common::raw::{frame_bytes, opcode};
use crate::common::{SingleShard, TokenKey, http, until};

struct Shard(SingleShard);

impl Shard {
    fn start() -> Shard {
        Shard::start_with(&[])
    }

    fn start_with(flags: &[&str]) -> Shard {
        Shard(SingleShard::start(&[&["--shards", "1"], flags].concat(), false).expect("a shard"))
    }

    /// Connects a client and hands the other end to the shard, which can read these bytes at once.
    async fn client(&self, bytes: &[u8]) -> TcpStream {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let addr = listener.local_addr().expect("it is bound");
        let (client, accepted) = tokio::join!(TcpStream::connect(addr), listener.accept());
        let (mut client, socket) = (client.expect("it is listening"), accepted.expect("one comes").0);
        client.write_all(bytes).await.expect("there is room");
        let socket = socket.into_std().expect("a socket of tokio's");
        let connection_slot = self.0.limits.acquire(addr.ip()).expect("there is room");
        self.0
            .shards
            .send(0, ShardMessage::Sockets(vec![(mio::net::TcpStream::from_std(socket), connection_slot)]));
        client
    }

    /// The shard's next request to the bus.
    async fn asks(&mut self) -> Request {
        let asked = tokio::time::timeout(Duration::from_secs(60), self.0.asked.recv()).await;
        asked.expect("it asks within a minute").expect("it runs")
    }

    async fn follows(&mut self) {
        let Request::Follow { channel, .. } = self.asks().await else { panic!("it asks to follow") };
        let (base, position) = (EventId(1000), EventId(1000));
        self.0.shards.send(0, BusMessage::Followed { channel, base, position, recent: Vec::new() });
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
        self.0.shards.send(0, ShardMessage::Drain(Duration::ZERO));
    }
}

fn upgrade() -> Vec<u8> {
    upgrade_after("")
}

/// A request with this query, for example with `lastEventId`.
fn upgrade_after(query: &str) -> Vec<u8> {
    upgrade_of("alice", &format!("a{query}"))
}

fn upgrade_of(user: &str, channel_and_query: &str) -> Vec<u8> {
    let headers = [
        ("Connection", "Upgrade"),
        ("Upgrade", "websocket"),
        ("Sec-WebSocket-Version", "13"),
        ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
    ];
    let path = format!("/ws/{user}?channel={channel_and_query}");
    http::request_bytes(([127, 0, 0, 1], 1).into(), "GET", &path, &headers, b"")
}

#[tokio::test]
async fn channel_is_unfollowed_if_its_join_fails() {
    let mut shard = Shard::start();
    let client = shard.client(&upgrade()).await;
    let Request::Follow { channel, .. } = shard.asks().await else { panic!("it asks to follow") };
    client.set_zero_linger().expect("a TCP socket");
    drop(client);
    shard.closed(1).await;
    let (base, position) = (EventId(1000), EventId(1000));
    shard.0.shards.send(0, BusMessage::Followed { channel, base, position, recent: Vec::new() });
    assert!(matches!(shard.asks().await, Request::Unfollow { .. }));
}

#[tokio::test]
async fn empty_channel_goes_when_memory_is_short() {
    const FOLLOWED_AFTER: Duration = Duration::from_secs(10); // EMPTY_TIME
    let mut shard = Shard::start();
    shard.0.metrics.bus.channels.set(1);
    shard.0.metrics.readiness.set_memory_short(true);
    let mut client = shard.client(&upgrade()).await;
    shard.follows().await;
    client.read_exact(&mut [0; 12]).await.expect("an answer");
    let started = Instant::now();
    drop(client);
    assert!(matches!(shard.asks().await, Request::Unfollow { .. }));
    assert!(started.elapsed() < FOLLOWED_AFTER / 2, "{:?}", started.elapsed());
}

#[tokio::test]
async fn close_is_seen_while_reads_are_paused() {
    let mut shard = Shard::start();
    let mut client = shard.client(&upgrade()).await;
    shard.follows().await;
    let mut answer = [0; 12];
    client.read_exact(&mut answer).await.expect("an answer");
    assert_eq!(&answer, b"HTTP/1.1 101");
    // More messages than a connection may have unanswered: the shard pauses reading.
    let message = frame_bytes(true, opcode::TEXT, true, &[b'a'; 250]);
    client.write_all(&message.repeat(510)).await.expect("there is room");
    client.shutdown().await.expect("a TCP socket");
    // The shard polls the close before this request.
    let mut other = shard.client(b"GET /healthz HTTP/1.0\r\n\r\n").await;
    other.read_to_end(&mut Vec::new()).await.expect("an answer");
    shard.closed(1).await;
    for id in 1001..=1510 {
        let Request::Publish(publish) = shard.asks().await else { panic!("it publishes") };
        shard.0.shards.answer(publish.answer, Ok(EventId(id).into()));
    }
    // Long before a ping could detect it.
    let started = Instant::now();
    shard.closed(2).await;
    assert!(started.elapsed() < Duration::from_secs(10), "only the ping has noticed");
}

/// Public events with these ids in one entry.
fn events(ids: RangeInclusive<u64>) -> Entry {
    addressed(ids, None)
}

/// The same for one user.
fn addressed(ids: RangeInclusive<u64>, to: Option<&str>) -> Entry {
    let texts: Vec<String> = ids.clone().map(|id| format!(r#"{{"n":{id},"id":{id}}}"#)).collect();
    Entry::addressed(EventId(*ids.start()), to.map(Into::into), texts.iter().map(String::as_bytes))
}

impl Shard {
    fn gets(&self, entry: Entry) {
        self.gets_in("a", entry);
    }

    fn gets_in(&self, channel: &str, entry: Entry) {
        let channel = ChannelName::parse(channel).expect("a name").into();
        self.0.shards.send(0, BusMessage::Entry { channel, entry, arrived: Instant::now() });
    }

    /// Stops the shard's thread until the sender is dropped. The shard handles what is sent
    /// meanwhile in one turn.
    fn pause(&self) -> mpsc::Sender<()> {
        let (resume, resumed) = mpsc::channel();
        let mut entry = Entry::without_id(EventId(0), b"");
        entry.bytes = Bytes::from_owner(WaitsInDrop(resumed));
        self.gets_in("a-channel-that-it-does-not-follow", entry);
        resume
    }
}

/// Bytes whose owner waits until the sender is dropped.
struct WaitsInDrop(mpsc::Receiver<()>);

impl AsRef<[u8]> for WaitsInDrop {
    fn as_ref(&self) -> &[u8] {
        b""
    }
}

impl Drop for WaitsInDrop {
    fn drop(&mut self) {
        let _ = self.0.recv();
    }
}

/// The ids of all events up to this one that a client gets. It must be recovered.
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
async fn new_entries_before_followed_are_kept() {
    let mut shard = Shard::start();
    let mut client = shard.client(&upgrade_after("&lastEventId=1000")).await;
    let Request::Follow { channel, .. } = shard.asks().await else { panic!("it asks to follow") };
    // As when another shard hands the channel over: these came from the bus meanwhile.
    shard.gets(events(999..=1000));
    shard.gets(events(1001..=1002));
    let (base, position) = (EventId(900), EventId(1000));
    shard.0.shards.send(0, BusMessage::Followed { channel, base, position, recent: Vec::new() });
    shard.gets(events(1003..=1003));
    assert_eq!(ids_up_to(&mut client, 1003).await, [1001, 1002, 1003]);
}

#[tokio::test]
async fn shares_its_feed_only_at_the_bus_position() {
    let mut shard = Shard::start();
    let _client = shard.client(&upgrade()).await;
    shard.follows().await;
    shard.gets(events(1001..=1002));
    // The second and third are positions of the bus at which the shard's feed is outdated.
    for (base, position, held) in [(1000, 1002, true), (2000, 2000, false), (1000, 1005, false)] {
        let (base, position) = (EventId(base), EventId(position));
        let channel = ChannelName::parse("a").expect("a name").into();
        shard.0.shards.send(0, BusMessage::Share { channel, base, position, with: 1 });
        let message = tokio::time::timeout(Duration::from_secs(60), shard.0.other.recv()).await;
        let Ok(Some(ShardMessage::Bus(message))) = message else {
            panic!("the other shard has ended: {message:?}")
        };
        let BusMessage::Followed { base: to_base, position: to_position, recent, .. } = message else {
            panic!("expected Followed: {message:?}")
        };
        assert_eq!((to_base, to_position, !recent.is_empty()), (base, position, held));
    }
}

#[tokio::test]
async fn leaving_while_joining_frees_the_slot() {
    let mut shard = Shard::start();
    let client = shard.client(&upgrade_after("&lastEventId=1002")).await;
    let Request::Follow { channel, .. } = shard.asks().await else { panic!("it asks to follow") };
    let (base, position) = (EventId(1000), EventId(1005));
    shard.0.shards.send(0, BusMessage::Followed { channel, base, position, recent: Vec::new() });
    let Request::Read { channel, position: at, .. } = shard.asks().await else {
        panic!("it asks for history")
    };
    drop(client); // a FIN, as from a browser or a proxy
    shard.closed(1).await;
    // Other joins are not affected.
    let mut other = shard.client(&upgrade_after("&lastEventId=1002")).await;
    other.write_all(b"").await.expect("it is connected");
    let page = Page {
        named: Default::default(),
        after: at,
        base,
        head: EventId(1005),
        oldest: EventId(1001),
        entries: vec![events(1003..=1005)],
    };
    shard
        .0
        .shards
        .send(0, BusMessage::Page { channel: channel.into(), position: at, result: Ok(Arc::new(page)) });
    shard.gets(events(1006..=1006));
    assert_eq!(ids_up_to(&mut other, 1006).await, [1003, 1004, 1005, 1006]);
}

#[tokio::test]
async fn slow_joins_get_503() {
    let mut shard = Shard::start();
    let mut client = shard.client(&upgrade_after("&lastEventId=1002")).await;
    let Request::Follow { channel, .. } = shard.asks().await else { panic!("it asks to follow") };
    let (base, position) = (EventId(1000), EventId(1005));
    shard.0.shards.send(0, BusMessage::Followed { channel, base, position, recent: Vec::new() });
    let Request::Read { .. } = shard.asks().await else { panic!("it asks for history") };
    let mut answer = Vec::new();
    let read = tokio::time::timeout(Duration::from_secs(60), client.read_to_end(&mut answer)).await;
    read.expect("it is answered").expect("it is connected");
    let answer = String::from_utf8_lossy(&answer);
    assert!(answer.starts_with("HTTP/1.1 503 ") && answer.contains("Retry-After: 1\r\n"), "{answer}");
    drop(client);
    shard.closed(1).await;
}

#[tokio::test]
async fn page_ahead_of_the_feed_doubles_nothing() {
    let mut shard = Shard::start();
    let mut client = shard.client(&upgrade_after("&lastEventId=1002")).await;
    let Request::Follow { channel, .. } = shard.asks().await else { panic!("it asks to follow") };
    let (base, position) = (EventId(1000), EventId(1005));
    shard.0.shards.send(0, BusMessage::Followed { channel, base, position, recent: Vec::new() });
    let Request::Read { channel, position: at, .. } = shard.asks().await else {
        panic!("it asks for history")
    };
    // History contains events whose Pub/Sub messages have not arrived yet.
    let page = Page {
        named: Default::default(),
        after: EventId(1000),
        base,
        head: EventId(1008),
        oldest: EventId(1001),
        entries: vec![events(1001..=1008)],
    };
    shard
        .0
        .shards
        .send(0, BusMessage::Page { channel: channel.into(), position: at, result: Ok(Arc::new(page)) });
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

/// While 90 events go out to 1,200 readers, an event of another channel waits for a few hundred
/// writes at most, whatever the kind of events. epoll reports the sockets in the order in which
/// they were written to.
#[tokio::test]
async fn large_fanout_does_not_starve_other_channels() {
    const READERS: usize = 1200;
    let _ = rlimit::increase_nofile_limit(u64::MAX);
    let mut shard = Shard::start();
    let mut poll = mio::Poll::new().expect("epoll");
    let mut clients = Vec::new();
    for n in 0..=READERS {
        let upgrade = if n < READERS { upgrade_of("alice", "a") } else { upgrade_of("bob", "b") };
        let mut client = shard.client(&upgrade).await;
        if n == 0 || n == READERS {
            shard.follows().await;
        }
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n\r\n") {
            assert!(client.read_buf(&mut answer).await.expect("it is connected") > 0, "it was closed");
        }
        let mut client = mio::net::TcpStream::from_std(client.into_std().expect("a socket of tokio's"));
        poll.registry().register(&mut client, mio::Token(n), mio::Interest::READABLE).expect("room in epoll");
        clients.push(client);
    }
    let to_alice = |id| addressed(id..=id, Some("alice"));
    let plain = |id| Entry::without_id(EventId(id), b"{}");
    let public = |id| events(id..=id);
    let (mut id, mut delivered, mut to_bob) = (1000, 0, 1000);
    let mut seen = mio::Events::with_capacity(2 * READERS);
    let mixes: [&[&dyn Fn(u64) -> Entry]; 4] =
        [&[&to_alice], &[&public], &[&plain], &[&to_alice, &plain, &public]];
    for (mix, name) in mixes.into_iter().zip(["private", "public", "plain", "mixed"]) {
        let paused = shard.pause();
        for n in 0..90 {
            let kind = mix[n % mix.len()];
            let mut entry = kind(id + 1);
            if entry.ids() == 0 {
                entry = kind(id);
            }
            id = entry.last.0;
            shard.gets(entry);
        }
        to_bob += 1;
        shard.gets_in("b", events(to_bob..=to_bob));
        drop(paused);
        delivered += 90 * READERS as u64 + 1;
        until("everything to be delivered", || async {
            (shard.0.metrics.shards[0].events_delivered.get() >= delivered).then_some(())
        })
        .await;
        poll.poll(&mut seen, Some(Duration::ZERO)).expect("epoll");
        let bob = seen.iter().position(|event| event.token().0 == READERS).expect("it got its event");
        assert_eq!(seen.iter().count(), READERS + 1);
        assert!(bob < READERS / 2, "{name}: {bob} others came first");
        for client in &mut clients {
            while client.read(&mut [0; 16 * 1024]).is_ok_and(|read| read > 0) {}
        }
    }
}

#[tokio::test]
async fn private_event_evicted_early_is_replayed() {
    const READERS: usize = 300; // more than a turn writes to
    let _ = rlimit::increase_nofile_limit(u64::MAX);
    let mut shard = Shard::start_with(&["--buffer-memory", "16KiB", "--max-message-size", "8KiB"]);
    let mut clients = Vec::new();
    for n in 0..READERS {
        clients.push(shard.client(&upgrade_after("&lastEventId=1000")).await);
        if n == 0 {
            shard.follows().await;
        }
    }
    until("everyone to join", || async {
        (shard.0.metrics.shards[0].upgraded.get() == READERS as u64).then_some(())
    })
    .await;
    let padding = "x".repeat(8000);
    let large = |id: u64| {
        let text = format!(r#"{{"p":"{padding}","id":{id}}}"#);
        Entry::addressed(EventId(id), Some("nobody here".into()), [text.as_bytes()].into_iter())
    };
    let mut entries = vec![addressed(1001..=1001, Some("alice"))];
    entries.extend((1002..=1004).map(large));
    let paused = shard.pause();
    for entry in &entries {
        shard.gets(entry.clone());
    }
    drop(paused);
    let Request::Read { channel, position, .. } = shard.asks().await else { panic!("it asks for history") };
    let (base, head, oldest) = (EventId(1000), EventId(1004), EventId(1001));
    let page = Page { after: base, base, head, oldest, entries, ..Page::default() };
    shard
        .0
        .shards
        .send(0, BusMessage::Page { channel: channel.into(), position, result: Ok(Arc::new(page)) });
    shard.gets(events(1005..=1005));
    for client in &mut clients {
        assert_eq!(ids_up_to(client, 1005).await, [1001, 1005]);
    }
}

/// The rest of what a client gets until its connection ends.
async fn rest(client: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    let read = tokio::time::timeout(Duration::from_secs(60), client.read_to_end(&mut bytes)).await;
    read.expect("it ends within a minute").expect("no reset");
    String::from_utf8_lossy(&bytes).into_owned()
}

impl Shard {
    fn disconnects(&self, user: &str, channel: Option<&str>, reason: CloseReason) {
        let channel = channel.and_then(ChannelName::parse);
        self.0.shards.send(0, BusMessage::Disconnect { user: user.into(), channel, reason });
    }
}

#[tokio::test]
async fn joining_connections_are_disconnected() {
    let mut shard = Shard::start();
    for (channel, reason, text) in [
        (None, CloseReason::Disconnected, "disconnected by the application"),
        (None, CloseReason::Banned, "banned by the application"),
        (Some("a"), CloseReason::Disconnected, "disconnected by the application"),
    ] {
        let mut client = shard.client(&upgrade()).await;
        let Request::Follow { channel: followed, .. } = shard.asks().await else { panic!("it follows") };
        shard.disconnects("bob", None, CloseReason::Disconnected);
        shard.disconnects("alice", Some("b"), CloseReason::Disconnected);
        shard.disconnects("alice", channel, reason);
        // The answer of the bus comes too late.
        let (base, position) = (EventId(1000), EventId(1000));
        let message = BusMessage::Followed { channel: followed, base, position, recent: Vec::new() };
        shard.0.shards.send(0, message);
        let answer = rest(&mut client).await;
        assert!(answer.starts_with("HTTP/1.1 101 ") && answer.ends_with(text), "{answer}");
        assert!(!answer.contains("welcome"), "{answer}");
        assert!(matches!(shard.asks().await, Request::Unfollow { .. }));
    }
}

#[tokio::test]
async fn loaded_bans_close_connections() {
    let mut shard = Shard::start();
    let until = fanfare::limits::bans::system_millis() + 3_600_000;
    shard.0.limits.bans.insert("alice".into(), until);
    let mut client = shard.client(&upgrade()).await;
    assert!(rest(&mut client).await.starts_with("HTTP/1.1 403 "));
    let mut bob = shard.client(&upgrade_of("bob", "a")).await;
    shard.follows().await;
    bob.read_exact(&mut [0; 12]).await.expect("an answer");
    let mut carol = shard.client(&upgrade_of("carol", "a")).await;
    carol.read_exact(&mut [0; 12]).await.expect("an answer");
    let banned = Arc::new(["alice".into(), "bob".into()].into());
    shard.0.shards.send(0, BusMessage::DisconnectBanned(banned));
    assert!(rest(&mut bob).await.ends_with("banned by the application"));
    shard.disconnects("carol", None, CloseReason::Disconnected);
    assert!(rest(&mut carol).await.ends_with("disconnected by the application"));
}

#[tokio::test]
async fn new_token_of_a_banned_user_closes_its_connection() {
    let key = TokenKey::new();
    let mut shard = Shard::start_with(&["--jwt-key", &key.path()]);
    let token = key.token("alice", &[]);
    let request = String::from_utf8(upgrade_after(&format!("&token={token}"))).expect("ASCII");
    let json = "Sec-WebSocket-Protocol: fanfare.v1\r\n\r\n";
    let request = format!("{}\r\n{json}", request.trim_end());
    let mut client = shard.client(request.as_bytes()).await;
    shard.follows().await;
    client.read_exact(&mut [0; 12]).await.expect("an answer");
    shard.0.limits.bans.insert("alice".into(), fanfare::limits::bans::system_millis() + 60_000);
    let frame = format!(r#"{{"type":"token","token":"{token}","ref":1}}"#);
    client.write_all(&frame_bytes(true, opcode::TEXT, true, frame.as_bytes())).await.expect("there is room");
    let answer = rest(&mut client).await;
    assert!(answer.ends_with("banned by the application") && !answer.contains("ack"), "{answer}");
}

#[tokio::test]
async fn subscription_under_way_is_disconnected() {
    let mut shard = Shard::start();
    let request = String::from_utf8(upgrade()).expect("ASCII");
    let request = format!("{}\r\nSec-WebSocket-Protocol: fanfare.v1\r\n\r\n", request.trim_end());
    let mut client = shard.client(request.as_bytes()).await;
    shard.follows().await;
    client.read_exact(&mut [0; 12]).await.expect("an answer");
    let frame = br#"{"type":"subscribe","channel":"b","ref":7}"#;
    client.write_all(&frame_bytes(true, opcode::TEXT, true, frame)).await.expect("there is room");
    assert!(matches!(shard.asks().await, Request::Follow { .. }));
    shard.disconnects("alice", Some("b"), CloseReason::Disconnected);
    assert!(matches!(shard.asks().await, Request::Unfollow { .. }));
    shard.disconnects("alice", None, CloseReason::Disconnected);
    let answer = rest(&mut client).await;
    let error = r#"{"type":"error","code":"forbidden","message":"disconnected from this channel by the application","channel":"b","ref":7}"#;
    assert!(answer.contains(error), "{answer}");
}
