//! Newcomers that ask for events from before, when the feed no longer holds them.

use std::sync::Arc;

use serde_json::Value;

use super::super::*;
use super::testbed::Testbed;
use crate::bus::Page;
use crate::protocol::event::{Entry, EventId};

/// Larger than the part of the feed that a few of them leave.
const SIZE: usize = 300;

/// A shard that follows its channel and has evicted the first of 90 events, of which history holds
/// 60. Client 2 joins and asks for 100: from a block before theirs.
fn joining() -> Testbed {
    let mut testbed = Testbed::new();
    while !testbed.is_followed {
        testbed.turn();
        testbed.answer();
    }
    for _ in 0..90 {
        testbed.source.publish(None, SIZE);
        testbed.deliver_from(testbed.source.head);
        testbed.turn();
    }
    testbed.answer();
    testbed.clients[2] = testbed.connect(2, None, Some(100));
    testbed.turn();
    testbed
}

/// The first frame that client 2 gets, and the ids of the events after it.
fn received(testbed: &mut Testbed) -> (Value, Vec<u64>) {
    let mut frames = Vec::new();
    while frames.last().is_none_or(|last: &Value| last["id"] != testbed.source.head) {
        testbed.answer();
        testbed.turn();
        testbed.shard.on_tick();
        let peer = &mut testbed.clients[2].peer;
        peer.read(8192);
        while let Some((opcode, text)) = peer.next_frame() {
            if opcode == 1 {
                frames.push(serde_json::from_slice(&text).expect("JSON"));
            }
        }
    }
    let ids = frames.iter().filter_map(|frame| frame["id"].as_u64()).collect();
    (frames.swap_remove(0), ids)
}

fn assert_starts_after(testbed: &mut Testbed, start: u64) {
    let head = testbed.source.head;
    let (welcome, ids) = received(testbed);
    let found = ["lastEventId", "head"].map(|name| welcome[name].as_u64());
    assert_eq!((found, &welcome["recovered"]), ([Some(start), Some(head)], &Value::Bool(true)));
    assert_eq!(ids, Vec::from_iter(start + 1..=head));
}

#[test]
fn newcomers_get_all_that_history_holds() {
    let mut testbed = joining();
    let start = testbed.source.oldest() - 1;
    assert!(start > 1023 && testbed.source.head - 100 < 1023, "in two blocks");
    assert_starts_after(&mut testbed, start);
}

#[test]
fn newcomers_share_a_read() {
    let mut testbed = joining();
    testbed.clients[4] = testbed.connect(4, None, Some(95));
    testbed.turn();
    assert!(matches!(testbed.requests.try_recv(), Ok(Request::Read { .. })));
    assert!(testbed.requests.try_recv().is_err(), "one read is for both");
}

#[test]
fn newcomers_start_later_if_history_is_trimmed() {
    let mut testbed = joining();
    let Ok(Request::Read { channel, position, .. }) = testbed.requests.try_recv() else {
        panic!("it asks for history")
    };
    let empty = |testbed: &Testbed, position| Page {
        named: Default::default(),
        after: position,
        base: EventId(testbed.source.base),
        head: EventId(testbed.source.head),
        oldest: EventId(testbed.source.oldest()),
        entries: Vec::new(),
    };
    let result = Ok(Arc::new(empty(&testbed, position)));
    testbed.shard.on_bus_message(BusMessage::Page { channel: channel.into(), position, result });
    testbed.turn();
    // The second read comes after more events, which trim what the first has reported.
    for _ in 0..20 {
        testbed.source.publish(None, SIZE);
        testbed.deliver_from(testbed.source.head);
    }
    let start = testbed.source.oldest() - 1;
    assert_starts_after(&mut testbed, start);
}

/// History has already dropped events that the feed is about to get.
#[test]
fn newcomers_start_at_the_head_if_history_is_ahead() {
    let mut testbed = joining();
    let head = testbed.source.head;
    let mut late = Vec::new();
    for _ in 0..62 {
        testbed.source.publish(None, 0);
        let (id, _, text) = testbed.source.history.back().expect("it was published");
        late.push(Entry::events(EventId(*id), [text.as_bytes()].into_iter()));
    }
    for _ in 0..3 {
        testbed.answer();
        testbed.turn();
    }
    for entry in late {
        testbed.deliver(entry);
        testbed.turn();
    }
    let (welcome, ids) = received(&mut testbed);
    assert_eq!((&welcome["lastEventId"], &welcome["head"]), (&head.into(), &head.into()));
    assert_eq!((ids, &welcome["recovered"]), (Vec::from_iter(head + 1..=head + 62), &true.into()));
}

/// History that says nothing about the position must not be guessed at.
#[test]
fn newcomers_without_proof_start_at_the_feed() {
    let mut testbed = joining();
    let Ok(Request::Read { channel, position, .. }) = testbed.requests.try_recv() else {
        panic!("it asks for history")
    };
    let page = Page {
        named: Default::default(),
        after: position,
        base: EventId(testbed.source.base),
        head: EventId(testbed.source.head),
        oldest: position.next(),
        entries: Vec::new(),
    };
    let start = testbed.shard.channels[0].feed().before().0;
    assert!(start > testbed.source.oldest());
    testbed.shard.on_bus_message(BusMessage::Page {
        channel: channel.into(),
        position,
        result: Ok(Arc::new(page)),
    });
    assert_starts_after(&mut testbed, start);
}
