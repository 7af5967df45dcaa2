//! How much a guest may send (key `rate`; Linux xen-netback, tx_add_credit).

use std::str::FromStr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A guest can always send this much at once, however low its rate is: a packet of 64 KiB needs it.
const LEAST_BURST: u64 = 131_072;

/// So many bytes in so much time; what `rate` says as `bytes,microseconds`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// Bytes that are added each time.
    pub bytes: u64,
    /// How often. Zero means no limit, as in Linux.
    pub interval: Duration,
}

/// A `rate` that is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("rate {0:?} is not BYTES,MICROSECONDS, two decimal numbers of which the first is not 0")]
pub struct BadRate(String);

impl FromStr for Rate {
    type Err = BadRate;

    fn from_str(text: &str) -> Result<Self, BadRate> {
        let number = |text: &str| {
            let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
            if digits { text.parse::<u64>().ok() } else { None }
        };
        let parts = text.split_once(',').and_then(|(bytes, micros)| Some((number(bytes)?, number(micros)?)));
        match parts {
            Some((bytes, micros)) if bytes > 0 => Ok(Self { bytes, interval: Duration::from_micros(micros) }),
            _ => Err(BadRate(text.chars().take(64).collect())),
        }
    }
}

/// What is left of a rate.
#[derive(Debug)]
pub struct Credit {
    rate: Option<Rate>,
    left: u64,
    /// When the last chunk was added.
    since: Instant,
}

impl Credit {
    /// A full credit; `None` for no limit.
    pub fn new(rate: Option<Rate>, now: Instant) -> Self {
        let rate = rate.filter(|rate| !rate.interval.is_zero());
        Self { rate, left: rate.map_or(0, |rate| rate.bytes), since: now }
    }

    /// Another rate from now on. Nobody gains from a change: what is left shrinks with it and does not grow.
    pub fn change(&mut self, rate: Option<Rate>, now: Instant) {
        let new = Self::new(rate, now);
        let left = if self.rate.is_some() { self.left.min(new.left) } else { new.left };
        *self = Self { left, ..new };
    }

    /// Takes `bytes` out of the credit.
    ///
    /// # Errors
    /// When there is not enough: the moment at which there is more.
    #[inline]
    pub fn take(&mut self, bytes: u32, now: impl FnOnce() -> Instant) -> Result<(), Instant> {
        let Some(rate) = self.rate else { return Ok(()) };
        let bytes = u64::from(bytes);
        if bytes > self.left {
            let now = now();
            let passed = now.saturating_duration_since(self.since);
            if passed >= rate.interval {
                // Whole intervals only, and no more of them than fill the largest burst.
                let intervals = u64::try_from(passed.as_nanos() / rate.interval.as_nanos()).unwrap_or(u64::MAX);
                let chunks = rate.bytes.saturating_mul(intervals);
                self.left = self.left.saturating_add(chunks).min(rate.bytes.max(LEAST_BURST));
                self.since = now;
            }
            if bytes > self.left {
                return Err(self.since + rate.interval);
            }
        }
        self.left -= bytes;
        Ok(())
    }
}

/// The rate of one vif, shared by its queues. (In Linux each queue has the whole rate, and a guest with four of them
/// four times what the administrator said.)
#[derive(Debug)]
pub struct Limit {
    limited: AtomicBool,
    /// Counts changes.
    generation: AtomicU64,
    credit: Mutex<Credit>,
}

impl Limit {
    /// A full credit; `None` for no limit.
    pub fn new(rate: Option<Rate>, now: Instant) -> Self {
        let credit = Credit::new(rate, now);
        let limited = AtomicBool::new(credit.rate.is_some());
        Self { limited, generation: AtomicU64::new(0), credit: Mutex::new(credit) }
    }

    fn lock(&self) -> MutexGuard<'_, Credit> {
        // A number and a time: a panic elsewhere cannot have left them half changed.
        self.credit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Another rate from now on; see [`Credit::change`]. Queues that wait have to be woken to see it.
    pub fn set(&self, rate: Option<Rate>, now: Instant) {
        let mut credit = self.lock();
        credit.change(rate, now);
        self.limited.store(credit.rate.is_some(), Ordering::Release);
        drop(credit);
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// How often the rate was changed.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// As [`Credit::take`]. Takes a lock only where there is a limit.
    ///
    /// # Errors
    /// When there is not enough: the moment at which there is more.
    #[inline]
    pub fn take(&self, bytes: u32, now: impl FnOnce() -> Instant) -> Result<(), Instant> {
        if self.limited.load(Ordering::Acquire) { self.lock().take(bytes, now) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_strict() {
        assert_eq!("1250,1000".parse(), Ok(Rate { bytes: 1250, interval: Duration::from_millis(1) }));
        for wrong in
            ["", ",", "1250", "1250,", ",1000", "1250,1000,", " 1250,1000", "+1,1", "-1,1", "0,1000", "1k,1", "1, 2"]
        {
            assert!(wrong.parse::<Rate>().is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn no_rate_is_no_limit() {
        let now = Instant::now();
        for rate in [None, Some(Rate { bytes: 1, interval: Duration::ZERO })] {
            let mut credit = Credit::new(rate, now);
            for _ in 0..100 {
                assert_eq!(credit.take(65535, || now), Ok(()));
            }
        }
    }

    #[test]
    fn a_slow_guest_can_still_send_a_large_packet() {
        let start = Instant::now();
        let rate = Rate { bytes: 1000, interval: Duration::from_millis(50) };
        let mut credit = Credit::new(Some(rate), start);
        assert_eq!(credit.take(1000, || start), Ok(()));
        let mut now = start;
        let mut waits = 0;
        while let Err(until) = credit.take(65535, || now) {
            assert!(until > now);
            now = until;
            waits += 1;
            assert!(waits < 100, "never");
        }
        assert_eq!(waits, 66);
    }

    #[test]
    fn over_time_no_more_passes_than_the_rate() {
        let start = Instant::now();
        let rate = Rate { bytes: 125_000, interval: Duration::from_millis(10) };
        let mut credit = Credit::new(Some(rate), start);
        let (mut now, mut sent) = (start, 0u64);
        while now < start + Duration::from_secs(10) {
            match credit.take(1514, || now) {
                Ok(()) => sent += 1514,
                Err(until) => now = until,
            }
        }
        let allowed = 125_000 * 1000;
        assert!(sent <= allowed + 131_072 && sent > allowed * 9 / 10, "{sent} of {allowed}");
    }

    #[test]
    fn after_a_pause_there_is_one_burst() {
        let start = Instant::now();
        let mut credit = Credit::new(Some(Rate { bytes: 1000, interval: Duration::from_millis(1) }), start);
        let later = start + Duration::from_secs(3600);
        let mut sent = 0;
        while credit.take(1000, || later).is_ok() {
            sent += 1000;
        }
        assert!((131_000..=132_072).contains(&sent), "{sent}");
    }

    #[test]
    fn a_change_holds_at_once() {
        let now = Instant::now();
        let rate = |bytes| Some(Rate { bytes, interval: Duration::from_secs(1) });
        let mut credit = Credit::new(None, now);
        credit.change(rate(2000), now);
        assert_eq!(credit.take(2000, || now), Ok(()));
        assert!(credit.take(1, || now).is_err());
        credit.change(rate(1_000_000), now);
        assert!(credit.take(1, || now).is_err(), "a change refilled the credit");
        credit.change(None, now);
        assert_eq!(credit.take(65535, || now), Ok(()));
    }
}
