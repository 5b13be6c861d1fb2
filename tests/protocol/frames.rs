//! The limits of RFC 6455: which frames clients may send, and the close codes for those that they
//! may not.

use serde_json::json;

use crate::common::raw::{frame_bytes, opcode::*};
use crate::common::{Client, Node, Raw, Rng, http};

/// Joins with a raw connection.
async fn join(node: &Node) -> Raw {
    Raw::upgraded(node.public, "/ws/raw?channel=room").await
}

/// Sends these bytes on a new connection, which the server must close with this code.
async fn expect_close(node: &Node, what: &str, bytes: &[u8], code: u16) {
    let mut raw = join(node).await;
    raw.write(bytes).await;
    assert_eq!(raw.expect_close().await, code, "{what}");
}

#[tokio::test]
async fn binary_closes_with_1003() {
    let node = Node::start(&[]).await;
    expect_close(&node, "binary", &frame_bytes(true, BINARY, true, b"abc"), 1003).await;
    expect_close(&node, "empty binary", &frame_bytes(true, BINARY, true, b""), 1003).await;
    let fragments = [
        frame_bytes(false, BINARY, true, b"a"),
        frame_bytes(false, CONTINUATION, true, b"b"),
        frame_bytes(true, CONTINUATION, true, b"c"),
    ];
    expect_close(&node, "binary in fragments", &fragments.concat(), 1003).await;
}

#[tokio::test]
async fn message_too_big_closes_with_1009() {
    let node = Node::start(&["--max-message-size", "1KiB"]).await;
    let longest = "x".repeat(1024);
    let mut raw = join(&node).await;
    raw.frame(true, TEXT, longest.as_bytes()).await;
    assert!(raw.next_text().await.contains(&longest), "the limit itself is allowed");

    let one_more = "x".repeat(1025);
    expect_close(&node, "one byte more", &frame_bytes(true, TEXT, true, one_more.as_bytes()), 1009).await;
    let fragments =
        [frame_bytes(false, TEXT, true, longest.as_bytes()), frame_bytes(true, CONTINUATION, true, b"x")];
    expect_close(&node, "one byte more in fragments", &fragments.concat(), 1009).await;
    // A declared length is rejected at once, and nothing is allocated.
    let announced = [0x81, 0xFF, 0x0F, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 1, 2, 3, 4];
    expect_close(&node, "2^60 bytes announced", &announced, 1009).await;
}

#[tokio::test]
async fn text_that_is_not_utf8_closes_with_1007() {
    let node = Node::start(&[]).await;
    for bad in [&b"\xFF"[..], b"abc\xC3", b"\xC0\x80", b"\xED\xA0\x80", b"\xF4\x90\x80\x80", b"\x80"] {
        expect_close(&node, &format!("{bad:?}"), &frame_bytes(true, TEXT, true, bad), 1007).await;
    }
    let fragments = [frame_bytes(false, TEXT, true, b"ok\xC3"), frame_bytes(true, CONTINUATION, true, b"x")];
    expect_close(&node, "in fragments", &fragments.concat(), 1007).await;
}

#[tokio::test]
async fn broken_frames_close_with_1002() {
    let node = Node::start(&[]).await;
    let long_ping = frame_bytes(true, PING, true, &[b'x'; 126]);
    let text_in_text = [frame_bytes(false, TEXT, true, b"a"), frame_bytes(true, TEXT, true, b"b")].concat();
    let mut reserved_bit = frame_bytes(true, TEXT, true, b"a");
    reserved_bit[0] |= 0x40;
    for (what, bytes) in [
        ("unmasked", frame_bytes(true, TEXT, false, b"abc")),
        ("unmasked ping", frame_bytes(true, PING, false, b"")),
        ("reserved opcode", frame_bytes(true, 3, true, b"abc")),
        ("reserved control opcode", frame_bytes(true, 11, true, b"")),
        ("reserved bit", reserved_bit),
        ("continuation of nothing", frame_bytes(true, CONTINUATION, true, b"abc")),
        ("text inside a fragmented text", text_in_text),
        ("ping in fragments", frame_bytes(false, PING, true, b"a")),
        ("ping too long", long_ping),
        ("close with one byte", frame_bytes(true, CLOSE, true, &[3])),
        ("close with a code that may not be sent", frame_bytes(true, CLOSE, true, &1005u16.to_be_bytes())),
    ] {
        expect_close(&node, what, &bytes, 1002).await;
    }
}

