//! Whether the node takes clients: what `/readyz` answers.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

#[derive(Debug, Default)]
pub struct Readiness {
    draining: AtomicBool,
    memory_pressure: AtomicU32,
    memory_short: AtomicBool,
    bus_problem: Mutex<Option<String>>,
    unavailable_primaries: Mutex<Option<String>>,
    commands_pending: AtomicBool,
}

impl Readiness {
    /// Not ready until [`Readiness::set_bus`] says so.
    pub fn waiting_for_bus(reason: String) -> Readiness {
        let readiness = Readiness::default();
        readiness.set_bus(Some(reason));
        readiness.commands_pending.store(true, Ordering::Relaxed);
        readiness
    }

    /// `None` when the bus works, else why it does not.
    pub fn set_bus(&self, problem: Option<String>) {
        *self.bus_problem.lock().expect("nothing panics while holding it") = problem;
    }

    /// The primaries of a Redis Cluster that are away while others work, and why.
    pub fn set_unavailable_primaries(&self, primaries: Option<String>) {
        *self.unavailable_primaries.lock().expect("nothing panics while holding it") = primaries;
    }

    /// What is wrong although the node is ready.
    pub fn unavailable_primaries(&self) -> Option<String> {
        self.unavailable_primaries.lock().expect("nothing panics while holding it").clone()
    }

    /// The node follows the commands of backends from now on, and knows the bans.
    pub fn follow_commands(&self) {
        self.commands_pending.store(false, Ordering::Release);
    }

    /// Whether it does not do so yet, since it has just started.
    pub fn are_commands_pending(&self) -> bool {
        self.commands_pending.load(Ordering::Acquire)
    }

    /// Marks the node as stopping. Clients that still come are accepted until the drain starts.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// How many times buffers are halved, since memory is short.
    pub fn memory_pressure(&self) -> u32 {
        self.memory_pressure.load(Ordering::Relaxed)
    }

    /// Called by the accept loop alone.
    pub fn set_memory_pressure(&self, halvings: u32) {
        self.memory_pressure.store(halvings, Ordering::Relaxed);
    }

    /// Whether new connections are rejected, since memory is short.
    pub fn is_memory_short(&self) -> bool {
        self.memory_short.load(Ordering::Relaxed)
    }

    /// Called by the accept loop alone.
    pub fn set_memory_short(&self, is_short: bool) {
        self.memory_short.store(is_short, Ordering::Relaxed);
    }

    /// `None` when ready, else the reason in a few words.
    pub fn not_ready_reason(&self) -> Option<String> {
        if self.is_draining() {
            return Some("this node is stopping".into());
        }
        self.bus_problem.lock().expect("nothing panics while holding it").clone()
    }
}
