//! Checks which pages may connect. In `Origin` a browser sends the site of the page (RFC 6454
//! section 7). Without this check any page on the web could connect to this node from the machine
//! of its visitor, behind any firewall.

use std::fmt;
use std::net::IpAddr;

/// A site: scheme, host and port.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Site<'a> {
    scheme: &'a str,
    host: &'a str,
    /// As given, or the default of the scheme. `None` if the scheme has none.
    port: Option<u16>,
}

/// What sandboxed pages and files send as their origin, on every site alike.
const NULL: &str = "null";

/// An entry of `--allow-origin`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OriginRule {
    /// Pages whose origin is `null`.
    Null,
    Sites(Sites),
}

/// One site, or every site below a domain. Apps have sites with schemes of their own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sites {
    scheme: String,
    host: String,
    port: Option<u16>,
    /// The rule is for the subdomains of the host, not for itself.
    subdomains: bool,
}

impl OriginRule {
    /// Parses `https://example.com`, `http://10.0.0.1:8080`, `https://*.example.com`,
    /// `capacitor://localhost` or `null`.
    pub fn parse(text: &str) -> Result<OriginRule, String> {
        if text == NULL {
            return Ok(OriginRule::Null);
        }
        let wrong = || {
            format!(
                "{text:?} is not an origin, such as https://example.com, https://*.example.com or \
                 capacitor://localhost"
            )
        };
        let site = Site::parse(text).ok_or_else(wrong)?;
        let below = site.host.strip_prefix("*.");
        let host = below.unwrap_or(site.host);
        if host.contains('*') {
            return Err(wrong());
        }
        Ok(OriginRule::Sites(Sites {
            scheme: site.scheme.to_ascii_lowercase(),
            host: host.to_ascii_lowercase(),
            port: site.port,
            subdomains: below.is_some(),
        }))
    }

    fn sites(&self) -> Option<&Sites> {
        match self {
            OriginRule::Null => None,
            OriginRule::Sites(sites) => Some(sites),
        }
    }
}

impl Sites {
    fn allows(&self, site: &Site<'_>) -> bool {
        self.has_host(site.host) && site.scheme.eq_ignore_ascii_case(&self.scheme) && site.port == self.port
    }

    fn has_host(&self, host: &str) -> bool {
        let host = host.to_ascii_lowercase();
        match self.subdomains {
            true => host.strip_suffix(&self.host).is_some_and(|rest| rest.len() > 1 && rest.ends_with('.')),
            false => host == self.host,
        }
    }
}

impl fmt::Display for OriginRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(sites) = self.sites() else { return f.write_str(NULL) };
        write!(f, "{}://{}{}", sites.scheme, if sites.subdomains { "*." } else { "" }, sites.host)?;
        match sites.port {
            Some(port) if default_port(&sites.scheme) != Some(port) => write!(f, ":{port}"),
            _ => Ok(()),
        }
    }
}

/// Whether a page of `origin` may connect to a node that it addresses as `host` (the Host header).
///
/// Without rules a page must be from the host and port that it connects to. Between two loopback
/// hosts the port is ignored: the demo page connects to a second node on the same machine, and a
/// program that serves pages there can connect anyway. With rules only the rules count, so that
/// another site's name that points here (DNS rebinding) is not accepted as the same host.
pub fn is_allowed(rules: &[OriginRule], origin: &str, host: &str) -> bool {
    if origin == NULL {
        return rules.contains(&OriginRule::Null);
    }
    let Some(site) = Site::parse(origin) else { return false };
    if !rules.is_empty() {
        return rules.iter().filter_map(OriginRule::sites).any(|sites| sites.allows(&site));
    }
    let Some((host, port)) = split_port(host) else { return false };
    let port = port.or(default_port(site.scheme));
    let same = site.port.is_some() && site.port == port && site.host.eq_ignore_ascii_case(host);
    same || (default_port(site.scheme).is_some() && is_loopback(site.host) && is_loopback(host))
}

