//! Tokens: which are accepted, what they allow and for how long. Tokens never appear in logs, metrics
//! or responses, except as the subprotocol that is answered.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use data_encoding::BASE64URL_NOPAD;
use serde_json::{Value, json};

use crate::common;
use crate::common::process::Directory;
use crate::common::{Client, Node, Options, Raw, until};
use crate::rejections::closed;

const SECRET: &str = "a secret that is long enough for HS256";
const OTHER: &str = "another one that is long enough as well";

/// A public key, which cannot sign.
const ED25519_PUBLIC: &str = "-----BEGIN PUBLIC KEY-----
MCowBQYDK2VwAyEApkKdSFtxoLHON4gfTzPDkJZN5a2/Q+qWCpBqxZz8q08=
-----END PUBLIC KEY-----";

struct Keys {
    directory: Directory,
}

impl Keys {
    fn new() -> Keys {
        let keys = Keys { directory: Directory::new() };
        keys.write("key", SECRET);
        keys
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn write(&self, name: &str, content: &str) {
        std::fs::write(self.path(name), format!("{content}\n")).expect("a file");
    }

    /// A token made with this key.
    fn token(&self, name: &str, user: &str, flags: &[&str]) -> String {
        common::token(self.path(name).to_str().expect("UTF-8"), user, flags)
    }

    async fn node(&self, flags: &[&str]) -> Node {
        let key = self.path("key");
        Node::start(&[&["--jwt-key", key.to_str().expect("UTF-8")], flags].concat()).await
    }
}

/// A token with this header and these claims.
fn sign(secret: &str, header: &Value, claims: &Value) -> String {
    let [header, claims] = [header, claims].map(|part| BASE64URL_NOPAD.encode(part.to_string().as_bytes()));
    let signed = format!("{header}.{claims}");
    let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, secret.as_bytes());
    let tag = ring::hmac::sign(&key, signed.as_bytes());
    format!("{signed}.{}", BASE64URL_NOPAD.encode(tag.as_ref()))
}

/// Tokens that are not valid for alice, the cause in the log, and a part of the reason.
fn invalid_tokens() -> Vec<(String, &'static str, &'static str)> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
    let (hs256, later) = (json!({"alg": "HS256"}), now + 3600);
    let claims = |claims: Value| sign(SECRET, &json!({"alg": "HS256"}), &claims);
    let good = claims(json!({"sub": "alice", "exp": later}));
    let shape = |name: &str, value: Value| claims(json!({"sub": "alice", "exp": later, name: value}));
    vec![
        (good[..good.len() - 50].into(), "malformed", "it has not three parts"),
        (format!("{good}="), "malformed", "its signature is not in base64url"),
        (
            sign(SECRET, &json!({"alg": "HS512"}), &json!({})),
            "algorithm",
            "alg in its header is HS512, and --jwt-key has keys for HS256 only",
        ),
        (
            sign(OTHER, &hs256, &json!({"sub": "alice", "exp": later})),
            "signature",
            "no secret in --jwt-key verifies its signature (HS256)",
        ),
        (claims(json!({"sub": "alice"})), "claim", "exp is missing"),
        (
            claims(json!({"sub": "alice", "exp": later * 1000})),
            "claim",
            "exp is after the year 30000, probably in milliseconds",
        ),
        (claims(json!({"sub": "alice", "exp": 3600})), "claim", "exp is before 2001, probably a lifetime"),
        (claims(json!({"sub": 7, "exp": later})), "claim", "sub is a number"),
        (shape("channels", json!("news")), "claim", "channels must be a list of strings"),
        (shape("publish", json!("yes")), "claim", "publish must be true, false, a list of strings"),
        (
            claims(json!({"sub": "bob", "exp": later})),
            "other_user",
            "sub is another user than the one in the path",
        ),
        (claims(json!({"sub": "alice", "exp": now - 7200})), "expired", "it expired 2 h ago (exp)"),
        (
            claims(json!({"sub": "alice", "exp": later, "nbf": now + 3000})),
            "not_yet_valid",
            "it becomes valid in 50 min (nbf)",
        ),
    ]
}

async fn status(node: &Node, path: &str, headers: &[(&str, &str)]) -> u16 {
    Raw::connect(node.public).await.upgrade(path, headers).await.status
}

