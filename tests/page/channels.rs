//! Several channels in a pane of the page.

use serde_json::{Value, json};

use crate::common::{Node, Redis, TokenKey};
use crate::{ENTER, Page, Row};

const DOWN: &str = "\u{E015}"; // WebDriver section 17.4.2

impl Page {
    async fn subscribe(&self, pane: &str, channel: &str) {
        self.0.type_into(&format!("#{pane} [name=channel]"), &format!("{channel}{ENTER}")).await;
    }

    async fn select(&self, pane: &str, channel: &str) {
        self.0.click(&format!("#{pane} label:has([value='{channel}'])")).await;
    }

    /// Of each channel: its name, whether it is selected, its position, what is unread.
    fn channels(pane: &str) -> String {
        format!(
            "[...document.querySelectorAll('#{pane} .channels li')].map((item) => {{
                const text = (part) => item.querySelector(part).textContent;
                return [text('.name'), item.querySelector('input').checked, text('.at'), text('.unread')];
            }})"
        )
    }

    async fn lists(&self, pane: &str, expected: Value) {
        self.0.becomes(&Page::channels(pane), expected).await;
    }

    /// The texts of the events that can be seen.
    async fn sees(&self, pane: &str, expected: Value) {
        let script = format!(
            "[...document.querySelectorAll('#{pane} .event')].filter((row) => row.checkVisibility())
                .map((row) => row.querySelector('.body').textContent)"
        );
        self.0.becomes(&script, expected).await;
    }
}

fn id(row: &Row) -> String {
    row.id.expect("an id").to_string()
}

#[tokio::test]
async fn pane_follows_several_channels() {
    let redis = Redis::start(&[]).await;
    let (a, b) = tokio::join!(Node::on(&redis, &[]), Node::on(&redis, &[]));
    let page = Page::open(&a, &b, "lobby").await;
    for channel in ["room.1", "room.2"] {
        page.subscribe("left", channel).await;
        page.subscribe("right", channel).await;
    }
    page.select("left", "room.1").await;
    page.say("left", "hi room").await;
    let right = page.shows("right", "hi room").await;
    assert_eq!((right[0].sender.as_str(), &right[0].marks[..]), ("alice", &["room.1".to_owned()][..]));
    page.say("right", "in room 2").await; // the one added last is selected
    let left = page.shows("left", "in room 2").await;
    assert_eq!(left[1].marks, ["room.2"]);
    let in_lobby = b.publish("lobby", &json!({"text": "for all"})).await.to_string();
    page.shows("left", "for all").await;
    page.shows("right", "for all").await;

    let (one, two) = (id(&left[0]), id(&left[1]));
    let list = json!([
        ["lobby", false, in_lobby, "1 unread"],
        ["room.1", true, one, ""],
        ["room.2", false, two, "1 unread"],
    ]);
    page.lists("left", list).await;
    page.sees("left", json!(["hi room"])).await;
    page.select("left", "room.2").await;
    page.sees("left", json!(["in room 2"])).await;
    page.0.becomes("document.querySelector('#left .position').textContent", json!(two)).await;
    page.0.becomes("document.querySelectorAll('#left .unread:empty').length", json!(2)).await;

    // A reload follows them again, as a newcomer.
    let query = format!(
        "?channel=lobby&leftChannels=room.1%2Croom.2&right={}&rightChannels=room.1%2Croom.2",
        b.public
    );
    page.0.becomes("location.search", json!(query.replace("127.0.0.1:", "127.0.0.1%3A"))).await;
    page.0.command("/refresh", json!({})).await;
    page.lists(
        "right",
        json!([["lobby", true, in_lobby, ""], ["room.1", false, one, ""], ["room.2", false, two, ""],]),
    )
    .await;

    // After an unsubscribe its events come no more.
    page.lists(
        "left",
        json!([["lobby", true, in_lobby, ""], ["room.1", false, one, ""], ["room.2", false, two, ""],]),
    )
    .await;
    page.select("left", "room.1").await;
    page.0.click("#left [aria-label='Unsubscribe from room.1']").await;
    page.lists("left", json!([["lobby", true, in_lobby, ""], ["room.2", false, two, ""]])).await;
    page.0.becomes("location.search.includes('leftChannels=room.2&')", json!(true)).await;
    a.publish("room.1", &json!({"text": "not for left"})).await;
    page.shows("right", "not for left").await;
    a.publish("room.2", &json!({"text": "the last"})).await;
    let left = page.shows("left", "the last").await;
    assert_eq!(left.len(), 1, "{left:?}");
    page.expect_no_complaints().await;
}

