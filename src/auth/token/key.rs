//! Keys that verify tokens, and the formats of their files.

use data_encoding::BASE64;
use ring::hmac;
use ring::signature::{self, UnparsedPublicKey, VerificationAlgorithm};

/// Shortest HS256 secret, in bytes: as long as the hash (RFC 7518 section 3.2). A holder of a token
/// can test guesses offline.
pub const SECRET_MIN: usize = 32;

/// Shortest RSA key, in bits (RFC 7518 section 3.3).
const RSA_BITS_MIN: usize = 2048;

/// A key and its algorithm.
pub struct Key(Kind);

enum Kind {
    Secret(hmac::Key),
    Public { algorithm: &'static str, key: UnparsedPublicKey<Vec<u8>> },
}

/// Contents of `AlgorithmIdentifier`, in DER (RFC 3279 section 2.3.1, RFC 5480 section 2.1.1, RFC
/// 8410 section 3).
const RSA: &[u8] = b"\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x01\x05\x00";
const P256: &[u8] = b"\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07";
const ED25519: &[u8] = b"\x06\x03\x2b\x65\x70";

const SEQUENCE: u8 = 0x30;
const INTEGER: u8 = 0x02;
const BIT_STRING: u8 = 0x03;

impl Key {
    /// Reads a key file: a public key in PEM, or else a secret.
    ///
    /// # Errors
    /// What is wrong with the file. The content is not quoted.
    pub fn parse(content: &[u8]) -> Result<Key, String> {
        match std::str::from_utf8(content).ok().filter(|text| text.contains("-----BEGIN")) {
            Some(pem) => Key::public(pem),
            None => Key::secret(content),
        }
    }

    fn secret(content: &[u8]) -> Result<Key, String> {
        Ok(Key(Kind::Secret(hmac::Key::new(hmac::HMAC_SHA256, secret(content)?))))
    }

    fn public(pem: &str) -> Result<Key, String> {
        let (label, der) = decode_pem(pem)?;
        match label {
            "RSA PUBLIC KEY" => Key::rsa(&der),
            "PUBLIC KEY" => {
                let (algorithm, bits) = parse_spki(&der).ok_or("contains a damaged public key")?;
                match algorithm {
                    RSA => Key::rsa(bits),
                    P256 if bits.len() == 65 && bits[0] == 4 => {
                        Ok(Key::of("ES256", &signature::ECDSA_P256_SHA256_FIXED, bits))
                    }
                    ED25519 if bits.len() == 32 => Ok(Key::of("EdDSA", &signature::ED25519, bits)),
                    _ => {
                        Err("contains no RSA, P-256 or Ed25519 key: use RS256, ES256, EdDSA or HS256".into())
                    }
                }
            }
            _ => Err("contains no public key: openssl pkey -pubout makes one from a private key".into()),
        }
    }

    /// Parses a public key in PKCS #1 (RFC 8017 appendix A.1.1).
    fn rsa(der: &[u8]) -> Result<Key, String> {
        let modulus = element(der, SEQUENCE).and_then(|(content, _)| element(content, INTEGER));
        let (modulus, _) = modulus.ok_or("contains a damaged public key")?;
        let bytes = modulus.iter().skip_while(|byte| **byte == 0).count();
        if bytes * 8 < RSA_BITS_MIN {
            return Err(format!("contains an RSA key that is too short: at least {RSA_BITS_MIN} bits"));
        }
        Ok(Key::of("RS256", &signature::RSA_PKCS1_2048_8192_SHA256, der))
    }

    fn of(algorithm: &'static str, with: &'static dyn VerificationAlgorithm, key: &[u8]) -> Key {
        Key(Kind::Public { algorithm, key: UnparsedPublicKey::new(with, key.to_vec()) })
    }

    /// The algorithm's name in a token's header (RFC 7518 section 3.1, RFC 8037 section 3.1).
    pub fn algorithm(&self) -> &'static str {
        match &self.0 {
            Kind::Secret(_) => "HS256",
            Kind::Public { algorithm, .. } => algorithm,
        }
    }

    /// Whether the file must be kept secret, since the key can sign.
    pub fn is_secret(&self) -> bool {
        matches!(self.0, Kind::Secret(_))
    }

    /// Whether the signature was made with this key.
    pub fn verifies(&self, message: &[u8], signature: &[u8]) -> bool {
        match &self.0 {
            Kind::Secret(key) => hmac::verify(key, message, signature).is_ok(), // in constant time
            Kind::Public { key, .. } => key.verify(message, signature).is_ok(),
        }
    }
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.algorithm())
    }
}

/// The HS256 secret in a file. The final line break of a text, which editors add, is not part of
/// it.
///
/// # Errors
/// The secret is too short, or looks like a public key in another format. Such a key must not
/// become a secret, since others know it.
pub fn secret(content: &[u8]) -> Result<&[u8], String> {
    let text = content.strip_suffix(b"\n").map(|text| text.strip_suffix(b"\r").unwrap_or(text));
    let secret = text.filter(|text| text.is_ascii()).unwrap_or(content);
    let is_der = element(content, SEQUENCE).is_some_and(|(_, rest)| rest.is_empty());
    let start = secret.trim_ascii_start();
    let forms = [&b"{"[..], b"[", b"-----BEGIN", b"ssh-", b"ecdsa-"];
    if is_der || forms.iter().any(|form| start.starts_with(form)) {
        return Err("contains a key in an unsupported form: use a public key in PEM, or a secret".into());
    }
    if secret.len() < SECRET_MIN {
        return Err(format!(
            "is too short for a secret: use at least {SECRET_MIN} bytes (openssl rand -hex 32)"
        ));
    }
    Ok(secret)
}

