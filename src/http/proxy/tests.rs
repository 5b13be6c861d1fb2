use proptest::prelude::*;

use super::*;
use crate::http;

fn header(client: Option<&str>, length: usize) -> Preamble {
    Preamble::Header { client: client.map(|ip| ip.parse().unwrap()), length }
}

fn v2(version_command: u8, family: u8, rest: &[u8]) -> Vec<u8> {
    let length = (rest.len() as u16).to_be_bytes();
    [&V2[..], &[version_command, family], &length, rest].concat()
}

/// Addresses 192.0.2.1 and 192.0.2.2, ports 1 and 2.
const V4: &[u8] = &[192, 0, 2, 1, 192, 0, 2, 2, 0, 1, 0, 2];

fn v6(source: &str) -> Vec<u8> {
    let source: Ipv6Addr = source.parse().unwrap();
    [&source.octets()[..], &Ipv6Addr::LOCALHOST.octets(), &[0, 1, 0, 2]].concat()
}

#[test]
fn version_1_has_the_client() {
    for (line, client) in [
        ("PROXY TCP4 192.0.2.1 192.0.2.2 65535 80", Some("192.0.2.1")),
        ("PROXY TCP4 192.0.2.1 192.0.2.2 0 80", Some("192.0.2.1")),
        ("PROXY TCP6 2001:db8::1 ::1 1 80", Some("2001:db8::1")),
        ("PROXY TCP6 ::ffff:192.0.2.1 ::1 1 80", Some("::ffff:192.0.2.1")),
        ("PROXY UNKNOWN", None),
        ("PROXY UNKNOWN whatever 1 2", None),
    ] {
        let bytes = format!("{line}\r\nGET / HTTP/1.1\r\n");
        assert_eq!(preamble(bytes.as_bytes()), header(client, line.len() + 2), "{line}");
    }
}

#[test]
fn version_1_is_parsed_strictly() {
    let longest = format!("PROXY UNKNOWN {}\r\n", "x".repeat(V1_MAX - 16));
    assert_eq!(preamble(longest.as_bytes()), header(None, V1_MAX));
    for line in [
        "PROXY \r\n",
        "PROXY TCP4\r\n",
        "PROXY TCP5 192.0.2.1 192.0.2.2 1 2\r\n",
        "PROXY tcp4 192.0.2.1 192.0.2.2 1 2\r\n",
        "PROXY TCP4 192.0.2.1 192.0.2.2 1\r\n",
        "PROXY TCP4 192.0.2.1 192.0.2.2 1 2 \r\n",
        "PROXY TCP4 192.0.2.1 192.0.2.2 1 2 3\r\n",
        "PROXY TCP4  192.0.2.1 192.0.2.2 1 2\r\n",
        "PROXY TCP4 192.0.2.1 192.0.2.2 1 65536\r\n",
        "PROXY TCP4 192.0.2.1 192.0.2.2 +1 2\r\n",
        "PROXY TCP4 192.0.2.1 192.0.2.2 01 2\r\n",
        "PROXY TCP4 192.0.2.256 192.0.2.2 1 2\r\n",
        "PROXY TCP4 192.0.2.1 192.0.2 1 2\r\n",
        "PROXY TCP4 2001:db8::1 ::1 1 2\r\n",
        "PROXY TCP6 192.0.2.1 192.0.2.2 1 2\r\n",
        "PROXY TCP4 192.0.2.1 192.0.2.2 1 2\n",
        "PROXY UNKNOWN\n\r\n",
        "PROXY UNKNOWN\r\r\n",
        "PROXY UNKNOWN a\rb\r\n",
        "PROXY \n",
        "PROXY UNKNOWNX\r\n",
        "PROXY TCP4 192.0.2.1 192.0.2.2 1 \u{ff12}\r\n",
    ] {
        assert_eq!(preamble(line.as_bytes()), Preamble::Malformed, "{line:?}");
    }
    let endless = "PROXY UNKNOWN ".to_owned() + &"x".repeat(V1_MAX);
    assert_eq!(preamble(endless.as_bytes()), Preamble::Malformed);
    assert_eq!(preamble(&endless.as_bytes()[..V1_MAX - 1]), Preamble::Partial);
}

#[test]
fn version_2_has_the_client_and_optional_fields() {
    let tlv = [0xEA, 0, 3, 1, 2, 3];
    for (bytes, client) in [
        (v2(0x21, 0x11, V4), Some("192.0.2.1")),
        (v2(0x21, 0x11, &[V4, &tlv].concat()), Some("192.0.2.1")),
        (v2(0x21, 0x21, &v6("2001:db8::1")), Some("2001:db8::1")),
        (v2(0x21, 0x21, &[v6("2001:db8::1"), vec![0; V2_MAX - 36]].concat()), Some("2001:db8::1")),
        (v2(0x21, 0x31, &[b'/'; 216]), None),
        (v2(0x21, 0x00, &[]), None),
        (v2(0x21, 0x00, &tlv), None),
        (v2(0x20, 0x00, &[]), None),
        (v2(0x20, 0x11, V4), None), // LOCAL: its addresses are undefined
        (v2(0x20, 0xFF, &tlv), None),
    ] {
        let request = [&bytes[..], b"GET"].concat();
        assert_eq!(preamble(&request), header(client, bytes.len()), "{bytes:?}");
    }
}

