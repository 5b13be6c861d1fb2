//! The host name in `--redis`, which may move to another Redis while the old one still runs.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use fred::types::config::{Config, ServerConfig};
use tokio::time::timeout;

/// Time between two lookups while connected. Services that fail over by DNS use a TTL of 5 s or
/// more, and resolvers cache names for that long.
pub const LOOKUP_INTERVAL: Duration = Duration::from_secs(3);

/// Lookups in a row without the connected address until the node reconnects. Some name servers
/// answer with only some of a name's addresses, in turn.
pub const MOVED_AFTER: u32 = 3;

const LOOKUP_TIMEOUT: Duration = Duration::from_secs(5);

/// A host name and a port.
#[derive(Clone, Debug)]
pub struct HostName {
    host: String,
    port: u16,
}

/// The peer of a session that is connected by name.
#[derive(Clone, Debug)]
pub struct Peer {
    pub name: HostName,
    /// The address that the name had when the session was made.
    pub address: SocketAddr,
}

impl HostName {
    /// The host name of a stand-alone Redis. `None` for an IP address, a Unix socket or Sentinels,
    /// which name the primary.
    pub fn of(config: &Config) -> Option<HostName> {
        let ServerConfig::Centralized { server } = &config.server else { return None };
        let host = server.host.to_string();
        let is_address = host.trim_matches(['[', ']']).parse::<IpAddr>().is_ok();
        (!is_address).then_some(HostName { host, port: server.port })
    }

    pub async fn lookup(&self) -> Result<Vec<SocketAddr>, String> {
        match timeout(LOOKUP_TIMEOUT, tokio::net::lookup_host((&*self.host, self.port))).await {
            Ok(Ok(found)) => Ok(found.collect()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("name resolution takes longer than {LOOKUP_TIMEOUT:?}")),
        }
    }

    /// `config` with one of the name's addresses, so that both connections of a session use the
    /// same one.
    pub fn at(&self, address: SocketAddr, config: &Config) -> Config {
        let mut config = config.clone();
        if let ServerConfig::Centralized { server } = &mut config.server {
            server.host = match address.ip() {
                IpAddr::V4(ip) => ip.to_string().into(),
                IpAddr::V6(ip) => format!("[{ip}]").into(),
            };
            server.tls_server_name = Some(self.host.clone().into()); // the name in the certificate
        }
        config
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_host_names_are_looked_up() {
        let name = |url: &str| HostName::of(&Config::from_url(url).unwrap());
        for none in ["redis://127.0.0.1", "redis://[::1]:7000", "redis+unix:///run/redis.sock"] {
            assert!(name(none).is_none(), "{none}");
        }
        let found = name("rediss://me:secret@redis.example:7000/3").unwrap();
        assert_eq!((&*found.host, found.port), ("redis.example", 7000));
        let config = Config::from_url("rediss://me:secret@redis.example:7000/3").unwrap();
        let at = found.at("[2001:db8::1]:7000".parse().unwrap(), &config);
        assert_eq!((at.database, &at.password), (config.database, &config.password));
        let ServerConfig::Centralized { server } = &at.server else { panic!("{at:?}") };
        assert_eq!((&*server.host, server.port), ("[2001:db8::1]", 7000));
        assert_eq!(server.tls_server_name.as_deref(), Some("redis.example"));
    }
}
