//! Messages and history turned into entries. The id of an event is the last member of its JSON, so it is read
//! from the end, without parsing the rest.

use std::borrow::Cow;
use std::sync::Arc;

use bytes::Bytes;

use crate::bus::Page;
use crate::protocol::event::{Entry, EventId};
use crate::protocol::ingest;

/// Prefix of a script's error about wrong data in one channel, as `run.lua` writes it. The key follows.
pub const FAULT: &str = "FAULT ";

/// The id of an event as clients see it.
pub fn id_of(line: &[u8]) -> Option<EventId> {
    let rest = line.strip_suffix(b"}")?;
    let digits = rest.iter().rev().take_while(|byte| byte.is_ascii_digit()).count();
    let (before, id) = rest.split_at(rest.len() - digits);
    if !before.ends_with(b"\"id\":") {
        return None;
    }
    EventId::parse(id).filter(|id| *id > EventId(0)) // before 0 there is nothing
}

/// The event as clients get it. All ways to publish check events, but other programs and older versions may have written
/// to the stream. An event that clients can't parse, or would take for a control frame, becomes `{"data":"its text"}` with
/// the same id.
fn readable(event: &[u8], id: EventId) -> Cow<'_, [u8]> {
    match ingest::readable(event) {
        Ok(()) => Cow::Borrowed(event),
        Err(bad) => {
            tracing::debug!(%id, "event in Redis is shown as text: {bad}");
            Cow::Owned(ingest::text_event(event, Some(id)).into_bytes())
        }
    }
}

/// The entry for a message of consecutive events, one a line. `None` for what is no such message.
pub fn broadcast(message: &[u8]) -> Option<Entry> {
    lines(message, None)
}

/// The entry for a message whose first line is the user and whose others are events for them.
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

/// Most bytes gathered in one entry of history: a slow socket gets it in pieces anyway.
const GATHER_BYTES: usize = 64 << 10;

/// Entries for events of history, in order: those for the same readers, where consecutive, gathered. An event that
/// shows no id is left out, and is a gap like any other.
pub fn entries(history: &[(Bytes, Option<Arc<str>>)]) -> Vec<Entry> {
    let mut entries = Vec::new();
    let mut run: Vec<Cow<'_, [u8]>> = Vec::new();
    let (mut next, mut size, mut to) = (EventId(0), 0, &None);
    let flush =
        |run: &mut Vec<Cow<'_, [u8]>>, next: EventId, to: &Option<Arc<str>>, entries: &mut Vec<Entry>| {
            if !run.is_empty() {
                let first = EventId(next.0 - run.len() as u64);
                entries.push(Entry::addressed(first, to.clone(), run.iter().map(|text| &**text)));
                run.clear();
            }
        };
    for (text, user) in history {
        let Some(id) = id_of(text) else { continue };
        let text = readable(text, id);
        if id != next || user != to || size > GATHER_BYTES {
            flush(&mut run, next, to, &mut entries);
            (size, to) = (0, user);
        }
        size += text.len();
        run.push(text);
        next = id.next();
    }
    flush(&mut run, next, to, &mut entries);
    entries
}

/// Makes the answer for a reader at `asked` hold what a page promises: consecutive events from there, perhaps with
/// some before them, or else an `oldest` that shows what is missing. Only someone who deletes from a stream, or writes
/// to it, makes that necessary.
pub fn whole(page: &mut Page, asked: EventId) {
    let entries = &mut page.entries;
    let breaks = |pair: &[Entry]| pair[0].last != pair[1].before();
    let next = entries.iter().position(|entry| entry.last > asked).unwrap_or(entries.len());
    let last = entries.windows(2).skip(next).position(breaks).map_or(entries.len(), |at| next + at + 1);
    entries.truncate(last);
    let first = entries.windows(2).take(next).rposition(breaks).map_or(0, |at| at + 1);
    entries.drain(..first);
    page.after = entries.first().map_or(asked, |first| first.before().min(asked));
    if asked >= page.head || page.oldest > asked.next() {
        return; // there is nothing, or it shows already
    }
    match entries.iter().find(|entry| entry.last > asked) {
        Some(next) if next.before() <= asked => {}
        Some(next) => page.oldest = next.before().next(),
        None => page.oldest = page.head.next(),
    }
}

/// A channel's base and head, or the fault in its data.
pub type Position<'a> = Result<(EventId, EventId), &'a str>;

/// A channel's line in a probe: its name and position.
pub fn canary_line(line: &str) -> Option<(&str, Position<'_>)> {
    let (channel, rest) = line.split_once(' ')?;
    if rest.starts_with(FAULT) {
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
    fn the_id_is_read_from_the_end() {
        assert_eq!(id_of(br#"{"text":"\"id\":5}","id":17}"#), Some(EventId(17)));
        for none in
            ["", "}", "{}", r#"{"id":}"#, r#"{"id":"17"}"#, r#"{"xid:17}"#, r#"{"id":17} "#, r#"{"id":0}"#]
        {
            assert_eq!(id_of(none.as_bytes()), None, "{none}");
        }
    }

    #[test]
    fn a_batch_whose_ids_do_not_fit_is_no_batch() {
        let entry = broadcast(b"{\"id\":7}\n{\"id\":8}").unwrap();
        assert_eq!((entry.before(), entry.last), (EventId(6), EventId(8)));
        assert!(broadcast(b"{\"id\":7}\n{\"id\":9}").is_none());
        assert!(broadcast(b"hello").is_none());
    }

    #[test]
    fn a_probe_line_is_a_position_or_a_fault() {
        assert_eq!(canary_line("room 5 7"), Some(("room", Ok((EventId(5), EventId(7))))));
        assert_eq!(canary_line("room FAULT p:{room}:meta: x"), Some(("room", Err("FAULT p:{room}:meta: x"))));
        for none in ["", "room", "room 5", "room 5 7 9", "room x 7", "room 5 9007199254740992"] {
            assert_eq!(canary_line(none), None, "{none}");
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
    fn history_gathers_runs_and_keeps_order() {
        let users = [None, None, Some("bob"), Some("bob"), Some("eve"), None];
        let event = |(id, user): (usize, &Option<&str>)| {
            (Bytes::from(format!(r#"{{"id":{}}}"#, id + 1)), user.map(Arc::from))
        };
        let history: Vec<_> = users.iter().enumerate().map(event).collect();
        let shape: Vec<_> = entries(&history).iter().map(|entry| (entry.before().0, entry.last.0)).collect();
        assert_eq!(shape, [(0, 2), (2, 4), (4, 5), (5, 6)]);
    }

    #[test]
    fn a_page_from_which_someone_deleted_shows_it() {
        let page = |ids: &[u64]| {
            let event = |id: &u64| (Bytes::from(format!(r#"{{"id":{id}}}"#)), None);
            let history: Vec<_> = ids.iter().map(event).collect();
            let mut page = Page {
                after: EventId(0),
                base: EventId(1),
                head: EventId(9),
                oldest: EventId(2),
                entries: entries(&history),
            };
            whole(&mut page, EventId(4));
            (page.oldest.0, page.entries.last().map_or(0, |entry| entry.last.0))
        };
        assert_eq!(page(&[5, 6, 7]), (2, 7));
        assert_eq!(page(&[6, 7]), (6, 7));
        assert_eq!(page(&[5, 7]), (2, 5));
        assert_eq!(page(&[]), (10, 0));
    }
}
