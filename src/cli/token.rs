//! `fanfare token`: makes a token for a test, or says why a token is not valid. In production the
//! backend that knows the users makes tokens.

use std::ffi::OsString;
use std::io::Read;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use data_encoding::BASE64URL_NOPAD;
use ring::hmac;
use serde_json::{Value, json};

use super::Report;
use crate::auth::keys;
use crate::auth::token::{self, InvalidToken, Key, NEVER, secret};
use crate::config::args::{Args, Flag};
use crate::config::{SettingError, parse_duration, show_rounded};
use crate::metrics::rejections::printable;
use crate::protocol::event::{ChannelName, is_user_id};

const HELP: &str = "\
Usage: fanfare token --user NAME --jwt-key FILE,... [--ttl TIME]
                     [--channel NAME,...] [--publish true|false|NAME,...]
       fanfare token --check TOKEN|- --jwt-key FILE,... [--user NAME]

Prints a token signed with HS256 for /ws/NAME, or checks one.

  --user NAME         User id of the client (sub).
  --jwt-key FILE,...  Key files of the nodes, or FANFARE_JWT_KEY. The first
                      secret in them signs the token.
  --ttl TIME          How long the token is valid (exp): a whole number and s,
                      m, h or d; default 1h.
  --channel NAME,...  Channels that the client may join, or prefixes that end
                      in *. Without it: all.
  --publish VALUE     true, false, or channels and prefixes that the client may
                      publish to. Without it: what --client-publish allows. It
                      can't allow more than --client-publish.
  --check TOKEN       Prints the claims of this token, and whether a node with
                      these keys accepts it now for --user, or else why not.
                      Without --user: for the user in sub. - reads the token
                      from standard input, which keeps it out of the history of
                      the shell.

Lists may be separated by commas, or the flag repeated.
Exit code: 0; 1 if a checked token is not valid; 2 for wrong arguments.
";

const FLAGS: [Flag; 7] = [
    Flag::new("user", "NAME"),
    Flag::new("jwt-key", "FILE,..."),
    Flag::new("ttl", "TIME"),
    Flag::new("channel", "NAME,..."),
    Flag::new("publish", "VALUE,..."),
    Flag::new("check", "TOKEN"),
    Flag::new("help", ""),
];

/// Most bytes read from standard input: longer than any token that fits into a request.
const TOKEN_MAX: u64 = 64 * 1024;

/// Lifetime of a token without `--ttl`.
const TTL: Duration = Duration::from_secs(3600);

