//! The client address that a proxy reports: in a PROXY protocol header at the start of a
//! connection, or in `X-Forwarded-For`. The caller decides whether the proxy is trusted.
//!
//! The parser of PROXY headers is our own, since the crates are less strict: proxy-header 0.1
//! accepts `PROXYxTCP4` and a port `+1`; ppp 2.3 accepts that port, too, and fails on a header that
//! arrives byte by byte.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use crate::http::Head;

/// Start of version 1 (haproxy.org, proxy-protocol.txt, section 2.1).
const V1: &[u8] = b"PROXY ";
/// Longest header of version 1 in bytes, with its line end.
const V1_MAX: usize = 107;
/// Start of version 2 (section 2.2).
const V2: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";
/// Bytes before the addresses: signature, version and command, family, length.
const V2_HEAD: usize = 16;
/// Most bytes after them. Addresses take 36 bytes, host names and certificate subjects of TLS some
/// hundreds.
const V2_MAX: usize = 4096;

/// The start of a connection, parsed as a PROXY header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preamble {
    /// Not a PROXY header.
    Absent,
    /// Too few bytes to decide.
    Partial,
    /// A malformed PROXY header.
    Malformed,
    /// A complete PROXY header of `length` bytes.
    Header {
        /// The client address. `None` if the proxy connects for itself, or for a client without an
        /// IP address.
        client: Option<IpAddr>,
        length: usize,
    },
}

/// Whether this is the start of a PROXY header, complete or not, and of nothing else.
pub fn is_preamble(bytes: &[u8]) -> bool {
    bytes.starts_with(V1) || bytes.starts_with(V2)
}

/// Parses the PROXY header at the start of `bytes`, if there is one.
pub fn preamble(bytes: &[u8]) -> Preamble {
    if bytes.starts_with(V1) {
        let line = &bytes[..bytes.len().min(V1_MAX)];
        match line.iter().position(|byte| *byte == b'\n') {
            Some(end) => match std::str::from_utf8(&line[V1.len()..end]).ok().and_then(v1) {
                Some(client) => Preamble::Header { client, length: end + 1 },
                None => Preamble::Malformed,
            },
            None if line.len() == V1_MAX => Preamble::Malformed,
            None => Preamble::Partial,
        }
    } else if bytes.starts_with(V2) {
        let Some(head) = bytes.get(V2.len()..V2_HEAD) else { return Preamble::Partial };
        let length = usize::from(u16::from_be_bytes([head[2], head[3]]));
        if length > V2_MAX {
            return Preamble::Malformed;
        }
        let Some(rest) = bytes.get(V2_HEAD..V2_HEAD + length) else { return Preamble::Partial };
        match v2(head[0], head[1], rest) {
            Some(client) => Preamble::Header { client, length: V2_HEAD + length },
            None => Preamble::Malformed,
        }
    } else if V1.starts_with(bytes) || V2.starts_with(bytes) {
        Preamble::Partial
    } else {
        Preamble::Absent
    }
}

/// `TCP4 source destination port port`, or `UNKNOWN` and anything, then a CR. `None` if it is
/// neither.
fn v1(line: &str) -> Option<Option<IpAddr>> {
    let line = line.strip_suffix('\r').filter(|line| !line.contains('\r'))?;
    fn tcp<T: FromStr + Into<IpAddr>>(fields: [&str; 4]) -> Option<Option<IpAddr>> {
        let [source, destination, from, to] = fields;
        let source: T = source.parse().ok()?;
        destination.parse::<T>().ok()?;
        (is_port(from) && is_port(to)).then(|| Some(source.into()))
    }
    let (family, rest) = line.split_once(' ').unwrap_or((line, ""));
    let fields = || rest.split(' ').collect::<Vec<_>>().try_into().ok();
    match family {
        "UNKNOWN" => Some(None),
        "TCP4" => tcp::<Ipv4Addr>(fields()?),
        "TCP6" => tcp::<Ipv6Addr>(fields()?),
        _ => None,
    }
}

/// Digits without sign or leading zero, up to 65535.
fn is_port(text: &str) -> bool {
    text.parse::<u16>().is_ok_and(|port| port.to_string() == text)
}

/// `rest`: addresses, ports, and optional fields, which are ignored.
fn v2(version_command: u8, family: u8, rest: &[u8]) -> Option<Option<IpAddr>> {
    const LOCAL: u8 = 0x20;
    const PROXY: u8 = 0x21;
    let least = match (version_command, family) {
        (LOCAL, _) => return Some(None), // a health check, for example: the rest is undefined
        (PROXY, 0x00..=0x02) => 0,
        (PROXY, 0x10..=0x12) => 12,
        (PROXY, 0x20..=0x22) => 36,
        (PROXY, 0x30..=0x32) => 216, // paths of unix sockets
        _ => return None,
    };
    let addresses = rest.get(..least)?;
    let ipv4 = || addresses.first_chunk::<4>().map(|octets| IpAddr::from(*octets));
    let ipv6 = || addresses.first_chunk::<16>().map(|octets| IpAddr::from(*octets));
    Some(match family {
        0x11 | 0x12 => ipv4(),
        0x21 | 0x22 => ipv6(),
        _ => None, // not an IP address
    })
}

/// `X-Forwarded-For` has no valid address in the place of the client's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InvalidAddress;

/// The client address in the `X-Forwarded-For` headers: the last one that is not a proxy's.
/// Addresses before it may be forged, so they are not even parsed. `None` if all addresses are
/// proxies'.
pub fn forwarded_for(
    head: &Head<'_>,
    is_proxy: impl Fn(IpAddr) -> bool,
) -> Result<Option<IpAddr>, InvalidAddress> {
    let values: Vec<&[u8]> = head.values("x-forwarded-for").collect();
    let hops = values.iter().rev().flat_map(|value| value.rsplit(|byte| *byte == b','));
    for hop in hops.map(|hop| hop.trim_ascii()).filter(|hop| !hop.is_empty()) {
        let ip = address(hop).ok_or(InvalidAddress)?;
        if !is_proxy(ip) {
            return Ok(Some(ip));
        }
    }
    Ok(None)
}

/// An address as proxies write it: alone, `1.2.3.4:5678`, `[2001:db8::1]` or `[2001:db8::1]:5678`.
fn address(hop: &[u8]) -> Option<IpAddr> {
    let text = std::str::from_utf8(hop).ok()?;
    let bracketed = || text.strip_prefix('[')?.strip_suffix(']')?.parse().map(IpAddr::V6).ok();
    let with_port = || text.parse().map(|addr: SocketAddr| addr.ip()).ok();
    text.parse().ok().or_else(with_port).or_else(bracketed)
}

#[cfg(test)]
mod tests;
