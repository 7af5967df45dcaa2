//! Operations that the kernel did not carry out but asks to be tried again (EAGAIN, EINTR).
//!
//! Tried at once and for ever they would keep a processor busy and the guest waiting: device-mapper targets of Linux 6.1
//! answer EAGAIN to every operation on a file that is O_NONBLOCK. So each is tried a bounded number of times, after
//! pauses that grow, and then it has failed.

use std::time::{Duration, Instant};

use hypervisor::memory::IoList;
use ring::uring::Operation;

/// The first pause. It doubles with each try, up to [`LONGEST`].
const FIRST: Duration = Duration::from_millis(1);
/// The longest pause.
const LONGEST: Duration = Duration::from_secs(1);
/// Tries after which an operation has failed: some twelve seconds after its first.
const TRIES: u32 = 21;

/// An operation between two tries.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) operation: Operation,
    pub(super) memory: IoList,
    pub(super) token: u32,
    due: Instant,
}

/// The operations of a queue that are tried again.
#[derive(Debug, Default)]
pub(super) struct Again {
    waiting: Vec<Waiting>,
    /// How often an operation was tried without anything coming of it, by its token.
    tries: Vec<(u32, u32)>,
}

impl Again {
    /// Keeps an operation until its next try; gives its memory back if there is none.
    pub(super) fn keep(
        &mut self,
        operation: Operation,
        memory: IoList,
        token: u32,
        now: Instant,
    ) -> Result<(), IoList> {
        let at = self.tries.iter().position(|&(other, _)| other == token).unwrap_or_else(|| {
            self.tries.push((token, 0));
            self.tries.len() - 1
        });
        let tries = &mut self.tries[at].1;
        *tries += 1;
        if *tries > TRIES {
            self.tries.swap_remove(at);
            return Err(memory);
        }
        let pause = (FIRST * 2u32.pow((*tries - 1).min(16))).min(LONGEST);
        self.waiting.push(Waiting { operation, memory, token, due: now + pause });
        Ok(())
    }

    /// Whether no operation is being tried again.
    #[inline]
    pub(super) fn is_quiet(&self) -> bool {
        self.tries.is_empty()
    }

    /// Something came of an operation: it has all its tries again.
    pub(super) fn forget(&mut self, token: u32) {
        self.tries.retain(|&(other, _)| other != token);
    }

    /// How long it is until the next try; `None` if nothing waits for one.
    pub(super) fn until(&self, now: Instant) -> Option<Duration> {
        self.waiting.iter().map(|waiting| waiting.due.saturating_duration_since(now)).min()
    }

    /// An operation whose next try has come.
    pub(super) fn take_due(&mut self, now: Instant) -> Option<Waiting> {
        let at = self.waiting.iter().position(|waiting| waiting.due <= now)?;
        Some(self.waiting.swap_remove(at))
    }

    /// An operation that waits, whether its time has come or not: it will not be tried again.
    pub(super) fn give_up(&mut self) -> Option<Waiting> {
        let waiting = self.waiting.pop()?;
        self.forget(waiting.token);
        Some(waiting)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tries_are_bounded_and_their_pauses_grow() {
        let (mut again, mut now, began) = (Again::default(), Instant::now(), Instant::now());
        let mut pauses = Vec::new();
        while again.keep(Operation::Datasync, IoList::default(), 7, now).is_ok() {
            assert!(again.take_due(now).is_none(), "not yet");
            let pause = again.until(now).unwrap();
            pauses.push(pause);
            now += pause;
            assert_eq!(again.take_due(now).unwrap().token, 7);
        }
        assert!(pauses.is_sorted() && pauses[0] == FIRST && pauses.last() == Some(&LONGEST), "{pauses:?}");
        assert_eq!(pauses.len(), TRIES as usize);
        assert!((11..14).contains(&now.duration_since(began).as_secs()), "{:?}", now.duration_since(began));
        assert!(again.is_quiet() && again.until(now).is_none());
    }

    #[test]
    fn progress_gives_all_tries_back() {
        let (mut again, now) = (Again::default(), Instant::now());
        for _ in 0..10 * TRIES {
            again.keep(Operation::Datasync, IoList::default(), 7, now).unwrap();
            assert!(again.take_due(now + LONGEST).is_some());
            again.forget(7);
        }
        again.keep(Operation::Datasync, IoList::default(), 8, now).unwrap();
        assert_eq!(again.give_up().unwrap().token, 8);
        assert!(again.is_quiet() && again.give_up().is_none());
    }
}
