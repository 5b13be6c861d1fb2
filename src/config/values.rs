//! Types of settings that std does not have, and their texts.

use std::fmt;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::PathBuf;

/// Address of the admin listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AdminAddr {
    /// A TCP address.
    Tcp(SocketAddr),
    /// Path of a unix socket.
    Unix(PathBuf),
    /// There is no admin listener.
    Off,
}

/// Which pings a connection gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PingFormat {
    /// WebSocket pings (RFC 6455 section 5.5.2).
    WebSocket,
    /// `{"type":"ping"}` frames.
    Json,
    /// Both.
    Both,
}

/// What clients may publish. A token can only narrow it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientPublish {
    /// Nothing.
    Off,
    /// Events for all subscribers of their own channel.
    Channel,
    /// These, and events for one user.
    Any,
}

/// A limit on connections whose default depends on other settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cap {
    /// The default.
    Auto,
    /// No limit.
    Off,
    /// This many connections.
    Most(NonZeroU32),
}

/// Format of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// Lines for people.
    Text,
    /// One JSON object a line.
    Json,
}

/// A setting with a fixed set of values.
pub(super) trait Words: Copy + PartialEq + 'static {
    /// Every value with its word.
    const WORDS: &'static [(&'static str, Self)];

    /// The word of this value.
    fn word(self) -> String {
        let found = Self::WORDS.iter().find(|(_, value)| *value == self);
        found.expect("every value has a word").0.into()
    }
}

impl Words for PingFormat {
    const WORDS: &'static [(&'static str, PingFormat)] =
        &[("websocket", PingFormat::WebSocket), ("json", PingFormat::Json), ("both", PingFormat::Both)];
}

impl Words for ClientPublish {
    const WORDS: &'static [(&'static str, ClientPublish)] =
        &[("off", ClientPublish::Off), ("channel", ClientPublish::Channel), ("any", ClientPublish::Any)];
}

impl Words for LogFormat {
    const WORDS: &'static [(&'static str, LogFormat)] =
        &[("text", LogFormat::Text), ("json", LogFormat::Json)];
}

impl fmt::Display for AdminAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AdminAddr::Tcp(addr) => addr.fmt(f),
            AdminAddr::Unix(path) => write!(f, "unix:{}", path.display()),
            AdminAddr::Off => f.write_str("off"),
        }
    }
}

impl fmt::Display for Cap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Cap::Auto => f.write_str("auto"),
            Cap::Off => f.write_str("0"),
            Cap::Most(most) => most.fmt(f),
        }
    }
}
