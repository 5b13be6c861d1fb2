//! `fanfare token`: makes a token for a test or a first look. In earnest the backend that knows the users does it.

use std::ffi::OsString;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use data_encoding::BASE64URL_NOPAD;
use ring::hmac;
use serde_json::{Value, json};

use crate::auth::keys;
use crate::auth::token::secret;
use crate::config::parse_duration;
use crate::protocol::event::{ChannelName, is_user_id};

const HELP: &str = "\
Usage: fanfare token --user NAME --jwt-key FILE,... [--ttl TIME] [--channel NAME]... [--publish true|false|NAME]...

Prints a token signed with HS256 for /ws/NAME.

  --user NAME       Who it is for (sub).
  --jwt-key FILE,...
                    The key files of the nodes, or FANFARE_JWT_KEY. The first secret in them signs.
  --ttl TIME        How long it lasts (exp): a whole number and s, m, h or d; default 1h.
  --channel NAME    A channel it is good for, or a prefix that ends in *; may be repeated. Without it: all.
  --publish VALUE   true, false, or a channel or prefix to publish to; may be repeated. Without it: as
                    --client-publish says, which it can't widen.
";

/// Makes the token that `args` (those after `token`) ask for, or gives the help text.
///
/// # Errors
/// What is wrong with the arguments or the key file.
pub fn run(
    args: impl IntoIterator<Item = OsString>,
    key_variable: Option<OsString>,
) -> Result<String, String> {
    let (mut user, mut ttl, mut files) = (None, Duration::from_secs(3600), Vec::new());
    let (mut channels, mut publish) = (Vec::new(), Vec::new());
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        let arg = arg.into_string().map_err(|_| "an argument is not UTF-8")?;
        let (flag, attached) = match arg.split_once('=') {
            Some((flag, value)) => (flag, Some(OsString::from(value))),
            None => (arg.as_str(), None),
        };
        if matches!(flag, "--help" | "-h") {
            return Ok(HELP.into());
        }
        if !matches!(flag, "--user" | "--ttl" | "--jwt-key" | "--channel" | "--publish") {
            return Err(format!("{flag}: there is no such flag; fanfare token --help shows all"));
        }
        let value = attached.or_else(|| args.next()).ok_or(format!("{flag}: needs a value"))?;
        let value = value.into_string().map_err(|_| format!("{flag}: the value is not UTF-8"))?;
        match flag {
            "--user" => user = Some(value),
            "--ttl" => ttl = parse_duration(&value).map_err(|problem| format!("--ttl: {problem}"))?,
            "--jwt-key" => files.push(value),
            "--channel" => channels.push(pattern(flag, value)?),
            _ => publish.push(value),
        }
    }
    let user = user.filter(|user| is_user_id(user));
    let user = user.ok_or("--user: needs 1 to 128 bytes without control characters")?;
    let publish = publish_claim(publish)?;
    if let Some(variable) = key_variable.filter(|variable| files.is_empty() && !variable.is_empty()) {
        files.push(variable.into_string().map_err(|_| "FANFARE_JWT_KEY: the value is not UTF-8")?);
    }
    if files.is_empty() {
        return Err("--jwt-key: is needed, or FANFARE_JWT_KEY".into());
    }
    let secret = first_secret(&files.join(","))?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_err(|_| "the clock stands before 1970")?;
    let mut claims = json!({"sub": user, "iat": now.as_secs(), "exp": (now + ttl).as_secs()});
    if !channels.is_empty() {
        claims["channels"] = channels.into();
    }
    if let Some(publish) = publish {
        claims["publish"] = publish;
    }
    Ok(format!("{}\n", sign(&secret, &claims)))
}

/// A channel, or a prefix that ends in `*`.
fn pattern(flag: &str, value: String) -> Result<String, String> {
    let name = value.strip_suffix('*').unwrap_or(&value);
    if value != "*" && ChannelName::parse(name).is_none() {
        let rule = "1 to 128 letters, digits, _ . : and -, or a prefix of one that ends in *";
        return Err(format!("{flag}: {value:?} is not a channel: {rule}"));
    }
    Ok(value)
}

/// The `publish` claim; `None` when nothing was given. Words like `yes` are errors: they would be channels of that name,
/// which nobody means.
fn publish_claim(values: Vec<String>) -> Result<Option<Value>, String> {
    let is_word = |value: &str, words: &[&str]| words.iter().any(|word| value.eq_ignore_ascii_case(word));
    match values.as_slice() {
        [] => return Ok(None),
        [one] if one == "true" => return Ok(Some(true.into())),
        [one] if one == "false" => return Ok(Some(false.into())),
        _ => {}
    }
    for value in &values {
        if is_word(value, &["true", "false"]) {
            return Err(format!("--publish: {value} must be in lower case and the only value"));
        }
        if is_word(value, &["yes", "no", "on", "off"]) {
            return Err(format!("--publish: {value:?} is not a value: give true, false or a channel"));
        }
    }
    let patterns: Result<Vec<_>, _> = values.into_iter().map(|value| pattern("--publish", value)).collect();
    Ok(Some(patterns?.into()))
}

/// The first secret in these files, separated by commas. Nodes accept tokens signed with any of the keys, but a public
/// key can't sign.
fn first_secret(files: &str) -> Result<Vec<u8>, String> {
    let mut problems = Vec::new();
    for file in files.split(',').map(str::trim) {
        let content = keys::read(Path::new(file));
        match content.and_then(|content| Ok(secret(&content)?.to_vec())) {
            Ok(secret) => return Ok(secret),
            Err(problem) => problems.push(format!("--jwt-key {file}: {problem}")),
        }
    }
    Err(problems.join("; "))
}

fn sign(secret: &[u8], claims: &Value) -> String {
    let encode = |json: &Value| BASE64URL_NOPAD.encode(json.to_string().as_bytes());
    let signed = format!("{}.{}", encode(&json!({"alg": "HS256", "typ": "JWT"})), encode(claims));
    let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, secret), signed.as_bytes());
    format!("{signed}.{}", BASE64URL_NOPAD.encode(tag.as_ref()))
}
