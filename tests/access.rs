//! Who gets in: origins, and what a browser may connect from.

mod common;

use common::{Node, Raw};

#[tokio::test]
async fn pages_of_foreign_sites_are_refused() {
    let node = Node::start(&[]).await;
    let own = format!("http://{}", node.public);
    let other_port = format!("http://127.0.0.1:{}", node.admin.port());
    for (origin, status) in [
        (own.as_str(), 101),
        (&other_port, 101), // the page's second pane; both are loopback
        ("http://localhost:3000", 101),
        ("https://example.com", 403),
        ("http://127.0.0.1.example.com", 403),
        ("null", 403),
        ("nonsense", 403),
    ] {
        let mut raw = Raw::connect(node.public).await;
        let response = raw.upgrade("/ws/a", &[("Origin", origin)]).await;
        assert_eq!(response.status, status, "{origin}: {response:?}");
        if status == 403 {
            response.expect_refusal(403);
            raw.expect_end().await;
        }
    }
    let mut raw = Raw::connect(node.public).await;
    let twice = [("Origin", own.as_str()), ("Origin", "https://example.com")];
    raw.upgrade("/ws/a", &twice).await.expect_refusal(403);
    assert_eq!(node.metric_of("fanfare_ends_total", r#"reason="foreign_origin""#).await, 5.0);
    // A page may still look at the rest: it is public.
    assert_eq!(node.get("/healthz").await.status, 200);
}

#[tokio::test]
async fn named_sites_may_connect_and_nobody_else() {
    let node =
        Node::start(&["--allow-origin", "https://example.com", "--allow-origin", "https://*.example.org"])
            .await;
    let own = format!("http://{}", node.public);
    for (origin, status) in [
        ("https://example.com", 101),
        ("https://chat.example.org", 101),
        ("https://example.org", 403),
        ("http://example.com", 403),
        (&own, 403),
        ("null", 403),
    ] {
        let mut raw = Raw::connect(node.public).await;
        assert_eq!(raw.upgrade("/ws/a", &[("Origin", origin)]).await.status, status, "{origin}");
    }
    Raw::upgraded(node.public, "/ws/program").await;
}
