//! Redis over TLS, with a certificate of an authority that only these tests know.

use std::path::Path;
use std::process::Command;

use serde_json::json;

use crate::common;
use crate::common::{Client, Node, Redis, free_port};

/// The variable that names a file with additional authorities.
const AUTHORITIES: &str = "SSL_CERT_FILE";

/// Creates `authority.pem` and, signed by it for localhost, `redis.pem` with `redis.key`.
fn make_certificates(directory: &Path) {
    let script = "
        key='ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes'
        openssl req -x509 -newkey $key -keyout authority.key -out authority.pem -days 2 -subj /CN=authority \
            -addext basicConstraints=critical,CA:TRUE
        openssl req -newkey $key -keyout redis.key -out redis.csr -subj /CN=localhost
        echo subjectAltName=DNS:localhost > names
        openssl x509 -req -in redis.csr -CA authority.pem -CAkey authority.key -CAcreateserial -days 2 \
            -extfile names -out redis.pem";
    let output = Command::new("sh").args(["-ec", script]).current_dir(directory).output();
    let output = output.expect("sh is there");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// A Redis with TLS on a second port. Returns the port too.
async fn start() -> (Redis, u16) {
    let mut redis = Redis::away(&[]);
    make_certificates(redis.directory());
    let port = free_port();
    redis.add_flags(&["--tls-port", &port.to_string(), "--tls-auth-clients", "no"]);
    redis.add_flags(&["--tls-cert-file", "redis.pem", "--tls-key-file", "redis.key"]);
    redis.add_flags(&["--tls-ca-cert-file", "authority.pem"]);
    redis.up().await;
    (redis, port)
}

#[tokio::test]
async fn events_travel_over_tls() {
    let (redis, port) = start().await;
    let (authority, url) = (redis.directory().join("authority.pem"), format!("rediss://localhost:{port}"));
    let node = Node::start_unready_with(AUTHORITIES, &authority, &["--redis", &url]).await;
    node.ready().await;
    let (mut client, _) = Client::resume(&node, "a", "room", "").await;
    let id = node.publish("room", &json!({"n": 1})).await;
    client.expect_event(id, &json!({"n": 1})).await;
    assert_eq!(redis.head("room").await, id);
}

#[tokio::test]
async fn untrusted_certificate_keeps_the_node_unready() {
    let (redis, port) = start().await;
    let authority = redis.directory().join("authority.pem");
    // The certificate does not contain the address. The second node does not know the authority.
    let strange = format!("rediss://127.0.0.1:{port}");
    let node = Node::start_unready_with(AUTHORITIES, &authority, &["--redis", &strange]).await;
    let other = Node::start_unready(&["--redis", &format!("rediss://localhost:{port}")]).await;
    for node in [node, other] {
        let said =
            common::until("a warning", || async { node.log().contains("WARN").then(|| node.log()) }).await;
        assert!(said.to_lowercase().contains("certificate"), "{said}");
        node.unready().await;
    }
}
