//! The board: which domains are alive, for every process to see without asking.
//!
//! One word per domain id, written by the machine alone: 0, or the generation of the domain that has the id now. A
//! copy compares it with the generation it knows, and so notices a death, or another domain under an old id, at the
//! price of one load.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{Ordering, fence};

use super::memfd;
use crate::DomId;
use crate::memory::Mapping;

/// Domain ids end here (DOMID_FIRST_RESERVED of xen/include/public/xen.h).
pub(super) const DOMAINS: u16 = 0x7ff0;
const LEN: usize = DOMAINS as usize * 4;

#[derive(Debug)]
pub(super) struct Board {
    words: Mapping,
}

impl Board {
    /// The machine's own, and the descriptor by which others read it.
    pub(super) fn create() -> io::Result<(Self, OwnedFd)> {
        let (fd, words) = memfd::published("xen-board", LEN)?;
        Ok((Self { words }, fd))
    }

    /// Another process's view.
    pub(super) fn open(fd: impl AsFd) -> io::Result<Self> {
        Ok(Self { words: Mapping::of_file(fd, 0, LEN, false)? })
    }

    /// The generation of the domain that lives under this id, 0 for none.
    #[inline]
    pub(super) fn generation(&self, domid: DomId) -> u32 {
        if domid.0 >= DOMAINS {
            return 0;
        }
        let mut word = [0; 4];
        // Not an atomic: those need writable memory. One aligned volatile load does the same.
        self.words.read_once(usize::from(domid.0) * 4, &mut word);
        fence(Ordering::Acquire);
        u32::from_ne_bytes(word)
    }

    /// Only the machine may.
    pub(super) fn set(&self, domid: DomId, generation: u32) {
        self.words.atomic_u32(usize::from(domid.0) * 4).store(generation, Ordering::Release);
    }
}
