//! A memory cgroup for one test, version 1 or 2.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// Mount points of hierarchies with a memory controller, and the names of the files that hold the
/// limit and the count of kills.
const KINDS: [(&str, &str, &str); 2] = [
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.oom_control"),
    ("/sys/fs/cgroup", "memory.max", "memory.events"),
];

/// A cgroup with a memory limit. Dropping it removes it; its processes must have exited.
pub struct Cgroup {
    path: PathBuf,
    kills: &'static str,
}

impl Cgroup {
    /// Creates a cgroup with this limit. Prints a warning and returns `None` where that is not
    /// permitted, for example without root.
    pub fn new(bytes: u64) -> Option<Cgroup> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        for (mount, limit, kills) in KINDS {
            let path = Path::new(mount).join(format!("fanfare-test-{}-{number}", std::process::id()));
            if fs::create_dir(&path).is_err() {
                continue;
            }
            let group = Cgroup { path, kills };
            if fs::write(group.path.join(limit), bytes.to_string()).is_ok() {
                return Some(group);
            }
        }
        eprintln!("NOT TESTED: no memory cgroup can be made here; run as root with a memory controller");
        None
    }

    /// The file to which process ids are written to move them into the cgroup.
    pub fn processes(&self) -> PathBuf {
        self.path.join("cgroup.procs")
    }

    /// The number of processes that the kernel has killed for lack of memory.
    pub fn kills(&self) -> u64 {
        let text = fs::read_to_string(self.path.join(self.kills)).expect("the cgroup is there");
        let count = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        count.and_then(|count| count.parse().ok()).unwrap_or_else(|| panic!("no oom_kill in {text}"))
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        for _ in 0..100 {
            if fs::remove_dir(&self.path).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20)); // until the kernel has removed its processes
        }
    }
}
