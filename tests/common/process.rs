//! A child process that ends with its owner, and what it wrote.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::until;

/// A running program. Dropping it kills it; when that happens in a failing test, its output is shown.
pub struct Process {
    name: String,
    child: Mutex<Child>,
    output: Arc<Mutex<Vec<String>>>,
}

impl Process {
    /// Starts it, with what it writes to stdout and stderr gathered line by line.
    pub fn start(name: &str, command: &mut Command) -> Process {
        Process::spawn(name, command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()))
    }

    /// Starts it with the streams that the command has; what it writes to pipes is gathered.
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

    /// The first line for which `pick` gives something; waits for it while the process lives.
    pub async fn line<T>(&self, what: &str, pick: impl Fn(&str) -> Option<T>) -> Result<T, String> {
        until(what, || async {
            let ended = self.exit_status(); // looked at first, so that its last words are not missed
            if let Some(found) = self.output().iter().find_map(|line| pick(line)) {
                return Some(Ok(found));
            }
            ended.map(|status| Err(format!("{} ended: {status}\n{}", self.name, self.output().join("\n"))))
        })
        .await
    }

    /// What it wrote so far; lines from stderr begin with `! `.
    pub fn output(&self) -> Vec<String> {
        self.output.lock().expect("nothing panics while holding it").clone()
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.lock().expect("nothing panics while holding it").id()
    }

    /// How it ended, if it has.
    pub fn exit_status(&self) -> Option<ExitStatus> {
        let mut child = self.child.lock().expect("nothing panics while holding it");
        child.try_wait().expect("a child can be asked")
    }

    /// Waits for its end.
    pub async fn ended(&self) -> ExitStatus {
        until(&format!("the end of {}", self.name), || async { self.exit_status() }).await
    }

    /// Sends it a signal by name: `TERM`, `STOP`, `CONT`.
    pub fn signal(&self, signal: &str) {
        let status = Command::new("kill").args([&format!("-{signal}"), &self.pid().to_string()]).status();
        assert!(status.expect("kill is there").success(), "can't send {signal} to {}", self.name);
    }

    /// Asks it to end, and gives it a few seconds: for programs whose children would outlive them when killed.
    pub fn end(&self) {
        let deadline = Instant::now() + Duration::from_secs(5);
        if self.exit_status().is_none() {
            self.signal("TERM");
        }
        while self.exit_status().is_none() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Ends it at once, as a crash would, and waits until it is gone.
    pub fn kill(&self) {
        let mut child = self.child.lock().expect("nothing panics while holding it");
        let _ = child.kill(); // it may have ended by itself
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

/// Makes a FIFO, which nobody writes to.
pub fn make_fifo(path: &Path) {
    let made = Command::new("mkfifo").arg(path).status().expect("coreutils are there");
    assert!(made.success(), "no FIFO at {}", path.display());
}

/// A directory of one test's own, removed with it.
pub struct Directory(PathBuf);

impl Directory {
    /// Makes a new, empty one.
    pub fn new() -> Directory {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("fanfare-test-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a temporary directory can be made");
        Directory(path)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Removes what is in it.
    pub fn empty(&self) {
        std::fs::remove_dir_all(&self.0).expect("the directory is ours");
        std::fs::create_dir_all(&self.0).expect("the directory is ours");
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0); // what is left over in /tmp hurts nobody
    }
}
