//! The two forms of a channel's events: as they were published, and with the name of the channel as
//! first member, for sockets that follow several channels.

use std::borrow::Cow;
use std::fmt;

use serde::Deserializer;
use serde::de::{MapAccess, Visitor};
use serde_json::value::RawValue;

use crate::protocol::event::{ChannelName, Entry, EventId, Kind};

/// Whether the events of a channel name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Form {
    /// As they were published.
    Unnamed,
    /// With `"channel"` as first member.
    Named,
}

/// A channel in one of its forms.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChannelForm {
    pub name: ChannelName,
    pub form: Form,
}

impl ChannelForm {
    pub fn named(name: ChannelName) -> ChannelForm {
        ChannelForm { name, form: Form::Named }
    }
}

impl From<ChannelName> for ChannelForm {
    fn from(name: ChannelName) -> ChannelForm {
        ChannelForm { name, form: Form::Unnamed }
    }
}

/// The same events with their channel as first member.
pub fn named(entry: &Entry, channel: &ChannelName) -> Entry {
    if entry.kind == Kind::Reset {
        return reset(channel, entry.last);
    }
    let start = format!(r#"{{"channel":"{channel}""#);
    entry.rewritten(start.len() + 1, |event, out| {
        out.extend_from_slice(start.as_bytes());
        let members = match may_name_channel(event) {
            true => other_members(event),
            false => members(event).map(Cow::Borrowed),
        };
        match members.as_deref() {
            Some(b"}") | None => out.push(b'}'),
            Some(members) => {
                out.push(b',');
                out.extend_from_slice(members);
            }
        }
    })
}

/// As [`Entry::reset`], of this channel.
pub fn reset(channel: &ChannelName, position: EventId) -> Entry {
    Entry::reset_as(
        position,
        &format!(r#"{{"type":"reset","channel":"{channel}","lastEventId":{position}}}"#),
    )
}

/// What follows the first brace of an object.
fn members(event: &[u8]) -> Option<&[u8]> {
    event.trim_ascii_start().strip_prefix(b"{").map(<[u8]>::trim_ascii_start)
}

/// Whether an event may have a member `channel` of its own: it has that name as a string, or an
/// escape in which the name may be written.
fn may_name_channel(event: &[u8]) -> bool {
    std::str::from_utf8(event).is_ok_and(|text| text.contains("\"channel\"") || text.contains("\\u"))
}

/// The members of an object without its own `channel`, and the brace after them. Names of members
/// stay unique that way (RFC 7493).
fn other_members(event: &[u8]) -> Option<Cow<'_, [u8]>> {
    let mut deserializer = serde_json::Deserializer::from_slice(event);
    let mut others = deserializer.deserialize_map(OtherMembers).ok()?;
    others.push(b'}');
    Some(Cow::Owned(others))
}

struct OtherMembers;

impl<'de> Visitor<'de> for OtherMembers {
    type Value = Vec<u8>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Vec<u8>, A::Error> {
        let mut others = Vec::new();
        while let Some((name, value)) = members.next_entry::<Cow<'_, str>, &RawValue>()? {
            if name == "channel" {
                continue;
            }
            if !others.is_empty() {
                others.push(b',');
            }
            serde_json::to_writer(&mut others, &name).expect("a string is always JSON");
            others.push(b':');
            others.extend_from_slice(value.get().as_bytes());
        }
        Ok(others)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(entry: &Entry) -> Vec<String> {
        entry.texts().map(|text| String::from_utf8(text.to_vec()).expect("UTF-8")).collect()
    }

    fn room() -> ChannelName {
        ChannelName::parse("room.1").expect("a name")
    }

    #[test]
    fn channel_is_the_first_member_and_id_the_last() {
        let given: [&[u8]; 6] = [
            br#"{"sender":"a","text":"hi","id":7}"#,
            br#" { "text":"\"channel\"","id":8}"#,
            br#"{"channel":"mine","n":1.50,"id":9}"#,
            br#"{"n":{"channel":1},"\u0063hannel":[2, 3],"id":10}"#,
            br#"{"text":"\u00e9","a\u0022b":1,"id":11}"#,
            br#"{"id":12}"#,
        ];
        let entry = Entry::addressed(EventId(7), Some("bob".into()), given.into_iter());
        let named = named(&entry, &room());
        assert_eq!(
            texts(&named),
            [
                r#"{"channel":"room.1","sender":"a","text":"hi","id":7}"#,
                r#"{"channel":"room.1","text":"\"channel\"","id":8}"#,
                r#"{"channel":"room.1","n":1.50,"id":9}"#,
                r#"{"channel":"room.1","n":{"channel":1},"id":10}"#,
                r#"{"channel":"room.1","text":"\u00e9","a\"b":1,"id":11}"#,
                r#"{"channel":"room.1","id":12}"#,
            ]
        );
        assert_eq!((named.kind, named.last, entry.before()), (entry.kind.clone(), entry.last, EventId(6)));
    }

    #[test]
    fn events_without_id_and_resets_have_a_named_form() {
        for (event, expected) in [
            ("{}", r#"{"channel":"room.1"}"#),
            (r#"{"channel":1}"#, r#"{"channel":"room.1"}"#),
            (r#"{"a":1}"#, r#"{"channel":"room.1","a":1}"#),
        ] {
            assert_eq!(texts(&named(&Entry::without_id(EventId(3), event.as_bytes()), &room())), [expected]);
        }
        let reset = named(&Entry::reset(EventId(5)), &room());
        assert_eq!(texts(&reset), [r#"{"type":"reset","channel":"room.1","lastEventId":5}"#]);
        assert_eq!((reset.kind.clone(), reset.before(), reset.last), (Kind::Reset, EventId(4), EventId(5)));
    }
}
