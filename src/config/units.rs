//! Durations and sizes as text.

use std::time::Duration;

/// Longest duration. No setting needs more, and adding it to the clock can't overflow.
const LONGEST: Duration = Duration::from_secs(3650 * 86400);

const TIMES: [(&str, u64); 5] = [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)];

/// Binary units first: a size is shown in the largest of these that divides it.
const SIZES: [(&str, u64); 7] = [
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("KB", 1000),
    ("B", 1),
];

/// Parses a whole number and a unit: `25s`, `500ms`, `5m`, `24h`, `7d`.
///
/// # Errors
/// What is wrong with the text.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is not a duration: a whole number and ms, s, m, h or d, such as 25s");
    let (number, unit) = split(text).ok_or_else(wrong)?;
    let (_, millis) = TIMES.iter().find(|(name, _)| *name == unit).ok_or_else(wrong)?;
    let duration = number.checked_mul(*millis).map(Duration::from_millis);
    duration
        .filter(|duration| *duration <= LONGEST)
        .ok_or_else(|| format!("{text:?} is too long: at most 3650d"))
}

/// Formats a duration in the largest unit up to hours that keeps it whole. Parts of a millisecond
/// are cut off.
pub fn show_duration(duration: Duration) -> String {
    let millis = duration.as_millis() as u64;
    let (unit, size) = largest(&TIMES[1..], millis).unwrap_or(("s", 1000));
    format!("{}{unit}", millis / size)
}

/// Formats a number of seconds for people, in one unit up to days.
pub fn show_rounded(seconds: f64) -> String {
    match seconds {
        ..120.0 => format!("{seconds:.0} s"),
        120.0..7200.0 => format!("{:.0} min", seconds / 60.0),
        7200.0..172_800.0 => format!("{:.0} h", seconds / 3600.0),
        _ => format!("{:.0} days", seconds / 86_400.0),
    }
}

/// Parses a number of bytes: `65536`, `64KiB`, `64MiB`, and decimal `64KB`. Case is ignored.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is not a size: a whole number and B, KiB, MiB, GiB, KB, MB or GB");
    let (number, unit) = split(text).ok_or_else(wrong)?;
    let known = SIZES.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit)).map(|(_, size)| *size);
    let size = if unit.is_empty() { 1 } else { known.ok_or_else(wrong)? };
    number.checked_mul(size).ok_or_else(|| format!("{text:?} is too large"))
}

/// Formats a number of bytes in the largest binary unit that keeps it whole.
pub fn show_size(bytes: u64) -> String {
    match largest(&SIZES[..3], bytes) {
        Some((unit, size)) => format!("{}{unit}", bytes / size),
        None => bytes.to_string(),
    }
}

fn largest<'a>(units: &[(&'a str, u64)], amount: u64) -> Option<(&'a str, u64)> {
    units.iter().find(|(_, size)| amount > 0 && amount.is_multiple_of(*size)).copied()
}

fn split(text: &str) -> Option<(u64, &str)> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    Some((text[..digits].parse().ok()?, text[digits..].trim_start()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_durations() {
        for (text, millis) in [
            ("25s", 25_000),
            ("500ms", 500),
            ("24h", 86_400_000),
            ("5m", 300_000),
            ("1d", 86_400_000),
            ("0s", 0),
            ("5 s", 5000),
        ] {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        for wrong in
            ["", "25", "s", "-1s", "+1s", "1.5s", "5S", "5sec", "1h30m", "3651d", "99999999999999999999s"]
        {
            assert!(parse_duration(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn reads_sizes() {
        for (text, bytes) in [
            ("65536", 65536),
            ("64KiB", 65536),
            ("64kib", 65536),
            ("64 MiB", 64 << 20),
            ("64KB", 64_000),
            ("1MB", 1_000_000),
            ("2GiB", 2 << 30),
            ("7B", 7),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for wrong in ["", "KiB", "64K", "1.5MiB", "-1", "1e6", "64KiB/s", "99999999999GiB"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn formatted_text_is_parsed_back(millis in 0..LONGEST.as_millis() as u64, bytes: u64, shift in 0..40u32) {
            for millis in [millis, millis / 1000 * 1000, millis / 3_600_000 * 3_600_000] {
                let duration = Duration::from_millis(millis);
                prop_assert_eq!(parse_duration(&show_duration(duration)), Ok(duration));
            }
            let bytes = bytes >> shift << shift;
            prop_assert_eq!(parse_size(&show_size(bytes)), Ok(bytes));
        }

        #[test]
        fn nothing_panics(text: String) {
            let _ = (parse_duration(&text), parse_size(&text));
        }
    }
}
