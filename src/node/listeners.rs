//! The listeners of a node: bound here, or inherited from systemd (sd_listen_fds(3)).
//!
//! systemd keeps its sockets open during a restart, so that the kernel queues new connections
//! instead of refusing them.

use std::net::SocketAddr;
use std::{fmt, io};

use anyhow::{Context, anyhow, ensure};
use listenfd::ListenFd;
use mio::net::TcpListener;
use rustix::io::Errno;
use socket2::SockRef;

use crate::admin;
use crate::config::{AdminAddr, SettingError, Settings};
use crate::node::accept;

/// The name of an admin socket (`FileDescriptorName=`). Sockets with other names are public.
const ADMIN: &str = "admin";

/// Listening sockets that the process inherited.
#[derive(Debug, Default)]
pub struct Inherited {
    public: Vec<std::net::TcpListener>,
    admin: Option<admin::Open>,
}

impl Inherited {
    /// Takes the sockets named by `LISTEN_FDS`, `LISTEN_PID` and `LISTEN_FDNAMES`. Works once.
    ///
    /// # Errors
    /// When a socket does not listen, or is of the wrong kind.
    pub fn from_env() -> anyhow::Result<Inherited> {
        let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
        let mut names = names.split(':');
        let mut given = ListenFd::from_env();
        let mut inherited = Inherited::default();
        for index in 0..given.len() {
            let name = names.next().unwrap_or_default();
            let socket = || format!("socket {} ({name:?}) from systemd", index + 1);
            let unix = if name == ADMIN { given.take_unix_listener(index).ok().flatten() } else { None };
            let open = match unix {
                Some(listener) => admin::Open::Unix(listener),
                None => {
                    let listener = given.take_tcp_listener(index).ok().flatten();
                    let problem = || format!("{} is not a TCP socket: set ListenStream= to a port", socket());
                    admin::Open::Tcp(listener.with_context(problem)?)
                }
            };
            let listens = SockRef::from(&open).is_listener().with_context(socket)?;
            ensure!(listens, "{} does not listen: remove Accept= from the socket unit", socket());
            match open {
                admin::Open::Tcp(listener) if name != ADMIN => inherited.public.push(listener),
                _ if inherited.admin.is_some() => {
                    anyhow::bail!("{} is the second socket of this name: keep one", socket())
                }
                open => inherited.admin = Some(open),
            }
        }
        Ok(inherited)
    }

    /// Checks the addresses, which systemd chose, against the settings.
    pub fn check(&self, settings: &Settings) -> io::Result<Vec<SettingError>> {
        let mut problems = Vec::new();
        for listener in &self.public {
            problems.extend(settings.public_problem(listener.local_addr()?));
        }
        if let Some(admin::Open::Tcp(listener)) = &self.admin {
            problems.extend(settings.admin_problem(listener.local_addr()?));
        }
        let setting = || "a socket from systemd".to_owned();
        Ok(problems.into_iter().map(|problem| SettingError { setting: setting(), problem }).collect())
    }
}

/// Why no listener can be bound to this address, and what to do (bind(2)).
fn unusable(setting: &str, addr: &impl fmt::Display, error: &io::Error) -> anyhow::Error {
    let addr = addr.to_string();
    let port = addr.rsplit_once(':').map_or("", |(_, port)| port);
    let remedy = match (Errno::from_io_error(error), addr.strip_prefix("unix:")) {
        (Some(Errno::ADDRINUSE), Some(_)) => {
            "another process listens there, or the file is not a socket: use another path".into()
        }
        (Some(Errno::ADDRINUSE), None) => {
            format!("use another port, or stop the process that `ss -ltnp 'sport = :{port}'` shows")
        }
        (Some(Errno::ACCESS | Errno::PERM), None) => {
            "ports below 1024 need CAP_NET_BIND_SERVICE: use a port above, a proxy, or fanfare.socket of systemd".into()
        }
        (Some(Errno::ADDRNOTAVAIL), None) => {
            "no interface of this host has the address: `ip addr` shows those that it has".into()
        }
        (Some(Errno::AFNOSUPPORT), None) => "this host has no IPv6: use an IPv4 address".into(),
        (Some(Errno::NOENT), Some(_)) => "its directory must exist".into(),
        (Some(Errno::ACCESS), Some(_)) => "this process must be able to write to its directory".into(),
        _ => "see bind(2)".into(),
    };
    anyhow!("{setting} {addr} can't be used: {error}: {remedy}")
}

/// The open listeners of a node.
#[derive(Debug)]
pub struct Listeners {
    pub(crate) public: Vec<TcpListener>,
    /// Another process has the public listeners, too, and accepts what is queued when this one
    /// stops.
    pub(crate) shared: bool,
    pub(crate) admin: Option<admin::Listener>,
}

impl Listeners {
    /// Uses inherited sockets in place of `--listen` and `--admin`, and binds the others.
    pub fn open(settings: &Settings, inherited: Inherited) -> anyhow::Result<Listeners> {
        let shared = !inherited.public.is_empty();
        let public: anyhow::Result<_> = if shared {
            let adopt =
                |listener| accept::adopt(listener, settings).context("can't use a socket from systemd");
            inherited.public.into_iter().map(adopt).collect()
        } else {
            let bind = |addr: &SocketAddr| {
                accept::bind(*addr, settings).map_err(|error| unusable("--listen", addr, &error))
            };
            settings.listen.iter().map(bind).collect()
        };
        let admin = match inherited.admin {
            Some(open) => Some(admin::Listener::adopt(open)),
            None => admin::Listener::bind(&settings.admin)
                .map_err(|error| unusable("--admin", &settings.admin, &error))?,
        };
        Ok(Listeners { public: public?, shared, admin })
    }

    /// The public addresses, with the real port where the setting says 0.
    pub fn public(&self) -> io::Result<Vec<SocketAddr>> {
        self.public.iter().map(TcpListener::local_addr).collect()
    }

    /// The admin address, with the real port.
    pub fn admin(&self) -> io::Result<AdminAddr> {
        self.admin.as_ref().map_or(Ok(AdminAddr::Off), admin::Listener::addr)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remedy_follows_the_error_number() {
        for (addr, errno, part) in [
            ("127.0.0.1:80", Errno::ADDRINUSE, "stop the process that `ss -ltnp 'sport = :80'` shows"),
            ("[::1]:8080", Errno::ADDRINUSE, "'sport = :8080'"),
            ("127.0.0.1:80", Errno::ACCESS, "CAP_NET_BIND_SERVICE"),
            ("10.0.0.9:80", Errno::ADDRNOTAVAIL, "`ip addr` shows"),
            ("[::1]:80", Errno::AFNOSUPPORT, "IPv4"),
            ("unix:/a/b", Errno::ADDRINUSE, "use another path"),
            ("unix:/a/b", Errno::NOENT, "directory must exist"),
            ("unix:/a/b", Errno::ACCESS, "write to its directory"),
            ("127.0.0.1:80", Errno::MFILE, "see bind(2)"),
        ] {
            let text = unusable("--listen", &addr, &errno.into()).to_string();
            assert!(text.starts_with(&format!("--listen {addr} can't be used: ")), "{text}");
            assert!(text.contains(part), "{part}: {text}");
        }
    }
}
