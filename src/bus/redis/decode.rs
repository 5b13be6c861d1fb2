//! Pub/Sub messages and history, decoded into entries. The id of an event is the last member of its
//! JSON, so it is read from the end without parsing the rest.

use std::borrow::Cow;
use std::sync::Arc;

use bytes::Bytes;

use super::errors::{FAULT, is_temporary};
use crate::bus::page::Page;
use crate::protocol::event::{Entry, EventId};
use crate::protocol::ingest;

/// The id of an event in the form that clients get.
pub fn id_of(line: &[u8]) -> Option<EventId> {
    let rest = line.strip_suffix(b"}")?;
    let digits = rest.iter().rev().take_while(|byte| byte.is_ascii_digit()).count();
    let (before, id) = rest.split_at(rest.len() - digits);
    if !before.ends_with(b"\"id\":") {
        return None;
    }
    EventId::parse(id).filter(|id| *id > EventId(0)) // ids start above 0
}

/// The event in the form that clients get. Every way to publish checks events, but other programs
/// and older versions may have written to the stream. An event that clients can't parse, or would
/// take for a control frame, becomes `{"data":"its text"}` with the same id.
fn readable(event: &[u8], id: EventId) -> Cow<'_, [u8]> {
    match ingest::readable(event) {
        Ok(()) => Cow::Borrowed(event),
        Err(error) => {
            tracing::debug!(%id, "sent invalid event from Redis as text: {error}");
            Cow::Owned(ingest::text_event(event, Some(id)).into_bytes())
        }
    }
}

/// The entry of a message with consecutive events, one per line. `None` for any other message.
pub fn broadcast(message: &[u8]) -> Option<Entry> {
    lines(message, None)
}

/// The entry of a message whose first line is a user and whose other lines are events for this
/// user.
pub fn private(message: &[u8]) -> Option<Entry> {
    let at = message.iter().position(|byte| *byte == b'\n')?;
    let user = String::from_utf8_lossy(&message[..at]);
    lines(&message[at + 1..], Some(user.into()))
}

fn lines(text: &[u8], to: Option<Arc<str>>) -> Option<Entry> {
    let mut lines = text.split(|byte| *byte == b'\n');
    let first = id_of(lines.clone().next()?)?;
    let ids = (first.0..).map(EventId);
    let events: Vec<Cow<'_, [u8]>> = lines.clone().zip(ids).map(|(line, id)| readable(line, id)).collect();
    let entry = Entry::addressed(first, to, events.iter().map(|event| &**event));
    let last = if entry.frames() == 1 { first } else { id_of(lines.next_back()?)? };
    (entry.last == last).then_some(entry)
}

/// Most bytes of events in one entry of history.
const ENTRY_BYTES: usize = 64 << 10;

/// The entries of a history, in order. Consecutive events with the same recipients share an entry.
/// An event without id is left out, and is a gap like any other.
pub fn entries(history: &[(Bytes, Option<Arc<str>>)]) -> Vec<Entry> {
    let mut entries = Vec::new();
    let mut texts: Vec<Cow<'_, [u8]>> = Vec::new();
    let (mut next, mut size, mut to) = (EventId(0), 0, &None);
    let flush =
        |texts: &mut Vec<Cow<'_, [u8]>>, next: EventId, to: &Option<Arc<str>>, entries: &mut Vec<Entry>| {
            if !texts.is_empty() {
                let first = EventId(next.0 - texts.len() as u64);
                entries.push(Entry::addressed(first, to.clone(), texts.iter().map(|text| &**text)));
                texts.clear();
            }
        };
    for (text, user) in history {
        let Some(id) = id_of(text) else { continue };
        let text = readable(text, id);
        if id != next || user != to || size > ENTRY_BYTES {
            flush(&mut texts, next, to, &mut entries);
            (size, to) = (0, user);
        }
        size += text.len();
        texts.push(text);
        next = id.next();
    }
    flush(&mut texts, next, to, &mut entries);
    entries
}

/// Makes a page for a reader at `asked` consistent: consecutive events from there, perhaps with
/// some before them, or an `oldest` that shows what is missing. Needed only where another program
/// has deleted from the stream or written to it.
pub fn make_consistent(page: &mut Page, asked: EventId) {
    let entries = &mut page.entries;
    let breaks = |pair: &[Entry]| pair[0].last != pair[1].before();
    let next = entries.iter().position(|entry| entry.last > asked).unwrap_or(entries.len());
    let last = entries.windows(2).skip(next).position(breaks).map_or(entries.len(), |at| next + at + 1);
    entries.truncate(last);
    let first = entries.windows(2).take(next).rposition(breaks).map_or(0, |at| at + 1);
    entries.drain(..first);
    page.after = entries.first().map_or(asked, |first| first.before().min(asked));
    if asked >= page.head || page.oldest > asked.next() {
        return; // there is nothing to show, or `oldest` shows it already
    }
    match entries.iter().find(|entry| entry.last > asked) {
        Some(next) if next.before() <= asked => {}
        Some(next) => page.oldest = next.before().next(),
        None => page.oldest = page.head.next(),
    }
}

