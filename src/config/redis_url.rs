//! The URL of a Redis in fred's syntax, checked before anything connects.

use std::fmt;

use url::Url;

/// A Redis URL. `Debug` and `Display` hide its passwords.
#[derive(Clone, PartialEq, Eq)]
pub struct RedisUrl(pub String);

const SENTINEL_PARAMETERS: [&str; 4] =
    ["node", "sentinelServiceName", "sentinelUsername", "sentinelPassword"];

impl RedisUrl {
    /// Checks a URL in fred's syntax (`redis`, `rediss`, their `-sentinel` forms, `redis+unix`),
    /// `unix:PATH`, or `redis-cluster://[USER:PASSWORD@]HOST:PORT,HOST:PORT...`.
    ///
    /// # Errors
    /// What is wrong with the URL. It is not quoted, since it may hold a password.
    pub fn parse(text: &str) -> Result<RedisUrl, String> {
        let text = match text.strip_prefix("unix:") {
            Some(path) => format!("redis+unix://{}", path.strip_prefix("//").unwrap_or(path)),
            None => text.to_owned(),
        };
        let Some((scheme, rest)) = text.split_once("://") else {
            return Err(
                "must start with redis://, or rediss:// for TLS, such as redis://127.0.0.1:6379".into()
            );
        };
        if has_misplaced_delimiter(scheme, rest) {
            return Err(format!("has a / ? or # where none belongs: {ESCAPES}"));
        }
        let parsed = match scheme.ends_with("-cluster") {
            true => cluster_nodes(scheme, rest)?.remove(0),
            false => text.clone(),
        };
        let url = Url::parse(&parsed).map_err(|error| {
            let hint = if rest.contains('@') { format!("; {ESCAPES}") } else { String::new() };
            format!("is not a URL such as redis://127.0.0.1:6379: {error}{hint}")
        })?;
        let database = url.path().trim_start_matches('/');
        match url.scheme() {
            "redis" | "rediss" => {
                if url.query().is_some() {
                    return Err(format!("a {}:// URL has no parameters after ?", url.scheme()));
                }
            }
            "redis-sentinel" | "rediss-sentinel" => check_sentinel(&url)?,
            "redis+unix" if url.path().len() > 1 => return Ok(RedisUrl(text)),
            "redis+unix" => return Err("has no path: give one, such as unix:/run/redis/redis.sock".into()),
            scheme => {
                let known = "redis, rediss, redis-sentinel, rediss-sentinel, redis-cluster, rediss-cluster \
                             or unix:PATH";
                return Err(format!("{scheme}:// is not a Redis URL: use {known}"));
            }
        }
        if url.host_str().is_none_or(str::is_empty) {
            return Err("has no host: give one, such as redis://127.0.0.1:6379".into());
        }
        if !database.is_empty() && database.parse::<u8>().is_err() {
            return Err("the path must be a database number below 256".into());
        }
        Ok(RedisUrl(text))
    }

    /// Whether it names nodes of a Redis Cluster.
    pub fn is_cluster(&self) -> bool {
        self.0.split_once("://").is_some_and(|(scheme, _)| scheme.ends_with("-cluster"))
    }

    /// The URL of one Redis; of a cluster, of each node that it names.
    pub fn servers(&self) -> Vec<String> {
        match self.0.split_once("://") {
            Some((scheme, rest)) if scheme.ends_with("-cluster") => {
                cluster_nodes(scheme, rest).expect("it was parsed when the settings were read")
            }
            _ => vec![self.0.clone()],
        }
    }

