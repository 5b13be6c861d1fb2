//! Every code block of the README, CONTRIBUTING and docs/. Shell blocks are run line by line in the
//! order printed, starting with a clone and nothing installed. Other blocks are checked by the
//! program that reads them. What a test can't do is in the tables below, and a block that nothing
//! checks fails the test.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::path::Path;
use std::process::Command;

use crate::common::process::{Directory, Process};
use crate::common::{free_port, http, nginx, until};

/// Text that is replaced before a block is run. `{root}` is a directory that stands for `/`, the
/// numbers stand for free ports.
const REPLACED: &[(&str, &str)] = &[
    ("cargo run --release -- ", "target/release/fanfare "),
    ("cargo run --release", "target/release/fanfare"),
    ("sudo systemctl ", ": "), // systemd_units checks the units
    ("sudo sysctl ", ": "),
    ("systemctl ", ": "),
    ("sudo ", ""),
    ("curl ", "curl --silent --show-error --fail-with-body "),
    ("redis-server redis.conf", "redis-server redis.conf --port {6379}"),
    ("redis-server", "redis-server --port {6379}"),
    ("redis-cli", "redis-cli -e -p {6379}"),
    ("redis://10.0.0.5", "redis://127.0.0.1:{6379}"),
    ("redis://127.0.0.1", "redis://127.0.0.1:{6379}"),
    ("@127.0.0.1", "@127.0.0.1:{6379}"),
    ("127.0.0.1:8080", "127.0.0.1:{8080}"),
    ("127.0.0.1:8081", "127.0.0.1:{8081}"),
    ("127.0.0.1:9080", "127.0.0.1:{9080}"),
    ("127.0.0.1:9081", "127.0.0.1:{9081}"),
    ("10.0.0.11:8080", "127.0.0.1:{8080}"),
    ("/etc/", "{root}/etc/"),
    ("/run/fanfare/", "{root}/run/fanfare/"),
    ("/tmp/", "{root}/tmp/"),
    ("/usr/local/bin/", "{root}/usr/local/bin/"),
    ("listen 80 ", "listen 127.0.0.1:{8080} "), // nginx
    ("bind :80", "bind 127.0.0.1:{8080}"),      // HAProxy
];

/// Commands that are not run, by their first words, and what checks them instead.
const NOT_RUN: &[(&str, &str)] = &[
    ("tests/run.sh", "it runs this test"),
    ("tests/redis_servers.sh", "tests/run.sh runs it"),
    ("SOAK_SEED=7 tests/run.sh", "load::soak reads the variable"),
    (".ci/run", "it runs this test"),
    ("cargo build", "it built the binary under test"),
    ("cargo test", "it runs this test"),
    ("UPDATE_DOCS=1 cargo test --lib docs_have_every_setting", "that test fails where it is needed"),
    ("cargo bench", ".ci/run builds the benchmarks"),
    ("fanfare --redis redis-cluster://", "tests/bus/redis_cluster.rs starts nodes on a cluster"),
    ("fanfare bench", "cli::bench::arguments reads these commands, protocol::bench loads a node"),
    ("benches/peers/run", "it takes minutes, and servers of other kinds"),
    ("CENTRIFUGO_CLIENT_INSECURE=true", "Centrifugo is in no registry that tests use"),
    ("python3 benches/peers/pusher/sign.py", "it needs a Pusher server"),
    ("cargo +nightly fuzz", "units::fuzz_corpus runs the corpus"),
    ("cargo install", "tests/packages.sh installs fanfare; cargo-fuzz is for people"),
    ("docker ", "tests/packages.sh builds and starts the image where Docker runs"),
];

/// What runs before the first block of a page.
const RUNNING: &[(&str, &[&str])] = &[
    (
        "docs/admin-api.md",
        &["fanfare", "fanfare --listen 127.0.0.1:8081 --admin unix:/run/fanfare/admin.sock"],
    ),
    ("docs/client.md", &["fanfare"]),
    ("docs/redis.md", &["redis-server --save ''", "fanfare --redis redis://127.0.0.1"]),
];

/// Pages that install fanfare. On the others it is installed already.
const INSTALLING: [&str; 2] = ["README.md", "docs/deployment.md"];

