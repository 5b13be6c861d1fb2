//! The runtime of shards and accept loop, and descriptors that it watches beside tokio's own types.

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

/// Most events of one poll. There are few sources: an epoll set or some listeners, the runtime's
/// waker, signals.
const EVENTS: usize = 16;

/// A current-thread runtime without timers.
pub(crate) fn build() -> io::Result<Runtime> {
    Builder::new_current_thread().enable_io().max_io_events_per_tick(EVENTS).build()
}

/// Registers a descriptor with the current runtime, to wait until it is readable.
#[expect(
    deprecated,
    reason = "AsyncFd::register is unsafe: its descriptor must stay open. The owners here keep theirs until dropped"
)]
pub(crate) fn watch<T: AsRawFd>(owner: T) -> io::Result<AsyncFd<T>> {
    AsyncFd::with_interest(owner, Interest::READABLE)
}

/// A periodic timer, by timerfd_create(2). A timer of tokio wakes its thread up to three times per
/// period: when it is set, when it moves down in the timer wheel, and when it is due. With it an
/// idle shard used twice the CPU.
#[derive(Debug)]
pub(crate) struct Ticker(File);

impl Ticker {
    /// The first tick is due after one period.
    pub fn new(period: Duration) -> io::Result<Ticker> {
        let fd: OwnedFd =
            timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        let period = Timespec::try_from(period).map_err(io::Error::other)?;
        let timer = Itimerspec { it_interval: period, it_value: period };
        timerfd_settime(&fd, TimerfdTimerFlags::empty(), &timer)?;
        Ok(Ticker(fd.into()))
    }

    /// Ticks become events with this token.
    pub fn register(&self, registry: &Registry, token: Token) -> io::Result<()> {
        registry.register(&mut SourceFd(&self.0.as_raw_fd()), token, mio::Interest::READABLE)
    }

    /// Whether a tick was due since the last call. Missed ticks count once.
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
