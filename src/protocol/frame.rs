//! The JSON that clients send and get, and the frames that are the same for many.

use std::borrow::Cow;

use bytes::{BufMut, Bytes, BytesMut};
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::protocol::event::{EventId, is_user_id, text_frame};
use crate::protocol::json;
use crate::protocol::json::explain::{self, Known};

/// Longest `ref` of a client's frame, as JSON text, in bytes: it is kept while the publish is under
/// way.
const REFERENCE_MAX: usize = 128;

/// A ping without payload (RFC 6455 section 5.5.2).
pub const PING: Bytes = Bytes::from_static(&[0x89, 0]);

/// Longest reason of a close frame, in bytes: a control frame has at most 125, two of them the code.
pub const CLOSE_TEXT_MAX: usize = 123;

const CLOSE: u8 = 0x88;
const PONG: u8 = 0x8A;

/// Appends the answer to a ping (RFC 6455 section 5.5.3).
pub fn put_pong(frames: &mut Vec<u8>, payload: &[u8]) {
    debug_assert!(payload.len() <= 125, "a ping has no more");
    frames.extend([PONG, payload.len() as u8]);
    frames.extend(payload);
}

/// The answer to a close frame.
pub fn close_answer(code: Option<u16>) -> Bytes {
    code.map_or(Bytes::from_static(&[CLOSE, 0]), |code| close(code, ""))
}

/// A close frame (RFC 6455 section 5.5.1).
pub fn close(code: u16, reason: &str) -> Bytes {
    debug_assert!(reason.len() <= CLOSE_TEXT_MAX);
    let mut frame = BytesMut::with_capacity(4 + reason.len());
    frame.put_u8(CLOSE);
    frame.put_u8(2 + reason.len() as u8);
    frame.put_u16(code);
    frame.put_slice(reason.as_bytes());
    frame.freeze()
}

/// The event of a plain client's text, without id.
pub fn chat_event(sender: &str, text: &str) -> Bytes {
    Event::by(sender, None).with_text(text)
}