#[tokio::test]
async fn token_is_accepted_in_three_places() {
    let keys = Keys::new();
    let node = keys.node(&[]).await;
    let token = keys.token("key", "al ice", &[]);
    let later = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs() + 3600;
    let claims = json!({"sub": "al ice", "exp": later, "channels": vec!["ws_broadcast"; 100]});
    let long = sign(SECRET, &json!({"alg": "HS256"}), &claims);
    assert!((1500..4000).contains(&long.len()), "longer than without --jwt-key: {}", long.len());
    let path = "/ws/al%20ice";
    assert_eq!(status(&node, &format!("{path}?token={token}"), &[]).await, 101);
    for scheme in ["Bearer", "bearer"] {
        assert_eq!(status(&node, path, &[("Authorization", &format!("{scheme} {token}"))]).await, 101);
    }
    for (offered, chosen) in [
        (format!("bearer.{token}"), format!("bearer.{token}")),
        (format!("fanfare.v1, bearer.{token}"), "fanfare.v1".into()),
        (format!("bearer.{token}, fanfare.v1"), "fanfare.v1".into()),
        (format!("bearer.{long}"), format!("bearer.{long}")),
    ] {
        let mut raw = Raw::connect(node.public).await;
        let response = raw.upgrade(path, &[("Sec-WebSocket-Protocol", &offered)]).await;
        assert_eq!(response.status, 101);
        assert_eq!(response.header("sec-websocket-protocol"), Some(&*chosen));
    }
}

