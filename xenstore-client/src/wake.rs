//! An eventfd: what one thread writes to and another polls.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};

/// A wake-up that stays readable until it is taken.
#[derive(Debug)]
pub(crate) struct Wake(OwnedFd);

impl Wake {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// Makes the fd readable. Cannot fail: the only refusal of an eventfd that is open is EAGAIN on a full counter,
    /// and then it is readable already.
    pub(crate) fn set(&self) {
        let _already_readable = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Makes the fd unreadable. EAGAIN means it was.
    pub(crate) fn clear(&self) {
        let _already_clear = rustix::io::read(&self.0, &mut [0u8; 8][..]);
    }
}

impl AsFd for Wake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
