//! Newcomers with `history`, and `GET /history`: test bodies for both buses.

use serde_json::{Value, json};

use super::client::{JSON_MODE, position};
use super::{Client, Node};

/// Publishes 40 numbers, every fourth for bob alone. Returns the position before them, and their
/// ids, once the only shard has all of them.
async fn publish_forty(node: &Node) -> (u64, Vec<u64>) {
    let (mut first, welcome) = Client::resume(node, "bob", "room", "").await;
    let mut ids = Vec::new();
    for n in 0..40 {
        ids.push(match n % 4 {
            3 => node.publish_to("room", "bob", &json!({ "n": n })).await,
            _ => node.publish("room", &json!({ "n": n })).await,
        });
    }
    expect_events(&mut first, "bob", &ids, 0..40).await;
    first.leave().await;
    (position(&welcome["head"]), ids)
}

/// Expects the events with these numbers that the user gets.
async fn expect_events(client: &mut Client, user: &str, ids: &[u64], numbers: std::ops::Range<usize>) {
    for n in numbers {
        match n % 4 {
            3 if user == "bob" => client.expect_event(ids[n], &json!({ "to": "bob", "n": n })).await,
            3 => {}
            _ => client.expect_event(ids[n], &json!({ "n": n })).await,
        }
    }
}

/// The node has one shard.
pub async fn newcomers_get_recent_events(node: &Node) {
    // A new channel has a position and no events.
    let query = "channel=new&history=10&lastEventId=";
    let mut client = Client::open(node, "a", query, None).await;
    let welcome = client.welcome().await;
    assert_eq!((&welcome["lastEventId"], &welcome["recovered"]), (&welcome["head"], &json!(true)));
    let id = node.publish("new", &json!({"n": 0})).await;
    client.expect_event(id, &json!({"n": 0})).await;

    let (base, ids) = publish_forty(node).await;
    let mut clients = Vec::new();
    for (user, count) in [("alice", 1), ("bob", 1), ("alice", 7), ("bob", 39), ("alice", 40), ("bob", 100)] {
        let query = format!("channel=room&history={count}&lastEventId=");
        let mut client = Client::open(node, user, &query, None).await;
        let welcome = client.welcome().await;
        let start = if count < 40 { ids[39 - count] } else { base };
        let expected = json!({"type": "welcome", "lastEventId": start, "head": ids[39], "recovered": true});
        assert_eq!(welcome, expected, "{user} {count}");
        expect_events(&mut client, user, &ids, 40 - count.min(40)..40).await;
        clients.push(client);
    }
    let mut plain = Client::open(node, "bob", "channel=room&history=6", None).await;
    expect_events(&mut plain, "bob", &ids, 34..40).await;
    clients.push(plain);
    let mut json_mode = Client::open(node, "bob", "channel=room&history=6", Some(JSON_MODE)).await;
    assert_eq!(json_mode.welcome().await["lastEventId"], ids[33]);
    expect_events(&mut json_mode, "bob", &ids, 34..40).await;
    clients.push(json_mode);
    // A client that comes back continues after its last event, and may have missed events otherwise.
    for (last, start, recovered) in [(ids[37], ids[37], true), (ids[0] - 1000, ids[39], false)] {
        let query = format!("channel=room&history=6&lastEventId={last}");
        let mut client = Client::open(node, "bob", &query, None).await;
        let welcome = client.welcome().await;
        assert_eq!((&welcome["lastEventId"], &welcome["recovered"]), (&json!(start), &json!(recovered)));
        expect_events(&mut client, "bob", &ids, if recovered { 38..40 } else { 40..40 }).await;
        clients.push(client);
    }
    let live = node.publish_numbers("room", 40..43).await;
    for client in &mut clients {
        client.expect_numbers(&live, 40).await;
    }
}

async fn history(node: &Node, query: &str) -> Value {
    let response = node.admin("GET", &format!("/history?{query}"), b"").await;
    assert_eq!(response.status, 200, "{query}: {}", response.body);
    response.json()
}

fn ids_of(answer: &Value) -> Vec<u64> {
    let events = answer["events"].as_array().expect("a list");
    events.iter().map(|event| position(&event["id"])).collect()
}

pub async fn backends_read_history(node: &Node) {
    let empty = history(node, "channel=room").await;
    assert_eq!(
        (&empty["events"], &empty["next"], &empty["recovered"]),
        (&json!([]), &empty["head"], &json!(true))
    );
    let (base, ids) = publish_forty(node).await;
    let newest = history(node, "channel=room&limit=2").await;
    let expected = json!({
        "events": [{"n": 38, "id": ids[38]}, {"to": "bob", "n": 39, "id": ids[39]}],
        "next": ids[39], "head": ids[39], "oldest": ids[0], "base": base, "recovered": true,
    });
    assert_eq!(newest, expected);
    assert_eq!(ids_of(&history(node, "channel=room").await), ids);
    // Page by page, then what is new.
    let (mut after, mut read) = (base, Vec::new());
    loop {
        let page = history(node, &format!("channel=room&limit=7&after={after}")).await;
        assert_eq!(page["recovered"], true, "{page}");
        read.extend(ids_of(&page));
        after = position(&page["next"]);
        if page["next"] == page["head"] {
            break;
        }
        assert_eq!(ids_of(&page).len(), 7);
    }
    assert_eq!(read, ids);
    let id = node.publish("room", &json!({"n": 40})).await;
    assert_eq!(ids_of(&history(node, &format!("channel=room&after={after}")).await), [id]);
    // Positions that are not continuous.
    let all = [&ids[..], &[id]].concat();
    for after in [0, base - 1, id + 1, (1 << 53) - 1] {
        let page = history(node, &format!("channel=room&after={after}")).await;
        assert_eq!((ids_of(&page), &page["recovered"]), (all.clone(), &json!(false)), "{after}: {page}");
        assert_eq!(page["next"], page["head"]);
    }
    for query in
        ["after=", "after=x", "after=9007199254740992", "limit=0", "limit=1001", "limit=x", "chanel=a"]
    {
        node.admin("GET", &format!("/history?{query}"), b"").await.expect_rejection(400);
    }
}
