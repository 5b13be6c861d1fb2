//! The admin listener: publish, metrics, stats.
