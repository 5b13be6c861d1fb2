//! What anyone can send to the public port, and how the server answers. The tests in the last
//! column are below, in the same order, or in the named module. `behind_nginx` shows that a proxy
//! takes no node out because of such input.
//!
//! | input | answer | tests |
//! |---|---|---|
//! | a request not complete after 5 s, whether silent or slow | 408 | `slow_requests_get_408_after_5_s` |
//! | request line over 8 KiB; headers over 16 KiB or 64 | 414; 431 | `oversized_heads_get_414_or_431` |
//! | POST, HEAD, PUT on `/ws` | 405 with `Allow` | `other_methods_get_405_before_their_body` |
//! | GET without Upgrade; version not 13 | 426 with `Sec-WebSocket-Version: 13` | `missing_or_other_upgrades_get_426` |
//! | bad or doubled key, missing or doubled Host, bare LF, Transfer-Encoding, a body, bytes before the 101 | 400 | `malformed_upgrades_get_400` |
//! | TLS hello, HTTP/2 preface, garbage; an incomplete request | 400 | `other_protocols_get_400` |
//! | unmasked frame, RSV bit, unknown opcode, control frame over 125 or fragmented, bad continuation, bad close code | 1002 | `protocol_violations_close_with_1002`, `frames::broken_frames_close_with_1002` |
//! | invalid UTF-8 in text, also across fragments, or in a close reason | 1007 | `close_reason_not_utf8_closes_with_1007`, `frames::text_that_is_not_utf8_closes_with_1007` |
//! | JSON that not every client can parse: duplicate names, `1e999`, lone surrogates, deep nesting | `error` frame, `invalid` | `protocol::clients_and_backends_publish_json_by_the_rule` |
//! | binary frame | 1003 | `frames::binary_closes_with_1003` |
//! | message or declared length over the limit, up to 2^63 | 1009, nothing allocated | `declared_lengths_cost_no_memory`, `frames::message_too_big_closes_with_1009` |
//! | endless empty or tiny fragments; a message not completed in 10 s | 1008 | `endless_fragments_close_with_1008`, `frames::incomplete_message_closes_with_1008` |
//! | incomplete messages on very many connections | 64 MiB in total; the oldest close with 1008 | `partial_messages_are_limited_in_total`, `partial_messages_share_one_limit` |
//! | ping flood, message flood | `error` frame, then 4029 | `rates::message_flood_gets_errors_and_then_4029`, `rates::ping_and_pong_floods_are_rate_limited`, `rates::flood_without_reads_costs_no_memory` |
//! | the same over short connections; large messages, tiny fragments | the same: the allowance belongs to the user or address | `rates::reconnecting_gains_no_messages`, `rates::reconnecting_gains_a_user_no_messages`, `rates::bytes_and_fragments_are_rate_limited` |
//! | peer that never reads | only a cursor is kept; closed by ping timeout | `slow_readers::reader_that_never_reads_is_closed`, `slow_readers::pongs_do_not_keep_a_client_that_never_reads`, `slow_readers::stalled_readers_cost_no_memory_on_redis` |
//! | peers that stall, each in another large frame | 64 MiB in total; the most expensive are cut | `slow_readers::stalled_readers_of_large_events_share_a_limit` |
//! | half-open peer | closed within `--ping-interval` and `--ping-timeout` | `half_open_peer_is_closed_in_time` |
//! | other or `null` Origin | 403 | `access::other_origins_are_rejected` |
//! | missing, bad, expired token | 401 | `tokens::invalid_tokens_are_rejected_and_never_shown` |
//! | user id or channel with control characters, too long, not UTF-8 | 400; log lines stay one line | `bad_names_get_400_and_break_no_log_line` |
//! | the last three, offering a subprotocol or giving `lastEventId` | 101, then 4403, 4401 or 4400 | `rejections::closes_fanfare_clients_with_reason`, `tokens::clients_of_fanfare_get_4401_and_4403`, `rejections::rejected_client_gets_no_further` |
//! | subprotocols of other servers, mistyped query parameters | 400, or 101 and 4400 | `rejections::offered_subprotocols_are_answered`, `rejections::mistyped_query_parameters_are_rejected` |
//! | connection floods: limits per address, user and node | 429 / 503 with `Retry-After` | `connection_limits::limit_per_ip_protects_others`, `connection_limits::limit_per_user_protects_others`, `connection_limits::full_node_answers_503_and_serves_on`, `connection_limits::flood_over_the_limit_is_answered_at_once` |
//! | a PROXY header, or `X-Forwarded-For`, from an untrusted peer | 400 | `connection_limits::untrusted_proxy_is_rejected_with_advice` |
//! | out of file descriptors | 503, one log line and a metric; the accept loop continues | `limits::survives_running_out_of_descriptors` |
//! | `lastEventId` negative, huge, text, future | `recovered:false`, at most one shared read | `unknown_ids_cost_one_shared_read`, `protocol::unknown_last_event_id_is_not_recovered` |
//! | `channel` with the name of a Redis channel of another program | an ordinary channel | `channel_named_like_a_redis_channel_is_ordinary` |
//! | endless new channels | 503 past `--max-channels` | `limits::max_channels_is_enforced`, `tokens::token_limits_channels_and_publishing` |
//! | the same over short connections | empty channels are evicted; 429 over the rate of new channels | `limits::empty_channels_are_evicted_for_new_ones`, `limits::new_channels_of_a_client_are_limited` |
//! | the same, closed at once | expire in Redis within minutes | `unused_channels_expire_soon_in_redis` |
//! | any of these through nginx | nginx takes no node out | `behind_nginx::bad_handshakes_take_no_node_out` |

