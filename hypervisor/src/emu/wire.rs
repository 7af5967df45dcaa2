//! The two ends of an event channel: a page with a word for each end, and an eventfd for each end.
//!
//! A word has three bits. PENDING: an event waits. MASKED: the owner took an event and has not written back. OPEN:
//! somebody is bound to this end. The owner's descriptor is written only by the step that makes an event visible,
//! from neither pending nor masked, so a busy owner is never disturbed by a system call of its peer.
//!
//! Why no event is lost. All steps on one word are atomic read-modify-writes, hence totally ordered. The rule that
//! holds after each of them is: *if a word is pending and not masked, its descriptor is readable, or the one who made
//! it so is about to write it, or the owner is inside `take`, past the drain and before its exchange.*
//! * `notify` makes the word pending. Was it neither, it writes the descriptor. Was it pending, the rule held before
//!   and holds on. Was it masked, the rule says nothing, and the unmask that follows will see the pending bit.
//! * `take` drains first and exchanges afterwards. A write that comes after the drain stays; one that came before
//!   belongs to an event whose pending bit the exchange sees, and takes. The other order would lose events: exchange,
//!   (another thread unmasks, the peer notifies and writes), drain.
//! * `unmask` clears MASKED, and writes the descriptor itself when that uncovers a pending bit.
//!
//! A write may come late, after its event was taken: then the descriptor is readable for nothing, once, and `take`
//! answers no.
//!
//! Ordering: each of the steps is AcqRel, and they form one release sequence per word, so the owner that takes an
//! event sees everything each of the notifiers wrote before it, the suppressed ones included.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::io::Errno;

use super::memfd;
use crate::PAGE_SIZE;
use crate::memory::Mapping;

const PENDING: u32 = 1;
const MASKED: u32 = 2;
const OPEN: u32 = 4;

/// Where the words are: far enough apart that no prefetcher ties the ends together.
const WORD: [usize; 2] = [0, 128];

/// Which end of a channel: 0 for the domain that allocated it, 1 for the one that bound to it.
pub(super) type Side = usize;

/// What became of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Notified {
    Sent,
    Suppressed,
    Dropped,
}

/// A channel's descriptors: the page, and each end's eventfd.
#[derive(Debug, Clone)]
pub(super) struct Descriptors {
    pub(super) page: Arc<OwnedFd>,
    pub(super) events: [Arc<OwnedFd>; 2],
}

impl Descriptors {
    pub(super) fn create() -> io::Result<Self> {
        Ok(Self {
            page: Arc::new(memfd::sealed("xen-evtchn", PAGE_SIZE)?),
            events: [Arc::new(memfd::eventfd()?), Arc::new(memfd::eventfd()?)],
        })
    }
}

/// A channel as mapped by one process.
#[derive(Debug)]
pub(super) struct Wire {
    page: Mapping,
    events: [Arc<OwnedFd>; 2],
}

impl Wire {
    pub(super) fn open(descriptors: &Descriptors) -> io::Result<Self> {
        let page = Mapping::of_file(&descriptors.page, 0, PAGE_SIZE, true)?;
        Ok(Self { page, events: descriptors.events.clone() })
    }

    #[inline]
    fn word(&self, side: Side) -> &AtomicU32 {
        self.page.atomic_u32(WORD[side])
    }