/// An event as clients get it: `event` is a JSON object, and `id` becomes its last member.
pub fn with_id(event: &[u8], id: EventId) -> Vec<u8> {
    let open = event.strip_suffix(b"}").expect("an event is a JSON object");
    let mut text = Vec::with_capacity(event.len() + 24);
    text.extend_from_slice(open);
    text.extend_from_slice(if open == b"{" { br#""id":"# } else { br#","id":"# });
    text.extend_from_slice(id.to_string().as_bytes());
    text.push(b'}');
    text
}

/// Builds an event member by member.
struct Event(Vec<u8>);

impl Event {
    fn by(sender: &str, to: Option<&str>) -> Event {
        let mut event = Event(Vec::with_capacity(64));
        event.0.extend_from_slice(br#"{"sender":"#);
        event.put_string(sender);
        if let Some(to) = to {
            event.0.extend_from_slice(br#","to":"#);
            event.put_string(to);
        }
        event
    }

    fn with_text(mut self, text: &str) -> Bytes {
        self.0.extend_from_slice(br#","text":"#);
        self.put_string(text);
        self.0.push(b'}');
        self.0.into()
    }

    fn with_data(mut self, data: &str) -> Bytes {
        self.0.extend_from_slice(br#","data":"#);
        put_on_one_line(&mut self.0, data);
        self.0.push(b'}');
        self.0.into()
    }

    fn put_string(&mut self, text: &str) {
        serde_json::to_writer(&mut self.0, text)
            .expect("a string is always JSON, and memory takes every write");
    }
}

/// Appends a JSON text with spaces for line breaks. Strings can't hold line breaks (RFC 8259
/// section 7), so the value stays the same.
pub fn put_on_one_line(out: &mut Vec<u8>, json: &str) {
    out.extend(json.bytes().map(|byte| if matches!(byte, b'\n' | b'\r') { b' ' } else { byte }));
}

/// A valid frame from a JSON mode client.
#[derive(Debug, PartialEq, Eq)]
pub enum ClientFrame {
    Publish(ClientPublish),
    /// Answered with a ping that carries the client's position.
    Ping,
}

#[derive(Debug, PartialEq, Eq)]
pub struct ClientPublish {
    /// The event, without id.
    pub event: Bytes,
    /// The only user it is for.
    pub to: Option<String>,
    /// The client's `ref`, which the answer repeats, as JSON text.
    pub reference: Option<Box<str>>,
}

/// An invalid frame from a JSON mode client.
#[derive(Debug, PartialEq, Eq)]
pub struct BadFrame {
    pub message: Cow<'static, str>,
    /// The client's `ref`, if it could be parsed.
    pub reference: Option<Box<str>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Members<'a> {
    #[serde(borrow, default, rename = "type")]
    kind: Option<Cow<'a, str>>,
    #[serde(borrow, default, deserialize_with = "given")]
    text: Option<Cow<'a, str>>,
    #[serde(borrow, default, deserialize_with = "given")]
    data: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "given")]
    to: Option<Cow<'a, str>>,
    #[serde(borrow, default, rename = "ref", deserialize_with = "given")]
    reference: Option<&'a RawValue>,
}

/// The same members, to explain what is wrong with a frame.
const KNOWN: [Known; 5] = [
    Known { key: "text", is_string: true },
    Known { key: "data", is_string: false },
    Known { key: "to", is_string: true },
    Known { key: "ref", is_string: false },
    Known { key: "type", is_string: true },
];

/// The `ref` of an invalid frame.
#[derive(Deserialize)]
struct Reference<'a> {
    #[serde(borrow, default, rename = "ref", deserialize_with = "given")]
    reference: Option<&'a RawValue>,
}

/// Treats `null` as a value, which `Option` alone would treat as absent: a message with `"to":null`
/// must not go to all subscribers.
pub fn given<'de, D: serde::Deserializer<'de>, T: Deserialize<'de>>(
    deserializer: D,
) -> Result<Option<T>, D::Error> {
    T::deserialize(deserializer).map(Some)
}

/// Parses a frame from a JSON mode client: `{"text":…}` or `{"data":…}`, optionally with `to` and
/// `ref`, or `{"type":"ping"}`.
pub fn parse_client_frame(sender: &str, text: &str) -> Result<ClientFrame, BadFrame> {
    let bad = |message: &'static str, reference| Err(BadFrame { message: message.into(), reference });
    let invalid = |what, error: json::BadJson, reference| {
        Err(BadFrame { message: format!("invalid {what}: {error}").into(), reference })
    };
    // serde takes an array, too, with the members in their order.
    let members = serde_json::from_str(text).ok().filter(|_| explain::is_object(text));
    let Some(members): Option<Members<'_>> = members else {
        let reference = reference_in(text);
        if let Err(error) = json::check(text.as_bytes(), json::DEPTH_MAX) {
            return invalid("frame", error, reference);
        }
        let message =
            explain::fault(text, &KNOWN).map_or(r#"give either "text" or "data""#.into(), Cow::from);
        return Err(BadFrame { message, reference });
    };
    let reference = match members.reference {
        None => None,
        Some(given) => match valid_reference(given.get()) {
            Some(reference) => Some(reference),
            None => return bad(r#""ref" must be a number or a string of at most 128 bytes"#, None),
        },
    };
    let is_empty = members.text.is_none() && members.data.is_none() && members.to.is_none();
    match members.kind.as_deref() {
        None => {}
        Some("ping") if is_empty => return Ok(ClientFrame::Ping),
        Some(_) => return bad(r#"the only "type" to send is "ping", with nothing else"#, reference),
    }
    let to = members.to.map(Cow::into_owned);
    if to.as_deref().is_some_and(|to| !is_user_id(to)) {
        return bad(r#""to" must be a user id: 1 to 128 bytes, no control characters"#, reference);
    }
    let event = Event::by(sender, to.as_deref());
    let event = match (members.text, members.data) {
        (Some(text), None) => event.with_text(&text),
        (None, Some(data)) => match json::check(data.get().as_bytes(), json::DEPTH_MAX - 1) {
            Ok(()) => event.with_data(data.get()),
            Err(error) => return invalid(r#""data""#, error, reference),
        },
        _ => return bad(r#"give either "text" or "data""#, reference),
    };
    Ok(ClientFrame::Publish(ClientPublish { event, to, reference }))
}

/// The `ref` of a frame that is rejected, valid or not.
pub fn reference_in(text: &str) -> Option<Box<str>> {
    let found: Reference<'_> = serde_json::from_str(text).ok().filter(|_| explain::is_object(text))?;
    valid_reference(found.reference?.get())
}

fn valid_reference(text: &str) -> Option<Box<str>> {
    let scalar =
        text.starts_with('"') || text.starts_with('-') || text.starts_with(|c: char| c.is_ascii_digit());
    let valid = scalar && text.len() <= REFERENCE_MAX && json::check(text.as_bytes(), 0).is_ok();
    valid.then(|| text.into())
}

/// The first frame for a client that asked for recovery frames.
pub fn welcome(last: EventId, head: EventId, recovered: bool) -> Bytes {
    let json = format!(r#"{{"type":"welcome","lastEventId":{last},"head":{head},"recovered":{recovered}}}"#);
    text_frame(json.as_bytes())
}

/// The answer to a published frame with `ref`.
pub fn ack(reference: &str, id: EventId) -> Bytes {
    text_frame(format!(r#"{{"type":"ack","ref":{reference},"id":{id}}}"#).as_bytes())
}

/// A ping that scripts can see, with the client's position if it asked for recovery frames.
pub fn json_ping(position: Option<EventId>) -> Bytes {
    match position {
        Some(position) => text_frame(format!(r#"{{"type":"ping","lastEventId":{position}}}"#).as_bytes()),
        None => text_frame(br#"{"type":"ping"}"#),
    }
}

/// The text of an error frame with the code [`ErrorCode::Unavailable`].
pub const NOT_PUBLISHED: &str = "not published: try again later";

/// Why a client's message was not published: the code in the error frame, and a metric label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorCode {
    /// Not a valid frame.
    Invalid,
    /// This client may not publish that.
    Forbidden,
    /// Over `--max-message-rate` or `--max-byte-rate`.
    RateLimited,
    /// Certainly not published: the bus is unavailable, or rejects the event.
    Unavailable,
    /// It may or may not have been published.
    Unknown,
}

impl ErrorCode {
    pub const ALL: [ErrorCode; 5] = [
        ErrorCode::Invalid,
        ErrorCode::Forbidden,
        ErrorCode::RateLimited,
        ErrorCode::Unavailable,
        ErrorCode::Unknown,
    ];

    pub fn text(self) -> &'static str {
        match self {
            ErrorCode::Invalid => "invalid",
            ErrorCode::Forbidden => "forbidden",
            ErrorCode::RateLimited => "rate_limited",
            ErrorCode::Unavailable => "unavailable",
            ErrorCode::Unknown => "unknown",
        }
    }
}

/// The answer to a message that was not published.
pub fn error(code: ErrorCode, message: &str, reference: Option<&str>) -> Bytes {
    let code = code.text();
    let message = serde_json::Value::from(message);
    let json = match reference {
        Some(reference) => {
            format!(r#"{{"type":"error","code":"{code}","message":{message},"ref":{reference}}}"#)
        }
        None => format!(r#"{{"type":"error","code":"{code}","message":{message}}}"#),
    };
    text_frame(json.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn publish(text: &str) -> ClientPublish {
        match parse_client_frame("alice", text).unwrap() {
            ClientFrame::Publish(publish) => publish,
            ClientFrame::Ping => panic!("{text} is a ping"),
        }
    }

    fn event(text: &str) -> String {
        String::from_utf8(publish(text).event.to_vec()).unwrap()
    }

    #[test]
    fn client_frames_become_events() {
        assert_eq!(chat_event("a\"b", "hi\n\u{1}"), r#"{"sender":"a\"b","text":"hi\n\u0001"}"#);
        assert_eq!(event(r#"{"text":"hi"}"#), r#"{"sender":"alice","text":"hi"}"#);
        assert_eq!(event(r#"{"text":"psst","to":"bob"}"#), r#"{"sender":"alice","to":"bob","text":"psst"}"#);
        assert_eq!(event("{\"data\":{\"a\":\n1.50}}"), r#"{"sender":"alice","data":{"a": 1.50}}"#);
        assert_eq!(event(r#"{"data":null}"#), r#"{"sender":"alice","data":null}"#);
        assert_eq!(publish(r#"{"ref":"x","text":""}"#).reference.as_deref(), Some(r#""x""#));
        assert_eq!(parse_client_frame("alice", r#"{"type":"ping"}"#), Ok(ClientFrame::Ping));
    }

    #[test]
    fn rejects_invalid_frames_with_their_ref() {
        let rejected = |text| parse_client_frame("alice", text).unwrap_err();
        assert_eq!(rejected(r#"{"ref":7}"#).reference.as_deref(), Some("7"));
        assert_eq!(rejected(r#"{"ref":7,"txt":"hi"}"#).reference.as_deref(), Some("7"));
        assert_eq!(rejected(r#"{"ref":7,"text":3}"#).reference.as_deref(), Some("7"));
        assert_eq!(rejected(r#"{"ref":7,"text":"a","data":1}"#).reference.as_deref(), Some("7"));
        assert_eq!(rejected(r#"{"ref":7,"text":"a","type":"ping"}"#).reference.as_deref(), Some("7"));
        assert_eq!(rejected(r#"{"ref":7,"type":"reset"}"#).reference.as_deref(), Some("7"));
        for text in [
            "",
            "hi",
            "[]",
            r#"{"text":"#,
            r#"{"text":"a","ref":[1]}"#,
            r#"{"text":"a","to":""}"#,
            r#"{"text":"a","to":null}"#,
        ] {
            assert_eq!(rejected(text).reference, None, "{text}");
        }
        let long = format!(r#"{{"text":"a","ref":"{}"}}"#, "x".repeat(REFERENCE_MAX));
        assert!(parse_client_frame("alice", &long).is_err());
        for (text, message) in [
            (r#"{"ref":7,"txt":"hi"}"#, r#"unknown key "txt": did you mean "text"?"#),
            (r#"{"text":"hi","chan":"a"}"#, r#"unknown key "chan": the keys are text, data, to, ref, type"#),
            (r#"{"text":"a","to":null}"#, r#""to" must be a string"#),
            (r#"{"type":5}"#, r#""type" must be a string"#),
            (r#"[null,"hi"]"#, "send a JSON object: this is an array"),
            (r#"["ping"]"#, "send a JSON object: this is an array"),
        ] {
            assert_eq!(rejected(text).message, message, "{text}");
        }
        assert_eq!(reference_in("[7]"), None);
    }

    #[test]
    fn data_and_refs_follow_the_json_rule() {
        for case in json::cases::cases() {
            let Ok(value) = std::str::from_utf8(&case.value) else { continue }; // the decoder closes with 1007
            let result = parse_client_frame("alice", &format!("{{\"ref\":7,\"data\":{value}}}"));
            match case.error() {
                None => {
                    let Ok(ClientFrame::Publish(publish)) = result else { panic!("{}", case.name()) };
                    assert_eq!(json::check(&publish.event, json::DEPTH_MAX), Ok(()), "{}", case.name());
                }
                Some(words) => {
                    let bad = result.expect_err(&case.name());
                    assert!(bad.message.contains(words), "{}: {}", case.name(), bad.message);
                }
            }
        }
        let rejected = |text| parse_client_frame("alice", text).unwrap_err();
        for text in [r#"{"text":"a","ref":1e999}"#, r#"{"text":"a","ref":"\ud800"}"#] {
            assert!(rejected(text).message.contains("ref"), "{text}");
        }
        let lone = rejected(r#"{"ref":7,"text":"\ud800"}"#);
        assert_eq!(lone.message, "invalid frame: a \\u escape is half of a surrogate pair, at byte 17");
        assert_eq!(lone.reference.as_deref(), Some("7"));
        let twice = rejected(r#"{"ref":7,"data":1,"data":2}"#);
        assert_eq!(twice.message, "invalid frame: an object has two members of the same name, at byte 27");
        assert_eq!(twice.reference.as_deref(), Some("7"));
    }

    #[test]
    fn control_frames_are_json() {
        for frame in [
            welcome(EventId(1), EventId(2), true),
            ack("\"r\"", EventId(3)),
            json_ping(None),
            json_ping(Some(EventId(4))),
            error(ErrorCode::Invalid, "a \"quote\"", Some("7")),
            error(ErrorCode::Invalid, "x", None),
        ] {
            assert_eq!(frame[0], 0x81);
            let text = if frame[1] == 126 { &frame[4..] } else { &frame[2..] };
            serde_json::from_slice::<serde_json::Value>(text).unwrap();
        }
    }
}
