//! A child process that is killed with its owner, and its output.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::until;

/// Where tests/examples.sh installs what programs need that are not in Rust.
pub fn installed(path: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("examples").join(path);
    assert!(path.exists(), "{} is missing: run tests/examples.sh", path.display());
    path
}

/// A running program. Dropping it kills it; in a failing test its output is printed.
pub struct Process {
    name: String,
    child: Mutex<Child>,
    output: Arc<Mutex<Vec<String>>>,
}

impl Process {
    /// Starts it. Its stdout and stderr are collected line by line.
    pub fn start(name: &str, command: &mut Command) -> Process {
        Process::spawn(name, command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()))
    }

    /// Starts it with the streams of the command. Output to pipes is collected.
    pub fn spawn(name: &str, command: &mut Command) -> Process {
        let mut child = command.spawn().unwrap_or_else(|error| panic!("can't start {name}: {error}"));
        let output = Arc::new(Mutex::new(Vec::new()));
        if let Some(stdout) = child.stdout.take() {
            gather("", stdout, output.clone());
        }
        if let Some(stderr) = child.stderr.take() {
            gather("! ", stderr, output.clone());
        }
        Process { name: name.into(), child: Mutex::new(child), output }
    }

    /// The first line for which `pick` returns a value. Waits for it while the process lives.
    pub async fn line<T>(&self, what: &str, pick: impl Fn(&str) -> Option<T>) -> Result<T, String> {
        until(what, || async {
            let ended = self.exit_status(); // checked first, so that the last lines are not missed
            if let Some(found) = self.output().iter().find_map(|line| pick(line)) {
                return Some(Ok(found));
            }
            ended.map(|status| Err(format!("{} ended: {status}\n{}", self.name, self.output().join("\n"))))
        })
        .await
    }

    /// The output so far. Lines of stderr start with `! `.
    pub fn output(&self) -> Vec<String> {
        self.output.lock().expect("nothing panics while holding it").clone()
    }

    pub fn pid(&self) -> u32 {
        self.child.lock().expect("nothing panics while holding it").id()
    }

    /// The exit status, if it has exited.
    pub fn exit_status(&self) -> Option<ExitStatus> {
        let mut child = self.child.lock().expect("nothing panics while holding it");
        child.try_wait().expect("a child can be asked")
    }

    /// Waits for its exit.
    pub async fn ended(&self) -> ExitStatus {
        until(&format!("the end of {}", self.name), || async { self.exit_status() }).await
    }

    /// Sends a signal by name: `TERM`, `STOP`, `CONT`.
    pub fn signal(&self, signal: &str) {
        let status = Command::new("kill").args([&format!("-{signal}"), &self.pid().to_string()]).status();
        assert!(status.expect("kill is there").success(), "can't send {signal} to {}", self.name);
    }

    /// Sends SIGTERM and waits a few seconds: for programs whose children would survive a SIGKILL
    /// of theirs.
    pub fn end(&self) {
        let deadline = Instant::now() + Duration::from_secs(5);
        if self.exit_status().is_none() {
            self.signal("TERM");
        }
        while self.exit_status().is_none() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Kills it, as in a crash, and waits for its exit.
    pub fn kill(&self) {
        let mut child = self.child.lock().expect("nothing panics while holding it");
        let _ = child.kill(); // it may have exited
        let _ = child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!("--- {} (pid {}) wrote:\n{}\n---", self.name, self.pid(), self.output().join("\n"));
        }
    }
}

fn gather(mark: &'static str, from: impl Read + Send + 'static, to: Arc<Mutex<Vec<String>>>) {
    std::thread::spawn(move || {
        for line in BufReader::new(from).split(b'\n').map_while(Result::ok) {
            let line = format!("{mark}{}", String::from_utf8_lossy(&line));
            to.lock().expect("nothing panics while holding it").push(line);
        }
    });
}

/// Makes a FIFO without a writer.
pub fn make_fifo(path: &Path) {
    let made = Command::new("mkfifo").arg(path).status().expect("coreutils are there");
    assert!(made.success(), "no FIFO at {}", path.display());
}

/// A temporary directory, removed when dropped.
pub struct Directory(PathBuf);

impl Directory {
    pub fn new() -> Directory {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("fanfare-test-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a temporary directory can be made");
        Directory(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Removes its content.
    pub fn empty(&self) {
        std::fs::remove_dir_all(&self.0).expect("the directory is ours");
        std::fs::create_dir_all(&self.0).expect("the directory is ours");
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0); // leftovers in /tmp are harmless
    }
}
