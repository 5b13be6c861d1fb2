//! The files in systemd/: they are valid, allow what the program does and little else, and name
//! settings that exist.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common;
use crate::common::process::{Directory, Process};
use crate::common::{Client, Redis, http, until};

fn unit(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("systemd").join(name)
}

fn text(name: &str) -> String {
    std::fs::read_to_string(unit(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// Runs systemd-analyze. Returns whether it succeeded, and its output.
fn systemd_analyze(args: &[&str]) -> (bool, String) {
    let output = Command::new("systemd-analyze").args(args).output();
    let output = output.expect("systemd-analyze is there: tests/run.sh installs it");
    let written = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&written).into_owned())
}

const SERVICES: [&str; 2] = ["fanfare.service", "fanfare@.service"];

#[test]
fn units_pass_systemd_analyze_verify() {
    // It checks that programs exist, and this one need not be installed.
    let directory = Directory::new();
    for name in [&SERVICES[..], &["fanfare.socket"]].concat() {
        let program = concat!("ExecStart=", env!("CARGO_BIN_EXE_fanfare"));
        let unit = text(name).replace("ExecStart=fanfare", program);
        std::fs::write(directory.path().join(name), unit).expect("the directory is ours");
    }
    for name in [&SERVICES[..], &["fanfare.socket"]].concat() {
        let path = directory.path().join(name).display().to_string();
        let (content, written) = systemd_analyze(&["verify", &path]);
        assert!(content && written.is_empty(), "{name}: {written}");
    }
}

#[test]
fn units_have_a_small_exposure() {
    for name in SERVICES {
        let path = unit(name).display().to_string();
        let (content, written) = systemd_analyze(&["security", "--offline=true", "--threshold=12", &path]);
        assert!(content, "{written}");
    }
}

#[test]
fn instance_unit_is_generated() {
    let made = Command::new(unit("make-instances.sh")).output().expect("it is executable");
    assert!(made.status.success(), "{made:?}");
    let made = String::from_utf8(made.stdout).expect("UTF-8");
    assert_eq!(text(SERVICES[1]), made, "systemd/make-instances.sh says how to make it again");
    assert!(made.contains("\nExecStart=fanfare --listen 127.0.0.1:%i --admin 127.0.0.2:%i\n"), "{made}");
    assert!(!made.contains("RuntimeDirectory"), "instances can't share one: {made}");
}

#[test]
fn units_protect_secrets() {
    for name in SERVICES {
        let text = text(name);
        let lines: Vec<&str> = text.lines().collect();
        for line in ["LimitCORE=0", "KeyringMode=private", "#MemoryMax=1G"] {
            assert!(lines.contains(&line), "{name} lacks {line}");
        }
    }
}

#[test]
fn flags_and_variables_in_units_exist() {
    let help = |args: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_fanfare")).args(args).output().expect("it runs");
        String::from_utf8(output.stdout).expect("UTF-8")
    };
    let help = help(&["help"]) + &help(&["help", "doctor"]);
    let known: BTreeSet<&str> = help.split_whitespace().collect();
    let mut found = 0;
    for name in [&SERVICES[..], &["fanfare.socket", "fanfare.env", "99-fanfare.conf"]].concat() {
        for word in text(name).split(|c: char| !c.is_ascii_alphanumeric() && !"-_".contains(c)) {
            if word.starts_with("--") && word != "--system" || word.starts_with("FANFARE_") {
                assert!(known.contains(word), "{name}: there is no {word}");
                found += 1;
            }
        }
    }
    assert!(found > 15, "only {found} were found: the files were not understood");
}

#[test]
fn sysctl_file_fits_every_amount_of_memory() {
    let text = text("99-fanfare.conf");
    let names = text.lines().filter_map(|line| line.split_once('=').filter(|_| !line.starts_with('#')));
    let names: Vec<_> = names.map(|(name, _)| name.trim()).collect();
    // Neither reserves memory. doctor computes those that do.
    assert_eq!(names, ["net.core.somaxconn", "net.ipv4.ip_local_port_range"]);
}

