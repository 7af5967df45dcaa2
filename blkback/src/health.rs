//! Whether a disk still keeps its promises, and whose turn it is to flush it.
//!
//! The kernel reports a failed write-back once, to one of the calls that were under way (errseq_t). Were two flushes of
//! one disk under way at a time, the other could be answered OK although its data are lost. So there is one at a time,
//! over all queues; those that come meanwhile are served together by the next.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The state of one disk, shared by its queues.
#[derive(Debug, Default)]
pub struct Health {
    flush_failed: AtomicBool,
    flushing: Mutex<Flushing>,
}

#[derive(Debug, Default)]
struct Flushing {
    running: bool,
    /// Whom to wake when it ends: eventfds.
    waiting: Vec<Arc<OwnedFd>>,
}

/// The answer to a wish to flush.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Permit {
    /// Flush now, and say [`Health::end`].
    Granted,
    /// Another queue is flushing; the waker given along is written to when it is done.
    Wait,
    /// A flush has failed: there will be no other.
    Never,
}

impl Health {
    /// Whether a flush has failed. What was written since the last good one may be lost, and asking again would get
    /// a false yes: the kernel reports such an error once. So there is no way back.
    #[inline]
    pub fn flush_failed(&self) -> bool {
        self.flush_failed.load(Ordering::Acquire)
    }

    fn lock(&self) -> MutexGuard<'_, Flushing> {
        self.flushing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks to flush.
    pub fn begin(&self, wake: &Arc<OwnedFd>) -> Permit {
        let mut flushing = self.lock();
        if self.flush_failed() {
            Permit::Never
        } else if flushing.running {
            if !flushing.waiting.iter().any(|waiting| Arc::ptr_eq(waiting, wake)) {
                flushing.waiting.push(Arc::clone(wake));
            }
            Permit::Wait
        } else {
            flushing.running = true;
            Permit::Granted
        }
    }

    /// Whether [`begin`](Self::begin) would say anything but [`Permit::Wait`].
    pub fn is_free(&self) -> bool {
        !self.lock().running
    }

    /// The flush that was permitted has ended.
    pub fn end(&self, okay: bool) {
        let mut flushing = self.lock();
        if !okay {
            self.flush_failed.store(true, Ordering::Release);
        }
        flushing.running = false;
        for wake in flushing.waiting.drain(..) {
            if let Err(error) = rustix::io::write(&*wake, &1u64.to_ne_bytes()) {
                tracing::error!(%error, "cannot wake a queue that waits to flush");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};

    #[test]
    fn one_at_a_time_and_whoever_waits_is_woken() {
        let wake = || Arc::new(eventfd(0, EventfdFlags::NONBLOCK).unwrap());
        let (one, two) = (wake(), wake());
        let rang = |wake: &Arc<OwnedFd>| rustix::io::read(&**wake, &mut [0; 8]).is_ok();
        let health = Health::default();
        assert_eq!(health.begin(&one), Permit::Granted);
        assert_eq!((health.begin(&two), health.begin(&two)), (Permit::Wait, Permit::Wait));
        assert!(!rang(&two) && !health.is_free());
        health.end(true);
        assert!(rang(&two) && !rang(&one) && health.is_free());
        assert_eq!(health.begin(&two), Permit::Granted);
        health.end(false);
        assert_eq!(health.begin(&one), Permit::Never);
        assert!(health.flush_failed());
    }
}
