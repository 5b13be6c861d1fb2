//! Signs that a client is alive: activity, and pongs. All times are ticks of the shard.

use std::time::Duration;

/// Slowest client whose pong is in time, in bytes a second: before a ping it reads all bytes that
/// were written earlier.
const SLOWEST_READER: u32 = 32 * 1024;

/// Most bytes on their way to a client: more than the kernels of node, proxy and client hold with
/// the defaults of Linux (`tcp_rmem` 6 MiB and `tcp_wmem` 4 MiB at most).
const IN_FLIGHT_MAX: u32 = 16 * 1024 * 1024;

/// When a client was last active, and which pong is due.
#[derive(Debug)]
pub struct Liveness {
    /// When it last sent bytes or, while its socket is full, took some.
    last_activity: u32,
    last_ping: u32,
    /// Bytes written that no pong has confirmed as read.
    unconfirmed: u32,
    /// How many of them were written before the ping that awaits its pong.
    before_ping: u32,
    /// When it connected, in minutes since the shard started. There is room for two bytes.
    connected: u16,
    awaiting_pong: bool,
    /// Whether its socket was full at the last [`Liveness::observe`].
    was_blocked: bool,
}

/// Ticks of a shard in a minute.
pub const TICKS_A_MINUTE: u32 = 600;

fn minutes(tick: u32) -> u16 {
    (tick / TICKS_A_MINUTE) as u16
}

impl Liveness {
    pub fn new(tick: u32) -> Liveness {
        Liveness {
            last_activity: tick,
            last_ping: tick,
            unconfirmed: 0,
            before_ping: 0,
            connected: minutes(tick),
            awaiting_pong: false,
            was_blocked: false,
        }
    }

    /// Starts the times to the next ping and of silence anew.
    pub fn restart(&mut self, tick: u32) {
        self.last_activity = tick;
        self.last_ping = tick;
    }

    /// Minutes since the client connected. They start again after 45 days.
    pub fn minutes_connected(&self, tick: u32) -> u16 {
        minutes(tick).wrapping_sub(self.connected)
    }

    pub fn record_activity(&mut self, tick: u32) {
        self.last_activity = tick;
    }

    /// Ticks since the client was last active.
    pub fn silence(&self, tick: u32) -> u32 {
        tick.wrapping_sub(self.last_activity)
    }

    /// Called about once a second. Time in which the client could show no activity is not counted
    /// as silence.
    pub fn observe(&mut self, is_blocked: bool, read_paused: bool, tick: u32) {
        let was_blocked = std::mem::replace(&mut self.was_blocked, is_blocked);
        // While it is not read from, nothing that it sends is seen. A socket that is full since the
        // last call had room until now.
        if (read_paused && !is_blocked) || (is_blocked && !was_blocked) {
            self.last_activity = tick;
        }
    }

    /// Whether the next ping is due. If so, it is the last one from now on.
    pub fn take_due_ping(&mut self, interval: u32, tick: u32) -> bool {
        let is_due = tick.wrapping_sub(self.last_ping) >= interval;
        if is_due {
            self.last_ping = tick;
        }
        is_due
    }

    /// Notes that a WebSocket ping is going to be written.
    pub fn await_pong(&mut self) {
        if !std::mem::replace(&mut self.awaiting_pong, true) {
            self.before_ping = self.unconfirmed;
        }
    }

    /// Handles a pong. `true` if it answers a ping: then the client has read what was written
    /// before that ping.
    pub fn take_pong(&mut self) -> bool {
        let answers = std::mem::take(&mut self.awaiting_pong);
        if answers {
            self.unconfirmed = self.unconfirmed.saturating_sub(self.before_ping);
        }
        answers
    }

    pub fn count_written(&mut self, bytes: usize) {
        self.unconfirmed = self.unconfirmed.saturating_add(bytes as u32);
    }

    /// How long the client may take to read the bytes on their way to it.
    pub fn reading_time(&self) -> Duration {
        Duration::from_secs(1) * self.unconfirmed.min(IN_FLIGHT_MAX) / SLOWEST_READER
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pong_confirms_what_was_written_before_its_ping() {
        let mut liveness = Liveness::new(0);
        assert!(!liveness.take_pong(), "no ping was sent");
        liveness.count_written(10 * SLOWEST_READER as usize);
        liveness.await_pong();
        liveness.count_written(SLOWEST_READER as usize);
        liveness.await_pong();
        assert_eq!(liveness.reading_time(), Duration::from_secs(11));
        assert!(liveness.take_pong() && !liveness.take_pong());
        assert_eq!(liveness.reading_time(), Duration::from_secs(1));
    }

    #[test]
    fn minutes_are_counted_from_the_connection() {
        let liveness = Liveness::new(7 * TICKS_A_MINUTE + 5);
        for (tick, minutes) in
            [(7 * TICKS_A_MINUTE + 6, 0), (9 * TICKS_A_MINUTE, 2), (70_000 * TICKS_A_MINUTE, 4457)]
        {
            assert_eq!(liveness.minutes_connected(tick), minutes, "{tick}");
        }
    }

    #[test]
    fn silence_counts_only_while_the_client_could_be_seen() {
        let mut liveness = Liveness::new(0);
        liveness.observe(false, false, 10);
        assert_eq!(liveness.silence(10), 10);
        liveness.observe(false, true, 20);
        assert_eq!(liveness.silence(20), 0, "it was not read from");
        liveness.observe(true, true, 30);
        assert_eq!(liveness.silence(30), 0, "its socket had room until now");
        liveness.observe(true, true, 40);
        assert_eq!(liveness.silence(40), 10);
        liveness.record_activity(45);
        assert_eq!(liveness.silence(46), 1);
    }
}