    pub(super) fn fd(&self, side: Side) -> BorrowedFd<'_> {
        self.events[side].as_fd()
    }

    fn write(&self, side: Side) -> io::Result<()> {
        match rustix::io::write(&self.events[side], &1u64.to_ne_bytes()) {
            // AGAIN: the counter is full, so it is readable.
            Ok(_) | Err(Errno::AGAIN) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn drain(&self, side: Side) -> io::Result<()> {
        match rustix::io::read(&self.events[side], &mut [0; 8]) {
            Ok(_) | Err(Errno::AGAIN) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// The owner of `side` takes the event that waits, if one does and the end is not masked.
    pub(super) fn take(&self, side: Side) -> io::Result<bool> {
        self.drain(side)?;
        let take = |word: u32| (word & (PENDING | MASKED) == PENDING).then_some(word & !PENDING | MASKED);
        Ok(self.word(side).fetch_update(Ordering::AcqRel, Ordering::Acquire, take).is_ok())
    }

    /// The owner of `side` writes back.
    pub(super) fn unmask(&self, side: Side) -> io::Result<()> {
        let before = self.word(side).fetch_and(!MASKED, Ordering::AcqRel);
        if before & (PENDING | MASKED) == PENDING | MASKED { self.write(side) } else { Ok(()) }
    }

    /// Raises an event at the end `side`.
    #[inline]
    pub(super) fn notify(&self, side: Side) -> io::Result<Notified> {
        let before = self.word(side).fetch_or(PENDING, Ordering::AcqRel);
        if before & OPEN == 0 {
            // The pending bit stays on a word that nobody owns; opening the end starts it anew.
            return Ok(Notified::Dropped);
        }
        if before & (PENDING | MASKED) != 0 {
            return Ok(Notified::Suppressed);
        }
        self.write(side)?;
        Ok(Notified::Sent)
    }

    /// The machine opens an end. A port that was bound is pending at once, as on Xen: events may have been dropped
    /// while nobody was bound.
    pub(super) fn open_end(&self, side: Side, pending: bool) -> io::Result<()> {
        self.drain(side)?;
        self.word(side).store(if pending { OPEN | PENDING } else { OPEN }, Ordering::Release);
        if pending { self.write(side) } else { Ok(()) }
    }

    /// The machine closes an end: from now on events for it are dropped.
    pub(super) fn close_end(&self, side: Side) {
        self.word(side).store(0, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU64;

    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    fn wire() -> Wire {
        let wire = Wire::open(&Descriptors::create().unwrap()).unwrap();
        wire.open_end(0, false).unwrap();
        wire.open_end(1, true).unwrap();
        wire
    }

    fn readable(wire: &Wire, side: Side) -> bool {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut [PollFd::from_borrowed_fd(wire.fd(side), PollFlags::IN)], Some(&now)).unwrap() == 1
    }

    #[test]
    fn an_event_is_taken_once_and_the_end_stays_masked() {
        let wire = wire();
        assert!(!readable(&wire, 0));
        assert!(!wire.take(0).unwrap());
        assert_eq!(wire.notify(0).unwrap(), Notified::Sent);
        assert_eq!(wire.notify(0).unwrap(), Notified::Suppressed);
        assert!(readable(&wire, 0));
        assert!(wire.take(0).unwrap());
        assert!(!readable(&wire, 0));
        assert_eq!(wire.notify(0).unwrap(), Notified::Suppressed);
        assert!(!readable(&wire, 0), "masked");
        assert!(!wire.take(0).unwrap(), "masked");
        wire.unmask(0).unwrap();
        assert!(readable(&wire, 0), "remembered");
        assert!(wire.take(0).unwrap());
        wire.unmask(0).unwrap();
        wire.unmask(0).unwrap();
        assert!(!readable(&wire, 0));
        assert_eq!(wire.notify(0).unwrap(), Notified::Sent);
    }

    #[test]
    fn a_closed_end_drops_events_and_opens_fresh() {
        let wire = wire();
        assert!(readable(&wire, 1), "pending when bound");
        wire.close_end(1);
        assert_eq!(wire.notify(1).unwrap(), Notified::Dropped);
        wire.open_end(1, true).unwrap();
        assert!(readable(&wire, 1) && wire.take(1).unwrap());
    }

    /// Notifiers write numbers and kick; the owner takes, reads, works, writes back, and sleeps in poll without a
    /// timeout to save it. Were an event lost, the sum would never be reached and the poll below would time out.
    #[test]
    fn no_event_is_lost() {
        const ROUNDS: u64 = 1_000_000;
        let wire = wire();
        let published = [const { AtomicU64::new(0) }; 2];
        std::thread::scope(|scope| {
            for cell in &published {
                let wire = &wire;
                scope.spawn(move || {
                    for round in 1..=ROUNDS / 2 {
                        cell.store(round, Ordering::Relaxed);
                        wire.notify(0).unwrap();
                    }
                });
            }
            let minute = Timespec { tv_sec: 60, tv_nsec: 0 };
            let mut seen = 0;
            while seen < ROUNDS {
                let ready = poll(&mut [PollFd::from_borrowed_fd(wire.fd(0), PollFlags::IN)], Some(&minute)).unwrap();
                assert_eq!(ready, 1, "an event was lost after {seen} of {ROUNDS}");
                if wire.take(0).unwrap() {
                    seen = published.iter().map(|cell| cell.load(Ordering::Relaxed)).sum();
                    wire.unmask(0).unwrap();
                }
            }
        });
    }

    /// Strict alternation: each side answers every single event. One lost event stops both.
    #[test]
    fn ping_pong() {
        const ROUNDS: u32 = 100_000;
        let wire = wire();
        assert!(wire.take(1).unwrap());
        wire.unmask(1).unwrap();
        let wait = |side: Side| {
            let minute = Timespec { tv_sec: 60, tv_nsec: 0 };
            while !wire.take(side).unwrap() {
                let ready = poll(&mut [PollFd::from_borrowed_fd(wire.fd(side), PollFlags::IN)], Some(&minute)).unwrap();
                assert_eq!(ready, 1, "lost");
            }
            wire.unmask(side).unwrap();
        };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for _ in 0..ROUNDS {
                    wait(1);
                    wire.notify(0).unwrap();
                }
            });
            for _ in 0..ROUNDS {
                wire.notify(1).unwrap();
                wait(0);
            }
        });
    }
}
