//! Users in a channel, over all nodes: without faults no join or leave of a user who stayed, and after
//! faults every node lists the users who are there.

use std::collections::BTreeSet;

use serde_json::json;

use crate::common::client::JSON_MODE;
use crate::common::redis::Value;
use crate::common::{Client, Node, Proxy, Redis, cluster, until};

const FLAGS: [&str; 4] = ["--presence", "room,team.*", "--ping-interval", "10m"];

/// A page of the users in a channel, and the number of all.
async fn page(node: &Node, query: &str) -> Option<serde_json::Value> {
    let response = node.admin("GET", &format!("/presence?channel={query}"), b"").await;
    match response.status {
        200 => Some(response.json()),
        503 => None,
        other => panic!("{other}: {}", response.body),
    }
}

/// The users in a channel. `None` while the node can't say.
async fn users(node: &Node, channel: &str) -> Option<BTreeSet<String>> {
    let mut users = BTreeSet::new();
    let mut query = format!("{channel}&limit=1000");
    loop {
        let page = page(node, &query).await?;
        let names = page["users"].as_array().expect("a list").iter();
        users.extend(names.map(|user| user.as_str().expect("a name").to_owned()));
        match page["next"].as_str() {
            Some(next) => query = format!("{channel}&limit=1000&after={next}"),
            None => return Some(users),
        }
    }
}

fn user_set(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| name.to_string()).collect()
}

/// Waits until these are the users.
async fn expect(node: &Node, channel: &str, names: &[&str]) {
    let expected = user_set(names);
    let last = std::sync::Mutex::new(None);
    let what = format!("the users {names:?}");
    until(&what, || async {
        let users = users(node, channel).await;
        let is_expected = users.as_ref() == Some(&expected);
        *last.lock().expect("nothing panics while holding it") = users;
        is_expected.then_some(())
    })
    .await;
}

/// The entries of the stream for backends: `join alice`, `leave alice`, `reset`.
async fn stream(redis: &Redis, channel: &str) -> Vec<String> {
    let entries =
        redis.client().await.call(&["XRANGE", &format!("fanfare:{{{channel}}}:presence"), "-", "+"]).await;
    let text = |entry: &Value| {
        let fields = entry.list()[1].list();
        assert_eq!(fields[0].text(), "event");
        let user = fields.get(3).map_or(String::new(), |user| format!(" {}", user.text()));
        fields[1].text().to_owned() + &user
    };
    entries.list().iter().map(text).collect()
}

/// Waits until backends have read this, and nothing else.
async fn expect_stream(redis: &Redis, channel: &str, expected: &[&str]) {
    until(&format!("the stream {expected:?}"), || async {
        (stream(redis, channel).await.len() >= expected.len()).then_some(())
    })
    .await;
    assert_eq!(stream(redis, channel).await, expected);
}

#[tokio::test]
async fn users_are_counted_over_nodes() {
    let (redis, a, b) = cluster(&FLAGS).await;
    let alice = [Client::plain(&a, "alice", "room").await, Client::plain(&a, "alice", "room").await];
    expect(&b, "room", &["alice"]).await;
    let also = Client::plain(&b, "alice", "room").await;
    let bob = Client::plain(&b, "bob", "room").await;
    let _other = Client::plain(&b, "carol", "lobby").await;
    for node in [&a, &b] {
        expect(node, "room", &["alice", "bob"]).await;
    }
    let of_alice = async |count: i64| {
        until("the nodes of alice", || async {
            let found = redis.client().await.call(&["HGET", "fanfare:{room}:members", "alice"]).await;
            (found != Value::Nil && found.int() == count).then_some(())
        })
        .await;
    };
    of_alice(2).await;
    for client in alice {
        client.leave().await;
    }
    of_alice(1).await;
    also.leave().await;
    expect(&a, "room", &["bob"]).await;
    bob.leave().await;
    expect(&a, "room", &[]).await;
    expect_stream(&redis, "room", &["join alice", "join bob", "leave alice", "leave bob"]).await;
    assert_eq!(redis.client().await.call(&["EXISTS", "fanfare:{lobby}:members"]).await.int(), 0);
    let response = a.admin("GET", "/presence?channel=lobby", b"").await;
    assert_eq!(response.status, 400, "{}", response.body);
}

