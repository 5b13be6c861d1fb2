//! Events from before a client joined, and what backends see of channels, on one node.

use serde_json::{Value, json};

use crate::common::client::position;
use crate::common::recent_events::{backends_read_history, newcomers_get_recent_events};
use crate::common::{Client, Node, until};

#[tokio::test]
async fn newcomers_get_recent_events_of_a_node() {
    newcomers_get_recent_events(&Node::start(&["--shards", "1"]).await).await;
}

#[tokio::test]
async fn backends_read_history_of_a_node() {
    backends_read_history(&Node::start(&[]).await).await;
}

#[tokio::test]
async fn bad_history_is_rejected() {
    let node = Node::start(&[]).await;
    for history in ["0", "101", "x", ""] {
        for more in ["", "&lastEventId=1"] {
            let mut client = Client::open(&node, "a", &format!("history={history}{more}"), None).await;
            assert_eq!(client.expect_close().await.0, 4400, "{history}{more}");
        }
    }
}

/// The feed holds the last 16 events or so, history some 50.
#[tokio::test]
async fn newcomers_get_events_that_the_feed_has_evicted() {
    let flags = ["--shards", "1", "--buffer-memory", "1MiB", "--history-bytes", "3MiB"];
    let node = Node::start(&flags).await;
    let mut live = Client::plain(&node, "live", "room").await;
    let padding = "x".repeat(60_000);
    let mut ids = Vec::new();
    for n in 0..80 {
        ids.push(node.publish("room", &json!({"n": n, "padding": padding})).await);
        assert_eq!(live.next_event().await.0, ids[n]);
    }
    let page = node.admin("GET", "/history?channel=room&after=0", b"").await.json();
    let oldest = ids.iter().position(|id| page["oldest"] == *id).expect("an event");
    assert!((20..40).contains(&oldest), "{oldest}");
    for (count, first) in [(5, 75), (40, 40), (80 - oldest, oldest), (81 - oldest, oldest), (100, oldest)] {
        let query = format!("channel=room&history={count}&lastEventId=");
        let mut client = Client::open(&node, "a", &query, None).await;
        let welcome = client.welcome().await;
        let expected =
            json!({"type": "welcome", "lastEventId": ids[first - 1], "head": ids[79], "recovered": true});
        assert_eq!(welcome, expected, "{count}");
        for id in &ids[first..] {
            assert_eq!(client.next_event().await.0, *id);
        }
    }
    // Events of 60 kB fill a response before its limit on events.
    let events = page["events"].as_array().expect("a list");
    assert!((2..8).contains(&events.len()), "{}", events.len());
    assert_eq!((&events[0]["id"], &page["recovered"]), (&json!(ids[oldest]), &json!(false)));
    assert_eq!(page["next"], events[events.len() - 1]["id"]);
}

#[tokio::test]
async fn channels_are_listed_with_their_connections() {
    let node = Node::start(&["--shards", "2"]).await;
    let channels = async |query: &str| {
        let response = node.admin("GET", &format!("/channels{query}"), b"").await;
        assert_eq!(response.status, 200, "{query}: {}", response.body);
        response.json()
    };
    assert_eq!(channels("").await, json!({"channels": [], "next": null}));
    let mut clients = Vec::new();
    for n in 0..5 {
        for user in 0..=n {
            let channel = format!("room.{n}");
            clients.push(Client::json(&node, &format!("user{user}"), &channel).await.0);
        }
    }
    let id = node.publish("room.3", &json!(1)).await;
    let all = until("the event on both shards", || async {
        let all = channels("").await;
        (position(&all["channels"][3]["position"]) == id).then_some(all)
    })
    .await;
    assert_eq!(all["next"], Value::Null);
    let found: Vec<_> = all["channels"].as_array().expect("a list").iter().collect();
    for (n, channel) in found.iter().enumerate() {
        assert_eq!(
            (&channel["channel"], &channel["connections"]),
            (&json!(format!("room.{n}")), &json!(n + 1))
        );
        assert!(position(&channel["position"]) > 0);
    }
    assert_eq!(found.len(), 5);
    let two = channels("?limit=2").await;
    assert_eq!((two["channels"].as_array().map(Vec::len), &two["next"]), (Some(2), &json!("room.1")));
    let rest = channels("?limit=3&after=room.1").await;
    assert_eq!((&rest["channels"][0]["channel"], &rest["next"]), (&json!("room.2"), &Value::Null));
    assert_eq!(rest["channels"].as_array().map(Vec::len), Some(3));
    for query in ["?after=a%20b", "?limit=0", "?channel=a"] {
        node.admin("GET", &format!("/channels{query}"), b"").await.expect_rejection(400);
    }
}
