//! Many channels on one socket: every row of the protocol, and bad input.

use serde_json::{Value, json};

use crate::common::client::{JSON_MODE, position};
use crate::common::{Client, Node, Options, TokenKey, until};
use crate::rejections::closed;

/// Connects without a default channel.
async fn without_channel(node: &Node, user: &str) -> Client {
    let mut client = Client::open(node, user, "channel=", Some(JSON_MODE)).await;
    assert_eq!(client.next_text().await, r#"{"type":"welcome"}"#);
    client
}

async fn send(client: &mut Client, frame: Value) {
    client.send(frame.to_string()).await;
}

async fn subscribe(client: &mut Client, channel: &str) {
    send(client, json!({"type": "subscribe", "channel": channel})).await;
}

/// The next frame, which must be the welcome of this channel.
async fn welcomed(client: &mut Client, channel: &str) -> Value {
    let welcome = client.welcome().await;
    assert_eq!(welcome["channel"], channel);
    welcome
}

async fn subscribed(client: &mut Client, channel: &str) -> Value {
    subscribe(client, channel).await;
    welcomed(client, channel).await
}

/// The next frame, which must be an error for this channel. Returns its code.
async fn rejected(client: &mut Client, channel: Option<&str>) -> String {
    let error = client.next_control("error").await;
    assert_eq!(error.get("channel").and_then(Value::as_str), channel, "{error}");
    assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()), "{error}");
    error["code"].as_str().expect("a code").to_owned()
}

