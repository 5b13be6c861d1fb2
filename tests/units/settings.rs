//! The binary's settings: what it prints and rejects, and that it opens nothing before all settings
//! are valid.

use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

use crate::common::process::{Directory, Process, make_fifo};
use crate::common::{DEADLINE, within};

fn fanfare(args: &[&str], env: &[(&str, &str)]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fanfare"));
    command.env_clear().envs(env.iter().copied()).args(args);
    command
}

/// Runs it until it exits. With wrongly accepted settings it would serve for ever: then the test
/// fails.
async fn run(args: &[&str], env: &[(&str, &str)]) -> Output {
    let mut command = fanfare(args, env);
    let output = tokio::task::spawn_blocking(move || command.output().expect("the binary can be run"));
    within(&format!("the end of fanfare {args:?}"), async { output.await.expect("no panic") }).await
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).expect("UTF-8")
}

#[test]
fn wrong_settings_exit_with_2_even_on_a_full_disk() {
    for args in [&["--bogus"][..], &["token", "--user", "a", "--jwt-key", "/nope"], &["doctor", "--bogus"]] {
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").expect("Linux has it");
        let status = fanfare(args, &[]).stderr(full).status().expect("the binary can be run");
        assert_eq!(status.code(), Some(2), "{args:?}: systemd would start it again and again");
    }
}

#[tokio::test]
async fn help_and_version_go_to_stdout() {
    let help = run(&["--help"], &[]).await;
    assert!(help.status.success() && help.stderr.is_empty());
    let flags: Vec<_> = text(&help.stdout).lines().filter(|line| line.starts_with("  --")).collect();
    for name in [
        "listen",
        "admin",
        "allow-anonymous",
        "jwt-key",
        "admin-key",
        "client-publish",
        "allow-origin",
        "trusted-proxy",
        "redis",
        "redis-prefix",
        "redis-durable",
        "pubsub-channels",
        "max-connections",
        "max-connections-per-ip",
        "max-connections-per-user",
        "max-channels",
        "max-subscriptions",
        "drain-timeout",
        "drain-delay",
        "shards",
        "history",
        "history-bytes",
        "history-ttl",
        "buffer-memory",
        "ping-interval",
        "ping-timeout",
        "ping-format",
        "max-message-size",
        "max-message-rate",
        "max-byte-rate",
        "publish-timeout",
        "log",
        "log-format",
    ] {
        let variable = format!(" FANFARE_{}", name.to_uppercase().replace('-', "_"));
        let is_its = |line: &&&str| line.starts_with(&format!("  --{name} ")) && line.ends_with(&variable);
        let lines: Vec<_> = flags.iter().filter(is_its).collect();
        assert_eq!(lines.len(), 1, "--{name} and {variable} in:\n{}", text(&help.stdout));
    }
    for flag in ["--version", "-V", "version"] {
        let version = run(&[flag], &[]).await;
        assert!(version.status.success());
        assert_eq!(text(&version.stdout), concat!("fanfare ", env!("CARGO_PKG_VERSION"), "\n"));
    }
    assert_eq!(run(&["help"], &[]).await.stdout, help.stdout);
}

#[tokio::test]
async fn help_fits_80_columns() {
    let help = run(&["help"], &[]).await;
    let usage = text(&help.stdout).lines().skip_while(|line| !line.starts_with("Usage: "));
    let usage: Vec<_> = usage.take_while(|line| !line.is_empty()).collect();
    let named = |line: &&str| line.split_once(" fanfare ")?.1.split(' ').next().map(str::to_owned);
    let commands: Vec<_> = usage.iter().filter_map(named).filter(|name| name != "help").collect();
    assert!(commands.contains(&"token".to_owned()) && commands.contains(&"doctor".to_owned()), "{usage:?}");
    let mut texts = vec![text(&help.stdout).to_owned()];
    for command in commands.iter().filter(|name| !name.starts_with('[')) {
        let help = run(&["help", command], &[]).await;
        assert!(help.status.success() && help.stderr.is_empty(), "{help:?}");
        assert!(text(&help.stdout).contains(&format!("fanfare {command}")), "{help:?}");
        assert_eq!(run(&[command, "--help"], &[]).await.stdout, help.stdout);
        texts.push(text(&help.stdout).to_owned());
    }
    for line in texts.iter().flat_map(|text| text.lines()) {
        assert!(line.chars().count() <= 80, "{} columns: {line}", line.chars().count());
    }
}

