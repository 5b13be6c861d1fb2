use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::*;
use crate::config::AdminAddr;
use crate::metrics::Readiness;
use crate::protocol::event::EventId;

/// What the fake bus was asked to publish: channel, to, event.
type Published = (String, Option<String>, String);

struct TestServer {
    addr: SocketAddr,
    metrics: Arc<Metrics>,
    taken: mpsc::UnboundedReceiver<Published>,
    phase: watch::Sender<Phase>,
    tasks: JoinSet<()>,
}

const MAX: usize = 1000;
const CONNECTIONS: usize = 8;
const WAITING: usize = 6;

fn context(requests: Requests, flags: &[&str]) -> AdminContext {
    let metrics = Arc::new(Metrics::new(1, Arc::default(), Arc::new(Readiness::default())));
    let flags = [&["--max-message-size", "1000"], flags].concat();
    let Ok(crate::config::Action::Run(settings)) = Settings::from(flags.iter().map(Into::into), []) else {
        panic!("{flags:?}")
    };
    let keys = Arc::new(KeyRing::load(&settings).unwrap());
    let (shards, _) = MailboxSenders::new(1);
    AdminContext { requests, shards, metrics, keys, bans: Arc::default(), settings: Arc::new(settings) }
}

/// What one connection works with, and the sender of the phase.
fn shared() -> (watch::Sender<Phase>, Shared) {
    let (sender, phase) = watch::channel(Phase::Serving);
    let context = context(mpsc::unbounded_channel().0, &[]);
    let (waiting, lookups) = (Semaphore::new(WAITING), Semaphore::new(CONCURRENT_LOOKUPS));
    let waits = Waits::default();
    (sender, Shared { context, checks_host: true, waiting, lookups, waits, phase })
}

/// An admin listener over a bus that answers the n-th publish with `outcome(n)`; `None` is no
/// answer at all.
fn server(outcome: fn(u64) -> Option<Result<EventId, PublishError>>) -> TestServer {
    server_with(&[], outcome)
}

fn server_with(flags: &[&str], outcome: fn(u64) -> Option<Result<EventId, PublishError>>) -> TestServer {
    let addr = AdminAddr::Tcp("127.0.0.1:0".parse().unwrap());
    let listener = Listener::bind(&addr).unwrap().unwrap();
    let AdminAddr::Tcp(addr) = listener.addr().unwrap() else { panic!("a TCP address") };
    let (requests, mut asked) = mpsc::unbounded_channel();
    let (tell, taken) = mpsc::unbounded_channel();
    let context = context(requests, flags);
    let metrics = context.metrics.clone();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let mut count = 0;
        let mut unanswered = Vec::new();
        while let Some(request) = asked.recv().await {
            let Request::Publish(publish) = request else { panic!("only publishes: {request:?}") };
            count += 1;
            let event = String::from_utf8(publish.event.to_vec()).unwrap();
            let to = publish.to.as_deref().map(String::from);
            tell.send((publish.channel.to_string(), to, event)).unwrap();
            let Answer::Waiter(waiter) = publish.answer else { panic!("a waiter") };
            match outcome(count) {
                Some(outcome) => drop(waiter.send(outcome.map(Into::into))),
                None => unanswered.push(waiter),
            }
        }
    });
    let (phase, seen) = watch::channel(Phase::Serving);
    let (listener, _) = listener.into_accepting().unwrap();
    tasks.spawn(serve([CONNECTIONS, WAITING], listener, context, seen));
    TestServer { addr, metrics, taken, phase, tasks }
}

fn accepting_server() -> TestServer {
    server(|count| Some(Ok(EventId(1000 + count))))
}

