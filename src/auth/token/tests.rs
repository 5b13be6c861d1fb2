use serde_json::{Value, json};

use super::fixtures::*;
use super::*;

const SECRET: &str = "0123456789abcdef0123456789abcdef";
const NOW: u64 = 1_800_000_000;

fn keys(files: &[&str]) -> Vec<Key> {
    files.iter().map(|file| Key::parse(file.as_bytes()).unwrap()).collect()
}

fn sign(secret: &str, header: &Value, claims: &str) -> String {
    let encode = |text: &str| BASE64URL_NOPAD.encode(text.as_bytes());
    let signed = format!("{}.{}", encode(&header.to_string()), encode(claims));
    let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, secret.as_bytes());
    let tag = ring::hmac::sign(&key, signed.as_bytes());
    format!("{signed}.{}", BASE64URL_NOPAD.encode(tag.as_ref()))
}

fn claims(claims: Value) -> Result<Grant, InvalidToken> {
    let token = sign(SECRET, &json!({"alg": "HS256"}), &claims.to_string());
    verify(&keys(&[SECRET]), &token, "alice", NOW)
}

#[test]
fn accepts_tokens_of_another_implementation() {
    let (news, team, other) = ("news", "team.7", "newsroom");
    for (pem, token) in
        [(RSA_PEM, RS256), (RSA_PKCS1_PEM, RS256), (P256_PEM, ES256), (ED25519_PEM, EDDSA)]
    {
        let keys = keys(&[SECRET, pem]);
        let grant = verify(&keys, token, "alice", NOW).unwrap();
        assert_eq!(grant.expires, 4_102_444_800);
        let may = |name: &str| grant.may_join(&ChannelName::parse(name).unwrap());
        assert!(may(news) && may(team) && may("team.") && !may(other) && !may("team"));
        assert_eq!(verify(&keys, token, "bob", NOW), Err(InvalidToken));
        assert_eq!(verify(&keys, token, "alice", 4_102_444_800), Err(InvalidToken));
        assert_eq!(verify(&keys[..1], token, "alice", NOW), Err(InvalidToken));
        // Any changed byte makes it invalid.
        for at in (0..token.len()).step_by(7).chain([token.len() - 2]) {
            let mut bytes = token.as_bytes().to_vec();
            bytes[at] = if bytes[at] == b'A' { b'B' } else { b'A' };
            assert_eq!(
                verify(&keys, std::str::from_utf8(&bytes).unwrap(), "alice", NOW),
                Err(InvalidToken),
                "{at}"
            );
        }
    }
}

#[test]
fn each_key_has_one_algorithm() {
    let valid = json!({"sub": "alice", "exp": NOW + 10}).to_string();
    let everything = keys(&[SECRET, RSA_PEM, P256_PEM, ED25519_PEM]);
    assert!(verify(&everything, &sign(SECRET, &json!({"alg": "HS256"}), &valid), "alice", NOW).is_ok());
    for header in [
        json!({"alg": "none"}),
        json!({"alg": "None"}),
        json!({"alg": "hs256"}),
        json!({"alg": "HS512"}),
        json!({"alg": "RS256"}),
        json!({"alg": "HS256", "crit": ["exp"]}),
        json!({"alg": "HS256", "crit": null}),
        json!({"alg": ["HS256"]}),
        json!({}),
        json!("HS256"),
    ] {
        let token = sign(SECRET, &header, &valid);
        assert_eq!(verify(&everything, &token, "alice", NOW), Err(InvalidToken), "{header}");
        let unsigned = token.rsplit_once('.').unwrap().0;
        assert_eq!(
            verify(&everything, &format!("{unsigned}."), "alice", NOW),
            Err(InvalidToken),
            "{header}"
        );
        assert_eq!(verify(&everything, unsigned, "alice", NOW), Err(InvalidToken), "{header}");
    }
    // Algorithm confusion: a public key used as an HS256 secret.
    for secret in [RSA_PEM, RSA_PEM.trim_end(), P256_PEM, ED25519_PEM] {
        let token = sign(secret, &json!({"alg": "HS256"}), &valid);
        assert_eq!(verify(&everything, &token, "alice", NOW), Err(InvalidToken));
    }
    // Rotation: any of several secrets is accepted.
    let (old, new) = ("o".repeat(32), "n".repeat(32));
    for secret in [&old, &new] {
        let token = sign(secret, &json!({"alg": "HS256"}), &valid);
        assert!(verify(&keys(&[&old, &new]), &token, "alice", NOW).is_ok());
    }
    assert_eq!(
        verify(&[], &sign(SECRET, &json!({"alg": "HS256"}), &valid), "alice", NOW),
        Err(InvalidToken)
    );
}

