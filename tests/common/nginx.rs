//! A real nginx in front of nodes, with the documented configuration.

use std::net::SocketAddr;
use std::process::Command;

use super::process::{Directory, Process};
use super::redis::free_port;

/// The page with the configuration: the documented one is tested.
const PAGE: &str = include_str!("../../docs/proxies.md");

/// An nginx on a free loopback port. Dropping it ends it and its workers.
pub struct Nginx {
    /// Where clients connect.
    pub addr: SocketAddr,
    directory: Directory,
    process: Process,
}

impl Nginx {
    /// Starts one in front of these nodes, and waits until it accepts connections.
    pub async fn before(nodes: &[SocketAddr]) -> Nginx {
        Nginx::start(nodes, " max_fails=0", true).await
    }

    /// With the kernel's default send buffers towards clients, which nginx uses unless configured
    /// otherwise.
    pub async fn with_large_buffers_before(nodes: &[SocketAddr]) -> Nginx {
        Nginx::start(nodes, " max_fails=0", false).await
    }

    /// With nginx's default rule: a node is taken out for 10 seconds after a single failed request.
    pub async fn unforgiving_before(nodes: &[SocketAddr]) -> Nginx {
        Nginx::start(nodes, "", true).await
    }

    async fn start(nodes: &[SocketAddr], rule: &str, limit_buffers: bool) -> Nginx {
        let directory = Directory::new();
        let addr = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let settings = directory.path().join("nginx.conf");
        std::fs::write(&settings, whole(&documented(nodes, rule, limit_buffers, addr), &directory))
            .expect("the directory is ours");
        let mut command = Command::new("nginx"); // in /usr/sbin, which users' PATH on Debian lacks
        command.env("PATH", format!("{}:/usr/sbin", std::env::var("PATH").unwrap_or_default()));
        command.arg("-c").arg(&settings).arg("-p").arg(directory.path()).args(["-e", "stderr"]);
        let process = Process::start("nginx", &mut command);
        let ready = |line: &str| line.contains("start worker process ").then_some(());
        process.line("nginx to start its workers", ready).await.unwrap_or_else(|ended| panic!("{ended}"));
        Nginx { addr, directory, process }
    }

    /// The error log so far. It names nodes that were taken out: `while connecting to upstream`,
    /// `upstream server temporarily disabled`, `no live upstreams`.
    pub fn errors(&self) -> Vec<String> {
        let lines = self.process.output();
        let is_notice = |line: &str| ["[notice]", "[info]"].iter().any(|level| line.contains(level));
        lines.into_iter().filter(|line| !is_notice(line)).collect()
    }

    /// A line for each finished request: its status, then the nodes that got it and their statuses.
    pub fn requests(&self) -> Vec<String> {
        let log = std::fs::read_to_string(self.directory.path().join("access.log"));
        log.expect("nginx makes it at its start").lines().map(str::to_owned).collect()
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        self.process.end(); // it ends its workers first, which SIGKILL would leave behind
    }
}

/// The documented block, with these nodes, this failure rule, with or without its buffer limit, and
/// this address.
fn documented(nodes: &[SocketAddr], rule: &str, limit_buffers: bool, addr: SocketAddr) -> String {
    let block = PAGE.split_once("```nginx\n").and_then(|(_, rest)| rest.split_once("```\n"));
    let (block, _) = block.expect("docs/proxies.md shows a configuration of nginx");
    let mut text = String::new();
    let (mut servers, mut listens) = (0, 0);
    for line in block.lines() {
        match line.trim_start().split_once(' ') {
            Some(("server", place)) if place.contains(';') => {
                assert!(place.contains(" max_fails=0;"), "another rule: {line}");
                servers += 1;
                if servers == 1 {
                    for node in nodes {
                        text += &format!("    server {node}{rule};\n");
                    }
                }
            }
            Some(("listen", options)) => {
                listens += 1;
                let buffer = " sndbuf=128k";
                assert!(options.contains(buffer), "another buffer size: {line}");
                text += &format!("    listen {addr}{};\n", if limit_buffers { buffer } else { "" });
            }
            _ => text += &format!("{line}\n"),
        }
    }
    assert_eq!((servers, listens), (2, 1), "the configuration was not understood:\n{block}");
    text
}

/// A complete configuration around it. Nothing is written outside the test's directory.
pub fn whole(documented: &str, directory: &Directory) -> String {
    // As root, nginx would run its workers as a user that may not enter the directory.
    let user = if rustix::process::geteuid().is_root() { "user root;" } else { "" };
    let path = directory.path().display();
    format!(
        "daemon off;\n\
         {user}\n\
         worker_processes 2;\n\
         pid {path}/nginx.pid;\n\
         error_log stderr notice;\n\
         events {{ worker_connections 4096; }}\n\
         http {{\n\
         log_format upstreams '$status $upstream_addr $upstream_status';\n\
         access_log {path}/access.log upstreams;\n\
         client_body_temp_path {path}/body;\n\
         proxy_temp_path {path}/proxy;\n\
         fastcgi_temp_path {path}/fastcgi;\n\
         uwsgi_temp_path {path}/uwsgi;\n\
         scgi_temp_path {path}/scgi;\n\
         {documented}\n\
         }}\n"
    )
}