    /// What a node connects to first, without user and password.
    pub fn target(&self) -> String {
        if self.is_cluster() {
            let (_, nodes) = login_and_nodes(&self.0);
            return format!("the Redis Cluster at {}", nodes.replace(',', ", "));
        }
        let url = Url::parse(&self.0).expect("it was parsed when the settings were read");
        let at = |port| format!("{}:{}", url.host_str().unwrap_or_default(), url.port().unwrap_or(port));
        if url.scheme().ends_with("+unix") {
            return format!("Redis at {}", url.path());
        }
        if !url.scheme().ends_with("-sentinel") {
            return format!("Redis at {}", at(6379));
        }
        let others = parameters(&url).filter(|(name, _)| *name == "node").map(|(_, addr)| addr.to_owned());
        let all: Vec<String> = std::iter::once(at(26379)).chain(others).collect();
        format!("the Sentinels at {}", all.join(", "))
    }
}

/// What is before and after the last `@`: login and hosts.
fn login_and_nodes(rest: &str) -> (&str, &str) {
    let after_scheme = rest.split_once("://").map_or(rest, |(_, rest)| rest);
    after_scheme.rsplit_once('@').unwrap_or(("", after_scheme))
}

/// The URLs of the nodes of a cluster that a URL names, at least one.
fn cluster_nodes(scheme: &str, rest: &str) -> Result<Vec<String>, String> {
    const NODES: &str = "name nodes as HOST:PORT,HOST:PORT without database and parameters";
    let scheme = match scheme {
        "redis-cluster" => "redis",
        "rediss-cluster" => "rediss",
        _ => return Err(format!("{scheme}:// is not a Redis URL: use redis-cluster or rediss-cluster")),
    };
    let (login, nodes) = login_and_nodes(rest);
    let at = if rest.contains('@') { "@" } else { "" };
    let urls = nodes.split(',').map(|node| {
        let url = format!("{scheme}://{login}{at}{node}");
        let parsed = Url::parse(&url).map_err(|error| format!("{NODES}: {error}"))?;
        let is_node = !node.is_empty()
            && !node.contains(['/', '?', '#'])
            && parsed.host_str().is_some_and(|host| !host.is_empty());
        if is_node { Ok(url) } else { Err(NODES.to_owned()) }
    });
    urls.collect()
}

/// How to write a password in a URL.
const ESCAPES: &str = "in a password write / as %2F, ? as %3F, # as %23 and % as %25";

/// Whether the URL has a delimiter that can only be part of a password. What follows it would be
/// read as something else, or ignored.
fn has_misplaced_delimiter(scheme: &str, rest: &str) -> bool {
    let (before_fragment, has_fragment) = match rest.split_once('#') {
        Some((before, _)) => (before, true),
        None => (rest, false),
    };
    let (before_query, query) = before_fragment.split_once('?').unwrap_or((before_fragment, ""));
    let path = before_query.split_once('/').map_or("", |(_, path)| path);
    let in_query = query.contains('@') && !scheme.ends_with("-sentinel");
    has_fragment || in_query || (path.contains('@') && !scheme.ends_with("+unix"))
}

/// The parameters of the query as written.
fn parameters(url: &Url) -> impl Iterator<Item = (&str, &str)> {
    let pairs = url.query().unwrap_or_default().split('&').filter(|pair| !pair.is_empty());
    pairs.map(|pair| pair.split_once('=').unwrap_or((pair, "")))
}

fn check_sentinel(url: &Url) -> Result<(), String> {
    if !parameters(url).any(|(name, value)| name == "sentinelServiceName" && !value.is_empty()) {
        return Err(
            "needs ?sentinelServiceName=NAME, the name under which the Sentinels watch the primary".into()
        );
    }
    for (name, value) in parameters(url) {
        if !SENTINEL_PARAMETERS.contains(&name) {
            let known = SENTINEL_PARAMETERS.join(", ");
            return Err(format!("has an unknown parameter: use {known}; in a password write & as %26"));
        }
        let is_address = value
            .split_once(':')
            .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0));
        if name == "node" && !is_address {
            return Err("node= needs another Sentinel's HOST:PORT".into());
        }
    }
    Ok(())
}

