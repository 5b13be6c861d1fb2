//! The claims of a token whose signature is verified (RFC 7519 section 4.1, and ours).

use serde::Deserialize;
use serde_json::Value;

use super::{Grant, InvalidToken, Publish, present};
use crate::protocol::event::is_user_id;

/// How far the clock of a token's issuer may be ahead, in seconds. Expiry has no leeway.
const CLOCK_LEEWAY: f64 = 60.0;

/// Times from here on are not in seconds: as seconds they are after the year 30000, and today's
/// milliseconds are 1.8e12. The largest date of .NET (253402300799) is an expiry that is meant.
const TOO_LATE: f64 = 1e12;

/// In 2001, before JWTs: an earlier `exp` is a lifetime.
const TOO_EARLY: f64 = 1e9;

/// The claims as they were given. A claim that is given twice is an error of serde.
#[derive(Deserialize)]
pub struct Claims {
    #[serde(default, deserialize_with = "present")]
    sub: Option<Value>,
    #[serde(default, deserialize_with = "present")]
    exp: Option<Value>,
    #[serde(default, deserialize_with = "present")]
    nbf: Option<Value>,
    #[serde(default, deserialize_with = "present")]
    channels: Option<Value>,
    #[serde(default, deserialize_with = "present")]
    publish: Option<Value>,
}

impl Claims {
    /// What they allow this user `now` (seconds since 1970).
    pub fn grant(self, user: &str, now: u64) -> Result<Grant, InvalidToken> {
        let now = now as f64;
        let sub = subject(self.sub)?;
        let exp = expiry(self.exp)?;
        let nbf = self.nbf.map(start).transpose()?;
        let channels = self.channels.map(channels).transpose()?;
        let publish = self.publish.map(publish).transpose()?;
        if sub != user {
            return Err(InvalidToken::OtherUser);
        }
        // `as` stops at the ends of an integer.
        if exp <= now {
            return Err(InvalidToken::Expired { seconds: (now - exp) as u64 });
        }
        if let Some(nbf) = nbf.filter(|nbf| *nbf > now + CLOCK_LEEWAY) {
            return Err(InvalidToken::NotYetValid { seconds: (nbf - now) as u64 });
        }
        Ok(Grant { expires: exp as u32, channels, publish })
    }
}

fn subject(sub: Option<Value>) -> Result<String, InvalidToken> {
    Err(InvalidToken::Claim(match sub {
        Some(Value::String(sub)) if is_user_id(&sub) => return Ok(sub),
        Some(Value::String(_)) => "sub is not a user id: 1 to 128 bytes without control characters",
        Some(Value::Number(_)) => "sub is a number: it must be a string, the user id in the path",
        Some(_) => "sub must be a string, the user id in the path",
        None => "sub is missing: it must be the user id in the path",
    }))
}

fn expiry(exp: Option<Value>) -> Result<f64, InvalidToken> {
    Err(InvalidToken::Claim(match exp {
        None => "exp is missing: it must be the time of expiry, in seconds since 1970",
        Some(exp) => match exp.as_f64() {
            None if exp.is_string() => "exp is a string: it must be a number, seconds since 1970",
            None => "exp must be a number, seconds since 1970",
            Some(TOO_LATE..) => {
                "exp is after the year 30000, probably in milliseconds: it must be in seconds since 1970"
            }
            Some(..TOO_EARLY) => {
                "exp is before 2001, probably a lifetime: it must be a time, in seconds since 1970"
            }
            Some(exp) => return Ok(exp),
        },
    }))
}

fn start(nbf: Value) -> Result<f64, InvalidToken> {
    Err(InvalidToken::Claim(match nbf.as_f64() {
        None => "nbf must be a number, seconds since 1970",
        Some(TOO_LATE..) => {
            "nbf is after the year 30000, probably in milliseconds: it must be in seconds since 1970"
        }
        Some(nbf) => return Ok(nbf),
    }))
}

fn channels(value: Value) -> Result<Vec<String>, InvalidToken> {
    strings(value).ok_or(InvalidToken::Claim(
        r#"channels must be a list of strings, such as ["news","team.*"], or absent"#,
    ))
}

fn publish(value: Value) -> Result<Publish, InvalidToken> {
    match value {
        Value::Bool(may) => Some(Publish::Everywhere(may)),
        other => strings(other).map(Publish::To),
    }
    .ok_or(InvalidToken::Claim("publish must be true, false, a list of strings, or absent"))
}

/// The items of a list of strings.
fn strings(value: Value) -> Option<Vec<String>> {
    serde_json::from_value(value).ok()
}
