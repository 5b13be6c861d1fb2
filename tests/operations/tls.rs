//! Redis over TLS, with a certificate of a CA that only these tests know.

use std::path::Path;
use std::process::Command;

use futures_util::future::join_all;
use serde_json::json;

use crate::common::{Client, Node, Redis, free_port};
use crate::start_texts::assert_unready;

/// The variable that names a file with additional CA certificates.
const CA_VARIABLE: &str = "SSL_CERT_FILE";

/// Creates `ca.pem` and, signed by it for localhost, `redis.pem` with `redis.key`; and
/// `other.pem`, which signs itself for localhost.
fn make_certificates(directory: &Path) {
    let script = "
        key='ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes'
        openssl req -x509 -newkey $key -keyout ca.key -out ca.pem -days 2 -subj /CN=ca \
            -addext basicConstraints=critical,CA:TRUE
        openssl req -x509 -newkey $key -keyout other.key -out other.pem -days 2 -subj /CN=localhost \
            -addext subjectAltName=DNS:localhost
        openssl req -newkey $key -keyout redis.key -out redis.csr -subj /CN=localhost
        echo subjectAltName=DNS:localhost > names
        openssl x509 -req -in redis.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 \
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
    redis.add_flags(&["--tls-ca-cert-file", "ca.pem"]);
    redis.up().await;
    (redis, port)
}

#[tokio::test]
async fn events_travel_over_tls() {
    let (redis, port) = start().await;
    let (ca, url) = (redis.directory().join("ca.pem"), format!("rediss://localhost:{port}"));
    let node = Node::start_unready_with(CA_VARIABLE, &ca, &["--redis", &url]).await;
    node.ready().await;
    let (mut client, _) = Client::resume(&node, "a", "room", "").await;
    let id = node.publish("room", &json!({"n": 1})).await;
    client.expect_event(id, &json!({"n": 1})).await;
    assert_eq!(redis.head("room").await, id);
}

#[tokio::test]
async fn tls_problems_are_explained() {
    let (redis, port) = start().await;
    let files = redis.directory();
    let (ca, other) = (files.join("ca.pem"), files.join("other.pem"));
    let mut ca_as_server = Redis::away(&[]);
    let own_port = free_port();
    ca_as_server.add_flags(&["--tls-port", &own_port.to_string(), "--tls-auth-clients", "no"]);
    for (flag, name) in [
        ("--tls-cert-file", "other.pem"),
        ("--tls-key-file", "other.key"),
        ("--tls-ca-cert-file", "other.pem"),
    ] {
        ca_as_server.add_flags(&[flag, files.join(name).to_str().expect("UTF-8")]);
    }
    ca_as_server.up().await;
    let cases = [
        (format!("rediss://127.0.0.1:{port}"), &ca, "does not name the host in --redis"),
        (
            format!("rediss://localhost:{port}"),
            &other,
            "from an unknown CA: name the CA's PEM file in SSL_CERT_FILE",
        ),
        (format!("rediss://localhost:{own_port}"), &other, "is that of a CA (CA:TRUE)"),
        (
            format!("redis://localhost:{port}"),
            &ca,
            "closes the connection at once: check its port, and rediss://",
        ),
        (format!("rediss://localhost:{}", redis.port()), &ca, "use redis:// if its port has no TLS"),
    ];
    join_all(cases.iter().map(|(url, ca, part)| async move {
        let node = Node::start_unready_with(CA_VARIABLE, ca, &["--redis", url]).await;
        assert_unready(&node, part).await;
    }))
    .await;
}

#[tokio::test]
async fn required_client_certificate_is_explained() {
    let (redis, port) = start().await;
    let mut client = redis.client().await;
    client.call(&["CONFIG", "SET", "tls-auth-clients", "yes"]).await;
    let (ca, url) = (redis.directory().join("ca.pem"), format!("rediss://localhost:{port}"));
    let node = Node::start_unready_with(CA_VARIABLE, &ca, &["--redis", &url]).await;
    assert_unready(&node, "fanfare has none: set tls-auth-clients no").await;
}
