//! A redis-server, and the part of its protocol that the benches use.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::process::{Cores, Process};

/// A redis-server without persistence.
pub struct Redis {
    pub process: Process,
    port: u16,
}

impl Redis {
    /// Starts it, on the servers' core or on the clients' cores, and waits until it answers.
    pub fn start(program: &str, cores: Option<&Cores>) -> Result<Redis> {
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
        let mut command = Command::new(program);
        command.args(["--bind", "127.0.0.1", "--port", &port.to_string()]);
        command.args(["--save", "", "--appendonly", "no"]).stdout(Stdio::null());
        let process = match cores {
            Some(cores) => Process::on_server_core("Redis", cores, &mut command)?,
            None => Process::beside_clients("Redis", &mut command)?,
        };
        let redis = Redis { process, port };
        let deadline = Instant::now() + Duration::from_secs(10);
        while redis.version().is_err() {
            ensure!(Instant::now() < deadline, "{program} does not answer on port {port}");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(redis)
    }

    /// The URL for nodes.
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// Opens a connection.
    pub fn connect(&self) -> Result<BufReader<TcpStream>> {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        Ok(BufReader::new(stream))
    }

    /// Its name and version.
    pub fn version(&self) -> Result<String> {
        let mut connection = self.connect()?;
        connection.get_mut().write_all(&command(&["INFO", "server"]))?;
        let info = reply(&mut connection)?;
        let version = info.lines().find_map(|line| line.strip_prefix("redis_version:"));
        Ok(format!("Redis {}", version.context("INFO without redis_version")?.trim()))
    }
}

/// Encodes a command in RESP.
pub fn command(words: &[&str]) -> Vec<u8> {
    let mut out = format!("*{}\r\n", words.len());
    for word in words {
        out.push_str(&format!("${}\r\n{word}\r\n", word.len()));
    }
    out.into_bytes()
}

/// Reads one reply: an integer, a status or a bulk string, as text.
pub fn reply(connection: &mut BufReader<TcpStream>) -> Result<String> {
    let mut line = String::new();
    ensure!(connection.read_line(&mut line)? > 0, "Redis closed the connection");
    let rest = line.get(1..).unwrap_or_default().trim_end();
    match line.as_bytes()[0] {
        b':' | b'+' => Ok(rest.to_owned()),
        b'$' => {
            let mut bulk = vec![0; rest.parse::<usize>()? + 2];
            connection.read_exact(&mut bulk)?;
            bulk.truncate(bulk.len() - 2);
            Ok(String::from_utf8(bulk)?)
        }
        _ => bail!("Redis says {line:?}"),
    }
}
