//! What a queue counts.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::request::Refusal;

/// One number that one thread counts and others read.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`. Only one thread may: a plain load and store are cheaper than a locked addition.
    #[inline]
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    /// The number now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The numbers of one queue since it was connected.
#[derive(Debug, Default)]
pub struct Counters {
    /// Reads answered with success.
    pub reads: Counter,
    /// Writes answered with success.
    pub writes: Counter,
    /// Flushes answered with success.
    pub flushes: Counter,
    /// Discards answered with success.
    pub discards: Counter,
    /// Bytes read.
    pub bytes_read: Counter,
    /// Bytes written.
    pub bytes_written: Counter,
    /// Requests that failed at the disk.
    pub io_errors: Counter,
    /// Requests refused, by reason (the order of [`Refusal::ALL`]).
    pub refused: [Counter; Refusal::ALL.len()],
    /// Notifications sent to the frontend.
    pub notifications: Counter,
    /// Times the queue went to sleep.
    pub sleeps: Counter,
}

impl Counters {
    /// Counts a refusal.
    pub fn refuse(&self, reason: Refusal) {
        self.refused[reason as usize].add(1);
    }

    /// All refusals together.
    pub fn refusals(&self) -> u64 {
        self.refused.iter().map(Counter::get).sum()
    }
}
