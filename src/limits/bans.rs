//! Users whose connections are refused for a while. The bus changes them, handshakes look them up.

use std::collections::{BTreeMap, HashSet};
use std::ops::Bound;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Most users banned at once. All nodes hold all of them, some 200 bytes each, and read them from
/// Redis in one reply of at most 1.5 MB. control.lua has the same number.
pub const BANS_MAX: usize = 10_000;

#[derive(Debug, Default)]
pub struct Bans {
    /// Whether `table` has entries. While nobody is banned, a handshake reads this alone.
    has_any: AtomicBool,
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    /// A moment, and the clock of the bus then, in milliseconds since 1970.
    clock: Option<(Instant, u64)>,
    /// When the ban of each user ends, in milliseconds on that clock.
    ends: BTreeMap<Arc<str>, u64>,
}

impl Table {
    /// The clock of the bus; that of this host before the bus has replied.
    fn now(&self) -> u64 {
        match self.clock {
            Some((since, at)) => at.saturating_add(since.elapsed().as_millis() as u64),
            None => system_millis(),
        }
    }

    fn purge(&mut self) {
        let now = self.now();
        self.ends.retain(|_, end| *end > now);
    }

    fn remove_first_end(&mut self) {
        let first = self.ends.iter().min_by_key(|(_, end)| **end).map(|(user, _)| user.clone());
        first.and_then(|user| self.ends.remove(&user));
    }
}

/// Milliseconds since 1970.
pub fn system_millis() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

impl Bans {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().expect("nothing panics while holding it")
    }

    /// How long the user stays banned. `None` for a user who is not.
    pub fn time_left(&self, user: &str) -> Option<Duration> {
        if !self.has_any.load(Ordering::Acquire) {
            return None;
        }
        let table = self.table();
        let left = table.ends.get(user)?.saturating_sub(table.now());
        (left > 0).then(|| Duration::from_millis(left))
    }

    fn change<T>(&self, change: impl FnOnce(&mut Table) -> T) -> T {
        let mut table = self.table();
        let result = change(&mut table);
        self.has_any.store(!table.ends.is_empty(), Ordering::Release);
        result
    }

    /// Bans a user until this time, in milliseconds on the clock of the bus. Returns whether that is
    /// in the future. With [`BANS_MAX`] bans the one that ends first is removed: the bus accepts no
    /// more, so on its clock that one has ended.
    pub fn insert(&self, user: Arc<str>, until: u64) -> bool {
        self.change(|table| {
            if until <= table.now() {
                table.ends.remove(&user);
                return false;
            }
            if table.ends.len() >= BANS_MAX && !table.ends.contains_key(&user) {
                table.purge();
            }
            table.ends.insert(user, until);
            if table.ends.len() > BANS_MAX {
                table.remove_first_end();
            }
            true
        })
    }

    /// Ends the ban of a user.
    pub fn remove(&self, user: &str) {
        self.change(|table| _ = table.ends.remove(user));
    }

    /// Replaces all bans by those of the bus, whose clock showed `now` just before. The last one of
    /// a user counts.
    pub fn replace(&self, now: u64, bans: impl IntoIterator<Item = (Arc<str>, u64)>) {
        self.change(|table| {
            table.clock = Some((Instant::now(), now));
            table.ends.clear();
            table.ends.extend(bans);
            table.purge();
        });
    }

    /// Removes expired bans.
    pub fn purge(&self) {
        self.change(Table::purge);
    }

    /// The number of bans. Some may have expired.
    pub fn len(&self) -> usize {
        self.table().ends.len()
    }

    /// The banned users.
    pub fn users(&self) -> HashSet<Arc<str>> {
        self.table().ends.keys().cloned().collect()
    }

    pub fn is_empty(&self) -> bool {
        !self.has_any.load(Ordering::Acquire)
    }

    /// The first users after `after` by name, and when their bans end.
    pub fn list(&self, after: Option<&str>, limit: usize) -> Vec<(Arc<str>, u64)> {
        let table = self.table();
        let now = table.now();
        let start = after.map_or(Bound::Unbounded, Bound::Excluded);
        let bans = table.ends.range::<str, _>((start, Bound::Unbounded)).filter(|(_, end)| **end > now);
        bans.take(limit).map(|(user, end)| (user.clone(), *end)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bans_end_on_the_clock_of_the_bus() {
        let bans = Bans::default();
        assert_eq!(bans.time_left("alice"), None);
        // The clock of the bus is far behind that of this host.
        let now = 1_000_000;
        bans.replace(now, [("alice".into(), now + 60_000), ("bob".into(), now)]);
        assert_eq!(bans.len(), 1);
        let left = bans.time_left("alice").expect("a ban");
        assert!(Duration::from_secs(50) < left && left <= Duration::from_secs(60), "{left:?}");
        assert_eq!(bans.time_left("bob"), None);
        assert!(bans.insert("bob".into(), now + 120_000));
        assert!(bans.time_left("bob") > bans.time_left("alice"));
        assert!(!bans.insert("bob".into(), now - 1), "a shorter ban replaces a longer one");
        assert!(bans.time_left("bob").is_none() && !bans.is_empty());
        bans.replace(
            now,
            [("alice".into(), now), ("bob".into(), now + 9_000), ("alice".into(), now + 9_000)],
        );
        assert_eq!(bans.users(), ["alice".into(), "bob".into()].into(), "the last ban of a user counts");
        bans.remove("bob");
        bans.remove("alice");
        assert!(bans.time_left("alice").is_none() && bans.is_empty());
    }

    #[test]
    fn bans_are_limited_and_listed_in_pages() {
        let (bans, until) = (Bans::default(), system_millis() + 60_000);
        for number in 0..BANS_MAX as u64 {
            bans.insert(format!("user{number:05}").into(), until + number);
        }
        assert!(bans.insert("user00000".into(), until + 60_000), "one that exists changes");
        assert_eq!(bans.len(), BANS_MAX);
        assert!(bans.insert("zoe".into(), until + 60_000), "the one that ends first makes room");
        assert_eq!(bans.len(), BANS_MAX);
        assert!(bans.time_left("user00001").is_none() && bans.time_left("zoe").is_some());
        let page = bans.list(Some("user00000"), 2);
        assert_eq!(page, [("user00002".into(), until + 2), ("user00003".into(), until + 3)]);
        assert_eq!(bans.list(None, 1), [("user00000".into(), until + 60_000)]);
        assert_eq!(bans.list(Some("zoe"), 1), []);
    }
}
