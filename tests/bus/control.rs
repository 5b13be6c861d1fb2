//! Commands of backends about the connections of users, with two nodes on one Redis.

use serde_json::{Value, json};

use crate::common::client::JSON_MODE;
use crate::common::http::Response;
use crate::common::redis::free_port;
use crate::common::{Client, Node, Options, Proxy, Redis, cluster, redis, until};

const KEY: &str = "fanfare:{@control}";
const DISCONNECTED: (u16, &str) = (4010, "disconnected by the application");
const BANNED: (u16, &str) = (4010, "banned by the application");

/// Calls a function of the control channel. Returns the reply.
async fn fcall(redis: &Redis, function: &str, args: &[&str]) -> redis::Value {
    let call = [&["FCALL", function, "1", KEY][..], args].concat();
    redis.client().await.call(&call).await
}

async fn expect_close(client: &mut Client, (code, reason): (u16, &str)) {
    assert_eq!(client.expect_close().await, (code, reason.to_owned()));
}

/// Fails unless a user can't connect to a node: in JSON mode it is closed, a plain client gets 403.
async fn expect_banned(node: &Node, user: &str) {
    let mut client = Client::open(node, user, "", Some(JSON_MODE)).await;
    expect_close(&mut client, BANNED).await;
    let plain = Client::try_open(node.public, user, &Options::default()).await;
    assert!(plain.err().is_some_and(|error| error.to_string().contains("403")), "{user} got in");
}

/// Fails unless a client still gets events.
async fn expect_open(client: &mut Client, node: &Node, channel: &str) {
    let id = node.publish(channel, &json!({"n": 1})).await;
    client.expect_event(id, &json!({"n": 1})).await;
}

async fn bans(node: &Node) -> Vec<String> {
    let bans = node.admin("GET", "/bans", b"").await.json();
    let users = bans["bans"].as_array().unwrap_or_else(|| panic!("{bans}"));
    users.iter().map(|ban| ban["user"].as_str().expect("a user").to_owned()).collect()
}

async fn until_banned(node: &Node, users: &[&str]) {
    until("the bans", || async { (bans(node).await == users).then_some(()) }).await;
}