#[test]
fn version_2_is_parsed_strictly() {
    for bytes in [
        v2(0x11, 0x11, V4),
        v2(0x22, 0x11, V4),
        v2(0x21, 0x41, V4),
        v2(0x21, 0x13, V4),
        v2(0x21, 0x11, &V4[..11]),
        v2(0x21, 0x21, &[0; 35]),
        v2(0x21, 0x31, &[0; 215]),
        v2(0x20, 0x00, &vec![0; V2_MAX + 1]),
    ] {
        assert_eq!(preamble(&bytes), Preamble::Malformed, "{bytes:?}");
    }
    let too_long = v2(0x21, 0x00, &[0; 0xFFFF]);
    assert_eq!(preamble(&too_long[..V2_HEAD]), Preamble::Malformed, "before any of it is buffered");
}

#[test]
fn requests_are_not_preambles() {
    for bytes in [
        &b"GET / HTTP/1.1\r\n"[..],
        b"PRI * HTTP/2.0\r\n",
        b"PROXYTCP4 ",
        b"\r\nGET",
        b"\x16\x03\x01",
        b"proxy ",
    ] {
        assert_eq!(preamble(bytes), Preamble::Absent, "{bytes:?}");
        assert!(!is_preamble(bytes));
    }
}

fn forwarded(headers: &[&[u8]]) -> Result<Option<String>, InvalidAddress> {
    let mut bytes = b"GET / HTTP/1.1\r\nHost: a\r\n".to_vec();
    for header in headers {
        bytes.extend_from_slice(b"x-Forwarded-FOR: ");
        bytes.extend_from_slice(header);
        bytes.extend_from_slice(b"\r\n");
    }
    bytes.extend_from_slice(b"\r\n");
    let (head, _) = http::parse(&bytes).unwrap().unwrap();
    let proxies = ["10.0.0.1", "10.0.0.2", "fd00::1"].map(|text| text.parse::<IpAddr>().unwrap());
    forwarded_for(&head, |ip| proxies.contains(&ip.to_canonical())).map(|ip| ip.map(|ip| ip.to_string()))
}

#[test]
fn client_is_the_last_address_not_of_a_proxy() {
    let is = |headers: &[&str], client: &str| {
        let headers: Vec<_> = headers.iter().map(|header| header.as_bytes()).collect();
        assert_eq!(forwarded(&headers), Ok(Some(client.to_owned())), "{headers:?}");
    };
    is(&["192.0.2.1"], "192.0.2.1");
    is(&["192.0.2.9, 192.0.2.1"], "192.0.2.1");
    is(&["192.0.2.9,192.0.2.1 ,\t10.0.0.1, 10.0.0.2:80"], "192.0.2.1");
    is(&["192.0.2.9", "192.0.2.1", "10.0.0.1,[fd00::1]:80"], "192.0.2.1");
    is(&["192.0.2.1", "10.0.0.1", ""], "192.0.2.1");
    is(&["192.0.2.1, , 10.0.0.1,"], "192.0.2.1");
    is(&["192.0.2.1, ::ffff:10.0.0.1"], "192.0.2.1");
    is(&["nonsense, 192.0.2.1"], "192.0.2.1"); // forged by the client
    for (form, client) in [
        ("192.0.2.1:5678", "192.0.2.1"),
        ("2001:db8::1", "2001:db8::1"),
        ("[2001:db8::1]", "2001:db8::1"),
        ("[2001:db8::1]:443", "2001:db8::1"),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.1"),
    ] {
        is(&[form], client);
    }
    assert_eq!(forwarded(&[b"\xff\xfe, 192.0.2.1"]), Ok(Some("192.0.2.1".into())), "not UTF-8");
    for none in [&b""[..], b" , ", b"10.0.0.1, 10.0.0.2"] {
        assert_eq!(forwarded(&[none]), Ok(None));
    }
}

#[test]
fn an_invalid_client_address_is_an_error() {
    for value in [
        &b"unknown"[..],
        b"192.0.2.1, unknown",
        b"192.0.2.1, nonsense, 10.0.0.1",
        b"192.0.2.256",
        b"192.0.2.1:",
        b"192.0.2.1:70000",
        b"[192.0.2.1]",
        b"[2001:db8::1",
        b"2001:db8::1]",
        b"\"192.0.2.1\"",
        b"192.0.2.1 10.0.0.1",
        b"\xff",
        b"fe80::1%eth0",
    ] {
        assert_eq!(forwarded(&[value]), Err(InvalidAddress), "{}", String::from_utf8_lossy(value));
    }
}

proptest! {
    #[test]
    fn more_bytes_never_change_the_result(
        start in prop::sample::select(vec![V1.to_vec(), V2.to_vec(), b"PROXY TCP4 ".to_vec(), v2(0x21, 0x11, V4), vec![]]),
        rest: Vec<u8>,
    ) {
        let bytes = [start, rest].concat();
        let whole = preamble(&bytes);
        for end in 0..bytes.len() {
            let part = preamble(&bytes[..end]);
            prop_assert!(part == whole || part == Preamble::Partial, "{:?} at {}, {:?} whole", part, end, whole);
        }
        if let Preamble::Header { length, .. } = whole {
            prop_assert!(length <= bytes.len());
        }
    }
}
