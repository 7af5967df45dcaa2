//! What a guest gets for requests that make no sense: time. Each is answered, and costs a turn of the queue's thread and a
//! notification; a guest that makes nothing else must not keep a processor of dom0's busy with it. Linux' backend sleeps
//! for a millisecond after each. Only this queue waits.

use std::time::Duration;

/// The pause after the first turn with such requests; it doubles with each that follows.
const FIRST: Duration = Duration::from_millis(1);
/// The longest.
const LONGEST: Duration = Duration::from_millis(4);

/// How long a queue pauses before it takes more.
#[derive(Debug, Default)]
pub(super) struct BackOff {
    last: Duration,
}

impl BackOff {
    /// After a turn that took so many requests and refused so many.
    #[inline]
    pub(super) fn after(&mut self, taken: u32, refused: u32) -> Option<Duration> {
        if refused > 0 {
            self.last = (2 * self.last).clamp(FIRST, LONGEST);
            return Some(self.last);
        }
        if taken > 0 {
            self.last = Duration::ZERO;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refused_requests_cost_more_and_more_time() {
        let mut back_off = BackOff::default();
        let mut pauses = |turns: &[(u32, u32)]| -> Vec<u128> {
            turns.iter().map(|&(taken, refused)| back_off.after(taken, refused).map_or(0, |p| p.as_millis())).collect()
        };
        assert_eq!(pauses(&[(16, 0), (1, 1), (16, 1), (16, 16), (1, 1), (1, 1), (1, 1)]), [0, 1, 2, 4, 4, 4, 4]);
        // A turn without any request says nothing of the guest; one with good ones only does.
        assert_eq!(pauses(&[(0, 0), (1, 1), (16, 0), (1, 1)]), [0, 4, 0, 1]);
    }
}
