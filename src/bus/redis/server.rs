//! Which server answers at `--redis`, and whether a node can use it.

use std::fmt;

use super::reply;

/// The oldest major version of Redis with functions, script flags and ACL checks in scripts. Every
/// Valkey has them.
const OLDEST_REDIS: u32 = 7;

/// A server that speaks the protocol of Redis, as it names itself in INFO.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Server {
    product: Product,
    /// Empty if INFO hides it.
    version: String,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Product {
    #[default]
    Redis,
    Valkey,
    /// It lacks functions or ACL checks in scripts, and no test runs with it.
    Unsupported(&'static str),
}

/// Fields of INFO that only one product has. All products also have `redis_version`, the version
/// of Redis that they are compatible with.
const OWN_VERSION: [(&str, Product); 4] = [
    ("valkey_version", Product::Valkey),
    ("dragonfly_version", Product::Unsupported("Dragonfly")),
    ("garnet_version", Product::Unsupported("Garnet")),
    ("kvrocks_version", Product::Unsupported("Kvrocks")),
];

/// The field by which INFO of KeyDB differs from that of the Redis that it was forked from.
const KEYDB: &str = "mvcc_depth";

impl Server {
    /// The server that replied to INFO with `info`.
    pub fn of(info: &str) -> Server {
        let field = |name| reply::info_field(info, name);
        let own = OWN_VERSION.iter().find_map(|(name, product)| Some((*product, field(name)?)));
        let (product, version) = own.unwrap_or_else(|| {
            let keydb = field(KEYDB).map(|_| Product::Unsupported("KeyDB"));
            (keydb.unwrap_or_default(), field("redis_version").unwrap_or_default())
        });
        Server { product, version: version.to_owned() }
    }

    /// # Errors
    /// Why no node can use it, and what to use.
    pub fn check(&self) -> Result<(), String> {
        let major = self.version.split('.').next().and_then(|major| major.parse::<u32>().ok());
        let problem = match self.product {
            Product::Redis if major.is_some_and(|major| major < OLDEST_REDIS) => "is too old",
            Product::Unsupported(_) => "is not supported",
            Product::Redis | Product::Valkey => return Ok(()),
        };
        Err(format!("{self} {problem}: use Redis {OLDEST_REDIS}.0 or newer, or Valkey"))
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.product {
            Product::Redis => "Redis",
            Product::Valkey => "Valkey",
            Product::Unsupported(name) => name,
        };
        match &*self.version {
            "" => f.write_str(name),
            version => write!(f, "{name} {version}"),
        }
    }
}

/// `standalone`, `sentinel` or `cluster`.
pub fn mode(info: &str) -> Option<&str> {
    // Valkey has renamed it.
    reply::info_field(info, "redis_mode").or_else(|| reply::info_field(info, "server_mode"))
}

#[cfg(test)]
mod tests {
    use super::*;

    // How replies of real servers begin.
    const REDIS_6: &str = "# Server\r\nredis_version:6.2.5\r\nredis_git_sha1:00000000\r\nredis_git_dirty:0\r\n\
        redis_build_id:135cf79b58e84c2a\r\nredis_mode:standalone\r\nos:Linux 6.18.44 x86_64\r\n";
    const REDIS_7: &str = "# Server\r\nredis_version:7.0.15\r\nredis_git_sha1:00000000\r\nredis_git_dirty:0\r\n\
        redis_build_id:ae4d7c971a948f0\r\nredis_mode:standalone\r\nos:Linux 6.18.44 x86_64\r\n";
    const REDIS_7_4: &str = "# Server\r\nredis_version:7.4.1\r\nredis_git_sha1:00000000\r\nredis_git_dirty:0\r\n\
        redis_build_id:106c3cedafd001c0\r\nredis_mode:standalone\r\nos:Linux 6.18.44 x86_64\r\n";
    const REDIS_8: &str = "# Server\r\nredis_version:8.2.3\r\nredis_git_sha1:b5d43ceb\r\nredis_git_dirty:0\r\n\
        redis_build_id:a4a1616166d42ee6\r\nredis_mode:standalone\r\nos:Linux 6.18.44 x86_64\r\n";
    const VALKEY_8: &str = "# Server\r\nredis_version:7.2.4\r\nserver_name:valkey\r\nvalkey_version:8.1.8\r\n\
        valkey_release_stage:ga\r\nredis_git_sha1:00000000\r\nredis_git_dirty:1\r\n\
        redis_build_id:7eb4ebc9d7e91f4e\r\nserver_mode:standalone\r\nos:Linux 6.18.44 x86_64\r\n";
    const VALKEY_9: &str = "# Server\r\nredis_version:7.2.4\r\nserver_name:valkey\r\nvalkey_version:9.1.2\r\n\
        valkey_release_stage:ga\r\nredis_git_sha1:00000000\r\nredis_git_dirty:1\r\n\
        redis_build_id:1536df31c0395150\r\nserver_mode:standalone\r\nos:Linux 6.18.44 x86_64\r\n";
    // Shortened: not run by any test.
    const KEYDB: &str = "# Server\r\nredis_version:6.3.4\r\nredis_mode:standalone\r\n\
        executable:/data/keydb-server\r\n\r\n# KeyDB\r\nmvcc_depth:0\r\n";
    const DRAGONFLY: &str =
        "# Server\r\nredis_version:7.4.0\r\ndragonfly_version:df-v1.40.1\r\nredis_mode:standalone\r\n";
    const GARNET: &str = "# Server\r\ngarnet_version:1.1.9\r\nredis_version:7.4.3\r\narch_bits:64\r\n";

    #[test]
    fn servers_are_named_by_their_own_fields() {
        for (info, name) in [
            (REDIS_6, "Redis 6.2.5"),
            (REDIS_7, "Redis 7.0.15"),
            (REDIS_7_4, "Redis 7.4.1"),
            (REDIS_8, "Redis 8.2.3"),
            (VALKEY_8, "Valkey 8.1.8"),
            (VALKEY_9, "Valkey 9.1.2"),
            (KEYDB, "KeyDB 6.3.4"),
            (DRAGONFLY, "Dragonfly df-v1.40.1"),
            (GARNET, "Garnet 1.1.9"),
            ("", "Redis"),
        ] {
            assert_eq!(Server::of(info).to_string(), name);
        }
    }

    #[test]
    fn old_and_other_servers_are_rejected() {
        for info in [REDIS_7, REDIS_7_4, REDIS_8, VALKEY_8, VALKEY_9, ""] {
            assert_eq!(Server::of(info).check(), Ok(()), "{info}");
        }
        for (info, problem) in [
            (REDIS_6, "Redis 6.2.5 is too old: use Redis 7.0 or newer, or Valkey"),
            (KEYDB, "KeyDB 6.3.4 is not supported: use Redis 7.0 or newer, or Valkey"),
            (DRAGONFLY, "Dragonfly df-v1.40.1 is not supported: use Redis 7.0 or newer, or Valkey"),
            (GARNET, "Garnet 1.1.9 is not supported: use Redis 7.0 or newer, or Valkey"),
        ] {
            assert_eq!(Server::of(info).check(), Err(problem.into()));
        }
    }

    #[test]
    fn mode_is_known_of_redis_and_valkey() {
        assert_eq!(mode(REDIS_7), Some("standalone"));
        assert_eq!(mode(VALKEY_9), Some("standalone"));
    }
}
