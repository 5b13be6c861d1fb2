//! The frames that clients send in JSON mode.

use std::borrow::Cow;

use bytes::Bytes;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::protocol::event::{ChannelName, EventId, is_idempotency_key, is_user_id};
use crate::protocol::frame::Event;
use crate::protocol::json;
use crate::protocol::json::explain::{self, Known};

/// Longest `ref` of a client's frame, as JSON text, in bytes: it is kept until the answer.
const REFERENCE_MAX: usize = 128;

/// Most events before the head that a newcomer may ask for.
pub const HISTORY_MAX: u8 = 100;

/// A valid frame from a JSON mode client. `reference` is its `ref`, which the answer repeats, as
/// JSON text.
#[derive(Debug, PartialEq, Eq)]
pub enum ClientFrame {
    Publish(ClientPublish),
    Subscribe {
        channels: Vec<Subscribe>,
        reference: Option<Box<str>>,
    },
    Unsubscribe {
        channel: ChannelName,
        reference: Option<Box<str>>,
    },
    /// Replaces the token of the connection.
    Token {
        token: String,
        reference: Option<Box<str>>,
    },
    /// Answered with a ping that carries the client's positions.
    Ping,
}

#[derive(Debug, PartialEq, Eq)]
pub struct ClientPublish {
    /// The event, without id.
    pub event: Bytes,
    /// The only user it is for.
    pub to: Option<String>,
    /// `None`: the default channel.
    pub channel: Option<ChannelName>,
    /// Makes a retry safe, in an inbox.
    pub key: Option<Box<str>>,
    pub reference: Option<Box<str>>,
}

/// A channel to follow.
#[derive(Debug, PartialEq, Eq)]
pub struct Subscribe {
    pub channel: ChannelName,
    /// The last event that the client has.
    pub last: Option<EventId>,
    /// Without it: how many events before the head come first.
    pub history: u8,
    /// Whether the client wants to know who is in the channel.
    pub presence: bool,
}

/// An invalid frame from a JSON mode client.
#[derive(Debug, PartialEq, Eq)]
pub struct BadFrame {
    pub message: Cow<'static, str>,
    /// The client's `ref`, if it could be parsed.
    pub reference: Option<Box<str>>,
}

/// The members of all kinds of frames.
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
    #[serde(borrow, default, deserialize_with = "given")]
    channel: Option<Cow<'a, str>>,
    #[serde(borrow, default, deserialize_with = "given")]
    channels: Option<&'a RawValue>,
    #[serde(borrow, default, rename = "lastEventId")]
    last: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "given")]
    history: Option<&'a RawValue>,
    #[serde(default, deserialize_with = "given")]
    presence: Option<bool>,
    #[serde(borrow, default, deserialize_with = "given")]
    key: Option<Cow<'a, str>>,
    #[serde(borrow, default, deserialize_with = "given")]
    token: Option<Cow<'a, str>>,
    #[serde(borrow, default, rename = "ref", deserialize_with = "given")]
    reference: Option<&'a RawValue>,
}

/// One of the `channels` to follow.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Item<'a> {
    #[serde(borrow)]
    channel: Cow<'a, str>,
    #[serde(borrow, default, rename = "lastEventId")]
    last: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "given")]
    history: Option<&'a RawValue>,
    #[serde(default, deserialize_with = "given")]
    presence: Option<bool>,
}

const fn string(key: &'static str) -> Known {
    Known { key, is_string: true }
}

const fn any(key: &'static str) -> Known {
    Known { key, is_string: false }
}

// The members of each kind of frame, to explain what is wrong with one.
const PUBLISH: &[Known] = &[
    string("text"),
    any("data"),
    string("to"),
    string("channel"),
    string("key"),
    any("ref"),
    string("type"),
];
const SUBSCRIBE: &[Known] = &[
    string("type"),
    string("channel"),
    any("channels"),
    any("lastEventId"),
    any("history"),
    any("presence"),
    any("ref"),
];
const UNSUBSCRIBE: &[Known] = &[string("type"), string("channel"), any("ref")];
const TOKEN: &[Known] = &[string("type"), string("token"), any("ref")];
const PING: &[Known] = &[string("type"), any("ref")];
const ITEM: &[Known] = &[string("channel"), any("lastEventId"), any("history"), any("presence")];

const TYPES: &str =
    r#""type" must be "subscribe", "unsubscribe", "token" or "ping"; leave it out to publish"#;
const TEXT_OR_DATA: &str = r#"give either "text" or "data""#;