#[tokio::test]
async fn bad_client_affects_no_other() {
    let node = Node::start(&["--shards", "1"]).await;
    let mut good = Client::plain(&node, "good", "room").await;
    for bytes in [&b"\xFF\xFF\xFF\xFF"[..], b"\x81", b"\x81\xFE\x00", b"\x01\x83abcd"] {
        let mut raw = join(&node).await;
        raw.write(bytes).await;
        drop(raw);
    }
    good.send("hi").await;
    assert_eq!(good.next_event().await.1, json!({"sender": "good", "text": "hi"}));
}

#[tokio::test]
async fn fragments_with_control_frames_between() {
    let node = Node::start(&[]).await;
    let mut raw = join(&node).await;
    raw.frame(false, TEXT, "gr\u{fc}".as_bytes().split_at(3).0).await; // a character in two fragments
    raw.frame(true, PING, b"between").await;
    assert_eq!(raw.next().await, Some((PONG, b"between".to_vec())));
    raw.frame(false, CONTINUATION, b"\xBC").await;
    raw.frame(false, CONTINUATION, b"").await;
    raw.frame(true, CONTINUATION, b"\xC3\x9Fe").await;
    assert!(raw.next_text().await.starts_with(r#"{"sender":"raw","text":"grüße","id":"#));
    raw.frame(true, TEXT, b"whole again").await;
    assert!(raw.next_text().await.contains("whole again"));
}

#[tokio::test]
async fn frames_may_be_split_anywhere() {
    // On another shard, the last event of one connection could be delivered to the next one.
    let node = Node::start(&["--shards", "1"]).await;
    let long = "y".repeat(40_000);
    let frames = [
        frame_bytes(true, TEXT, true, b"one"),
        frame_bytes(false, TEXT, true, b"tw"),
        frame_bytes(true, PONG, true, b"unasked"),
        frame_bytes(true, CONTINUATION, true, b"o"),
        frame_bytes(true, TEXT, true, b""),
        frame_bytes(true, TEXT, true, long.as_bytes()),
        frame_bytes(true, TEXT, true, b"end"),
    ];
    let bytes = frames.concat();
    for piece in [1, 2, 3, 7, 1000, bytes.len()] {
        let mut raw = join(&node).await;
        // The long text is sent in larger pieces: byte by byte would take 40,000 writes.
        let (fine, coarse) = bytes.split_at(80);
        for part in fine.chunks(piece).chain(coarse.chunks(piece.max(997))) {
            raw.write(part).await;
        }
        for expected in ["one", "two", "", &long, "end"] {
            let start = format!(r#"{{"sender":"raw","text":"{expected}","id":"#);
            let text = raw.next_text().await;
            assert!(text.starts_with(&start), "in pieces of {piece}: {text:.80} instead of {expected:.40}");
        }
    }
}

#[tokio::test]
async fn header_spelling_of_browsers_is_accepted() {
    let node = Node::start(&[]).await;
    let mut raw = Raw::connect(node.public).await;
    let headers = [("Connection", "keep-alive, Upgrade"), ("Upgrade", "WebSocket"), ("Cookie", "a=b; c=d")];
    assert_eq!(raw.upgrade("/ws/firefox?channel=room", &headers).await.status, 101);
    raw.frame(true, TEXT, b"hi").await;
    assert!(raw.next_text().await.contains("firefox"));
}

#[tokio::test]
async fn frames_before_the_101_are_rejected() {
    let node = Node::start(&[]).await;
    let mut raw = Raw::connect(node.public).await;
    let headers = [
        ("Connection", "Upgrade"),
        ("Upgrade", "websocket"),
        ("Sec-WebSocket-Version", "13"),
        ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
    ];
    // RFC 6455 section 4.1: a client waits for the response. A proxy could take these bytes for
    // another request.
    let mut bytes = http::request_bytes(node.public, "GET", "/ws/eager", &headers, b"");
    bytes.extend(frame_bytes(true, TEXT, true, b"first"));
    raw.write(&bytes).await;
    raw.response().await.expect_rejection(400);
    raw.expect_end().await;
}

#[tokio::test]
async fn pings_are_answered_with_their_payload() {
    let node = Node::start(&[]).await;
    let mut raw = join(&node).await;
    for payload in [&b""[..], b"hello", &[0xFF; 125]] {
        raw.frame(true, PING, payload).await;
        assert_eq!(raw.next().await, Some((PONG, payload.to_vec())));
    }
    raw.frame(true, PONG, b"unasked").await;
    raw.frame(true, TEXT, b"still here").await;
    assert!(raw.next_text().await.contains("still here"));
}

#[tokio::test]
async fn close_is_answered_with_its_code() {
    let node = Node::start(&[]).await;
    for (sent, answered) in [(&b""[..], &b""[..]), (b"\x03\xE8", b"\x03\xE8"), (b"\x0F\xA1bye", b"\x0F\xA1")]
    {
        let mut raw = join(&node).await;
        raw.frame(true, CLOSE, sent).await;
        let (opcode, payload) = raw.next().await.expect("an answer");
        assert_eq!(opcode, CLOSE);
        assert!(payload.starts_with(answered), "{sent:?} was answered with {payload:?}");
        raw.expect_end().await;
    }
}

#[tokio::test]
async fn frames_after_a_close_are_ignored() {
    let node = Node::start(&[]).await;
    let mut subscriber = Client::plain(&node, "subscriber", "room").await;
    let mut raw = join(&node).await;
    let close = frame_bytes(true, CLOSE, true, b"\x03\xE8");
    raw.write(&[close, frame_bytes(true, TEXT, true, b"too late")].concat()).await;
    assert_eq!(raw.expect_close().await, 1000);
    subscriber.send("marker").await;
    assert_eq!(subscriber.next_event().await.1, json!({"sender": "subscriber", "text": "marker"}));
}

#[tokio::test]
async fn incomplete_message_closes_with_1008() {
    let node = Node::start(&[]).await;
    let mut fragment = join(&node).await;
    fragment.frame(false, TEXT, b"to be continued").await;
    let mut half = join(&node).await;
    half.write(&frame_bytes(true, TEXT, true, b"half a frame")[..9]).await;
    assert_eq!(fragment.expect_close().await, 1008);
    assert_eq!(half.expect_close().await, 1008);
}

#[tokio::test]
async fn ping_flood_without_reads_costs_no_memory() {
    let node = Node::start(&["--shards", "1"]).await;
    let mut other = Client::plain(&node, "other", "room").await;
    let mut raw = Raw::connect_with_small_buffers(node.public).await;
    assert_eq!(raw.upgrade("/ws/rude?channel=room", &[]).await.status, 101);
    let before = node.resident();
    let pings = frame_bytes(true, PING, true, &[b'p'; 125]).repeat(1000);
    let mut sent = 0;
    while sent < 64 << 20 && raw.write_some(&pings).await {
        sent += pings.len();
    }
    // It may only hold the pongs in its outbox and in the kernel.
    let grown = node.resident().saturating_sub(before);
    assert!(grown < 4 << 20, "{grown} bytes after {sent} bytes of pings");
    other.send("hi").await;
    assert_eq!(other.next_event().await.1, json!({"sender": "other", "text": "hi"}));
}

#[tokio::test]
async fn random_bytes_do_not_crash_the_node() {
    let node = Node::start(&["--shards", "1", "--max-message-size", "1KiB"]).await;
    let mut rng = Rng(1);
    let request = http::request_bytes(node.admin, "POST", "/publish?channel=room", &[], b"{\"a\":1}");
    for round in 0..600 {
        let mut bytes = Vec::new();
        for _ in 0..1 + rng.below(6) {
            let payload: Vec<u8> = (0..rng.below(300)).map(|_| rng.below(256) as u8).collect();
            let text = [&payload[..], b"\xC3\xBC{\"text\":1}"][rng.below(2) as usize];
            let opcode = [0, 1, 1, 1, 2, 8, 9, 10, 3][rng.below(9) as usize];
            bytes.extend(frame_bytes(rng.below(4) > 0, opcode, rng.below(20) > 0, text));
        }
        if rng.below(2) == 0 {
            let at = rng.below(bytes.len() as u64) as usize;
            bytes[at] = rng.below(256) as u8;
        }
        bytes.truncate(1 + rng.below(bytes.len() as u64) as usize);
        let mut raw = match round % 3 {
            0 => {
                // The admin listener, with a request that is damaged at one place.
                let at = rng.below(request.len() as u64) as usize;
                bytes = request.clone();
                bytes[at] = rng.below(256) as u8;
                Raw::connect(node.admin).await
            }
            1 => Raw::upgraded(node.public, "/ws/fuzz?channel=room&lastEventId=").await,
            _ => {
                let mut raw = Raw::connect(node.public).await;
                let protocol = [("Sec-WebSocket-Protocol", "fanfare.v1")];
                assert_eq!(raw.upgrade("/ws/fuzz?channel=room", &protocol).await.status, 101);
                raw
            }
        };
        for part in bytes.chunks(1 + rng.below(bytes.len() as u64) as usize) {
            if !raw.write_some(part).await {
                break; // the connection was closed for an earlier part
            }
        }
    }
    let mut client = Client::plain(&node, "after", "room").await;
    client.send("alive").await;
    while client.next_json().await["text"] != "alive" {}
    assert!(!node.log().contains("panicked"), "{}", node.log());
}
