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

/// The reason why alice's token is not valid.
fn reason(keys: &[Key], token: &str) -> String {
    verify(keys, token, "alice", NOW).expect_err(token).to_string()
}

#[test]
fn accepts_tokens_of_another_implementation() {
    let (news, team, other) = ("news", "team.7", "newsroom");
    for (pem, token) in [(RSA_PEM, RS256), (RSA_PKCS1_PEM, RS256), (P256_PEM, ES256), (ED25519_PEM, EDDSA)] {
        let keys = keys(&[SECRET, pem]);
        let grant = verify(&keys, token, "alice", NOW).unwrap();
        assert_eq!(grant.expires, 4_102_444_800);
        let may = |name: &str| grant.may_join(&ChannelName::parse(name).unwrap());
        assert!(may(news) && may(team) && may("team.") && !may(other) && !may("team"));
        assert_eq!(verify(&keys, token, "bob", NOW), Err(InvalidToken::OtherUser));
        let expired = Err(InvalidToken::Expired { seconds: 0 });
        assert_eq!(verify(&keys, token, "alice", 4_102_444_800), expired);
        let foreign = InvalidToken::Algorithm { named: Some(keys[1].algorithm()), accepted: vec!["HS256"] };
        assert_eq!(verify(&keys[..1], token, "alice", NOW), Err(foreign));
        // Any changed byte makes it invalid, and no claim is looked at.
        for at in (0..token.len()).step_by(7).chain([token.len() - 2]) {
            let mut bytes = token.as_bytes().to_vec();
            bytes[at] = if bytes[at] == b'A' { b'B' } else { b'A' };
            let reason = verify(&keys, std::str::from_utf8(&bytes).unwrap(), "bob", NOW).unwrap_err();
            assert!(["malformed", "algorithm", "signature"].contains(&reason.label()), "{at}: {reason}");
        }
    }
}

#[test]
fn each_key_has_one_algorithm() {
    let valid = json!({"sub": "alice", "exp": NOW + 10}).to_string();
    let everything = keys(&[SECRET, RSA_PEM, P256_PEM, ED25519_PEM]);
    assert!(verify(&everything, &sign(SECRET, &json!({"alg": "HS256"}), &valid), "alice", NOW).is_ok());
    for (header, part) in [
        (json!({"alg": "none"}), "alg in its header is none, and --jwt-key has keys for ES256, EdDSA, HS256"),
        (json!({"alg": "None"}), "is missing or unknown"),
        (json!({"alg": "hs256"}), "is missing or unknown"),
        (json!({"alg": "HS512"}), "is HS512"),
        (json!({"alg": "RS256"}), "no key in --jwt-key verifies its signature (RS256)"),
        (json!({"alg": "HS256", "crit": ["exp"]}), "its header has crit"),
        (json!({"alg": "HS256", "crit": null}), "its header has crit"),
        (json!({"alg": ["HS256"]}), "not a JSON object with alg"),
        (json!({}), "is missing or unknown"),
        (json!("HS256"), "not a JSON object with alg"),
    ] {
        let token = sign(SECRET, &header, &valid);
        let found = reason(&everything, &token);
        assert!(found.contains(part), "{header}: {found}");
        let unsigned = token.rsplit_once('.').unwrap().0;
        assert!(verify(&everything, &format!("{unsigned}."), "alice", NOW).is_err(), "{header}");
        assert!(reason(&everything, unsigned).contains("three parts"), "{header}");
    }
    // Algorithm confusion: a public key used as an HS256 secret.
    for secret in [RSA_PEM, RSA_PEM.trim_end(), P256_PEM, ED25519_PEM] {
        let token = sign(secret, &json!({"alg": "HS256"}), &valid);
        let forged = Err(InvalidToken::Signature("HS256"));
        assert_eq!(verify(&everything, &token, "alice", NOW), forged);
    }
    // Rotation: any of several secrets is accepted.
    let (old, new) = ("o".repeat(32), "n".repeat(32));
    for secret in [&old, &new] {
        let token = sign(secret, &json!({"alg": "HS256"}), &valid);
        assert!(verify(&keys(&[&old, &new]), &token, "alice", NOW).is_ok());
    }
    assert!(verify(&[], &sign(SECRET, &json!({"alg": "HS256"}), &valid), "alice", NOW).is_err());
}