#[tokio::test]
async fn unknown_commands_exit_with_2() {
    let output = run(&["docter"], &[]).await;
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert!(text(&output.stderr).contains("did you mean doctor?"), "{output:?}");
}

#[tokio::test]
async fn check_prints_settings_and_opens_nothing() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let listen = taken.local_addr().expect("bound").to_string();
    let directory = Directory::new();
    let socket = directory.path().join("admin.sock");
    let admin = format!("--admin=unix:{}", socket.display());
    let env = [("FANFARE_REDIS", "redis://ann:hunter2@127.0.0.1:1/3"), ("FANFARE_HISTORY", "5000")];
    let output = run(&["--check", "--listen", &listen, &admin, "--ping-interval", "60s"], &env).await;
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    let printed = text(&output.stdout);
    for line in [
        format!("FANFARE_LISTEN={listen}").as_str(),
        "FANFARE_REDIS=redis://ann:***@127.0.0.1:1/3",
        "FANFARE_HISTORY=5000",
        "FANFARE_PING_INTERVAL=1m",
        "FANFARE_MAX_MESSAGE_SIZE=64KiB",
    ] {
        assert!(printed.lines().any(|found| found == line), "{line} is not in\n{printed}");
    }
    assert!(!printed.contains("hunter2"));
    assert!(!socket.exists());

    // The output is an environment file with the same meaning.
    let pairs: Vec<_> = printed.lines().filter_map(|line| line.split_once('=')).collect();
    let again = run(&["--check"], &pairs).await;
    assert_eq!(text(&again.stdout), printed);
}

#[tokio::test]
async fn all_wrong_settings_are_reported_at_once() {
    let directory = Directory::new();
    let socket = directory.path().join("admin.sock");
    let admin = format!("--admin=unix:{}", socket.display());
    let args =
        [admin.as_str(), "--ping-interval", "0s", "--listn", "127.0.0.1:0", "--redis", "redis://:hunter2@"];
    for check in [&[][..], &["--check"]] {
        let args = [&args[..], check].concat();
        let output = run(&args, &[("FANFARE_SHARDS", "lots"), ("FANFARE_LOG_FROMAT", "json")]).await;
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        assert!(output.stdout.is_empty());
        let errors = text(&output.stderr);
        for part in [
            "5 settings are wrong",
            "  --ping-interval: ",
            "  --listn: there is no such flag; did you mean --listen?",
            "  --redis: ",
            "  FANFARE_SHARDS: ",
            "  FANFARE_LOG_FROMAT: there is no such setting; did you mean FANFARE_LOG_FORMAT?",
        ] {
            assert!(errors.contains(part), "{part} is not in\n{errors}");
        }
        assert!(!errors.contains("hunter2"));
        assert!(!socket.exists());
    }
}

#[tokio::test]
async fn address_in_use_exits_with_1_and_names_it() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let addr = taken.local_addr().expect("bound").to_string();
    for args in [["--listen", &addr, "--admin", "off"], ["--listen", "127.0.0.1:0", "--admin", &addr]] {
        let output = run(&args, &[]).await;
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(text(&output.stderr).contains(&addr), "{output:?}");
    }
}

#[tokio::test]
async fn ready_line_shows_ports_and_admin_socket() {
    let directory = Directory::new();
    let socket = directory.path().join("admin.sock");
    let admin = format!("unix:{}", socket.display());
    let args = ["--listen", "127.0.0.1:0,127.0.0.1:0", "--admin", &admin, "--shards", "1"];
    let process = Process::start("fanfare", &mut fanfare(&args, &[]));
    let is_ready_line = |line: &str| line.contains(" serving ").then(|| line.to_owned());
    let line = process.line("the ready line", is_ready_line).await.expect("it serves");
    assert!(line.contains(&admin), "{line}");
    let is_port = |word: &str| word.strip_prefix("http://").map(|addr| addr.trim_end_matches('/').to_owned());
    let (addresses, open) = line.split_once(" (").expect("the admin address in brackets");
    let ports: Vec<_> = addresses.split(' ').filter_map(is_port).collect();
    assert_eq!(ports.len(), 2, "{line}");
    assert!(ports[0] != ports[1] && open.ends_with(&format!("open http://{}/", ports[0])), "{line}");
    for addr in &ports {
        let mut stream = TcpStream::connect(addr).await.expect("it listens");
        assert!(healthz(&mut stream).await.starts_with("HTTP/1.1 200 "));
    }
    let mode = std::fs::metadata(&socket).expect("the socket is there").permissions().mode();
    assert_eq!(mode & 0o777, 0o660);
    let mut stream = UnixStream::connect(&socket).await.expect("it listens");
    assert!(healthz(&mut stream).await.starts_with("HTTP/1.1 200 "));

    process.signal("TERM");
    assert!(process.ended().await.success());
    assert!(!socket.exists());
}

