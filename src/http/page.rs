//! The demo page and the browser client, embedded in the binary.

use crate::http::Response;

/// A file in the binary.
#[derive(Debug)]
pub struct File {
    path: &'static str,
    content_type: &'static str,
    content: &'static str,
}

/// No files from other sites and nothing inline. The demo page may connect to any node.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src *; img-src 'self' data:; \
    base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

const JAVASCRIPT: &str = "text/javascript; charset=utf-8";

const TYPES: &str = include_str!("page/fanfare.d.ts");

const FILES: [File; 7] = [
    File { path: "/", content_type: "text/html; charset=utf-8", content: include_str!("page/index.html") },
    File {
        path: "/page.css",
        content_type: "text/css; charset=utf-8",
        content: include_str!("page/page.css"),
    },
    File { path: "/page.js", content_type: JAVASCRIPT, content: include_str!("page/page.js") },
    File { path: "/pane.js", content_type: JAVASCRIPT, content: include_str!("page/pane.js") },
    File { path: "/fanfare.js", content_type: JAVASCRIPT, content: include_str!("page/fanfare.js") },
    File { path: "/fanfare.d.ts", content_type: "text/plain; charset=utf-8", content: TYPES },
    // TypeScript looks for the types of a copy named fanfare.mjs here.
    File { path: "/fanfare.d.mts", content_type: "text/plain; charset=utf-8", content: TYPES },
];

/// The file at a path.
pub fn find(path: &str) -> Option<&'static File> {
    const { &FILES }.iter().find(|file| file.path == path)
}

impl File {
    /// Other sites may import the client.
    pub fn response(&self) -> Response {
        Response::new(200, self.content_type, self.content)
            .with("Cache-Control", "no-cache")
            .with("X-Content-Type-Options", "nosniff")
            .with("Content-Security-Policy", POLICY)
            .with("Access-Control-Allow-Origin", "*")
    }
}