#[test]
fn claims_of_wrong_types_are_rejected() {
    let grant = claims(json!({"sub": "alice", "exp": NOW + 1})).unwrap();
    let room = ChannelName::parse("room").unwrap();
    assert!(grant.may_join(&room) && grant.may_publish(&room));
    assert_eq!(grant.expires, NOW as u32 + 1);
    assert_eq!(claims(json!({"sub": "alice", "exp": 1e12})).unwrap().expires, NEVER);
    assert_eq!(claims(json!({"sub": "alice", "exp": NOW as f64 + 1.5})).unwrap().expires, NOW as u32 + 1);
    assert!(claims(json!({"sub": "alice", "exp": NOW + 1, "nbf": NOW + 60, "aud": ["x"]})).is_ok());

    for (publish, may) in [
        (json!(true), true),
        (json!(false), false),
        (json!([]), false),
        (json!(["ro*"]), true),
        (json!(["ro"]), false),
    ] {
        let grant = claims(json!({"sub": "alice", "exp": NOW + 1, "publish": publish})).unwrap();
        assert_eq!(grant.may_publish(&room), may, "{publish}");
    }
    for (channels, may) in
        [(json!([]), false), (json!(["*"]), true), (json!(["room"]), true), (json!(["r*m"]), false)]
    {
        let grant = claims(json!({"sub": "alice", "exp": NOW + 1, "channels": channels})).unwrap();
        assert_eq!(grant.may_join(&room), may, "{channels}");
    }
    for wrong in [
        json!({"sub": "alice"}),
        json!({"exp": NOW + 1}),
        json!({"sub": "alice", "exp": NOW}),
        json!({"sub": "alice", "exp": -1}),
        json!({"sub": "alice", "exp": (NOW + 1).to_string()}),
        json!({"sub": "alice", "exp": null}),
        json!({"sub": "Alice", "exp": NOW + 1}),
        json!({"sub": ["alice"], "exp": NOW + 1}),
        json!({"sub": "alice", "exp": NOW + 100, "nbf": NOW + 61}),
        json!({"sub": "alice", "exp": NOW + 1, "channels": null}),
        json!({"sub": "alice", "exp": NOW + 1, "channels": "room"}),
        json!({"sub": "alice", "exp": NOW + 1, "channels": [1]}),
        json!({"sub": "alice", "exp": NOW + 1, "publish": null}),
        json!({"sub": "alice", "exp": NOW + 1, "publish": "true"}),
        json!(["alice", NOW + 1]),
    ] {
        assert_eq!(claims(wrong.clone()), Err(InvalidToken), "{wrong}");
    }
    let header = json!({"alg": "HS256"});
    for text in [
        r#"{"sub":"alice","exp":2000000000,"sub":"bob"}"#,
        r#"{"sub":"alice","exp":1e999}"#,
        r#"{"sub":"alice","exp":2000000000} "x""#,
        "",
    ] {
        assert_eq!(
            verify(&keys(&[SECRET]), &sign(SECRET, &header, text), "alice", NOW),
            Err(InvalidToken),
            "{text}"
        );
    }
}

proptest::proptest! {
    #[test]
    fn nothing_panics(token: String, parts in proptest::collection::vec("[A-Za-z0-9_-]{0,40}", 0..5)) {
        let keys = keys(&[SECRET, RSA_PEM, P256_PEM, ED25519_PEM]);
        assert_eq!(verify(&keys, &token, "alice", NOW), Err(InvalidToken));
        assert_eq!(verify(&keys, &parts.join("."), "alice", NOW), Err(InvalidToken));
    }
}
