//! Keeps what a guest can cause at will from filling the log.

use std::time::{Duration, Instant};

/// Lets so many lines per window through and counts the others.
#[derive(Debug, Default)]
pub struct LogGate {
    since: Option<Instant>,
    said: u32,
    unsaid: u64,
}

const LINES: u32 = 10;
const WINDOW: Duration = Duration::from_secs(10);

impl LogGate {
    /// Whether a line may be written now; if so, with how many were not since the last one.
    pub fn admit(&mut self) -> Option<u64> {
        self.admit_at(Instant::now())
    }

    fn admit_at(&mut self, now: Instant) -> Option<u64> {
        if self.since.is_none_or(|since| now.duration_since(since) > WINDOW) {
            self.since = Some(now);
            self.said = 0;
        }
        if self.said == LINES {
            self.unsaid += 1;
            return None;
        }
        self.said += 1;
        Some(std::mem::take(&mut self.unsaid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_lines_and_then_how_many_there_were() {
        let (mut gate, now) = (LogGate::default(), Instant::now());
        let admitted: Vec<_> = (0..1000).filter_map(|_| gate.admit_at(now)).collect();
        assert_eq!(admitted, [0; 10]);
        assert_eq!(gate.admit_at(now + Duration::from_secs(9)), None);
        assert_eq!(gate.admit_at(now + Duration::from_secs(11)), Some(991));
        assert_eq!(gate.admit_at(now + Duration::from_secs(12)), Some(0));
    }
}
