//! Tokens: who a client is and what it may do, signed by the operator's backend (JWT, RFC 7519, in the compact form
//! of RFC 7515). Nothing here shows a token, not even what is wrong with one.

use data_encoding::BASE64URL_NOPAD;
use serde::{Deserialize, Deserializer};

use crate::protocol::event::ChannelName;

#[cfg(test)]
mod fixtures;
mod key;

pub use key::{Key, secret};

/// How far the clock of whoever made a token may be ahead, in seconds. The end of a token is not stretched.
const CLOCK_LEEWAY: f64 = 60.0;

/// What a good token allows.
#[derive(Debug, PartialEq, Eq)]
pub struct Grant {
    /// When it ends, in seconds since 1970; [`NEVER`] also for what lies beyond.
    pub expires: u32,
    channels: Option<Vec<String>>,
    publish: Option<Publish>,
}

/// An end that no connection lives to see (2106).
pub const NEVER: u32 = u32::MAX;

/// A token that lets nobody in. There is only one: strangers learn nothing from it.
#[derive(Debug, PartialEq, Eq)]
pub struct Bad;

#[derive(Deserialize)]
struct Header<'a> {
    #[serde(borrow)]
    alg: std::borrow::Cow<'a, str>,
    #[serde(default, deserialize_with = "given")]
    crit: Option<serde::de::IgnoredAny>,
}

#[derive(Deserialize)]
struct Claims {
    sub: String,
    exp: f64,
    #[serde(default, deserialize_with = "given")]
    nbf: Option<f64>,
    #[serde(default, deserialize_with = "given")]
    channels: Option<Vec<String>>,
    #[serde(default, deserialize_with = "given")]
    publish: Option<Publish>,
}

#[derive(Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
enum Publish {
    Everywhere(bool),
    To(Vec<String>),
}

/// `null` is a value too, and no list: a limit that got lost must not become none.
fn given<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<Option<T>, D::Error> {
    T::deserialize(deserializer).map(Some)
}

/// What `token` allows this user `now` (seconds since 1970), if one of these keys has signed it.
///
/// A key stands for one algorithm: what a token's header says only chooses among the keys (RFC 8725 section 3.1), so
/// there is no `none`, and no public key ever serves as a secret. Claims are not looked at before the signature.
pub fn verify(keys: &[Key], token: &str, user: &str, now: u64) -> Result<Grant, Bad> {
    let (signed, signature) = token.rsplit_once('.').ok_or(Bad)?;
    let (header, claims) = signed.split_once('.').ok_or(Bad)?;
    let header = decode(header)?;
    let header: Header<'_> = object(&header)?;
    if header.crit.is_some() {
        return Err(Bad); // an extension that must be understood (RFC 7515 section 4.1.11)
    }
    let signature = decode(signature)?;
    let mut fitting = keys.iter().filter(|key| key.algorithm() == header.alg);
    if !fitting.any(|key| key.has_signed(signed.as_bytes(), &signature)) {
        return Err(Bad);
    }
    let claims = decode(claims)?;
    let claims: Claims = object(&claims)?;
    let now = now as f64;
    if claims.sub != user || claims.exp <= now || claims.nbf.is_some_and(|begin| begin > now + CLOCK_LEEWAY) {
        return Err(Bad);
    }
    // `as` stops at the ends of u32.
    Ok(Grant { expires: claims.exp as u32, channels: claims.channels, publish: claims.publish })
}

fn decode(part: &str) -> Result<Vec<u8>, Bad> {
    BASE64URL_NOPAD.decode(part.as_bytes()).map_err(|_| Bad)
}

/// serde would take an array for a struct too, members by place.
fn object<'a, T: Deserialize<'a>>(json: &'a [u8]) -> Result<T, Bad> {
    let json = json.trim_ascii_start();
    if json.first() != Some(&b'{') {
        return Err(Bad);
    }
    serde_json::from_slice(json).map_err(|_| Bad)
}

impl Grant {
    /// Whether the client may follow this channel.
    pub fn may_join(&self, channel: &ChannelName) -> bool {
        self.channels.as_ref().is_none_or(|patterns| matches(patterns, channel))
    }

    /// Whether it may publish there, as far as the token goes.
    pub fn may_publish(&self, channel: &ChannelName) -> bool {
        match &self.publish {
            None => true,
            Some(Publish::Everywhere(may)) => *may,
            Some(Publish::To(patterns)) => matches(patterns, channel),
        }
    }
}