#[tokio::test]
async fn user_is_disconnected_on_all_nodes() {
    let (redis, a, b) = cluster(&["--shards", "2"]).await;
    let mut number = 0;
    for by_fcall in [false, true] {
        let mut alices = Vec::new();
        for node in [&a, &b, &a, &b] {
            alices.push(Client::plain(node, "alice", "room.1").await);
            alices.push(Client::json(node, "alice", "room.2").await.0);
            let mut without_channel = Client::open(node, "alice", "channel=", Some(JSON_MODE)).await;
            without_channel.next_control("welcome").await;
            alices.push(without_channel);
        }
        let (mut bob, _) = Client::json(&b, "bob", "room.2").await;
        match by_fcall {
            true => assert!(fcall(&redis, "fanfare_disconnect", &["alice"]).await.int() > 0),
            false => assert!(a.disconnect("user=alice").await > 0),
        }
        for alice in &mut alices {
            expect_close(alice, DISCONNECTED).await;
        }
        expect_open(&mut bob, &a, "room.2").await;
        // Without a ban the user may come back.
        let (mut back, _) = Client::json(&a, "alice", "room.3").await;
        expect_open(&mut back, &b, "room.3").await;
        back.leave().await;
        number += 1;
        for node in [&a, &b] {
            assert_eq!(node.metric("fanfare_commands_total").await, f64::from(number));
            let closed = node.metric_of("fanfare_connections_closed_total", r#"reason="disconnected""#).await;
            assert_eq!(closed, f64::from(6 * number));
        }
    }
    // The control channel is no channel that clients or backends see.
    assert_eq!(a.metric("fanfare_bus_channels").await, 3.0);
    let channels = a.admin("GET", "/channels", b"").await;
    assert!(!channels.body.contains("control"), "{}", channels.body);
    for path in ["/history?channel=%40control", "/channels?after=%40control"] {
        assert_eq!(a.admin("GET", path, b"").await.status, 400, "{path}");
    }
    assert_eq!(a.admin("POST", "/publish?channel=%40control", b"{}").await.status, 400);
    let reply = redis.client().await.fcall("@control", b"{}", None).await;
    assert!(reply.error().contains("give one key"), "{}", reply.error());
}

#[tokio::test]
async fn one_channel_of_many_is_disconnected() {
    let (redis, a, b) = cluster(&["--shards", "2"]).await;
    for by_fcall in [false, true] {
        let mut followers = Vec::new();
        for node in [&a, &b] {
            let (mut client, _) = Client::json(node, "alice", "room.1").await;
            client
                .send(r#"{"type":"subscribe","channels":[{"channel":"room.2"},{"channel":"room.3"}]}"#)
                .await;
            client.next_control("welcome").await;
            client.next_control("welcome").await;
            followers.push(client);
        }
        let mut in_room = Client::plain(&b, "alice", "room.2").await;
        let (mut bob, _) = Client::json(&a, "bob", "room.2").await;
        match by_fcall {
            true => assert!(fcall(&redis, "fanfare_disconnect", &["alice", "room.2"]).await.int() > 0),
            false => assert!(b.disconnect("user=alice&channel=room.2").await > 0),
        }
        // A connection whose default channel it is has nothing left to do.
        expect_close(&mut in_room, DISCONNECTED).await;
        for client in &mut followers {
            let frame = client.next_control("unsubscribed").await;
            assert_eq!(frame, json!({"type": "unsubscribed", "channel": "room.2", "reason": "disconnected"}));
        }
        expect_open(&mut bob, &b, "room.2").await;
        let id = a.publish("room.3", &json!({"n": 3})).await;
        for client in &mut followers {
            client.expect_event(id, &json!({"channel": "room.3", "n": 3})).await;
        }
        let id = a.publish("room.1", &json!({"n": 1})).await;
        for client in &mut followers {
            client.expect_event(id, &json!({"n": 1})).await;
            // It may follow the channel again.
            client.send(r#"{"type":"subscribe","channel":"room.2","ref":7}"#).await;
            assert_eq!(client.next_control("welcome").await["ref"], 7);
        }
    }
}

#[tokio::test]
async fn banned_user_is_refused_until_unbanned() {
    let (redis, a, b) = cluster(&["--shards", "2"]).await;
    for by_fcall in [false, true] {
        let (mut on_a, _) = Client::json(&a, "alice", "room.1").await;
        let mut on_b = Client::plain(&b, "alice", "room.1").await;
        match by_fcall {
            true => assert!(fcall(&redis, "fanfare_disconnect", &["alice", "", "600"]).await.int() > 0),
            false => assert!(a.disconnect("user=alice&ban=10m").await > 0),
        }
        expect_close(&mut on_a, BANNED).await;
        expect_close(&mut on_b, BANNED).await;
        for node in [&a, &b] {
            expect_banned(node, "alice").await;
            assert_eq!(bans(node).await, ["alice"]);
            assert_eq!(node.metric("fanfare_bans").await, 1.0);
            Client::json(node, "bob", "room.1").await;
        }
        match by_fcall {
            true => assert!(fcall(&redis, "fanfare_unban", &["alice"]).await.int() > 0),
            false => assert!(b.order("DELETE", "/ban?user=alice").await > 0),
        }
        for node in [&a, &b] {
            until_banned(node, &[]).await;
            Client::json(node, "alice", "room.1").await;
        }
        assert_eq!(redis.client().await.call(&["EXISTS", "fanfare:{@control}:bans"]).await.int(), 0);
    }
}

#[tokio::test]
async fn no_handshake_slips_past_a_ban() {
    let (_redis, a, b) = cluster(&["--shards", "2"]).await;
    let storm = (0..64).map(|number| {
        let node = if number % 2 == 0 { &a } else { &b };
        async move {
            let options = Options { query: format!("channel=room.{number}"), ..Options::default() };
            loop {
                match Client::try_open(node.public, "alice", &options).await {
                    Ok(client) if number % 4 < 2 => client.leave().await,
                    Ok(mut client) => expect_close(&mut client, BANNED).await,
                    Err(error) => return assert!(error.to_string().contains("403"), "{error}"),
                }
            }
        }
    });
    let ban = a.disconnect("user=alice&ban=1h");
    tokio::join!(futures_util::future::join_all(storm), ban);
}

#[tokio::test]
async fn bans_end_by_themselves() {
    let (redis, a, b) = cluster(&[]).await;
    a.disconnect("user=alice&ban=1s").await;
    a.disconnect("user=bob&ban=1d").await;
    for node in [&a, &b] {
        until_banned(node, &["bob"]).await;
        Client::json(node, "alice", "room.1").await;
        expect_banned(node, "bob").await;
    }
    // The next command removes it from Redis, too.
    b.disconnect("user=carol&ban=1h").await;
    let stored = redis.client().await.call(&["ZRANGE", "fanfare:{@control}:bans", "0", "-1"]).await;
    let stored: Vec<_> = stored.list().iter().map(redis::Value::text).collect();
    assert_eq!(stored, ["carol", "bob"]);
}

#[tokio::test]
async fn node_that_was_cut_off_executes_what_it_missed() {
    let redis = Redis::start(&[]).await;
    let proxy = Proxy::to(redis.port()).await;
    let a = Node::on(&redis, &[]).await;
    let b = Node::start(&["--redis", &proxy.url(), "--shards", "2"]).await;
    let mut clients = Vec::new();
    for user in ["alice", "bob", "carol", "dave"] {
        clients.push(Client::json(&b, user, "room.1").await.0);
    }
    proxy.lead_to(free_port());
    b.unready().await;
    // Orders of this node fail meanwhile, and are certainly not executed.
    let response = b.admin("POST", "/disconnect?user=dave", b"").await;
    assert_eq!((response.status, response.header("retry-after")), (503, Some("1")), "{}", response.body);
    a.disconnect("user=alice").await;
    a.disconnect("user=bob&ban=1h").await;
    fcall(&redis, "fanfare_disconnect", &["carol", "", "3600"]).await;
    a.order("DELETE", "/ban?user=carol").await;
    for client in &mut clients {
        client.send(r#"{"type":"ping"}"#).await;
        client.next_control("ping").await;
    }
    proxy.lead_to(redis.port());
    expect_close(&mut clients[0], DISCONNECTED).await;
    expect_close(&mut clients[1], BANNED).await;
    expect_close(&mut clients[2], BANNED).await;
    expect_open(&mut clients[3], &a, "room.1").await;
    until_banned(&b, &["bob"]).await;
    expect_banned(&b, "bob").await;
    Client::json(&b, "carol", "room.1").await;
}

#[tokio::test]
async fn lost_message_of_a_command_is_noticed() {
    let redis = Redis::start(&[]).await;
    let proxy = Proxy::to(redis.port()).await;
    let b = Node::start(&["--redis", &proxy.url()]).await;
    let (mut alice, _) = Client::json(&b, "alice", "room.1").await;
    proxy.drop_message_with(r#""command":"disconnect""#).await;
    // The answer waits until the node has executed it.
    b.disconnect("user=alice").await;
    let left = b.admin("GET", "/connections?user=alice", b"").await.json();
    assert_eq!((&left["connections"], proxy.dropped()), (&json!([]), 1));
    expect_close(&mut alice, DISCONNECTED).await;
}

#[tokio::test]
async fn restarted_node_knows_the_bans() {
    let (redis, a, b) = cluster(&[]).await;
    a.disconnect("user=alice&ban=1h").await;
    fcall(&redis, "fanfare_disconnect", &["b\"ob é", "", "3600"]).await;
    b.kill();
    let b = Node::on(&redis, &[]).await;
    // It knows them before it is ready.
    expect_banned(&b, "alice").await;
    expect_banned(&b, "b%22ob%20%C3%A9").await;
    Client::json(&b, "carol", "room.1").await;
}

/// Holds back the messages to node `b` and sends it a command, whose answer waits: the command is
/// stored and `b` has not executed it.
async fn order_that_waits<'a>(b: &'a Node, a: &Node, proxy: &Proxy) -> impl Future<Output = Response> + 'a {
    let executed = a.metric("fanfare_commands_total").await;
    proxy.hold_messages(true);
    let mut response = Box::pin(b.admin("POST", "/disconnect?user=alice", b""));
    let stored = until("the command at the other node", || async {
        (a.metric("fanfare_commands_total").await > executed).then_some(())
    });
    tokio::select! {
        response = &mut response => panic!("{}", response.body),
        () = stored => {}
    }
    response
}

#[tokio::test]
async fn order_is_answered_when_it_is_executed() {
    let redis = Redis::start(&[]).await;
    let proxy = Proxy::to(redis.port()).await;
    let a = Node::on(&redis, &[]).await;
    let b = Node::start(&["--redis", &proxy.url()]).await;
    let (mut alice, _) = Client::json(&b, "alice", "room.1").await;
    let mut response = order_that_waits(&b, &a, &proxy).await;
    proxy.lead_to(free_port());
    tokio::select! {
        response = &mut response => panic!("{}", response.body),
        _ = b.unready() => {}
    }
    proxy.hold_messages(false);
    proxy.lead_to(redis.port());
    // The next session has the command.
    let response = response.await;
    assert_eq!((response.status, b.metric("fanfare_commands_total").await), (200, 1.0), "{}", response.body);
    expect_close(&mut alice, DISCONNECTED).await;
}

#[tokio::test]
async fn order_that_was_lost_is_unknown() {
    let redis = Redis::start(&[]).await;
    let proxy = Proxy::to(redis.port()).await;
    let a = Node::on(&redis, &[]).await;
    let b = Node::start(&["--redis", &proxy.url()]).await;
    let (mut alice, _) = Client::json(&b, "alice", "room.1").await;
    let response = order_that_waits(&b, &a, &proxy).await;
    // No history holds it any more.
    redis.client().await.call(&["DEL", &format!("{KEY}:events")]).await;
    proxy.lead_to(free_port());
    b.unready().await;
    proxy.hold_messages(false);
    proxy.lead_to(redis.port());
    let response = response.await;
    assert_eq!((response.status, b.metric("fanfare_commands_total").await), (504, 0.0), "{}", response.body);
    expect_open(&mut alice, &b, "room.1").await;
}

#[tokio::test]
async fn no_client_opens_before_commands_are_followed() {
    let redis = Redis::start(&[]).await;
    let proxy = Proxy::to(free_port()).await;
    let node = Node::start_unready(&["--redis", &proxy.url()]).await;
    for query in ["channel=", "channel=room.1"] {
        let options = Options { query: query.into(), subprotocol: Some(JSON_MODE), ..Options::default() };
        let error = Client::try_open(node.public, "alice", &options).await.err().expect("a rejection");
        assert!(error.to_string().contains("503"), "{query}: {error}");
    }
    proxy.lead_to(redis.port());
    node.ready().await;
    let mut alice = Client::open(&node, "alice", "channel=", Some(JSON_MODE)).await;
    alice.next_control("welcome").await;
    // An outage later on closes none, so it rejects none either.
    proxy.lead_to(free_port());
    node.unready().await;
    Client::open(&node, "alice", "channel=", Some(JSON_MODE)).await.next_control("welcome").await;
    proxy.lead_to(redis.port());
    node.ready().await;
    node.disconnect("user=alice").await;
    expect_close(&mut alice, DISCONNECTED).await;
}

#[tokio::test]
async fn bans_hold_after_the_clock_was_set_back() {
    let redis = Redis::with_clock().await;
    let (a, b) = (Node::on(&redis, &[]).await, Node::on(&redis, &[]).await);
    a.disconnect("user=alice&ban=1h").await;
    redis.set_clock_back().await;
    a.disconnect("user=bob&ban=1h").await;
    for node in [&a, &b] {
        until_banned(node, &["alice", "bob"]).await;
        expect_banned(node, "bob").await;
    }
}

#[tokio::test]
async fn commands_are_kept_for_a_day() {
    let redis = Redis::start(&[]).await;
    let node = Node::on(&redis, &["--history-ttl", "1s"]).await;
    let day = 24 * 60 * 60 * 1000;
    for command in [false, true] {
        if command {
            node.disconnect("user=alice").await;
        }
        let probes = node.metric("fanfare_bus_round_trip_seconds_count").await;
        until("a probe", || async {
            (node.metric("fanfare_bus_round_trip_seconds_count").await > probes).then_some(())
        })
        .await;
        let mut client = redis.client().await;
        assert!(client.call(&["PTTL", &format!("{KEY}:meta")]).await.int() > day);
        assert!(!command || client.call(&["PTTL", &format!("{KEY}:events")]).await.int() > day);
    }
}

#[tokio::test]
async fn bans_outlive_a_restart_of_redis() {
    let redis = Redis::start(&["--appendonly", "yes", "--appendfsync", "always"]).await;
    let (mut redis, proxy) = (redis, Proxy::to(free_port()).await);
    proxy.lead_to(redis.port());
    let a = Node::on(&redis, &[]).await;
    let b = Node::start(&["--redis", &proxy.url()]).await;
    a.disconnect("user=alice&ban=1h").await;
    let (mut bob, _) = Client::json(&b, "bob", "room.1").await;
    proxy.lead_to(free_port());
    b.unready().await;
    a.disconnect("user=bob&ban=1h").await;
    redis.kill();
    a.unready().await;
    redis.up().await;
    proxy.lead_to(redis.port());
    // The command is lost with the old epoch, and the ban is not.
    expect_reset_or_close(&mut bob).await;
    for node in [&a, &b] {
        node.ready().await;
        until_banned(node, &["alice", "bob"]).await;
        expect_banned(node, "alice").await;
    }
    let warned = || async { b.log().contains("commands to disconnect users may be lost").then_some(()) };
    until("a warning", warned).await;
}

/// The close of a banned user, before which its channel may be reset.
async fn expect_reset_or_close(client: &mut Client) {
    loop {
        match client.next_frame().await {
            crate::common::Frame::Close(code, reason) => return assert_eq!((code, &*reason), BANNED),
            crate::common::Frame::Text(text) => {
                let frame: Value = serde_json::from_str(&text).expect("JSON");
                assert_eq!(frame["type"], "reset", "{text}");
            }
            _ => {}
        }
    }
}

#[tokio::test]
async fn commands_work_after_redis_was_wiped() {
    let (mut redis, a, b) = cluster(&["--shards", "2"]).await;
    a.disconnect("user=alice&ban=1h").await;
    until_banned(&b, &["alice"]).await;
    redis.kill();
    a.unready().await;
    redis.wipe();
    redis.up().await;
    // The bans were in Redis alone.
    for node in [&a, &b] {
        node.ready().await;
        until_banned(node, &[]).await;
    }
    let (mut alice, _) = Client::json(&b, "alice", "room.1").await;
    a.disconnect("user=alice&ban=1h").await;
    expect_close(&mut alice, BANNED).await;
    expect_banned(&b, "alice").await;
    // A flush under way, too.
    redis.flush_all_but_settings().await;
    until_banned(&a, &[]).await;
    until_banned(&b, &[]).await;
    let (mut alice, _) = Client::json(&a, "alice", "room.1").await;
    assert!(fcall(&redis, "fanfare_disconnect", &["alice"]).await.int() > 0);
    expect_close(&mut alice, DISCONNECTED).await;
}

#[tokio::test]
async fn invalid_orders_are_rejected() {
    let (redis, a, _b) = cluster(&[]).await;
    for (function, args, part) in [
        ("fanfare_disconnect", &[][..], "give one key, then a user id"),
        ("fanfare_disconnect", &["a", "", "1", "x"], "give one key, then a user id"),
        ("fanfare_disconnect", &[""], "a user id has 1 to 128 bytes"),
        ("fanfare_disconnect", &["a\nb"], "a user id has 1 to 128 bytes"),
        ("fanfare_disconnect", &["a", "a b"], "a channel has 1 to 128 of"),
        ("fanfare_disconnect", &["a", "@control"], "a channel has 1 to 128 of"),
        ("fanfare_disconnect", &["a", "", "0"], "a ban is a number of seconds from 1 to 31536000"),
        ("fanfare_disconnect", &["a", "", "10m"], "a ban is a number of seconds"),
        ("fanfare_disconnect", &["a", "", "31536001"], "a ban is a number of seconds"),
        ("fanfare_disconnect", &["a", "room", "10"], "a ban is for all channels"),
        ("fanfare_unban", &[], "give one key, then a user id"),
        ("fanfare_unban", &["a", "b"], "give one key, then a user id"),
    ] {
        let reply = fcall(&redis, function, args).await;
        assert!(reply.error().contains(part), "{function} {args:?}: {}", reply.error());
        assert!(reply.error().contains(function), "{}", reply.error());
    }
    let mut client = redis.client().await;
    for (key, part) in [
        ("fanfare:{room}", "give one key, <prefix>:{@control}"),
        ("other:{@control}", "no node has the --redis-prefix \"other\""),
    ] {
        let reply = client.call(&["FCALL", "fanfare_disconnect", "1", key, "a"]).await;
        assert!(reply.error().contains(part), "{key}: {}", reply.error());
    }
    assert_eq!(a.metric("fanfare_commands_total").await, 0.0);
}

#[tokio::test]
async fn bans_are_limited_in_number() {
    let (redis, a, b) = cluster(&[]).await;
    let mut client = redis.client().await;
    let bans = "fanfare:{@control}:bans";
    // As 10,000 commands would, in less time.
    let fill =
        format!("for i = 1, 10000 do redis.call('ZADD', '{bans}', ARGV[1] + i, 'user' .. i) end return 1");
    client.call(&["EVAL", &fill, "0", "9000000000000000"]).await;
    for (status, path) in [(409, "/disconnect?user=alice&ban=1h"), (200, "/disconnect?user=user7&ban=1h")] {
        let response = a.admin("POST", path, b"").await;
        assert_eq!(response.status, status, "{path}: {}", response.body);
    }
    let reply = fcall(&redis, "fanfare_disconnect", &["alice", "", "1"]).await;
    assert!(reply.error().contains("10000 users are banned, the most at a time"), "{}", reply.error());
    let (mut alice, _) = Client::json(&b, "alice", "room.1").await;
    expect_open(&mut alice, &a, "room.1").await;
    // Expired bans make room.
    client.call(&["ZADD", bans, "1", "user1"]).await;
    a.disconnect("user=alice&ban=1h").await;
    expect_close(&mut alice, BANNED).await;
    assert_eq!(client.call(&["ZCARD", bans]).await.int(), 10_000);
}

#[tokio::test]
async fn damaged_bans_are_named_in_the_log() {
    let (redis, a, _b) = cluster(&[]).await;
    redis.client().await.call(&["SET", "fanfare:{@control}:bans", "x"]).await;
    let response = a.admin("POST", "/disconnect?user=alice", b"").await;
    assert_eq!(response.status, 503, "{}", response.body);
    let reply = fcall(&redis, "fanfare_unban", &["alice"]).await;
    assert!(reply.error().contains("fanfare:{@control}:bans: another program has put"), "{}", reply.error());
    let named = || async { a.log().contains("fanfare:{@control}:bans").then_some(()) };
    until("the key in the log", named).await;
    // Other channels are not affected.
    let (mut alice, _) = Client::json(&a, "alice", "room.1").await;
    expect_open(&mut alice, &a, "room.1").await;
    redis.client().await.call(&["DEL", "fanfare:{@control}:bans"]).await;
    a.disconnect("user=alice").await;
    expect_close(&mut alice, DISCONNECTED).await;
}

/// The rights that docs/redis.md gives a program that uses FCALL alone.
#[tokio::test]
async fn rights_of_the_docs_suffice() {
    let (redis, a, _b) = cluster(&[]).await;
    let docs = include_str!("../../docs/redis.md");
    let (_, block) = docs.split_once("ACL SETUSER backend").expect("the block");
    let (block, _) = block.split_once("```").expect("its end");
    let rules = block.split_whitespace().filter(|word| *word != "\\");
    let rules: Vec<_> = rules.map(|word| word.trim_matches('\'')).collect();
    let mut client = redis.client().await;
    client.call(&[&["ACL", "SETUSER", "backend"][..], &rules].concat()).await;
    client.call(&["AUTH", "backend", "secret"]).await;
    let (mut alice, _) = Client::json(&a, "alice", "room.1").await;
    let id = client.fcall("room.1", br#"{"n":1}"#, None).await.int();
    alice.expect_event(id as u64, &json!({"n": 1})).await;
    for (function, args) in [
        ("fanfare_disconnect", &["bob"][..]),
        ("fanfare_disconnect", &["alice", "", "600"]),
        ("fanfare_unban", &["alice"]),
    ] {
        let call = [&["FCALL", function, "1", KEY][..], args].concat();
        assert!(client.call(&call).await.int() > 0, "{function} {args:?}");
    }
    expect_close(&mut alice, BANNED).await;
}

#[tokio::test]
async fn bans_of_other_programs_do_no_harm() {
    let redis = Redis::start(&[]).await;
    let mut client = redis.client().await;
    let bans = &format!("{KEY}:bans");
    for (end, user) in [("inf", &b"alice"[..]), ("9e15", b"bob"), ("9e15", b"\xff"), ("-inf", b"carol")] {
        client.call(&[b"ZADD", bans.as_bytes(), end.as_bytes(), user]).await;
    }
    let node = Node::on(&redis, &[]).await;
    expect_banned(&node, "alice").await;
    node.disconnect("user=dave&ban=1h").await;
    assert_eq!(self::bans(&node).await, ["alice", "bob", "dave"]);
    assert!(client.call(&["PTTL", bans]).await.int() > 0, "it expires");
}

#[tokio::test]
async fn node_follows_commands_once_they_are_readable() {
    let redis = Redis::start(&[]).await;
    let meta = format!("{KEY}:meta");
    redis.client().await.call(&["SET", &meta, "x"]).await;
    let node = Node::on(&redis, &[]).await;
    let (mut alice, _) = Client::json(&node, "alice", "room.1").await;
    assert!(node.log().contains(&meta), "{}", node.log());
    redis.client().await.call(&["DEL", &meta]).await;
    // It can't know the commands before.
    let warned = || async { node.log().contains("commands to disconnect users may be lost").then_some(()) };
    until("a warning", warned).await;
    node.disconnect("user=alice").await;
    expect_close(&mut alice, DISCONNECTED).await;
}
