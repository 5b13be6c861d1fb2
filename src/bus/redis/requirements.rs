//! Whether a Redis has what a node needs.

use fred::clients::Client;
use fred::types::{Resp3Frame, Value};

use super::commands::{command, is_passing, script_args};
use super::errors::{CallError, ConnectError};
use super::reply;
use super::scripts;
use super::settings::Terms;

/// The oldest Redis with functions, script flags and ACL checks in scripts.
const OLDEST_REDIS: u32 = 7;

pub async fn setup(
    client: &Client,
    name: &'static str,
    args: Vec<Value>,
) -> Result<Resp3Frame, ConnectError> {
    command(client, name, args).await.map_err(|error| match error {
        CallError::Lost(text) => ConnectError::Away(text.to_string()),
        CallError::Refused(text) if is_passing(&text) => ConnectError::Away(text.to_string()),
        CallError::Refused(text) => ConnectError::Refused(text.to_string()),
    })
}

/// A field of INFO.
pub fn field<'a>(info: &'a str, name: &str) -> Option<&'a str> {
    info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
}

/// Whether this Redis will do; gives its INFO.
pub async fn check_server(client: &Client) -> Result<String, ConnectError> {
    let info = reply::bytes(&setup(client, "INFO", Vec::new()).await?).unwrap_or_default();
    let info = String::from_utf8_lossy(&info).into_owned();
    let version = field(&info, "redis_version").unwrap_or_default();
    let major = version.split('.').next().and_then(|major| major.parse::<u32>().ok());
    if major.is_some_and(|major| major < OLDEST_REDIS) {
        return Err(ConnectError::Unusable(format!(
            "this Redis is {version}, but fanfare needs {OLDEST_REDIS}.0 or newer"
        )));
    }
    if field(&info, "cluster_enabled") == Some("1") {
        return Err(ConnectError::Unusable(
            "this Redis is a cluster, which is not supported yet: give --redis a stand-alone Redis or Sentinel"
                .into(),
        ));
    }
    Ok(info)
}

/// Checks that Redis has all that a node needs and permits it to its user. The script is sent whole: it is needed once.
pub async fn check_permissions(client: &Client, terms: &Terms) -> Result<(), ConnectError> {
    let channel = format!("{}:{{x}}", terms.prefix);
    let bare = terms.bare.iter().map(|channel| Value::from(channel.as_str())).collect();
    let keys = [&*channel, &terms.canary(), &terms.settings_key()];
    let args = script_args(Value::from_static_str(scripts::CHECK), &keys, bare);
    let [refused, lacking] = match command(client, "EVAL", args).await {
        Ok(frame) => match reply::array(&frame) {
            Some([refused, lacking]) => [reply::texts(refused), reply::texts(lacking)],
            _ => return Err(ConnectError::Refused("an answer of a form that no script gives".into())),
        },
        Err(CallError::Lost(text)) => return Err(ConnectError::Away(text.to_string())),
        Err(CallError::Refused(text)) if is_passing(&text) => {
            return Err(ConnectError::Away(text.to_string()));
        }
        Err(CallError::Refused(text)) if text.starts_with("NOPERM") => [vec![text.to_string()], Vec::new()],
        Err(CallError::Refused(text)) => return Err(ConnectError::Refused(text.to_string())),
    };
    if !lacking.is_empty() {
        return Err(ConnectError::Lacking(lacking.join(", ")));
    }
    if refused.is_empty() {
        return Ok(());
    }
    let bare: String = terms.bare.iter().map(|channel| format!(" &{channel}")).collect();
    Err(ConnectError::NotPermitted(format!(
        "Redis does not permit {}; grant this user ~{prefix}:* &{prefix}:*{bare} +@read +@write +@pubsub +@scripting \
         +@connection +info +time",
        refused.join(", "),
        prefix = terms.prefix,
    )))
}