#[tokio::test]
async fn reconnects_change_nothing() {
    let (redis, a, b) = cluster(&FLAGS).await;
    let mut client = Client::plain(&a, "alice", "team.1").await;
    expect(&b, "team.1", &["alice"]).await;
    let _bob = Client::plain(&b, "bob", "team.1").await;
    // To the other node and back, and again until a user who left before is gone.
    let gone = Client::plain(&b, "gone", "team.1").await;
    expect(&b, "team.1", &["alice", "bob", "gone"]).await;
    gone.leave().await;
    let mut turn = 0;
    while users(&a, "team.1").await.expect("redis works").contains("gone") {
        turn += 1;
        let next = Client::plain([&a, &b][turn % 2], "alice", "team.1").await;
        client.leave().await;
        client = Client::plain([&a, &b][turn / 2 % 2], "alice", "team.1").await;
        next.leave().await;
    }
    assert!(turn > 10);
    expect_stream(&redis, "team.1", &["join alice", "join bob", "join gone", "leave gone"]).await;
}

#[tokio::test]
async fn users_of_a_killed_node_leave() {
    let (redis, a, b) = cluster(&FLAGS).await;
    let _alice = Client::plain(&a, "alice", "room").await;
    let _bob = Client::plain(&a, "bob", "room").await;
    let _carol = Client::plain(&b, "carol", "room").await;
    expect(&b, "room", &["alice", "bob", "carol"]).await;
    a.kill();
    let _back = Client::plain(&b, "alice", "room").await;
    expect(&b, "room", &["alice", "carol"]).await;
    let stream = stream(&redis, "room").await;
    assert_eq!(stream.iter().filter(|event| *event != "leave bob" && !event.starts_with("join ")).count(), 0);
    assert_eq!(stream.len(), 4, "{stream:?}");
    // No trace of the node is left.
    let nodes = redis.client().await.call(&["HLEN", "fanfare:{room}:nodes"]).await;
    assert_eq!(nodes.int(), 2);
}

/// Lets time pass for a channel: sets its last use and the deadlines of its nodes back.
async fn age(redis: &Redis, channel: &str, millis: i64) {
    let key = format!("fanfare:{{{channel}}}:nodes");
    let mut client = redis.client().await;
    let fields = client.call(&["HGETALL", key.as_str()]).await;
    for pair in fields.list().chunks(2) {
        let (name, text) = (pair[0].text(), pair[1].text());
        let time = if name.is_empty() { 2 } else { 0 };
        let mut words: Vec<String> = text.split(' ').map(str::to_owned).collect();
        words[time] = (words[time].parse::<i64>().expect("a time") - millis).to_string();
        client.call(&["HSET", key.as_str(), name, &words.join(" ")]).await;
    }
}

#[tokio::test]
async fn users_of_the_last_node_leave_between_reads() {
    let (redis, a, b) = cluster(&FLAGS).await;
    let _alice = Client::plain(&a, "alice", "room").await;
    expect(&b, "room", &["alice"]).await;
    a.kill();
    // The first read can't know whether Redis was away from all nodes.
    age(&redis, "room", 20_000).await;
    assert_eq!(users(&b, "room").await, Some(user_set(&["alice"])));
    age(&redis, "room", 20_000).await;
    assert_eq!(users(&b, "room").await, Some(user_set(&[])));
    expect_stream(&redis, "room", &["join alice", "leave alice"]).await;
}

