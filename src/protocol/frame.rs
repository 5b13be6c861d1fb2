//! The frames that only the server sends, and events built from what clients send.

use std::fmt::Write as _;
use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};

use crate::protocol::event::{ChannelName, EventId, text_frame};
use crate::protocol::inbox::PublishedId;

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

/// An event of a client as its inbox has it: without `to`, so that a backend can publish it as it
/// is.
pub fn without_recipient(event: Bytes, sender: &str, to: Option<&str>) -> Bytes {
    let Some(to) = to else { return event };
    let (addressed, open) = (Event::by(sender, Some(to)).0, Event::by(sender, None).0);
    let rest = event.strip_prefix(&*addressed).expect("the event was built this way");
    [&open, rest].concat().into()
}

/// Builds an event member by member.
pub(super) struct Event(Vec<u8>);

impl Event {
    pub fn by(sender: &str, to: Option<&str>) -> Event {
        let mut event = Event(Vec::with_capacity(64));
        event.0.extend_from_slice(br#"{"sender":"#);
        event.put_string(sender);
        if let Some(to) = to {
            event.0.extend_from_slice(br#","to":"#);
            event.put_string(to);
        }
        event
    }

    pub fn with_text(mut self, text: &str) -> Bytes {
        self.0.extend_from_slice(br#","text":"#);
        self.put_string(text);
        self.0.push(b'}');
        self.0.into()
    }

    pub fn with_data(mut self, data: &str) -> Bytes {
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

/// The first frame for a client that asked for recovery frames.
pub fn welcome(last: EventId, head: EventId, recovered: bool) -> Bytes {
    let json = format!(r#"{{"type":"welcome","lastEventId":{last},"head":{head},"recovered":{recovered}}}"#);
    text_frame(json.as_bytes())
}

/// The first frame for a client without a default channel.
pub fn welcome_without_channel() -> Bytes {
    text_frame(br#"{"type":"welcome"}"#)
}

/// The first frame of a subscription.
pub fn subscription_welcome(
    channel: &ChannelName,
    last: EventId,
    head: EventId,
    recovered: bool,
    reference: Option<&str>,
) -> Bytes {
    let json = format!(
        r#"{{"type":"welcome","channel":"{channel}","lastEventId":{last},"head":{head},"recovered":{recovered}{}}}"#,
        reference_member(reference)
    );
    text_frame(json.as_bytes())
}

/// The last frame of a subscription.
pub fn unsubscribed(channel: &ChannelName, reason: &str, reference: Option<&str>) -> Bytes {
    let reference = reference_member(reference);
    let json = format!(r#"{{"type":"unsubscribed","channel":"{channel}","reason":"{reason}"{reference}}}"#);
    text_frame(json.as_bytes())
}

/// The answer to a published frame with `ref`.
pub fn ack(reference: &str, id: PublishedId) -> Bytes {
    text_frame(format!(r#"{{"type":"ack","ref":{reference},"id":{id}}}"#).as_bytes())
}

/// The answer to a new token with `ref`.
pub fn token_ack(reference: &str) -> Bytes {
    text_frame(format!(r#"{{"type":"ack","ref":{reference}}}"#).as_bytes())
}

/// The token expires in this many seconds.
pub fn token_expiring(seconds: u32) -> Bytes {
    text_frame(format!(r#"{{"type":"token_expiring","in":{seconds}}}"#).as_bytes())
}

/// A ping that scripts can see, with the client's position in its default channel, if it has one
/// and asked for recovery frames, and in the channels that it has subscribed to.
pub fn json_ping<'a>(
    position: Option<EventId>,
    channels: impl Iterator<Item = (&'a ChannelName, EventId)>,
) -> Bytes {
    const WRITES: &str = "memory takes every write";
    let mut json = String::from(r#"{"type":"ping""#);
    if let Some(position) = position {
        write!(json, r#","lastEventId":{position}"#).expect(WRITES);
    }
    let mut before = r#","channels":{"#;
    for (channel, position) in channels {
        write!(json, r#"{before}"{channel}":{position}"#).expect(WRITES);
        before = ",";
    }
    if before == "," {
        json.push('}');
    }
    json.push('}');
    text_frame(json.as_bytes())
}

/// Who is in a channel: `members` are those after the channel, from one of the functions below.
pub fn presence(channel: Option<&ChannelName>, members: &str) -> Bytes {
    let channel = channel.map(|channel| format!(r#""channel":"{channel}","#)).unwrap_or_default();
    text_frame(format!(r#"{{"type":"presence",{channel}{members}"#).as_bytes())
}

/// All users.
pub fn presence_list<'a>(users: impl Iterator<Item = &'a Arc<str>>, count: u64) -> String {
    format!(r#""users":{},"count":{count}}}"#, strings(users))
}

/// Users who have come and gone.
pub fn presence_change(joined: &[Arc<str>], left: &[Arc<str>], count: u64) -> String {
    let (joined, left) = (strings(joined.iter()), strings(left.iter()));
    format!(r#""join":{joined},"leave":{left},"count":{count}}}"#)
}

/// Only how many users there are.
pub fn presence_count(count: u64) -> String {
    format!(r#""count":{count}}}"#)
}

/// A JSON array.
fn strings<'a>(texts: impl Iterator<Item = &'a Arc<str>>) -> String {
    let texts: Vec<&str> = texts.map(|text| &**text).collect();
    serde_json::to_string(&texts).expect("strings are JSON")
}

/// The text of an error frame with the code [`ErrorCode::Unavailable`].
pub const NOT_PUBLISHED: &str = "not published: try again later";

/// Why a client's frame was rejected: the code in the error frame, and a metric label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorCode {
    /// Not a valid frame.
    Invalid,
    /// This client may not publish that, or not follow that channel.
    Forbidden,
    /// Over `--max-message-rate` or `--max-byte-rate`, or too many new channels.
    RateLimited,
    /// Certainly not published, or not subscribed: the bus is unavailable, or rejects the event.
    Unavailable,
    /// It may or may not have been published.
    Unknown,
    /// Certainly not stored: the inbox is full.
    Full,
    /// The client follows the channel already.
    Subscribed,
    /// The client does not follow the channel.
    NotSubscribed,
    /// `--max-subscriptions` is reached.
    TooMany,
    /// The new token is invalid, expired, or of another user.
    Unauthorized,
}

impl ErrorCode {
    pub const ALL: [ErrorCode; 10] = [
        ErrorCode::Invalid,
        ErrorCode::Forbidden,
        ErrorCode::RateLimited,
        ErrorCode::Unavailable,
        ErrorCode::Unknown,
        ErrorCode::Full,
        ErrorCode::Subscribed,
        ErrorCode::NotSubscribed,
        ErrorCode::TooMany,
        ErrorCode::Unauthorized,
    ];

    pub fn text(self) -> &'static str {
        match self {
            ErrorCode::Invalid => "invalid",
            ErrorCode::Forbidden => "forbidden",
            ErrorCode::RateLimited => "rate_limited",
            ErrorCode::Unavailable => "unavailable",
            ErrorCode::Unknown => "unknown",
            ErrorCode::Full => "full",
            ErrorCode::Subscribed => "subscribed",
            ErrorCode::NotSubscribed => "not_subscribed",
            ErrorCode::TooMany => "too_many",
            ErrorCode::Unauthorized => "unauthorized",
        }
    }
}

/// What an answer repeats of the frame that it answers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Regarding {
    /// The channel that the frame named.
    pub channel: Option<ChannelName>,
    /// The client's `ref`, as JSON text.
    pub reference: Option<Box<str>>,
}

/// The answer to a frame that was rejected.
pub fn error(code: ErrorCode, message: &str, regarding: &Regarding) -> Bytes {
    let (code, message) = (code.text(), serde_json::Value::from(message));
    let channel = regarding.channel.as_ref().map(|channel| format!(r#","channel":"{channel}""#));
    let (channel, reference) =
        (channel.unwrap_or_default(), reference_member(regarding.reference.as_deref()));
    let json = format!(r#"{{"type":"error","code":"{code}","message":{message}{channel}{reference}}}"#);
    text_frame(json.as_bytes())
}

fn reference_member(reference: Option<&str>) -> String {
    reference.map_or_else(String::new, |reference| format!(r#","ref":{reference}"#))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_of_a_plain_client_becomes_an_event() {
        assert_eq!(chat_event("a\"b", "hi\n\u{1}"), r#"{"sender":"a\"b","text":"hi\n\u0001"}"#);
    }

    #[test]
    fn messages_of_an_inbox_have_no_recipient() {
        let event = Event::by("a\"b", Some("bob")).with_text("to");
        assert_eq!(without_recipient(event, "a\"b", Some("bob")), r#"{"sender":"a\"b","text":"to"}"#);
        let event = chat_event("a", "hi");
        assert_eq!(without_recipient(event.clone(), "a", None), event);
    }

    #[test]
    fn control_frames_are_json() {
        let room = ChannelName::parse("room").expect("a name");
        let (none, one) = (Regarding::default(), Some("7".into()));
        let regarding = Regarding { channel: Some(room.clone()), reference: one };
        for (frame, expected) in [
            (
                welcome(EventId(1), EventId(2), true),
                r#"{"type":"welcome","lastEventId":1,"head":2,"recovered":true}"#,
            ),
            (welcome_without_channel(), r#"{"type":"welcome"}"#),
            (
                subscription_welcome(&room, EventId(1), EventId(2), false, Some("7")),
                r#"{"type":"welcome","channel":"room","lastEventId":1,"head":2,"recovered":false,"ref":7}"#,
            ),
            (
                unsubscribed(&room, "requested", Some("7")),
                r#"{"type":"unsubscribed","channel":"room","reason":"requested","ref":7}"#,
            ),
            (
                presence(None, &presence_list([Arc::from("a\"b")].iter(), 1)),
                r#"{"type":"presence","users":["a\"b"],"count":1}"#,
            ),
            (
                presence(Some(&room), &presence_change(&["a".into()], &[], 7)),
                r#"{"type":"presence","channel":"room","join":["a"],"leave":[],"count":7}"#,
            ),
            (ack("\"r\"", EventId(3).into()), r#"{"type":"ack","ref":"r","id":3}"#),
            (token_ack("7"), r#"{"type":"ack","ref":7}"#),
            (token_expiring(60), r#"{"type":"token_expiring","in":60}"#),
            (json_ping(None, [].into_iter()), r#"{"type":"ping"}"#),
            (json_ping(Some(EventId(4)), [].into_iter()), r#"{"type":"ping","lastEventId":4}"#),
            (
                json_ping(None, [(&room, EventId(4)), (&room, EventId(5))].into_iter()),
                r#"{"type":"ping","channels":{"room":4,"room":5}}"#,
            ),
            (
                error(ErrorCode::Invalid, "a \"quote\"", &regarding),
                r#"{"type":"error","code":"invalid","message":"a \"quote\"","channel":"room","ref":7}"#,
            ),
            (error(ErrorCode::TooMany, "x", &none), r#"{"type":"error","code":"too_many","message":"x"}"#),
        ] {
            assert_eq!(frame[0], 0x81);
            let text = if frame[1] == 126 { &frame[4..] } else { &frame[2..] };
            assert_eq!(std::str::from_utf8(text), Ok(expected));
        }
    }
}
