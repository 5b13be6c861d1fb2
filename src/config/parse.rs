//! Parsers of settings' values. An error says what is wrong with the text and what would be right.

use std::net::{IpAddr, SocketAddr};
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use tracing_subscriber::filter::{LevelFilter, Targets};

use super::units::{parse_duration, parse_size, show_duration};
use super::values::{AdminAddr, Cap, Words};
use crate::protocol::closest::advice;
use crate::protocol::event::ChannelName;
use crate::protocol::pattern::ChannelPattern;

/// Longest `--redis-prefix`, in bytes: it is part of every key.
const PREFIX_MAX: usize = 64;
/// More shards than any machine has cores.
const SHARDS_MAX: u32 = 1024;
/// Longest `--drain-timeout` and `--drain-delay`. systemd gets both in microseconds that fit 32
/// bits: 71 minutes.
const DRAIN_MAX: Duration = Duration::from_secs(1800);
const _: () = assert!(2 * DRAIN_MAX.as_micros() + 600_000_000 < u32::MAX as u128);
/// Longest path of a unix socket (`sun_path` of unix(7) without its final NUL).
const UNIX_PATH_MAX: usize = 107;

/// Values separated by commas.
pub fn list<T>(text: &str, parse: impl Fn(&str) -> Result<T, String>) -> Result<Vec<T>, String> {
    text.split(',').map(|item| parse(item.trim())).collect()
}

/// A list that may be empty.
pub fn optional_list<T>(text: &str, parse: impl Fn(&str) -> Result<T, String>) -> Result<Vec<T>, String> {
    if text.is_empty() { Ok(Vec::new()) } else { list(text, parse) }
}

/// A value that may be missing.
pub fn optional<T>(text: &str, parse: impl Fn(&str) -> Result<T, String>) -> Result<Option<T>, String> {
    if text.is_empty() { Ok(None) } else { parse(text).map(Some) }
}

/// A value, or `auto`.
pub fn or_auto<T>(text: &str, parse: impl Fn(&str) -> Result<T, String>) -> Result<Option<T>, String> {
    if text == "auto" { Ok(None) } else { parse(text).map(Some).map_err(|problem| problem + ", nor auto") }
}

/// One of a setting's words.
pub fn word<T: Words>(text: &str) -> Result<T, String> {
    let found = T::WORDS.iter().find(|(word, _)| *word == text).map(|(_, value)| *value);
    found.ok_or_else(|| {
        let words: Vec<_> = T::WORDS.iter().map(|(word, _)| *word).collect();
        format!("{text:?} is none of {}", words.join(", "))
    })
}

pub fn switch(text: &str) -> Result<bool, String> {
    match text {
        "true" | "1" => Ok(true),
        "false" | "0" => Ok(false),
        _ => Err(format!("{text:?} is neither true nor false")),
    }
}

pub fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| {
        format!("{text:?} is not an IP address and port, such as 127.0.0.1:8080, 0.0.0.0:8080 or [::]:8080")
    })
}

pub fn admin(text: &str) -> Result<AdminAddr, String> {
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

pub fn path(text: &str) -> Result<PathBuf, String> {
    if text.is_empty() || text.contains('\0') {
        return Err(format!("{text:?} is not a path"));
    }
    Ok(text.into())
}

pub fn redis_prefix(text: &str) -> Result<String, String> {
    let is_wrong = |c: char| c.is_whitespace() || c.is_control() || matches!(c, '{' | '}');
    if text.is_empty() || text.len() > PREFIX_MAX || text.contains(is_wrong) {
        return Err(format!(
            "must have 1 to {PREFIX_MAX} bytes without blanks, control characters and braces"
        ));
    }
    Ok(text.into())
}

pub fn channel(text: &str) -> Result<ChannelName, String> {
    let rule = ChannelName::RULE;
    ChannelName::parse(text).ok_or_else(|| format!("{text:?} is not a channel name: {rule}, or none"))
}

pub fn channel_pattern(text: &str) -> Result<ChannelPattern, String> {
    let rule = ChannelName::RULE;
    ChannelPattern::parse(text).ok_or_else(|| {
        format!("{text:?} is neither a channel name ({rule}) nor a prefix of one with * at its end")
    })
}

/// A network, or one address. IPv4 mapped into IPv6 becomes IPv4.
pub fn network(text: &str) -> Result<IpNet, String> {
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

pub fn cap(text: &str) -> Result<Cap, String> {
    if text == "auto" {
        return Ok(Cap::Auto);
    }
    let most = text
        .parse()
        .map_err(|_| format!("{text:?} is neither a number of connections, 0 for no limit, nor auto"))?;
    Ok(NonZeroU32::new(most).map_or(Cap::Off, Cap::Most))
}

pub fn positive_duration(text: &str) -> Result<Duration, String> {
    match parse_duration(text)? {
        Duration::ZERO => Err("must be more than 0".into()),
        duration => Ok(duration),
    }
}

pub fn drain(text: &str) -> Result<Duration, String> {
    match parse_duration(text)? {
        duration if duration <= DRAIN_MAX => Ok(duration),
        _ => Err(format!("must be at most {}", show_duration(DRAIN_MAX))),
    }
}

pub fn memory(text: &str) -> Result<usize, String> {
    usize::try_from(parse_size(text)?).map_err(|_| format!("{text:?} is more than this machine can address"))
}

pub fn count(text: &str, min: u64, max: u64) -> Result<u64, String> {
    let in_range = text.parse().ok().filter(|count| (min..=max).contains(count));
    in_range.ok_or_else(|| format!("{text:?} is not a whole number between {min} and {max}"))
}

pub fn positive_count(text: &str, max: u32) -> Result<NonZeroU32, String> {
    let count = count(text, 1, max.into())?;
    Ok(NonZeroU32::new(count as u32).expect("a count between 1 and a u32"))
}

/// `auto` is the number of cores, or 1 if the system doesn't report it.
pub fn shards(text: &str) -> Result<NonZeroUsize, String> {
    let count = or_auto(text, |text| count(text, 1, SHARDS_MAX.into()))?;
    let cores = || std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
    Ok(count.and_then(|count| NonZeroUsize::new(count as usize)).unwrap_or_else(cores))
}

/// A list of levels and `target=level`. A target without a level, which tracing takes for
/// "everything of it", is an error: it is always a mistyped level.
pub fn log(text: &str) -> Result<String, String> {
    let levels = "off, error, warn, info, debug, trace";
    for directive in text.split(',') {
        let level = directive.rsplit('=').next().unwrap_or_default();
        if level.is_empty() || level.parse::<LevelFilter>().is_err() {
            let advice = advice(level, levels.split(", ")).unwrap_or(format!("one of {levels}"));
            return Err(format!("{level:?} is not a level: {advice}"));
        }
    }
    match text.parse::<Targets>() {
        Ok(_) => Ok(text.into()),
        Err(error) => Err(format!("{text:?} is not a log filter: {error}")),
    }
}