impl Site<'_> {
    fn parse(text: &str) -> Option<Site<'_>> {
        let (scheme, authority) = text.split_once("://")?;
        let is_scheme = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'-' | b'.');
        if scheme.is_empty() || !scheme.bytes().all(is_scheme) {
            return None;
        }
        let (host, port) = split_port(authority)?;
        Some(Site { scheme, host, port: port.or(default_port(scheme)) })
    }
}

/// Splits an authority without user into host and port (RFC 3986 section 3.2). An IPv6 address
/// keeps its brackets.
fn split_port(authority: &str) -> Option<(&str, Option<u16>)> {
    let host_end = match authority.strip_prefix('[') {
        Some(rest) => rest.find(']')? + 2,
        None => authority.find(':').unwrap_or(authority.len()),
    };
    let (host, rest) = authority.split_at(host_end);
    if host.is_empty() || !host.bytes().all(is_host_byte) {
        return None;
    }
    match rest.strip_prefix(':') {
        None if rest.is_empty() => Some((host, None)),
        Some(digits) if digits.bytes().all(|b| b.is_ascii_digit()) => {
            Some((host, Some(digits.parse().ok()?)))
        }
        _ => None,
    }
}

/// Whether a host may have this byte. None of those that separate the parts of a URL or a list.
pub(super) fn is_host_byte(byte: u8) -> bool {
    byte.is_ascii_graphic() && !b"/?#@\\,".contains(&byte)
}

/// Whether a Host header can only mean this machine: `localhost`, a name below it (RFC 6761 section
/// 6.3), or a loopback address, with any port. DNS can't make such a name point elsewhere.
pub fn is_loopback_host(host: &str) -> bool {
    split_port(host).is_some_and(|(host, _)| is_loopback(host))
}

/// Whether a rule of a website has the host of a Host header. Ports are ignored. The host of an app
/// origin is an id that may be somebody's domain, which can point here (DNS rebinding).
pub fn names_host(rules: &[OriginRule], host: &str) -> bool {
    let is_website = |sites: &&Sites| default_port(&sites.scheme).is_some();
    let mut sites = rules.iter().filter_map(OriginRule::sites).filter(is_website);
    split_port(host).is_some_and(|(host, _)| sites.any(|sites| sites.has_host(host)))
}

fn default_port(scheme: &str) -> Option<u16> {
    match scheme.to_ascii_lowercase().as_str() {
        "http" => Some(80),
        "https" => Some(443),
        _ => None,
    }
}