/// Makes or checks the token that `args` (those after `token`) ask for, or returns the help text.
/// `key_variable` is the value of `FANFARE_JWT_KEY`.
///
/// # Errors
/// Every wrong argument, and key files without a usable key.
pub fn run(
    args: impl IntoIterator<Item = OsString>,
    key_variable: Option<OsString>,
    input: impl Read,
) -> Result<Report, Vec<SettingError>> {
    let mut args = Args::read(args, &FLAGS);
    if args.switch("help") {
        return Ok(Report::ok(HELP));
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.expect("the clock of the machine is after 1970");
    match args.take("check") {
        Some(token) => check(token, args, key_variable, input, now),
        None => make(args, key_variable, now),
    }
}

fn make(mut args: Args, key_variable: Option<OsString>, now: Duration) -> Result<Report, Vec<SettingError>> {
    let user = args.required("user", parse_user);
    let ttl = args.value("ttl", parse_duration).unwrap_or(TTL);
    let channels = args.value("channel", parse_patterns);
    let publish = args.value("publish", parse_publish);
    let files = key_files(&mut args, key_variable);
    let (Some(user), Some(files), true) = (user, files, args.errors.is_empty()) else {
        return Err(args.errors);
    };
    let secret = first_secret(&files)?;
    let mut claims = json!({"sub": user, "iat": now.as_secs(), "exp": (now + ttl).as_secs()});
    if let Some(channels) = channels {
        claims["channels"] = channels.into();
    }
    if let Some(publish) = publish {
        claims["publish"] = publish;
    }
    Ok(Report::ok(format!("{}\n", sign(&secret, &claims))))
}

fn check(
    token: String,
    mut args: Args,
    key_variable: Option<OsString>,
    input: impl Read,
    now: Duration,
) -> Result<Report, Vec<SettingError>> {
    let user = args.value("user", parse_user);
    for name in ["ttl", "channel", "publish"] {
        if args.take(name).is_some() {
            args.error(&format!("--{name}"), "has no effect with --check: leave it out");
        }
    }
    let token = match token.as_str() {
        "-" => {
            let mut text = String::new();
            if let Err(error) = input.take(TOKEN_MAX).read_to_string(&mut text) {
                args.error("--check -", format!("standard input can't be read: {error}"));
            }
            text
        }
        _ => token,
    };
    let files = key_files(&mut args, key_variable);
    let (Some(files), true) = (files, args.errors.is_empty()) else { return Err(args.errors) };
    Ok(verdict(&all_keys(&files)?, token.trim(), user, now.as_secs()))
}

/// The claims of a token, and whether it is valid.
fn verdict(keys: &[Key], token: &str, user: Option<String>, now: u64) -> Report {
    let claims = token::unverified_claims(token);
    let user = user.unwrap_or_else(|| {
        let claims = claims.as_deref().and_then(|claims| serde_json::from_str::<Value>(claims).ok());
        claims.and_then(|claims| Some(claims.get("sub")?.as_str()?.to_owned())).unwrap_or_default()
    });
    let result = token::verify(keys, token, &user, now);
    let is_unverified = matches!(
        result,
        Err(InvalidToken::Malformed(_) | InvalidToken::Algorithm { .. } | InvalidToken::Signature(_))
    );
    let mark = if is_unverified { " (not verified)" } else { "" };
    let claims = claims.map_or(String::new(), |claims| format!("claims{mark}: {}\n", printable(&claims)));
    let (verdict, has_problems) = match result {
        Ok(grant) if grant.expires == NEVER => (format!("valid for user {user:?}"), false),
        Ok(grant) => {
            let left = show_rounded(u64::from(grant.expires).saturating_sub(now) as f64);
            (format!("valid for user {user:?}, expires in {left}"), false)
        }
        Err(reason) => (format!("not valid: {reason}"), true),
    };
    Report { text: format!("{claims}{verdict}\n"), has_problems }
}

/// The value of `--jwt-key`, or of its variable.
fn key_files(args: &mut Args, variable: Option<OsString>) -> Option<String> {
    match variable.filter(|_| !args.is_given("jwt-key")) {
        Some(variable) if !variable.is_empty() => utf8(variable, args),
        _ => args.required("jwt-key", |files| Ok(files.to_owned())),
    }
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
        let rule = ChannelName::RULE;
        return Err(format!("{text:?} is not a channel: {rule}, or a prefix of a channel that ends in *"));
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
    for result in read_files(files, |content| Ok(secret(content)?.to_vec())) {
        match result {
            Ok(secret) => return Ok(secret),
            Err(error) => errors.push(error),
        }
    }
    Err(errors)
}

/// The keys in these files. A node starts only if it can use each of them.
fn all_keys(files: &str) -> Result<Vec<Key>, Vec<SettingError>> {
    let (mut keys, mut errors) = (Vec::new(), Vec::new());
    for result in read_files(files, Key::parse) {
        match result {
            Ok(key) => keys.push(key),
            Err(error) => errors.push(error),
        }
    }
    if errors.is_empty() { Ok(keys) } else { Err(errors) }
}

/// Parses the content of each file.
fn read_files<T>(
    files: &str,
    parse: impl Fn(&[u8]) -> Result<T, String>,
) -> impl Iterator<Item = Result<T, SettingError>> {
    files.split(',').map(str::trim).map(move |file| {
        let result = keys::read(Path::new(file)).and_then(|content| parse(&content));
        result.map_err(|problem| SettingError { setting: format!("--jwt-key {file}"), problem })
    })
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
        let errors =
            run(args.iter().map(OsString::from), None, std::io::empty()).expect_err("a wrong argument");
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
