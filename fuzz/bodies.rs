//! The bodies of the fuzz targets: assertions that hold for any bytes. `tests/units/fuzz_corpus.rs`
//! runs every seed through them with a stable compiler.

use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use fanfare::auth::keys::KeyRing;
use fanfare::bus::redis::{decode, parse_page, parse_publish};
use fanfare::config::{Action, Settings};
use fanfare::http::{self, Response};
use fanfare::limits::connections::ConnectionLimits;
use fanfare::protocol::client_frame::{self, ClientFrame};
use fanfare::protocol::close::{CloseReason, rejection_code};
use fanfare::protocol::event::{ChannelName, Entry, EventId, is_user_id};
use fanfare::protocol::frame::{self, Regarding};
use fanfare::protocol::{form, ingest, json};
use fanfare::ws::decoder::{self, Incoming, Limits, MESSAGES_AT_ONCE};
use fanfare::ws::handshake::{self, HandshakeContext, HandshakeOutcome};
use fred::types::Resp3Frame;
use serde_json::Value;

/// The key of the tokens in the seeds of requests.
const KEY: &str = "0123456789abcdef0123456789abcdef";

/// The most bytes kept of a connection before its request: the longest PROXY header without an
/// address, and a piece.
const PREAMBLE_MAX: usize = 16 + 4096 + 256;

/// Reads a byte that selects how the rest is interpreted.
fn choice<'a>(data: &mut &'a [u8]) -> u8 {
    let all: &'a [u8] = data;
    let Some((first, rest)) = all.split_first() else { return 0 };
    *data = rest;
    *first
}

// ---- requests ----

fn context(with_tokens: bool) -> &'static HandshakeContext {
    static CONTEXTS: OnceLock<[HandshakeContext; 2]> = OnceLock::new();
    let contexts = CONTEXTS.get_or_init(|| {
        let file = std::env::temp_dir().join(format!("fanfare-fuzz-{}.key", std::process::id()));
        std::fs::write(&file, KEY).expect("there is room for a key");
        let key = format!("--jwt-key={}", file.display());
        let contexts = [&[][..], &[key.as_str()]].map(|flags| {
            let flags = [&["--trusted-proxy=10.0.0.0/8"], flags].concat();
            let Ok(Action::Run(settings)) = Settings::from(flags.iter().map(|flag| flag.into()), []) else {
                panic!("these settings are good")
            };
            let keys = Arc::new(KeyRing::load(&settings).expect("the key is there"));
            let limits = Arc::new(ConnectionLimits::new(&settings));
            HandshakeContext {
                settings: Arc::new(settings),
                readiness: Arc::default(),
                keys,
                limits,
                loopback: Arc::default(),
            }
        });
        let _ = std::fs::remove_file(file);
        contexts
    });
    &contexts[usize::from(with_tokens)]
}

/// The outcome for a connection from this peer whose bytes arrive in these pieces, processed as a
/// shard does.
fn decide<'a>(
    pieces: impl Iterator<Item = &'a [u8]>,
    context: &HandshakeContext,
    peer: [u8; 4],
) -> HandshakeOutcome {
    let mut connection_slot = context.limits.acquire(peer.into()).expect("there is room for one");
    let mut kept = Vec::new();
    let mut outcome = HandshakeOutcome::Incomplete(0);
    for piece in pieces {
        kept.extend_from_slice(piece);
        (outcome, connection_slot) = handshake::decide(&kept, context, connection_slot, &|| false);
        match &outcome {
            HandshakeOutcome::Incomplete(read) => drop(kept.drain(..*read)),
            _ => break,
        }
        assert!(kept.len() <= http::HEAD_MAX + PREAMBLE_MAX, "{} bytes are kept of a request", kept.len());
    }
    context.limits.release(connection_slot, "");
    outcome
}

/// A response is complete and well formed, whatever part of the request it repeats. Returns its
/// status.
fn check_response(bytes: &[u8]) -> u16 {
    let mut headers = [httparse::EMPTY_HEADER; 16];
    let mut response = httparse::Response::new(&mut headers);
    let head = response.parse(bytes).expect("a response").unwrap();
    let value = |name: &str| {
        let found = response.headers.iter().find(|header| header.name.eq_ignore_ascii_case(name));
        found.map(|header| std::str::from_utf8(header.value).expect("ASCII"))
    };
    let status = response.code.expect("a status");
    if status != 101 {
        assert_eq!(value("connection"), Some("close"));
        let length: usize = value("content-length").expect("a length").parse().expect("a number");
        assert!(
            [0, length].contains(&(bytes.len() - head)),
            "the body is as long as said, or left out (HEAD)"
        );
    }
    status
}