fn is_loopback(host: &str) -> bool {
    let host = host.to_ascii_lowercase();
    let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    address.is_ok_and(|address| address.to_canonical().is_loopback())
        || host == "localhost"
        || host.ends_with(".localhost") // RFC 6761 section 6.3
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed(rules: &[&str], origin: &str, host: &str) -> bool {
        let rules: Vec<_> = rules.iter().map(|rule| OriginRule::parse(rule).unwrap()).collect();
        is_allowed(&rules, origin, host)
    }

    #[test]
    fn without_rules_only_the_same_host_and_port() {
        for (origin, host) in [
            ("http://a.example:8080", "a.example:8080"),
            ("https://a.example", "a.example"),
            ("https://a.example", "a.example:443"),
            ("https://a.example:443", "a.example"),
            ("http://a.example", "a.example:80"),
            ("HTTPS://A.example", "a.EXAMPLE"),
            ("http://[2001:db8::1]:8080", "[2001:db8::1]:8080"),
            // Loopback, with any port.
            ("http://127.0.0.1:8080", "127.0.0.1:8081"),
            ("http://localhost:3000", "127.0.0.1:8080"),
            ("http://app.localhost", "[::1]:8080"),
        ] {
            assert!(allowed(&[], origin, host), "{origin} {host}");
        }
        for (origin, host) in [
            ("http://a.example:8080", "a.example:8081"),
            ("http://a.example", "a.example:443"),
            ("https://b.example", "a.example"),
            ("https://a.example.b.example", "a.example"),
            ("https://a.example", "127.0.0.1:8080"),
            ("http://127.0.0.1:8080", "a.example:8080"),
            ("http://127.0.0.1.b.example", "127.0.0.1:8080"),
            ("http://notlocalhost", "localhost"),
            ("chrome-extension://localhost", "localhost"),
            ("chrome-extension://abc", "abc"),
            ("null", "null"),
            ("", ""),
            ("a.example", "a.example"),
            ("http://", ""),
            ("http://a.example/", "a.example"),
            ("http://user@a.example", "a.example"),
            ("http://a.example:x", "a.example"),
            ("http://a.example:99999", "a.example:99999"),
            ("http://a.example, http://b.example", "a.example"),
        ] {
            assert!(!allowed(&[], origin, host), "{origin} {host}");
        }
    }

    #[test]
    fn with_rules_only_rules_count() {
        let rules =
            ["https://example.com", "https://*.example.org", "http://10.0.0.1:3000", "capacitor://localhost"];
        for origin in [
            "https://example.com",
            "https://EXAMPLE.com:443",
            "https://a.example.org",
            "https://a.b.example.org",
            "http://10.0.0.1:3000",
            "capacitor://localhost",
        ] {
            assert!(allowed(&rules, origin, "other.example"), "{origin}");
        }
        for origin in [
            "http://example.com",
            "https://example.com:8443",
            "https://www.example.com",
            "https://example.org",
            "https://.example.org",
            "https://badexample.org",
            "http://a.example.org",
            "https://a.example.org.evil.example",
            "http://10.0.0.1",
            "https://same.example",
            "null",
            "capacitor://example.com",
            "ionic://localhost",
        ] {
            assert!(!allowed(&rules, origin, "same.example"), "{origin}");
        }
        let rules = ["null", "ionic://localhost", "app://-", "app://obsidian.md"];
        for origin in rules {
            assert!(allowed(&rules, origin, "a.example"), "{origin}");
            assert_eq!(OriginRule::parse(origin).unwrap().to_string(), origin);
        }
        for origin in ["", "Null", "null://a", "http://null", "app://x", "https://a.example"] {
            assert!(!allowed(&rules, origin, "a.example"), "{origin}");
        }
    }

    #[test]
    fn recognizes_loopback_hosts_and_hosts_of_rules() {
        for host in
            ["localhost", "LOCALHOST:1", "a.localhost", "127.0.0.1:9080", "127.9.9.9", "[::1]", "[::1]:80"]
        {
            assert!(is_loopback_host(host), "{host}");
        }
        for host in
            ["", "a", "evil.example:9080", "localhost.evil.example", "10.0.0.1", "0.0.0.0", "[::]", "::1"]
        {
            assert!(!is_loopback_host(host), "{host}");
        }
        let rules = ["https://example.com", "https://*.example.org", "app://notes.example"]
            .map(|rule| OriginRule::parse(rule).unwrap());
        for (host, named) in [
            ("notes.example", false),
            ("example.com", true),
            ("EXAMPLE.com:9080", true),
            ("a.example.org", true),
            ("example.org", false),
            ("evil.example", false),
            ("", false),
        ] {
            assert_eq!(names_host(&rules, host), named, "{host}");
        }
    }

    #[test]
    fn rules_are_parsed_and_displayed() {
        for (text, shown) in [
            ("https://Example.com", "https://example.com"),
            ("https://example.com:443", "https://example.com"),
            ("http://*.example.com:81", "http://*.example.com:81"),
            ("http://[::1]:80", "http://[::1]"),
            ("null", "null"),
        ] {
            let rule = OriginRule::parse(text).unwrap();
            assert_eq!(rule.to_string(), shown);
            assert_eq!(OriginRule::parse(shown).unwrap(), rule);
        }
        for wrong in [
            "",
            "*",
            "example.com",
            "https://",
            "https://*",
            "https://a.*.com",
            "https://a/",
            "https://*.*.a",
        ] {
            assert!(OriginRule::parse(wrong).is_err(), "{wrong}");
        }
    }
}