/// Blocks of `text`, by what they contain, and what they are.
const TEXT: &[(&str, &str)] = &[
    ("│ shards, one per core:", "a drawing"),
    ("base <= N <= head", "a formula"),
    ("INFO request rejected", "a line of the log"),
    ("PROBLEM  open files", "a report, which cli::doctor::tests::docs_show_a_current_report compares"),
];

#[derive(Clone, Debug)]
struct Block {
    page: String,
    line: usize,
    language: String,
    text: String,
    /// The prose between the block before and this one.
    before: String,
}

impl Block {
    fn fail(&self, problem: impl Display) -> ! {
        let Block { page, line, .. } = self;
        panic!(
            "{page}, code block at line {line}: {problem}\n\n\
             A test runs or checks every code block of the documentation. Change the block, or add a line\n\
             to a table in tests/operations/code_blocks.rs if a test can't run it.\n"
        );
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn pages() -> Vec<String> {
    let docs = std::fs::read_dir(root().join("docs")).expect("it can be listed");
    let docs = docs.map(|entry| entry.expect("it can be listed").file_name().into_string().expect("UTF-8"));
    let docs = docs.filter(|name| name.ends_with(".md")).map(|name| format!("docs/{name}"));
    ["README.md".to_owned(), "CONTRIBUTING.md".to_owned()].into_iter().chain(docs).collect()
}

fn blocks(page: &str) -> Vec<Block> {
    let content = std::fs::read_to_string(root().join(page)).expect("pages are UTF-8");
    let (mut blocks, mut open, mut before) = (Vec::new(), None::<(Block, usize)>, String::new());
    for (at, line) in content.lines().enumerate() {
        let (fence, indent) = (line.trim_start().strip_prefix("```"), line.len() - line.trim_start().len());
        match (&mut open, fence) {
            (None, Some(language)) => {
                let before = std::mem::take(&mut before);
                let language = language.trim().to_owned();
                let block = Block { page: page.into(), line: at + 1, language, text: String::new(), before };
                open = Some((block, indent));
            }
            (Some(_), Some(_)) => blocks.extend(open.take().map(|(block, _)| block)),
            (Some((block, indent)), None) => {
                block.text += line.get(*indent..).unwrap_or_default();
                block.text += "\n";
            }
            (None, None) => {
                before += line;
                before += "\n";
            }
        }
    }
    assert!(open.is_none(), "{page}: a code block has no end");
    blocks
}

/// The commands of a shell block: its lines, with continued ones joined.
fn commands(block: &Block) -> Vec<String> {
    let joined = block.text.replace("\\\n", " ");
    let lines = joined.lines().map(|line| line.trim().to_owned());
    lines.filter(|line| !line.is_empty() && !line.starts_with('#')).collect()
}

/// The machine of a reader of one page, and what runs on it.
struct Reader {
    directory: Directory,
    ports: Vec<(&'static str, u16)>,
    running: Vec<(String, Process)>,
}

impl Reader {
    /// With a clone as the working directory, and nothing installed.
    fn new() -> Reader {
        let directory = Directory::new();
        let made = |path: &str| {
            let path = directory.path().join(path);
            std::fs::create_dir_all(&path).expect("the directory is ours");
            path
        };
        for path in ["etc/systemd/system", "etc/sysctl.d", "run/fanfare", "tmp", "usr/local/bin"] {
            made(path);
        }
        let clone = made("clone");
        for name in ["systemd", "docs", "examples", "fuzz"] {
            std::os::unix::fs::symlink(root().join(name), clone.join(name)).expect("the directory is ours");
        }
        let built = made("clone/target/release").join("fanfare");
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_fanfare"), built).expect("the directory is ours");
        let ports = ["6379", "8080", "8081", "9080", "9081"].map(|name| (name, free_port()));
        Reader { directory, ports: ports.into(), running: Vec::new() }
    }

    fn install(&self) {
        let installed = self.directory.path().join("usr/local/bin/fanfare");
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_fanfare"), installed).expect("the directory is ours");
    }

    /// A port by its usual number.
    fn port(&self, usual: &str) -> u16 {
        self.ports.iter().find(|(name, _)| *name == usual).expect("it has a free one").1
    }

    /// What is run instead of this text.
    fn replace(&self, text: &str) -> String {
        let (mut replaced, mut rest) = (String::new(), text);
        while let Some(first) = rest.chars().next() {
            let (from, to) = REPLACED
                .iter()
                .find(|(from, _)| rest.starts_with(from))
                .map_or((&rest[..first.len_utf8()], None), |(from, to)| (*from, Some(*to)));
            let mut to = to.unwrap_or(from).replace("{root}", &self.directory.path().display().to_string());
            for (usual, port) in &self.ports {
                to = to.replace(&format!("{{{usual}}}"), &port.to_string());
            }
            replaced += &to;
            rest = &rest[from.len()..];
        }
        replaced
    }

    fn shell(&self, script: &str) -> Command {
        let mut command = Command::new("bash");
        let installed = self.directory.path().join("usr/local/bin");
        let path = std::env::var("PATH").unwrap_or_default();
        command
            .args(["-euo", "pipefail", "-c", script])
            .current_dir(self.directory.path().join("clone"))
            .env_clear()
            .env("PATH", format!("{}:{path}", installed.display()))
            .env("HOME", self.directory.path())
            // The defaults, on free ports: flags replace them.
            .env("FANFARE_LISTEN", format!("127.0.0.1:{}", self.port("8080")))
            .env("FANFARE_ADMIN", format!("127.0.0.1:{}", self.port("9080")));
        command
    }

    /// Runs a command, or starts it if it runs until it is stopped.
    async fn run(&mut self, written: &str) -> Result<(), String> {
        let command = self.replace(written);
        let Some(ready) = ready_text(&command) else {
            let process = Process::start("bash", &mut self.shell(&command));
            let status = process.ended().await;
            let found_problems = command.contains("fanfare doctor ") && status.code() == Some(1);
            if status.success() || found_problems {
                return Ok(());
            }
            let output = process.output().join("\n");
            return Err(format!("{written}\nrun as\n{command}\nended with {status}:\n{output}"));
        };
        let command = command.trim_end_matches('&');
        let process = Process::start("bash", &mut self.shell(&format!("exec env {command}")));
        let line = process.line(written, |line| line.contains(ready).then(|| line.to_owned())).await;
        let line = line.map_err(|ended| format!("{written}\nrun as\n{command}\n{ended}"))?;
        if let Some((_, address)) = line.split_once(" serving http://") {
            let address = address.split('/').next().and_then(|address| address.parse().ok());
            let address = address.ok_or_else(|| format!("no address in {line}"))?;
            until("a node that is ready", || async {
                (http::request(address, "GET", "/readyz", &[], b"").await.status == 200).then_some(())
            })
            .await;
        }
        self.running.push((command.to_owned(), process));
        Ok(())
    }

    /// Ends the programs whose command contains this: by INT as Ctrl-C does, or by TERM, since programs
    /// started by a shell in the background may ignore INT.
    async fn stop(&mut self, name: &str, signal: &str) {
        while let Some(at) = self.running.iter().rposition(|(command, _)| command.contains(name)) {
            let (_, process) = self.running.remove(at);
            process.signal(signal);
            process.ended().await;
        }
    }

    /// Files in the clone that were not there at first.
    fn left_over(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.directory.path().join("clone")).expect("it can be listed");
        let names = entries.map(|entry| entry.expect("it can be listed").file_name());
        let names = names.map(|name| name.into_string().expect("UTF-8"));
        names.filter(|name| !["systemd", "docs", "examples", "fuzz", "target"].contains(&&**name)).collect()
    }
}

/// What a command that runs until it is stopped writes once it is ready.
fn ready_text(command: &str) -> Option<&'static str> {
    let mut words = command.split_whitespace().skip_while(|word| word.contains('=')).peekable();
    let program = words.next()?.trim_start_matches("target/release/");
    let mut has = |ends: &[&str]| words.any(|word| ends.contains(&word));
    match program {
        "fanfare" if !has(&["token", "doctor", "help", "version", "--check", "--help"]) => {
            Some(" serving http://")
        }
        "redis-server" => Some("Ready to accept connections"),
        "redis-cli" if has(&["SUBSCRIBE"]) => Some("subscribe"),
        _ => None,
    }
}

#[tokio::test]
async fn shell_blocks_run_in_order() {
    let (mut run, mut not_run) = (0, BTreeSet::new());
    for page in pages() {
        let blocks: Vec<_> = blocks(&page).into_iter().filter(|block| block.language == "sh").collect();
        let Some(first) = blocks.first() else { continue };
        let mut reader = Reader::new();
        if !INSTALLING.contains(&&*page) {
            reader.install();
        }
        for (_, commands) in RUNNING.iter().filter(|(name, _)| *name == page) {
            for command in *commands {
                reader.run(command).await.unwrap_or_else(|problem| first.fail(problem));
            }
        }
        for block in &blocks {
            check(block, &block.text, "sh", Command::new("bash").arg("-n"));
            if block.before.contains("Ctrl-C") {
                reader.stop("fanfare", "INT").await;
            }
            for command in commands(block) {
                if let Some((words, _)) = NOT_RUN.iter().find(|(words, _)| command.starts_with(words)) {
                    not_run.insert(*words);
                    continue;
                }
                run += 1;
                reader.run(&command).await.unwrap_or_else(|problem| block.fail(problem));
            }
        }
        reader.stop("", "TERM").await;
        for name in reader.left_over() {
            if !blocks.iter().any(|block| block.text.contains(&name)) {
                first.fail(format!("the commands of this page leave {name} in the working directory"));
            }
        }
    }
    assert!(run > 30, "only {run} commands were found");
    for (words, _) in NOT_RUN {
        assert!(not_run.contains(words), "no page has {words}: remove it from NOT_RUN");
    }
}

/// Runs a program on a file with this text. It must succeed.
fn check(block: &Block, text: &str, suffix: &str, command: &mut Command) {
    let directory = Directory::new();
    let file = directory.path().join(format!("block.{suffix}"));
    std::fs::write(&file, text).expect("the directory is ours");
    let path = std::env::var("PATH").unwrap_or_default();
    let command = command.arg(&file).current_dir(directory.path()).env("PATH", format!("{path}:/usr/sbin"));
    let output = command.output().unwrap_or_else(|error| {
        block.fail(format!("{command:?}: {error}; tests/run.sh installs missing programs"))
    });
    if !output.status.success() {
        let written = [output.stdout, output.stderr].concat();
        block.fail(format!("{command:?}:\n{}", String::from_utf8_lossy(&written)));
    }
}

const COMPILE: &str =
    "import ast, sys; compile(open(sys.argv[1]).read(), 'block', 'exec', ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)";

#[tokio::test]
async fn other_blocks_are_valid() {
    let mut texts = BTreeSet::new();
    for block in pages().iter().flat_map(|page| blocks(page)) {
        let reader = Reader::new();
        let text = reader.replace(&block.text);
        match &*block.language {
            "sh" => {} // shell_blocks_run_in_order
            "json" => {
                for value in block.text.lines() {
                    if let Err(error) = serde_json::from_str::<serde_json::Value>(value) {
                        block.fail(format!("{value}: {error}"));
                    }
                }
            }
            "js" => check(&block, &text, "mjs", Command::new("node").arg("--check")),
            "python" => check(&block, &text, "py", Command::new("python3").args(["-c", COMPILE])),
            "nginx" => {
                let text = nginx::whole(&text, &reader.directory);
                check(&block, &text, "conf", Command::new("nginx").args(["-e", "stderr", "-t", "-c"]));
            }
            "haproxy" => check(&block, &text, "cfg", Command::new("haproxy").args(["-c", "-f"])),
            "yaml" if text.starts_with("groups:") => {
                check(&block, &text, "yml", Command::new("promtool").args(["check", "rules"]));
            }
            "yaml" => {
                let mut promtool = Command::new("promtool");
                check(&block, &text, "yml", promtool.args(["check", "config", "--syntax-only"]));
            }
            "redis" => {
                std::fs::write(reader.directory.path().join("clone/redis.conf"), &text)
                    .expect("the directory is ours");
                let mut reader = reader;
                let started = reader.run("redis-server redis.conf").await;
                started.unwrap_or_else(|problem| block.fail(problem));
                reader.stop("", "TERM").await;
            }
            "text" => match TEXT.iter().find(|(part, _)| block.text.contains(part)) {
                Some((part, _)) => drop(texts.insert(*part)),
                None => block.fail("nothing checks this text: give it a language, or declare it in TEXT"),
            },
            other => block.fail(format!("no check for the language {other:?}: add it to this test")),
        }
    }
    for (part, _) in TEXT {
        assert!(texts.contains(part), "no page has {part:?}: remove it from TEXT");
    }
}