/// The head of a request, with what a proxy may put before it. The first byte selects whether
/// tokens are required and whether the peer is a trusted proxy, the second the size of the pieces.
pub fn request(mut data: &[u8]) {
    let flags = choice(&mut data);
    let size = usize::from(choice(&mut data)) + 1;
    let (context, peer) =
        (context(flags & 1 > 0), if flags & 2 > 0 { [10, 0, 0, 1] } else { [192, 0, 2, 1] });
    let whole = decide(std::iter::once(data), context, peer);
    let split = decide(data.chunks(size), context, peer);
    for outcome in [&whole, &split] {
        match outcome {
            HandshakeOutcome::Incomplete(_) => {
                assert!(data.len() <= http::HEAD_MAX + PREAMBLE_MAX, "it goes on for ever")
            }
            HandshakeOutcome::Respond(response) => drop(check_response(&response.to_bytes(false))),
            HandshakeOutcome::Reject(rejection) => {
                assert!(check_response(&Response::from(rejection).to_bytes(false)) >= 400);
            }
            HandshakeOutcome::RejectUpgraded(rejection, bytes) => {
                assert_eq!(check_response(bytes), 101);
                let head = bytes.windows(4).position(|end| end == b"\r\n\r\n").expect("a head") + 4;
                let [0x88, length, code @ ..] = &bytes[head..] else { panic!("no close frame") };
                assert!(usize::from(*length) == code.len() && (2..=125).contains(&code.len()));
                let text = std::str::from_utf8(&code[2..]).expect("a reason in UTF-8");
                assert!(
                    rejection_code(rejection.status, rejection.reason).is_some()
                        && rejection.text.starts_with(text)
                );
            }
            HandshakeOutcome::Join(join) => {
                assert!(
                    is_user_id(&join.client.user)
                        && join
                            .channel
                            .as_ref()
                            .is_none_or(|name| ChannelName::parse(name.as_str()).is_some())
                );
                assert_eq!(check_response(&join.response), 101);
            }
        }
    }
    match (&whole, &split) {
        (HandshakeOutcome::Join(whole), HandshakeOutcome::Join(split)) => {
            assert_eq!((&whole.client.user, &whole.channel), (&split.client.user, &split.channel));
            assert_eq!((whole.last_seen, whole.client.mode), (split.last_seen, split.client.mode));
        }
        (HandshakeOutcome::Join(_), other) => panic!("good whole, and in pieces {other:?}"),
        (HandshakeOutcome::Incomplete(_), other) => {
            assert!(matches!(other, HandshakeOutcome::Incomplete(_)), "{other:?}")
        }
        (_, HandshakeOutcome::Incomplete(_)) => panic!("whole {whole:?}, and waited for in pieces"),
        // In pieces, what follows a valid request is not known yet.
        _ => {}
    }
}

// ---- frames ----

/// Decodes a client's bytes in pieces of this size, as a shard does.
fn read(data: &[u8], size: usize, limits: Limits) -> (Result<(), CloseReason>, Vec<Incoming>) {
    let (mut partial, mut messages, mut rest) = (None, Vec::new(), Vec::new());
    for piece in data.chunks(size) {
        rest.extend_from_slice(piece);
        loop {
            let mut some = Vec::new();
            let read = decoder::read(&mut partial, &mut rest, limits, &mut some);
            let more = some.len() == MESSAGES_AT_ONCE;
            assert!(some.len() <= MESSAGES_AT_ONCE);
            messages.append(&mut some);
            match read {
                Ok(read) => drop(rest.drain(..read)),
                Err(reason) => return (Err(reason), messages),
            }
            if matches!(messages.last(), Some(Incoming::Close(_))) {
                return (Ok(()), messages);
            }
            if !more {
                break;
            }
        }
        assert!(rest.len() <= 130, "{} bytes are kept between two reads", rest.len());
    }
    (Ok(()), messages)
}

