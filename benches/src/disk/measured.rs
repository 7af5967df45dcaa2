//! One measurement: what a thread is to do in a round, and what it found.

use std::time::Duration;

use hdrhistogram::Histogram;
use indicatif::ProgressBar;

use crate::load::Pattern;

/// One round of a load on one queue.
#[derive(Debug, Clone)]
pub struct Round {
    /// The pattern.
    pub pattern: Pattern,
    /// Bytes of a request.
    pub block: u64,
    /// Requests in flight.
    pub depth: u32,
    /// How long.
    pub time: Duration,
    /// Where progress is shown.
    pub bar: ProgressBar,
}

impl Round {
    /// Shows progress, now and then.
    #[inline]
    pub fn show(&self, measured: &Measured, elapsed: Duration) {
        if measured.batches.is_multiple_of(1 << 14) {
            self.bar.set_position(elapsed.min(self.time).as_millis() as u64);
        }
    }
}

/// What one thread measured in one round.
#[derive(Debug, Clone)]
pub struct Measured {
    /// Requests done.
    pub requests: u64,
    /// Bytes moved.
    pub bytes: u64,
    /// How long it took.
    pub elapsed: Duration,
    /// Processor time of the measuring thread.
    pub cpu: Duration,
    /// Nanoseconds from a request to its completion.
    pub latency: Histogram<u64>,
    /// Looks at the clock.
    pub batches: u64,
}

impl Default for Measured {
    fn default() -> Self {
        // Three digits between 1 ns and a minute: constants that the histogram accepts.
        let latency = Histogram::new_with_bounds(1, 60_000_000_000, 3).unwrap_or_else(|_| unreachable!("sound bounds"));
        Self { requests: 0, bytes: 0, elapsed: Duration::ZERO, cpu: Duration::ZERO, latency, batches: 0 }
    }
}

impl Measured {
    /// Counts a request.
    #[inline]
    pub fn record(&mut self, latency: Duration, bytes: u64) {
        self.requests += 1;
        self.bytes += bytes;
        self.batches += 1;
        self.latency.saturating_record(latency.as_nanos() as u64);
    }

    /// Takes another thread's, or another round's, figures in. Threads of one round ran side by side, so the longer
    /// time counts; rounds add up.
    pub fn merge(&mut self, other: &Self, side_by_side: bool) {
        self.requests += other.requests;
        self.bytes += other.bytes;
        self.cpu += other.cpu;
        self.elapsed = if side_by_side { self.elapsed.max(other.elapsed) } else { self.elapsed + other.elapsed };
        // All histograms here have the same bounds.
        let added = self.latency.add(&other.latency);
        debug_assert!(added.is_ok());
    }

    /// Requests a second.
    pub fn iops(&self) -> f64 {
        self.requests as f64 / self.elapsed.as_secs_f64().max(1e-9)
    }

    /// Megabytes (10^6) a second.
    pub fn megabytes(&self) -> f64 {
        self.bytes as f64 / 1e6 / self.elapsed.as_secs_f64().max(1e-9)
    }

    /// Microseconds of `time` for each request.
    pub fn each(&self, time: Duration) -> f64 {
        time.as_secs_f64() * 1e6 / self.requests.max(1) as f64
    }

    /// Microseconds from a request to its completion, at this quantile.
    pub fn micros(&self, quantile: f64) -> f64 {
        self.latency.value_at_quantile(quantile) as f64 / 1e3
    }
}
