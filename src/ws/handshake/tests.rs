use std::net::IpAddr;

use super::*;
use crate::config::Action;
use crate::protocol::close::CloseReason;
use crate::protocol::event::{ChannelName, DEFAULT_CHANNEL, EventId};
use crate::ws::client::{LastSeen, Mode};

fn request(target: &str, headers: &str) -> String {
    format!(
        "GET {target} HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{headers}\r\n"
    )
}

const NEWCOMER: LastSeen = LastSeen::Newcomer { history: 0 };

/// A PROXY header of version 2 for a connection of the proxy itself.
const LOCAL_V2: &str = "\r\n\r\n\0\r\nQUIT\n\x20\0\0\0";

fn context(flags: &[&str]) -> HandshakeContext {
    let settings = match Settings::from(flags.iter().map(std::ffi::OsString::from), []) {
        Ok(Action::Run(settings)) => Arc::new(settings),
        other => panic!("{other:?}"),
    };
    let keys = Arc::new(KeyRing::load(&settings).unwrap());
    let limits = Arc::new(ConnectionLimits::new(&settings));
    HandshakeContext { settings, readiness: Arc::default(), keys, limits, loopback: Arc::default() }
}

fn outcome(bytes: &[u8]) -> HandshakeOutcome {
    decide_from("192.0.2.1", bytes, &context(&[])).0
}

fn decide_from(peer: &str, bytes: &[u8], context: &HandshakeContext) -> (HandshakeOutcome, ConnectionSlot) {
    let connection_slot = context.limits.acquire(peer.parse().unwrap()).unwrap();
    decide(bytes, context, connection_slot, &|| false)
}

fn join(target: &str, headers: &str) -> Join {
    match outcome(request(target, headers).as_bytes()) {
        HandshakeOutcome::Join(join) => *join,
        other => panic!("{other:?}"),
    }
}

