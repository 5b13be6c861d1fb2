//! The phases of a run, as `--phases` lists them.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::config::parse_duration;

/// One step of a run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum Phase {
    /// All clients connect.
    Connect,
    /// No events.
    Idle(Duration),
    /// Events per second, each due at a fixed time.
    Rate(f64, Duration),
    /// This many events are always in flight.
    Saturate(u32, Duration),
    /// This share of the clients loses its connections, and reconnects at once after a time.
    Storm(f64, Duration),
    /// This share of the clients reads nothing for a time.
    Stall(f64, Duration),
    /// Clients replaced per second.
    Churn(f64, Duration),
    /// All clients leave.
    Leave,
}

const FORMS: &str =
    "connect, idle TIME, rate N TIME, saturate N TIME, storm N% [TIME], stall N% TIME, churn N TIME, leave";

/// Reads a list such as `connect, idle 10s, rate 10/s 20s`.
///
/// # Errors
/// An unknown phase, `connect` elsewhere than at the start, `leave` elsewhere than at the end.
pub fn parse_list(text: &str) -> Result<Vec<Phase>, String> {
    let phases: Vec<Phase> = text.split(',').map(|item| parse(item.trim())).collect::<Result<_, _>>()?;
    let is_connect = |phase: &Phase| *phase == Phase::Connect;
    let is_leave = |phase: &Phase| *phase == Phase::Leave;
    if phases.iter().position(is_connect) != Some(0) || phases[1..].iter().any(is_connect) {
        return Err("must start with connect, and have it once".into());
    }
    match phases.iter().position(is_leave) {
        Some(at) if at + 1 < phases.len() => Err("must end after leave".into()),
        _ => Ok(phases),
    }
}

fn parse(text: &str) -> Result<Phase, String> {
    let words: Vec<&str> = text.split_whitespace().collect();
    let phase = match words[..] {
        ["connect"] => Phase::Connect,
        ["idle", time] => Phase::Idle(parse_duration(time)?),
        ["rate", rate, time] => Phase::Rate(per_second(rate)?, parse_duration(time)?),
        ["saturate", events, time] => match events.parse() {
            Ok(events @ 1..=100_000) => Phase::Saturate(events, parse_duration(time)?),
            _ => return Err(format!("{events:?} is not a number of events from 1 to 100000")),
        },
        ["storm", part] => Phase::Storm(share(part)?, Duration::ZERO),
        ["storm", part, time] => Phase::Storm(share(part)?, parse_duration(time)?),
        ["stall", part, time] => Phase::Stall(share(part)?, parse_duration(time)?),
        ["churn", rate, time] => Phase::Churn(per_second(rate)?, parse_duration(time)?),
        ["leave"] => Phase::Leave,
        _ => return Err(format!("{text:?} is not a phase: use {FORMS}")),
    };
    Ok(phase)
}

/// Reads `10` or `10/s`.
///
/// # Errors
/// Anything but a number from 0.01 to a million.
pub fn per_second(text: &str) -> Result<f64, String> {
    match text.strip_suffix("/s").unwrap_or(text).parse() {
        Ok(rate) if (0.01..=1e6).contains(&rate) => Ok(rate),
        _ => Err(format!("{text:?} is not a number per second, such as 10/s")),
    }
}

fn share(text: &str) -> Result<f64, String> {
    match text.strip_suffix('%').and_then(|percent| percent.parse::<f64>().ok()) {
        Some(percent) if percent > 0.0 && percent <= 100.0 => Ok(percent / 100.0),
        _ => Err(format!("{text:?} is not a share, such as 50%")),
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Phase::Connect => write!(f, "connect"),
            Phase::Idle(time) => write!(f, "idle {time:?}"),
            Phase::Rate(rate, time) => write!(f, "rate {rate}/s {time:?}"),
            Phase::Saturate(events, time) => write!(f, "saturate {events} {time:?}"),
            Phase::Storm(part, Duration::ZERO) => write!(f, "storm {}%", part * 100.0),
            Phase::Storm(part, time) => write!(f, "storm {}% {time:?}", part * 100.0),
            Phase::Stall(part, time) => write!(f, "stall {}% {time:?}", part * 100.0),
            Phase::Churn(rate, time) => write!(f, "churn {rate}/s {time:?}"),
            Phase::Leave => write!(f, "leave"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_it_shows() {
        let text = "connect, idle 10s, rate 10/s 20s, saturate 64 10s, storm 50%, storm 25% 2s, stall 10% 10s, churn 100/s 20s, leave";
        let phases = parse_list(text).unwrap();
        let shown: Vec<String> = phases.iter().map(Phase::to_string).collect();
        assert_eq!(shown.join(", "), text);
        for (bad, problem) in [
            ("idle 1s", "start with connect"),
            ("connect, idle", "is not a phase"),
            ("connect, leave, idle 1s", "end after leave"),
            ("connect, connect", "have it once"),
            ("connect, rate x 1s", "per second"),
            ("connect, storm 50", "share"),
            ("connect, storm 101%", "share"),
            ("connect, saturate 0 1s", "number of events"),
            ("", "is not a phase"),
        ] {
            let error = parse_list(bad).unwrap_err();
            assert!(error.contains(problem), "{bad}: {error}");
        }
    }
}