fn post(target: &str, body: &str) -> String {
    format!("POST {target} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}

fn get(target: &str) -> String {
    format!("GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n")
}

/// One response: status, head and body, by its Content-Length.
async fn response(stream: &mut (impl AsyncReadExt + Unpin), bodiless: bool) -> (u16, String, String) {
    let mut bytes = Vec::new();
    while !bytes.ends_with(b"\r\n\r\n") {
        bytes.push(stream.read_u8().await.expect("a whole head"));
    }
    let head = String::from_utf8(bytes).unwrap();
    let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: "));
    let mut body = vec![0; if bodiless { 0 } else { length.map_or(0, |length| length.parse().unwrap()) }];
    stream.read_exact(&mut body).await.unwrap();
    (head[9..12].parse().unwrap(), head, String::from_utf8(body).unwrap())
}

impl TestServer {
    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.addr).await.unwrap()
    }

    async fn ask(&self, request: impl AsRef<[u8]>) -> (u16, String, String) {
        let mut stream = self.connect().await;
        stream.write_all(request.as_ref()).await.unwrap();
        response(&mut stream, request.as_ref().starts_with(b"HEAD")).await
    }
}

#[tokio::test]
async fn publishes_and_answers_with_the_id() {
    let mut server = accepting_server();
    let (status, head, body) = server.ask(post("/publish", r#"{"text":"hi"}"#)).await;
    assert_eq!((status, body.as_str()), (200, "{\"id\":1001}\n"));
    assert!(
        head.contains("Content-Type: application/json\r\n") && head.contains("Connection: keep-alive\r\n")
    );
    server.ask(post("/publish?channel=news&to=b%C3%BCb+1", "[1]")).await;
    let taken = server.taken.recv().await.unwrap();
    assert_eq!(taken, ("ws_broadcast".into(), None, r#"{"text":"hi"}"#.into()));
    let taken = server.taken.recv().await.unwrap();
    assert_eq!(taken, ("news".into(), Some("büb 1".into()), r#"{"to":"büb 1","data":[1]}"#.into()));
}

#[tokio::test]
async fn rejects_invalid_events() {
    let mut server = accepting_server();
    for (target, body, part) in [
        ("/publish", "hi", "not JSON"),
        ("/publish", "", "not JSON"),
        ("/publish", r#"{"id":1}"#, "reserved"),
        ("/publish", r#"{"type":"reset"}"#, "reserved"),
        ("/publish?channel=", "1", "channel must be"),
        ("/publish?channel=a%20b", "1", "channel must be"),
        ("/publish?channel=%ff", "1", "percent-encoded"),
        ("/publish?to=", "1", "to must be a user id"),
        ("/publish?to=a%0Ab", "1", "to must be a user id"),
        ("/publish?chanel=a", "1", "unknown parameter chanel"),
        ("/publish?to=a&to=b", "1", "given twice"),
    ] {
        let (status, head, text) = server.ask(post(target, body)).await;
        assert_eq!(status, 400, "{target} {body}: {text}");
        assert!(text.contains(part) && text.lines().count() == 1 && text.ends_with('\n'), "{text}");
        assert!(head.contains("Connection: keep-alive\r\n"), "{head}");
    }
    let from_a_page =
        post("/publish", "1").replace("Host: localhost", "Host: localhost\r\nOrigin: https://evil.example");
    assert_eq!(server.ask(from_a_page).await.0, 403);
    assert!(server.taken.try_recv().is_err());
}

#[tokio::test]
async fn says_whether_a_retry_is_safe() {
    let server = server(|count| match count {
        1 => Some(Err(PublishError::Rejected("Redis is away".into()))),
        2 => Some(Err(PublishError::Unknown)),
        _ => None,
    });
    let (status, head, text) = server.ask(post("/publish", "1")).await;
    assert_eq!((status, text.as_str()), (503, "not published: Redis is away\n"));
    assert!(head.contains("Retry-After: 1\r\n"));
    for _ in 0..2 {
        let (status, head, text) = server.ask(post("/publish", "1")).await;
        assert_eq!(status, 504);
        assert!(text.contains("may or may not") && !head.contains("Retry-After"), "{head}{text}");
    }
}

#[tokio::test]
async fn says_so_when_the_bus_is_gone() {
    let (_phase, shared) = shared();
    let (mut client, server) = tokio::io::duplex(4096);
    client.write_all(post("/publish", "1").as_bytes()).await.unwrap();
    let (_, (status, _, text)) = tokio::join!(
        async { timeout(Duration::from_secs(5), serve_connection(server, &shared)).await },
        async {
            let answer = response(&mut client, false).await;
            drop(client);
            answer
        },
    );
    assert_eq!((status, text.as_str()), (503, "not published: this node is stopping\n"));
}

#[tokio::test]
async fn answers_pipelined_requests_in_order() {
    let server = accepting_server();
    let mut stream = server.connect().await;
    let requests =
        [post("/publish", "1"), get("/healthz"), post("/publish", "2"), get("/nowhere"), get("/readyz")];
    stream.write_all(requests.concat().as_bytes()).await.unwrap();
    let mut answers = Vec::new();
    for _ in &requests {
        let (status, _, body) = response(&mut stream, false).await;
        answers.push((status, body));
    }
    let bodies = answers.iter().map(|(status, body)| (*status, body.trim_end())).collect::<Vec<_>>();
    assert_eq!(&bodies[..3], [(200, r#"{"id":1001}"#), (200, "ok"), (200, r#"{"id":1002}"#)]);
    assert_eq!((bodies[3].0, bodies[4]), (404, (200, "ready")));

    // A request that comes byte by byte, then one that asks for the end.
    for byte in post("/publish", "3").bytes() {
        stream.write_all(&[byte]).await.unwrap();
    }
    assert_eq!(response(&mut stream, false).await.2, "{\"id\":1003}\n");
    stream.write_all(b"GET /healthz HTTP/1.0\r\n\r\n").await.unwrap();
    let (status, head, _) = response(&mut stream, false).await;
    assert!(status == 200 && head.contains("Connection: close\r\n"));
    assert_eq!(stream.read(&mut [0]).await.unwrap(), 0, "closed");
}

#[tokio::test]
async fn answers_expect_100_continue() {
    let server = accepting_server();
    let mut stream = server.connect().await;
    let request =
        "POST /publish HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n";
    stream.write_all(request.as_bytes()).await.unwrap();
    assert_eq!(response(&mut stream, true).await.0, 100);
    stream.write_all(b"12").await.unwrap();
    assert_eq!(response(&mut stream, false).await.0, 200);
    let (status, ..) = server.ask(request.replace("Length: 2", "Length: 1001")).await;
    assert_eq!(status, 413);
}

#[tokio::test]
async fn closes_after_unreadable_requests() {
    let mut server = accepting_server();
    let long = format!("[\"{}\"]", "1".repeat(MAX - 3));
    for (request, expected) in [
        (post("/publish", &long), 413),
        (post("/publish", &"1".repeat(8 << 20)), 413),
        (post("/publish", "1").replace("Content-Length: 1", "Content-Length: 99999999999"), 413),
        (post("/publish", "1").replace("Content-Length: 1", "Transfer-Encoding: chunked"), 411),
        (post("/publish", "1").replace("Content-Length: 1", "Content-Length: x"), 400),
        (post("/publish", "1").replace("Host: localhost", "Host: localhost\r\nExpect: cake"), 417),
        ("hello\r\n\r\n".into(), 400),
        (format!("GET /{} HTTP/1.1\r\n", "a".repeat(9000)), 414),
        (format!("GET / HTTP/1.1\r\nHost: localhost\r\n{}", "A: b\r\n".repeat(100)), 431),
        (get("/").replace("1.1", "3.0"), 505),
    ] {
        let mut stream = server.connect().await;
        stream.write_all(request.as_bytes()).await.unwrap();
        let (status, head, _) = response(&mut stream, false).await;
        assert_eq!(status, expected, "{request}");
        assert!(head.contains("Connection: close\r\n"), "{head}");
        assert_eq!(stream.read(&mut [0]).await.unwrap(), 0, "an orderly end, no reset: {request}");
    }
    assert_eq!(
        server.ask(post("/publish", &long.replacen('1', "", 1))).await.0,
        200,
        "the longest body that fits"
    );
    assert!(server.taken.recv().await.is_some());
}

#[tokio::test]
async fn names_known_paths_and_methods() {
    let server = accepting_server();
    assert_eq!(server.ask(get("/publish/")).await.0, 404);
    let (status, head, _) = server.ask(get("/publish")).await;
    assert!(status == 405 && head.contains("Allow: POST\r\n"));
    let (status, head, _) = server.ask(post("/metrics", "1")).await;
    assert!(status == 405 && head.contains("Allow: GET, HEAD\r\n"));
    let (status, head, body) = server.ask("HEAD /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n").await;
    assert!(status == 200 && head.contains("Content-Length: 3\r\n") && body.is_empty());

    let (status, head, text) = server.ask(get("/metrics")).await;
    assert!(status == 200 && head.contains("version=0.0.4") && text.contains("\nfanfare_ready 1\n"));
    let (status, head, text) = server.ask(get("/stats")).await;
    assert!(status == 200 && head.contains("application/json"));
    assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap()["ready"], true);

    server.metrics.readiness.drain();
    let (status, head, text) = server.ask(get("/readyz")).await;
    assert_eq!((status, text.as_str()), (503, "this node is stopping\n"));
    assert!(head.contains("Retry-After: 1\r\n"));
    assert_eq!(server.ask(get("/healthz")).await.0, 200);
}

#[tokio::test(start_paused = true)]
async fn closes_idle_and_slow_connections() {
    let (_phase, shared) = shared();
    let body = post("/publish", "1").replace("\r\n\r\n1", "\r\n\r\n");
    for (sent, answers, status, time) in [
        ("".to_owned(), 0, 0, connection::HEAD_TIME),
        ("GET / HTTP/1.1\r\n".into(), 0, 408, connection::HEAD_TIME),
        (body, 0, 408, Duration::from_secs(10)),
        (get("/healthz"), 1, 0, connection::IDLE_TIME),
        (get("/healthz") + "GET", 1, 408, connection::HEAD_TIME),
    ] {
        let start = Instant::now();
        let (mut client, server) = tokio::io::duplex(4096);
        client.write_all(sent.as_bytes()).await.unwrap();
        let served = async {
            serve_connection(server, &shared).await.unwrap();
            start.elapsed()
        };
        let (took, ()) = tokio::join!(served, async {
            for _ in 0..answers {
                assert_eq!(response(&mut client, false).await.0, 200);
            }
            if status > 0 {
                assert_eq!(response(&mut client, false).await.0, status, "{sent}");
            }
            assert_eq!(client.read(&mut [0]).await.unwrap(), 0, "closed: {sent}");
            drop(client);
        });
        assert_eq!(took, time, "{sent}");
    }
}

#[tokio::test]
async fn silent_connections_hold_no_slot() {
    let server = accepting_server();
    let mut silent = Vec::new();
    for _ in 0..5 * CONNECTIONS {
        silent.push(server.connect().await);
        // Each gets a slot at once, though no client leaves.
        assert_eq!(server.ask(get("/healthz")).await.0, 200);
    }
}

#[tokio::test]
async fn health_and_metrics_have_reserved_slots() {
    let mut server = server(|_| None);
    let mut waiting = Vec::new();
    for _ in 0..WAITING {
        let mut stream = server.connect().await;
        stream.write_all(post("/publish", "1").as_bytes()).await.unwrap();
        server.taken.recv().await.unwrap();
        waiting.push(stream);
    }
    let (status, head, text) = server.ask(post("/publish", "1")).await;
    assert_eq!((status, text.contains("too many requests")), (503, true), "{text}");
    assert!(head.contains("Retry-After: 1\r\n"), "{head}");
    let mut silent = Vec::new();
    for _ in 0..2 * CONNECTIONS {
        silent.push(server.connect().await);
        for path in ["/healthz", "/readyz", "/metrics"] {
            assert_eq!(server.ask(get(path)).await.0, 200);
        }
    }
    // Connections that wait for the bus were not closed to make room.
    server.phase.send_replace(Phase::Ending);
    for stream in &mut waiting {
        assert_eq!(response(stream, false).await.0, 504);
    }
}

#[tokio::test(start_paused = true)]
async fn few_requests_for_history_reach_the_bus_at_once() {
    let (requests, mut asked) = mpsc::unbounded_channel();
    let (_phase, mut shared) = shared();
    shared.context.requests = requests;
    let ask = async || {
        let (mut client, server) = tokio::io::duplex(4096);
        client.write_all(get("/history").as_bytes()).await.unwrap();
        let served = async { serve_connection(server, &shared).await.unwrap() };
        let answer = async {
            let answer = response(&mut client, false).await;
            drop(client);
            answer
        };
        tokio::join!(served, answer).1
    };
    let answers = tokio::join!(ask(), ask(), ask(), ask(), ask(), ask(), ask());
    let (status, _, text) = answers.6;
    assert!(status == 503 && text.contains("too many requests"), "{text}");
    // The bus answers none of the others. Two were sent to it; the time of the rest ended before
    // their turn.
    for (status, _, text) in [answers.0, answers.1, answers.2, answers.3, answers.4, answers.5] {
        assert!(status == 503 && text.contains("in time"), "{text}");
    }
    for _ in 0..CONCURRENT_LOOKUPS {
        assert!(matches!(asked.try_recv(), Ok(Request::Read { .. })));
    }
    assert!(asked.try_recv().is_err());
}

#[tokio::test]
async fn answers_open_requests_at_stop() {
    let mut server = server(|count| (count == 1).then_some(Ok(EventId(1))));
    let mut idle = server.connect().await;
    idle.write_all(post("/publish", "1").as_bytes()).await.unwrap();
    assert_eq!(response(&mut idle, false).await.0, 200);
    let mut waiting = server.connect().await;
    waiting.write_all(post("/publish", "2").as_bytes()).await.unwrap();
    for _ in 0..2 {
        server.taken.recv().await.unwrap();
    }
    // One whose request is under way, and one that was opened and has sent nothing yet.
    let (mut partial, mut new) = (server.connect().await, server.connect().await);
    partial.write_all(b"GET /healthz HTTP/1.1\r\n").await.unwrap();
    server.metrics.readiness.drain();
    server.phase.send_replace(Phase::Finishing);
    assert_eq!(idle.read(&mut [0]).await.unwrap(), 0, "closed at once");
    partial.write_all(b"Host: localhost\r\n\r\n").await.unwrap();
    new.write_all(get("/healthz").as_bytes()).await.unwrap();
    for stream in [&mut partial, &mut new] {
        let (status, head, _) = response(stream, false).await;
        assert!(status == 200 && head.contains("Connection: close\r\n"), "{head}");
    }
    // The bus does not answer the second publish, so its client gets 504.
    server.phase.send_replace(Phase::Ending);
    let (status, _, text) = response(&mut waiting, false).await;
    assert!(status == 504 && text.contains("may or may not"), "{text}");
    assert!(TcpStream::connect(server.addr).await.is_err(), "the listener is closed");
    drop((idle, waiting, partial, new));
    drop(server.taken);
    server.tasks.join_next().await.expect("the listener ends").unwrap();
}

#[tokio::test]
async fn checks_host_without_a_key() {
    let mut server = accepting_server();
    let named = |request: String, host: &str| request.replace("Host: localhost", &format!("Host: {host}"));
    for host in ["evil.example", "evil.example:9080", "127.0.0.1.evil.example", "10.0.0.1", ""] {
        for request in
            [get("/"), get("/metrics"), get("/stats"), get("/readyz"), get("/healthz"), post("/publish", "1")]
        {
            let (status, _, text) = server.ask(named(request, host)).await;
            assert!(status == 403 && text.contains("--admin-key"), "{host}: {status} {text}");
        }
    }
    for host in ["localhost", "127.0.0.1:9080", "[::1]:9080", "node.localhost"] {
        assert_eq!(server.ask(named(get("/stats"), host)).await.0, 200, "{host}");
    }
    // HTTP/1.0 clients may send no Host; browsers always send one.
    assert_eq!(server.ask("GET /healthz HTTP/1.0\r\n\r\n").await.0, 200);
    assert!(server.taken.try_recv().is_err());
    let server = server_with(&["--allow-origin", "https://node.example"], |_| None);
    assert_eq!(server.ask(named(get("/stats"), "node.example:9080")).await.0, 200);
    assert_eq!(server.ask(named(get("/stats"), "evil.example")).await.0, 403);
}

#[tokio::test]
async fn serves_a_unix_socket() {
    let path = std::env::temp_dir().join(format!("fanfare-{}-admin.sock", std::process::id()));
    let listener = Listener::bind(&AdminAddr::Unix(path.clone())).unwrap().unwrap();
    let admin = start(listener, context(mpsc::unbounded_channel().0, &[])).unwrap();
    let mut stream = UnixStream::connect(&path).await.unwrap();
    // Browsers don't connect to unix sockets, so any host is accepted.
    let request = get("/healthz").replace("localhost", "evil.example");
    stream.write_all(request.as_bytes()).await.unwrap();
    assert_eq!(response(&mut stream, false).await.0, 200);
    admin.finish(Duration::from_secs(20)).await;
    assert!(!path.exists(), "the file went with the listener");
    assert_eq!(stream.read(&mut [0]).await.unwrap(), 0, "and so did the connections");
}

/// The text between two marks.
fn between<'a>(text: &'a str, start: &str, end: &str) -> &'a str {
    text.split_once(start).expect(start).1.split_once(end).expect(end).0
}

#[tokio::test]
async fn live_view_runs_only_its_own_script() {
    let server = accepting_server();
    let (status, head, html) = server.ask(get("/")).await;
    assert!(status == 200 && head.contains("Content-Type: text/html; charset=utf-8\r\n"), "{head}");
    assert!(head.contains("Cache-Control: no-store\r\n") && head.contains("X-Content-Type-Options: nosniff"));
    let policy = between(&head, "Content-Security-Policy: ", "\r\n");
    let rules: Vec<_> = policy.split("; ").collect();
    let hash = |text: &str| {
        let hash = ring::digest::digest(&ring::digest::SHA256, text.as_bytes());
        data_encoding::BASE64.encode(hash.as_ref())
    };
    let script = between(&html, "<script type=\"module\">", "</script>");
    let style = between(&html, "<style>", "</style>");
    assert!(script.contains("fetch(\"stats\"") && style.contains("--ground"), "{html}");
    let [script, style] = [("script", script), ("style", style)]
        .map(|(kind, text)| format!("{kind}-src 'sha256-{}'", hash(text)));
    for rule in [
        "default-src 'none'",
        &script,
        &style,
        "connect-src 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    ] {
        assert!(rules.contains(&rule), "{rule} is missing in {policy}");
    }
    assert!(!html.contains("https://") && !html.contains("data-needs-key "), "{html}");

    let (status, of_head, body) = server.ask("HEAD / HTTP/1.1\r\nHost: localhost\r\n\r\n").await;
    assert_eq!((status, body.as_str(), of_head), (200, "", head));
    let (status, head, _) = server.ask(post("/", "1")).await;
    assert!(status == 405 && head.contains("Allow: GET, HEAD\r\n"), "{head}");
}

#[tokio::test]
async fn live_view_is_served_without_the_key() {
    let path = std::env::temp_dir().join(format!("fanfare-{}-admin.key", std::process::id()));
    std::fs::write(&path, "0123456789abcdef").unwrap();
    let server = server_with(&["--admin-key", path.to_str().unwrap()], |_| None);
    std::fs::remove_file(&path).unwrap();
    let (status, _, html) = server.ask(get("/")).await;
    assert!(status == 200 && html.contains("<body data-needs-key "), "{html}");
    assert_eq!(server.metrics.admin_rejections.get(), 0);
    for path in ["/stats", "//", "/?", "/page.js"] {
        let expected = if path == "/?" { 200 } else { 401 };
        assert_eq!(server.ask(get(path)).await.0, expected, "{path}");
    }
    let with_key = get("/stats").replace("\r\n\r\n", "\r\nAuthorization: Bearer 0123456789abcdef\r\n\r\n");
    assert_eq!(server.ask(with_key).await.0, 200);
}
