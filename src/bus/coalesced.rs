//! Requests shared by all that need the same answer.

/// Waiters for an answer that must be as recent as their wait. A request that was in flight when a
/// waiter came may be too old for it, so the next request serves it, together with all others that
/// came meanwhile.
#[derive(Debug)]
pub struct Coalesced<W> {
    /// Served by the request in flight.
    current: Vec<W>,
    /// Served by the next request.
    next: Vec<W>,
}

impl<W> Coalesced<W> {
    pub fn new() -> Coalesced<W> {
        Coalesced { current: Vec::new(), next: Vec::new() }
    }

    pub fn is_empty(&self) -> bool {
        self.current.is_empty() && self.next.is_empty()
    }

    pub fn is_in_flight(&self) -> bool {
        !self.current.is_empty()
    }

    /// Adds a waiter, which the next request serves.
    pub fn wait(&mut self, waiter: W) {
        self.next.push(waiter);
    }

    /// Starts a request, which serves all waiters. Returns false if there is none.
    pub fn start(&mut self) -> bool {
        self.current.append(&mut self.next);
        !self.current.is_empty()
    }

    /// Removes and returns the waiters that the answer to the request in flight serves.
    pub fn complete(&mut self) -> Vec<W> {
        std::mem::take(&mut self.current)
    }

    /// Removes and returns all waiters.
    pub fn fail(&mut self) -> Vec<W> {
        self.start();
        self.complete()
    }

    pub fn retain(&mut self, stays: impl Fn(&W) -> bool) {
        self.current.retain(&stays);
        self.next.retain(&stays);
    }
}

impl<W> Default for Coalesced<W> {
    fn default() -> Coalesced<W> {
        Coalesced::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_serves_earlier_waiters() {
        let mut waiters = Coalesced::new();
        assert!(!waiters.start() && waiters.is_empty());
        waiters.wait(1);
        assert!(!waiters.is_in_flight() && waiters.start() && waiters.is_in_flight());
        waiters.wait(2);
        waiters.wait(3);
        assert_eq!(waiters.complete(), [1]);
        assert!(!waiters.is_empty() && !waiters.is_in_flight());
        waiters.retain(|waiter| *waiter != 3);
        assert!(waiters.start());
        waiters.wait(4);
        assert_eq!(waiters.fail(), [2, 4]);
        assert!(waiters.is_empty());
    }
}