#[tokio::test]
async fn rolling_restart_changes_nothing() {
    let flags = [&FLAGS[..], &["--drain-timeout", "1s"]].concat();
    let (redis, a, b) = cluster(&flags).await;
    let mut nodes = [a, b];
    let mut clients = Vec::new();
    for n in 0..20 {
        clients.push(Client::plain(&nodes[n % 2], &format!("user-{n}"), "room").await);
    }
    until("all users", || async { (users(&nodes[0], "room").await?.len() == 20).then_some(()) }).await;
    for turn in 0..4 {
        let old = turn % 2;
        nodes[old].signal("TERM");
        for (n, client) in clients.iter_mut().enumerate().filter(|(n, _)| n % 2 == 0) {
            assert_eq!(client.expect_close().await.0, 1012);
            *client = Client::plain(&nodes[1 - old], &format!("user-{n}"), "room").await;
        }
        assert!(nodes[old].ended().await.success());
        nodes[old] = Node::on(&redis, &flags).await;
        // Half of the clients move to the new node, so that each node has its users in the next turn.
        for (n, client) in clients.iter_mut().enumerate().filter(|(n, _)| n % 2 == 1) {
            *client = Client::plain(&nodes[old], &format!("user-{n}"), "room").await;
        }
    }
    // Until the entries of the stopped nodes are gone: nobody has left with them.
    until("the stopped nodes to be gone", || async {
        users(&nodes[0], "room").await?;
        (redis.client().await.call(&["HLEN", "fanfare:{room}:nodes"]).await.int() == 3).then_some(())
    })
    .await;
    let events = stream(&redis, "room").await;
    assert!(events.len() == 20 && events.iter().all(|event| event.starts_with("join ")), "{events:?}");
}

#[tokio::test]
async fn stopped_node_comes_back() {
    let (redis, a, b) = cluster(&FLAGS).await;
    let _alice = Client::plain(&a, "alice", "room").await;
    expect(&b, "room", &["alice"]).await;
    let _bob = Client::plain(&b, "bob", "room").await;
    expect(&b, "room", &["alice", "bob"]).await;
    a.signal("STOP");
    expect(&b, "room", &["bob"]).await;
    a.signal("CONT");
    expect(&b, "room", &["alice", "bob"]).await;
    expect_stream(&redis, "room", &["join alice", "join bob", "leave alice", "join alice"]).await;
}

#[tokio::test]
async fn pause_of_redis_changes_nothing() {
    let (redis, a, b) = cluster(&FLAGS).await;
    let _alice = Client::plain(&a, "alice", "room").await;
    expect(&b, "room", &["alice"]).await;
    let _bob = Client::plain(&b, "bob", "room").await;
    expect(&b, "room", &["alice", "bob"]).await;
    let mut client = redis.client().await;
    let at = client.call(&["TIME"]).await.list()[0].int();
    redis.freeze();
    tokio::time::sleep(std::time::Duration::from_secs(16)).await; // longer than a lease
    redis.thaw();
    assert!(client.call(&["TIME"]).await.list()[0].int() - at >= 15);
    a.ready().await;
    let _carol = Client::plain(&a, "carol", "room").await;
    expect(&b, "room", &["alice", "bob", "carol"]).await;
    expect_stream(&redis, "room", &["join alice", "join bob", "join carol"]).await;
}

/// Runs commands that damage the keys of a channel, and waits until the users are right again.
async fn assert_restored_after(commands: &[&[&str]]) {
    let (redis, a, b) = cluster(&FLAGS).await;
    let _alice = [Client::plain(&a, "alice", "room").await, Client::plain(&b, "alice", "room").await];
    let bob = Client::plain(&a, "bob", "room").await;
    let _carol = Client::plain(&b, "carol", "room").await;
    expect(&a, "room", &["alice", "bob", "carol"]).await;
    let mut client = redis.client().await;
    let nodes = client.call(&["HKEYS", "fanfare:{room}:nodes"]).await;
    let node = nodes.list().iter().map(Value::text).find(|name| !name.is_empty()).expect("a node").to_owned();
    for command in commands {
        let command: Vec<String> = command.iter().map(|part| part.replace("NODE", &node)).collect();
        let reply = client.call(&command).await;
        assert!(!matches!(reply, Value::Error(_)), "{command:?}: {reply:?}");
    }
    bob.leave().await;
    for node in [&a, &b] {
        expect(node, "room", &["alice", "carol"]).await;
    }
    // The counts are right, too: alice is on both nodes.
    until("the count of alice", || async { (client_count(&redis, "alice").await == Some(2)).then_some(()) })
        .await;
    assert_eq!(client_count(&redis, "carol").await, Some(1));
}

