//! `fanfare token`: makes a token for a test. In production the backend that knows the users makes
//! tokens.

use std::ffi::OsString;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use data_encoding::BASE64URL_NOPAD;
use ring::hmac;
use serde_json::{Value, json};

use crate::auth::keys;
use crate::auth::token::secret;
use crate::config::args::{Args, Flag};
use crate::config::{SettingError, parse_duration};
use crate::protocol::event::{ChannelName, is_user_id};

const HELP: &str = "\
Usage: fanfare token --user NAME --jwt-key FILE,... [--ttl TIME] [--channel NAME,...] [--publish true|false|NAME,...]

Prints a token signed with HS256 for /ws/NAME.

  --user NAME         User id of the client (sub).
  --jwt-key FILE,...  Key files of the nodes, or FANFARE_JWT_KEY. The first secret in them signs the token.
  --ttl TIME          How long the token is valid (exp): a whole number and s, m, h or d; default 1h.
  --channel NAME,...  Channels that the client may join, or prefixes that end in *. Without it: all.
  --publish VALUE     true, false, or channels and prefixes that the client may publish to. Without it: what
                      --client-publish allows. It can't allow more than --client-publish.

Lists may be separated by commas, or the flag repeated.
";

const FLAGS: [Flag; 6] = [
    Flag::new("user", "NAME"),
    Flag::new("jwt-key", "FILE,..."),
    Flag::new("ttl", "TIME"),
    Flag::new("channel", "NAME,..."),
    Flag::new("publish", "VALUE,..."),
    Flag::new("help", ""),
];

/// Lifetime of a token without `--ttl`.
const TTL: Duration = Duration::from_secs(3600);

/// Makes the token that `args` (those after `token`) ask for, or returns the help text.
/// `key_variable` is the value of `FANFARE_JWT_KEY`.
///
/// # Errors
/// Every wrong argument, and key files without a secret.
pub fn run(
    args: impl IntoIterator<Item = OsString>,
    key_variable: Option<OsString>,
) -> Result<String, Vec<SettingError>> {
    let mut args = Args::read(args, &FLAGS);
    if args.switch("help") {
        return Ok(HELP.into());
    }
    let user = args.required("user", parse_user);
    let ttl = args.value("ttl", parse_duration).unwrap_or(TTL);
    let channels = args.value("channel", parse_patterns);
    let publish = args.value("publish", parse_publish);
    let files = match key_variable.filter(|_| !args.is_given("jwt-key")) {
        Some(variable) if !variable.is_empty() => utf8(variable, &mut args),
        _ => args.required("jwt-key", |files| Ok(files.to_owned())),
    };
    let (Some(user), Some(files), true) = (user, files, args.errors.is_empty()) else {
        return Err(args.errors);
    };
    let secret = first_secret(&files)?;
    let issued = SystemTime::now().duration_since(UNIX_EPOCH);
    let issued = issued.expect("the clock of the machine is after 1970");
    let mut claims = json!({"sub": user, "iat": issued.as_secs(), "exp": (issued + ttl).as_secs()});
    if let Some(channels) = channels {
        claims["channels"] = channels.into();
    }
    if let Some(publish) = publish {
        claims["publish"] = publish;
    }
    Ok(format!("{}\n", sign(&secret, &claims)))
}

fn utf8(variable: OsString, args: &mut Args) -> Option<String> {
    variable.into_string().map_err(|_| args.error("FANFARE_JWT_KEY", "the value is not UTF-8")).ok()
}

fn parse_user(text: &str) -> Result<String, String> {
    match is_user_id(text) {
        true => Ok(text.into()),
        false => Err("must have 1 to 128 bytes without control characters".into()),
    }
}

/// Channels, or prefixes that end in `*`.
fn parse_patterns(text: &str) -> Result<Vec<String>, String> {
    text.split(',').map(|pattern| parse_pattern(pattern.trim())).collect()
}

fn parse_pattern(text: &str) -> Result<String, String> {
    let name = text.strip_suffix('*').unwrap_or(text);
    if text != "*" && ChannelName::parse(name).is_none() {
        let rule = "1 to 128 letters, digits, _ . : and -, or a prefix of a channel that ends in *";
        return Err(format!("{text:?} is not a channel: {rule}"));
    }
    Ok(text.into())
}

/// The `publish` claim. Words like `yes` are errors: as patterns they would allow the channel of
/// that name.
fn parse_publish(text: &str) -> Result<Value, String> {
    if let "true" | "false" = text {
        return Ok((text == "true").into());
    }
    let is_word = |value: &str, words: &[&str]| words.iter().any(|word| value.eq_ignore_ascii_case(word));
    for value in text.split(',').map(str::trim) {
        if is_word(value, &["true", "false"]) {
            return Err(format!("{value} must be in lower case and the only value"));
        }
        if is_word(value, &["yes", "no", "on", "off"]) {
            return Err(format!("{value:?} is not a value: use true, false or a channel"));
        }
    }
    Ok(parse_patterns(text)?.into())
}

/// The first secret in these files, separated by commas. Nodes accept tokens signed with any of the
/// keys, but public keys can't sign.
fn first_secret(files: &str) -> Result<Vec<u8>, Vec<SettingError>> {
    let mut errors = Vec::new();
    for file in files.split(',').map(str::trim) {
        let content = keys::read(Path::new(file));
        match content.and_then(|content| Ok(secret(&content)?.to_vec())) {
            Ok(secret) => return Ok(secret),
            Err(problem) => errors.push(SettingError { setting: format!("--jwt-key {file}"), problem }),
        }
    }
    Err(errors)
}

fn sign(secret: &[u8], claims: &Value) -> String {
    let encode = |json: &Value| BASE64URL_NOPAD.encode(json.to_string().as_bytes());
    let signed = format!("{}.{}", encode(&json!({"alg": "HS256", "typ": "JWT"})), encode(claims));
    let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, secret), signed.as_bytes());
    format!("{signed}.{}", BASE64URL_NOPAD.encode(tag.as_ref()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn errors(args: &[&str]) -> Vec<String> {
        let errors = run(args.iter().map(OsString::from), None).expect_err("a wrong argument");
        errors.iter().map(SettingError::to_string).collect()
    }

    #[test]
    fn every_wrong_argument_is_an_error() {
        assert_eq!(errors(&["--user", "a", "--user", "b", "--jwt-key=/"]), ["--user: is given twice"]);
        assert_eq!(errors(&[]), ["--user: is required", "--jwt-key: is required"]);
        let found = errors(&["--user", "", "--ttl=1", "--publish", "true,a", "--chanel", "a", "--jwt-key=/"]);
        let settings: Vec<_> = found.iter().filter_map(|error| Some(error.split_once(':')?.0)).collect();
        assert_eq!(settings, ["--chanel", "--user", "--ttl", "--publish"]);
    }
}
