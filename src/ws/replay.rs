//! Reading history: what a connection took, and how much it asks for next.

use super::writer::BURST;

/// Most bytes of history that one connection takes in a tick (40 MB/s), so that it leaves Redis to
/// others, too.
const HISTORY_IN_TICK: u32 = 4 * 1024 * 1024;

/// Bytes of history that a connection asks for at first.
const PART_FIRST: usize = 64 * 1024;

/// Whether a connection that reads history has its next part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PartState {
    /// It has not asked for one.
    #[default]
    Needed,
    /// It waits for one, or for the time when it may ask.
    Awaited,
    /// The part that it waited for has just arrived.
    Arrived,
}

/// How one connection reads history.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Replay {
    /// Bytes written since it last asked for a part.
    taken: u32,
    /// Bytes written in the latest tick.
    in_tick: u32,
    /// The low bits of that tick.
    tick: u16,
    part: PartState,
}

impl Replay {
    /// Has the connection wait for its next part.
    pub fn wait(&mut self) {
        self.part = PartState::Awaited;
    }

    pub fn is_waiting(&self) -> bool {
        self.part == PartState::Awaited
    }

    /// Ends the wait. `arrived`: the part is in memory.
    pub fn resume(&mut self, arrived: bool) {
        self.part = if arrived { PartState::Arrived } else { PartState::Needed };
    }

    /// The state of the next part. The arrival of a part is returned once.
    pub fn take_part(&mut self) -> PartState {
        let part = self.part;
        if part == PartState::Arrived {
            self.part = PartState::Needed;
        }
        part
    }

    /// Counts bytes that were written.
    pub fn count(&mut self, bytes: u64, tick: u32) {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        if self.tick != tick as u16 {
            (self.tick, self.in_tick) = (tick as u16, 0);
        }
        self.taken = self.taken.saturating_add(bytes);
        self.in_tick = self.in_tick.saturating_add(bytes);
    }

    /// Whether the connection may take more in this tick.
    pub fn may_take(&self, tick: u32) -> bool {
        self.tick != tick as u16 || self.in_tick < HISTORY_IN_TICK
    }

    /// The size of the part to ask for now, in bytes: twice what was written of the last one, at
    /// most [`BURST`]. A slow reader, whose parts may be dropped before it has read them, so causes
    /// few reads.
    pub fn next_part_bytes(&mut self) -> usize {
        let taken = std::mem::take(&mut self.taken) as usize;
        taken.saturating_mul(2).clamp(PART_FIRST, BURST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_takes_40_mb_a_second() {
        const TICKS_A_SECOND: u32 = 10;
        let mut replay = Replay::default();
        let (mut taken, mut most) = (0, 0);
        for tick in 0..TICKS_A_SECOND {
            while replay.may_take(tick) {
                let part = replay.next_part_bytes();
                replay.count(part as u64, tick);
                taken += part;
                most = most.max(part);
            }
        }
        let limit = TICKS_A_SECOND as usize * HISTORY_IN_TICK as usize;
        assert!((limit..limit + TICKS_A_SECOND as usize * BURST).contains(&taken), "{taken}");
        assert_eq!(most, BURST);
    }

    #[test]
    fn a_slow_reader_asks_for_small_parts() {
        let mut replay = Replay::default();
        assert_eq!(replay.next_part_bytes(), PART_FIRST);
        replay.count(100_000, 0);
        assert_eq!(replay.next_part_bytes(), 200_000);
        replay.count(1_000, 0);
        assert_eq!(replay.next_part_bytes(), PART_FIRST);
    }
}
