//! Fan-outs: how much is written in a turn, who comes first, and events without id when memory is
//! short.

use super::super::Shard;
use super::super::deferred::CONNECTIONS_A_TURN;
use super::super::fanout::WRITES;
use super::testbed::{CLIENTS, Client, Mode, Testbed, masked};
use crate::bus::Request;
use crate::protocol::event::{Entry, EventId};
use crate::ws::connection::State;

/// A turn makes a bounded number of writes, and a burst takes each connection few writes, for
/// events of every kind.
#[test]
fn a_burst_is_written_in_turns() {
    const READERS: usize = 600;
    let _ = rlimit::increase_nofile_limit(u64::MAX);
    let mut testbed = Testbed::new();
    let mut readers: Vec<_> = (0..READERS).map(|_| testbed.connect(2, Some(1000), None)).collect();
    let drain = |readers: &mut Vec<Client>| {
        for reader in readers {
            reader.peer.skip();
        }
    };
    let live = |shard: &Shard| {
        let is_live = |slot: &u32| matches!(shard.connections[*slot].state, State::Live);
        shard.connections.slots().filter(is_live).count()
    };
    while live(&testbed.shard) < READERS + CLIENTS.len() {
        testbed.turn();
        testbed.answer();
    }
    for name in ["public", "private", "without_id", "mixed"] {
        drain(&mut readers);
        while testbed.shard.has_deferred() {
            testbed.shard.run_deferred();
        }
        for n in 0..30 {
            match (name, n % 3) {
                ("without_id", _) | ("mixed", 0) => {
                    testbed.deliver(Entry::without_id(EventId(testbed.source.head), b"{}"))
                }
                ("private", _) | ("mixed", 1) => {
                    testbed.source.publish(Some("alice".to_owned()), 0);
                    testbed.deliver_from(testbed.source.head);
                }
                _ => {
                    testbed.source.publish(None, 0);
                    testbed.deliver_from(testbed.source.head);
                }
            }
        }
        let (mut total, mut turns) = (0, 0);
        while testbed.shard.has_deferred() {
            let before = testbed.shard.tally.writes;
            testbed.shard.run_deferred();
            let writes = testbed.shard.tally.writes - before;
            assert!(writes <= WRITES, "{name}: {writes} writes in a turn");
            (total, turns) = (total + writes, turns + 1);
        }
        let most = READERS + CLIENTS.len();
        assert!(
            total >= READERS as u64 && total <= 2 * most as u64,
            "{name}: {total} writes in {turns} turns"
        );
    }
}

/// A shard with all clients in its channel.
fn with_members() -> Testbed {
    let mut testbed = Testbed::new();
    let follows = |testbed: &Testbed| {
        let key = testbed.shard.channels.key(&testbed.channel.clone().into());
        key.is_some_and(|key| testbed.shard.channels[key].members.len() == CLIENTS.len())
    };
    while !follows(&testbed) || testbed.shard.has_deferred() {
        testbed.turn();
        testbed.answer();
    }
    testbed
}

#[test]
fn a_sender_gets_its_event_before_the_fan_out() {
    let mut testbed = with_members();
    testbed.source.publish(None, 0);
    testbed.deliver_from(testbed.source.head);
    while testbed.shard.has_deferred() {
        testbed.turn();
    }
    for client in &mut testbed.clients {
        client.peer.skip();
        client.peer.upgraded = true;
    }
    let sender = CLIENTS.iter().position(|(_, mode)| *mode == Mode::Plain).expect("a plain client");
    testbed.clients[sender].peer.send(&masked(1, b"hi"));
    testbed.ready(0, usize::MAX);
    testbed.answer();
    for (number, client) in testbed.clients.iter_mut().enumerate() {
        assert_eq!(client.peer.skip(), number == sender, "client {number}");
    }
}

/// In a storm a message does not wait until all handshakes are done, nor does the next look for
/// messages and events.
#[test]
fn messages_are_read_before_handshakes() {
    const STORM: usize = 100;
    let mut testbed = with_members();
    testbed.clients[0].peer.skip();
    testbed.clients[0].peer.upgraded = true;
    let _storm: Vec<_> = (0..STORM).map(|_| testbed.connect(2, None, None)).collect();
    testbed.clients[0].peer.send(&masked(1, br#"{"text":"hi"}"#));
    testbed.ready(0, usize::MAX);
    assert!(matches!(testbed.requests.try_recv(), Ok(Request::Publish(_))));
    let upgraded = |testbed: &Testbed| testbed.shard.metrics().upgraded.get() as usize - CLIENTS.len();
    assert_eq!(upgraded(&testbed), 0, "handshakes are put off");
    let mut before = 0;
    while upgraded(&testbed) < STORM {
        testbed.shard.run_deferred();
        let done = upgraded(&testbed) - before;
        assert!((1..=CONNECTIONS_A_TURN).contains(&done), "{done} handshakes in a turn");
        before += done;
    }
}

/// Delivers events without id of these sizes, all before the first turn or each before one. Returns
/// how many of them each client received.
fn deliver_events_without_id(sizes: &[usize], with_turns: bool) -> (Testbed, Vec<usize>) {
    let mut testbed = with_members();
    for size in sizes {
        let text = format!(r#"{{"plain":"{}"}}"#, "x".repeat(*size));
        testbed.deliver(Entry::without_id(EventId(testbed.source.head), text.as_bytes()));
        if with_turns {
            testbed.turn();
        }
    }
    let mut counts = vec![0; CLIENTS.len()];
    let mut idle_turns = 0;
    while idle_turns < 3 {
        idle_turns += 1;
        testbed.turn();
        for (client, count) in testbed.clients.iter_mut().zip(&mut counts) {
            while client.peer.read(64 * 1024) {
                idle_turns = 0;
            }
            while let Some((_, text)) = client.peer.next_frame() {
                *count += usize::from(text.starts_with(b"{\"plain\""));
            }
        }
    }
    (testbed, counts)
}

#[test]
fn event_without_id_longer_than_the_feed_reaches_all() {
    let (mut testbed, counts) = deliver_events_without_id(&[100, 40 * 1024], false);
    assert_eq!(counts, [2; CLIENTS.len()]);
    testbed.shard.on_tick();
    assert!(testbed.shard.channels.feed_bytes() <= 8 * 1024, "its memory is freed after the delivery");
    testbed.shard.end_turn();
    assert_eq!(testbed.shard.metrics().pubsub_misses.get(), 0);
}

#[test]
fn events_without_id_beyond_the_feed_reach_all() {
    let (testbed, counts) = deliver_events_without_id(&[1000; 13], false);
    assert_eq!(counts, [13; CLIENTS.len()]);
    assert!(testbed.shard.tally.pubsub_misses == 0 && testbed.shard.channels.feed_bytes() > 8 * 1024);
}

#[test]
fn missed_events_without_id_are_counted_per_client() {
    // More than feeds may hold in one turn.
    let (mut testbed, counts) = deliver_events_without_id(&[1000; 40], false);
    assert!(counts.iter().all(|count| (7..40).contains(count)), "{counts:?}");
    testbed.shard.end_turn();
    assert_eq!(testbed.shard.metrics().pubsub_misses.get(), CLIENTS.len() as u64);
    // Sockets that were full while events were evicted.
    let (mut testbed, counts) = deliver_events_without_id(&[1000; 60], true);
    assert!(counts.iter().all(|count| *count < 60), "{counts:?}");
    testbed.shard.end_turn();
    assert!(testbed.shard.metrics().pubsub_misses.get() >= CLIENTS.len() as u64);
}