async fn client_count(redis: &Redis, user: &str) -> Option<i64> {
    match redis.client().await.call(&["HGET", "fanfare:{room}:members", user]).await {
        Value::Nil => None,
        count => Some(count.int()),
    }
}

macro_rules! losses {
    ($($name:ident: $commands:expr;)+) => {$(
        #[tokio::test]
        async fn $name() {
            assert_restored_after(&$commands).await;
        }
    )+};
}

losses! {
    users_are_restored_after_a_wipe: [&["FLUSHALL"]];
    users_are_restored_without_members: [&["DEL", "fanfare:{room}:members"]];
    users_are_restored_without_nodes: [&["DEL", "fanfare:{room}:nodes"]];
    users_are_restored_without_the_set_of_a_node: [&["DEL", "fanfare:{room}:members:NODE"]];
    users_are_restored_after_damage: [&["HSET", "fanfare:{room}:nodes", "NODE", "x"]];
    users_are_restored_over_a_wrong_header: [&["HSET", "fanfare:{room}:members", "", "99999999999999999999 1 1"]];
    users_are_restored_over_wrong_types: [
        &["SET", "fanfare:{room}:members", "x"],
        &["SET", "fanfare:{room}:nodes", "x"],
        &["SET", "fanfare:{room}:members:NODE", "x"],
        &["SET", "fanfare:{room}:presence", "x"],
    ];
    wrong_count_is_corrected: [&["HSET", "fanfare:{room}:members", "bob", "0"]];
    count_that_is_no_number_is_corrected: [&["HSET", "fanfare:{room}:members", "bob", "x"]];
}

#[tokio::test]
async fn users_are_whole_or_unknown_after_a_wipe() {
    let (redis, a, b) = cluster(&FLAGS).await;
    let _alice = Client::plain(&a, "alice", "room").await;
    let _bob = Client::plain(&b, "bob", "room").await;
    expect(&a, "room", &["alice", "bob"]).await;
    redis.client().await.call(&["FLUSHALL"]).await;
    assert_eq!(users(&a, "room").await, None);
    let found = until("the users", || users(&a, "room")).await;
    assert_eq!(found, user_set(&["alice", "bob"]));
    let events = stream(&redis, "room").await;
    assert!(events.len() == 3 && events[0] == "reset", "{events:?}");
}

#[tokio::test]
async fn new_users_after_a_wipe_hide_no_loss() {
    let (redis, a, b) = cluster(&FLAGS).await;
    let _alice = Client::plain(&a, "alice", "room").await;
    expect(&b, "room", &["alice"]).await;
    a.signal("STOP");
    redis.client().await.call(&["FLUSHALL"]).await;
    let _bob = Client::plain(&b, "bob", "room").await;
    expect(&b, "room", &["bob"]).await;
    a.signal("CONT");
    // The other node knows of users: until it has added them, the list is unknown.
    until("a list that is not whole", || async { users(&b, "room").await.is_none().then_some(()) }).await;
    expect(&b, "room", &["alice", "bob"]).await;
    expect_stream(&redis, "room", &["join bob", "reset", "join alice"]).await;
}

