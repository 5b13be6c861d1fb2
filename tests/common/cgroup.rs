//! A memory cgroup of one test, version 1 or 2.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// Where the hierarchies are mounted that have a memory controller, and the names of the limit and of the file that counts
/// kills.
const KINDS: [(&str, &str, &str); 2] = [
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.oom_control"),
    ("/sys/fs/cgroup", "memory.max", "memory.events"),
];

/// A cgroup with a memory limit. Dropping it removes it, after its processes.
pub struct Cgroup {
    path: PathBuf,
    kills: &'static str,
}

impl Cgroup {
    /// Makes one with this limit. `None` where that is not allowed, as for other users than root: says so loudly.
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

    /// The file that takes the ids of processes to be moved into it.
    pub fn processes(&self) -> PathBuf {
        self.path.join("cgroup.procs")
    }

    /// Processes that the kernel has killed in it for want of memory.
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
            std::thread::sleep(Duration::from_millis(20)); // until the kernel has cleared up after its processes
        }
    }
}
