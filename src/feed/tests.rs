use super::*;
use proptest::prelude::*;

fn event(id: u64) -> Entry {
    events(id, 1)
}

fn events(first: u64, count: u64) -> Entry {
    let texts: Vec<String> = (first..first + count).map(|id| format!(r#"{{"id":{id}}}"#)).collect();
    Entry::events(EventId(first), texts.iter().map(|text| text.as_bytes()))
}

fn private(id: u64, user: &str) -> Entry {
    let text = format!(r#"{{"to":"{user}","id":{id}}}"#);
    Entry::addressed(EventId(id), Some(user.into()), [text.as_bytes()].into_iter())
}

fn reader(user: &str) -> Reader<'_> {
    Reader { user, live_from: 0 }
}

#[test]
fn finds_events_after_positions_inside_entries() {
    let mut feed = Feed::new(EventId(100), EventId(100));
    feed.append(events(101, 3));
    feed.append(event(104));
    let frame = 2 + r#"{"id":101}"#.len() as u32;
    assert_eq!(feed.find(EventId(100)), Lookup::Found(Cursor { entry: 0, offset: 0 }));
    assert_eq!(feed.find(EventId(101)), Lookup::Found(Cursor { entry: 0, offset: frame }));
    assert_eq!(feed.find(EventId(102)), Lookup::Found(Cursor { entry: 0, offset: 2 * frame }));
    assert_eq!(feed.find(EventId(103)), Lookup::Found(Cursor { entry: 1, offset: 0 }));
    assert_eq!(feed.find(EventId(104)), Lookup::Found(Cursor { entry: 2, offset: 0 }));
    assert_eq!(feed.find(EventId(105)), Lookup::Ahead);
    assert_eq!(feed.find(EventId(99)), Lookup::Discontinuous);
    feed.evict();
    assert_eq!(feed.find(EventId(102)), Lookup::Evicted);
    assert_eq!(feed.find(EventId(103)), Lookup::Found(Cursor { entry: 1, offset: 0 }));
}

#[test]
fn positions_before_a_reset_are_discontinuous() {
    let mut feed = Feed::new(EventId(1), EventId(1));
    feed.append(event(2));
    feed.append(Entry::reset(EventId(50)));
    feed.append(event(51));
    assert_eq!(feed.find(EventId(2)), Lookup::Discontinuous);
    assert_eq!(feed.find(EventId(49)), Lookup::Discontinuous);
    assert_eq!(feed.find(EventId(50)), Lookup::Found(Cursor { entry: 2, offset: 0 }));
}

#[test]
fn entries_for_others_can_be_evicted_unread() {
    let mut feed = Feed::new(EventId(1), EventId(1));
    feed.append(private(2, "bob"));
    feed.append(private(3, "bob"));
    feed.append(event(4));
    feed.evict();
    assert!(feed.holds_all_from(0, "alice"));
    feed.evict();
    feed.evict();
    assert!(!feed.holds_all_from(2, "alice"));
    assert!(feed.holds_all_from(3, "alice"));
}

#[test]
fn remembers_evictions_during_a_private_fan_out() {
    let mut feed = Feed::new(EventId(1), EventId(1));
    feed.append(private(2, "bob"));
    feed.start_delivery("bob".into());
    feed.append(private(3, "bob"));
    assert!(feed.holds_all_from(0, "bob"));
    feed.evict();
    assert!(!feed.holds_all_from(0, "bob"));
    assert!(feed.holds_all_from(1, "bob") && feed.holds_all_from(0, "alice"));
    feed.finish_delivery("bob");
    feed.evict();
    assert!(feed.holds_all_from(1, "bob"));
}

#[test]
fn events_without_id_are_not_replayed() {
    let mut feed = Feed::new(EventId(1), EventId(1));
    feed.append(Entry::without_id(EventId(1), b"{}"));
    feed.append(event(2));
    assert_eq!(feed.next_for(0, Reader { live_from: 2, ..reader("alice") }), Some(1));
    assert_eq!(feed.next_for(0, reader("alice")), Some(0));
}

proptest! {
    /// After any appends and evictions, a reader at any position that the feed covers gets exactly
    /// the later events for it, in order.
    #[test]
    fn a_reader_gets_exactly_its_events(
        shapes in prop::collection::vec((0u8..5, 1u64..5), 1..60),
        evictions in 0usize..30,
        skip in 0u64..120,
    ) {
        let mut feed = Feed::new(EventId(1000), EventId(1000));
        let mut mine = Vec::new();
        for (shape, count) in shapes {
            let next = feed.position().0 + 1;
            match shape {
                0 => feed.append(private(next, "bob")),
                1 => {
                    feed.append(private(next, "alice"));
                    mine.push(next);
                }
                2 => feed.append(Entry::without_id(feed.position(), b"{}")),
                _ => {
                    feed.append(events(next, count));
                    mine.extend(next..next + count);
                }
            }
        }
        for _ in 0..evictions {
            feed.evict();
        }
        let position = EventId(1000 + skip);
        match feed.find(position) {
            Lookup::Ahead => prop_assert!(position > feed.position()),
            Lookup::Evicted => prop_assert!(position < feed.before()),
            Lookup::Discontinuous => prop_assert!(false, "there was no reset"),
            Lookup::Found(mut cursor) => {
                let reader = Reader { user: "alice", live_from: feed.end() };
                let mut seen = Vec::new();
                while let Some(number) = feed.next_for(cursor.entry, reader) {
                    let offset = if number == cursor.entry { cursor.offset } else { 0 };
                    let entry = feed.get(number).unwrap();
                    let first = entry.before().0 + 1 + entry.frames_until(offset) as u64 * u64::from(offset > 0);
                    seen.extend(first..=entry.last.0);
                    cursor = Cursor { entry: number + 1, offset: 0 };
                }
                let expected: Vec<u64> = mine.iter().copied().filter(|id| *id > position.0).collect();
                prop_assert_eq!(seen, expected);
            }
        }
    }

    /// The indexes find the same entries as a linear search, for every reader and number, and
    /// shrink with the feed.
    #[test]
    fn indexes_agree_with_a_linear_search(steps in prop::collection::vec(0u8..8, 1..200)) {
        let mut feed = Feed::new(EventId(1000), EventId(1000));
        for step in steps {
            let next = feed.position().0 + 1;
            match step {
                0 | 1 => feed.append(private(next, "alice")),
                2 | 3 => feed.append(private(next, "bob")),
                4 => feed.append(event(next)),
                5 => feed.append(Entry::without_id(feed.position(), b"{}")),
                6 => feed.append(Entry::reset(EventId(next))),
                _ => drop(feed.evict()),
            }
        }
        for user in ["alice", "bob", "carol"] {
            for live_from in [0, feed.start() + 3, feed.end()] {
                let reader = Reader { user, live_from };
                for number in 0..=feed.end() {
                    let searched = (number.max(feed.start())..feed.end())
                        .find(|number| is_for(feed.get(*number).unwrap(), *number, reader));
                    prop_assert_eq!(feed.next_for(number, reader), searched, "{:?} at {}", reader, number);
                }
            }
        }
        while feed.evict().is_some() {}
        prop_assert!(feed.public.is_empty() && feed.without_id.is_empty() && feed.private.is_empty());
    }
}
