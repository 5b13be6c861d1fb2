//! Settings: flags and `FANFARE_*` environment variables, every error at once.

use std::ffi::OsString;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use tracing_subscriber::filter::{LevelFilter, Targets};

use crate::http::origin::OriginRule;
use crate::limits::rate::{BYTE_RATE, BYTE_RATE_MIN, MESSAGE_PART, RATE_MAX};
use crate::metrics::open_file_limit;
use crate::protocol::event::ChannelName;

pub mod cgroup;
mod files;
mod input;
mod memory;
mod redis_url;
mod table;
mod units;

pub use files::rejection_slots;
pub use memory::{CONNECTION_IN_KERNEL, CONNECTION_IN_PROCESS, Memory, memory_held};
pub use redis_url::RedisUrl;

use input::Input;
pub use units::parse_duration;
use units::parse_size;
pub(crate) use units::{show_duration, show_size};

/// Longest `--max-message-size`. A frame is copied a few times on its way; more belongs into a store, not a message.
pub const MESSAGE_MAX: u64 = 16 << 20;
/// Least `--history`: what comes in while a client reconnects through a failover must fit.
pub const HISTORY_MIN: u64 = 1000;
/// Longest `--redis-prefix`, in bytes: it is part of every key.
const PREFIX_MAX: usize = 64;
/// More shards than any machine has cores.
const SHARDS_MAX: usize = 1024;
/// Longest `--drain-timeout` and `--drain-delay`. systemd is told of both in microseconds that fit 32 bits: 71 minutes.
const DRAIN_MAX: Duration = Duration::from_secs(1800);
const _: () = assert!(2 * DRAIN_MAX.as_micros() + 600_000_000 < u32::MAX as u128);
/// Longest path of a unix socket (`sun_path` of unix(7), less its final NUL).
const UNIX_PATH_MAX: usize = 107;

/// Everything that can be set, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Public addresses, for clients.
    pub listen: Vec<SocketAddr>,
    /// Where publish, metrics and stats are served.
    pub admin: AdminAddr,
    /// Anyone may come in, also from other machines.
    pub allow_anonymous: bool,
    /// Files with the keys that clients' tokens are checked with; none: no token is asked for.
    pub jwt_key: Vec<PathBuf>,
    /// The file with the key of the admin listener.
    pub admin_key: Option<PathBuf>,
    /// What clients may publish.
    pub client_publish: ClientPublish,
    /// Pages that may connect; none named: those of the host itself.
    pub allow_origin: Vec<OriginRule>,
    /// Peers that may name the clients they come for.
    pub trusted_proxy: Vec<IpNet>,
    /// `None`: the local bus.
    pub redis: Option<RedisUrl>,
    /// Begins every key and Redis channel.
    pub redis_prefix: String,
    /// The operator's word that this Redis keeps every acknowledged write.
    pub redis_durable: bool,
    /// Channels that are also plain Redis channels of the same name.
    pub pubsub_channels: Vec<ChannelName>,
    /// `--max-connections`; `None`: as many as fit. See [`Settings::most_connections`].
    pub max_connections: Option<NonZeroU32>,
    /// Connections of one client address.
    pub max_connections_per_ip: Cap,
    /// Connections of one user.
    pub max_connections_per_user: Cap,
    /// Channels this node follows at once.
    pub max_channels: NonZeroUsize,
    /// Shard threads.
    pub shards: NonZeroUsize,
    /// Events of history the bus keeps for each channel.
    pub history: u64,
    /// Bytes of history the local bus keeps for each channel.
    pub history_bytes: usize,
    /// How long history outlives a channel's last event.
    pub history_ttl: Duration,
    /// `--buffer-memory` in bytes; `None`: a part of memory. See [`Settings::buffer_memory`].
    pub buffer_memory: Option<usize>,
    /// Time between two heartbeats of a connection.
    pub ping_interval: Duration,
    /// Silence after a heartbeat that ends the connection.
    pub ping_timeout: Duration,
    /// What a heartbeat is.
    pub ping_format: PingFormat,
    /// How long a stop may take: closes are spread over it.
    pub drain_timeout: Duration,
    /// Before that, how long clients are still taken while `/readyz` says that the node is stopping.
    pub drain_delay: Duration,
    /// Longest message a client may send, in bytes.
    pub max_message_size: usize,
    /// Messages a second that a connection may send; 0: as many as it likes.
    pub max_message_rate: u32,
    /// Bytes a second that a connection may send; 0: no limit, `None`: what suits `max_message_size`.
    pub max_byte_rate: Option<u64>,
    /// How long a publish may wait for the bus.
    pub publish_timeout: Duration,
    /// Log filter, in tracing's directive syntax.
    pub log: String,
    /// How log lines look.
    pub log_format: LogFormat,
    /// This process's limit on open files, if it can be read. No setting, but read together with them.
    pub open_files: Option<u32>,
    /// Available memory. No setting either.
    pub memory: Memory,
}