use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

use crate::common::raw::{frame_bytes, opcode::*};
use crate::common::sources::has_test;
use crate::common::{Node, Raw, Response, http, until, within};

const KEY: &str = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
const UPGRADE: &str = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n";

/// The response to these bytes. It must arrive completely, and the connection must end without a
/// reset, which could discard a response that is not read yet.
async fn answer(node: &Node, bytes: &[u8]) -> Response {
    let socket = TcpStream::connect(node.public).await.expect("it listens");
    let (read, mut write) = socket.into_split();
    let bytes = bytes.to_vec();
    let writer = tokio::spawn(async move {
        let _ = write.write_all(&bytes).await; // the response may come before all is sent
        write // kept open until the response is read
    });
    let mut read = BufReader::new(read);
    let response = within("an answer", http::read_response(&mut read, false)).await;
    let response = response.unwrap_or_else(|error| panic!("{error}"));
    let mut rest = Vec::new();
    within("the end", read.read_to_end(&mut rest)).await.expect("an end in order");
    assert!(rest.is_empty(), "more came: {}", String::from_utf8_lossy(&rest));
    drop(writer.await);
    response
}

async fn expect(node: &Node, bytes: impl AsRef<[u8]>, status: u16) -> Response {
    let bytes = bytes.as_ref();
    let response = answer(node, bytes).await;
    let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(200)]);
    assert_eq!(response.status, status, "{shown}: {response:?}");
    response.expect_rejection(status);
    response
}