#[tokio::test]
async fn restart_of_an_empty_redis_restores_users() {
    let (mut redis, a, b) = cluster(&FLAGS).await;
    let _alice = Client::plain(&a, "alice", "room").await;
    let _bob = Client::plain(&b, "bob", "room").await;
    expect(&b, "room", &["alice", "bob"]).await;
    redis.kill();
    redis.up().await;
    expect(&b, "room", &["alice", "bob"]).await;
    assert!(!stream(&redis, "room").await.iter().any(|event| event.starts_with("leave")));
}

#[tokio::test]
async fn failover_with_lost_writes_restores_users() {
    let redis = Redis::start(&[]).await;
    let mut replica = Redis::replica_of(&redis).await;
    let proxy = Proxy::to(redis.port()).await;
    let url = proxy.url();
    let flags = [&["--redis", &url], &FLAGS[..]].concat();
    let (a, b) = tokio::join!(Node::start(&flags), Node::start(&flags));
    let _alice = Client::plain(&a, "alice", "room").await;
    let bob = Client::plain(&b, "bob", "room").await;
    expect(&b, "room", &["alice", "bob"]).await;
    until("the replica to have them", || async {
        (client_count(&replica, "bob").await == Some(1)).then_some(())
    })
    .await;
    // The replica misses what follows.
    replica.client().await.call(&["REPLICAOF", "NO", "ONE"]).await;
    let _carol = Client::plain(&a, "carol", "room").await;
    bob.leave().await;
    expect(&b, "room", &["alice", "carol"]).await;
    replica.promote().await;
    proxy.lead_to(replica.port());
    proxy.cut();
    expect(&b, "room", &["alice", "carol"]).await;
    expect(&a, "room", &["alice", "carol"]).await;
}

#[tokio::test]
async fn rights_for_presence_are_needed_only_with_it() {
    let redis = Redis::start(&[]).await;
    let rights = ["ACL", "SETUSER", "node", "on", ">secret", "~*", "&*", "+@all", "-spop"];
    assert_eq!(redis.client().await.call(&rights).await.text(), "OK");
    let url = redis.url().replace("//", "//node:secret@");
    let _other = Node::start(&["--redis", &url]).await;
    let node = Node::start_unready(&["--redis", &url, "--presence", "room"]).await;
    until("the missing right", || async { node.unready().await.contains("SPOP").then_some(()) }).await;
}

#[tokio::test]
async fn single_node_tracks_users_without_redis() {
    let node = Node::start(&FLAGS).await;
    let alice = [Client::plain(&node, "alice", "room").await, Client::plain(&node, "alice", "room").await];
    let bob = Client::plain(&node, "bob", "room").await;
    let _back = {
        let _short = Client::plain(&node, "carol", "room").await;
        expect(&node, "room", &["alice", "bob", "carol"]).await;
        Client::plain(&node, "carol", "room").await
    };
    let first = page(&node, "room&limit=2").await.expect("there is no outage");
    assert_eq!(first, serde_json::json!({"users": ["alice", "bob"], "count": 3, "next": "bob"}));
    let second = page(&node, "room&limit=2&after=bob").await.expect("there is no outage");
    assert_eq!(second, serde_json::json!({"users": ["carol"], "count": 3, "next": null}));
    assert_eq!(node.metric("fanfare_presence_users").await, 3.0);
    for client in alice {
        client.leave().await;
    }
    bob.leave().await;
    expect(&node, "room", &["carol"]).await;
}

/// What a client knows of who is in a channel, from its frames.
struct Watcher {
    client: Client,
    users: Option<BTreeSet<String>>,
    count: u64,
    /// The joins and leaves after the list: `+alice`, `-alice`.
    changes: Vec<String>,
}

impl Watcher {
    /// Joins a channel and asks who is in it. Waits for the list.
    async fn join(node: &Node, user: &str, channel: &str) -> Watcher {
        let query = format!("channel={channel}&presence=1");
        let mut client = Client::open(node, user, &query, Some(JSON_MODE)).await;
        client.welcome().await;
        Watcher::of(client).await
    }

