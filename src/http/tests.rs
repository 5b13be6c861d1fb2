use std::borrow::Cow;

use super::request::{HEADER_COUNT_MAX, HEADERS_MAX, REQUEST_LINE_MAX};
use super::*;

const HOST: &str = "Host: a\r\n";

fn head(text: &str) -> Head<'_> {
    let (head, length) = parse(text.as_bytes()).unwrap().expect("a whole head");
    assert_eq!(length, text.len());
    head
}

fn rejected(bytes: &[u8]) -> u16 {
    parse(bytes).map(|parsed| parsed.is_some()).expect_err("a rejection").status
}

#[test]
fn reads_an_upgrade_request_cut_anywhere() {
    let text = "GET /ws/al%20ice?channel=a&lastEventId= HTTP/1.1\r\nHost: localhost:8080\r\n\
        Connection: keep-alive, Upgrade\r\nUpgrade: WebSocket\r\nSec-WebSocket-Key: x\r\n\r\n";
    let all = format!("{text}rest");
    for cut in 0..text.len() {
        assert!(parse(&text.as_bytes()[..cut]).unwrap().is_none(), "cut at {cut}");
    }
    let (head, length) = parse(all.as_bytes()).unwrap().unwrap();
    assert_eq!(length, text.len());
    assert_eq!((head.method, head.path), ("GET", "/ws/al%20ice"));
    assert_eq!(head.query, "channel=a&lastEventId=");
    assert_eq!(head.header("HOST"), Some("localhost:8080"));
    assert!(head.has_token("connection", "upgrade") && head.has_token("upgrade", "websocket"));
    assert!(head.keep_alive());
    assert_eq!(head.headers().count(), 4);
}

