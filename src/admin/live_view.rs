//! The live view of this node: one page, embedded in the binary, that polls `/stats`.

use std::sync::LazyLock;

use data_encoding::BASE64;
use ring::digest::{SHA256, digest};

use crate::http::Response;

const STYLE: &str = include_str!("live_view/page.css");
const SCRIPT: &str = include_str!("live_view/page.js");

struct Page {
    html: String,
    /// Only this style and this script, by their hashes (CSP Level 3, section 2.3.1). Requests only
    /// to this listener.
    policy: String,
}

static PAGE: LazyLock<Page> = LazyLock::new(|| {
    let hash = |text: &str| BASE64.encode(digest(&SHA256, text.as_bytes()).as_ref());
    let html = include_str!("live_view/index.html")
        .replace("<style></style>", &format!("<style>{STYLE}</style>"))
        .replace("<script type=\"module\"></script>", &format!("<script type=\"module\">{SCRIPT}</script>"));
    let policy = format!(
        "default-src 'none'; script-src 'sha256-{}'; style-src 'sha256-{}'; connect-src 'self'; img-src data:; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        hash(SCRIPT),
        hash(STYLE),
    );
    Page { html, policy }
});

/// The page. With `needs_key` it asks for the key before its first request, which would be rejected
/// and counted.
pub(super) fn response(needs_key: bool) -> Response {
    let html = match needs_key {
        true => PAGE.html.replacen("<body ", "<body data-needs-key ", 1),
        false => PAGE.html.clone(),
    };
    Response::new(200, "text/html; charset=utf-8", html)
        .with("Cache-Control", "no-store")
        .with("X-Content-Type-Options", "nosniff")
        .with("Referrer-Policy", "no-referrer")
        .with("Content-Security-Policy", PAGE.policy.clone())
}