#[test]
fn example_environment_is_valid() {
    let directory = Directory::new();
    let key = directory.path().join("jwt.pem");
    std::fs::write(&key, "k".repeat(32)).expect("the directory is ours");
    // Including everything that is commented out.
    let text = text("fanfare.env").replace("/etc/fanfare/jwt.pem", &key.display().to_string());
    let lines = text.lines().map(|line| line.strip_prefix('#').unwrap_or(line));
    let variables: Vec<_> = lines.filter_map(|line| line.split_once('=')).collect();
    assert!(variables.len() > 3, "{variables:?}");
    let mut command = Command::new(env!("CARGO_BIN_EXE_fanfare"));
    let output = command.env_clear().envs(variables).arg("--check").output().expect("it runs");
    assert!(output.status.success(), "{output:?}");
}

fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

#[test]
fn files_of_the_debian_package_exist() {
    let manifest = std::fs::read_to_string(root("Cargo.toml")).expect("cargo has read it");
    let (_, deb) = manifest.split_once("[package.metadata.deb]\n").expect("settings of cargo-deb");
    let (_, assets) = deb.split_once("assets = [\n").expect("files");
    let assets = assets.lines().take_while(|line| *line != "]");
    let sources: Vec<_> =
        assets.filter_map(|line| line.trim().strip_prefix("[\"")?.split('"').next()).collect();
    assert!(sources.len() > 4, "{sources:?}");
    for source in sources.iter().filter(|source| !source.starts_with("target/")) {
        assert!(root(source.split('*').next().expect("a path")).exists(), "there is no {source}");
    }
    for script in ["packaging/postinst", "packaging/prerm"] {
        let text = std::fs::read_to_string(root(script)).expect("it is there");
        assert!(text.contains("\n#DEBHELPER#\n"), "{script} lacks the commands of cargo-deb");
    }
}

#[test]
fn container_image_can_be_built_and_started() {
    let dockerfile = std::fs::read_to_string(root("Dockerfile")).expect("it is there");
    let sent = std::fs::read_to_string(root(".dockerignore")).expect("it is there");
    let copied = dockerfile.lines().filter_map(|line| line.strip_prefix("COPY "));
    let copied = copied.filter(|paths| !paths.starts_with("--from"));
    let copied: Vec<_> =
        copied.flat_map(|paths| paths.rsplit_once(' ').expect("a target").0.split(' ')).collect();
    assert!(copied.contains(&"src") && copied.contains(&"Cargo.lock"), "{copied:?}");
    for path in copied {
        assert!(root(path).exists(), "there is no {path}");
        assert!(sent.lines().any(|line| line.strip_prefix('!') == Some(path)), "{path} is ignored");
    }
    let variables = dockerfile.lines().filter_map(|line| line.strip_prefix("ENV ")?.split_once('='));
    let directory = Directory::new();
    let key = directory.path().join("jwt.key");
    std::fs::write(&key, "k".repeat(32)).expect("the directory is ours");
    let mut command = Command::new(env!("CARGO_BIN_EXE_fanfare"));
    command.env_clear().envs(variables).arg("--check").arg("--jwt-key").arg(&key);
    let output = command.output().expect("it runs");
    assert!(output.status.success(), "{output:?}");
    let settings = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(settings.contains("0.0.0.0:8080"), "{settings}");
}

/// The system calls that the service may make: its groups, without those that are excluded again.
fn allowed() -> BTreeSet<String> {
    let mut allowed = BTreeSet::new();
    for line in text(SERVICES[0]).lines().filter_map(|line| line.strip_prefix("SystemCallFilter=")) {
        let (less, groups) = line.strip_prefix('~').map_or((false, line), |groups| (true, groups));
        for group in groups.split(' ') {
            for call in calls(group) {
                if less {
                    allowed.remove(&call);
                } else {
                    allowed.insert(call);
                }
            }
        }
    }
    allowed
}