#[tokio::test]
async fn slow_requests_get_408_after_5_s() {
    let node = Node::start(&[]).await;
    let started = Instant::now();
    let silent = expect(&node, b"", 408);
    let dripping = async {
        let mut raw = Raw::connect(node.public).await;
        let request = format!("GET /ws/a HTTP/1.1\r\nHost: a\r\nCookie: {}\r\n", "x".repeat(1000));
        for byte in request.as_bytes() {
            if started.elapsed() > Duration::from_secs(8) || !raw.write_some(&[*byte]).await {
                break;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        raw.response().await.expect_rejection(408);
    };
    let answered = async {
        silent.await;
        started.elapsed()
    };
    let (answered, ()) = tokio::join!(answered, dripping);
    assert!((5.0..7.0).contains(&answered.as_secs_f64()), "{answered:?}");
    assert_eq!(node.metric_of("fanfare_connections_closed_total", r#"reason="request_timeout""#).await, 2.0);
}

#[tokio::test]
async fn oversized_heads_get_414_or_431() {
    let node = Node::start(&[]).await;
    let head = |line: &str, headers: &str| format!("GET {line} HTTP/1.1\r\nHost: a\r\n{headers}\r\n");
    for length in [9 << 10, 20 << 10, 4 << 20] {
        let long = "x".repeat(length);
        expect(&node, head(&format!("/ws/{long}"), ""), 414).await;
        expect(&node, long, 414).await;
    }
    for length in [17 << 10, 20 << 10, 4 << 20] {
        let long = "x".repeat(length);
        expect(&node, head("/ws/a", &format!("Cookie: {long}\r\n")), 431).await;
    }
    expect(&node, head("/ws/a", &"A: b\r\n".repeat(64)), 431).await;
    // The limits themselves are allowed.
    let cookie = format!("{UPGRADE}{KEY}Cookie: {}\r\n", "x".repeat(16_000));
    let mut raw = Raw::connect(node.public).await;
    raw.write(head("/ws/a", &cookie).as_bytes()).await;
    assert_eq!(raw.response().await.status, 101);
}

#[tokio::test]
async fn other_methods_get_405_before_their_body() {
    let node = Node::start(&[]).await;
    for method in ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"] {
        for body in [0, 10, 100_000, 4 << 20] {
            let head = format!("{method} /ws/a HTTP/1.1\r\nHost: a\r\nContent-Length: {body}\r\n\r\n");
            let response = expect(&node, [head.as_bytes(), &vec![b'x'; body]].concat(), 405).await;
            assert_eq!(response.header("allow"), Some("GET"));
        }
    }
    for path in ["/ws/a", "/ws"] {
        let mut raw = Raw::connect(node.public).await;
        raw.write(format!("HEAD {path} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes()).await;
        let rest = String::from_utf8(raw.rest().await).expect("text");
        assert!(rest.starts_with("HTTP/1.1 405 ") && rest.contains("\r\nAllow: GET\r\n"), "{rest}");
        assert!(rest.ends_with("\r\n\r\n"), "an answer to HEAD has no body: {rest}");
    }
}

#[tokio::test]
async fn missing_or_other_upgrades_get_426() {
    let node = Node::start(&[]).await;
    for headers in [
        String::new(),
        KEY.into(),
        format!("Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n{KEY}"),
        format!("Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n{KEY}"),
        format!("Connection: Upgrade\r\nUpgrade: h2c\r\nSec-WebSocket-Version: 13\r\n{KEY}"),
        format!("Connection: Upgrade\r\nUpgrade: websocket\r\n{KEY}"),
        format!("{UPGRADE}{KEY}").replace("13", "8"),
        format!("{UPGRADE}{KEY}").replace("13", "130"),
    ] {
        let response = expect(&node, format!("GET /ws/a HTTP/1.1\r\nHost: a\r\n{headers}\r\n"), 426).await;
        assert_eq!(response.header("sec-websocket-version"), Some("13"), "{headers}");
    }
    let old = format!("GET /ws/a HTTP/1.0\r\nHost: a\r\n{UPGRADE}{KEY}\r\n");
    expect(&node, old, 426).await;
}

#[tokio::test]
async fn malformed_upgrades_get_400() {
    let node = Node::start(&[]).await;
    let good = format!("GET /ws/a HTTP/1.1\r\nHost: a\r\n{UPGRADE}{KEY}\r\n");
    let with = |header: &str| good.replace("\r\n\r\n", &format!("\r\n{header}\r\n\r\n"));
    for (what, bytes) in [
        ("no key", good.replace(KEY, "")),
        ("a short key", good.replace("b25jZQ", "b25j")),
        ("a key of other signs", good.replace("dGhl", "d*hl")),
        ("a doubled key", with(KEY.trim_end())),
        ("no Host", good.replace("Host: a\r\n", "")),
        ("a doubled Host", with("Host: a")),
        ("a Host that is none", good.replace("Host: a", "Host: a/b")),
        ("bare LF", good.replace("\r\n", "\n")),
        ("one bare LF", good.replacen("\r\n", "\n", 1)),
        ("a bare CR", good.replace("Host: a", "Host: a\r")),
        ("a folded header", with("X: a\r\n b")),
        ("a space before the colon", with("X : a")),
        ("NUL", with("X: \0")),
        ("chunked", with("Transfer-Encoding: chunked")),
        ("another coding", with("Transfer-Encoding: gzip")),
        ("both lengths", with("Transfer-Encoding: chunked\r\nContent-Length: 4")),
        ("a body", with("Content-Length: 4") + "body"),
        ("a length that is none", with("Content-Length: -1")),
        ("two lengths", with("Content-Length: 4\r\nContent-Length: 5")),
        ("bytes before the 101", good.clone() + "\u{1}"),
        ("another request before the 101", good.repeat(2)),
    ] {
        let response = answer(&node, bytes.as_bytes()).await;
        assert_eq!(response.status, 400, "{what}: {response:?}");
    }
    assert_eq!(node.metric("fanfare_connections_upgraded_total").await, 0.0);
    let mut raw = Raw::connect(node.public).await;
    raw.write(good.as_bytes()).await;
    assert_eq!(raw.response().await.status, 101, "but for all that it is good");
}

#[tokio::test]
async fn other_protocols_get_400() {
    let node = Node::start(&[]).await;
    let hello = [&[0x16, 3, 1, 2, 0, 1, 0, 1, 0xFC, 3, 3][..], &[7; 500]].concat();
    assert!(expect(&node, hello, 400).await.body.contains("TLS"));
    assert!(expect(&node, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400).await.body.contains("HTTP/2"));
    for garbage in [
        &b"\0"[..],
        b"\xFF\xFE\xFD\r\n\r\n",
        b"\r\n\r\n\r\n",
        b"HELO example.com\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /ws/a\r\n\r\n",
        b"GET ws/a HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /ws/\xC3\xBC HTTP/1.1\r\nHost: a\r\n\r\n",
        b"*1\r\n$4\r\nPING\r\n",
        b"\x05\x01\0",
    ] {
        expect(&node, garbage, 400).await;
    }
    // A half-closed incomplete request gets a response: a proxy would take a close without one for
    // a dead node.
    let mut raw = Raw::connect(node.public).await;
    raw.write(b"GET /ws/a HTTP/1.1\r\nHost:").await;
    raw.end_sending().await;
    raw.response().await.expect_rejection(400);
    raw.expect_end().await;
}

async fn expect_close(node: &Node, what: &str, bytes: &[u8], code: u16) {
    let mut raw = Raw::upgraded(node.public, "/ws/raw?channel=room").await;
    raw.write(bytes).await;
    assert_eq!(raw.expect_close().await, code, "{what}");
}

#[tokio::test]
async fn protocol_violations_close_with_1002() {
    let node = Node::start(&[]).await;
    for opcode in [3, 4, 5, 6, 7, 11, 12, 13, 14, 15] {
        expect_close(&node, &format!("opcode {opcode}"), &frame_bytes(true, opcode, true, b"a"), 1002).await;
    }
    for bit in [0x40, 0x20, 0x10] {
        for opcode in [TEXT, PING, CLOSE] {
            let mut frame = frame_bytes(true, opcode, true, b"");
            frame[0] |= bit;
            expect_close(&node, &format!("bit {bit:x} of {opcode}"), &frame, 1002).await;
        }
    }
    // RFC 6455 section 5.2: lengths use the shortest encoding.
    expect_close(&node, "a long length", &[0x81, 0xFE, 0, 1, 0, 0, 0, 0, b'a'], 1002).await;
    for opcode in [PING, PONG, CLOSE] {
        expect_close(&node, "not final", &frame_bytes(false, opcode, true, b""), 1002).await;
        expect_close(&node, "too long", &frame_bytes(true, opcode, true, &[b'a'; 126]), 1002).await;
    }
    for code in [0u16, 1, 999, 1004, 1005, 1006, 1015, 1016, 2000, 2999, 5000, 65535] {
        let close = frame_bytes(true, CLOSE, true, &code.to_be_bytes());
        expect_close(&node, &format!("close code {code}"), &close, 1002).await;
    }
}

#[tokio::test]
async fn close_reason_not_utf8_closes_with_1007() {
    let node = Node::start(&[]).await;
    expect_close(&node, "reason", &frame_bytes(true, CLOSE, true, b"\x03\xE8\xFF"), 1007).await;
}

#[tokio::test]
async fn declared_lengths_cost_no_memory() {
    let node = Node::start(&["--shards", "1"]).await;
    let mut held = Vec::new();
    for _ in 0..200 {
        held.push(Raw::upgraded(node.public, "/ws/a?channel=room").await);
    }
    let before = node.resident();
    for (raw, length) in
        held.iter_mut().zip([1 << 20, 1 << 32, 1 << 62, i64::MAX as u64, u64::MAX].repeat(40))
    {
        let head = [&[0x81, 0xFF][..], &length.to_be_bytes(), &[1, 2, 3, 4]].concat();
        raw.write(&head).await;
        assert_eq!(raw.expect_close().await, 1009, "{length}");
    }
    // Allowed lengths cost no memory either before the payload arrives.
    held.clear();
    for _ in 0..200 {
        let mut raw = Raw::upgraded(node.public, "/ws/a?channel=room").await;
        // The pong shows that the bytes after the ping were read.
        let started = [&frame_bytes(true, PING, true, b"")[..], &[0x81, 0xFE, 0xFF, 0xFF, 1, 2, 3, 4, 5]];
        raw.write(&started.concat()).await;
        assert_eq!(raw.next().await, Some((PONG, Vec::new())));
        held.push(raw);
    }
    let grown = node.resident().saturating_sub(before);
    assert!(grown < 4 << 20, "{grown} bytes for 200 starts of 64 KiB");
}

#[tokio::test]
async fn partial_messages_are_limited_in_total() {
    let node = Node::start(&["--shards", "1", "--max-message-size", "1MiB"]).await;
    let before = node.resident();
    // Ten times the limit, half of it in one frame and half in two.
    let (one, two) = (vec![b'x'; 900 << 10], vec![b'y'; 450 << 10]);
    let whole = frame_bytes(true, TEXT, true, &one);
    let first = frame_bytes(false, TEXT, true, &two);
    let rest = frame_bytes(true, CONTINUATION, true, &two);
    let halves = [&first[..], &rest[..rest.len() - 1]].concat();
    let mut held = Vec::new();
    for n in 0..640 {
        let mut raw = Raw::upgraded(node.public, "/ws/a?channel=room").await;
        raw.write(if n % 2 == 0 { &whole[..whole.len() - 1] } else { &halves }).await;
        held.push(raw);
    }
    // A message that completes meanwhile is delivered.
    let mut honest = Raw::upgraded(node.public, "/ws/honest?channel=other").await;
    honest.write(&whole).await;
    assert_eq!(
        honest.next_text().await.len(),
        one.len() + r#"{"sender":"honest","text":"","id":1764000000001045}"#.len()
    );
    let grown = node.resident().saturating_sub(before);
    assert!(grown < 192 << 20, "{} MiB for unfinished messages of {} MiB", grown >> 20, (640 * 900) >> 10);
    assert_eq!(held[0].expect_close().await, 1008, "the oldest goes first");
    let ended = node.metric_of("fanfare_connections_closed_total", r#"reason="message_timeout""#).await;
    assert!((540.0..600.0).contains(&ended), "{ended}");
}

#[tokio::test]
async fn partial_messages_share_one_limit() {
    const CLIENTS: usize = 24;
    let node = Node::start(&["--shards", "16", "--max-message-size", "8MiB"]).await;
    let frame = frame_bytes(true, TEXT, true, &vec![b'x'; 7 << 20]);
    let mut held = Vec::new();
    let began = Instant::now();
    for _ in 0..CLIENTS {
        let mut raw = Raw::upgraded(node.public, "/ws/a?channel=room").await;
        raw.write_some(&frame[..frame.len() - 1]).await;
        held.push(raw);
    }
    // 64 MiB hold nine of them.
    until("the close of the ones over the limit", || async {
        let ended = node.metric_of("fanfare_connections_closed_total", r#"reason="message_timeout""#).await;
        (ended >= (CLIENTS - 9) as f64).then_some(())
    })
    .await;
    assert!(began.elapsed() < Duration::from_secs(10), "each has ten seconds where there is room");
    let mut honest = Raw::upgraded(node.public, "/ws/honest?channel=other").await;
    honest.frame(true, TEXT, b"hello").await;
    assert!(honest.next_text().await.contains("hello"));
}

#[tokio::test]
async fn endless_fragments_close_with_1008() {
    let node = Node::start(&[]).await;
    for payload in [&b""[..], b"a"] {
        let mut raw = Raw::upgraded(node.public, "/ws/raw?channel=room").await;
        raw.frame(false, TEXT, payload).await;
        let more = frame_bytes(false, CONTINUATION, true, payload).repeat(1000);
        let mut sent = 0;
        while sent < 100_000 && raw.write_some(&more).await {
            sent += 1000;
        }
        assert_eq!(raw.expect_close().await, 1008);
    }
}

#[tokio::test]
async fn half_open_peer_is_closed_in_time() {
    let node = Node::start(&["--ping-interval", "2s", "--ping-timeout", "1s"]).await;
    // A peer whose machine has lost power: no bytes and no FIN arrive.
    let started = Instant::now();
    let dead = Raw::upgraded(node.public, "/ws/a").await;
    until("its end", || async { (node.metric("fanfare_connections").await == 0.0).then_some(()) }).await;
    let gone = started.elapsed();
    assert!((2.9..5.0).contains(&gone.as_secs_f64()), "{gone:?}");
    assert_eq!(node.metric_of("fanfare_connections_closed_total", r#"reason="ping_timeout""#).await, 1.0);
    drop(dead);
}

#[tokio::test]
async fn bad_names_get_400_and_break_no_log_line() {
    let node = Node::start(&["--log", "trace"]).await;
    let long = "a".repeat(129);
    for name in ["", "%0A", "%0D%0Aevil", "%00", "%1B[2J", "%7F", "%C2%85", "%FF", "%C3", "%zz", "a/b", &long]
    {
        let request = |target: &str| format!("GET {target} HTTP/1.1\r\nHost: a\r\n{UPGRADE}{KEY}\r\n");
        expect(&node, request(&format!("/ws/{name}")), 400).await;
        expect(&node, request(&format!("/ws/a?channel={name}")), 400).await;
    }
    // Names that are not control characters but unusual are escaped in the log.
    for (name, shown) in [("%E2%80%A8evil", r"\u{2028}evil"), ("%E2%80%AEevil", r"\u{202e}evil")] {
        let mut raw = Raw::upgraded(node.public, &format!("/ws/{name}")).await;
        raw.frame(true, CLOSE, b"").await;
        until("its end in the log", || async { node.log().contains(shown).then_some(()) }).await;
    }
    let log = node.log();
    let lines: Vec<_> = log.lines().filter(|line| line.starts_with("! ")).collect();
    for line in &lines {
        assert!(line.starts_with("! 20") && !line.contains(['\u{1b}', '\u{2028}', '\0']), "{line:?}");
    }
    assert!(lines.iter().any(|line| line.contains("closed connection")), "{log}");
}

#[test]
fn tests_in_the_table_exist() {
    let source = include_str!("untrusted_input.rs");
    let rows = source.lines().filter_map(|line| line.strip_prefix("//! | ")).skip(1);
    let mut tests = 0;
    for row in rows {
        let named = row.trim_end_matches(" |").rsplit(" | ").next().expect("a row has cells");
        for test in named.split(", ").map(|test| test.trim_matches('`')) {
            let name = if test.contains("::") { test.to_owned() } else { format!("untrusted_input::{test}") };
            assert!(has_test(&name), "there is no test {test}");
            tests += 1;
        }
    }
    assert!(tests > 30, "{tests}");
}