/// The members of frames of this type.
fn known(kind: Option<&str>) -> Option<&'static [Known]> {
    match kind {
        None => Some(PUBLISH),
        Some("subscribe") => Some(SUBSCRIBE),
        Some("unsubscribe") => Some(UNSUBSCRIBE),
        Some("token") => Some(TOKEN),
        Some("ping") => Some(PING),
        Some(_) => None,
    }
}

/// Treats `null` as a value, which `Option` alone would treat as absent: a message with `"to":null`
/// must not go to all subscribers.
fn given<'de, D: serde::Deserializer<'de>, T: Deserialize<'de>>(
    deserializer: D,
) -> Result<Option<T>, D::Error> {
    T::deserialize(deserializer).map(Some)
}

/// Parses a frame from a JSON mode client. `channels_max` is the greatest number of channels in
/// one.
///
/// # Errors
/// What is wrong with it, for the author of the client.
pub fn parse(sender: &str, text: &str, channels_max: usize) -> Result<ClientFrame, BadFrame> {
    // serde takes an array, too, with the members in their order.
    let members = serde_json::from_str(text).ok().filter(|_| explain::is_object(text));
    let Some(members): Option<Members<'_>> = members else {
        return Err(BadFrame { message: explained(text).into(), reference: reference_in(text) });
    };
    let reference = match members.reference {
        None => None,
        Some(given) => match valid_reference(given.get()) {
            Some(reference) => Some(reference),
            None => {
                let message = r#""ref" must be a number or a string of at most 128 bytes"#.into();
                return Err(BadFrame { message, reference: None });
            }
        },
    };
    let kind = members.kind.as_deref();
    let found = match kind {
        _ if !members.belong_to(kind) => Err(explained(text).into()),
        None => members.publish(sender, reference.clone()),
        Some("subscribe") => members
            .subscribe(channels_max)
            .map(|channels| ClientFrame::Subscribe { channels, reference: reference.clone() }),
        Some("unsubscribe") => channel(members.channel.as_deref())
            .map(|channel| ClientFrame::Unsubscribe { channel, reference: reference.clone() }),
        Some("token") => match members.token {
            Some(token) => Ok(ClientFrame::Token { token: token.into(), reference: reference.clone() }),
            None => Err(r#"give "token""#.into()),
        },
        Some(_) => Ok(ClientFrame::Ping),
    };
    found.map_err(|message| BadFrame { message, reference })
}

/// What is wrong with the text of a frame.
fn explained(text: &str) -> String {
    #[derive(Deserialize)]
    struct Kind<'a> {
        #[serde(borrow, default, rename = "type", deserialize_with = "given")]
        kind: Option<&'a RawValue>,
    }
    if let Err(error) = json::check(text.as_bytes(), json::DEPTH_MAX) {
        return format!("invalid frame: {error}");
    }
    let found: Option<Kind<'_>> = serde_json::from_str(text).ok().filter(|_| explain::is_object(text));
    let kind = found.and_then(|found| found.kind);
    let kind: Option<Cow<'_, str>> = match kind.map(|kind| serde_json::from_str(kind.get())) {
        Some(Err(_)) => return r#""type" must be a string"#.into(),
        kind => kind.and_then(Result::ok),
    };
    match known(kind.as_deref()) {
        None => TYPES.into(),
        Some(known) => explain::fault(text, known).unwrap_or_else(|| TEXT_OR_DATA.into()),
    }
}

type Explained<T> = Result<T, Cow<'static, str>>;

