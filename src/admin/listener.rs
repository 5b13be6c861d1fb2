//! The admin listener's socket: TCP or unix.

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use socket2::{Domain, SockAddr, SockRef, Socket, Type};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};

use crate::config::AdminAddr;

/// Mode of the socket file: owner and group may connect.
const UNIX_MODE: u32 = 0o660;
const BACKLOG: i32 = 128;

/// A bound admin listener. Dropping it removes the file of a unix socket.
#[derive(Debug)]
pub struct Listener {
    open: Open,
    /// Of a unix socket that this process has bound.
    file: Option<SocketFile>,
}

/// A listener registered with a tokio runtime.
#[derive(Debug)]
pub(super) enum Accepting {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// A listening socket, bound by this process or passed by systemd.
#[derive(Debug)]
pub enum Open {
    Tcp(std::net::TcpListener),
    Unix(std::os::unix::net::UnixListener),
}

impl AsFd for Open {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Open::Tcp(listener) => listener.as_fd(),
            Open::Unix(listener) => listener.as_fd(),
        }
    }
}

pub(super) trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

impl Listener {
    /// `None` with `--admin off`.
    pub fn bind(addr: &AdminAddr) -> io::Result<Option<Listener>> {
        let (open, file) = match addr {
            AdminAddr::Off => return Ok(None),
            AdminAddr::Tcp(addr) => (Open::Tcp(std::net::TcpListener::bind(addr)?), None),
            AdminAddr::Unix(path) => {
                let (listener, file) = bind_unix(path)?;
                (Open::Unix(listener), Some(file))
            }
        };
        Ok(Some(Listener { open, file }))
    }

    /// Wraps a socket passed by systemd.
    pub fn adopt(open: Open) -> Listener {
        Listener { open, file: None }
    }

    /// The bound address, with the port that the kernel chose for port 0.
    pub fn addr(&self) -> io::Result<AdminAddr> {
        match (&self.open, &self.file) {
            (Open::Tcp(listener), _) => listener.local_addr().map(AdminAddr::Tcp),
            (Open::Unix(_), Some(file)) => Ok(AdminAddr::Unix(file.path.clone())),
            (Open::Unix(listener), None) => {
                let addr = listener.local_addr()?;
                Ok(AdminAddr::Unix(addr.as_pathname().unwrap_or(Path::new("")).into()))
            }
        }
    }

    /// Registers the socket with the current tokio runtime.
    pub(super) fn into_accepting(self) -> io::Result<(Accepting, Option<SocketFile>)> {
        SockRef::from(&self.open).set_nonblocking(true)?;
        let accepting = match self.open {
            Open::Tcp(listener) => Accepting::Tcp(TcpListener::from_std(listener)?),
            Open::Unix(listener) => Accepting::Unix(UnixListener::from_std(listener)?),
        };
        Ok((accepting, self.file))
    }
}

impl Accepting {
    /// Browsers can reach TCP alone.
    pub fn is_tcp(&self) -> bool {
        matches!(self, Accepting::Tcp(_))
    }

    pub async fn accept(&self) -> io::Result<Box<dyn Stream>> {
        match self {
            Accepting::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                stream.set_nodelay(true)?; // responses are written whole
                Ok(Box::new(stream))
            }
            Accepting::Unix(listener) => Ok(Box::new(listener.accept().await?.0)),
        }
    }
}

/// The file of a unix socket. Removed when dropped, unless another socket has replaced it.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let is_ours = |found: std::fs::Metadata| (found.dev(), found.ino()) == (self.device, self.inode);
        if std::fs::symlink_metadata(&self.path).is_ok_and(is_ours) {
            let _ = std::fs::remove_file(&self.path); // the next start removes a stale file
        }
    }
}

fn bind_unix(path: &Path) -> io::Result<(std::os::unix::net::UnixListener, SocketFile)> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    let addr = SockAddr::unix(path)?;
    if let Err(error) = socket.bind(&addr) {
        if error.kind() != ErrorKind::AddrInUse || !remove_stale(path)? {
            return Err(error);
        }
        socket.bind(&addr)?;
    }
    let found = std::fs::symlink_metadata(path)?;
    let file = SocketFile { path: path.into(), device: found.dev(), inode: found.ino() };
    // Before listen(2): until then no client can connect.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(UNIX_MODE))?;
    socket.listen(BACKLOG)?;
    Ok((socket.into(), file))
}

/// Removes a socket file that no process listens on. Any other file stays.
fn remove_stale(path: &Path) -> io::Result<bool> {
    if !std::fs::symlink_metadata(path)?.file_type().is_socket() {
        return Ok(false);
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path)?;
            Ok(true)
        }
        _ => Ok(false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory(test: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("fanfare-{}-{test}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        path
    }

    fn bind(path: &Path) -> io::Result<Listener> {
        Listener::bind(&AdminAddr::Unix(path.into())).map(Option::unwrap)
    }

    #[test]
    fn removes_its_unix_socket() {
        let directory = directory("private");
        let path = directory.join("admin.sock");
        let listener = bind(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
        assert_eq!(listener.addr().unwrap(), AdminAddr::Unix(path.clone()));
        assert_eq!(bind(&path).unwrap_err().kind(), ErrorKind::AddrInUse, "somebody listens");
        assert!(path.exists());
        drop(listener);
        assert!(!path.exists());
        std::fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn replaces_only_stale_sockets() {
        let directory = directory("stale");
        let path = directory.join("admin.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap()); // std leaves the file
        assert!(path.exists());
        drop(bind(&path).unwrap());

        std::fs::write(&path, "precious").unwrap();
        assert_eq!(bind(&path).unwrap_err().kind(), ErrorKind::AddrInUse);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
        std::fs::remove_file(&path).unwrap();

        let first = bind(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let second = bind(&path).unwrap();
        drop(first);
        assert!(path.exists(), "the file belongs to the second by now");
        drop(second);
        std::fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn reports_the_bound_port() {
        let listener = Listener::bind(&AdminAddr::Tcp("127.0.0.1:0".parse().unwrap())).unwrap().unwrap();
        let AdminAddr::Tcp(addr) = listener.addr().unwrap() else { panic!("a TCP address") };
        assert_ne!(addr.port(), 0);
        assert!(Listener::bind(&AdminAddr::Off).unwrap().is_none());
    }
}
