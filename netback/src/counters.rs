//! What a queue counts.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::tx::Refusal;

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

/// The numbers of one queue since it was connected. The words are the guest's: `tx` is what it sends, `rx` what it
/// receives.
#[derive(Debug, Default)]
pub struct Counters {
    /// Packets that went from the guest to the tap.
    pub tx_packets: Counter,
    /// Their bytes.
    pub tx_bytes: Counter,
    /// Packets from the guest for which the tap had no room, or which it did not take because it is down.
    pub tx_dropped: Counter,
    /// Packets from the guest that were refused, by reason (the order of [`Refusal::ALL`]).
    pub tx_refused: [Counter; Refusal::ALL.len()],
    /// GSO packets from the guest whose checksum had to be made partial.
    pub tx_checksum_fixups: Counter,
    /// Times that the rate stopped the guest.
    pub tx_throttled: Counter,
    /// Frames that went from the tap to the guest.
    pub rx_packets: Counter,
    /// Their bytes.
    pub rx_bytes: Counter,
    /// Frames that the guest had no room for in time, or that it cannot take.
    pub rx_dropped: Counter,
    /// Frames to groups that the guest has not joined.
    pub rx_filtered: Counter,
    /// Frames that were read here for another queue, which the guest's table names.
    pub rx_handed_over: Counter,
    /// Receive requests whose page could not be written to.
    pub rx_errors: Counter,
    /// Frames whose checksum was added up here because the guest cannot.
    pub rx_checksums: Counter,
    /// Frames that were cut into segments here because the guest cannot.
    pub rx_segmented: Counter,
    /// Notifications sent to the frontend.
    pub notifications: Counter,
    /// Times the queue went to sleep.
    pub sleeps: Counter,
}

impl Counters {
    /// Counts a refusal.
    pub fn refuse(&self, reason: Refusal) {
        self.tx_refused[reason as usize].add(1);
    }

    /// All refusals together.
    pub fn refusals(&self) -> u64 {
        self.tx_refused.iter().map(Counter::get).sum()
    }
}