#[tokio::test]
async fn clients_of_fanfare_get_4401_and_4403() {
    let keys = Keys::new();
    let node = keys.node(&[]).await;
    let token = keys.token("key", "a", &["--channel", "news"]);
    let ended = keys.token("key", "a", &["--ttl", "0s"]);
    let required = "token required: as ?token=, Authorization: Bearer or the subprotocol bearer.TOKEN";
    let invalid = "token invalid or expired for this user";
    let forbidden = "the token does not allow this channel";
    for (query, offered, code, text) in [
        ("channel=news", "fanfare.v1", 4401, required),
        ("lastEventId=", "", 4401, required),
        (&format!("token={ended}"), "fanfare.v1", 4401, invalid),
        ("channel=news", &format!("fanfare.v1, bearer.{ended}"), 4401, invalid),
        ("channel=news", &format!("bearer.{ended}"), 4401, invalid),
        ("lastEventId=&channel=news", "bearer.", 4401, invalid),
        ("channel=other", &format!("bearer.{token}, fanfare.v1"), 4403, forbidden),
        (&format!("lastEventId=7&token={token}"), "", 4403, forbidden),
        // Not an unspecific 4401.
        (
            &format!("tokn={token}"),
            "fanfare.v1",
            4400,
            "unknown query parameter \"tokn\": did you mean token?",
        ),
    ] {
        let headers = [("Sec-WebSocket-Protocol", offered)];
        let (response, closed, reason) = closed(&node, &format!("/ws/a?{query}"), &headers).await;
        assert_eq!((closed, reason.as_str()), (code, text), "{query} {offered}");
        assert!(response.header("www-authenticate").is_none(), "a 101 asks for nothing: {response:?}");
    }
    assert_eq!(node.metric_of("fanfare_connections_closed_total", r#"reason="unauthorized""#).await, 6.0);
    assert_eq!(node.metric_of("fanfare_connections_closed_total", r#"reason="forbidden""#).await, 2.0);
    assert_eq!(node.metric_of("fanfare_http_rejections_total", r#"status="401""#).await, 6.0);
    assert_eq!(node.metric_of("fanfare_http_rejections_total", r#"status="403""#).await, 2.0);
}

#[tokio::test]
async fn invalid_tokens_are_rejected_and_never_shown() {
    let keys = Keys::new();
    keys.write("other", OTHER);
    let node = keys.node(&["--log", "trace"]).await;
    let good = keys.token("key", "alice", &[]);
    let (signed, _) = good.rsplit_once('.').expect("three parts");
    let bob = keys.token("key", "bob", &[]);
    let ended = keys.token("key", "alice", &["--ttl", "0s"]);
    let other_key = keys.token("other", "alice", &[]);
    let bad = [
        &bob,
        &ended,
        &other_key,
        &format!("{signed}."),
        &signed.to_owned(),
        &format!("{good}x"),
        &"x".repeat(4000),
    ];
    let mut answers = Vec::new();
    for token in bad {
        let mut raw = Raw::connect(node.public).await;
        let response = raw.upgrade(&format!("/ws/alice?token={token}"), &[]).await;
        response.expect_rejection(401);
        assert_eq!(response.header("www-authenticate"), Some("Bearer"));
        raw.expect_end().await;
        answers.push(response.body);
    }
    assert!(answers.windows(2).all(|pair| pair[0] == pair[1]), "all responses are equal: {answers:?}");
    for path in ["/ws/alice", "/ws/alice?token=", "/ws/alice?channel=a"] {
        assert_eq!(status(&node, path, &[]).await, 401);
    }
    assert_eq!(status(&node, "/ws/alice", &[("Authorization", &format!("Basic {good}"))]).await, 401);
    assert_eq!(node.metric_of("fanfare_connections_closed_total", r#"reason="unauthorized""#).await, 11.0);
    // Then a valid token. After that all output of the node is searched for tokens.
    Raw::upgraded(node.public, &format!("/ws/alice?token={good}")).await;
    until("the close in the log", || async { node.log().contains("unauthorized").then_some(()) }).await;
    let shown = [
        node.log(),
        node.admin("GET", "/metrics", b"").await.body,
        node.admin("GET", "/stats", b"").await.body,
        answers.concat(),
    ];
    for token in bad.into_iter().chain([&good]).filter(|token| token.len() > 20) {
        for part in token.split('.').filter(|part| part.len() > 20) {
            // The first part is the same in every token.
            assert!(shown.iter().all(|text| !text.contains(part)), "{part} is shown");
        }
    }
    assert!(shown.iter().all(|text| !text.contains(SECRET)));
}

#[tokio::test]
async fn log_says_why_a_token_is_rejected() {
    let keys = Keys::new();
    let mut answers = Vec::new();
    // One node for each cause: a cause has at most one line in ten seconds.
    for (token, cause, reason) in invalid_tokens() {
        let node = keys.node(&[]).await;
        let response =
            Raw::connect(node.public).await.upgrade(&format!("/ws/alice?token={token}"), &[]).await;
        response.expect_rejection(401);
        answers.push(response.body);
        let line = until("the rejection in the log", || async {
            node.log().lines().find(|line| line.contains("request rejected")).map(str::to_owned)
        })
        .await;
        let text = format!("the token for user \"alice\" is not valid: {reason}");
        assert!(line.contains(&text) && line.contains(&format!("cause=\"{cause}\"")), "{line}");
        assert!(token.split('.').filter(|part| part.len() > 8).all(|part| !line.contains(part)), "{line}");
    }
    assert!(answers.windows(2).all(|pair| pair[0] == pair[1]), "clients learn no reason: {answers:?}");
}

#[tokio::test]
async fn each_cause_has_its_own_log_line() {
    let keys = Keys::new();
    let node = keys.node(&[]).await;
    for (token, ..) in invalid_tokens() {
        assert_eq!(status(&node, &format!("/ws/alice?token={token}"), &[]).await, 401);
    }
    assert_eq!(status(&node, "/ws/alice", &[]).await, 401);
    let lines = || node.log().matches("request rejected").count();
    // Seven causes and the missing token, whatever the number of requests.
    until("a line for each cause", || async { (lines() == 8).then_some(()) }).await;
}

#[test]
fn check_says_why_a_token_is_not_valid() {
    let keys = Keys::new();
    let key = keys.path("key");
    let check = |token: &str, args: &[&str], input: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fanfare"));
        command.args(["token", "--check", token]).arg("--jwt-key").arg(&key).args(args);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("it runs");
        child.stdin.take().expect("it is piped").write_all(input.as_bytes()).expect("it reads");
        let output = child.wait_with_output().expect("it ends");
        (output.status.code(), String::from_utf8(output.stdout).expect("text"))
    };
    for (token, _, reason) in invalid_tokens() {
        let (code, text) = check(&token, &["--user", "alice"], "");
        assert!(code == Some(1) && text.contains(&format!("not valid: {reason}")), "{token}: {text}");
    }
    let good = keys.token("key", "alice", &["--channel", "news"]);
    for (token, args, input) in
        [(good.as_str(), &[][..], ""), (&good, &["--user", "alice"], ""), ("-", &[], &format!(" {good}\n"))]
    {
        let (code, text) = check(token, args, input);
        assert_eq!(code, Some(0), "{text}");
        assert!(text.starts_with(r#"claims: {"channels":["news"],"exp":"#), "{text}");
        assert!(text.ends_with("valid for user \"alice\", expires in 60 min\n"), "{text}");
    }
    let (code, text) = check(&good, &["--user", "bob"], "");
    assert!(code == Some(1) && text.contains("not valid: sub is another user"), "{text}");
    // The signature comes first: claims that nobody vouches for are marked.
    let forged = sign(OTHER, &json!({"alg": "HS256"}), &json!({"sub": "a\u{9b}b", "exp": 1}));
    let (code, text) = check(&forged, &[], "");
    assert!(code == Some(1) && text.starts_with("claims (not verified): {"), "{text}");
    assert!(text.contains("not valid: no secret in --jwt-key") && !text.contains('\u{9b}'), "{text}");
    let (code, text) = check("", &[], "");
    assert!(code == Some(1) && text.starts_with("not valid: it has not three parts"), "{text}");
}

#[tokio::test]
async fn token_limits_channels_and_publishing() {
    let keys = Keys::new();
    let node = keys.node(&[]).await;
    let token = keys.token("key", "a", &["--channel", "news", "--channel=team.*", "--publish=team.*"]);
    for (channel, expected) in
        [("news", 101), ("team.7", 101), ("newsroom", 403), ("team", 403), ("ws_broadcast", 403)]
    {
        let path = format!("/ws/a?channel={channel}&token={token}");
        assert_eq!(status(&node, &path, &[]).await, expected, "{channel}");
    }
    let mut codes = Vec::new();
    for (channel, publish) in
        [("news", None), ("team.7", None), ("team.7", Some("false")), ("news", Some("true"))]
    {
        let own = publish.map(|publish| keys.token("key", "a", &["--publish", publish]));
        let token = own.as_ref().unwrap_or(&token);
        let options = Options {
            query: format!("channel={channel}&token={token}"),
            subprotocol: Some("fanfare.v1"),
            ..Options::default()
        };
        let mut client = Client::try_open(node.public, "a", &options).await.expect("it may join");
        client.welcome().await;
        let (answer, _) = client.send_for_ack(serde_json::json!({"text": "hi"})).await;
        codes.push(answer.err().map(|error| error["code"].clone()));
    }
    assert_eq!(codes, [Some("forbidden".into()), None, Some("forbidden".into()), None]);
    // A token cannot exceed the setting.
    let node = keys.node(&["--client-publish", "off"]).await;
    let token = keys.token("key", "a", &["--publish", "true"]);
    let options = Options { query: format!("token={token}"), subprotocol: None, ..Options::default() };
    let mut client = Client::try_open(node.public, "a", &options).await.expect("it may join");
    client.send("hi").await;
    assert_eq!(client.expect_close().await.0, 4003);
}

#[tokio::test]
async fn connection_closes_when_its_token_expires() {
    let keys = Keys::new();
    let node = keys.node(&[]).await; // rare pings: the expiry must be noticed without them
    let long = keys.token("key", "long", &[]);
    let mut stays = Raw::upgraded(node.public, &format!("/ws/long?token={long}")).await;
    let token = keys.token("key", "a", &["--ttl", "3s"]);
    let made = std::time::Instant::now();
    let options = Options { query: format!("token={token}"), subprotocol: None, ..Options::default() };
    let mut client = Client::try_open(node.public, "a", &options).await.expect("it may join");
    assert_eq!(client.expect_close().await, (4001, "token expired".into()));
    // `exp` is in whole seconds, so a token of 3 s may have little more than 2 s left.
    assert!(made.elapsed() >= std::time::Duration::from_millis(1900), "{:?}", made.elapsed());
    assert_eq!(status(&node, &format!("/ws/a?token={token}"), &[]).await, 401);
    assert_eq!(node.metric_of("fanfare_connections_closed_total", r#"reason="token_expired""#).await, 1.0);
    stays.frame(true, common::raw::opcode::PING, b"here").await;
    assert_eq!(stays.next().await, Some((common::raw::opcode::PONG, b"here".to_vec())));
}

#[tokio::test]
async fn keys_are_reloaded_without_a_restart() {
    let keys = Keys::new();
    keys.write("second", OTHER);
    let second = keys.path("second");
    let node = keys.node(&["--jwt-key", second.to_str().expect("UTF-8")]).await;
    let (old, new) = (keys.token("key", "a", &[]), keys.token("second", "a", &[]));
    let path = |token: &str| format!("/ws/a?token={token}");
    assert_eq!((status(&node, &path(&old), &[]).await, status(&node, &path(&new), &[]).await), (101, 101));
    let mut connected = Raw::upgraded(node.public, &path(&old)).await;

    keys.write("key", "short");
    node.signal("HUP");
    until("the bad key to be rejected", || async {
        node.log().contains("keeping the current keys").then_some(())
    })
    .await;
    assert_eq!(status(&node, &path(&old), &[]).await, 101);

    keys.write("key", &"n".repeat(32));
    node.signal("HUP");
    until("the old key to be gone", || async {
        (status(&node, &path(&old), &[]).await == 401).then_some(())
    })
    .await;
    assert_eq!(status(&node, &path(&new), &[]).await, 101);
    // Existing connections stay open until their token expires.
    connected.frame(true, common::raw::opcode::PING, b"").await;
    assert_eq!(connected.next().await, Some((common::raw::opcode::PONG, Vec::new())));
}

#[test]
fn wrong_arguments_make_no_token() {
    let keys = Keys::new();
    keys.write("short", "short");
    let (key, short) = (keys.path("key"), keys.path("short"));
    let (key, short) = (key.to_str().expect("UTF-8"), short.to_str().expect("UTF-8"));
    for (args, part) in [
        (&["--jwt-key", key][..], "--user"),
        (&["--user", "a"], "--jwt-key"),
        (&["--user", "a", "--jwt-key", short], "too short"),
        (&["--user", "a", "--jwt-key", "/nowhere"], "can't be opened"),
        (&["--user", "a", "--jwt-key", &format!("{short},/nowhere")], "/nowhere: can't be opened"),
        (&["--user", "a", "--jwt-key", key, "--channel", ""], "--channel: \"\" is not a channel"),
        (&["--user", "a", "--jwt-key", key, "--channel", "a b"], "--channel: \"a b\""),
        (&["--user", "a", "--jwt-key", key, "--publish", ""], "--publish: \"\""),
        (&["--user", "a", "--jwt-key", key, "--publish", "yes"], "--publish: \"yes\" is not a value"),
        (&["--user", "a", "--jwt-key", key, "--publish", "Off"], "true, false or a channel"),
        (&["--user", "a", "--jwt-key", key, "--publish", "True"], "in lower case"),
        (&["--user", "a", "--jwt-key", key, "--publish", "true", "--publish", "a"], "the only value"),
        (&["--user", "a", "--jwt-key", key, "--ttl", "1"], "--ttl"),
        (&["--user", "a", "--jwt-key", key, "--nope"], "--nope"),
        (&["--user", "a", "--jwt-key"], "needs a value"),
        (&["--check", "a.b.c"], "--jwt-key: is required"),
        (&["--check", "a.b.c", "--jwt-key", &format!("{key},{short}")], "too short"),
        (&["--check", "a.b.c", "--jwt-key", key, "--ttl", "1h"], "--ttl: has no effect with --check"),
        (&["--check", "--jwt-key", key], "--check: needs a value"),
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fanfare"));
        let output = command.env_remove("FANFARE_JWT_KEY").arg("token").args(args).output().expect("it runs");
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.stdout.is_empty() && errors.contains(part) && !errors.contains(SECRET), "{errors}");
    }
}

#[tokio::test]
async fn first_secret_of_several_files_signs() {
    let keys = Keys::new();
    keys.write("other", OTHER);
    keys.write("public", ED25519_PUBLIC);
    let files = ["public", "key", "other"].map(|name| keys.path(name).display().to_string()).join(",");
    let node = Node::start(&["--jwt-key", &files]).await;
    let path = |token: &str| format!("/ws/a?token={token}");
    let mut command = Command::new(env!("CARGO_BIN_EXE_fanfare"));
    let output = command.env("FANFARE_JWT_KEY", &files).args(["token", "--user", "a"]).output();
    let output = output.expect("the binary can be run");
    assert!(output.status.success(), "{output:?}");
    let token = String::from_utf8(output.stdout).expect("text");
    assert_eq!(status(&node, &path(token.trim_end()), &[]).await, 101);
    for args in [&["--channel", "team.*", "--channel", "*"][..], &["--publish", "false"], &["--publish", "a"]]
    {
        let token = keys.token("key", "a", args);
        assert_eq!(status(&node, &path(&token), &[]).await, 101, "{args:?}");
    }
}