fn status(bytes: &[u8]) -> u16 {
    match outcome(bytes) {
        HandshakeOutcome::Respond(response) => response.status(),
        HandshakeOutcome::Reject(rejection) => rejection.status,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_valid_request_joins() {
    let plain = join("/ws/al%20ice", "");
    assert_eq!(
        (&*plain.client.user, plain.channel.as_ref().map(ChannelName::as_str)),
        ("al ice", Some(DEFAULT_CHANNEL))
    );
    assert!(plain.client.mode == Mode::Plain && plain.last_seen == NEWCOMER);
    let answer = String::from_utf8(plain.response.to_vec()).unwrap();
    assert!(
        answer.contains("Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n"),
        "RFC 6455 section 1.3"
    );
    assert!(!answer.contains("Protocol:"));

    let json = join("/ws/a?channel=x.y:1&lastEventId=17", "Sec-WebSocket-Protocol: a, fanfare.v1\r\n");
    assert!(json.client.mode == Mode::Json && json.last_seen == LastSeen::Event(EventId(17)));
    assert!(
        String::from_utf8(json.response.to_vec()).unwrap().contains("Sec-WebSocket-Protocol: fanfare.v1\r\n")
    );
}

#[test]
fn invalid_ids_are_unknown_ids() {
    let seen = |value: &str| join(&format!("/ws/a?lastEventId{value}"), "").last_seen;
    assert_eq!((seen(""), seen("=")), (NEWCOMER, NEWCOMER));
    assert_eq!(seen("=0"), LastSeen::Event(EventId(0)));
    for value in ["=-1", "=x", "=9007199254740992", "=99999999999999999999", "=1.5", "=%ff", "=+1"] {
        assert_eq!(seen(value), LastSeen::Unknown, "{value}");
    }
}

#[test]
fn history_is_for_newcomers() {
    let seen = |query: &str| join(&format!("/ws/a?{query}"), "").last_seen;
    for (query, history) in
        [("history=1", 1), ("history=100&lastEventId=", 100), ("lastEventId&history=7", 7)]
    {
        assert_eq!(seen(query), LastSeen::Newcomer { history }, "{query}");
    }
    assert_eq!(seen("history=5&lastEventId=17"), LastSeen::Event(EventId(17)));
    assert_eq!(seen("history=5&lastEventId=x"), LastSeen::Unknown);
    assert!(!join("/ws/a?history=5", "").client.wants_recovery());
    for value in ["", "=", "=0", "=101", "=256", "=-1", "=+5", "=5.0", "=x", "=%ff", "=99999999999999999999"]
    {
        for more in ["", "&lastEventId=17"] {
            let request = request(&format!("/ws/a?history{value}{more}"), "");
            match outcome(request.as_bytes()) {
                HandshakeOutcome::RejectUpgraded(rejection, _) => assert_eq!(rejection.status, 400),
                other => panic!("{value}{more}: {other:?}"),
            }
        }
    }
}

#[test]
fn trusted_proxies_report_the_client() {
    let context = context(&["--trusted-proxy", "10.0.0.0/8"]);
    let upgrade = request("/ws/a", "");
    let forward = |value: &str| request("/ws/a", &format!("X-Forwarded-For: {value}\r\n"));
    let v2 = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0C\xC0\0\x02\x07\xC0\0\x02\x01\0\x01\0\x02";
    for (preamble, request, client) in [
        (&b""[..], &upgrade, None),
        (b"", &forward("192.0.2.7"), Some("192.0.2.7")),
        (b"", &forward("192.0.2.7, 10.0.0.2"), Some("192.0.2.7")),
        (b"", &forward("10.0.0.2"), None),
        (b"PROXY TCP4 192.0.2.7 10.0.0.1 1 2\r\n", &upgrade, Some("192.0.2.7")),
        (b"PROXY UNKNOWN\r\n", &forward("192.0.2.7"), Some("192.0.2.7")),
        (b"PROXY TCP4 10.0.0.9 10.0.0.1 1 2\r\n", &forward("192.0.2.7"), Some("192.0.2.7")),
        (
            b"PROXY TCP4 10.0.0.9 10.0.0.1 1 2\r\nPROXY TCP4 192.0.2.7 10.0.0.1 1 2\r\n",
            &upgrade,
            Some("192.0.2.7"),
        ),
        (LOCAL_V2.as_bytes(), &upgrade, None),
        (v2, &upgrade, Some("192.0.2.7")),
    ] {
        let client = client.map_or(ConnectionSlot::Proxy, |client| {
            ConnectionSlot::Client(client.parse::<IpAddr>().unwrap().into())
        });
        let bytes = [preamble, request.as_bytes()].concat();
        let (outcome, connection_slot) = decide_from("10.0.0.1", &bytes, &context);
        assert!(matches!(outcome, HandshakeOutcome::Join(_)), "{outcome:?}");
        assert_eq!(connection_slot, client, "{}", String::from_utf8_lossy(&bytes));

        // Byte by byte, as a shard buffers them.
        let mut connection_slot = context.limits.acquire("10.0.0.1".parse().unwrap()).unwrap();
        let mut kept = Vec::new();
        for (at, byte) in bytes.iter().enumerate() {
            kept.push(*byte);
            let (outcome, slot) = decide(&kept, &context, connection_slot, &|| false);
            connection_slot = slot;
            match outcome {
                HandshakeOutcome::Incomplete(read) => drop(kept.drain(..read)),
                HandshakeOutcome::Join(_) => assert_eq!(at + 1, bytes.len()),
                other => panic!("{other:?} after {}", String::from_utf8_lossy(&kept)),
            }
        }
        assert_eq!(connection_slot, client, "{}", String::from_utf8_lossy(&bytes));
    }
}

#[test]
fn proxy_headers_of_other_peers_are_rejected() {
    let context = context(&["--trusted-proxy", "10.0.0.0/8"]);
    let forward = request("/ws/a", "X-Forwarded-For: 192.0.2.7\r\n");
    let named = "PROXY TCP4 192.0.2.7 10.0.0.1 1 2\r\n";
    for (peer, bytes, text) in [
        ("192.0.2.1", forward.clone(), "X-Forwarded-For is accepted from trusted proxies only"),
        ("192.0.2.1", "PROXY ".into(), "PROXY headers are accepted from trusted proxies only"),
        ("192.0.2.1", "\r\n\r\n\0\r\nQUIT\n".into(), "PROXY headers are accepted"),
        ("10.0.0.1", named.to_owned() + &forward, "X-Forwarded-For is accepted from trusted proxies only"),
        ("10.0.0.1", named.to_owned() + named, "PROXY headers are accepted from trusted"),
        ("10.0.0.1", format!("PROXY UNKNOWN\r\n{named}"), "PROXY headers are accepted from trusted"),
        ("10.0.0.1", LOCAL_V2.to_owned() + named, "PROXY headers are accepted from trusted"),
    ] {
        let (outcome, _) = decide_from(peer, bytes.as_bytes(), &context);
        let HandshakeOutcome::Reject(rejection) = outcome else { panic!("{bytes}: {outcome:?}") };
        assert_eq!((rejection.status, rejection.reason), (400, CloseReason::ProxyNotTrusted));
        assert!(rejection.text.contains("--trusted-proxy") && rejection.text.contains(text), "{rejection:?}");

        if peer != "10.0.0.1" {
            continue; // byte by byte version 2 is rejected as a malformed request first
        }
        let mut connection_slot = context.limits.acquire(peer.parse().unwrap()).unwrap();
        let mut kept = Vec::new();
        let rejected = bytes.bytes().any(|byte| {
            kept.push(byte);
            let (outcome, slot) = decide(&kept, &context, connection_slot, &|| false);
            connection_slot = slot;
            match outcome {
                HandshakeOutcome::Incomplete(read) => drop(kept.drain(..read)),
                HandshakeOutcome::Reject(rejection) if rejection.reason == CloseReason::ProxyNotTrusted => {
                    return true;
                }
                other => panic!("{other:?} after {bytes}"),
            }
            false
        });
        assert!(rejected, "{bytes}");
    }
    for bytes in ["PROXY TCP4\r\n".to_owned(), request("/ws/a", "X-Forwarded-For: unknown\r\n")] {
        let (outcome, _) = decide_from("10.0.0.1", bytes.as_bytes(), &context);
        let HandshakeOutcome::Reject(rejection) = outcome else { panic!("{bytes}: {outcome:?}") };
        assert_eq!((rejection.status, rejection.reason), (400, CloseReason::HttpResponse));
    }
    // Responses that need no client address ignore the header.
    for path in ["/healthz", "/"] {
        let bytes = request(path, "X-Forwarded-For: unknown\r\n");
        for peer in ["192.0.2.1", "10.0.0.1"] {
            let (outcome, _) = decide_from(peer, bytes.as_bytes(), &context);
            assert!(matches!(outcome, HandshakeOutcome::Respond(response) if response.status() == 200));
        }
    }
}

#[test]
fn limits_are_checked_before_the_request() {
    let context =
        context(&["--max-connections", "2", "--max-connections-per-ip", "1", "--trusted-proxy", "10.0.0.1"]);
    let bad = request("/ws/%ff", "Sec-WebSocket-Key: twice\r\n");
    let status = |peer, bytes: &str| match decide_from(peer, bytes.as_bytes(), &context).0 {
        HandshakeOutcome::Reject(rejection) => (rejection.status, rejection.reason),
        other => panic!("{other:?}"),
    };
    let first = decide_from("192.0.2.1", request("/ws/a", "").as_bytes(), &context);
    assert!(matches!(first.0, HandshakeOutcome::Join(_)));
    assert_eq!(status("192.0.2.1", &bad), (429, CloseReason::IpLimit));
    let forward = request("/ws/%ff", "X-Forwarded-For: 192.0.2.1\r\n");
    assert_eq!(status("10.0.0.1", &forward), (429, CloseReason::IpLimit));
    assert_eq!(
        status("10.0.0.1", &format!("PROXY TCP4 192.0.2.1 10.0.0.9 1 2\r\n{bad}")).1,
        CloseReason::IpLimit
    );
    let second = decide_from("192.0.2.2", request("/ws/a", "").as_bytes(), &context);
    assert!(matches!(second.0, HandshakeOutcome::Join(_)));
    assert_eq!(status("192.0.2.3", &bad), (503, CloseReason::NodeLimit));
    assert_eq!(
        status("10.0.0.1", &format!("PROXY TCP4 192.0.2.9 10.0.0.9 1 2\r\n{bad}")).1,
        CloseReason::NodeLimit
    );
    let (outcome, _) = decide_from("192.0.2.3", request("/healthz", "").as_bytes(), &context);
    assert!(matches!(outcome, HandshakeOutcome::Respond(response) if response.status() == 200));
}

#[test]
fn rebound_names_are_refused_on_loopback() {
    let named = context(&["--allow-origin", "http://app.example:8080"]);
    for (context, host, origin, loopback, joins) in [
        (&context(&[]), "127.0.0.1:8080", "http://127.0.0.1:8080", true, true),
        (&context(&[]), "localhost", "http://localhost:3000", true, true),
        (&context(&[]), "[::1]:8080", "http://[::1]:8080", true, true),
        (&context(&[]), "evil.example:8080", "http://evil.example:8080", true, false),
        (&context(&[]), "evil.example:8080", "http://evil.example:8080", false, true), // to a public address
        (&context(&[]), "127.0.0.1.evil.example", "http://127.0.0.1.evil.example", true, false),
        (&context(&[]), "evil.example:8080", "", true, true), // not a browser
        (&named, "app.example:8080", "http://app.example:8080", true, true),
        (&named, "evil.example:8080", "http://evil.example:8080", true, false),
    ] {
        let header = if origin.is_empty() { String::new() } else { format!("Origin: {origin}\r\n") };
        let request = request("/ws/a", &header).replace("Host: a", &format!("Host: {host}"));
        let connection_slot = context.limits.acquire("127.0.0.1".parse().unwrap()).unwrap();
        let (outcome, _) = decide(request.as_bytes(), context, connection_slot, &|| loopback);
        assert_eq!(matches!(outcome, HandshakeOutcome::Join(_)), joins, "{host} {origin}: {outcome:?}");
    }
}

#[test]
fn bad_requests_get_their_status() {
    let good = request("/ws/a", "");
    for (bytes, expected) in [
        (good.replace("GET", "POST"), 405),
        (good.replace("13\r\n", "8\r\n"), 426),
        (good.replace("Upgrade: websocket\r\n", ""), 426),
        (good.replace("dGhl", "dG="), 400),
        (request("/ws/a", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"), 400),
        (request("/ws/a", "Content-Length: 1\r\n"), 400),
        (good.clone() + "x", 400),
        (request("/ws/", ""), 400),
        (request("/ws/%0a", ""), 400),
        (request("/ws/%ff", ""), 400),
        (request(&format!("/ws/{}", "a".repeat(129)), ""), 400),
        (request("/ws/a?channel=", ""), 400),
        (request("/ws/a?channel=a%20b", ""), 400),
        (request("/ws/a", "Origin: http://b\r\n"), 403),
        (request("/ws/a", "Origin: null\r\n"), 403),
        (request("/ws/a", "Origin: http://a\r\nOrigin: http://a\r\n"), 403),
        (request("/ws/a", "Origin: \r\n"), 403),
        (request("/nowhere", ""), 404),
        (request("/healthz", ""), 200),
        (request("/healthz", "").replace("GET", "DELETE"), 405),
    ] {
        assert_eq!(status(bytes.as_bytes()), expected, "{bytes}");
    }
}

#[test]
fn an_offered_subprotocol_is_answered() {
    let protocol = |offered: &str| {
        let join = join("/ws/a", &format!("Sec-WebSocket-Protocol: {offered}\r\n"));
        let response = String::from_utf8(join.response.to_vec()).unwrap();
        let answer = response.split("Sec-WebSocket-Protocol: ").nth(1);
        (join.client.is_json(), answer.map(|answer| answer.trim_end().to_owned()))
    };
    assert_eq!(protocol(""), (false, None));
    assert_eq!(protocol("chat, fanfare.v1"), (true, Some("fanfare.v1".into())));
    assert_eq!(protocol("bearer.a.b-c_d"), (false, Some("bearer.a.b-c_d".into())));
    assert_eq!(protocol("chat, bearer.a, bearer.b"), (false, Some("bearer.a".into())));
    let longest = format!("bearer.{}", "x".repeat(1024 - 7));
    assert_eq!(protocol(&longest), (false, Some(longest.clone())));
    let longer = longest + "x";
    assert_eq!(protocol(&format!("{longer}, fanfare.v1")), (true, Some("fanfare.v1".into())));
    for offered in [&longer, "bearer.a b", "cha t", "\u{e9}"] {
        let bytes = request("/ws/a", &format!("Sec-WebSocket-Protocol: {offered}\r\n"));
        assert_eq!(status(bytes.as_bytes()), 400, "{offered}");
    }
}

#[test]
fn clients_of_fanfare_get_a_close_code() {
    let rejected = |target: &str, headers: &str| {
        let (rejection, bytes) = match outcome(request(target, headers).as_bytes()) {
            HandshakeOutcome::RejectUpgraded(rejection, bytes) => (rejection, bytes),
            other => panic!("{target} {headers}: {other:?}"),
        };
        let head = bytes.windows(4).position(|end| end == b"\r\n\r\n").unwrap() + 4;
        let (head, close) = (std::str::from_utf8(&bytes[..head]).unwrap(), &bytes[head..]);
        assert!(
            head.starts_with("HTTP/1.1 101 ") && head.contains("\r\nSec-WebSocket-Accept: s3pP"),
            "{head}"
        );
        assert_eq!((close[0], usize::from(close[1])), (0x88, close.len() - 2));
        assert_eq!(&close[4..], &rejection.text.as_bytes()[..close.len() - 4]);
        let protocol = head.split("Sec-WebSocket-Protocol: ").nth(1).map(|rest| rest.trim_end().to_owned());
        (u16::from_be_bytes([close[2], close[3]]), rejection.reason, protocol)
    };
    let json = "Sec-WebSocket-Protocol: chat, fanfare.v1\r\n";
    let answer = Some("fanfare.v1".to_owned());
    for target in ["/ws/%0a", "/ws/a?channel=a/b", "/ws/a?channel=%ff", "/ws/a?chanel=a"] {
        assert_eq!(rejected(target, json), (4400, CloseReason::HttpResponse, answer.clone()));
    }
    for target in ["/ws/a?channel=&lastEventId", "/ws/%0a?lastEventId=7", "/ws/a?last_event_id=7"] {
        assert_eq!(rejected(target, ""), (4400, CloseReason::HttpResponse, None));
    }
    let foreign = format!("{json}Origin: https://b.example\r\n");
    assert_eq!(rejected("/ws/a", &foreign), (4403, CloseReason::OriginNotAllowed, answer.clone()));
    let other = "Sec-WebSocket-Protocol: graphql-ws, mqtt\r\n";
    assert_eq!(rejected("/ws/a", other), (4400, CloseReason::HttpResponse, Some("graphql-ws".into())));
    let long = format!("/ws/a?lastEventId{}{}=a", "_".repeat(51), "%01".repeat(2));
    assert_eq!(rejected(&long, json).0, 4400, "cut to 123 bytes");

    // What is no upgrade, and a limit that is reached, stays HTTP.
    let bytes = |target: &str| request(target, json);
    for (bytes, expected) in [
        (bytes("/ws/a").replace("13\r\n", "8\r\n"), 426),
        (bytes("/ws/a").replace("dGhl", "dG="), 400),
        (bytes("/ws/a") + "x", 400),
        (request("/ws/a", &format!("{json}Content-Length: 1\r\n")), 400),
        (request("/ws/a", &format!("{json}X-Forwarded-For: 192.0.2.7\r\n")), 400),
    ] {
        assert_eq!(status(bytes.as_bytes()), expected, "{bytes}");
    }
}
