//! Every listener of a node: bound by itself, or opened by systemd and handed over (sd_listen_fds(3)).
//!
//! What systemd holds stays open while one process ends and the next starts, so whoever connects meanwhile waits
//! instead of being refused.

use std::io;
use std::net::SocketAddr;

use anyhow::{Context, ensure};
use listenfd::ListenFd;
use mio::net::TcpListener;
use socket2::SockRef;

use crate::admin;
use crate::config::{AdminAddr, SettingError, Settings};
use crate::node::accept;

/// The name that a socket for the admin listener has (`FileDescriptorName=`). Any other name is a public one.
const ADMIN: &str = "admin";

/// Sockets that were open before the process began.
#[derive(Debug, Default)]
pub struct Inherited {
    public: Vec<std::net::TcpListener>,
    admin: Option<admin::Open>,
}

impl Inherited {
    /// Those that the environment names (`LISTEN_FDS`, `LISTEN_PID`, `LISTEN_FDNAMES`). They can be taken once.
    ///
    /// # Errors
    /// When one of them is nothing to accept connections from.
    pub fn from_env() -> anyhow::Result<Inherited> {
        let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
        let mut names = names.split(':');
        let mut given = ListenFd::from_env();
        let mut inherited = Inherited::default();
        for place in 0..given.len() {
            let name = names.next().unwrap_or_default();
            let socket = || format!("socket {} ({name:?}) from systemd", place + 1);
            let unix = if name == ADMIN { given.take_unix_listener(place).ok().flatten() } else { None };
            let open = match unix {
                Some(listener) => admin::Open::Unix(listener),
                None => {
                    let listener = given.take_tcp_listener(place).ok().flatten();
                    let problem = || format!("{} is no TCP socket: give ListenStream= a port", socket());
                    admin::Open::Tcp(listener.with_context(problem)?)
                }
            };
            let listens = SockRef::from(&open).is_listener().with_context(socket)?;
            ensure!(listens, "{} does not listen: take Accept= out of the socket unit", socket());
            match open {
                admin::Open::Tcp(listener) if name != ADMIN => inherited.public.push(listener),
                _ if inherited.admin.is_some() => anyhow::bail!("{} is a second one of this name", socket()),
                open => inherited.admin = Some(open),
            }
        }
        Ok(inherited)
    }

    /// What the settings don't allow: they speak of addresses that systemd chooses here.
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

/// Every listener of a node, open.
#[derive(Debug)]
pub struct Listeners {
    pub(crate) public: Vec<TcpListener>,
    /// Others have the public ones too: who waits in them is theirs.
    pub(crate) shared: bool,
    pub(crate) admin: Option<admin::Listener>,
}

impl Listeners {
    /// Takes what was inherited, and binds what was not: public sockets stand for `--listen`, an admin one for
    /// `--admin`. Must be called within a tokio runtime.
    pub fn open(settings: &Settings, inherited: Inherited) -> anyhow::Result<Listeners> {
        let shared = !inherited.public.is_empty();
        let public: anyhow::Result<_> = if shared {
            let adopt =
                |listener| accept::adopt(listener, settings).context("a socket from systemd can't be used");
            inherited.public.into_iter().map(adopt).collect()
        } else {
            let bind = |addr: &SocketAddr| {
                accept::bind(*addr, settings).with_context(|| format!("--listen {addr} can't be bound"))
            };
            settings.listen.iter().map(bind).collect()
        };
        let admin = match inherited.admin {
            Some(open) => Some(admin::Listener::adopt(open)),
            None => admin::Listener::bind(&settings.admin)
                .with_context(|| format!("--admin {} can't be bound", settings.admin))?,
        };
        Ok(Listeners { public: public?, shared, admin })
    }

    /// The real addresses of the public ones.
    pub fn public(&self) -> io::Result<Vec<SocketAddr>> {
        self.public.iter().map(TcpListener::local_addr).collect()
    }

    /// The real address of the admin listener.
    pub fn admin(&self) -> io::Result<AdminAddr> {
        self.admin.as_ref().map_or(Ok(AdminAddr::Off), admin::Listener::addr)
    }
}