impl fmt::Display for RedisUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some((scheme, rest)) = self.0.split_once("://")
            && self.is_cluster()
        {
            let (login, nodes) = login_and_nodes(rest);
            return match login.split_once(':') {
                Some((user, _)) => write!(f, "{scheme}://{user}:***@{nodes}"),
                None if rest.contains('@') => write!(f, "{scheme}://{login}@{nodes}"),
                None => write!(f, "{scheme}://{nodes}"),
            };
        }
        let Ok(mut url) = Url::parse(&self.0) else { return f.write_str("***") };
        if url.password().is_some() && url.set_password(Some("***")).is_err() {
            return f.write_str("***");
        }
        let hidden: Vec<String> = parameters(&url)
            .map(|(name, value)| match name {
                "sentinelPassword" => format!("{name}=***"),
                _ => format!("{name}={value}"),
            })
            .collect();
        if url.query().is_some() {
            url.set_query(Some(&hidden.join("&")));
        }
        f.write_str(url.as_str())
    }
}

impl fmt::Debug for RedisUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shows_urls_without_passwords() {
        for (text, shown) in [
            ("redis://127.0.0.1", "redis://127.0.0.1"),
            ("redis://127.0.0.1:6379/3", "redis://127.0.0.1:6379/3"),
            ("rediss://:s%40cret@redis.example:6380", "rediss://:***@redis.example:6380"),
            ("redis://ann:secret@[::1]:6379", "redis://ann:***@[::1]:6379"),
            ("unix:/run/redis.sock", "redis+unix:///run/redis.sock"),
            ("unix:///run/redis.sock", "redis+unix:///run/redis.sock"),
            ("redis+unix://u:secret@x/run/redis.sock", "redis+unix://u:***@x/run/redis.sock"),
            (
                "redis-sentinel://u:secret@a/1?sentinelServiceName=m&node=b:26379&sentinelPassword=secret",
                "redis-sentinel://u:***@a/1?sentinelServiceName=m&node=b:26379&sentinelPassword=***",
            ),
            ("rediss-sentinel://a?sentinelServiceName=m", "rediss-sentinel://a?sentinelServiceName=m"),
            ("redis-cluster://a:1,b:2", "redis-cluster://a:1,b:2"),
            ("rediss-cluster://u:secret@a:1,b:2", "rediss-cluster://u:***@a:1,b:2"),
            ("redis-cluster://:s@cret@a:1", "redis-cluster://:***@a:1"),
        ] {
            let url = RedisUrl::parse(text).unwrap_or_else(|problem| panic!("{text}: {problem}"));
            assert_eq!(url.to_string(), shown);
            assert!(!format!("{url:?}").contains("cret"), "{url:?}");
            fred::types::config::Config::from_url(&url.servers()[0])
                .unwrap_or_else(|error| panic!("{text}: {error}"));
        }
    }

    #[test]
    fn cluster_url_names_several_servers() {
        let url = RedisUrl::parse("rediss-cluster://u:secret@a:1,[::1]:2,c").unwrap();
        assert_eq!(
            url.servers(),
            ["rediss://u:secret@a:1", "rediss://u:secret@[::1]:2", "rediss://u:secret@c"]
        );
        assert!(url.is_cluster() && !RedisUrl::parse("redis://redis-cluster").unwrap().is_cluster());
    }

    #[test]
    fn target_has_address_but_no_password() {
        for (text, target) in [
            ("redis://127.0.0.1", "Redis at 127.0.0.1:6379"),
            ("rediss://ann:secret@[::1]:7000/3", "Redis at [::1]:7000"),
            ("unix:/run/redis.sock", "Redis at /run/redis.sock"),
            ("redis-sentinel://a/1?sentinelServiceName=m&node=b:7000", "the Sentinels at a:26379, b:7000"),
            ("redis-cluster://u:secret@a:1,b:2", "the Redis Cluster at a:1, b:2"),
        ] {
            assert_eq!(RedisUrl::parse(text).unwrap().target(), target);
        }
    }

    #[test]
    fn rejects_wrong_urls_without_quoting_them() {
        const MISPLACED: &str = "where none belongs: in a password write / as %2F, ? as %3F, # as %23";
        for (text, part) in [
            ("", "must start with redis://"),
            ("127.0.0.1:6379", "such as redis://127.0.0.1:6379"),
            ("localhost:6379", "must start with redis://"),
            ("secret:secret@host:6379", "must start with redis://"),
            ("redis:secret@a", "must start with redis://"),
            ("http://:secret@a", "use redis"),
            ("http://127.0.0.1", "rediss-cluster or unix:PATH"),
            ("redis-cluster://:secret@a:1/1", "without database"),
            ("redis-cluster://:secret@a:1,", "HOST:PORT,HOST:PORT"),
            ("redis-cluster://:secret@a:1,b:x", "HOST:PORT,HOST:PORT"),
            ("redis-cluster://:secret@a:1?node=b:2", "without database and parameters"),
            ("http-cluster://a", "is not a Redis URL"),
            ("redis://:secret@", "is not a URL"),
            ("redis:///3", "no host"),
            ("redis://:secret@a:99999", "is not a URL"),
            ("redis://:secret@a/x", "database number"),
            ("redis://:secret@a/1/2", "database number"),
            ("redis://:secret@a?secret=1", "has no parameters after ?"),
            ("redis://:secr/et@a:6379", MISPLACED),
            ("redis://:12/secret@a:6379", MISPLACED),
            ("redis://u:12/secret@a:6379", MISPLACED),
            ("redis://u:@1/secret@a:6379", MISPLACED),
            ("redis://:secr?et@a:6379", MISPLACED),
            ("redis://:secr#et@a:6379", MISPLACED),
            ("redis://:@a:6379#secret", MISPLACED),
            ("redis-sentinel://:a/secret@a?sentinelServiceName=m", MISPLACED),
            ("redis-sentinel://:a?secret@a?sentinelServiceName=m", "is not a URL"),
            ("redis-sentinel://:a?secret@a?sentinelServiceName=m", "in a password write / as %2F"),
            ("redis-sentinel://a?sentinelServiceName=m&sentinelPassword=a#secret", MISPLACED),
            ("redis-sentinel://a?sentinelServiceName=m&sentinelPassword=a&secret", "write & as %26"),
            ("redis-sentinel://:secret@a", "sentinelServiceName"),
            ("redis-sentinel://:secret@a?sentinelServiceName=", "sentinelServiceName"),
            ("redis-sentinel://a?sentinelServiceName=m&node=b", "HOST:PORT"),
            (
                "redis-sentinel://a?sentinelServiceName=m&password=secret",
                "has an unknown parameter: use node",
            ),
            ("unix:", "no path"),
        ] {
            let problem = RedisUrl::parse(text).expect_err(text);
            assert!(problem.contains(part), "{text}: {problem}");
            assert!(!problem.contains("secret") && !problem.contains("secr"), "{problem}");
        }
        assert_eq!(RedisUrl("no url".into()).to_string(), "***");
    }

    #[test]
    fn accepts_escapes_and_at_in_passwords() {
        for (text, password) in [
            ("redis://:a%2Fb%23c%3Fd%40e%25@127.0.0.1", "a/b#c?d@e%"),
            ("redis://:a@b@127.0.0.1:6379/1", "a@b"),
            ("rediss-sentinel://:a@a?sentinelServiceName=m&sentinelPassword=b@c", "a"),
        ] {
            let url = RedisUrl::parse(text).unwrap_or_else(|problem| panic!("{text}: {problem}"));
            let config = fred::types::config::Config::from_url(&url.0).unwrap();
            assert_eq!(config.password.as_deref(), Some(password), "{text}");
        }
    }
}