/// Label and content of the one block in a PEM text (RFC 7468).
fn decode_pem(text: &str) -> Result<(&str, Vec<u8>), String> {
    let damaged = || "contains a damaged PEM block".to_owned();
    let (_, rest) = text.split_once("-----BEGIN ").ok_or_else(damaged)?;
    let (label, rest) = rest.split_once("-----").ok_or_else(damaged)?;
    let (content, rest) = rest.split_once(&format!("-----END {label}-----")).ok_or_else(damaged)?;
    if rest.contains("-----BEGIN") {
        return Err("contains several keys: put each into a file of its own".into());
    }
    let content: String = content.split_ascii_whitespace().collect();
    Ok((label, BASE64.decode(content.as_bytes()).map_err(|_| damaged())?))
}

/// Algorithm and key of a `SubjectPublicKeyInfo` (RFC 5280 section 4.1).
fn parse_spki(der: &[u8]) -> Option<(&[u8], &[u8])> {
    let (info, rest) = element(der, SEQUENCE)?;
    let (algorithm, key) = element(info, SEQUENCE)?;
    let (bits, end) = element(key, BIT_STRING)?;
    let (unused, bits) = bits.split_first()?;
    (rest.is_empty() && end.is_empty() && *unused == 0).then_some((algorithm, bits))
}

/// Content of the first element, which must have this tag, and the rest (X.690 section 8.1).
fn element(der: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
    let rest = der.strip_prefix(&[tag])?;
    let (first, rest) = rest.split_first()?;
    let (length, rest) = match first {
        length @ 0..=0x7f => (usize::from(*length), rest),
        0x81 | 0x82 => {
            let (length, rest) = rest.split_at_checked(usize::from(first & 0x7f))?;
            (length.iter().fold(0, |length, byte| length << 8 | usize::from(*byte)), rest)
        }
        _ => return None,
    };
    rest.split_at_checked(length)
}

#[cfg(test)]
mod tests {
    use super::super::fixtures::*;
    use super::*;

    #[test]
    fn recognizes_each_format_of_key() {
        for (content, algorithm) in [
            (RSA_PEM, "RS256"),
            (RSA_PKCS1_PEM, "RS256"),
            (P256_PEM, "ES256"),
            (ED25519_PEM, "EdDSA"),
            (&P256_PEM.replace('\n', "\r\n"), "ES256"),
            (&format!("a comment\n{ED25519_PEM}"), "EdDSA"),
            (&"s".repeat(SECRET_MIN), "HS256"),
        ] {
            assert_eq!(Key::parse(content.as_bytes()).unwrap().algorithm(), algorithm, "{content}");
        }
    }

    #[test]
    fn rejects_other_files() {
        let der = decode_pem(RSA_PEM).unwrap().1;
        let private = P256_PEM.replace("PUBLIC KEY", "PRIVATE KEY");
        for (content, part) in [
            (&b""[..], "too short"),
            (&[b's'; SECRET_MIN - 1], "too short"),
            (&[&[b's'; SECRET_MIN - 1][..], b"\r\n"].concat(), "too short"),
            (br#"{"keys":[{"kty":"RSA","n":"0123456789abcdef0123456789abcdef","e":"AQAB"}]}"#, "form"),
            (b"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIBd5aXZl me@example", "form"),
            (&der, "form"),
            (RSA_SHORT_PEM.as_bytes(), "2048"),
            (P384_PEM.as_bytes(), "no RSA, P-256 or Ed25519"),
            (private.as_bytes(), "-pubout"),
            ([P256_PEM, P256_PEM].concat().as_bytes(), "several"),
            (P256_PEM.replace("END PUBLIC", "END").as_bytes(), "damaged PEM"),
            (P256_PEM.replace("MF", "MG").as_bytes(), "damaged public"),
        ] {
            let error = Key::parse(content).expect_err("not a key");
            assert!(error.contains(part), "{part}: {error}");
        }
    }

    #[test]
    fn strips_the_line_break_of_a_text_secret() {
        let text = [b's'; SECRET_MIN];
        for end in [&b""[..], b"\n", b"\r\n"] {
            assert_eq!(secret(&[&text[..], end].concat()).unwrap(), text);
        }
        let binary = [&[0x80; SECRET_MIN][..], b"\n"].concat();
        assert_eq!(secret(&binary).unwrap(), binary);
    }

    proptest::proptest! {
        #[test]
        fn nothing_panics(bytes: Vec<u8>, at in 0usize..90, byte: u8) {
            let _ = Key::parse(&bytes);
            let _ = Key::parse(format!("-----BEGIN PUBLIC KEY-----{}-----END PUBLIC KEY-----", BASE64.encode(&bytes)).as_bytes());
            let mut der = decode_pem(P256_PEM).unwrap().1;
            der[at] = byte;
            let _ = Key::parse(format!("-----BEGIN PUBLIC KEY-----{}-----END PUBLIC KEY-----", BASE64.encode(&der)).as_bytes());
        }
    }
}
