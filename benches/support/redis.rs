//! A redis-server.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::process::{Cores, Place, Process};

/// A redis-server without persistence.
pub struct Redis {
    pub process: Process,
    pub version: String,
    port: u16,
}

impl Redis {
    /// Starts it, and waits until it answers.
    pub fn start(program: &str, cores: &Cores, place: Place) -> Result<Redis> {
        let shown = Command::new(program).arg("--version").output().with_context(|| program.to_owned())?;
        let shown = String::from_utf8(shown.stdout)?;
        let version = shown.split_whitespace().find_map(|word| word.strip_prefix("v="));
        let version = format!("Redis {}", version.with_context(|| shown.clone())?);
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
        let mut command = Command::new(program);
        command.args(["--bind", "127.0.0.1", "--port", &port.to_string()]);
        command.args(["--save", "", "--appendonly", "no"]).stdout(Stdio::null());
        let process = Process::start("Redis", cores, place, &mut command)?;
        let redis = Redis { process, version, port };
        let deadline = Instant::now() + Duration::from_secs(10);
        while redis.ping().is_err() {
            ensure!(Instant::now() < deadline, "{program} does not answer on port {port}");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(redis)
    }

    /// The URL for nodes and publishers.
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    fn ping(&self) -> Result<()> {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port))?;
        stream.set_read_timeout(Some(Duration::from_secs(1)))?;
        stream.write_all(b"PING\r\n")?;
        Ok(stream.read_exact(&mut [0; 7])?)
    }
}
