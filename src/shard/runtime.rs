//! The runtime of a thread that serves sockets, and what it watches beside tokio's own types.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use mio::unix::SourceFd;
use mio::{Registry, Token};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::runtime::{Builder, Runtime};

/// Events that it takes at once. A thread has few: an epoll set or some listeners, the runtime's waker, signals.
const EVENTS: usize = 16;

/// A current-thread runtime without timers.
pub(crate) fn build() -> io::Result<Runtime> {
    Builder::new_current_thread().enable_io().max_io_events_per_tick(EVENTS).build()
}

/// Has the current runtime watch a descriptor for being readable.
#[expect(
    deprecated,
    reason = "AsyncFd::register is unsafe: its descriptor must stay open. The owners here keep theirs until dropped"
)]
pub(crate) fn watch<T: AsRawFd>(owner: T) -> io::Result<AsyncFd<T>> {
    AsyncFd::with_interest(owner, Interest::READABLE)
}

/// A periodic timer that is a descriptor (timerfd_create(2)). A timer of tokio's wakes its thread up to three times in a
/// period: when it is set, when it moves down in the timer wheel, and when it is due.
#[derive(Debug)]
pub(crate) struct Ticker(File);

impl Ticker {
    /// Ticks for the first time after one period.
    pub fn new(period: Duration) -> io::Result<Ticker> {
        let fd: OwnedFd =
            timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        let period = Timespec::try_from(period).map_err(io::Error::other)?;
        let timer = Itimerspec { it_interval: period, it_value: period };
        timerfd_settime(&fd, TimerfdTimerFlags::empty(), &timer)?;
        Ok(Ticker(fd.into()))
    }

    /// Has epoll report ticks with this token.
    pub fn register(&self, registry: &Registry, token: Token) -> io::Result<()> {
        registry.register(&mut SourceFd(&self.0.as_raw_fd()), token, mio::Interest::READABLE)
    }

    /// Whether it has ticked since the last call. Ticks that were missed count once.
    pub fn has_ticked(&self) -> io::Result<bool> {
        match (&self.0).read(&mut [0; size_of::<u64>()]) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error),
        }
    }
}

impl AsRawFd for Ticker {
    fn as_raw_fd(&self) -> i32 {
        self.0.as_raw_fd()
    }
}
