//! Commands about the connections of a user, on all nodes. They are events of a channel that only
//! backends and nodes can use.

use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use super::event::ChannelName;

/// Longest ban. For longer than that an application issues no tokens.
pub const BAN_MAX: Duration = Duration::from_secs(365 * 86_400);

/// What a backend orders.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Order {
    /// Close the connections of a user. With a channel: stop following it for the user.
    Disconnect { user: Arc<str>, channel: Option<ChannelName> },
    /// Close the connections of a user and refuse new ones for this time.
    Ban { user: Arc<str>, time: Duration },
    /// Accept the connections of a user again.
    Unban { user: Arc<str> },
}

/// What every node executes, as the bus has stored it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    Disconnect {
        user: Arc<str>,
        channel: Option<ChannelName>,
    },
    Ban {
        user: Arc<str>,
        /// The end, in milliseconds since 1970 on the clock of the bus.
        until: u64,
    },
    Unban {
        user: Arc<str>,
    },
}

impl Command {
    /// Parses an event of the control channel, as control.lua writes it. `None` for a command that
    /// this version does not know.
    pub fn parse(event: &[u8]) -> Option<Command> {
        let event: Value = serde_json::from_slice(event).ok()?;
        let user: Arc<str> = event.get("user")?.as_str()?.into();
        Some(match event.get("command")?.as_str()? {
            "disconnect" => {
                let channel = match event.get("channel") {
                    Some(name) => Some(ChannelName::parse(name.as_str()?)?),
                    None => None,
                };
                Command::Disconnect { user, channel }
            }
            "ban" => Command::Ban { user, until: event.get("until")?.as_u64()? },
            "unban" => Command::Unban { user },
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_parsed() {
        let (user, channel): (Arc<str>, _) = ("al\"ice".into(), ChannelName::parse("room.1"));
        for (event, command) in [
            (
                r#"{"command":"disconnect","user":"al\"ice","id":7}"#,
                Some(Command::Disconnect { user: user.clone(), channel: None }),
            ),
            (
                r#"{"command":"disconnect","user":"al\"ice","channel":"room.1","id":7}"#,
                Some(Command::Disconnect { user: user.clone(), channel }),
            ),
            (
                r#"{"command":"ban","user":"al\"ice","until":1764000000000,"id":7}"#,
                Some(Command::Ban { user: user.clone(), until: 1_764_000_000_000 }),
            ),
            (r#"{"command":"unban","user":"al\"ice","id":7}"#, Some(Command::Unban { user })),
            // A channel that can't be read must not become all channels.
            (r#"{"command":"disconnect","user":"a","channel":"a b","id":7}"#, None),
            (r#"{"command":"disconnect","user":"a","channel":null,"id":7}"#, None),
            (r#"{"command":"ban","user":"a","id":7}"#, None),
            (r#"{"command":"promote","user":"a","id":7}"#, None),
            (r#"{"data":"text","id":7}"#, None),
            ("[]", None),
            ("", None),
        ] {
            assert_eq!(Command::parse(event.as_bytes()), command, "{event}");
        }
    }
}