/// Frames of a client. The first byte selects whether binary is accepted, and whether the rest is
/// raw bytes or a list of frames to be masked (first byte, length, payload); the second selects the
/// size of the pieces.
pub fn frames(mut data: &[u8]) {
    const MASK: [u8; 4] = [0x37, 0xFA, 0x21, 0x3D];
    let flags = choice(&mut data);
    let size = usize::from(choice(&mut data)) + 1;
    let limits = Limits { max_message_size: 1000, binary: flags & 1 > 0 };
    let mut bytes = Vec::new();
    if flags & 2 > 0 {
        bytes.extend_from_slice(data);
    } else {
        while let [first, length, rest @ ..] = data {
            // 253 and 254 use longer encodings than needed, and 255 is too long.
            let length = usize::from(*length);
            let payload = &rest[..length.min(rest.len())];
            bytes.push(*first);
            match length {
                0..=125 => bytes.push(0x80 | payload.len() as u8),
                126..=253 => {
                    bytes.push(0xFE);
                    bytes.extend((payload.len() as u16).to_be_bytes());
                }
                254 => {
                    bytes.push(0xFF);
                    bytes.extend((payload.len() as u64).to_be_bytes());
                }
                _ => {
                    bytes.push(0xFF);
                    bytes.extend((payload.len() as u64 | 1 << 63).to_be_bytes());
                }
            }
            bytes.extend(MASK);
            bytes.extend(payload.iter().zip(MASK.iter().cycle()).map(|(byte, mask)| byte ^ mask));
            data = &rest[payload.len()..];
        }
    }
    let whole = read(&bytes, bytes.len().max(1), limits);
    let split = read(&bytes, size, limits);
    assert_eq!(whole, split);
    for message in &whole.1 {
        match message {
            Incoming::Text(text, _) => assert!(text.len() <= 1000),
            Incoming::Binary(bytes, _) => assert!(limits.binary && bytes.len() <= 1000),
            Incoming::Ping(payload) => assert!(payload.len() <= 125),
            Incoming::Pong | Incoming::Close(_) => {}
        }
    }
}

// ---- messages of Redis and bodies of backends ----

/// An entry holds as many whole text frames as it claims, each one line of UTF-8.
fn check_entry(entry: &Entry) {
    let (mut at, mut frames) = (0, 0);
    while at < entry.bytes.len() {
        assert!(entry.is_boundary(at as u32));
        let [first, length, ..] = entry.bytes[at..] else { panic!("a head") };
        assert_eq!(first, 0x81);
        let (head, length) = match length {
            126 => (4, usize::from(u16::from_be_bytes([entry.bytes[at + 2], entry.bytes[at + 3]]))),
            127 => (10, u64::from_be_bytes(entry.bytes[at + 2..at + 10].try_into().expect("eight")) as usize),
            short => (2, usize::from(short)),
        };
        let text = &entry.bytes[at + head..at + head + length];
        assert!(serde_json::from_slice::<Value>(text).is_ok(), "{}", text.escape_ascii());
        at += head + length;
        frames += 1;
        assert_eq!((entry.frame_end((at - 1) as u32), entry.frames_until(at as u32)), (at as u32, frames));
    }
    assert_eq!((at, frames), (entry.bytes.len(), entry.frames()));
    assert_eq!(entry.before().0 + frames as u64, entry.last.0);
}

