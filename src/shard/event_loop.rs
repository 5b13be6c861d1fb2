//! The event loop of a shard: it waits for sockets that are ready, for messages and for the tick,
//! then works.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mio::{Events, Poll, Token};

use super::mailbox::ShardWaker;
use super::timers::TICK;
use super::{ShardContext, assemble};

/// Most messages handled before sockets get their turn.
const MESSAGES_A_TURN: usize = 1024;

/// Sockets that epoll names at once.
const EVENTS: usize = 1024;

/// What epoll says when a message wakes the shard. No connection has it: slots are below 2^32.
const WAKE: Token = Token(usize::MAX);

/// A poll for a shard, and what wakes it.
pub fn poll() -> io::Result<(Poll, Arc<ShardWaker>)> {
    let poll = Poll::new()?;
    let waker = ShardWaker::new(poll.registry(), WAKE)?;
    Ok((poll, Arc::new(waker)))
}

/// Runs a shard until it has drained.
pub fn run(context: ShardContext) -> io::Result<()> {
    let (mut shard, mut poll, mut inbox, waker) = assemble(context)?;
    let mut events = Events::with_capacity(EVENTS);
    let mut next_tick = Instant::now() + TICK;
    let mut more = false;
    while !shard.has_ended() {
        let busy = more || shard.has_deferred();
        let wait = if busy { Duration::ZERO } else { next_tick.saturating_duration_since(Instant::now()) };
        let slept = waker.sleep(
            || wait.is_zero() || !inbox.is_empty(),
            |may_sleep| poll.poll(&mut events, Some(if may_sleep { wait } else { Duration::ZERO })),
        );
        match slept {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
            _ => {}
        }
        more = false;
        shard.now = Instant::now();
        for taken in 1.. {
            let Ok(message) = inbox.try_recv() else { break };
            shard.handle_message(message);
            if taken == MESSAGES_A_TURN {
                more = true;
                break;
            }
        }
        let mut named = 0;
        for event in &events {
            named += 1;
            if event.token() == WAKE {
                continue;
            }
            let end = event.is_read_closed() || event.is_error();
            shard.on_ready(event.token(), event.is_readable() || end, event.is_writable(), end);
            shard.maybe_run_fanout(named);
        }
        more |= named == EVENTS;
        shard.run_deferred();
        let now = Instant::now();
        shard.record_latencies(now);
        if now >= next_tick {
            next_tick = now + TICK;
            shard.on_tick();
        }
        shard.end_turn();
    }
    Ok(())
}