/// Where the admin listener is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AdminAddr {
    /// A TCP address.
    Tcp(SocketAddr),
    /// A unix socket's path.
    Unix(PathBuf),
    /// There is none.
    Off,
}

/// What a heartbeat is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PingFormat {
    /// A WebSocket ping (RFC 6455 section 5.5.2).
    WebSocket,
    /// A `{"type":"ping"}` frame.
    Json,
    /// Both.
    Both,
}

/// What clients may publish. A token can only narrow it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientPublish {
    /// Nothing: they only listen.
    Off,
    /// To their own channel, for everybody in it.
    Channel,
    /// The same, and to one user by name.
    Any,
}

/// A cap with a default that depends on more than itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cap {
    /// The default.
    Auto,
    /// There is none.
    Off,
    /// This many.
    Most(NonZeroU32),
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

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
    /// Where it was given: the flag or the variable.
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
pub fn report(errors: &[SettingError]) -> String {
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
    pub fn from(
        args: impl IntoIterator<Item = OsString>,
        env: impl IntoIterator<Item = (OsString, OsString)>,
    ) -> Result<Action, Vec<SettingError>> {
        let mut input = Input::read(args, env);
        if input.help {
            return Ok(Action::Help(table::help()));
        }
        if input.version {
            return Ok(Action::Version(concat!("fanfare ", env!("CARGO_PKG_VERSION"), "\n").into()));
        }
        let settings = Settings::read(&mut input);
        settings.check(&mut input);
        match (input.errors.is_empty(), input.check) {
            (false, _) => Err(input.errors),
            (true, true) => Ok(Action::Check(settings)),
            (true, false) => Ok(Action::Run(settings)),
        }
    }

    /// Every setting's own value.
    fn read(input: &mut Input) -> Settings {
        Settings {
            listen: input.get("listen", |text| parse_list(text, parse_address)),
            admin: input.get("admin", parse_admin),
            allow_anonymous: input.get("allow-anonymous", parse_switch),
            jwt_key: input.get("jwt-key", |text| parse_some(text, parse_path)),
            admin_key: input.get("admin-key", |text| match text {
                "" => Ok(None),
                path => parse_path(path).map(Some),
            }),
            client_publish: input.get("client-publish", |text| match text {
                "off" => Ok(ClientPublish::Off),
                "channel" => Ok(ClientPublish::Channel),
                "any" => Ok(ClientPublish::Any),
                _ => Err(format!("{text:?} is none of off, own, any")),
            }),
            allow_origin: input.get("allow-origin", |text| parse_some(text, OriginRule::parse)),
            trusted_proxy: input.get("trusted-proxy", |text| parse_some(text, parse_network)),
            redis: input.get("redis", |text| match text {
                "" => Ok(None),
                url => RedisUrl::parse(url).map(Some),
            }),
            redis_prefix: input.get("redis-prefix", parse_prefix),
            redis_durable: input.get("redis-durable", parse_switch),
            pubsub_channels: input.get("pubsub-channels", |text| match text {
                "none" => Ok(Vec::new()),
                names => parse_list(names, parse_channel),
            }),
            history: input.get("history", |text| parse_count(text, HISTORY_MIN, u64::from(u32::MAX))),
            history_bytes: input.get("history-bytes", parse_memory),
            history_ttl: input.get("history-ttl", parse_positive_duration),
            publish_timeout: input.get("publish-timeout", parse_positive_duration),
            max_connections: input.get("max-connections", |text| match text {
                "auto" => Ok(None),
                count => {
                    let count = parse_count(count, 1, u64::from(u32::MAX)).map_err(nor_auto)?;
                    Ok(NonZeroU32::new(count as u32))
                }
            }),
            max_connections_per_ip: input.get("max-connections-per-ip", parse_cap),
            max_connections_per_user: input.get("max-connections-per-user", parse_cap),
            max_channels: input.get("max-channels", |text| parse_nonzero(text, u32::MAX as usize)),
            max_message_size: input.get("max-message-size", |text| match parse_size(text)? {
                size @ 1..=MESSAGE_MAX => Ok(size as usize),
                _ => Err(format!("must be between 1 byte and {}", show_size(MESSAGE_MAX))),
            }),
            max_message_rate: input.get("max-message-rate", |text| {
                parse_count(text, 0, u64::from(RATE_MAX)).map(|rate| rate as u32)
            }),
            max_byte_rate: input.get("max-byte-rate", |text| match text {
                "auto" => Ok(None),
                size => parse_size(size).map(Some).map_err(nor_auto),
            }),
            ping_interval: input.get("ping-interval", parse_positive_duration),
            ping_timeout: input.get("ping-timeout", parse_positive_duration),
            ping_format: input.get("ping-format", |text| match text {
                "websocket" => Ok(PingFormat::WebSocket),
                "json" => Ok(PingFormat::Json),
                "both" => Ok(PingFormat::Both),
                _ => Err(format!("{text:?} is none of ping, json, both")),
            }),
            drain_timeout: input.get("drain-timeout", parse_drain),
            drain_delay: input.get("drain-delay", parse_drain),
            shards: input.get("shards", |text| match text {
                // One shard when the system doesn't tell how many cores there are.
                "auto" => Ok(std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN)),
                count => parse_nonzero(count, SHARDS_MAX).map_err(nor_auto),
            }),
            buffer_memory: input.get("buffer-memory", |text| match text {
                "auto" => Ok(None),
                size => parse_memory(size).map(Some).map_err(nor_auto),
            }),
            log: input.get("log", parse_log),
            log_format: input.get("log-format", |text| match text {
                "text" => Ok(LogFormat::Text),
                "json" => Ok(LogFormat::Json),
                _ => Err(format!("{text:?} is neither text nor json")),
            }),
            open_files: open_file_limit().and_then(|limit| u32::try_from(limit).ok()),
            memory: Memory::read(),
        }
    }

    /// Bytes a second that a connection may send; 0: no limit.
    pub fn byte_rate(&self) -> u64 {
        self.max_byte_rate.unwrap_or_else(|| BYTE_RATE.max(self.max_message_size as u64))
    }

    /// What the settings must be to each other.
    fn check(&self, input: &mut Input) {
        for (at, addr) in self.listen.iter().enumerate() {
            if addr.port() != 0 && self.listen[..at].contains(addr) {
                input.conflict("listen", format!("{addr} is given twice"));
            }
        }
        if let Some(problem) = self.listen.iter().find_map(|addr| self.public_problem(*addr)) {
            input.conflict("listen", problem);
        }
        if self.admin == AdminAddr::Off && self.admin_key.is_some() {
            input.conflict("admin-key", "is the key to nothing: --admin is off".into());
        }
        if let AdminAddr::Tcp(addr) = self.admin {
            if let Some(problem) = self.admin_problem(addr) {
                input.conflict("admin", problem);
            }
            if addr.port() != 0 && self.listen.contains(&addr) {
                input.conflict("admin", format!("{addr} is taken by --listen"));
            }
        }
        if self.redis_durable && self.redis.is_none() {
            input.conflict("redis-durable", "says something about a Redis, but --redis names none".into());
        }
        let own = format!("{}:", self.redis_prefix);
        if let Some(channel) = self.pubsub_channels.iter().find(|channel| channel.as_str().starts_with(&own))
        {
            let problem = format!("{channel} is among the node's own Redis channels, which begin with {own}");
            input.conflict("pubsub-channels", problem);
        }
        if self.pubsub_channels.len() > self.max_channels.get() {
            input.conflict("max-channels", "is fewer than --pubsub-channels names".into());
        }
        for (name, size) in [("buffer-memory", self.buffer_memory()), ("history-bytes", self.history_bytes)] {
            if size < self.max_message_size {
                let problem = format!(
                    "must be at least --max-message-size ({})",
                    show_size(self.max_message_size as u64)
                );
                input.conflict(name, problem);
            }
        }
        if let Some(problem) = self.byte_rate_problem() {
            input.conflict("max-byte-rate", problem);
        }
    }

    /// Why the longest message would never be accepted at the byte rate.
    fn byte_rate_problem(&self) -> Option<String> {
        let least = BYTE_RATE_MIN.max((self.max_message_size as u64).div_ceil(MESSAGE_PART));
        let too_low = (1..least).contains(&self.byte_rate());
        too_low.then(|| {
            let message = show_size(self.max_message_size as u64);
            format!("must be at least {}, or 0, with --max-message-size {message}", show_size(least))
        })
    }

    /// Why clients may not be taken at this address.
    pub fn public_problem(&self, addr: SocketAddr) -> Option<String> {
        let remedy = "give --jwt-key FILE, or say with --allow-anonymous that anyone may come in";
        let is_open = is_reachable(&addr) && self.jwt_key.is_empty() && !self.allow_anonymous;
        is_open.then(|| format!("{addr} is open to others and asks for no token: {remedy}"))
    }

    /// Why the admin listener may not be at this address.
    pub fn admin_problem(&self, addr: SocketAddr) -> Option<String> {
        let remedy = "give --admin-key FILE, or use a loopback address, unix:PATH or off";
        let is_open = is_reachable(&addr) && self.admin_key.is_none();
        is_open.then(|| format!("{addr} is open to others and has no key: {remedy}"))
    }

    /// The log filter, parsed.
    pub fn log_targets(&self) -> Targets {
        self.log.parse().expect("the filter was parsed when the settings were read")
    }

    /// Each setting's name and value, as one would write it; secrets are hidden.
    fn shown(&self) -> [(&'static str, String); table::TABLE.len()] {
        fn list<T: ToString>(values: &[T]) -> String {
            values.iter().map(T::to_string).collect::<Vec<_>>().join(",")
        }
        [
            ("listen", list(&self.listen)),
            ("admin", self.admin.to_string()),
            ("allow-anonymous", self.allow_anonymous.to_string()),
            (
                "jwt-key",
                self.jwt_key.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(","),
            ),
            ("admin-key", self.admin_key.as_ref().map_or(String::new(), |path| path.display().to_string())),
            (
                "client-publish",
                match self.client_publish {
                    ClientPublish::Off => "off".into(),
                    ClientPublish::Channel => "channel".into(),
                    ClientPublish::Any => "any".into(),
                },
            ),
            ("allow-origin", list(&self.allow_origin)),
            ("trusted-proxy", list(&self.trusted_proxy)),
            ("redis", self.redis.as_ref().map_or(String::new(), RedisUrl::to_string)),
            ("redis-prefix", self.redis_prefix.clone()),
            ("redis-durable", self.redis_durable.to_string()),
            (
                "pubsub-channels",
                match self.pubsub_channels.as_slice() {
                    [] => "none".into(),
                    names => list(names),
                },
            ),
            ("history", self.history.to_string()),
            ("history-bytes", show_size(self.history_bytes as u64)),
            ("history-ttl", show_duration(self.history_ttl)),
            ("publish-timeout", show_duration(self.publish_timeout)),
            ("max-connections", self.most_connections().to_string()),
            ("max-connections-per-ip", self.max_connections_per_ip.to_string()),
            ("max-connections-per-user", self.max_connections_per_user.to_string()),
            ("max-channels", self.max_channels.to_string()),
            ("max-message-size", show_size(self.max_message_size as u64)),
            ("max-message-rate", self.max_message_rate.to_string()),
            ("max-byte-rate", show_size(self.byte_rate())),
            ("ping-interval", show_duration(self.ping_interval)),
            ("ping-timeout", show_duration(self.ping_timeout)),
            (
                "ping-format",
                match self.ping_format {
                    PingFormat::WebSocket => "websocket".into(),
                    PingFormat::Json => "json".into(),
                    PingFormat::Both => "both".into(),
                },
            ),
            ("drain-timeout", show_duration(self.drain_timeout)),
            ("drain-delay", show_duration(self.drain_delay)),
            ("shards", self.shards.to_string()),
            ("buffer-memory", show_size(self.buffer_memory() as u64)),
            ("log", self.log.clone()),
            (
                "log-format",
                match self.log_format {
                    LogFormat::Text => "text".into(),
                    LogFormat::Json => "json".into(),
                },
            ),
        ]
    }
}