#[test]
fn malformed_part_is_named() {
    let good = sign(SECRET, &json!({"alg": "HS256"}), "{}");
    let [header, claims, signature] = parts(&good).unwrap();
    for (token, part) in [
        (String::new(), "three parts"),
        (format!("{good}.x"), "three parts"),
        (format!("{header}=.{claims}.{signature}"), "header is not in base64url"),
        (format!("x.{claims}.{signature}"), "header is not in base64url"),
        (format!("{claims}.{claims}.{signature}"), "is missing or unknown"),
        (format!("{header}.{claims}.{signature}="), "signature is not in base64url"),
        (format!("{header}.{claims}."), "no secret in --jwt-key verifies"),
        (format!("{header}.{header}.{signature}"), "no secret in --jwt-key verifies"),
        (sign("another secret of a good length.", &json!({"alg": "HS256"}), "{}"), "another secret signed"),
    ] {
        let found = reason(&keys(&[SECRET]), &token);
        assert!(found.contains(part), "{token}: {found}");
    }
}

#[test]
fn rights_of_valid_claims() {
    let grant = claims(json!({"sub": "alice", "exp": NOW + 1})).unwrap();
    let room = ChannelName::parse("room").unwrap();
    assert!(grant.may_join(&room) && grant.may_publish(&room));
    assert_eq!(grant.expires, NOW as u32 + 1);
    let latest_of_dotnet = 253_402_300_799_u64;
    assert_eq!(claims(json!({"sub": "alice", "exp": latest_of_dotnet})).unwrap().expires, NEVER);
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
}

#[test]
fn reason_of_invalid_claims() {
    let soon = NOW + 1;
    for (wrong, part) in [
        (json!({"sub": "alice"}), "exp is missing"),
        (json!({"exp": soon}), "sub is missing"),
        (json!({"sub": "alice", "exp": NOW}), "it expired 0 s ago (exp)"),
        (json!({"sub": "alice", "exp": NOW - 3 * 86400}), "it expired 3 days ago (exp)"),
        (json!({"sub": "alice", "exp": -1}), "exp is before 2001, probably a lifetime"),
        (json!({"sub": "alice", "exp": 3600}), "exp is before 2001, probably a lifetime"),
        (
            json!({"sub": "alice", "exp": soon * 1000}),
            "exp is after the year 30000, probably in milliseconds",
        ),
        (json!({"sub": "alice", "exp": 1e300}), "exp is after the year 30000"),
        (json!({"sub": "alice", "exp": soon.to_string()}), "exp is a string"),
        (json!({"sub": "alice", "exp": null}), "exp must be a number"),
        (json!({"sub": "Alice", "exp": soon}), "sub is another user"),
        (json!({"sub": 7, "exp": soon}), "sub is a number: it must be a string"),
        (json!({"sub": ["alice"], "exp": soon}), "sub must be a string"),
        (json!({"sub": "", "exp": soon}), "sub is not a user id"),
        (json!({"sub": "alice", "exp": NOW + 100, "nbf": NOW + 61}), "it becomes valid in 61 s (nbf)"),
        (json!({"sub": "alice", "exp": soon, "nbf": NOW * 1000}), "nbf is after the year 30000"),
        (json!({"sub": "alice", "exp": soon, "nbf": "now"}), "nbf must be a number"),
        (json!({"sub": "alice", "exp": soon, "channels": null}), "channels must be a list of strings"),
        (json!({"sub": "alice", "exp": soon, "channels": "room"}), "channels must be a list of strings"),
        (json!({"sub": "alice", "exp": soon, "channels": [1]}), "channels must be a list of strings"),
        (json!({"sub": "alice", "exp": soon, "publish": null}), "publish must be true, false, a list"),
        (json!({"sub": "alice", "exp": soon, "publish": "true"}), "publish must be true, false, a list"),
        (json!(["alice", soon]), "claims are not a JSON object"),
    ] {
        let found = claims(wrong.clone()).expect_err("a wrong claim").to_string();
        assert!(found.contains(part), "{wrong}: {found}");
    }
    let header = json!({"alg": "HS256"});
    for text in [
        r#"{"sub":"alice","exp":2000000000,"sub":"bob"}"#,
        r#"{"sub":"alice","exp":1e999}"#,
        r#"{"sub":"alice","exp":2000000000} "x""#,
        "",
    ] {
        let found = reason(&keys(&[SECRET]), &sign(SECRET, &header, text));
        assert!(
            found.contains("its claims are not a JSON object in which each claim is given once"),
            "{text}"
        );
    }
}

proptest::proptest! {
    #[test]
    fn nothing_panics(token: String, parts in proptest::collection::vec("[A-Za-z0-9_-]{0,40}", 0..5)) {
        let keys = keys(&[SECRET, RSA_PEM, P256_PEM, ED25519_PEM]);
        for token in [token, parts.join(".")] {
            let reason = verify(&keys, &token, "alice", NOW).unwrap_err().to_string();
            // No part of a token gets into the log.
            assert!(token.split('.').all(|part| part.len() < 12 || !reason.contains(part)), "{reason}");
        }
    }
}
