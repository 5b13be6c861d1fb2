//! What other programs send, made into events: the body of `POST /publish`, and a plain Redis `PUBLISH`.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;

use bytes::Bytes;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use crate::frame::put_on_one_line;

/// The `type`s of frames that only the server sends: no event may look like one.
pub const CONTROL_TYPES: [&str; 5] = ["welcome", "reset", "ping", "error", "ack"];

/// Why a body is no event.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadEvent {
    /// It is not JSON.
    #[error("the body must be one JSON value: {0}")]
    NotJson(String),
    /// The server alone sets `id`, and the query sets `to`.
    #[error(r#"the key "{0}" is reserved: the bus sets "id", and the query parameter "to" sets "to""#)]
    ReservedKey(&'static str),
    /// It would look like a frame of the server's own.
    #[error(r#"the type "{0}" is reserved: clients take it for a message of the server's own"#)]
    ReservedType(&'static str),
}

/// The event for a JSON body: one line from `{` to `}`, without `id`. An object is taken as it is, byte for byte
/// but for line breaks; any other value becomes `{"data":…}`. Where it is for one user, `to` comes first.
pub fn published(body: &[u8], to: Option<&str>) -> Result<Bytes, BadEvent> {
    let not_json = |error: serde_json::Error| BadEvent::NotJson(error.to_string());
    let value: &RawValue = serde_json::from_slice(body).map_err(not_json)?;
    let json = value.get();
    let members = match json.strip_prefix('{').and_then(|rest| rest.strip_suffix('}')) {
        Some(members) => {
            check(json)?;
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

/// Looks at every key of an object, also at one that comes twice: which of the two counts is the reader's choice.
fn check(object: &str) -> Result<(), BadEvent> {
    let mut deserializer = serde_json::Deserializer::from_str(object);
    match deserializer.deserialize_map(Keys) {
        Ok(None) => Ok(()),
        Ok(Some(bad)) => Err(bad),
        Err(error) => Err(BadEvent::NotJson(error.to_string())),
    }
}

/// Walks over an object's keys and yields what is wrong with the first bad one.
struct Keys;

impl<'de> Visitor<'de> for Keys {
    type Value = Option<BadEvent>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut bad = None;
        while let Some(key) = map.next_key::<Text<'de>>()? {
            let value = map.next_value::<&RawValue>()?;
            let found = match &*key.0 {
                "id" => Some(BadEvent::ReservedKey("id")),
                "to" => Some(BadEvent::ReservedKey("to")),
                "type" => control_type(value).map(BadEvent::ReservedType),
                _ => None,
            };
            bad = bad.or(found);
        }
        Ok(bad)
    }
}

fn control_type(value: &RawValue) -> Option<&'static str> {
    let text: Text<'_> = serde_json::from_str(value.get()).ok()?;
    CONTROL_TYPES.into_iter().find(|control| *control == text.0)
}

/// What clients see of a plain `PUBLISH` on a bare channel: an object without `id` and control `type` as it is,
/// anything else as `{"data":…}`. `None` for a node's own copies, which begin with a TAB.
pub fn bare(message: &[u8]) -> Option<String> {
    if message.first() == Some(&b'\t') {
        return None;
    }
    let text = String::from_utf8_lossy(message);
    let one_line = || text.replace(['\r', '\n'], " ");
    if let Ok(members) = serde_json::from_str::<HashMap<Cow<'_, str>, &RawValue>>(&text) {
        let control = members.get("type").and_then(|value| control_type(value));
        if !members.contains_key("id") && control.is_none() {
            return Some(one_line().trim().to_owned());
        }
    }
    let data = match serde_json::from_str::<&RawValue>(&text) {
        Ok(_) => one_line(),
        Err(_) => serde_json::to_string(&*text).expect("a string is always JSON"),
    };
    Some(format!(r#"{{"data":{}}}"#, data.trim()))
}

/// A string with its escapes undone, borrowed where it has none.
#[derive(serde::Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn event(body: &str, to: Option<&str>) -> String {
        String::from_utf8(published(body.as_bytes(), to).unwrap().to_vec()).unwrap()
    }

    #[test]
    fn an_object_keeps_its_bytes_and_anything_else_is_wrapped() {
        for (body, expected) in [
            (r#"{"sender":"a","text":"hi"}"#, r#"{"sender":"a","text":"hi"}"#),
            (
                r#" {"n":12345678901234567890123, "f":1.50e400} "#,
                r#"{"n":12345678901234567890123, "f":1.50e400}"#,
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
    fn no_spelling_smuggles_an_id_a_user_or_a_control_type() {
        for body in [
            r#"{"id":1}"#,
            r#"{"id":null}"#,
            r#"{"a":1,"id":2,"a":3}"#,
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
                format!(r#"{{"type":"chat","type":"{control}"}}"#),
                format!(r#"{{"type":"{control}","type":"chat"}}"#),
                format!(r#"{{"typ\u0065":"\u{:04x}{}"}}"#, control.as_bytes()[0], &control[1..]),
            ] {
                let error = published(body.as_bytes(), None).unwrap_err();
                assert_eq!(error, BadEvent::ReservedType(control), "{body}");
            }
        }
    }

    #[test]
    fn what_is_not_one_json_value_is_refused() {
        for body in [
            "",
            " ",
            "{",
            "{}}",
            "{} {}",
            "hi",
            "{\"a\":01}",
            "{'a':1}",
            "{\"a\":1,}",
            "NaN",
            "\u{feff}{}",
            "\"\n\"",
        ] {
            assert!(matches!(published(body.as_bytes(), None), Err(BadEvent::NotJson(_))), "{body}");
        }
        assert!(published(b"\"\xff\"", None).is_err());
        assert!(published(b"{\"\xff\":1}", None).is_err());
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
        fn every_event_is_one_line_of_json_with_the_value_posted(value in json(), pretty: bool, to in ".{1,5}") {
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
    fn a_plain_publish_is_shown_or_wrapped() {
        let shown = |message: &[u8]| bare(message).unwrap();
        assert_eq!(shown(b" {\"a\":\n1} "), r#"{"a": 1}"#);
        assert_eq!(shown(br#"{"id":null}"#), r#"{"data":{"id":null}}"#);
        assert_eq!(shown(br#"{"type":"ping"}"#), r#"{"data":{"type":"ping"}}"#);
        assert_eq!(shown(br#"{"type":"\u0070ing"}"#), r#"{"data":{"type":"\u0070ing"}}"#);
        assert_eq!(shown(br#"{"type":"chat"}"#), r#"{"type":"chat"}"#);
        assert_eq!(shown(b"[1,2]"), r#"{"data":[1,2]}"#);
        assert_eq!(shown(b"hello \"you\"\n"), r#"{"data":"hello \"you\"\n"}"#);
        assert_eq!(shown(b"\xff"), "{\"data\":\"\u{fffd}\"}");
        assert_eq!(bare(b"\t{}"), None);
    }
}