fn calls(group: &str) -> BTreeSet<String> {
    let (content, written) = systemd_analyze(&["syscall-filter", group]);
    assert!(content, "{group}: {written}");
    let names = written.lines().skip(1).map(str::trim).filter(|line| !line.starts_with('#'));
    names
        .flat_map(|name| if name.starts_with('@') { calls(name) } else { [name.to_owned()].into() })
        .collect()
}

#[tokio::test]
async fn system_calls_pass_the_filter() {
    let allowed = allowed();
    assert!(allowed.contains("accept4") && !allowed.contains("mount"), "{allowed:?}");
    let directory = Directory::new();
    let trace = directory.path().join("trace");
    let redis = Redis::start(&[]).await;
    let key = directory.path().join("admin.key");
    std::fs::write(&key, "0123456789abcdef").expect("the directory is ours");
    let mut command = Command::new("strace"); // tests/run.sh installs it
    command.args(["-f", "-o"]).arg(&trace).arg(env!("CARGO_BIN_EXE_fanfare"));
    // By name, so that it must be resolved.
    let redis_url = format!("redis://localhost:{}", redis.port());
    command
        .args(["--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--redis", &redis_url])
        .arg("--admin-key");
    command
        .arg(&key)
        .args(["--drain-timeout", "1s"])
        .env("NOTIFY_SOCKET", "@nobody")
        .env("WATCHDOG_USEC", "1000000");
    let process = Process::start("strace", &mut command);
    let pick = |line: &str| {
        let (public, rest) = line.split_once(" serving http://")?.1.split_once("/ (admin http://")?;
        Some((public.parse().expect("an address"), rest.split_once('/')?.0.parse().expect("an address")))
    };
    let (public, admin) =
        process.line("the ready line", pick).await.unwrap_or_else(|ended| panic!("{ended}"));
    until("a node that is ready", || async {
        (http::request(public, "GET", "/readyz", &[], b"").await.status == 200).then_some(())
    })
    .await;
    // Everything it does: join, publish, metrics, a reload, a slow client, an exit.
    let mut client = Client::try_open(public, "alice", &common::Options::default()).await.expect("it serves");
    client.send("hi").await;
    client.next_event().await;
    let bearer = [("Authorization", "Bearer 0123456789abcdef")];
    for (method, path) in [("POST", "/publish"), ("GET", "/metrics"), ("GET", "/stats")] {
        let body: &[u8] = if method == "POST" { b"{}" } else { b"" };
        assert_eq!(http::request(admin, method, path, &bearer, body).await.status, 200);
    }
    let child = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", process.pid()));
    let child = child.expect("strace runs it").trim().to_owned();
    for signal in ["-HUP", "-TERM"] {
        assert!(Command::new("kill").args([signal, &child]).status().expect("kill is there").success());
    }
    assert_eq!(client.next_event().await.1, serde_json::json!({}));
    assert_eq!(client.expect_close().await.0, 1012);
    assert!(process.ended().await.success());

    let trace = std::fs::read_to_string(&trace).expect("strace wrote it");
    let calls: BTreeSet<&str> = trace.lines().filter_map(call).collect();
    assert!(calls.contains("epoll_wait") && calls.contains("sendto") && calls.len() > 25, "{calls:?}");
    // strace executes the program itself, before systemd's filter would apply.
    let rejected: Vec<_> = calls.into_iter().filter(|call| !allowed.contains(*call)).collect();
    assert!(rejected.is_empty(), "the service may not make these calls: {rejected:?}");
}

/// The call in a line of strace: `PID name(…`.
fn call(line: &str) -> Option<&str> {
    let rest = line.split_once(' ')?.1.trim_start();
    let name = rest.strip_prefix("<... ").map_or_else(|| rest.split('('), |rest| rest.split(' ')).next()?;
    name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_').then_some(name)
}
