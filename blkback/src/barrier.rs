//! Barriers: a write after everything before it and before everything after it, over all queues of a disk.
//!
//! The guest sees one disk, so what one queue calls "before" may be in flight on another. The queue that took a barrier
//! closes the disk: no queue takes requests until the barrier is done. Each of the others says once that it has
//! finished what it had; when all have, the barrier begins.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Shared by the queues of one disk.
#[derive(Debug, Default)]
pub struct Barriers {
    closed: AtomicBool,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    members: Vec<Option<Member>>,
    /// Queues that took a barrier, in the order they did; the first one's is under way.
    owners: VecDeque<usize>,
}

#[derive(Debug)]
struct Member {
    /// An eventfd that ends the queue's sleep.
    wake: Arc<OwnedFd>,
    /// It has seen that the disk is closed, and has nothing in flight.
    quiet: bool,
}

impl Inner {
    fn wake(&self, mut whom: impl FnMut(usize) -> bool) {
        for (index, member) in self.members.iter().enumerate() {
            let Some(member) = member else { continue };
            if whom(index)
                && let Err(error) = rustix::io::write(&*member.wake, &1u64.to_ne_bytes())
            {
                tracing::error!(%error, "cannot wake a queue for a barrier");
            }
        }
    }

    fn all_quiet(&self) -> bool {
        let Some(&owner) = self.owners.front() else { return false };
        self.members.iter().enumerate().all(|(index, member)| {
            // A queue whose barrier waits for its turn has nothing else in flight.
            index == owner || member.as_ref().is_none_or(|member| member.quiet)
        })
    }
}

/// A queue's place among those of its disk. Dropped, it is waited for no more.
#[derive(Debug)]
pub struct Seat {
    barriers: Arc<Barriers>,
    index: usize,
}

impl Barriers {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes part, before any queue takes its first request. `wake` is an eventfd that ends the queue's sleep.
    pub fn join(self: &Arc<Self>, wake: &Arc<OwnedFd>) -> Seat {
        let mut inner = self.lock();
        inner.members.push(Some(Member { wake: Arc::clone(wake), quiet: false }));
        Seat { barriers: Arc::clone(self), index: inner.members.len() - 1 }
    }
}

impl Seat {
    /// Whether no request may be taken now.
    #[inline]
    pub fn is_closed(&self) -> bool {
        self.barriers.closed.load(Ordering::Acquire)
    }

    /// Closes the disk for a barrier that this queue has taken. It may begin when [`may_begin`](Self::may_begin) says
    /// so; whenever that can have changed, this queue is woken.
    pub fn close(&self) {
        let mut inner = self.barriers.lock();
        inner.owners.push_back(self.index);
        if inner.owners.len() == 1 {
            self.barriers.closed.store(true, Ordering::Release);
            inner.wake(|index| index != self.index);
        }
    }

    /// Says that this queue has nothing in flight but perhaps a barrier of its own, and takes nothing new.
    pub fn quiet(&self) {
        let mut inner = self.barriers.lock();
        // It may have been opened again since the caller looked: then this says nothing about the next barrier.
        if inner.owners.is_empty() {
            return;
        }
        let member = inner.members[self.index].as_mut();
        if member.is_none_or(|member| std::mem::replace(&mut member.quiet, true)) {
            return;
        }
        self.wake_owner(&inner);
    }

    fn wake_owner(&self, inner: &Inner) {
        if inner.all_quiet() {
            let owner = inner.owners.front().copied();
            inner.wake(|index| Some(index) == owner);
        }
    }

    /// Whether it is this queue's barrier's turn and all other queues are quiet.
    pub fn may_begin(&self) -> bool {
        let inner = self.barriers.lock();
        inner.owners.front() == Some(&self.index) && inner.all_quiet()
    }

    /// Its barrier is done, or will not be done.
    pub fn open(&self) {
        let mut inner = self.barriers.lock();
        self.leave(&mut inner);
    }

    fn leave(&self, inner: &mut Inner) {
        let before = inner.owners.len();
        inner.owners.retain(|&owner| owner != self.index);
        if inner.owners.len() == before {
            return;
        }
        if inner.owners.is_empty() {
            for member in inner.members.iter_mut().flatten() {
                member.quiet = false;
            }
            self.barriers.closed.store(false, Ordering::Release);
            inner.wake(|index| index != self.index);
        } else {
            // The next barrier: the queue that just finished has nothing in flight either.
            if let Some(member) = &mut inner.members[self.index] {
                member.quiet = true;
            }
            self.wake_owner(inner);
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut inner = self.barriers.lock();
        inner.members[self.index] = None;
        self.leave(&mut inner);
        self.wake_owner(&inner);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};

    fn wake() -> Arc<OwnedFd> {
        Arc::new(eventfd(0, EventfdFlags::NONBLOCK).unwrap())
    }

    fn rang(wake: &OwnedFd) -> bool {
        rustix::io::read(wake, &mut [0; 8]).is_ok()
    }

    #[test]
    fn a_barrier_waits_for_every_queue_and_the_next_one_for_it() {
        let barriers = Arc::new(Barriers::default());
        let bells = [wake(), wake(), wake()];
        let [one, two, three] = [0, 1, 2].map(|index: usize| barriers.join(&bells[index]));
        one.close();
        assert!(two.is_closed() && rang(&bells[1]) && rang(&bells[2]) && !rang(&bells[0]));
        two.quiet();
        assert!(!one.may_begin() && !rang(&bells[0]));
        three.close();
        three.quiet();
        assert!(one.may_begin() && rang(&bells[0]) && !three.may_begin());
        one.open();
        assert!(three.may_begin() && rang(&bells[2]) && one.is_closed(), "the second begins at once");
        three.open();
        assert!(!one.is_closed() && rang(&bells[0]) && rang(&bells[1]));
        one.close();
        assert!(!one.may_begin(), "who was quiet for one barrier is not for the next");
    }

    #[test]
    fn a_queue_that_is_gone_is_not_waited_for() {
        let barriers = Arc::new(Barriers::default());
        let bells = [wake(), wake()];
        let [one, two] = [0, 1].map(|index: usize| barriers.join(&bells[index]));
        one.close();
        assert!(!one.may_begin());
        drop(two);
        assert!(one.may_begin() && rang(&bells[0]));
        let three = barriers.join(&bells[1]);
        three.quiet();
        assert!(one.may_begin());
        drop(one);
        assert!(!three.is_closed(), "a barrier that died holds up nobody");
    }
}
