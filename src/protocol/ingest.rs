//! JSON from backends becomes events: the body of `POST /publish`, and `PUBLISH` of another program.

use std::borrow::Cow;

use bytes::Bytes;

use crate::protocol::event::EventId;
use crate::protocol::frame::put_on_one_line;
use crate::protocol::json::{self, BadJson, DEPTH_MAX, Members};

/// Values of `type` that only the server sends, so no event may have them.
pub const CONTROL_TYPES: [&str; 8] =
    ["welcome", "reset", "ping", "error", "ack", "unsubscribed", "token_expiring", "presence"];

/// Why a body is not an event.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadEvent {
    #[error("invalid event: {0}")]
    Invalid(#[from] BadJson),
    #[error(r#"the key "{0}" is reserved: the bus sets "id", and the query parameter "to" sets "to""#)]
    ReservedKey(&'static str),
    #[error(r#"the type "{0}" is reserved for frames of the server"#)]
    ReservedType(&'static str),
    #[error(r#"the event has no "id""#)]
    NoId,
}

/// The event for a JSON body: one line from `{` to `}`, without `id`. An object keeps its bytes
/// except for line breaks; any other value becomes `{"data":…}`. `to` is the first member.
pub fn published(body: &[u8], to: Option<&str>) -> Result<Bytes, BadEvent> {
    let (json, found) = json_in(body)?;
    let members = match json.strip_prefix('{').and_then(|rest| rest.strip_suffix('}')) {
        Some(members) => {
            if let Some(key) = found.id.then_some("id").or(found.to.then_some("to")) {
                return Err(BadEvent::ReservedKey(key));
            }
            if let Some(control) = control_type(found) {
                return Err(BadEvent::ReservedType(control));
            }
            members.trim_ascii()
        }
        None => json,
    };
    let mut event = Vec::with_capacity(json.len() + 32);
    event.push(b'{');
    if let Some(to) = to {
        event.extend_from_slice(br#""to":"#);
        serde_json::to_writer(&mut event, to).expect("a string is always JSON, and memory takes every write");
        if !members.is_empty() {
            event.push(b',');
        }
    }
    if !json.starts_with('{') {
        event.extend_from_slice(br#""data":"#);
    }
    put_on_one_line(&mut event, members);
    event.push(b'}');
    Ok(event.into())
}

/// The JSON value in `text`, if it is valid as an event or as `data`, and its reserved members.
fn json_in(text: &[u8]) -> Result<(&str, Members<'_>), BadJson> {
    let is_object = text.trim_ascii_start().starts_with(b"{");
    let members = json::members(text, if is_object { DEPTH_MAX } else { DEPTH_MAX - 1 })?;
    Ok((std::str::from_utf8(text).expect("checked").trim_ascii(), members))
}

/// The reserved `type` that these members have.
fn control_type(members: Members<'_>) -> Option<&'static str> {
    let text: Cow<'_, str> = match members.kind? {
        escaped if escaped.contains('\\') => Cow::Owned(serde_json::from_str(escaped).ok()?),
        plain => Cow::Borrowed(plain.strip_prefix('"')?.strip_suffix('"')?),
    };
    CONTROL_TYPES.into_iter().find(|control| *control == text)
}

/// Checks an event from a stream, whose last member is its id. Publishing checks events too, but
/// any program with write access to Redis can write to a stream.
pub fn readable(event: &[u8]) -> Result<(), BadEvent> {
    let members = json::members(event, DEPTH_MAX)?;
    match control_type(members) {
        Some(control) => Err(BadEvent::ReservedType(control)),
        None if !members.id => Err(BadEvent::NoId),
        None => Ok(()),
    }
}

/// The event of `PUBLISH` of another program.
#[derive(Debug)]
pub struct ExternalEvent {
    pub event: String,
    /// Why an object or array became text.
    pub fault: Option<BadJson>,
}

/// Turns another program's `PUBLISH` into an event: an object without `id` and reserved `type`
/// keeps its text, other JSON becomes `{"data":…}`, and text that is not valid JSON for events
/// becomes a string there. `None` for the copies that nodes publish, which start with a TAB.
pub fn external(message: &[u8]) -> Option<ExternalEvent> {
    if message.first() == Some(&b'\t') {
        return None;
    }
    if let Ok((object, members)) = json_in(message)
        && object.starts_with('{')
        && !members.id
        && control_type(members).is_none()
    {
        return Some(ExternalEvent { event: on_one_line(object), fault: None });
    }
    Some(match json::check(message, DEPTH_MAX - 1) {
        Ok(()) => {
            let data = on_one_line(String::from_utf8_lossy(message).trim_ascii());
            ExternalEvent { event: format!(r#"{{"data":{data}}}"#), fault: None }
        }
        Err(bad) => {
            let looks_like_json = matches!(message.trim_ascii_start().first(), Some(b'{' | b'['));
            ExternalEvent { event: text_event(message, None), fault: looks_like_json.then_some(bad) }
        }
    })
}

fn on_one_line(json: &str) -> String {
    json.replace(['\r', '\n'], " ")
}

/// An event with text that is not valid JSON for events: `{"data":"the text"}`, with `id` if given.
pub fn text_event(text: &[u8], id: Option<EventId>) -> String {
    let text = serde_json::Value::from(String::from_utf8_lossy(text));
    match id {
        Some(id) => format!(r#"{{"data":{text},"id":{id}}}"#),
        None => format!(r#"{{"data":{text}}}"#),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn event(body: &str, to: Option<&str>) -> String {
        String::from_utf8(published(body.as_bytes(), to).unwrap().to_vec()).unwrap()
    }

    #[test]
    fn objects_keep_their_bytes_others_are_wrapped() {
        for (body, expected) in [
            (r#"{"sender":"a","text":"hi"}"#, r#"{"sender":"a","text":"hi"}"#),
            (
                r#" {"n":12345678901234567890123, "f":1.50e300} "#,
                r#"{"n":12345678901234567890123, "f":1.50e300}"#,
            ),
            ("{\r\n \"b\": 1,\n \"a\": \"\\n\"\n}\n", r#"{"b": 1,  "a": "\n"}"#),
            ("{}", "{}"),
            ("{ \n}", "{}"),
            (r#"{"a":{"id":1,"to":2,"type":"reset"}}"#, r#"{"a":{"id":1,"to":2,"type":"reset"}}"#),
            (r#"{"type":"chat","Id":1}"#, r#"{"type":"chat","Id":1}"#),
            (r#"{"type":["ping"]}"#, r#"{"type":["ping"]}"#),
            ("[1,\n2]", r#"{"data":[1, 2]}"#),
            (r#""}{""#, r#"{"data":"}{"}"#),
            ("null", r#"{"data":null}"#),
            ("1.50", r#"{"data":1.50}"#),
        ] {
            assert_eq!(event(body, None), expected);
        }
        assert_eq!(event(r#"{"text":"psst"}"#, Some("b\"ob")), r#"{"to":"b\"ob","text":"psst"}"#);
        assert_eq!(event("{ }", Some("bob")), r#"{"to":"bob"}"#);
        assert_eq!(event("7", Some("bob")), r#"{"to":"bob","data":7}"#);
    }

    #[test]
    fn reserved_members_are_found_in_any_spelling() {
        for body in [
            r#"{"id":1}"#,
            r#"{"id":null}"#,
            r#"{"a":1,"id":2,"b":3}"#,
            r#"{"\u0069d":1}"#,
            r#"{"i\u0064":1}"#,
            "{\n\"id\"\n:\n1}",
            r#"{"to":"bob"}"#,
            r#"{"t\u006f":"bob"}"#,
        ] {
            assert!(matches!(published(body.as_bytes(), None), Err(BadEvent::ReservedKey(_))), "{body}");
        }
        for control in CONTROL_TYPES {
            for body in [
                format!(r#"{{"type":"{control}"}}"#),
                format!(r#"{{"typ\u0065":"\u{:04x}{}"}}"#, control.as_bytes()[0], &control[1..]),
            ] {
                let error = published(body.as_bytes(), None).unwrap_err();
                assert_eq!(error, BadEvent::ReservedType(control), "{body}");
            }
        }
    }

    #[test]
    fn stored_events_need_an_id_and_no_control_type() {
        assert_eq!(readable(br#"{"type":"chat","to":"bob","a":{"type":"reset"},"id":7}"#), Ok(()));
        for control in [r#"{"type":"reset","id":7}"#, r#"{"\u0074ype":"\u0072eset","id":7}"#] {
            assert_eq!(readable(control.as_bytes()), Err(BadEvent::ReservedType("reset")), "{control}");
        }
        assert_eq!(readable(br#"{"a\"id":7}"#), Err(BadEvent::NoId));
        assert!(matches!(readable(br#"{"id":7,"id":7}"#), Err(BadEvent::Invalid(_))));
    }

    #[test]
    fn rejects_invalid_events() {
        let whole: [&[u8]; 6] =
            [b"", b" ", b"{} {}", b"\"\n\"", b"\"\xff\"", b"{\"type\":\"chat\",\"type\":\"ping\"}"];
        for body in whole {
            assert!(matches!(published(body, None), Err(BadEvent::Invalid(_))), "{}", body.escape_ascii());
        }
        for case in json::cases::cases() {
            // By itself a value is wrapped, unless it is an object.
            let value = if case.value.starts_with(b"{") { case.event() } else { case.value.clone() };
            for body in [&case.event(), &value] {
                match (published(body, Some("bob")), case.error()) {
                    (Ok(event), None) => {
                        assert_eq!(json::check(&event, DEPTH_MAX), Ok(()), "{}", case.name())
                    }
                    (Err(bad), Some(words)) => {
                        assert!(
                            *body == case.value || bad.to_string().contains(words),
                            "{}: {bad}",
                            case.name()
                        );
                    }
                    (result, _) => panic!("{}: {result:?}", case.name()),
                }
            }
        }
    }

    fn json() -> impl Strategy<Value = serde_json::Value> {
        let leaf = prop_oneof![
            Just(serde_json::Value::Null),
            any::<i64>().prop_map(Into::into),
            ".*".prop_map(Into::into)
        ];
        leaf.prop_recursive(3, 16, 4, |inner| {
            let members = proptest::collection::hash_map("[a-z ]{0,4}", inner.clone(), 0..4);
            prop_oneof![
                proptest::collection::vec(inner, 0..4).prop_map(Into::into),
                members.prop_map(|members| members.into_iter().collect::<serde_json::Map<_, _>>().into()),
            ]
        })
    }

    proptest! {
        #[test]
        fn events_are_one_line_with_the_posted_value(value in json(), pretty: bool, to in ".{1,5}") {
            let body = if pretty { serde_json::to_string_pretty(&value) } else { serde_json::to_string(&value) };
            let Ok(event) = published(body.unwrap().as_bytes(), Some(&to)) else {
                return Err(TestCaseError::reject("reserved"));
            };
            let text = std::str::from_utf8(&event).unwrap();
            let whole = text.starts_with('{') && text.ends_with('}');
            prop_assert!(whole && !text.contains(['\n', '\r']), "{}", text);
            let mut parsed: serde_json::Map<_, _> = serde_json::from_str(text).unwrap();
            prop_assert_eq!(parsed.remove("to"), Some(to.into()));
            let expected = match value {
                serde_json::Value::Object(members) => members,
                other => [("data".to_owned(), other)].into_iter().collect(),
            };
            prop_assert_eq!(parsed, expected);
        }

        #[test]
        fn no_body_panics(body: Vec<u8>, text in "[{}\\[\\]\",:a-z0-9 \n]*") {
            let _ = (published(&body, None), published(text.as_bytes(), Some("a")));
        }
    }

    #[test]
    fn shows_or_wraps_external_messages() {
        let shown = |message: &[u8]| external(message).unwrap().event;
        assert_eq!(shown(b" {\"a\":\n1} "), r#"{"a": 1}"#);
        assert_eq!(shown(br#"{"id":null}"#), r#"{"data":{"id":null}}"#);
        assert_eq!(shown(br#"{"type":"ping"}"#), r#"{"data":{"type":"ping"}}"#);
        assert_eq!(shown(br#"{"type":"\u0070ing"}"#), r#"{"data":{"type":"\u0070ing"}}"#);
        assert_eq!(shown(br#"{"type":"chat"}"#), r#"{"type":"chat"}"#);
        assert_eq!(shown(b"[1,2]"), r#"{"data":[1,2]}"#);
        assert_eq!(shown(b"hello \"you\"\n"), r#"{"data":"hello \"you\"\n"}"#);
        assert_eq!(shown(b"\xff"), "{\"data\":\"\u{fffd}\"}");
        assert!(external(b"\t{}").is_none());
        let deepest = format!("{{\"id\":{}{}}}", "[".repeat(DEPTH_MAX - 1), "]".repeat(DEPTH_MAX - 1));
        assert!(shown(deepest.as_bytes()).starts_with(r#"{"data":"{\"id\""#));
        for case in json::cases::cases() {
            let event = case.event();
            let from_publish = external(&event).unwrap();
            assert_eq!(json::check(from_publish.event.as_bytes(), DEPTH_MAX), Ok(()), "{}", case.name());
            match case.error() {
                None => assert!(from_publish.fault.is_none(), "{}", case.name()),
                Some(words) => {
                    let shown: serde_json::Value = serde_json::from_str(&from_publish.event).unwrap();
                    assert_eq!(shown["data"], *String::from_utf8_lossy(&event), "{}", case.name());
                    assert!(from_publish.fault.unwrap().to_string().contains(words), "{}", case.name());
                }
            }
        }
    }
}