/// The named form of an entry has the same positions. Its events begin with the channel, have no
/// other member of that name, and are the same otherwise.
fn check_both_forms(entry: &Entry) {
    check_entry(entry);
    let named = form::named(entry, &ChannelName::parse("room").expect("a name"));
    check_entry(&named);
    assert_eq!((named.frames(), named.before(), named.last), (entry.frames(), entry.before(), entry.last));
    for (given, named) in entry.texts().zip(named.texts()) {
        assert!(named.starts_with(br#"{"channel":"room""#) && json::check(named, json::DEPTH_MAX).is_ok());
        let mut given: Value = serde_json::from_slice(given).expect("it was checked");
        given["channel"] = "room".into();
        assert_eq!(serde_json::from_slice::<Value>(named).expect("it was checked"), given);
    }
}

/// An event is one line with one JSON object. An id can be appended as its last member, and read
/// back.
fn check_event(event: &[u8]) -> Value {
    let text = std::str::from_utf8(event).expect("UTF-8");
    assert!(!text.contains(['\n', '\r']), "{text}");
    let value: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"));
    assert!(text.starts_with('{') && text.ends_with('}'));
    let id = EventId(1_764_000_000_001_045);
    assert_eq!(decode::id_of(&frame::with_id(event, id)), Some(id));
    value
}

/// Data from Redis and backends. The first byte selects the kind.
pub fn bus(mut data: &[u8]) {
    match choice(&mut data) % 8 {
        0 => drop(decode::broadcast(data).inspect(check_both_forms)),
        1 => drop(decode::private(data).inspect(check_both_forms)),
        2 => {
            // A stream: one event per line, private if it starts with a TAB.
            let history: Vec<(Bytes, Option<Arc<str>>)> = data
                .split(|byte| *byte == b'\n')
                .map(|line| match line.strip_prefix(b"\t") {
                    Some(event) => (Bytes::copy_from_slice(event), Some("bob".into())),
                    None => (Bytes::copy_from_slice(line), None),
                })
                .collect();
            let frames = history
                .iter()
                .flat_map(|(event, user)| {
                    [event.clone(), Bytes::from(user.clone().map_or(String::new(), |user| user.to_string()))]
                })
                .map(|data| Resp3Frame::BlobString { data, attributes: None });
            let heads = [1, 9, 2].map(|data| Resp3Frame::Number { data, attributes: None });
            let data = heads.into_iter().chain(frames).collect();
            let mut page = parse_page(&Resp3Frame::Array { data, attributes: None }).expect("that is a page");
            page.entries.iter().for_each(check_both_forms);
            decode::make_consistent(&mut page, EventId(1));
            for pair in page.entries.windows(2) {
                assert_eq!(pair[0].last, pair[1].before());
            }
        }
        kind @ (3 | 4) => {
            let to = (kind == 4).then_some("bob");
            if let Ok(event) = ingest::published(data, to) {
                let value = check_event(&event);
                assert_eq!(value.get("to").and_then(Value::as_str), to);
                assert!(value.get("id").is_none());
            }
        }
        5 => {
            if let Some(ingest::ExternalEvent { event, .. }) = ingest::external(data) {
                assert!(!event.contains(['\n', '\r']), "{event}");
                assert!(serde_json::from_str::<Value>(&event).is_ok(), "{event}");
                assert!(event.starts_with('{') && event.ends_with('}'), "{event}");
                check_entry_raw(&Entry::without_id(EventId(1), event.as_bytes()));
            }
        }
        6 => {
            let Ok(text) = std::str::from_utf8(data) else { return };
            let _ = decode::probe_line(text);
            match client_frame::parse("al\"ice", text, 5) {
                Ok(ClientFrame::Publish(publish)) => drop(check_event(&publish.event)),
                Ok(ClientFrame::Subscribe { channels, .. }) => {
                    assert!((1..=5).contains(&channels.len()));
                    assert!(channels.iter().all(|channel| channel.history <= 100));
                }
                Ok(ClientFrame::Unsubscribe { .. } | ClientFrame::Token { .. } | ClientFrame::Ping) => {}
                Err(bad) => {
                    let regarding = Regarding { channel: None, reference: bad.reference };
                    let error = frame::error(frame::ErrorCode::Invalid, &bad.message, &regarding);
                    assert_eq!(error[0], 0x81);
                }
            }
        }
        _ => {
            // A script's answer: numbers of eight bytes, some of them in other types.
            let data = data
                .chunks(9)
                .map(|item| match item {
                    [0, number @ ..] if number.len() == 8 => Resp3Frame::Number {
                        data: i64::from_be_bytes(number.try_into().expect("eight")),
                        attributes: None,
                    },
                    [1, ..] => Resp3Frame::Null,
                    text => Resp3Frame::BlobString { data: Bytes::copy_from_slice(text), attributes: None },
                })
                .collect();
            let frame = Resp3Frame::Array { data, attributes: None };
            drop((parse_publish(&frame), parse_page(&frame)));
        }
    }
}

fn check_entry_raw(entry: &Entry) {
    assert_eq!((entry.frames(), entry.ids()), (1, 0));
    assert!(entry.is_boundary(entry.bytes.len() as u32));
}