    async fn of(client: Client) -> Watcher {
        let mut watcher = Watcher { client, users: None, count: 0, changes: Vec::new() };
        watcher.read().await;
        watcher
    }

    /// Reads the next frame about presence.
    async fn read(&mut self) {
        let mut frame = self.client.next_json().await;
        while frame["type"] == "reset" {
            frame = self.client.next_json().await;
        }
        assert_eq!(frame["type"], "presence");
        self.count = frame["count"].as_u64().expect("a number");
        let names = |key: &str| -> Option<BTreeSet<String>> {
            let names = frame.get(key)?.as_array().expect("a list");
            Some(names.iter().map(|name| name.as_str().expect("a name").to_owned()).collect())
        };
        match (names("users"), names("join"), names("leave")) {
            (Some(users), None, None) => self.users = Some(users),
            (None, Some(joined), Some(left)) => {
                let users = self.users.as_mut().expect("changes follow a list");
                for user in &joined {
                    assert!(users.insert(user.clone()), "{user} was there: {frame}");
                    self.changes.push(format!("+{user}"));
                }
                for user in &left {
                    assert!(users.remove(user), "{user} was not there: {frame}");
                    self.changes.push(format!("-{user}"));
                }
            }
            (None, None, None) => self.users = None,
            _ => panic!("{frame}"),
        }
        if let Some(users) = &self.users {
            assert_eq!(users.len() as u64, self.count, "{frame}");
        }
    }

    /// Reads until these are the users.
    async fn expect(&mut self, names: &[&str]) {
        while self.users != Some(user_set(names)) {
            self.read().await;
        }
    }
}

#[tokio::test]
async fn clients_get_the_list_then_changes() {
    let (_redis, a, b) = cluster(&FLAGS).await;
    let mut alice = Watcher::join(&a, "alice", "room").await;
    alice.expect(&["alice"]).await;
    let mut bob = Watcher::join(&b, "bob", "room").await;
    bob.expect(&["alice", "bob"]).await;
    alice.expect(&["alice", "bob"]).await;
    let carol = Client::plain(&a, "carol", "room").await;
    for watcher in [&mut alice, &mut bob] {
        watcher.expect(&["alice", "bob", "carol"]).await;
    }
    carol.leave().await;
    for watcher in [&mut alice, &mut bob] {
        watcher.expect(&["alice", "bob"]).await;
        assert_eq!(watcher.changes[watcher.changes.len() - 2..], ["+carol", "-carol"]);
    }
    // One more on a node that knows the users already.
    let mut dave = Watcher::join(&a, "dave", "room").await;
    dave.expect(&["alice", "bob", "dave"]).await;
    assert_eq!(a.metric("fanfare_connections").await, 2.0);
}