#[tokio::test]
async fn cut_pane_resumes_all_its_channels() {
    let redis = Redis::start(&[]).await;
    let (a, b) = tokio::join!(Node::on(&redis, &[]), Node::on(&redis, &[]));
    let page = Page::open(&a, &b, "lobby").await;
    let channels: Vec<_> = (1..=5).map(|n| format!("room.{n}")).collect();
    let mut before = Vec::new();
    for channel in &channels {
        page.subscribe("left", channel).await;
        page.0.becomes(&format!("{}.at(-1)[2] > 0", Page::channels("left")), json!(true)).await;
        before.push(b.publish(channel, &json!({"text": channel})).await);
        page.shows("left", channel).await;
    }
    page.0.click("#left .cut").await;
    page.reaches("left", "cut").await;
    for (channel, count) in channels.iter().zip(1..) {
        b.publish_numbers(channel, 0..count).await;
    }
    page.0.click("#left .cut").await; // now reads "Reconnect now"
    page.reaches("left", "live").await;
    for ((channel, before), count) in channels.iter().zip(before).zip(1..) {
        page.select("left", channel).await;
        let events = if count == 1 { "event" } else { "events" };
        page.notice("left", &format!("Resumed after {before}: {count} {events} recovered")).await;
    }
    let rows = page.rows("left").await;
    assert_eq!(rows.len(), 5 + 1 + 2 + 3 + 4 + 5);
    assert!(rows[5..].iter().all(|row| row.marks[1] == "recovered"), "{rows:?}");
    page.expect_no_complaints().await;
}

#[tokio::test]
async fn page_says_which_channel_is_forbidden() {
    let key = TokenKey::new();
    let node = Node::start(&["--jwt-key", &key.path()]).await;
    let page = Page::load(&node, "?channel=news&leftChannels=secret").await;
    page.notice("left", "This server needs a token").await;
    page.set("#left .token", &key.token("alice", &["--channel", "news", "--channel", "room.*"])).await;
    page.notice("left", "Not subscribed to secret (forbidden)").await;
    page.0.becomes("location.search", json!("?channel=news")).await;
    page.subscribe("left", "room.1").await;
    page.0
        .becomes(
            &format!("{}.map(([name, , at]) => [name, at > 0])", Page::channels("left")),
            json!([["news", true], ["room.1", true]]),
        )
        .await;
    page.subscribe("left", "news").await; // selects what is there
    page.0.becomes("document.querySelector('#left :checked').value", json!("news")).await;
    page.expect_no_complaints().await;
}

#[tokio::test]
async fn channels_are_chosen_with_the_keyboard() {
    let node = Node::start(&[]).await;
    let page = Page::load(&node, "?channel=lobby&leftChannels=room.1").await;
    page.reaches("left", "live").await;
    page.0.becomes(&format!("{}[1][2] > 0", Page::channels("left")), json!(true)).await;
    let id = node.publish("room.1", &json!({"text": "hi"})).await.to_string();
    page.shows("left", "hi").await;
    let read = page.0.read_aloud("#left .channels").await;
    assert!(read.contains("room.1") && read.contains("1 unread") && !read.contains(&id), "{read}");
    let read = page.0.read_aloud("#left .events").await;
    assert!(!read.contains("hi"), "not the selected channel: {read}");
    page.0.type_into("#left [value=lobby]", DOWN).await;
    page.0.becomes("document.activeElement.value", json!("room.1")).await;
    page.sees("left", json!(["hi"])).await;
    let label = "document.querySelector('#left .events').getAttribute('aria-label')";
    page.0.becomes(label, json!("Messages to alice in room.1")).await;
    let read = page.0.read_aloud("#left .events").await;
    assert!(read.contains("room.1") && read.contains("hi") && !read.contains(&id), "{read}");
    page.0.type_into("#left .leave", ENTER).await;
    page.0.becomes("document.activeElement.value", json!("lobby")).await; // nothing jumps to the top
    page.expect_no_complaints().await;
}