/// One `FANFARE_NAME=value` a line, secrets hidden: what `--check` prints, and an environment file.
impl fmt::Display for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, value) in self.shown() {
            writeln!(f, "{}={value}", table::variable(name))?;
        }
        Ok(())
    }
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

/// Values by comma; a wrong one is named.
fn parse_list<T>(text: &str, parse: impl Fn(&str) -> Result<T, String>) -> Result<Vec<T>, String> {
    text.split(',').map(|item| parse(item.trim())).collect()
}

/// The same where there may be none.
fn parse_some<T>(text: &str, parse: impl Fn(&str) -> Result<T, String>) -> Result<Vec<T>, String> {
    if text.is_empty() { Ok(Vec::new()) } else { parse_list(text, parse) }
}

fn parse_address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| {
        format!("{text:?} is not an IP address and port, such as 127.0.0.1:8080, 0.0.0.0:8080 or [::]:8080")
    })
}

fn parse_admin(text: &str) -> Result<AdminAddr, String> {
    match text.strip_prefix("unix:") {
        Some(path) if path.is_empty() || path.contains('\0') => Err("unix: needs a path".into()),
        Some(path) if path.len() > UNIX_PATH_MAX => {
            Err(format!("the path of a unix socket has at most {UNIX_PATH_MAX} bytes"))
        }
        Some(path) => Ok(AdminAddr::Unix(path.into())),
        None if text == "off" => Ok(AdminAddr::Off),
        None => match text.parse() {
            Ok(addr) => Ok(AdminAddr::Tcp(addr)),
            Err(_) => Err(format!("{text:?} is none of 127.0.0.1:9080, unix:/run/fanfare/admin.sock, off")),
        },
    }
}