async fn healthz(stream: &mut (impl AsyncReadExt + AsyncWriteExt + Unpin)) -> String {
    let request = b"GET /healthz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
    stream.write_all(request).await.expect("the request can be sent");
    let mut answer = String::new();
    let read = tokio::time::timeout(DEADLINE, stream.read_to_string(&mut answer)).await;
    read.expect("an answer in time").expect("a whole answer");
    answer
}

#[tokio::test]
async fn unsafe_listeners_and_keys_are_rejected() {
    let directory = Directory::new();
    let (key, short) = (directory.path().join("key"), directory.path().join("short"));
    std::fs::write(&key, "0123456789abcdef").expect("a file");
    std::fs::write(&short, "0123456789abcde\n").expect("a file");
    let (long, fifo) = (directory.path().join("long"), directory.path().join("fifo"));
    std::fs::write(&long, "k".repeat(70_000)).expect("a file");
    make_fifo(&fifo);
    let (key, short) = (key.to_str().expect("UTF-8"), short.to_str().expect("UTF-8"));
    let (long, fifo) = (long.to_str().expect("UTF-8"), fifo.to_str().expect("UTF-8"));
    for (args, part) in [
        (&["--listen", "0.0.0.0:0"][..], "--listen: 0.0.0.0:0 is reachable from other hosts"),
        (
            &["--allow-anonymous", "--listen", "0.0.0.0:0", "--admin", "0.0.0.0:0"],
            "--admin: 0.0.0.0:0 is reachable from other hosts",
        ),
        (&["--admin-key", short], "at least 16"),
        (&["--jwt-key", key], "at least 32"),
        (&["--jwt-key", "/nowhere"], "--jwt-key /nowhere: can't be opened"),
        (&["--admin-key", "/nowhere/at/all"], "--admin-key /nowhere/at/all: can't be opened"),
        (&["--admin-key", "/"], "--admin-key /: must be a regular file"),
        (&["--admin-key", "/dev/zero"], "--admin-key /dev/zero: must be a regular file"),
        (&["--admin-key", fifo], "must be a regular file"),
        (&["--admin-key", long], "too long"),
    ] {
        let output = run(args, &[]).await;
        assert_eq!(output.status.code(), Some(2), "{args:?}: {output:?}");
        assert!(text(&output.stderr).contains(part), "{part} is not in {output:?}");
        assert!(!text(&output.stderr).contains("0123456789"), "{output:?}");
    }
    let args =
        ["--check", "--allow-anonymous", "--listen", "0.0.0.0:0", "--admin", "[::]:0", "--admin-key", key];
    let output = run(&args, &[]).await;
    assert!(output.status.success(), "{output:?}");
    assert!(!text(&output.stdout).contains("0123456789"), "{output:?}");
}

#[tokio::test]
async fn soft_file_limit_is_raised() {
    let connections = |limits: &str| {
        let script = format!("{limits} && exec \"$0\" --check");
        let output = Command::new("sh").args(["-c", &script, env!("CARGO_BIN_EXE_fanfare")]).output();
        let output = output.expect("sh is there");
        let stdout = text(&output.stdout);
        let line = stdout.lines().find(|line| line.contains("FANFARE_MAX_CONNECTIONS")).map(str::to_owned);
        line.unwrap_or_else(|| panic!("{limits}: {stdout}{}", text(&output.stderr)))
    };
    let all = connections("ulimit -n 2000");
    assert_ne!(all, connections("ulimit -n 500"), "the limit is heeded");
    assert_eq!(all, connections("ulimit -Sn 500 && ulimit -Hn 2000"), "a shell's lower one is raised");
}