#[test]
fn rejects_requests_that_are_not_strict_http() {
    let cases: &[(&[u8], u16)] = &[
        (b"\x16\x03\x01\x02\x00\x01", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"\x00", 400),
        (b"\r\n\r\n", 400),
        (b"hello there\r\n\r\n", 400),
        (b"GET /\r\n\r\n", 400),
        (b"GET / HTTP/1.1\nHost: a\n\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\rb\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nhost: a\r\n\r\n", 400),
        (b"GET / HTTP/1.0\r\nHost: a\r\nhost: a\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a, b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost : a\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\n folded: b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: a\0b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nno colon\r\n\r\n", 400),
        (b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        ("GET /ü HTTP/1.1\r\nHost: a\r\n\r\n".as_bytes(), 400),
        (b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET /#a HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET a HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", 505),
        (b"GET / HTTP/0.9\r\nHost: a\r\n\r\n", 505),
    ];
    for (bytes, status) in cases {
        assert_eq!(rejected(bytes), *status, "{}", bytes.escape_ascii());
    }
}

#[test]
fn limits_the_head_before_it_is_complete() {
    let target = |length: usize| "a".repeat(length - "GET / HTTP/1.1\r\n".len());
    let line = format!("GET /{} HTTP/1.1\r\n{HOST}\r\n", target(REQUEST_LINE_MAX));
    assert_eq!(head(&line).path.len(), REQUEST_LINE_MAX - 15);
    assert_eq!(rejected(format!("GET /{} HTTP/1.1\r\n", target(REQUEST_LINE_MAX + 1)).as_bytes()), 414);
    assert_eq!(rejected("G".repeat(REQUEST_LINE_MAX + 1).as_bytes()), 414);

    let filler = HEADERS_MAX - HOST.len() - "X: \r\n\r\n".len();
    let longest = format!("GET / HTTP/1.1\r\n{HOST}X: {}\r\n\r\n", "a".repeat(filler));
    assert_eq!(head(&longest).count("x"), 1);
    let longer = format!("GET / HTTP/1.1\r\n{HOST}X: {}\r\n\r\n", "a".repeat(filler + 1));
    assert_eq!(rejected(longer.as_bytes()), 431);
    assert_eq!(rejected(format!("GET / HTTP/1.1\r\n{}", "a".repeat(HEADERS_MAX + 1)).as_bytes()), 431);

    let most = format!("GET / HTTP/1.1\r\n{HOST}{}\r\n", "X: a\r\n".repeat(HEADER_COUNT_MAX - 1));
    assert_eq!(head(&most).count("X"), HEADER_COUNT_MAX - 1);
    let more = format!("GET / HTTP/1.1\r\n{HOST}{}", "X: a\r\n".repeat(HEADER_COUNT_MAX));
    assert_eq!(rejected(more.as_bytes()), 431);
}

#[test]
fn accepts_every_form_of_target() {
    for (line, path, query) in [
        ("GET /a/b?c=d?e HTTP/1.1", "/a/b", "c=d?e"),
        ("GET http://a/b?c HTTP/1.1", "/b", "c"),
        ("GET HTTP://a?c HTTP/1.1", "/", "c"),
        ("GET http://a HTTP/1.1", "/", ""),
        ("GET //a?b://c HTTP/1.1", "//a", "b://c"),
        ("OPTIONS * HTTP/1.1", "*", ""),
    ] {
        let text = format!("{line}\r\n{HOST}\r\n");
        assert_eq!((head(&text).path, head(&text).query), (path, query), "{line}");
    }
    assert_eq!(parse(b"\r\nGET / HTTP/1.0\r\n\r\n").unwrap().unwrap().1, 20);
}

#[test]
fn reads_body_length_and_keep_alive() {
    let body = |headers: &str| {
        let text = format!("POST / HTTP/1.1\r\n{HOST}{headers}\r\n");
        head(&text).body_length().map_err(|rejection| rejection.status)
    };
    assert_eq!(body(""), Ok(BodyLength::Empty));
    assert_eq!(body("Content-Length: 0\r\n"), Ok(BodyLength::Empty));
    assert_eq!(body("Content-Length: 12\r\nContent-Length: 12\r\n"), Ok(BodyLength::Known(12)));
    assert_eq!(body("Transfer-Encoding: Chunked\r\n"), Ok(BodyLength::Chunked));
    assert_eq!(body("Content-Length: 12\r\nContent-Length: 13\r\n"), Err(400));
    for wrong in ["+1", "-1", "", "1, 1", "0x1", "99999999999999999999"] {
        assert_eq!(body(&format!("Content-Length: {wrong}\r\n")), Err(400), "{wrong}");
    }
    assert_eq!(body("Transfer-Encoding: chunked\r\nContent-Length: 1\r\n"), Err(400));
    assert_eq!(body("Transfer-Encoding: gzip, chunked\r\n"), Err(501));

    let stays = |version: &str, headers: &str| {
        head(&format!("GET / HTTP/{version}\r\n{HOST}{headers}\r\n")).keep_alive()
    };
    assert!(stays("1.1", "") && !stays("1.1", "Connection: x, Close\r\n"));
    assert!(!stays("1.0", "") && stays("1.0", "Connection: keep-alive\r\n"));
}

#[test]
fn decodes_paths_and_queries() {
    assert_eq!(percent_decode("al%20ice%2F%c3%BC+").as_deref(), Some("al ice/ü+"));
    for wrong in ["%", "%2", "%zz", "%+1", "%ff", "%c3", "%%41", "a%4", "%4g", "%4%41", "%ü0"] {
        assert_eq!(percent_decode(wrong), None, "{wrong}");
        assert_eq!(query_value(&format!("a={wrong}"), "a").unwrap_err().status, 400, "{wrong}");
    }
    let query = "a=1&b=&c&a=2&d=x+y%2Bz&%65=5&f=%ff&g=%00&h=a=b";
    let value = |name| query_value(query, name).map(|value| value.map(Cow::into_owned));
    assert_eq!(value("a").unwrap().as_deref(), Some("1"));
    assert_eq!(value("b").unwrap().as_deref(), Some(""));
    assert_eq!(value("c").unwrap().as_deref(), Some(""));
    assert_eq!(value("d").unwrap().as_deref(), Some("x y+z"));
    assert_eq!(value("e").unwrap().as_deref(), Some("5"));
    assert_eq!(value("g").unwrap().as_deref(), Some("\0"));
    assert_eq!(value("h").unwrap().as_deref(), Some("a=b"));
    assert_eq!(value("i").unwrap(), None);
    assert_eq!(value("f").unwrap_err().status, 400);
    assert_eq!(percent_decode("").as_deref(), Some(""));
}

#[test]
fn finds_mistyped_query_parameters() {
    let known = ["channel", "lastEventId", "history", "token"];
    let aliases = [("eventId", "lastEventId")];
    let text =
        |query| mistyped(query, &known, &aliases).map(|mistyped| mistyped.rejection().text.into_owned());
    for (query, given, meant) in [
        ("chanel=a", "chanel", "channel"),
        ("channel=a&Channel=b", "Channel", "channel"),
        ("lastEventID=5", "lastEventID", "lastEventId"),
        ("last_event_id=5", "last_event_id", "lastEventId"),
        ("lasteventid", "lasteventid", "lastEventId"),
        ("last-event-id=", "last-event-id", "lastEventId"),
        ("event_id=5", "event_id", "lastEventId"),
        ("token_id=1&tokens=a", "tokens", "token"),
        ("utm_source=a&t%6Fkn=b", "tokn", "token"),
        ("chann%0Ael=a", "chann\\nel", "channel"),
    ] {
        let expected = format!("unknown query parameter \"{given}\": did you mean {meant}?");
        assert_eq!(text(query), Some(expected), "{query}");
    }
    let far = "x&".repeat(32) + "chanel=a";
    for query in [
        "",
        "&&",
        "=channel",
        "channel=chanel&lastEventId=&token",
        "ch%61nnel=a",
        "%ff=a&%=b&%e4channel",
        "utm_source=a&utm_medium=b&utm_campaign=c&utm_term=d&utm_content=e&gclid=1&fbclid=2",
        "_=1764000000&t=1&ts=2&v=3&cb=4&nocache&rnd=5&cachebust=6",
        "story=1&victory=2&change=3&chance=4&taken=5&events=6&eventIds=7&last=8",
        "token_type=a&tokenType=b&channel_id=c&channel_name=d&history_id=e",
        "EIO=4&transport=websocket&sid=a&ref=b&lang=en&theme=dark&open=1&user=c&client=d&session=e",
        &far,
    ] {
        assert_eq!(text(query), None, "{query}");
    }
}

#[test]
fn quoted_text_can_not_break_a_response() {
    let request = format!("HEAD / HTTP/1.1\r\n{HOST}\r\n");
    let response = Response::line(404, "no a\r\nSet-Cookie: b here").with("X", "a\r\nb");
    let text = String::from_utf8(response.to_bytes(false).to_vec()).unwrap();
    assert_eq!(
        text,
        "HTTP/1.1 404 Not Found\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: 25\r\n\
         Connection: close\r\nX: a  b\r\n\r\nno a  Set-Cookie: b here\n"
    );
    let bytes = response.answering(&head(&request)).to_bytes(true);
    let text = std::str::from_utf8(&bytes).unwrap();
    assert!(text.ends_with("\r\n\r\n") && text.contains("Content-Length: 25\r\n"), "{text}");
    assert!(text.contains("Connection: keep-alive\r\n"));
    let empty = Response::new(304, "text/html", "x").with("ETag", "\"a\"").to_bytes(false);
    assert_eq!(&empty[..], b"HTTP/1.1 304 Not Modified\r\nConnection: close\r\nETag: \"a\"\r\n\r\n");
    let long = Response::line(413, "too long").to_bytes(false);
    assert!(long.starts_with(b"HTTP/1.1 413 Content Too Large\r\n"), "as in RFC 9110 section 15.5.14");
    let rejection = Rejection::new(405, "no").with("Allow", "GET");
    let text = Response::from(rejection).to_bytes(false);
    assert!(text.windows(12).any(|window| window == b"Allow: GET\r\n"));
}

proptest::proptest! {
    #[test]
    fn reads_only_the_head(bytes: Vec<u8>, tail in "[ -~\r\n]{0,200}") {
        let mut all = b"GET / HTTP/1.1\r\n".to_vec();
        all.extend_from_slice(tail.as_bytes());
        all.extend_from_slice(&bytes);
        let _ = parse(&bytes);
        if let Ok(Some((_, length))) = parse(&all) {
            proptest::prop_assert!(all[..length].ends_with(b"\r\n\r\n"));
            // The same head is found whatever follows it.
            proptest::prop_assert_eq!(parse(&all[..length]).unwrap().unwrap().1, length);
        }
    }
}