/// Whether others than programs on this machine can reach it.
fn is_reachable(addr: &SocketAddr) -> bool {
    !addr.ip().to_canonical().is_loopback()
}

fn parse_path(text: &str) -> Result<PathBuf, String> {
    if text.is_empty() || text.contains('\0') {
        return Err(format!("{text:?} is not a path"));
    }
    Ok(text.into())
}

fn parse_prefix(text: &str) -> Result<String, String> {
    let strange = |c: char| c.is_whitespace() || c.is_control() || matches!(c, '{' | '}');
    if text.is_empty() || text.len() > PREFIX_MAX || text.contains(strange) {
        return Err(format!("must have 1 to {PREFIX_MAX} bytes, no blanks, control characters or braces"));
    }
    Ok(text.into())
}

fn parse_channel(text: &str) -> Result<ChannelName, String> {
    let rule = "1 to 128 letters, digits, _ . : and -";
    ChannelName::parse(text).ok_or_else(|| format!("{text:?} is not a channel name: {rule}, or none"))
}

/// A network, or one address; IPv4 mapped into IPv6 is IPv4.
fn parse_network(text: &str) -> Result<IpNet, String> {
    let wrong = || format!("{text:?} is no address or network, such as 10.0.0.7, 10.0.0.0/8 or fd00::/8");
    let net = match text.parse::<IpNet>() {
        Ok(net) => net,
        Err(_) => IpNet::from(text.parse::<IpAddr>().map_err(|_| wrong())?),
    };
    if net.addr() != net.network() {
        return Err(format!("{text:?} has bits behind its prefix: did you mean {}?", net.trunc()));
    }
    match (net.addr().to_canonical(), net.prefix_len()) {
        (ip @ IpAddr::V4(_), prefix) if net.addr().is_ipv6() && prefix >= 96 => {
            IpNet::new(ip, prefix - 96).map_err(|_| wrong())
        }
        _ => Ok(net),
    }
}

