//! What a connection with many channels may make its shard do.

use std::sync::Arc;

use super::super::*;
use super::testbed::{Testbed, masked};
use crate::bus::Page;
use crate::protocol::event::{ChannelName, EventId};
use crate::protocol::form::ChannelForm;
use crate::ws::connection::State;
use crate::ws::inbound::QUEUE_MAX;

/// Channels that the client subscribes to.
const CHANNELS: u64 = 20;

/// A shard where client 0 is live, with events from 1000 to 5000 in history.
fn live() -> Testbed {
    let mut testbed = Testbed::new();
    testbed.source.head = 5000;
    while !matches!(testbed.shard.connections[0].state, State::Live) || testbed.shard.has_deferred() {
        testbed.turn();
        testbed.answer();
    }
    testbed.clients[0].peer.skip();
    testbed.clients[0].peer.upgraded = true;
    testbed
}

/// Client 0 subscribes to all channels. `rest` of their frames follows the name.
fn subscribe(testbed: &mut Testbed, rest: &str) {
    for number in 0..CHANNELS {
        let frame = format!(r#"{{"type":"subscribe","channel":"room.{number}"{rest}}}"#);
        testbed.clients[0].peer.send(&masked(1, frame.as_bytes()));
        testbed.turn();
    }
}

/// Answers that a channel is followed, whose history is older than what this shard has.
fn follow(testbed: &mut Testbed, channel: ChannelForm) {
    let (base, position) = (EventId(1000), EventId(5000));
    testbed.shard.on_bus_message(BusMessage::Followed { channel, base, position, recent: Vec::new() });
}

fn joining(testbed: &Testbed) -> usize {
    let set = testbed.shard.connections.set(0).expect("it has subscriptions");
    let is_joining = |number: &&u32| testbed.shard.connections.is_joining(**number);
    set.subscriptions.iter().filter(is_joining).count()
}

#[test]
fn one_channel_of_a_connection_reads_history_at_a_time() {
    let mut testbed = live();
    subscribe(&mut testbed, r#","lastEventId":1001"#);
    let (mut reads, mut turns) = (0, 0);
    while reads == 0 || joining(&testbed) > 0 {
        turns += 1;
        assert!(turns < 10 * CHANNELS, "{} channels wait", joining(&testbed));
        let mut asked = Vec::new();
        while let Ok(request) = testbed.requests.try_recv() {
            match request {
                Request::Follow { channel, .. } => follow(&mut testbed, channel),
                Request::Read { channel, position, .. } => asked.push((channel, position)),
                _ => {}
            }
        }
        assert!(asked.len() <= 1, "{} reads at a time", asked.len());
        reads += asked.len() as u64;
        if let Some((channel, position)) = asked.pop() {
            let page = Page {
                after: position,
                base: EventId(1000),
                head: EventId(5000),
                oldest: EventId(5001),
                ..Page::default()
            };
            let (channel, result) = (ChannelForm::named(channel), Ok(Arc::new(page)));
            testbed.shard.on_bus_message(BusMessage::Page { channel, position, result });
        }
        testbed.turn();
        testbed.clients[0].peer.skip();
    }
    assert!(reads >= CHANNELS);
}

#[test]
fn the_next_channel_reads_history_when_one_is_unsubscribed() {
    let mut testbed = live();
    subscribe(&mut testbed, r#","lastEventId":1001"#);
    let mut asked = Vec::new();
    for left in (0..CHANNELS).rev() {
        while let Ok(request) = testbed.requests.try_recv() {
            match request {
                Request::Follow { channel, .. } => {
                    follow(&mut testbed, channel);
                    testbed.turn();
                }
                Request::Read { channel, .. } => asked.push(channel),
                _ => {}
            }
        }
        let channel = asked.last().expect("one reads").as_str();
        let frame = format!(r#"{{"type":"unsubscribe","channel":"{channel}"}}"#);
        testbed.clients[0].peer.send(&masked(1, frame.as_bytes()));
        testbed.turn();
        testbed.turn();
        testbed.clients[0].peer.skip();
        assert_eq!(joining(&testbed) as u64, left);
    }
    asked.dedup();
    assert_eq!(asked.len() as u64, CHANNELS);
}

#[test]
fn a_client_holds_a_part_of_all_channels() {
    let mut testbed = live();
    let limits = testbed.limits.clone();
    let slot = limits.acquire([192, 0, 2, 1].into()).expect("there is room");
    testbed.shard.connections[0].connection_slot = slot;
    let client = limits.allowance(slot, "").expect("it has one");
    let held = |number: usize| ChannelName::parse(&format!("held.{number}")).expect("a name");
    let most = testbed.shard.settings().max_channels.get() / 4;
    for number in 0..most {
        assert!(limits.may_hold(&client));
        limits.followed.add(held(number), Some(client.clone()));
    }
    let subscribe = |testbed: &mut Testbed, channel: &str| {
        let frame = format!(r#"{{"type":"subscribe","channel":"{channel}"}}"#);
        testbed.clients[0].peer.send(&masked(1, frame.as_bytes()));
        testbed.turn();
        testbed.shard.connections.set(0).expect("it has subscribed").subscriptions.len()
    };
    assert_eq!(subscribe(&mut testbed, "held.1"), 1, "it holds that already");
    assert_eq!(subscribe(&mut testbed, "room.1"), 1);
    limits.followed.remove(held(0));
    assert_eq!(subscribe(&mut testbed, "room.1"), 2);
    assert_eq!(client.held() as usize, most);
    assert_eq!(subscribe(&mut testbed, "room.2"), 2);
}

#[test]
fn pings_of_a_client_that_does_not_read_are_not_all_answered() {
    let mut testbed = live();
    subscribe(&mut testbed, "");
    while joining(&testbed) > 0 {
        testbed.answer();
        testbed.turn();
    }
    let ping = testbed.shard.positions_ping(0).len();
    for _ in 0..2000 {
        testbed.clients[0].peer.send(&masked(1, br#"{"type":"ping"}"#));
        testbed.turn();
        let queued = testbed.shard.connections[0].queued();
        assert!(queued < QUEUE_MAX / 2 + ping, "{queued} bytes are queued");
    }
}