impl Members<'_> {
    /// Whether a frame of this type has only members that belong to it.
    fn belong_to(&self, kind: Option<&str>) -> bool {
        let event = self.text.is_some() || self.data.is_some() || self.to.is_some() || self.key.is_some();
        let many = self.channels.is_some()
            || self.last.is_some()
            || self.history.is_some()
            || self.presence.is_some();
        let (channel, token) = (self.channel.is_some(), self.token.is_some());
        match kind {
            None => !many && !token,
            Some("subscribe") => !event && !token,
            Some("unsubscribe") => !event && !many && !token,
            Some("token") => !event && !many && !channel,
            Some("ping") => !event && !many && !channel && !token,
            Some(_) => false,
        }
    }

    fn publish(&self, sender: &str, reference: Option<Box<str>>) -> Explained<ClientFrame> {
        let to = self.to.as_deref();
        if to.is_some_and(|to| !is_user_id(to)) {
            return Err(r#""to" must be a user id: 1 to 128 bytes, no control characters"#.into());
        }
        let channel = self.channel.as_deref().map(|name| channel(Some(name))).transpose()?;
        if self.key.as_deref().is_some_and(|key| !is_idempotency_key(key)) {
            return Err(
                r#""key" must have 1 to 128 printable ASCII characters without blanks and quotes"#.into()
            );
        }
        let event = Event::by(sender, to);
        let event = match (&self.text, self.data) {
            (Some(text), None) => event.with_text(text),
            (None, Some(data)) => match json::check(data.get().as_bytes(), json::DEPTH_MAX - 1) {
                Ok(()) => event.with_data(data.get()),
                Err(error) => return Err(format!(r#"invalid "data": {error}"#).into()),
            },
            _ => return Err(TEXT_OR_DATA.into()),
        };
        let key = self.key.as_deref().map(Into::into);
        Ok(ClientFrame::Publish(ClientPublish { event, to: to.map(Into::into), channel, key, reference }))
    }

    fn subscribe(&self, channels_max: usize) -> Explained<Vec<Subscribe>> {
        match (&self.channel, self.channels) {
            (Some(name), None) => Ok(vec![subscribe(Some(name), self.last, self.history, self.presence)?]),
            (None, Some(channels))
                if self.last.is_none() && self.history.is_none() && self.presence.is_none() =>
            {
                let invalid =
                    || format!(r#""channels" must be a list of 1 to {channels_max} objects with "channel""#);
                let items: Vec<&RawValue> = serde_json::from_str(channels.get()).map_err(|_| invalid())?;
                if items.is_empty() || items.len() > channels_max {
                    return Err(invalid().into());
                }
                items.into_iter().map(item).collect()
            }
            _ => Err(r#"give either "channel" or "channels""#.into()),
        }
    }
}

fn item(json: &RawValue) -> Explained<Subscribe> {
    let parsed = serde_json::from_str(json.get()).ok().filter(|_| explain::is_object(json.get()));
    let Some(Item { channel, last, history, presence }) = parsed else {
        let fault = explain::fault(json.get(), ITEM).unwrap_or_else(|| r#"give "channel""#.into());
        return Err(format!(r#""channels": {fault}"#).into());
    };
    subscribe(Some(&channel), last, history, presence)
}

fn subscribe(
    name: Option<&str>,
    last: Option<&RawValue>,
    history: Option<&RawValue>,
    presence: Option<bool>,
) -> Explained<Subscribe> {
    let last = match last.map(RawValue::get) {
        None | Some("null") => None,
        Some(text) => Some(EventId::parse(text.as_bytes()).ok_or(
            r#""lastEventId" must be the id of an event: an integer from 0 to 9007199254740991, or null"#,
        )?),
    };
    let history = match history.map(|text| text.get().parse().ok()) {
        None => 0,
        Some(Some(count @ 1..=HISTORY_MAX)) => count,
        Some(_) => return Err(format!(r#""history" must be a number from 1 to {HISTORY_MAX}"#).into()),
    };
    Ok(Subscribe { channel: channel(name)?, last, history, presence: presence.unwrap_or(false) })
}

fn channel(name: Option<&str>) -> Explained<ChannelName> {
    let name = name.ok_or(r#"give "channel""#)?;
    ChannelName::parse(name).ok_or_else(|| format!(r#""channel" must be {}"#, ChannelName::RULE).into())
}

/// The `ref` of a frame that is rejected, valid or not.
pub fn reference_in(text: &str) -> Option<Box<str>> {
    #[derive(Deserialize)]
    struct Reference<'a> {
        #[serde(borrow, default, rename = "ref", deserialize_with = "given")]
        reference: Option<&'a RawValue>,
    }
    let found: Reference<'_> = serde_json::from_str(text).ok().filter(|_| explain::is_object(text))?;
    valid_reference(found.reference?.get())
}

fn valid_reference(text: &str) -> Option<Box<str>> {
    let scalar =
        text.starts_with('"') || text.starts_with('-') || text.starts_with(|c: char| c.is_ascii_digit());
    let valid = scalar && text.len() <= REFERENCE_MAX && json::check(text.as_bytes(), 0).is_ok();
    valid.then(|| text.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<ClientFrame, BadFrame> {
        parse("alice", text, 3)
    }

    fn rejected(text: &str) -> BadFrame {
        parsed(text).expect_err(text)
    }

    fn publish(text: &str) -> ClientPublish {
        match parsed(text).unwrap() {
            ClientFrame::Publish(publish) => publish,
            other => panic!("{text} is {other:?}"),
        }
    }

    fn event(text: &str) -> String {
        String::from_utf8(publish(text).event.to_vec()).unwrap()
    }

    #[test]
    fn client_frames_become_events() {
        assert_eq!(event(r#"{"text":"hi"}"#), r#"{"sender":"alice","text":"hi"}"#);
        assert_eq!(event(r#"{"text":"psst","to":"bob"}"#), r#"{"sender":"alice","to":"bob","text":"psst"}"#);
        assert_eq!(event("{\"data\":{\"a\":\n1.50}}"), r#"{"sender":"alice","data":{"a": 1.50}}"#);
        assert_eq!(event(r#"{"data":null}"#), r#"{"sender":"alice","data":null}"#);
        assert_eq!(publish(r#"{"ref":"x","text":""}"#).reference.as_deref(), Some(r#""x""#));
        assert_eq!(event(r#"{"text":"hi","channel":"a"}"#), r#"{"sender":"alice","text":"hi"}"#);
        let channel = publish(r#"{"text":"hi","channel":"a"}"#).channel;
        assert_eq!(channel, ChannelName::parse("a"));
        assert_eq!(parsed(r#"{"type":"ping"}"#), Ok(ClientFrame::Ping));
    }

    #[test]
    fn control_frames_are_parsed() {
        let name = |name: &str| ChannelName::parse(name).expect("a name");
        let one =
            |channel, last, history| Subscribe { channel: name(channel), last, history, presence: false };
        let subscribe = |text: &str| match parsed(text).unwrap() {
            ClientFrame::Subscribe { channels, reference } => (channels, reference),
            other => panic!("{text} is {other:?}"),
        };
        assert_eq!(
            subscribe(r#"{"type":"subscribe","channel":"a","lastEventId":0,"ref":1}"#),
            (vec![one("a", Some(EventId(0)), 0)], Some("1".into()))
        );
        assert_eq!(
            subscribe(r#"{"type":"subscribe","channel":"a","lastEventId":null,"history":100}"#),
            (vec![one("a", None, 100)], None)
        );
        assert_eq!(
            subscribe(
                r#"{"type":"subscribe","channels":[{"channel":"a","lastEventId":9007199254740991},{"channel":"b"}]}"#
            ),
            (vec![one("a", Some(EventId(EventId::LIMIT - 1)), 0), one("b", None, 0)], None)
        );
        let with_presence = |text: &str| subscribe(text).0.iter().map(|one| one.presence).collect::<Vec<_>>();
        assert_eq!(with_presence(r#"{"type":"subscribe","channel":"a","presence":true}"#), [true]);
        let list = r#"{"type":"subscribe","channels":[{"channel":"a","presence":true},{"channel":"b","presence":false}]}"#;
        assert_eq!(with_presence(list), [true, false]);
        assert_eq!(
            parsed(r#"{"type":"unsubscribe","channel":"a","ref":"x"}"#),
            Ok(ClientFrame::Unsubscribe { channel: name("a"), reference: Some(r#""x""#.into()) })
        );
        assert_eq!(
            parsed(r#"{"type":"token","token":"a.b.c"}"#),
            Ok(ClientFrame::Token { token: "a.b.c".into(), reference: None })
        );
    }

    #[test]
    fn rejects_invalid_frames_with_their_ref() {
        for text in [
            r#"{"ref":7}"#,
            r#"{"ref":7,"txt":"hi"}"#,
            r#"{"ref":7,"text":3}"#,
            r#"{"ref":7,"text":"a","data":1}"#,
            r#"{"ref":7,"text":"a","type":"ping"}"#,
            r#"{"ref":7,"type":"reset"}"#,
            r#"{"ref":7,"type":"subscribe"}"#,
            r#"{"ref":7,"type":"subscribe","channel":"a","presence":1}"#,
            r#"{"ref":7,"type":"unsubscribe","channel":"a","presence":true}"#,
            r#"{"ref":7,"type":"unsubscribe"}"#,
            r#"{"ref":7,"type":"token"}"#,
        ] {
            assert_eq!(rejected(text).reference.as_deref(), Some("7"), "{text}");
        }
        for text in [
            "",
            "hi",
            "[]",
            r#"{"text":"#,
            r#"{"text":"a","ref":[1]}"#,
            r#"{"text":"a","to":""}"#,
            r#"{"text":"a","to":null}"#,
            r#"{"text":"a","channel":null}"#,
        ] {
            assert_eq!(rejected(text).reference, None, "{text}");
        }
        let long = format!(r#"{{"text":"a","ref":"{}"}}"#, "x".repeat(REFERENCE_MAX));
        assert!(parsed(&long).is_err());
        assert_eq!(reference_in("[7]"), None);
    }

    #[test]
    fn messages_say_what_is_wrong() {
        let ids =
            r#""lastEventId" must be the id of an event: an integer from 0 to 9007199254740991, or null"#;
        let name = r#""channel" must be 1 to 128 of A-Z a-z 0-9 _ . : -"#;
        let history = r#""history" must be a number from 1 to 100"#;
        let list = r#""channels" must be a list of 1 to 3 objects with "channel""#;
        let either = r#"give either "channel" or "channels""#;
        let subscribe = |rest: &str| format!(r#"{{"type":"subscribe",{rest}}}"#);
        let many = |items: &str| subscribe(&format!(r#""channels":{items}"#));
        for (text, message) in [
            (r#"{"ref":7,"txt":"hi"}"#.into(), r#"unknown key "txt": did you mean "text"?"#),
            (
                r#"{"text":"hi","room":"a"}"#.into(),
                r#"unknown key "room": the keys are text, data, to, channel, key, ref, type"#,
            ),
            (r#"{"text":"a","to":null}"#.into(), r#""to" must be a string"#),
            (r#"{"type":5}"#.into(), r#""type" must be a string"#),
            (r#"{"type":"reset"}"#.into(), TYPES),
            (r#"{"type":"reset","x":1}"#.into(), TYPES),
            (r#"[null,"hi"]"#.into(), "send a JSON object: this is an array"),
            (r#"["ping"]"#.into(), "send a JSON object: this is an array"),
            (r#"{"text":"hi","channel":"a b"}"#.into(), name),
            (
                r#"{"text":"hi","history":5}"#.into(),
                r#"unknown key "history": the keys are text, data, to, channel, key, ref, type"#,
            ),
            (r#"{"type":"ping","text":"hi"}"#.into(), r#"unknown key "text": the keys are type, ref"#),
            (
                r#"{"type":"unsubscribe","channel":"a","history":1}"#.into(),
                r#"unknown key "history": the keys are type, channel, ref"#,
            ),
            (r#"{"type":"unsubscribe"}"#.into(), r#"give "channel""#),
            (r#"{"type":"token","token":5}"#.into(), r#""token" must be a string"#),
            (r#"{"type":"token"}"#.into(), r#"give "token""#),
            (subscribe(r#""chanel":"a""#), r#"unknown key "chanel": did you mean "channel"?"#),
            (subscribe(r#""ref":1"#), either),
            (subscribe(r#""channel":"a","channels":[]"#), either),
            (subscribe(r#""channels":[{"channel":"a"}],"history":1"#), either),
            (subscribe(r#""channel":"""#), name),
            (subscribe(r#""channel":"a","lastEventId":-1"#), ids),
            (subscribe(r#""channel":"a","lastEventId":1.0"#), ids),
            (subscribe(r#""channel":"a","lastEventId":"1""#), ids),
            (subscribe(r#""channel":"a","lastEventId":9007199254740992"#), ids),
            (subscribe(r#""channel":"a","history":0"#), history),
            (subscribe(r#""channel":"a","history":101"#), history),
            (subscribe(r#""channel":"a","history":null"#), history),
            (many("[]"), list),
            (many("{}"), list),
            (many("null"), list),
            (many(r#"[{"channel":"a"},{"channel":"b"},{"channel":"c"},{"channel":"d"}]"#), list),
            (many(r#"["a"]"#), r#""channels": send a JSON object: this is a string"#),
            (many("[{}]"), r#""channels": give "channel""#),
            (
                many(r#"[{"channel":"a"},{"channel":"b","last":1}]"#),
                r#""channels": unknown key "last": the keys are channel, lastEventId, history, presence"#,
            ),
            (many(r#"[{"channel":"a"},{"channel":"b","lastEventId":1.5}]"#), ids),
        ] {
            assert_eq!(rejected(&text).message, message, "{text}");
        }
    }

    #[test]
    fn data_and_refs_follow_the_json_rule() {
        for case in json::cases::cases() {
            let Ok(value) = std::str::from_utf8(&case.value) else { continue }; // the decoder closes with 1007
            let result = parsed(&format!("{{\"ref\":7,\"data\":{value}}}"));
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
}