fn parse_cap(text: &str) -> Result<Cap, String> {
    if text == "auto" {
        return Ok(Cap::Auto);
    }
    let most = text
        .parse()
        .map_err(|_| format!("{text:?} is neither a number of connections, 0 for no cap, nor auto"))?;
    Ok(NonZeroU32::new(most).map_or(Cap::Off, Cap::Most))
}

fn parse_switch(text: &str) -> Result<bool, String> {
    match text {
        "true" | "1" => Ok(true),
        "false" | "0" => Ok(false),
        _ => Err(format!("{text:?} is neither true nor false")),
    }
}

fn parse_positive_duration(text: &str) -> Result<Duration, String> {
    match parse_duration(text)? {
        Duration::ZERO => Err("must be more than nothing".into()),
        duration => Ok(duration),
    }
}

fn parse_drain(text: &str) -> Result<Duration, String> {
    match parse_duration(text)? {
        duration if duration <= DRAIN_MAX => Ok(duration),
        _ => Err(format!("must be at most {}", show_duration(DRAIN_MAX))),
    }
}

fn parse_memory(text: &str) -> Result<usize, String> {
    usize::try_from(parse_size(text)?).map_err(|_| format!("{text:?} is more than this machine can address"))
}

fn parse_count(text: &str, least: u64, most: u64) -> Result<u64, String> {
    let in_range = text.parse().ok().filter(|count| (least..=most).contains(count));
    in_range.ok_or_else(|| format!("{text:?} is not a whole number between {least} and {most}"))
}

/// Where the system can choose, too.
fn nor_auto(problem: String) -> String {
    problem + ", nor auto"
}

fn parse_nonzero(text: &str, most: usize) -> Result<NonZeroUsize, String> {
    let count = parse_count(text, 1, most as u64)?;
    Ok(NonZeroUsize::new(count as usize).expect("at least 1 was asked for"))
}

/// A list of levels and `target=level`. A bare target, which tracing takes for "everything of it", is refused: it
/// is always a mistyped level.
fn parse_log(text: &str) -> Result<String, String> {
    let levels = "off, error, warn, info, debug, trace";
    for directive in text.split(',') {
        let level = directive.rsplit('=').next().unwrap_or_default();
        if level.is_empty() || level.parse::<LevelFilter>().is_err() {
            let near = input::closest(level, levels.split(", ").map(String::from));
            let hint = near.map_or(format!("one of {levels}"), |near| format!("did you mean {near}?"));
            return Err(format!("{level:?} is not a level: {hint}"));
        }
    }
    match text.parse::<Targets>() {
        Ok(_) => Ok(text.into()),
        Err(error) => Err(format!("{text:?} is not a log filter: {error}")),
    }
}

#[cfg(test)]
mod tests;
