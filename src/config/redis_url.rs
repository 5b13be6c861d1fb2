//! The URL of a Redis in fred's syntax, checked before anything connects.

use std::fmt;

use url::Url;

/// A Redis URL. `Debug` and `Display` hide its passwords.
#[derive(Clone, PartialEq, Eq)]
pub struct RedisUrl(pub String);

const SENTINEL_PARAMETERS: [&str; 4] =
    ["node", "sentinelServiceName", "sentinelUsername", "sentinelPassword"];

impl RedisUrl {
    /// Checks a URL in fred's syntax (`redis`, `rediss`, their `-sentinel` forms, `redis+unix`), or
    /// `unix:PATH`.
    ///
    /// # Errors
    /// What is wrong with the URL. It is not quoted, since it may hold a password.
    pub fn parse(text: &str) -> Result<RedisUrl, String> {
        let text = match text.strip_prefix("unix:") {
            Some(path) => format!("redis+unix://{}", path.strip_prefix("//").unwrap_or(path)),
            None => text.to_owned(),
        };
        let url = Url::parse(&text)
            .map_err(|error| format!("is not a URL such as redis://127.0.0.1:6379: {error}"))?;
        let database = url.path().trim_start_matches('/');
        match url.scheme() {
            "redis" | "rediss" => {
                if let Some(name) = parameters(&url).next().map(|(name, _)| name) {
                    return Err(format!("a {}:// URL has no parameter {name}", url.scheme()));
                }
            }
            "redis-sentinel" | "rediss-sentinel" => check_sentinel(&url)?,
            "redis+unix" if url.path().len() > 1 => return Ok(RedisUrl(text)),
            "redis+unix" => return Err("has no path: give one, such as unix:/run/redis/redis.sock".into()),
            scheme if scheme.contains("cluster") => return Err("Redis Cluster is not supported yet".into()),
            scheme => {
                let known = "redis, rediss, redis-sentinel, rediss-sentinel or unix:PATH";
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
            return Err(format!("a Sentinel URL has no parameter {name}"));
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
        ] {
            let url = RedisUrl::parse(text).unwrap_or_else(|problem| panic!("{text}: {problem}"));
            assert_eq!(url.to_string(), shown);
            assert!(!format!("{url:?}").contains("cret"), "{url:?}");
            fred::types::config::Config::from_url(&url.0).unwrap_or_else(|error| panic!("{text}: {error}"));
        }
    }

    #[test]
    fn rejects_wrong_urls_without_quoting_them() {
        for (text, part) in [
            ("127.0.0.1:6379", "such as redis://127.0.0.1:6379"),
            ("localhost:6379", "use redis"),
            ("http://:secret@a", "use redis"),
            ("redis-cluster://:secret@a:1", "not supported yet"),
            ("redis://:secret@", "is not a URL"),
            ("redis:///3", "no host"),
            ("redis://:secret@a:99999", "is not a URL"),
            ("redis://:secret@a/x", "database number"),
            ("redis://:secret@a/1/2", "database number"),
            ("redis://:secret@a?db=1", "no parameter db"),
            ("redis-sentinel://:secret@a", "sentinelServiceName"),
            ("redis-sentinel://:secret@a?sentinelServiceName=", "sentinelServiceName"),
            ("redis-sentinel://a?sentinelServiceName=m&node=b", "HOST:PORT"),
            ("redis-sentinel://a?sentinelServiceName=m&password=secret", "no parameter password"),
            ("unix:", "no path"),
            ("", "is not a URL"),
            ("http://127.0.0.1", "rediss-sentinel or unix:PATH"),
        ] {
            let problem = RedisUrl::parse(text).expect_err(text);
            assert!(problem.contains(part), "{text}: {problem}");
            assert!(!problem.contains("secret"), "{problem}");
        }
        assert_eq!(RedisUrl("no url".into()).to_string(), "***");
    }
}
