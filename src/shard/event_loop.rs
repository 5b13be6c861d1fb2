//! The event loop of a shard: waits for messages, sockets and the tick, then handles them.
//!
//! It runs on a current-thread runtime of tokio. The sockets are registered in an epoll set of the
//! shard, which the runtime watches as one descriptor. epoll returns slot and generation, so a
//! connection needs no task, no waker and no memory of the runtime.

use std::io;
use std::time::{Duration, Instant};

use mio::{Events, Poll, Token};
use tokio::io::unix::AsyncFd;

use super::mailbox::Inbox;
use super::runtime::{self, Ticker};
use super::timers::TICK;
use super::{Shard, ShardContext};

/// Most messages handled before sockets get their turn.
const MESSAGES_A_TURN: usize = 1024;

/// Most events of one poll.
const EVENTS: usize = 1024;

/// Token of the ticker. No connection has it, since slots are below 2^32.
const TICKER: Token = Token(usize::MAX);

/// Runs a shard in this thread until it has drained.
pub fn run(context: ShardContext, inbox: Inbox) -> io::Result<()> {
    runtime::build()?.block_on(async { EventLoop::new(context, inbox)?.run().await })
}

#[derive(Debug)]
struct EventLoop {
    shard: Shard,
    inbox: Inbox,
    sockets: AsyncFd<Poll>,
    events: Events,
    ticker: Ticker,
}

impl EventLoop {
    /// Must be called within the runtime that watches the sockets.
    fn new(context: ShardContext, inbox: Inbox) -> io::Result<EventLoop> {
        let poll = Poll::new()?;
        let ticker = Ticker::new(TICK)?;
        ticker.register(poll.registry(), TICKER)?;
        let shard = Shard::new(context, poll.registry().try_clone()?);
        let events = Events::with_capacity(EVENTS);
        Ok(EventLoop { shard, inbox, sockets: runtime::watch(poll)?, events, ticker })
    }

    async fn run(mut self) -> io::Result<()> {
        let mut has_more_events = false;
        while !self.shard.has_ended() {
            // With work left, poll the sockets directly: asking the runtime first costs a second
            // system call.
            let is_busy = has_more_events || self.shard.has_deferred() || !self.inbox.is_empty();
            let mut polls_sockets = is_busy;
            let mut first = None;
            if !is_busy {
                tokio::select! {
                    biased;
                    message = self.inbox.recv() => first = message,
                    ready = self.sockets.readable_mut() => {
                        // The poll below takes all events, or `has_more_events` repeats it before
                        // the next wait.
                        ready?.clear_ready();
                        polls_sockets = true;
                    }
                }
            }
            self.events.clear();
            let mut interrupted = false;
            if polls_sockets
                && let Err(error) = self.sockets.get_mut().poll(&mut self.events, Some(Duration::ZERO))
            {
                interrupted = error.kind() == io::ErrorKind::Interrupted;
                if !interrupted {
                    return Err(error);
                }
            }
            let shard = &mut self.shard;
            shard.now = Instant::now();
            for _ in 0..MESSAGES_A_TURN {
                let Some(message) = first.take().or_else(|| self.inbox.try_recv().ok()) else { break };
                shard.handle_message(message);
            }
            shard.run_commands();
            let (mut done, mut ticked) = (0, false);
            for event in &self.events {
                done += 1;
                if event.token() == TICKER {
                    ticked = self.ticker.has_ticked()?;
                    continue;
                }
                let end = event.is_read_closed() || event.is_error();
                shard.on_ready(event.token(), event.is_readable() || end, event.is_writable(), end);
                shard.maybe_run_fanout();
            }
            has_more_events = interrupted || done >= EVENTS;
            shard.run_deferred();
            shard.record_latencies(Instant::now());
            if ticked {
                shard.on_tick();
            }
            shard.end_turn();
        }
        Ok(())
    }
}