/// A channel's base and head, or the fault in its data.
pub type ProbedPosition<'a> = Result<(EventId, EventId), &'a str>;

/// A channel's line in a probe: its name and position.
pub fn probe_line(line: &str) -> Option<(&str, ProbedPosition<'_>)> {
    let (channel, rest) = line.split_once(' ')?;
    if rest.starts_with(FAULT) || is_temporary(rest) {
        return Some((channel, Err(rest)));
    }
    let (base, head) = rest.split_once(' ')?;
    Some((channel, Ok((EventId::parse(base.as_bytes())?, EventId::parse(head.as_bytes())?))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::event::Kind;

    #[test]
    fn reads_the_id_from_the_end() {
        assert_eq!(id_of(br#"{"text":"\"id\":5}","id":17}"#), Some(EventId(17)));
        for none in
            ["", "}", "{}", r#"{"id":}"#, r#"{"id":"17"}"#, r#"{"xid:17}"#, r#"{"id":17} "#, r#"{"id":0}"#]
        {
            assert_eq!(id_of(none.as_bytes()), None, "{none}");
        }
    }

    #[test]
    fn rejects_messages_with_wrong_ids() {
        let entry = broadcast(b"{\"id\":7}\n{\"id\":8}").unwrap();
        assert_eq!((entry.before(), entry.last), (EventId(6), EventId(8)));
        assert!(broadcast(b"{\"id\":7}\n{\"id\":9}").is_none());
        assert!(broadcast(b"hello").is_none());
    }

    #[test]
    fn probe_line_is_a_position_or_a_fault() {
        assert_eq!(probe_line("room 5 7"), Some(("room", Ok((EventId(5), EventId(7))))));
        assert_eq!(probe_line("room FAULT p:{room}:meta: x"), Some(("room", Err("FAULT p:{room}:meta: x"))));
        for none in ["", "room", "room 5", "room 5 7 9", "room x 7", "room 5 9007199254740992"] {
            assert_eq!(probe_line(none), None, "{none}");
        }
    }

    #[test]
    fn private_events_share_a_message() {
        let entry = private(b"bob\n{\"id\":7}\n{\"id\":8}").unwrap();
        assert_eq!((entry.before(), entry.last, entry.frames()), (EventId(6), EventId(8), 2));
        assert_eq!(entry.kind, Kind::Private("bob".into()));
        assert!(private(b"bob\n{\"id\":7}\n{\"id\":9}").is_none());
        assert!(private(b"bob").is_none());
    }

    #[test]
    fn consecutive_events_share_an_entry() {
        let users = [None, None, Some("bob"), Some("bob"), Some("eve"), None];
        let event = |(id, user): (usize, &Option<&str>)| {
            (Bytes::from(format!(r#"{{"id":{}}}"#, id + 1)), user.map(Arc::from))
        };
        let history: Vec<_> = users.iter().enumerate().map(event).collect();
        let shape: Vec<_> = entries(&history).iter().map(|entry| (entry.before().0, entry.last.0)).collect();
        assert_eq!(shape, [(0, 2), (2, 4), (4, 5), (5, 6)]);
    }

    #[test]
    fn page_shows_deleted_events() {
        let page = |ids: &[u64]| {
            let event = |id: &u64| (Bytes::from(format!(r#"{{"id":{id}}}"#)), None);
            let history: Vec<_> = ids.iter().map(event).collect();
            let mut page = Page {
                named: Default::default(),
                after: EventId(0),
                base: EventId(1),
                head: EventId(9),
                oldest: EventId(2),
                entries: entries(&history),
            };
            make_consistent(&mut page, EventId(4));
            (page.oldest.0, page.entries.last().map_or(0, |entry| entry.last.0))
        };
        assert_eq!(page(&[5, 6, 7]), (2, 7));
        assert_eq!(page(&[6, 7]), (6, 7));
        assert_eq!(page(&[5, 7]), (2, 5));
        assert_eq!(page(&[]), (10, 0));
    }
}
