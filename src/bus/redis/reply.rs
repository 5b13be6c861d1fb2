//! Replies of Redis, parsed.

use bytes::Bytes;
use fred::types::Resp3Frame;

pub fn array(frame: &Resp3Frame) -> Option<&[Resp3Frame]> {
    match frame {
        Resp3Frame::Array { data, .. } => Some(data),
        _ => None,
    }
}

/// A number, unless it is negative.
pub fn integer(frame: &Resp3Frame) -> Option<u64> {
    match frame {
        Resp3Frame::Number { data, .. } => u64::try_from(*data).ok(),
        _ => None,
    }
}

/// A string, not copied.
pub fn bytes(frame: &Resp3Frame) -> Option<Bytes> {
    match frame {
        Resp3Frame::BlobString { data, .. } | Resp3Frame::SimpleString { data, .. } => Some(data.clone()),
        _ => None,
    }
}

pub fn text(frame: &Resp3Frame) -> Option<String> {
    bytes(frame).map(|text| String::from_utf8_lossy(&text).into_owned())
}

/// The strings of an array.
pub fn texts(frame: &Resp3Frame) -> Vec<String> {
    let items = array(frame).unwrap_or_default();
    items.iter().filter_map(text).collect()
}

/// Names and values by turns, which RESP2 sends as an array and RESP3 as a map.
pub fn pairs(frame: &Resp3Frame) -> Vec<String> {
    match frame {
        Resp3Frame::Map { data, .. } => {
            data.iter().flat_map(|(name, value)| [name, value]).filter_map(text).collect()
        }
        other => texts(other),
    }
}

/// A reply of SCAN: the next cursor, and keys.
pub fn scan(frame: &Resp3Frame) -> Option<(String, Vec<String>)> {
    let [cursor, keys] = array(frame)? else { return None };
    Some((text(cursor)?, texts(keys)))
}

/// A field of INFO.
pub fn info_field<'a>(info: &'a str, name: &str) -> Option<&'a str> {
    info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
}

/// A number in INFO; 0 without one.
pub fn info_number(info: &str, name: &str) -> u64 {
    info_field(info, name).and_then(|number| number.parse().ok()).unwrap_or(0)
}
