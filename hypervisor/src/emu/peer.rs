//! A domain that grants us pages, as our process sees it, and the copy itself.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, OnceLock};

use super::call::{Answer, Reply};
use super::counters::Slot;
use super::link::unexpected;
use super::table::GrantTable;
use crate::memory::Mapping;
use crate::{CopyDirection, CopyOp, DomId, Error, GrantAccess, GrantStatus, PAGE_SIZE, Result};

#[derive(Debug)]
pub(super) struct Peer {
    pub(super) generation: u32,
    pub(super) slot: Slot,
    /// None for a domain that has nothing to grant: dom0, a driver domain.
    memory: Option<PeerMemory>,
}

#[derive(Debug)]
struct PeerMemory {
    fd: Arc<OwnedFd>,
    pages: u32,
    table: GrantTable,
    /// All of the domain's memory, mapped once for everybody in this process: read-only, and writable. A read-only
    /// map is a window of the former, so that a stray write to it faults.
    whole: [OnceLock<Arc<Mapping>>; 2],
}

/// How one copy ended, if it did not end well.
pub(super) enum Refused {
    /// As Xen would have refused it.
    For(GrantStatus),
    /// The grant changed while it was used.
    Torn,
}

impl Peer {
    pub(super) fn open(answer: &Answer) -> Result<Self> {
        let Reply::Peer { generation, pages, slot } = answer.reply else { return Err(unexpected(answer)) };
        let memory = match answer.fds.as_slice() {
            [] => None,
            [fd, table] => {
                let table = open_table(table).map_err(|error| Error::io("mapping a domain's grant table", error))?;
                Some(PeerMemory { fd: Arc::clone(fd), pages, table, whole: Default::default() })
            }
            _ => return Err(unexpected(answer)),
        };
        Ok(Self { generation, slot, memory })
    }

    /// Pages that the machine has agreed to map, side by side. `guard` takes the map back.
    pub(super) fn window(
        &self,
        frames: &[u32],
        access: GrantAccess,
        guard: impl Send + Sync + 'static,
    ) -> io::Result<Mapping> {
        let memory = self.memory.as_ref().ok_or_else(|| io::Error::other("frames of a domain without memory"))?;
        let writable = access == GrantAccess::ReadWrite;
        let side_by_side = frames.windows(2).all(|pair| pair[0].checked_add(1) == Some(pair[1]));
        match frames.first() {
            Some(&first) if side_by_side => {
                let whole = memory.whole(writable)?;
                Ok(Mapping::window(whole, first as usize * PAGE_SIZE, frames.len() * PAGE_SIZE, guard))
            }
            _ => {
                let offsets: Vec<u64> = frames.iter().map(|&frame| u64::from(frame) * PAGE_SIZE as u64).collect();
                Mapping::of_scattered(&memory.fd, &offsets, writable, guard)
            }
        }
    }

    /// Where copies go. Mapped at the first copy.
    pub(super) fn copy_target(&self) -> io::Result<Option<CopyTarget<'_>>> {
        let Some(memory) = &self.memory else { return Ok(None) };
        Ok(Some(CopyTarget { memory, whole: memory.whole(true)? }))
    }
}

impl PeerMemory {
    fn whole(&self, writable: bool) -> io::Result<&Arc<Mapping>> {
        let slot = &self.whole[usize::from(writable)];
        if let Some(whole) = slot.get() {
            return Ok(whole);
        }
        // Two threads may both map it; one mapping is then dropped again.
        let mapped = Mapping::of_file(&self.fd, 0, self.pages as usize * PAGE_SIZE, writable)?;
        Ok(slot.get_or_init(|| Arc::new(mapped)))
    }
}

/// A peer's memory and grant table, ready for copies.
pub(super) struct CopyTarget<'a> {
    memory: &'a PeerMemory,
    whole: &'a Mapping,
}

impl CopyTarget<'_> {
    /// One copy, checked as Xen checks it. `local` has room for it: the caller made sure.
    #[inline]
    pub(super) fn copy(&self, us: DomId, local: &Mapping, op: &CopyOp) -> Result<(), Refused> {
        let table = &self.memory.table;
        let entry = table.load(op.gref).ok_or(Refused::For(GrantStatus::BadGrantRef))?;
        let access = match op.direction {
            CopyDirection::FromGuest => GrantAccess::ReadOnly,
            CopyDirection::ToGuest => GrantAccess::ReadWrite,
        };
        let frame = entry.check(us, access, self.memory.pages).map_err(Refused::For)?;
        let (offset, len) = (usize::from(op.offset), usize::from(op.len));
        if offset + len > PAGE_SIZE {
            return Err(Refused::For(GrantStatus::BadCopyArg));
        }
        let at = frame as usize * PAGE_SIZE + offset;
        match op.direction {
            CopyDirection::FromGuest => {
                Mapping::copy(self.whole, at, local, op.local, len);
                // As in a seqlock: the bytes were loaded before the entry is looked at again.
                fence(Ordering::Acquire);
            }
            CopyDirection::ToGuest => {
                Mapping::copy(local, op.local, self.whole, at, len);
                // Stores may pass a later load; only this fence keeps them before it.
                fence(Ordering::SeqCst);
            }
        }
        // Xen holds the grant while it copies, and the guest's revocation is told so. We hold nothing, for the price
        // of two exchanges more than the copy of a small piece costs; instead we notice afterwards.
        if table.load(op.gref).is_some_and(|now| now.is_same_grant(entry)) { Ok(()) } else { Err(Refused::Torn) }
    }
}

pub(super) fn open_table(fd: &OwnedFd) -> io::Result<GrantTable> {
    // The machine made and sealed it; its size is what the file says.
    let len = usize::try_from(rustix::fs::fstat(fd)?.st_size).map_err(io::Error::other)?;
    Ok(GrantTable::new(Mapping::of_file(fd, 0, len, true)?))
}
