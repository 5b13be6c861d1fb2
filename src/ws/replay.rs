//! Reading history: what a connection took, and how much it asks for next.

use super::writer::BURST;

/// Most bytes of history that one connection takes in a tick (40 MB/s), so that it leaves Redis to
/// others, too.
const HISTORY_IN_TICK: u32 = 4 * 1024 * 1024;

/// Bytes of history that a connection asks for at first.
const PAGE_FIRST: usize = 64 * 1024;

/// Whether a connection that reads history has its next page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PageState {
    /// It has not asked for one.
    #[default]
    Needed,
    /// It waits for one, or for the time when it may ask.
    Awaited,
    /// The page that it waited for has just arrived.
    Arrived,
}

/// Bytes of history written in the latest tick.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TakenInTick {
    bytes: u32,
    /// The low bits of the tick.
    tick: u16,
}

impl TakenInTick {
    /// Counts bytes that were written.
    pub fn count(&mut self, bytes: u64, tick: u32) {
        if self.tick != tick as u16 {
            (self.tick, self.bytes) = (tick as u16, 0);
        }
        self.bytes = self.bytes.saturating_add(u32::try_from(bytes).unwrap_or(u32::MAX));
    }

    /// Whether more may be taken in this tick.
    pub fn may_take(&self, tick: u32) -> bool {
        self.tick != tick as u16 || self.bytes < HISTORY_IN_TICK
    }
}

/// How one member of a channel reads history.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Replay {
    /// Bytes written since it last asked for a page.
    taken: u32,
    in_tick: TakenInTick,
    page: PageState,
}

impl Replay {
    /// Has the connection wait for its next page.
    pub fn wait(&mut self) {
        self.page = PageState::Awaited;
    }

    pub fn is_waiting(&self) -> bool {
        self.page == PageState::Awaited
    }

    /// Ends the wait. `arrived`: the page is in memory.
    pub fn resume(&mut self, arrived: bool) {
        self.page = if arrived { PageState::Arrived } else { PageState::Needed };
    }

    /// The state of the next page. The arrival of a page is returned once.
    pub fn take_page(&mut self) -> PageState {
        let page = self.page;
        if page == PageState::Arrived {
            self.page = PageState::Needed;
        }
        page
    }

    /// Counts bytes that were written.
    pub fn count(&mut self, bytes: u64, tick: u32) {
        self.taken = self.taken.saturating_add(u32::try_from(bytes).unwrap_or(u32::MAX));
        self.in_tick.count(bytes, tick);
    }

    /// Whether it may take more in this tick.
    pub fn may_take(&self, tick: u32) -> bool {
        self.in_tick.may_take(tick)
    }

    /// The size of the page to ask for now, in bytes: twice what was written of the last one, at
    /// most [`BURST`]. A slow reader, whose pages may be dropped before it has read them, so causes
    /// few reads.
    pub fn next_page_bytes(&mut self) -> usize {
        let taken = std::mem::take(&mut self.taken) as usize;
        taken.saturating_mul(2).clamp(PAGE_FIRST, BURST)
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
                let page = replay.next_page_bytes();
                replay.count(page as u64, tick);
                taken += page;
                most = most.max(page);
            }
        }
        let limit = TICKS_A_SECOND as usize * HISTORY_IN_TICK as usize;
        assert!((limit..limit + TICKS_A_SECOND as usize * BURST).contains(&taken), "{taken}");
        assert_eq!(most, BURST);
    }

    #[test]
    fn a_slow_reader_asks_for_small_pages() {
        let mut replay = Replay::default();
        assert_eq!(replay.next_page_bytes(), PAGE_FIRST);
        replay.count(100_000, 0);
        assert_eq!(replay.next_page_bytes(), 200_000);
        replay.count(1_000, 0);
        assert_eq!(replay.next_page_bytes(), PAGE_FIRST);
    }
}