#[tokio::test]
async fn events_of_a_subscription_name_their_channel() {
    let node = Node::start(&[]).await;
    let (mut client, _) = Client::json(&node, "alice", "home").await;
    send(&mut client, json!({"type": "subscribe", "channel": "room.1", "ref": "a"})).await;
    let welcome = client.next_text().await;
    let head = serde_json::from_str::<Value>(&welcome).expect("JSON")["head"].clone();
    let expected =
        r#"{"type":"welcome","channel":"room.1","lastEventId":H,"head":H,"recovered":true,"ref":"a"}"#;
    assert_eq!(welcome, expected.replace('H', &head.to_string()));

    let id = node.publish("room.1", &json!({"text": "hi"})).await;
    assert_eq!(client.next_text().await, format!(r#"{{"channel":"room.1","text":"hi","id":{id}}}"#));
    let id = node.publish("home", &json!({"text": "hi"})).await;
    assert_eq!(client.next_text().await, format!(r#"{{"text":"hi","id":{id}}}"#));
    let id = node.publish_to("room.1", "alice", &json!({"n": 1})).await;
    client.expect_event(id, &json!({"channel": "room.1", "to": "alice", "n": 1})).await;
    node.publish_to("room.1", "bob", &json!({"n": 2})).await;
    let id = node.publish("room.1", &json!({"n": 3})).await;
    client.expect_event(id, &json!({"channel": "room.1", "n": 3})).await;
}

#[tokio::test]
async fn servers_channel_replaces_a_member_of_that_name() {
    let node = Node::start(&[]).await;
    let (mut client, _) = Client::json(&node, "alice", "home").await;
    let mut plain = Client::plain(&node, "p", "room").await;
    subscribed(&mut client, "room").await;
    let id = node.publish("room", &json!({"channel": "mine", "n": 1})).await;
    assert_eq!(client.next_text().await, format!(r#"{{"channel":"room","n":1,"id":{id}}}"#));
    assert_eq!(plain.next_text().await, format!(r#"{{ "channel":"mine","n":1,"id":{id}}}"#));
    // An event of the default channel is never taken for one of the subscription.
    let id = node.publish("home", &json!({"channel": "room"})).await;
    assert_eq!(client.next_text().await, format!(r#"{{ "channel":"room","id":{id}}}"#));
}

#[tokio::test]
async fn socket_without_default_channel_has_subscriptions_alone() {
    let node = Node::start(&[]).await;
    let mut client = without_channel(&node, "alice").await;
    send(&mut client, json!({"text": "hi", "ref": 1})).await;
    let error = client.next_control("error").await;
    assert_eq!((&error["code"], &error["ref"]), (&json!("invalid"), &json!(1)));
    send(&mut client, json!({"type": "ping"})).await;
    assert_eq!(client.next_text().await, r#"{"type":"ping"}"#);
    subscribed(&mut client, "room").await;
    let id = node.publish("room", &json!({"n": 1})).await;
    client.expect_event(id, &json!({"channel": "room", "n": 1})).await;
    client.leave().await;
    assert_eq!(node.metric("fanfare_subscriptions").await, 0.0);
}

#[tokio::test]
async fn plain_mode_needs_a_channel() {
    let node = Node::start(&[]).await;
    let options = Options { query: "channel=".into(), ..Options::default() };
    let Err(tokio_tungstenite::tungstenite::Error::Http(response)) =
        Client::try_open(node.public, "a", &options).await
    else {
        panic!("it was let in")
    };
    assert_eq!(response.status().as_u16(), 400);
    let (_, code, reason) = closed(&node, "/ws/a?channel=&lastEventId=", &[]).await;
    assert_eq!((code, reason.as_str()), (4400, "name a channel, or use fanfare.v1"));
}

#[tokio::test]
async fn publishes_in_any_channel() {
    let node = Node::start(&[]).await;
    let mut client = without_channel(&node, "alice").await;
    let mut other = Client::plain(&node, "bob", "room").await;
    send(&mut client, json!({"text": "hi", "channel": "room", "ref": 7})).await;
    let ack = client.next_json().await;
    assert_eq!((&ack["type"], &ack["ref"]), (&json!("ack"), &json!(7)));
    other.expect_event(position(&ack["id"]), &json!({"sender": "alice", "text": "hi"})).await;
    subscribed(&mut client, "room").await;
    send(&mut client, json!({"data": [1], "channel": "room"})).await;
    let (id, event) = client.next_event().await;
    assert_eq!(event, json!({"channel": "room", "sender": "alice", "data": [1]}));
    other.expect_event(id, &json!({"sender": "alice", "data": [1]})).await;
}

#[tokio::test]
async fn unsubscribed_is_the_last_frame_of_a_channel() {
    let node = Node::start(&[]).await;
    let (mut client, _) = Client::json(&node, "alice", "home").await;
    subscribed(&mut client, "room").await;
    send(&mut client, json!({"type": "unsubscribe", "channel": "room", "ref": 2})).await;
    let expected = r#"{"type":"unsubscribed","channel":"room","reason":"requested","ref":2}"#;
    assert_eq!(client.next_text().await, expected);
    node.publish("room", &json!({"n": 1})).await;
    let id = node.publish("home", &json!({"n": 2})).await;
    client.expect_event(id, &json!({"n": 2})).await;
    // Again, from where it left.
    let welcome = subscribed(&mut client, "room").await;
    assert_eq!(welcome["lastEventId"], welcome["head"]);
    let id = node.publish("room", &json!({"n": 3})).await;
    client.expect_event(id, &json!({"channel": "room", "n": 3})).await;
}

#[tokio::test]
async fn many_channels_resume_in_one_frame() {
    const CHANNELS: usize = 100;
    let node = Node::start(&[]).await;
    let name = |number: usize| format!("room.{number}");
    let mut ids = Vec::new();
    for number in 0..CHANNELS {
        ids.push(node.publish_numbers(&name(number), 0..3).await);
    }
    let mut client = without_channel(&node, "alice").await;
    let list = (0..CHANNELS).map(|number| match number % 4 {
        0 => json!({"channel": name(number), "lastEventId": ids[number][0]}),
        1 => json!({"channel": name(number), "history": 1}),
        2 => json!({"channel": name(number), "lastEventId": 5}),
        _ => json!({"channel": name(number)}),
    });
    let list: Vec<Value> = list.collect();
    send(&mut client, json!({"type": "subscribe", "channels": list, "ref": 9})).await;
    let mut left: Vec<Vec<u64>> = (0..CHANNELS)
        .map(|number| match number % 4 {
            0 => ids[number][1..].to_vec(),
            1 => ids[number][2..].to_vec(),
            _ => Vec::new(),
        })
        .collect();
    let mut welcomes = 0;
    while welcomes < CHANNELS || left.iter().any(|ids| !ids.is_empty()) {
        let frame = client.next_json().await;
        let channel = frame["channel"].as_str().expect("a channel").to_owned();
        let number: usize = channel.strip_prefix("room.").expect("a room").parse().expect("a number");
        if frame["type"] == "welcome" {
            welcomes += 1;
            assert_eq!((&frame["ref"], &frame["recovered"]), (&json!(9), &json!(number % 4 != 2)));
            assert_eq!(frame["head"], ids[number][2]);
        } else {
            assert_eq!(left[number].remove(0), position(&frame["id"]), "{frame}");
        }
    }
    let counted = || async { (node.metric("fanfare_subscriptions").await == CHANNELS as f64).then_some(()) };
    until("the metric to count subscriptions", counted).await;
    for number in [7, 99] {
        let id = node.publish(&name(number), &json!({"n": 9})).await;
        client.expect_event(id, &json!({"channel": name(number), "n": 9})).await;
    }
}

#[tokio::test]
async fn pings_carry_the_positions_of_all_channels() {
    let node = Node::start(&["--ping-format", "json"]).await;
    let (mut client, welcome) = Client::json(&node, "alice", "home").await;
    let room = subscribed(&mut client, "room").await;
    let (home, first) = (welcome["head"].clone(), room["head"].clone());
    send(&mut client, json!({"type": "ping"})).await;
    let ping = format!(r#"{{"type":"ping","lastEventId":{home},"channels":{{"room":{first}}}}}"#);
    assert_eq!(client.next_text().await, ping);
    // Events for others raise the position.
    let id = node.publish_to("room", "bob", &json!({"n": 1})).await;
    until("the position to rise", || async {
        let mut other = without_channel(&node, "o").await;
        let welcome = subscribed(&mut other, "room").await;
        (welcome["head"] == id).then_some(())
    })
    .await;
    send(&mut client, json!({"type": "ping"})).await;
    let ping = client.next_control("ping").await;
    assert_eq!(ping["channels"], json!({ "room": id }));
}

#[tokio::test]
async fn bad_frames_are_answered_and_the_connection_stays() {
    let node = Node::start(&["--max-subscriptions", "3"]).await;
    let (mut client, _) = Client::json(&node, "alice", "home").await;
    let too_many: Vec<_> = (0..4).map(|number| json!({"channel": format!("c{number}")})).collect();
    let mixed = json!([{"channel": "a"}, {"channel": "b", "lastEventId": "x"}]);
    for frame in [
        json!({"type": "follow", "channel": "room"}),
        json!({"type": "subscribe"}),
        json!({"type": "subscribe", "channel": ""}),
        json!({"type": "subscribe", "channel": "a b"}),
        json!({"type": "subscribe", "channel": 5}),
        json!({"type": "subscribe", "channel": "room", "lastEventId": -1}),
        json!({"type": "subscribe", "channel": "room", "lastEventId": "5"}),
        json!({"type": "subscribe", "channel": "room", "lastEventId": 1.5}),
        json!({"type": "subscribe", "channel": "room", "lastEventId": 9_007_199_254_740_992_u64}),
        json!({"type": "subscribe", "channel": "room", "history": 0}),
        json!({"type": "subscribe", "channel": "room", "history": 101}),
        json!({"type": "subscribe", "channel": "room", "text": "hi"}),
        json!({"type": "subscribe", "channels": []}),
        json!({"type": "subscribe", "channels": too_many}),
        json!({"type": "subscribe", "channels": mixed}),
        json!({"type": "subscribe", "channels": [{"channel": "a"}], "channel": "b"}),
        json!({"type": "unsubscribe"}),
        json!({"type": "unsubscribe", "channels": [{"channel": "a"}]}),
        json!({"type": "token"}),
        json!({"text": "hi", "channel": null}),
        json!({"text": "hi", "channel": "a b"}),
    ] {
        send(&mut client, frame.clone()).await;
        assert_eq!(rejected(&mut client, None).await, "invalid", "{frame}");
    }
    // Nothing of a frame with a bad entry was subscribed.
    assert_eq!(node.metric("fanfare_subscriptions").await, 0.0);
    let id = node.publish("home", &json!({"n": 1})).await;
    client.expect_event(id, &json!({"n": 1})).await;
}

#[tokio::test]
async fn refusals_are_per_channel() {
    let node = Node::start(&["--max-subscriptions", "3"]).await;
    let (mut client, _) = Client::json(&node, "alice", "home").await;
    subscribed(&mut client, "a").await;
    for (frame, channel, code) in [
        (json!({"type": "subscribe", "channel": "a"}), "a", "subscribed"),
        (json!({"type": "subscribe", "channel": "home"}), "home", "subscribed"),
        (json!({"type": "unsubscribe", "channel": "b"}), "b", "not_subscribed"),
        (json!({"type": "unsubscribe", "channel": "home"}), "home", "invalid"),
    ] {
        send(&mut client, frame).await;
        assert_eq!(rejected(&mut client, Some(channel)).await, code);
    }
    let channels = json!([{"channel": "b"}, {"channel": "b"}, {"channel": "c"}]);
    send(&mut client, json!({"type": "subscribe", "channels": channels, "ref": 1})).await;
    let mut answers = Vec::new();
    for _ in 0..3 {
        let frame = client.next_json().await;
        assert_eq!(frame["ref"], 1);
        let outcome = if frame["type"] == "error" { &frame["code"] } else { &frame["type"] };
        answers.push((frame["channel"].clone(), outcome.clone()));
    }
    answers.sort_by_key(|answer| format!("{answer:?}"));
    let expected = [("b", "subscribed"), ("b", "welcome"), ("c", "welcome")];
    assert_eq!(answers, expected.map(|(channel, outcome)| (json!(channel), json!(outcome))));
    subscribe(&mut client, "d").await;
    assert_eq!(rejected(&mut client, Some("d")).await, "too_many");
    send(&mut client, json!({"type": "unsubscribe", "channel": "c"})).await;
    assert_eq!(client.next_control("unsubscribed").await["channel"], "c");
    subscribed(&mut client, "d").await;
    let metric = "fanfare_subscription_errors_total";
    assert_eq!(node.metric_of(metric, r#"code="subscribed""#).await, 3.0);
    assert_eq!(node.metric_of(metric, r#"code="too_many""#).await, 1.0);
}

#[tokio::test]
async fn users_share_a_channel_in_both_forms() {
    let node = Node::start(&["--shards", "2"]).await;
    let mut unnamed = Vec::new();
    let mut named = Vec::new();
    for number in 0..4 {
        unnamed.push(Client::plain(&node, "alice", "room").await);
        let mut client = without_channel(&node, "alice").await;
        subscribed(&mut client, "room").await;
        named.push(client);
        let to = if number % 2 == 0 { "alice" } else { "bob" };
        let private = node.publish_to("room", to, &json!({"n": number})).await;
        let public = node.publish("room", &json!({"m": number})).await;
        for client in &mut unnamed {
            if to == "alice" {
                client.expect_event(private, &json!({"to": to, "n": number})).await;
            }
            client.expect_event(public, &json!({"m": number})).await;
        }
        for client in &mut named {
            if to == "alice" {
                client.expect_event(private, &json!({"channel": "room", "to": to, "n": number})).await;
            }
            client.expect_event(public, &json!({"channel": "room", "m": number})).await;
        }
    }
    let listed = node.admin("GET", "/channels", b"").await.json();
    assert_eq!(listed["channels"][0]["connections"], 8, "subscriptions count as connections: {listed}");
}

/// Channels that one client uses already are not new for its next connections, whichever shard they
/// are on.
#[tokio::test]
async fn tabs_of_a_user_follow_as_many_channels_as_a_socket_may() {
    let key = TokenKey::new();
    let node = Node::start(&["--shards", "4", "--jwt-key", &key.path()]).await;
    let token = key.token("alice", &[]);
    let mut tabs = Vec::new();
    for _ in 0..3 {
        let query = format!("channel=home&token={token}");
        let mut tab = Client::open(&node, "alice", &query, Some(JSON_MODE)).await;
        tab.welcome().await;
        let channels: Vec<Value> = (0..100).map(|n| json!({"channel": format!("room.{n}")})).collect();
        send(&mut tab, json!({"type": "subscribe", "channels": channels})).await;
        for _ in 0..100 {
            let welcome = tab.welcome().await;
            assert!(welcome["channel"].as_str().is_some_and(|name| name.starts_with("room.")), "{welcome}");
        }
        tabs.push(tab);
    }
}

/// A node that requires tokens, and its key.
async fn with_tokens() -> (Node, TokenKey) {
    let key = TokenKey::new();
    (Node::start(&["--jwt-key", &key.path()]).await, key)
}

/// Sends a new token. Returns the answer, before which these frames came.
async fn renew(client: &mut Client, token: &str) -> (Value, Vec<Value>) {
    send(client, json!({"type": "token", "token": token, "ref": "t"})).await;
    let mut before = Vec::new();
    loop {
        let frame = client.next_json().await;
        if frame["ref"] == "t" {
            return (frame, before);
        }
        before.push(frame);
    }
}

#[tokio::test]
async fn token_says_which_channels_may_be_followed() {
    let (node, key) = with_tokens().await;
    let flags = ["--channel", "home", "--channel", "team.*", "--publish", "team.1", "--publish", "other"];
    let token = key.token("alice", &flags);
    let mut client =
        Client::open(&node, "alice", &format!("channel=home&token={token}"), Some(JSON_MODE)).await;
    client.welcome().await;
    subscribed(&mut client, "team.2").await;
    subscribe(&mut client, "other").await;
    assert_eq!(rejected(&mut client, Some("other")).await, "forbidden");
    // Where it may publish, it may also follow.
    for (channel, may) in [("team.1", true), ("team.2", false), ("home", false), ("other", false)] {
        send(&mut client, json!({"text": "hi", "channel": channel, "ref": 1})).await;
        match may {
            true => assert_eq!(client.next_json().await["type"], "ack"),
            false => assert_eq!(rejected(&mut client, Some(channel)).await, "forbidden"),
        }
    }
    // A token for one channel allows no other.
    let token = key.token("bob", &["--channel", "home"]);
    let mut client =
        Client::open(&node, "bob", &format!("channel=home&token={token}"), Some(JSON_MODE)).await;
    client.welcome().await;
    subscribe(&mut client, "team.1").await;
    assert_eq!(rejected(&mut client, Some("team.1")).await, "forbidden");
    send(&mut client, json!({"text": "hi", "channel": "team.1"})).await;
    assert_eq!(rejected(&mut client, Some("team.1")).await, "forbidden");
}

#[tokio::test]
async fn new_token_replaces_rights_and_expiry() {
    let (node, key) = with_tokens().await;
    let token = key.token("alice", &["--ttl", "30s"]);
    let mut client =
        Client::open(&node, "alice", &format!("channel=home&token={token}"), Some(JSON_MODE)).await;
    client.welcome().await;
    // It has less than a minute left.
    let expiring = client.next_control("token_expiring").await;
    assert!(expiring["in"].as_u64().is_some_and(|seconds| (1..=30).contains(&seconds)), "{expiring}");
    subscribed(&mut client, "a").await;
    subscribed(&mut client, "b").await;

    for bad in ["no token", &key.token("bob", &[]), &token[..token.len() - 2]] {
        let (answer, _) = renew(&mut client, bad).await;
        assert_eq!((&answer["type"], &answer["code"]), (&json!("error"), &json!("unauthorized")), "{bad}");
    }
    // The old one stays in force.
    let id = node.publish("b", &json!({"n": 1})).await;
    client.expect_event(id, &json!({"channel": "b", "n": 1})).await;

    let narrower = key.token("alice", &["--channel", "home", "--channel", "a"]);
    let (answer, before) = renew(&mut client, &narrower).await;
    assert_eq!(answer, json!({"type": "ack", "ref": "t"}));
    assert_eq!(before, [json!({"type": "unsubscribed", "channel": "b", "reason": "forbidden"})]);
    subscribe(&mut client, "b").await;
    assert_eq!(rejected(&mut client, Some("b")).await, "forbidden");
    let id = node.publish("a", &json!({"n": 2})).await;
    client.expect_event(id, &json!({"channel": "a", "n": 2})).await;

    let wider = key.token("alice", &["--ttl", "30s"]);
    assert_eq!(renew(&mut client, &wider).await.0["type"], "ack");
    assert!(client.next_control("token_expiring").await["in"].is_u64(), "once for each token");
    subscribed(&mut client, "b").await;

    let elsewhere = key.token("alice", &["--channel", "a"]);
    send(&mut client, json!({"type": "token", "token": elsewhere})).await;
    let (code, reason) = client.expect_close().await;
    assert_eq!((code, reason.as_str()), (4403, "the token does not allow this channel"));
}

#[tokio::test]
async fn token_frames_are_limited_and_ignored_without_keys() {
    let (node, key) = with_tokens().await;
    let token = key.token("alice", &[]);
    let mut client =
        Client::open(&node, "alice", &format!("channel=home&token={token}"), Some(JSON_MODE)).await;
    client.welcome().await;
    let mut accepted = 0;
    while renew(&mut client, &token).await.0["type"] == "ack" {
        accepted += 1;
    }
    assert!((2..20).contains(&accepted), "{accepted} tokens at once");

    let node = Node::start(&[]).await;
    let mut client = without_channel(&node, "alice").await;
    assert_eq!(renew(&mut client, "anything").await.0, json!({"type": "ack", "ref": "t"}));
}

#[tokio::test]
async fn loops_of_subscribes_are_limited() {
    let node = Node::start(&["--max-message-rate", "10"]).await;
    let mut client = without_channel(&node, "alice").await;
    // However low the rate, a newcomer may subscribe to all its channels at once.
    let channels: Vec<_> = (0..100).map(|number| json!({"channel": format!("c{number}")})).collect();
    send(&mut client, json!({"type": "subscribe", "channels": channels})).await;
    for _ in 0..100 {
        client.welcome().await;
    }
    let mut answers = 0;
    loop {
        send(&mut client, json!({"type": "unsubscribe", "channel": "c1"})).await;
        send(&mut client, json!({"type": "subscribe", "channel": "c1", "ref": 1})).await;
        let frame = client.next_json().await;
        answers += 1;
        assert!(answers < 300, "nothing limits it");
        if frame["code"] == "rate_limited" {
            break;
        }
    }
}

#[tokio::test]
async fn new_channels_are_limited_for_subscribers_and_publishers() {
    let key = TokenKey::new();
    let flags = ["--jwt-key", &key.path(), "--max-connections-per-user", "5", "--max-message-rate", "0"];
    let node = Node::start(&flags).await;
    let token = key.token("alice", &[]);
    let mut client = Client::open(&node, "alice", &format!("channel=&token={token}"), Some(JSON_MODE)).await;
    client.next_control("welcome").await;
    // Again and again in one channel counts once.
    for number in 0..200 {
        send(&mut client, json!({"text": "hi", "channel": "one", "ref": number})).await;
        assert_eq!(client.next_json().await["type"], "ack");
    }
    for number in 0..400 {
        send(&mut client, json!({"text": "hi", "channel": format!("c{number}"), "ref": 1})).await;
        let answer = client.next_json().await;
        if answer["type"] == "error" {
            assert!(number >= 100, "only {number}");
            assert_eq!(answer["code"], "rate_limited");
            subscribe(&mut client, "another").await;
            assert_eq!(rejected(&mut client, Some("another")).await, "rate_limited");
            return;
        }
    }
    panic!("nothing limits it");
}

#[tokio::test]
async fn slow_reader_of_many_channels_misses_nothing() {
    const EVENTS: u64 = 300;
    let node = Node::start(&["--buffer-memory", "64KiB"]).await;
    let options = Options { query: "channel=".into(), subprotocol: Some(JSON_MODE), small_buffer: true };
    let mut client = Client::try_open(node.public, "slow", &options).await.expect("it joins");
    client.next_control("welcome").await;
    let channels = ["busy", "quiet.1", "quiet.2"];
    for channel in channels {
        subscribed(&mut client, channel).await;
    }
    let text = "x".repeat(20_000);
    let mut ids = [const { Vec::new() }; 3];
    for n in 0..EVENTS {
        ids[0].push(node.publish("busy", &json!({"text": text, "n": n})).await);
        if n % 50 == 0 {
            ids[1].push(node.publish("quiet.1", &json!({"n": n})).await);
            ids[2].push(node.publish("quiet.2", &json!({"n": n})).await);
        }
    }
    let mut got = [const { Vec::new() }; 3];
    while got.iter().zip(&ids).any(|(got, ids)| got.len() < ids.len()) {
        let frame = client.next_json().await;
        let channel = channels.iter().position(|name| frame["channel"] == *name).expect("a channel");
        got[channel].push(position(&frame["id"]));
    }
    assert_eq!(got, ids);
}
