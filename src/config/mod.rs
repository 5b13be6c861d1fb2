//! Settings: flags and `FANFARE_*` environment variables, every error at once.

use std::ffi::OsString;
use std::fmt;

use tracing_subscriber::filter::Targets;

pub mod args;
pub mod cgroup;
mod check;
mod environment;
mod memory;
mod open_files;
mod parse;
mod redis_url;
mod rows;
mod settings;
mod units;
mod values;
mod wrap;

use args::Args;
use environment::Input;
pub use memory::{CHANNEL, CONNECTION_IN_KERNEL, CONNECTION_IN_PROCESS, Memory, memory_held};
pub use open_files::{open_file_limit, parse_open_file_limit, rejection_slots};
pub use redis_url::RedisUrl;
pub use rows::flags;
pub use settings::Settings;
pub use units::{parse_duration, show_duration, show_rounded, show_size};
pub use values::{AdminAddr, Cap, ClientPublish, LogFormat, PingFormat};
pub use wrap::wrap;

use crate::protocol::event::ChannelName;

/// Longest `--max-message-size`. A frame is copied a few times; larger data belongs in a store.
pub const MESSAGE_SIZE_MAX: u64 = 16 << 20;

/// Least `--history`: the events of a failover during which a client reconnects must fit.
pub const HISTORY_MIN: u64 = 1000;

/// Highest `--max-message-rate`. Above it, times between messages are shorter than a turn of a
/// shard.
pub const MESSAGE_RATE_MAX: u32 = 100_000;

/// Highest `--max-subscriptions`: a frame that subscribes to all of them compares each with the
/// others.
pub const SUBSCRIPTIONS_MAX: u64 = 1000;

/// Highest `--presence-list`: a list of that many users has up to 1.3 MB.
pub const PRESENCE_LIST_MAX: u64 = 10_000;

/// Default of `--max-byte-rate` in bytes a second, unless `--max-message-size` is more: a hundred
/// messages of 10 KiB, so that an address fills at most a tenth of a link of 1 Gbit/s to Redis.
const BYTE_RATE: u64 = 1 << 20;

/// Lowest byte rate, in bytes a second.
pub const BYTE_RATE_MIN: u64 = 64 * 1024;

/// The byte rate is at least this part of `--max-message-size`.
pub const MESSAGE_PART: u64 = 4;

/// What the command line asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Serve.
    Run(Settings),
    /// Print these settings and exit.
    Check(Settings),
    /// Print this text and exit.
    Help(String),
    /// Print this text and exit.
    Version(String),
}

/// One wrong setting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SettingError {
    /// The flag or the variable.
    pub setting: String,
    /// What is wrong and what would be right.
    pub problem: String,
}

impl fmt::Display for SettingError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.setting, self.problem)
    }
}

/// All errors as one text for standard error.
pub fn error_report(errors: &[SettingError]) -> String {
    let mut text = match errors.len() {
        1 => "fanfare: a setting is wrong; nothing was started\n".to_owned(),
        many => format!("fanfare: {many} settings are wrong; nothing was started\n"),
    };
    for error in errors {
        text.push_str(&format!("  {error}\n"));
    }
    text.push_str("fanfare --help explains every setting\n");
    text
}

impl Settings {
    /// Reads arguments (without the program's name) and the environment.
    ///
    /// # Errors
    /// Every wrong setting.
    pub fn from(
        args: impl IntoIterator<Item = OsString>,
        env: impl IntoIterator<Item = (OsString, OsString)>,
    ) -> Result<Action, Vec<SettingError>> {
        Settings::from_args(Args::read(args, &flags()), env)
    }

    /// Reads arguments that are split already, and the environment.
    ///
    /// # Errors
    /// Every wrong argument and setting.
    pub fn from_args(
        mut args: Args,
        env: impl IntoIterator<Item = (OsString, OsString)>,
    ) -> Result<Action, Vec<SettingError>> {
        if args.switch("help") {
            return Ok(Action::Help(rows::help()));
        }
        if args.switch("version") {
            return Ok(Action::Version(concat!("fanfare ", env!("CARGO_PKG_VERSION"), "\n").into()));
        }
        let check = args.switch("check");
        let mut input = Input::read(args, env);
        let settings = Settings::read(&mut input);
        settings.check(&mut input);
        match (input.errors.is_empty(), check) {
            (false, _) => Err(input.errors),
            (true, true) => Ok(Action::Check(settings)),
            (true, false) => Ok(Action::Run(settings)),
        }
    }

    /// Bytes a second that a connection may send; 0: no limit.
    pub fn byte_rate(&self) -> u64 {
        self.max_byte_rate.unwrap_or_else(|| BYTE_RATE.max(self.max_message_size as u64))
    }

    /// Whether the users of this channel are tracked.
    pub fn tracks_presence(&self, channel: &ChannelName) -> bool {
        self.presence.iter().any(|pattern| pattern.matches(channel))
    }

    /// Whether messages of clients to this channel go to backends.
    pub fn is_inbox(&self, channel: &ChannelName) -> bool {
        self.inbox.iter().any(|pattern| pattern.matches(channel))
    }

    /// The log filter, parsed.
    pub fn log_targets(&self) -> Targets {
        self.log.parse().expect("the filter was parsed when the settings were read")
    }
}

/// One `FANFARE_NAME=value` a line, secrets hidden: an environment file, which `--check` prints.
impl fmt::Display for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for row in rows::ROWS {
            writeln!(f, "{}={}", row.variable(), (row.show)(self))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
