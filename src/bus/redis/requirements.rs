//! Checks that a Redis has what a node needs.

use fred::clients::Client;
use fred::types::{Resp3Frame, Value};

use super::commands::{command, script_args};
use super::errors::{CallError, ConnectError, MissingRights, is_temporary};
use super::scripts::{self, number};
use super::server::{self, Server};
use super::settings::{Kind, RedisSettings};
use super::{advice, reply};

/// Sends a command that must succeed before a session can start.
pub async fn required(
    client: &Client,
    name: &'static str,
    args: Vec<Value>,
) -> Result<Resp3Frame, ConnectError> {
    command(client, name, args).await.map_err(connect_error)
}

fn connect_error(error: CallError) -> ConnectError {
    match error {
        CallError::NoReply(text) | CallError::NoReplyElsewhere(text) => {
            ConnectError::Unreachable(text.to_string())
        }
        CallError::ErrorReply(text) if is_temporary(&text) => ConnectError::Unreachable(text.to_string()),
        CallError::ErrorReply(text) => ConnectError::Rejected(text.to_string()),
    }
}

/// Checks server and mode. Returns the reply of INFO.
pub async fn check_server(client: &Client, kind: Kind) -> Result<String, ConnectError> {
    let info = reply::bytes(&required(client, "INFO", Vec::new()).await?).unwrap_or_default();
    let info = String::from_utf8_lossy(&info).into_owned();
    Server::of(&info).check().map_err(ConnectError::Unsupported)?;
    if server::mode(&info) == Some("sentinel") {
        return Err(ConnectError::Unsupported(
            "the server at --redis is a Sentinel: use redis-sentinel://HOST:PORT?sentinelServiceName=NAME"
                .into(),
        ));
    }
    match (reply::info_field(&info, "cluster_enabled") == Some("1"), kind == Kind::Cluster) {
        (true, false) => Err(ConnectError::Unsupported(
            "the server at --redis is a node of a Redis Cluster: use redis-cluster://HOST:PORT,HOST:PORT"
                .into(),
        )),
        (false, true) => Err(ConnectError::Unsupported(
            "the server at --redis is not a node of a Redis Cluster: use redis://HOST:PORT".into(),
        )),
        _ => Ok(info),
    }
}

/// What the eviction policy in a reply of INFO does, if Redis may evict keys.
pub fn eviction_warning(info: &str) -> Option<String> {
    let policy = reply::info_field(info, "maxmemory_policy").filter(|policy| *policy != "noeviction")?;
    let maxmemory = reply::info_number(info, "maxmemory");
    Some(advice::for_eviction(policy, maxmemory) + ": set maxmemory-policy noeviction")
}

/// Checks that Redis has all commands that a node needs, and that the user's ACL permits them. The
/// script is sent as text, since it is needed once.
pub async fn check_permissions(client: &Client, settings: &RedisSettings) -> Result<(), ConnectError> {
    let channel = format!("{}:{{x}}", settings.prefix);
    let pubsub = settings.pubsub_channels.iter().map(|channel| Value::from(channel.as_str()));
    let kind = settings.kind.name().to_owned();
    let mut args: Vec<Value> =
        [channel, settings.probe_topic(0), settings.settings_key(), kind].map(Value::from).into();
    args.push(number(settings.tracks_presence.into()));
    args.extend(pubsub);
    let args = script_args(Value::from_static_str(scripts::CHECK), &[], args);
    let [forbidden, unavailable] = match command(client, "EVAL", args).await {
        Ok(frame) => match reply::array(&frame) {
            Some([forbidden, unavailable]) => [reply::texts(forbidden), reply::texts(unavailable)],
            _ => return Err(ConnectError::Rejected("unexpected reply of check.lua".into())),
        },
        Err(CallError::ErrorReply(text)) if text.starts_with("NOPERM") => {
            [vec![text.to_string()], Vec::new()]
        }
        Err(error) => return Err(connect_error(error)),
    };
    if !unavailable.is_empty() {
        return Err(ConnectError::Unavailable(unavailable.join(", ")));
    }
    if forbidden.is_empty() {
        return Ok(());
    }
    let pubsub: String = settings.pubsub_channels.iter().map(|channel| format!(" &{channel}")).collect();
    Err(ConnectError::NotPermitted(MissingRights {
        commands: forbidden.join(", "),
        grant: format!(
            "~{prefix}:* &{prefix}:*{pubsub} +@read +@write +@pubsub +@scripting +@connection +info +time{cluster}",
            prefix = settings.prefix,
            cluster = if settings.kind == Kind::Cluster { " +cluster|slots +cluster|info" } else { "" },
        ),
    }))
}
