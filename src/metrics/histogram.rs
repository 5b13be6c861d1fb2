//! Histograms of durations.

use std::time::Duration;

use super::Counter;

/// Upper bounds of the buckets, in microseconds: from a fan-out to a few sockets to a stall of ten
/// seconds.
pub(super) const BOUNDS: [u64; 16] = [
    100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000,
    2_500_000, 5_000_000, 10_000_000,
];

/// The last bucket counts durations above all bounds. An observation takes a few nanoseconds and no
/// lock.
#[derive(Debug, Default)]
pub struct Histogram {
    counts: [Counter; BOUNDS.len() + 1],
    micros: Counter,
}

impl Histogram {
    pub fn observe(&self, time: Duration) {
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.counts[BOUNDS.partition_point(|bound| *bound < micros)].add(1);
        self.micros.add(micros);
    }

    /// Number of observations.
    pub fn count(&self) -> u64 {
        Times::of([self]).count()
    }
}

/// The sum of several histograms at one moment.
#[derive(Debug, Default)]
pub(super) struct Times {
    counts: [u64; BOUNDS.len() + 1],
    micros: u64,
}

impl Times {
    pub fn of<'a>(histograms: impl IntoIterator<Item = &'a Histogram>) -> Times {
        let mut times = Times::default();
        for histogram in histograms {
            for (sum, count) in times.counts.iter_mut().zip(&histogram.counts) {
                *sum += count.get();
            }
            times.micros += histogram.micros.get();
        }
        times
    }

    /// Cumulative counts by upper bound in seconds; the last is `+Inf`.
    pub fn buckets(&self) -> impl Iterator<Item = (String, u64)> + '_ {
        let bounds = BOUNDS.iter().map(|micros| (*micros as f64 / 1e6).to_string());
        let mut sum = 0;
        bounds.chain(["+Inf".to_owned()]).zip(self.counts).map(move |(bound, count)| {
            sum += count;
            (bound, sum)
        })
    }

    /// Number of observations.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Sum of all durations, in seconds.
    pub fn seconds(&self) -> f64 {
        self.micros as f64 / 1e6
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_in_the_first_bucket_that_fits() {
        let histograms = [Histogram::default(), Histogram::default()];
        for (which, micros) in [(0, 0), (1, 100), (0, 101), (1, 250), (0, 10_000_000), (1, 10_000_001)] {
            histograms[which].observe(Duration::from_micros(micros));
        }
        let times = Times::of(&histograms);
        let buckets: Vec<_> = times.buckets().collect();
        let show = |at: usize| (buckets[at].0.as_str(), buckets[at].1);
        assert_eq!((show(0), show(1), show(2)), (("0.0001", 2), ("0.00025", 4), ("0.0005", 4)));
        assert_eq!((show(15), show(16)), (("10", 5), ("+Inf", 6)));
        assert_eq!((times.count(), times.seconds()), (6, 20.000452));
    }

    #[test]
    fn bounds_are_sorted() {
        assert!(BOUNDS.is_sorted());
    }
}