#[tokio::test]
async fn subscriptions_get_presence_by_name() {
    let (_redis, a, b) = cluster(&FLAGS).await;
    let _bob = Client::plain(&b, "bob", "team.1").await;
    let mut client = Client::open(&a, "alice", "channel=", Some(JSON_MODE)).await;
    client.next_control("welcome").await;
    client.send(r#"{"type":"subscribe","channel":"team.1","presence":true}"#).await;
    client.next_control("welcome").await;
    loop {
        let frame = client.next_control("presence").await;
        assert_eq!(frame["channel"], "team.1");
        if frame["count"] == 2 {
            break;
        }
    }
    client.send(r#"{"type":"subscribe","channel":"lobby","presence":true,"ref":1}"#).await;
    assert_eq!(client.expect_error(Some(json!(1))).await, "invalid");
    client.send(r#"{"type":"unsubscribe","channel":"team.1","ref":2}"#).await;
    client.next_control("unsubscribed").await;
    // No frame follows, and the node asks no more.
    let _carol = Client::plain(&a, "carol", "team.1").await;
    expect(&a, "team.1", &["bob", "carol"]).await;
    client.send(r#"{"type":"ping"}"#).await;
    client.next_control("ping").await;
}

#[tokio::test]
async fn large_channels_show_only_a_count() {
    let (_redis, a, b) = cluster(&[&FLAGS[..], &["--presence-list", "3"]].concat()).await;
    let mut alice = Watcher::join(&a, "alice", "room").await;
    let more = [Client::plain(&b, "bob", "room").await, Client::plain(&b, "carol", "room").await];
    alice.expect(&["alice", "bob", "carol"]).await;
    let dave = Client::plain(&a, "dave", "room").await;
    while alice.users.is_some() {
        alice.read().await;
    }
    assert_eq!(alice.count, 4);
    let late = Watcher::join(&b, "alice", "room").await;
    assert_eq!((late.users, late.count), (None, 4));
    dave.leave().await;
    let [bob, _carol] = more;
    bob.leave().await;
    alice.expect(&["alice", "carol"]).await;
}

#[tokio::test]
async fn only_tracked_channels_have_presence() {
    let node = Node::start(&FLAGS).await;
    let mut rejected = Vec::new();
    for (query, subprotocol) in [
        ("channel=lobby&presence=1", Some(JSON_MODE)),
        ("channel=&presence=1", Some(JSON_MODE)),
        ("channel=room&presence=2", Some(JSON_MODE)),
        ("channel=room&presence=1", None),
    ] {
        let mut client = Client::open(&node, "alice", query, subprotocol).await;
        rejected.push(client.expect_close().await.0);
    }
    assert_eq!(rejected, [4400; 4]);
    let mut alice = Watcher::join(&node, "alice", "room").await;
    alice.expect(&["alice"]).await;
    let bob = Client::plain(&node, "bob", "room").await;
    alice.expect(&["alice", "bob"]).await;
    bob.leave().await;
    alice.expect(&["alice"]).await;
    assert_eq!(alice.changes, ["+bob", "-bob"]);
}

#[tokio::test]
async fn views_equal_the_truth_after_faults() {
    let (mut redis, a, b) = cluster(&FLAGS).await;
    let mut alice = Watcher::join(&a, "alice", "room").await;
    let mut bob = Watcher::join(&b, "bob", "room").await;
    let carol = Client::plain(&b, "carol", "room").await;
    for watcher in [&mut alice, &mut bob] {
        watcher.expect(&["alice", "bob", "carol"]).await;
    }
    // Redis is empty again: nobody is said to have left.
    redis.kill();
    redis.up().await;
    for node in [&a, &b] {
        node.ready().await;
    }
    let dave = Client::plain(&a, "dave", "room").await;
    for watcher in [&mut alice, &mut bob] {
        watcher.expect(&["alice", "bob", "carol", "dave"]).await;
    }
    // The stream is gone, from which changes are read.
    redis.client().await.call(&["DEL", "fanfare:{room}:presence"]).await;
    let _erin = Client::plain(&b, "erin", "room").await;
    for watcher in [&mut alice, &mut bob] {
        watcher.expect(&["alice", "bob", "carol", "dave", "erin"]).await;
        assert!(!watcher.changes.iter().any(|change| change.starts_with('-')), "{:?}", watcher.changes);
    }
    carol.leave().await;
    redis.client().await.call(&["DEL", "fanfare:{room}:members"]).await;
    dave.leave().await;
    for watcher in [&mut alice, &mut bob] {
        watcher.expect(&["alice", "bob", "erin"]).await;
        assert_eq!(watcher.changes.iter().filter(|change| change.starts_with('-')).count(), 2);
    }
    // A node that crashes takes its users with it, unless they come back.
    b.kill();
    let mut back = Watcher::join(&a, "bob", "room").await;
    back.expect(&["alice", "bob"]).await;
    alice.expect(&["alice", "bob"]).await;
    assert_eq!(alice.changes.last().map(String::as_str), Some("-erin"));
}