/// Names, or prefixes that end in `*`.
fn matches(patterns: &[String], channel: &ChannelName) -> bool {
    patterns.iter().any(|pattern| match pattern.strip_suffix('*') {
        Some(prefix) => channel.as_str().starts_with(prefix),
        None => channel.as_str() == pattern,
    })
}

#[cfg(test)]
mod tests {
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

    fn claims(claims: Value) -> Result<Grant, Bad> {
        let token = sign(SECRET, &json!({"alg": "HS256"}), &claims.to_string());
        verify(&keys(&[SECRET]), &token, "alice", NOW)
    }

    #[test]
    fn tokens_of_another_implementation_are_understood() {
        let (news, team, other) = ("news", "team.7", "newsroom");
        for (pem, token) in
            [(RSA_PEM, RS256), (RSA_PKCS1_PEM, RS256), (P256_PEM, ES256), (ED25519_PEM, EDDSA)]
        {
            let keys = keys(&[SECRET, pem]);
            let grant = verify(&keys, token, "alice", NOW).unwrap();
            assert_eq!(grant.expires, 4_102_444_800);
            let may = |name: &str| grant.may_join(&ChannelName::parse(name).unwrap());
            assert!(may(news) && may(team) && may("team.") && !may(other) && !may("team"));
            assert_eq!(verify(&keys, token, "bob", NOW), Err(Bad));
            assert_eq!(verify(&keys, token, "alice", 4_102_444_800), Err(Bad));
            assert_eq!(verify(&keys[..1], token, "alice", NOW), Err(Bad));
            // One changed bit anywhere and nothing is left of it.
            for at in (0..token.len()).step_by(7).chain([token.len() - 2]) {
                let mut bytes = token.as_bytes().to_vec();
                bytes[at] = if bytes[at] == b'A' { b'B' } else { b'A' };
                assert_eq!(
                    verify(&keys, std::str::from_utf8(&bytes).unwrap(), "alice", NOW),
                    Err(Bad),
                    "{at}"
                );
            }
        }
    }

    #[test]
    fn a_key_stands_for_one_algorithm() {
        let good = json!({"sub": "alice", "exp": NOW + 10}).to_string();
        let everything = keys(&[SECRET, RSA_PEM, P256_PEM, ED25519_PEM]);
        assert!(verify(&everything, &sign(SECRET, &json!({"alg": "HS256"}), &good), "alice", NOW).is_ok());
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
            let token = sign(SECRET, &header, &good);
            assert_eq!(verify(&everything, &token, "alice", NOW), Err(Bad), "{header}");
            let unsigned = token.rsplit_once('.').unwrap().0;
            assert_eq!(verify(&everything, &format!("{unsigned}."), "alice", NOW), Err(Bad), "{header}");
            assert_eq!(verify(&everything, unsigned, "alice", NOW), Err(Bad), "{header}");
        }
        // The oldest trick: the public key, which everybody has, as the secret.
        for secret in [RSA_PEM, RSA_PEM.trim_end(), P256_PEM, ED25519_PEM] {
            let token = sign(secret, &json!({"alg": "HS256"}), &good);
            assert_eq!(verify(&everything, &token, "alice", NOW), Err(Bad));
        }
        // Rotation: any of several secrets.
        let (old, new) = ("o".repeat(32), "n".repeat(32));
        for secret in [&old, &new] {
            let token = sign(secret, &json!({"alg": "HS256"}), &good);
            assert!(verify(&keys(&[&old, &new]), &token, "alice", NOW).is_ok());
        }
        assert_eq!(verify(&[], &sign(SECRET, &json!({"alg": "HS256"}), &good), "alice", NOW), Err(Bad));
    }

    #[test]
    fn claims_are_taken_as_they_are_or_not_at_all() {
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
            assert_eq!(claims(wrong.clone()), Err(Bad), "{wrong}");
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
                Err(Bad),
                "{text}"
            );
        }
    }

    proptest::proptest! {
        #[test]
        fn nothing_panics(token: String, parts in proptest::collection::vec("[A-Za-z0-9_-]{0,40}", 0..5)) {
            let keys = keys(&[SECRET, RSA_PEM, P256_PEM, ED25519_PEM]);
            assert_eq!(verify(&keys, &token, "alice", NOW), Err(Bad));
            assert_eq!(verify(&keys, &parts.join("."), "alice", NOW), Err(Bad));
        }
    }
}
