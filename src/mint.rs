//! `fanfare token`: makes a token for a test or a first look. In earnest the backend that knows the users does it.

use std::ffi::OsString;
use std::fs;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use data_encoding::BASE64URL_NOPAD;
use ring::hmac;
use serde_json::{Value, json};

use crate::config::parse_duration;
use crate::event::is_user_id;
use crate::token::secret;

const HELP: &str = "\
Usage: fanfare token --user NAME --jwt-key FILE [--ttl TIME] [--channel NAME]... [--publish true|false|NAME]...

Prints a token signed with HS256 for /ws/NAME.

  --user NAME       Who it is for (sub).
  --jwt-key FILE    The secret that the nodes know by their --jwt-key. Or FANFARE_JWT_KEY.
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
    let (mut user, mut ttl, mut file) = (None, Duration::from_secs(3600), key_variable);
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
        if flag == "--jwt-key" {
            file = Some(value);
            continue;
        }
        let value = value.into_string().map_err(|_| format!("{flag}: the value is not UTF-8"))?;
        match flag {
            "--user" => user = Some(value),
            "--ttl" => ttl = parse_duration(&value).map_err(|problem| format!("--ttl: {problem}"))?,
            "--channel" => channels.push(value),
            _ => publish.push(value),
        }
    }
    let user = user.filter(|user| is_user_id(user));
    let user = user.ok_or("--user: needs 1 to 128 bytes without control characters")?;
    let file = file.ok_or("--jwt-key: is needed, or FANFARE_JWT_KEY")?;
    let file = std::path::Path::new(&file);
    let wrong = |problem: String| format!("--jwt-key {}: {problem}", file.display());
    let content = fs::read(file).map_err(|error| wrong(format!("can't be read: {error}")))?;
    let secret = secret(&content).map_err(wrong)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_err(|_| "the clock stands before 1970")?;
    let mut claims = json!({"sub": user, "iat": now.as_secs(), "exp": (now + ttl).as_secs()});
    if !channels.is_empty() {
        claims["channels"] = channels.into();
    }
    match publish.as_slice() {
        [] => {}
        [one] if one == "true" => claims["publish"] = true.into(),
        [one] if one == "false" => claims["publish"] = false.into(),
        _ => claims["publish"] = publish.into(),
    }
    Ok(format!("{}\n", sign(secret, &claims)))
}

fn sign(secret: &[u8], claims: &Value) -> String {
    let encode = |json: &Value| BASE64URL_NOPAD.encode(json.to_string().as_bytes());
    let signed = format!("{}.{}", encode(&json!({"alg": "HS256", "typ": "JWT"})), encode(claims));
    let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, secret), signed.as_bytes());
    format!("{signed}.{}", BASE64URL_NOPAD.encode(tag.as_ref()))
}
